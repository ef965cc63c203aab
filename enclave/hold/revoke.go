package hold

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/enclave/seal"
)

// Kinds of events of a lease's end.
const (
	eventLeaseStop = "lease-stop"
	eventLeaseOver = "lease-over"
	eventKilled    = "job-killed"
	eventScrubbed  = "scrubbed"
)

// openLease makes the lease and the alarm that rings when it ends.
func (h *Holder) openLease() error {
	l := &lease{job: h.cfg.JobID, session: plan.Sum(h.session.Public()), now: bootTime, stopping: h.mustStop, over: h.takeBack}
	a, err := newAlarm(l.expire)
	if err != nil {
		return err
	}
	l.arm = a.set
	h.lease, h.alarm = l, a
	return nil
}

// mustStop records the broker's word. The agent tells the job, and whoever tells
// it not, the lease's end comes all the same.
func (h *Holder) mustStop(s holdapi.Lease) {
	h.log.Warn("the job must stop", "reason", s.Reason, "grace", time.Duration(s.RemainingMillis)*time.Millisecond)
	h.events.add(holdapi.Event{Kind: eventLeaseStop, Detail: s.Reason})
}

// takeBack ends the job whose lease is over, without an agent: its processes are
// killed while its memory is scrubbed, then everything else goes. Keys are used
// no more from before this is called.
func (h *Holder) takeBack(s holdapi.Lease) {
	ctx := context.WithoutCancel(h.ending)
	h.log.Warn("the lease is over", "code", s.Code, "reason", s.Reason)
	h.events.add(holdapi.Event{Kind: eventLeaseOver, Detail: s.Code + ": " + s.Reason})
	// Decryption under way ends at its next chunk.
	h.end()
	h.mu.Lock()
	finishing := h.finished != nil
	h.mu.Unlock()
	if finishing {
		return
	}
	var kill, scrub error
	var wg sync.WaitGroup
	wg.Go(func() {
		if kill = killGroup(ctx, h.cfg.Procs); kill == nil {
			h.events.add(holdapi.Event{Kind: eventKilled})
		}
	})
	wg.Go(func() { scrub = h.pool.Scrub() })
	wg.Wait()
	if err := errors.Join(kill, scrub); err != nil {
		h.log.Error("take back", "error", err)
	}
	if _, err := h.finish(ctx); err != nil {
		h.log.Error("take back", "error", err)
	}
}

// leased has each file of a checkpoint ask for the lease before each part of it
// that is read, which is right before the part is sealed.
func (h *Holder) leased(files []seal.Source) []seal.Source {
	out := make([]seal.Source, len(files))
	for i, f := range files {
		open := f.Open
		f.Open = func() (seal.Reader, error) {
			r, err := open()
			if err != nil {
				return nil, err
			}
			return leasedReader{r, h.lease.use}, nil
		}
		out[i] = f
	}
	return out
}

type leasedReader struct {
	seal.Reader
	use func() error
}

func (r leasedReader) ReadAt(p []byte, off int64) (int, error) {
	if err := r.use(); err != nil {
		return 0, fmt.Errorf("seal: %w", err)
	}
	return r.Reader.ReadAt(p, off)
}

// View is of seal.Viewer.
func (r leasedReader) View(off int64, n int) ([]byte, error) {
	if err := r.use(); err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	if v, ok := r.Reader.(seal.Viewer); ok {
		return v.View(off, n)
	}
	return nil, nil
}
