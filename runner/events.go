package runner

import (
	"context"
	"fmt"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/journal"
)

// feed is what watchers of one job are told. Everything but log lines is in the
// journal too; the newest log lines stay in memory.
type feed struct {
	job     string
	journal *journal.Journal

	mu     sync.Mutex // guards what follows
	last   uint64
	events []*agentv1.WatchResponse
	bytes  int // of log lines in events
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
	f.bytes += len(e.GetLog().GetData())
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

// maxFeed and maxFeedBytes bound the events and log bytes of a job that are kept
// in memory.
const (
	maxFeed      = 1 << 16
	maxFeedBytes = 16 << 20
)

// trim drops the oldest log lines when there is too much; the journal has
// everything else. Watchers hold parts of the old slice, so it makes a new one.
// f.mu is held.
func (f *feed) trim() {
	if len(f.events) <= maxFeed && f.bytes <= maxFeedBytes {
		return
	}
	kept := make([]*agentv1.WatchResponse, 0, len(f.events))
	events, bytes := len(f.events), f.bytes
	for _, e := range f.events {
		if l := e.GetLog(); l != nil && (events > maxFeed*3/4 || bytes > maxFeedBytes*3/4) {
			events--
			bytes -= len(l.GetData())
			continue
		}
		kept = append(kept, e)
	}
	f.events, f.bytes = kept, bytes
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
