package runner

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/coffer-run/coffer/enclave/device"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/runner/holder"
	"github.com/coffer-run/coffer/runner/jobspec"
	"github.com/coffer-run/coffer/runner/sandbox"
	"github.com/coffer-run/coffer/runner/source"
)

// warmOwn is room for what a holder that waits has besides its regions, in bytes.
const warmOwn = 128 << 20

// warm keeps one holder that belongs to no job and has memory ready for the next
// one's inputs (docs/design/021-warm-holder.md). It is started while no job runs.
// Jobs come first: it has memory that no job has, and ends when one needs that. A nil
// warm keeps none.
type warm struct {
	regions []int64
	// bytes is what it may have in all; group is its cgroup; near is as nearNode has it.
	bytes int64
	group string
	near  int

	mu       sync.Mutex // guards what follows, and is held over starts and ends
	standing *holder.Warm
}

// openWarm also ends what an earlier agent left: a holder that got a job is in that
// job's group.
func (a *Agent) openWarm(ctx context.Context) (*warm, error) {
	w := &warm{regions: a.WarmRegions, bytes: warmOwn, group: sandbox.JobCgroup(a.Cgroup, "warm")}
	if err := sandbox.OpenCgroup(w.group).Remove(); err != nil {
		return nil, err
	}
	if len(w.regions) == 0 {
		return nil, nil
	}
	if len(w.regions) > holdapi.MaxWarmRegions {
		return nil, fmt.Errorf("%d warm regions: at most %d", len(w.regions), holdapi.MaxWarmRegions)
	}
	total, _, _ := a.queue.look()
	for _, n := range w.regions {
		if n <= 0 || n > total.MemoryBytes-w.bytes {
			return nil, fmt.Errorf("warm regions of %v bytes: the node has %d for jobs", w.regions, total.MemoryBytes)
		}
		w.bytes += n
	}
	if len(a.uuids) > 0 {
		st, err := a.GPUs.State(ctx, a.uuids)
		if err != nil {
			return nil, fmt.Errorf("ask where the GPUs are: %w", err)
		}
		w.near = device.Near(st.GPUs)
	}
	return w, nil
}

// warmUp starts a holder if there is to be one, there is none, and no job runs.
func (a *Agent) warmUp() {
	w := a.warm
	if w == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.bury()
	// Looked at under the lock: a job that is given room after this meets the holder
	// that is started here.
	total, left, _ := a.queue.look()
	if w.standing != nil || left != total || a.ctx.Err() != nil {
		return
	}
	if err := w.start(a.Holder, filepath.Join(a.RunDir, "warm.log")); err != nil {
		a.log.Warn("no holder waits for the next job", slog.Any("error", err))
	}
}

func (w *warm) start(path, log string) error {
	if err := sandbox.OpenCgroup(w.group).Remove(); err != nil {
		return err
	}
	group, err := sandbox.CreateReserveCgroup(w.group, w.bytes)
	if err != nil {
		return err
	}
	w.standing, err = holder.StartWarm(holder.WarmConfig{Path: path, Log: log, Regions: w.regions, NearNode: w.near, Join: group.Add})
	return err
}

// bury forgets a holder that has died. w.mu is held.
func (w *warm) bury() {
	if w.standing == nil {
		return
	}
	select {
	case <-w.standing.Lost():
		w.end()
	default:
	}
}

// end ends the holder, and its memory is free. w.mu is held.
func (w *warm) end() {
	w.standing.End()
	w.standing = nil
}

// coolDown ends the holder that waits.
func (a *Agent) coolDown() {
	w := a.warm
	if w == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.standing != nil {
		w.end()
	}
	if err := sandbox.OpenCgroup(w.group).Remove(); err != nil {
		a.log.Warn("the holder that waited", slog.Any("error", err))
	}
}

// claim returns the holder that waits if it is something for j, which has its room
// on the node, and has taken nothing of it yet. The caller has it for good. If not,
// and the node has no memory for both, it is ended.
func (a *Agent) claim(j *Job) *holder.Warm {
	w := a.warm
	if w == nil {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.bury()
	if w.standing == nil {
		return nil
	}
	if w.suits(j) {
		h := w.standing
		w.standing = nil
		return h
	}
	if _, left, _ := a.queue.look(); left.MemoryBytes < w.bytes {
		w.end()
	}
	return nil
}

// suits says whether a job has use for the memory, and room for all of it. One whose
// inputs should lie elsewhere, near its GPUs, has memory of its own made there.
func (w *warm) suits(j *Job) bool {
	if near := j.nearNode(); regionBytes(j.plan.Resources) < w.bytes || near != 0 && near != w.near {
		return false
	}
	// What is smaller takes no region of this size.
	least := slices.Min(w.regions) / 2
	return slices.ContainsFunc(j.spec.Sealed(), func(in jobspec.Sealed) bool { return !in.Secret && mayHave(in.URI, least) })
}

// mayHave says whether a sealed folder has a file of at least size bytes; of one in
// an object store it is not known.
func mayHave(uri string, size int64) bool {
	if _, err := source.Parse(uri); err == nil {
		return true
	}
	dir, err := source.Folder(uri)
	if err != nil {
		return false
	}
	files, err := os.ReadDir(dir)
	return err == nil && slices.ContainsFunc(files, func(f os.DirEntry) bool {
		st, err := f.Info()
		return err == nil && st.Mode().IsRegular() && st.Size() >= size
	})
}

// startHolder starts a job's holder, in the job's group. settle is to be called once
// the holder has all inputs.
func (a *Agent) startHolder(ctx context.Context, j *Job, group *sandbox.Cgroup, c holder.Config) (_ *holder.Holder, settle func(context.Context) error, err error) {
	if c.Warm = a.claim(j); c.Warm != nil {
		h, err := holder.Start(ctx, c)
		if err == nil {
			return h, func(ctx context.Context) error { return a.settleMemory(ctx, j, h, group) }, nil
		}
		if ctx.Err() != nil {
			return nil, nil, err
		}
		a.log.WarnContext(ctx, "the holder that waited is of no use", slog.String("job", j.id), slog.Any("error", err))
		c.Warm = nil
	}
	h, err := holder.Start(ctx, c)
	return h, func(context.Context) error { return nil }, err
}

// settleMemory has a holder that waited give back what its job does not need. The rest
// stays charged to the group in which it was made ready, so the job's own group is
// given as much less.
func (a *Agent) settleMemory(ctx context.Context, j *Job, h *holder.Holder, group *sandbox.Cgroup) error {
	if err := h.Settle(ctx); err != nil {
		return fmt.Errorf("settle memory that was ready: %w", err)
	}
	before := sandbox.OpenCgroup(a.warm.group)
	kept, err := before.MemoryUsage()
	if err != nil {
		return err
	}
	if err := group.LowerMemory(j.plan.Resources.MemoryBytes - kept); err != nil {
		return err
	}
	a.log.InfoContext(ctx, "memory was ready", slog.String("job", j.id), slog.Int64("bytes", kept))
	return before.Remove()
}
