package hold

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
)

// finish ends the job: no path opens any more, logs are drained, mounts go,
// regions are scrubbed and read back, data keys destroyed. It is done once; a
// second call waits for the first. The session key lives until exit, to sign what
// this returns.
func (h *Holder) finish(ctx context.Context) (holdapi.Status, error) {
	h.mu.Lock()
	if h.finished != nil {
		finished := h.finished
		h.mu.Unlock()
		<-finished
		return h.status(), nil
	}
	h.finished = make(chan struct{})
	h.mu.Unlock()

	err := h.takeDown(ctx)
	if err != nil {
		h.log.ErrorContext(ctx, "finish", "error", err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.scrubbed = err == nil
	if h.scrubbed {
		h.events.add(holdapi.Event{Kind: eventScrubbed})
	}
	h.final = h.current()
	close(h.finished)
	h.events.close()
	if err != nil {
		return h.final, &apiError{holdapi.CodeIO, err}
	}
	return h.final, nil
}

// takeDown takes down whatever was set up, in the order in which it stops
// plaintext from going out.
func (h *Holder) takeDown(ctx context.Context) error {
	var errs []error
	if h.trace != nil {
		// Shuts the gate.
		h.trace.finish()
	}
	for _, l := range []*logStream{h.stdout, h.stderr} {
		if l != nil {
			errs = append(errs, l.finish(ctx))
		}
	}
	// A decryption under way ends at its next chunk, and whoever waits for it now.
	h.end()
	if h.handout != nil {
		errs = append(errs, h.handout.close())
	}
	h.mu.Lock()
	waiting := h.state == decrypting
	over := h.reseal.over
	h.mu.Unlock()
	if waiting {
		<-h.filled
	}
	if over != nil {
		<-over
	}
	if h.ckptFS != nil {
		errs = append(errs, h.ckptFS.close(), h.ckptFS.unmount())
	}
	if h.inputFS != nil {
		errs = append(errs, h.inputFS.unmount())
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, in := range h.inputs {
		in.unprepare()
	}
	if h.demand != nil {
		errs = append(errs, h.demand.close())
	}
	errs = append(errs, h.reserve.Close(), h.pool.Close())
	for _, k := range h.keys {
		k.key.Destroy()
	}
	if h.recipient != nil {
		h.recipient.Destroy()
	}
	for _, in := range h.inputs {
		errs = append(errs, in.root.Close())
	}
	if h.sink != nil {
		errs = append(errs, h.sink.root.Close())
	}
	errs = append(errs, h.reseal.close())
	if h.alarm != nil {
		h.alarm.close()
	}
	errs = append(errs, h.cfg.Procs.Close(), h.removeNames())
	return errors.Join(errs...)
}

// removeNames takes away what Create made under the run folder. Sockets go with
// their listeners.
func (h *Holder) removeNames() error {
	var errs error
	for _, n := range h.made {
		if err := os.Remove(h.path(n)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = errors.Join(errs, fmt.Errorf("clean up: %w", err))
		}
	}
	h.made = nil
	return errs
}
