package runner

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/journal"
	"github.com/coffer-run/coffer/runner/logs"
)

// feed is what watchers of one job are told. Everything but log lines is in the
// journal too; log lines are in the log that is kept, and in memory where there is
// none.
type feed struct {
	job     string
	journal *journal.Journal

	mu     sync.Mutex // guards what follows
	log    *logs.Log
	last   uint64
	events []*agentv1.WatchResponse
	refs   map[uint64]logs.Ref // where the lines of an event lie, by its number
	bytes  int                 // of log lines in events
	cut    int64               // of the log, as watchers know
	closed bool
	more   chan struct{} // closed and replaced when something was added

	write sync.Mutex      // one writes at a time, in order; taken before mu
	owed  []journal.Event // what the journal could not be given yet, the oldest first
}

func newFeed(job string, j *journal.Journal) *feed {
	return &feed{job: job, journal: j, refs: map[uint64]logs.Ref{}, more: make(chan struct{})}
}

// keep hands over the log in which lines are kept; nil if there is none.
func (f *feed) keep(l *logs.Log) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.log = l
}

// kept returns the log, and whether nothing more will come.
func (f *feed) kept() (*logs.Log, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.log, f.closed
}

// forget lets go of the log's files.
func (f *feed) forget() error {
	f.mu.Lock()
	l := f.log
	f.log = nil
	f.mu.Unlock()
	if l == nil {
		return nil
	}
	return l.Forget()
}

// cutMore reports whether watchers should hear that so many bytes were cut.
func (f *feed) cutMore(cut int64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if cut == 0 || cut < 2*f.cut {
		return false
	}
	f.cut = cut
	return true
}

// addLog adds lines. What fails to keep them is handed to again, which may repeat it; if
// they cannot be kept they stay in memory only.
func (f *feed) addLog(l logs.Entry, again func(err error, f func() error) error) error {
	e := &agentv1.LogEvent{Stream: l.Stream, Offset: l.Offset}
	kept, _ := f.kept()
	var ref logs.Ref
	var err error
	if kept != nil {
		write := func() (err error) { ref, err = kept.Append(l); return err }
		if err = write(); err != nil {
			err = again(err, write)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	w := &agentv1.WatchResponse{Event: &agentv1.WatchResponse_Log{Log: e}}
	if kept == nil || err != nil {
		e.Data = l.Data
	}
	f.put(w, l.At)
	if e.Data == nil {
		f.refs[w.GetSequence()] = ref
	}
	return err
}

// put numbers an event and wakes the watchers. Sequence numbers are times, so that
// they go on rising after an agent's restart without being written down for every
// log line. f.mu is held.
func (f *feed) put(e *agentv1.WatchResponse, now time.Time) {
	e.Sequence = max(f.last+1, uint64(now.UnixNano())) //nolint:gosec // after 1970
	e.TimeUnixNano = now.UnixNano()
	f.last = e.Sequence
	f.events = append(f.events, e)
	f.bytes += len(e.GetLog().GetData())
	f.trim()
	close(f.more)
	f.more = make(chan struct{})
}

// add numbers an event, tells the watchers and writes it down. What cannot be written is
// owed to the journal, and is written before the next event.
func (f *feed) add(ctx context.Context, e *agentv1.WatchResponse) error {
	now := time.Now()
	f.mu.Lock()
	f.put(e, now)
	f.mu.Unlock()
	// What passes is not written down: log lines, where a job waits, and numbers.
	if e.GetQueue() != nil || e.GetMetrics() != nil {
		return nil
	}
	b, err := proto.Marshal(e)
	if err != nil {
		return fmt.Errorf("encode event: %w", err)
	}
	f.write.Lock()
	defer f.write.Unlock()
	f.owed = append(f.owed, journal.Event{Sequence: e.GetSequence(), At: now, Body: b})
	return f.pay(ctx)
}

// settle writes what is owed to the journal.
func (f *feed) settle(ctx context.Context) error {
	f.write.Lock()
	defer f.write.Unlock()
	return f.pay(ctx)
}

// pay writes what is owed, until the first that cannot be written. f.write is held.
func (f *feed) pay(ctx context.Context) error {
	for len(f.owed) > 0 {
		if err := f.journal.AddEvent(ctx, f.job, f.owed[0]); err != nil {
			f.owed = f.owed[max(0, len(f.owed)-maxOwed):]
			return err
		}
		f.owed = f.owed[1:]
	}
	return nil
}

// maxOwed bounds the events of a job that wait for the journal; beyond it the oldest are
// dropped.
const maxOwed = 4096

// maxFeed and maxFeedBytes bound the events and log bytes of a job that are kept
// in memory.
const (
	maxFeed      = 1 << 16
	maxFeedBytes = 16 << 20
)

// trim drops the oldest log lines and numbers when there is too much; the journal has
// everything else. Watchers hold parts of the old slice, so it makes a new one.
// f.mu is held.
func (f *feed) trim() {
	if len(f.events) <= maxFeed && f.bytes <= maxFeedBytes {
		return
	}
	kept := make([]*agentv1.WatchResponse, 0, len(f.events))
	events, bytes := len(f.events), f.bytes
	for _, e := range f.events {
		if l := e.GetLog(); (l != nil || e.GetMetrics() != nil) && (events > maxFeed*3/4 || bytes > maxFeedBytes*3/4) {
			events--
			bytes -= len(l.GetData())
			delete(f.refs, e.GetSequence())
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

// maxAfter and maxAfterBytes bound what after returns at once.
const (
	maxAfter      = 1024
	maxAfterBytes = 1 << 20
)

// after returns events after a sequence number, the oldest first, whether the feed
// is closed, and a channel that is closed when there is more. There are none left
// when it returns none. Lines that are no longer kept come empty.
func (f *feed) after(seq uint64) ([]*agentv1.WatchResponse, bool, <-chan struct{}) {
	f.mu.Lock()
	i, found := slices.BinarySearchFunc(f.events, seq, func(e *agentv1.WatchResponse, seq uint64) int { return cmp.Compare(e.GetSequence(), seq) })
	if found {
		i++
	}
	part := slices.Clone(f.events[i:min(i+maxAfter, len(f.events))])
	refs := make([]logs.Ref, len(part))
	there := make([]bool, len(part))
	for k, e := range part {
		refs[k], there[k] = f.refs[e.GetSequence()]
	}
	log, closed, more := f.log, f.closed, f.more
	f.mu.Unlock()
	out, size := part[:0], 0
	for k, e := range part {
		if there[k] {
			l := &agentv1.LogEvent{Stream: e.GetLog().GetStream(), Offset: e.GetLog().GetOffset()}
			if log != nil {
				if got, err := log.At(refs[k]); err == nil {
					l.Data = got.Data
				}
			}
			e = &agentv1.WatchResponse{Sequence: e.GetSequence(), TimeUnixNano: e.GetTimeUnixNano(), Event: &agentv1.WatchResponse_Log{Log: l}}
		}
		out = append(out, e)
		if size += len(e.GetLog().GetData()); size >= maxAfterBytes {
			break
		}
	}
	return out, closed, more
}
