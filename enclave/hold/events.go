package hold

import (
	"context"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
)

const (
	// maxEvents bounds what a job can make the holder remember; events beyond it
	// are counted only. reservedEvents are kept for those that people must see.
	maxEvents      = 10_000
	reservedEvents = 2_000
	// maxText bounds each text in an event, in bytes, but for the path of a program or a file: maxPath is the longest that a
	// call takes with each byte of it escaped (tools/gvisor/sink), so that rules see all of it.
	maxText = 512
	maxPath = 5 * unix.PathMax
	// maxPaths bounds what all paths have beyond maxText, in bytes.
	maxPaths = 16 << 20
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
	// paths are the bytes of paths beyond maxText.
	paths int
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
	length := maxText
	if e.Kind == "exec" || e.Kind == "open" {
		length = maxPath
	}
	e.Detail, e.Process = text(e.Detail, length), text(e.Process, maxText)
	l.mu.Lock()
	defer l.mu.Unlock()
	long := max(0, len(e.Detail)-maxText)
	limit := maxEvents - reservedEvents
	switch e.Kind {
	case "container-start", eventResumed, eventInputsOpen, eventInputsFailed, "operator-exec", "trace-lost", eventLeaseStop, eventLeaseOver, eventKilled, eventScrubbed:
		limit = maxEvents
	case "checkpoint":
		limit = maxEvents + maxCommits
	}
	if len(l.list) >= limit || long > maxPaths-l.paths {
		l.dropped++
		return
	}
	l.paths += long
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

// text makes bytes from a job fit for an event, length bytes at most.
func text(s string, length int) string {
	if len(s) > length {
		s = s[:length]
	}
	return strings.ToValidUTF8(s, "?")
}
