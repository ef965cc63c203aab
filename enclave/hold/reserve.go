package hold

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"time"

	"github.com/coffer-run/coffer/enclave/dma"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
)

// Await, told on c to begin, makes regions of sizes bytes ready on memory node number
// near-1, or anywhere if near is 0, and waits to be told of a job, once. io.EOF means that
// there will be none. Harden comes before. What is returned is the caller's.
func Await(ctx context.Context, c *net.UnixConn, sizes []int64, near int, log *slog.Logger) (_ holdapi.Job, _ *dma.Reserve, err error) {
	defer context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })()
	if err := holdapi.Begin.Await(c); err != nil {
		return holdapi.Job{}, nil, err
	}
	reserve, err := dma.NewReserve(regionName, sizes, near)
	if err != nil {
		return holdapi.Job{}, nil, err
	}
	fill, stop := context.WithCancel(ctx)
	defer stop()
	filled := make(chan error, 1)
	go func() {
		// One: whoever has work comes first.
		err := reserve.Prefault(fill, 1)
		if err == nil {
			err = holdapi.Ready.Say(c)
		}
		filled <- err
	}()
	job, err := holdapi.AwaitJob(c)
	stop()
	if ferr := <-filled; ferr != nil && fill.Err() == nil {
		log.WarnContext(ctx, "make memory ready", "error", ferr)
	}
	if err != nil {
		_ = reserve.Close()
		return holdapi.Job{}, nil, err
	}
	return job, reserve, nil
}

// settle is told that all inputs are there.
func (h *Holder) settle() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.running(); err != nil {
		return err
	}
	return h.share()
}

// share gives the inputs' files what suits them of the reserve, the largest first,
// gives up the rest, and goes on with what is missing. Of inputs that do not fit
// into memory none lies in a region. h.mu is held.
func (h *Holder) share() error {
	if h.reserve == nil {
		return nil
	}
	reserve := h.reserve
	h.reserve = nil
	type file struct {
		in    *heldInput
		place int
	}
	var files []file
	for _, in := range h.inputs {
		for i, n := range in.sizes {
			if h.resident() && n >= minPrefault {
				files = append(files, file{in, i})
			}
		}
	}
	slices.SortStableFunc(files, func(a, b file) int { return cmp.Compare(b.in.sizes[b.place], a.in.sizes[a.place]) })
	taken := int64(0)
	for _, f := range files {
		if r := h.pool.Take(reserve, f.in.sizes[f.place]); r != nil {
			f.in.prepared[f.place] = r
			taken += r.Size()
		}
	}
	h.log.Info("memory was ready", "taken", taken)
	for _, in := range h.inputs {
		h.prepare(in)
	}
	if err := reserve.Close(); err != nil {
		return fmt.Errorf("give back memory that is not needed: %w", err)
	}
	return nil
}
