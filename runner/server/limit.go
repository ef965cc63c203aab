package server

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Limits are what one caller may ask of a node. The zero value allows nothing.
type Limits struct {
	// PerSecond calls on average, and Burst at once.
	PerSecond float64
	Burst     int
	// Streams that are open at the same time, watched jobs and followed logs together.
	Streams int
}

// DefaultLimits let a scheduler follow as many jobs as a node is likely to have, and ask for
// their state besides. They keep one caller from filling the node.
func DefaultLimits() Limits { return Limits{PerSecond: 100, Burst: 500, Streams: 1000} }

const (
	// maxCallers bounds the callers that are counted. All are authenticated.
	maxCallers = 10_000
	// idleAfter is how long a caller is remembered who asks for nothing. A full bucket
	// is filled long before.
	idleAfter = 10 * time.Minute
)

// quota counts the calls of each caller.
type quota struct {
	limits Limits

	mu      sync.Mutex // guards what follows
	callers map[string]*asked
}

// asked is what one caller has asked for.
type asked struct {
	bucket  *rate.Limiter
	streams int
	last    time.Time
}

func newQuota(l Limits) *quota { return &quota{limits: l, callers: map[string]*asked{}} }

// take counts a call and returns what to do when it is over, or, where the caller has
// asked for too much, what the limit is. Nobody queues.
func (q *quota) take(name string, stream bool) (done func(), over string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := time.Now()
	c := q.callers[name]
	if c == nil {
		if len(q.callers) >= maxCallers {
			q.forget(now)
		}
		if len(q.callers) >= maxCallers {
			return nil, "this node counts no more callers"
		}
		c = &asked{bucket: rate.NewLimiter(rate.Limit(q.limits.PerSecond), q.limits.Burst)}
		q.callers[name] = c
	}
	c.last = now
	if stream && c.streams >= q.limits.Streams {
		return nil, "too many open streams"
	}
	if !c.bucket.AllowN(now, 1) {
		return nil, "too many calls a second"
	}
	if !stream {
		return func() {}, ""
	}
	c.streams++
	return func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		c.streams--
		c.last = time.Now()
	}, ""
}

// forget lets go of callers that ask for nothing. q.mu is held.
func (q *quota) forget(now time.Time) {
	for name, c := range q.callers {
		if c.streams == 0 && now.Sub(c.last) > idleAfter {
			delete(q.callers, name)
		}
	}
}
