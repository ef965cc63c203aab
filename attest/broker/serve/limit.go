package serve

import (
	"fmt"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/coffer-run/coffer/attest/broker"
)

// Limit is what one caller may ask for.
type Limit struct {
	// PerSecond calls on average, and Burst at once.
	PerSecond float64
	Burst     int
	// Waiting calls may be in work at the same time.
	Waiting int
}

// DefaultLimit lets one agent start a hundred jobs at once. It is less than what
// a broker on two cores can do, so that one caller alone does not fill it.
func DefaultLimit() Limit { return Limit{PerSecond: 100, Burst: 400, Waiting: 32} }

// maxCallers bounds the callers that are remembered. All are authenticated.
const maxCallers = 10_000

// idleAfter is how long a caller is remembered who asks for nothing; a full
// bucket is filled long before.
const idleAfter = 10 * time.Minute

// quota counts the calls of each caller.
type quota struct {
	limit Limit

	mu      sync.Mutex
	callers map[string]*caller
}

type caller struct {
	bucket  *rate.Limiter
	waiting int
	last    time.Time
}

func newQuota(l Limit) *quota { return &quota{limit: l, callers: map[string]*caller{}} }

// take counts one call, and returns what to do when it is over. Whoever asks
// too much gets broker.ErrTooMany at once: nobody queues.
func (q *quota) take(name string) (done func(), err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := time.Now()
	c := q.callers[name]
	if c == nil {
		if len(q.callers) >= maxCallers {
			q.forget(now)
		}
		if len(q.callers) >= maxCallers {
			return nil, fmt.Errorf("%w: rate.callers: more callers than this broker counts, try again", broker.ErrTooMany)
		}
		c = &caller{bucket: rate.NewLimiter(rate.Limit(q.limit.PerSecond), q.limit.Burst)}
		q.callers[name] = c
	}
	c.last = now
	switch {
	case c.waiting >= q.limit.Waiting:
		return nil, fmt.Errorf("%w: rate.waiting: %d calls of %s are in work, try again", broker.ErrTooMany, c.waiting, name)
	case !c.bucket.AllowN(now, 1):
		return nil, fmt.Errorf("%w: rate.calls: more than %g calls a second of %s, try again", broker.ErrTooMany, q.limit.PerSecond, name)
	}
	c.waiting++
	return func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		c.waiting--
	}, nil
}

func (q *quota) forget(now time.Time) {
	for name, c := range q.callers {
		if c.waiting == 0 && now.Sub(c.last) > idleAfter {
			delete(q.callers, name)
		}
	}
}
