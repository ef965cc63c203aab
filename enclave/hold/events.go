package hold

import (
	"context"
	"strings"
	"sync"
	"time"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
)

const (
	// maxEvents bounds what a job can make the holder remember; events beyond it
	// are counted only. reservedEvents are kept for those that people must see.
	maxEvents      = 10_000
	reservedEvents = 2_000
	// maxText bounds each text in an event, in bytes.
	maxText = 512
	// maxBatch and maxBatchBytes bound one answer, in events and in bytes of JSON.
	maxBatch      = 256
	maxBatchBytes = 96 << 10
	// maxEscape is the most bytes that encoding/json writes for one of a string.
	maxEscape = 6
	// maxWait bounds how long one Logs or Events operation waits.
	maxWait = time.Minute
)

// eventLog is an append-only list that can be waited on.
type eventLog struct {
	now func() time.Time

	mu   sync.Mutex
	list []holdapi.Event
	// news is closed and replaced when the list grows.
	news    chan struct{}
	dropped int64
	// over: nothing will follow, so nobody need wait.
	over bool
}

func newEventLog(now func() time.Time) *eventLog {
	return &eventLog{now: now, news: make(chan struct{})}
}

// add appends e. Those that a job can cause at will (exec, open, connect, ptrace,
// input-error, checkpoint-error) stop at the bound, so that they cannot push out
// the others.
func (l *eventLog) add(e holdapi.Event) {
	e.Detail, e.Process = text(e.Detail), text(e.Process)
	l.mu.Lock()
	defer l.mu.Unlock()
	limit := maxEvents - reservedEvents
	switch e.Kind {
	case "container-start", eventResumed, eventInputsOpen, eventInputsFailed, "operator-exec", "trace-lost", eventLeaseStop, eventLeaseOver, eventKilled, eventScrubbed:
		limit = maxEvents
	case "checkpoint":
		limit = maxEvents + maxCommits
	}
	if len(l.list) >= limit {
		l.dropped++
		return
	}
	e.Sequence = uint64(len(l.list) + 1)
	if e.UnixNano == 0 {
		e.UnixNano = l.now().UnixNano()
	}
	l.list = append(l.list, e)
	close(l.news)
	l.news = make(chan struct{})
}

// close ends every wait.
func (l *eventLog) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.over = true
	close(l.news)
	l.news = make(chan struct{})
}

func (l *eventLog) after(ctx context.Context, seq uint64, wait time.Duration) []holdapi.Event {
	t := time.NewTimer(min(wait, maxWait))
	defer t.Stop()
	for {
		l.mu.Lock()
		if seq < uint64(len(l.list)) {
			out, size := []holdapi.Event(nil), 0
			for _, e := range l.list[seq:] {
				// A job chooses the text, and JSON may take six bytes for one of it.
				size += 256 + maxEscape*(len(e.Detail)+len(e.Process)+len(e.Digest))
				if e.Checkpoint != nil {
					size += 2*(len(e.Checkpoint.Record)+len(e.Checkpoint.Signature)) + maxEscape*len(e.Checkpoint.Name)
				}
				if len(out) > 0 && (size > maxBatchBytes || len(out) == maxBatch) {
					break
				}
				out = append(out, e)
			}
			l.mu.Unlock()
			return out
		}
		news, over := l.news, l.over
		l.mu.Unlock()
		if over {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
			return nil
		case <-news:
		}
	}
}

// text makes bytes from a job fit for an event.
func text(s string) string {
	if len(s) > maxText {
		s = s[:maxText]
	}
	return strings.ToValidUTF8(s, "?")
}
