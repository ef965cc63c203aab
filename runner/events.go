package runner

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/journal"
)

// feed is what watchers of one job are told. Everything but log lines is in the
// journal too; log lines stay in memory, at most the job's output budget.
type feed struct {
	job     string
	journal *journal.Journal

	mu     sync.Mutex // guards what follows
	last   uint64
	events []*agentv1.WatchResponse
	closed bool
	more   chan struct{} // closed and replaced when something was added
}

func newFeed(job string, j *journal.Journal) *feed {
	return &feed{job: job, journal: j, more: make(chan struct{})}
}

// add numbers an event and tells the watchers. Sequence numbers are times, so
// that they go on rising after an agent's restart without being written down for
// every log line.
func (f *feed) add(ctx context.Context, e *agentv1.WatchResponse) error {
	now := time.Now()
	f.mu.Lock()
	e.Sequence = max(f.last+1, uint64(now.UnixNano())) //nolint:gosec // after 1970
	e.TimeUnixNano = now.UnixNano()
	f.last = e.Sequence
	f.events = append(f.events, e)
	f.trim()
	close(f.more)
	f.more = make(chan struct{})
	f.mu.Unlock()

	if e.GetLog() != nil {
		return nil
	}
	b, err := proto.Marshal(e)
	if err != nil {
		return fmt.Errorf("encode event: %w", err)
	}
	return f.journal.AddEvent(ctx, f.job, journal.Event{Sequence: e.GetSequence(), At: now, Body: b})
}

// maxFeed bounds the events of a job that are kept in memory.
const maxFeed = 1 << 16

// trim drops the oldest log lines when there are too many events: the journal
// has everything else, and the holder the lines while the job runs. f.mu is held.
func (f *feed) trim() {
	if len(f.events) <= maxFeed {
		return
	}
	drop := maxFeed / 4
	f.events = slices.DeleteFunc(f.events, func(e *agentv1.WatchResponse) bool {
		old := drop > 0 && e.GetLog() != nil
		if old {
			drop--
		}
		return old
	})
}

// close tells the watchers that nothing more will come.
func (f *feed) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.closed {
		f.closed = true
		close(f.more)
		f.more = make(chan struct{})
	}
}

// after returns the events after a sequence number, whether the feed is closed,
// and a channel that is closed when there is more.
func (f *feed) after(seq uint64) ([]*agentv1.WatchResponse, bool, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	i := len(f.events)
	for i > 0 && f.events[i-1].GetSequence() > seq {
		i--
	}
	return f.events[i:len(f.events):len(f.events)], f.closed, f.more
}
