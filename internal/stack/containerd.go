package stack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
)

func (l Layout) containerdSocket() string { return l.run("containerd.sock") }

// containerdConfig keeps containerd to the stack's two folders, and leaves out
// what would serve others: CRI, NRI, /opt and image verifiers.
func (l Layout) containerdConfig() (string, error) {
	root, err := l.containerdRoot()
	if err != nil {
		return "", err
	}
	return fmt.Sprintf(`version = 3
root = %q
state = %q
temp = %q
oom_score = 0
disabled_plugins = [
  "io.containerd.cri.v1.images",
  "io.containerd.cri.v1.runtime",
  "io.containerd.grpc.v1.cri",
  "io.containerd.image-verifier.v1.bindir",
  "io.containerd.internal.v1.opt",
  "io.containerd.internal.v1.tracing",
  "io.containerd.monitor.container.v1.restart",
  "io.containerd.nri.v1.nri",
  "io.containerd.tracing.processor.v1.otlp",
]

[grpc]
address = %q
uid = 0
gid = 0

[ttrpc]
address = %q
`, root, l.run("containerd"), l.path("containerd", "tmp"), l.containerdSocket(), l.containerdSocket()+".ttrpc"), nil
}

func (l Layout) openContainerd() (*containerd.Client, error) {
	return containerd.New(l.containerdSocket(), containerd.WithDefaultNamespace(Namespace), containerd.WithTimeout(2*time.Second))
}

func (l Layout) containerdAnswers(ctx context.Context) error {
	// The client's first connection blocks for a while if nobody listens.
	if _, err := os.Stat(l.containerdSocket()); err != nil {
		return err
	}
	c, err := l.openContainerd()
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	_, err = c.Version(ctx)
	return err
}

// untilAnswers waits for a containerd that is only beginning, as it is when a start
// was cut off: its socket is there before it listens.
func (l Layout) untilAnswers(ctx context.Context, of process) error {
	ctx, cancel := context.WithTimeout(ctx, Grace)
	defer cancel()
	t := time.NewTicker(pollEvery)
	defer t.Stop()
	for of.alive() {
		err := l.containerdAnswers(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("reach containerd: %w", err)
		case <-t.C:
		}
	}
	return nil
}

// removeTasks kills every task in the stack's namespace and removes its
// container and snapshot. of is the containerd that has them. One that has ended
// is asked nothing: what it leaves are processes and mounts.
func (l Layout) removeTasks(ctx context.Context, of process) (string, error) {
	if err := l.untilAnswers(ctx, of); err != nil || !of.alive() {
		return "", err
	}
	c, err := l.openContainerd()
	if err != nil {
		return "", fmt.Errorf("reach containerd: %w", err)
	}
	defer func() { _ = c.Close() }()
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(ctx, Namespace), 30*time.Second)
	defer cancel()
	list, err := c.Containers(ctx)
	if err != nil {
		return "", fmt.Errorf("list containers: %w", err)
	}
	var errs []error
	for _, ct := range list {
		errs = append(errs, removeContainer(ctx, ct))
	}
	detail := "none left"
	if len(list) > 0 {
		detail = fmt.Sprintf("%d removed", len(list))
	}
	return detail, errors.Join(errs...)
}

// endTask kills a task and waits for its end before it deletes it: a runtime that
// is asked to kill twice finds nobody to ask.
func endTask(ctx context.Context, task containerd.Task) error {
	exit, err := task.Wait(ctx)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	kerr := task.Kill(ctx, syscall.SIGKILL)
	wctx, cancel := context.WithTimeout(ctx, Grace)
	defer cancel()
	select {
	case <-exit:
	case <-wctx.Done():
		return errors.Join(errors.New("it does not end"), kerr)
	}
	if _, err := task.Delete(ctx); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}

func removeContainer(ctx context.Context, ct containerd.Container) error {
	task, err := ct.Task(ctx, nil)
	switch {
	case errdefs.IsNotFound(err):
	case err != nil:
		return fmt.Errorf("job %s: %w", ct.ID(), err)
	default:
		if err := endTask(ctx, task); err != nil {
			return fmt.Errorf("end job %s: %w", ct.ID(), err)
		}
	}
	if err := ct.Delete(ctx, containerd.WithSnapshotCleanup); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("remove job %s: %w", ct.ID(), err)
	}
	return nil
}

// shimSockets returns the sockets of the stack's shims. They lie outside of RUN,
// where every containerd of a machine has its own, and a shim that is killed
// leaves its socket.
func (l Layout) shimSockets() ([]string, error) {
	files, err := filepath.Glob(l.run("containerd", "io.containerd.runtime.v2.task", "*", "*", "bootstrap.json"))
	if err != nil {
		return nil, err
	}
	var out []string
	for _, f := range files {
		b, err := os.ReadFile(f) // #nosec G304 -- below the stack's own folder
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		// containerd's own format, of which the address is all that is needed.
		var boot struct {
			Address string `json:"address"`
		}
		if err := json.Unmarshal(b, &boot); err != nil {
			return nil, fmt.Errorf("read %s: %w", f, err)
		}
		if path, ok := strings.CutPrefix(boot.Address, "unix://"); ok && filepath.Dir(filepath.Clean(path)) == shimSocketDir {
			out = append(out, filepath.Clean(path))
		}
	}
	return out, nil
}

// shimSocketDir is fixed in containerd.
const shimSocketDir = "/run/containerd/s"

// removeShimSockets removes sockets of shims that are gone, and the folders that
// hold them if they hold nothing else.
func removeShimSockets(paths []string) error {
	for _, p := range paths {
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return errors.Join(removeEmpty(shimSocketDir), removeEmpty(filepath.Dir(shimSocketDir)))
}
