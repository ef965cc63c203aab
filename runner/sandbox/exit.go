package sandbox

import (
	"context"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"
)

const (
	// askEvery is how often a containerd that is away is asked again.
	askEvery = 200 * time.Millisecond
	// awayFor bounds how long an order waits for a containerd that is away. The job
	// runs on meanwhile: its shim and its sandbox are processes of their own.
	awayFor = 60 * time.Second
	// awayForCaller is as long where somebody waits for an answer.
	awayForCaller = 3 * time.Second
	// redialEvery bounds the pauses between two attempts to reach a containerd that
	// is away.
	redialEvery = time.Second
)

// ended waits for a task's end, across restarts of containerd, until ctx is over.
// The shim keeps the exit status while containerd is away. A container that
// containerd no longer knows has ended with an error.
func (n *Node) ended(ctx context.Context, id string, first <-chan containerd.ExitStatus) <-chan containerd.ExitStatus {
	out := make(chan containerd.ExitStatus, 1)
	go func() {
		exit := first
		for {
			var st containerd.ExitStatus
			there := false
			select {
			case st, there = <-exit:
			case <-ctx.Done():
				return
			}
			if there && st.Error() == nil {
				out <- st
				close(out)
				return
			}
			next, err := n.waitAgain(ctx, id)
			if ctx.Err() != nil {
				return
			}
			if err != nil {
				out <- *containerd.NewExitStatus(containerd.UnknownExitStatus, time.Now(), err)
				close(out)
				return
			}
			exit = next
		}
	}()
	return out
}

// waitAgain waits for containerd and then for the task. It errs if the task is gone.
func (n *Node) waitAgain(ctx context.Context, id string) (<-chan containerd.ExitStatus, error) {
	for {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(askEvery):
		}
		c, err := n.client.LoadContainer(ctx, id)
		if err == nil {
			var t containerd.Task
			if t, err = c.Task(ctx, nil); err == nil {
				var exit <-chan containerd.ExitStatus
				if exit, err = t.Wait(ctx); err == nil {
					return exit, nil
				}
			}
		}
		if errdefs.IsNotFound(err) {
			return nil, err
		}
	}
}

// patient repeats f while containerd is away, for at most so long.
func patient(ctx context.Context, long time.Duration, f func() error) error {
	for began := time.Now(); ; {
		err := f()
		if !errdefs.IsUnavailable(err) || time.Since(began) > long {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(askEvery):
		}
	}
}
