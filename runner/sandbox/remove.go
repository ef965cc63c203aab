package sandbox

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// removeTimeout bounds the removal of one job's sandbox.
	removeTimeout = 30 * time.Second
	// shimTimeout is how long a shim may take to go by itself when its container has
	// gone, before it is killed.
	shimTimeout = time.Second
)

// ofJob begins the name of every container and snapshot of a job. Names are lower
// case, as containerd's identifiers are.
func ofJob(jobID string) string { return "job-" + strings.ToLower(jobID) + "-" }

// newContainerID names a container of a job. Each start has a name of its own: of one
// that was cut off, containerd and a shim can have things under its name for a while
// that neither of them shows.
func newContainerID(jobID string) string {
	var b [4]byte
	_, _ = rand.Read(b[:]) // it never fails
	return ofJob(jobID) + hex.EncodeToString(b[:])
}

// containersOf lists the containers of a job: one, or more where a start was cut off.
func (n *Node) containersOf(ctx context.Context, jobID string) ([]containerd.Container, error) {
	var out []containerd.Container
	err := patient(ctx, awayFor, func() (err error) {
		out, err = n.client.Containers(ctx, fmt.Sprintf("id~=%q", "^"+ofJob(jobID)))
		return err
	})
	return out, err
}

// Remove kills and deletes everything of the sandbox; what is gone already is
// no error.
func (s *Sandbox) Remove(ctx context.Context) error {
	if s.unwatch != nil {
		defer s.unwatch()
	}
	return s.node.Forget(ctx, s.job, s.runDir)
}

// Forget kills and deletes everything that any start of a job has left: containers,
// snapshots without a container, and shims that containerd does not know because it was
// killed when it had just started them. What is gone already is no error.
func (n *Node) Forget(ctx context.Context, jobID, runDir string) error {
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(ctx, Namespace), removeTimeout)
	defer cancel()
	containers, err := n.containersOf(ctx, jobID)
	if err != nil {
		return fmt.Errorf("forget job %s: %w", jobID, err)
	}
	var errs []error
	for _, c := range containers {
		errs = append(errs, patient(ctx, awayFor, func() error { return remove(ctx, c) }))
	}
	errs = append(errs, n.forgetSnapshots(ctx, jobID), n.endShims(ctx, jobID))
	errs = append(errs, dropSpec(runDir))
	return typed(errors.Join(errs...))
}

// remove ends a container's process, if there is one, and deletes the container.
func remove(ctx context.Context, c containerd.Container) error {
	t, err := c.Task(ctx, nil)
	if err == nil {
		err = end(ctx, t)
	}
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("remove container %s: %w", c.ID(), err)
	}
	if err := c.Delete(ctx, containerd.WithSnapshotCleanup); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("delete container %s: %w", c.ID(), err)
	}
	return nil
}

// end kills a sandbox if it still runs and deletes its process. runsc reports
// a kill that comes too late as an error of its own, so only the end counts.
func end(ctx context.Context, t containerd.Task) error {
	st, err := t.Status(ctx)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err == nil && st.Status != containerd.Stopped {
		exit, werr := t.Wait(ctx)
		kerr := t.Kill(ctx, syscall.SIGKILL, containerd.WithKillAll)
		if st.Status == containerd.Paused {
			_ = t.Resume(ctx) // a frozen process that was killed ends when it may go on
		}
		if werr == nil {
			select {
			case <-exit:
			case <-time.After(killTimeout):
				return fmt.Errorf("kill sandbox process: it is still there after %s: %w", killTimeout, kerr)
			}
		}
	}
	if _, err := t.Delete(ctx); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("delete sandbox process: %w", err)
	}
	return nil
}

// forgetSnapshots removes what an agent leaves that is killed between a snapshot and its
// container.
func (n *Node) forgetSnapshots(ctx context.Context, jobID string) error {
	service := n.client.SnapshotService(snapshotter)
	return patient(ctx, awayFor, func() error {
		var names []string
		if err := service.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
			names = append(names, i.Name)
			return nil
		}, fmt.Sprintf("name~=%q", "^"+ofJob(jobID))); err != nil {
			return fmt.Errorf("list snapshots: %w", err)
		}
		for _, name := range names {
			if err := service.Remove(ctx, name); err != nil && !errdefs.IsNotFound(err) {
				return fmt.Errorf("remove snapshot: %w", err)
			}
		}
		return nil
	})
}

// endShims waits for the shims of a job whose containers have gone, and kills those that
// stay. What they had started is in the job's control group.
func (n *Node) endShims(ctx context.Context, jobID string) error {
	for deadline := time.Now().Add(shimTimeout); ; {
		kill := time.Now().After(deadline)
		left, err := n.shims(jobID, kill)
		if err != nil || left == 0 {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d shims of job %s are still there: %w", left, jobID, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// shims counts the processes that serve a job's containers to this containerd, and the
// runtime's own, by their command lines, and kills them if it is told to.
func (n *Node) shims(jobID string, kill bool) (int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0, fmt.Errorf("look for shims: %w", err)
	}
	count := 0
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || !n.isShim(pid, jobID) {
			continue
		}
		count++
		if !kill {
			continue
		}
		if err := n.killShim(pid, jobID); err != nil {
			return count, fmt.Errorf("kill shim %d: %w", pid, err)
		}
	}
	return count, nil
}

func (n *Node) isShim(pid int, jobID string) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return false // it has just ended
	}
	args := strings.Split(string(b), "\x00")
	value := func(flag string) string {
		if i := slices.Index(args, flag); i >= 0 && i+1 < len(args) {
			return args[i+1]
		}
		return ""
	}
	if filepath.Base(args[0]) == filepath.Base(n.cfg.ShimPath) {
		return value("-namespace") == Namespace && value("-address") == n.cfg.Containerd && strings.HasPrefix(value("-id"), ofJob(jobID))
	}
	// A shim that is killed while it creates a sandbox leaves the sandbox behind.
	if !slices.ContainsFunc(args, func(a string) bool { return strings.HasPrefix(a, ofJob(jobID)) }) {
		return false
	}
	exe, err := os.Stat(fmt.Sprintf("/proc/%d/exe", pid))
	runtime, rerr := os.Stat(n.cfg.Runsc)
	return err == nil && rerr == nil && os.SameFile(exe, runtime)
}

// killShim makes sure that the process it kills is the one it looked at.
func (n *Node) killShim(pid int, jobID string) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd) //nolint:errcheck // it was used to signal only
	if !n.isShim(pid, jobID) {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	return nil
}
