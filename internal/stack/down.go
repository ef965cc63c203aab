package stack

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
)

// Down stops the stack in dir and leaves no process, mount, namespace, cgroup
// or socket of it behind. State stays unless purge is set. It may be called
// again, and on a stack that is not up.
func Down(ctx context.Context, dir string, purge bool, progress func(Step)) error {
	l, err := NewLayout(dir)
	if err != nil {
		return err
	}
	if f := checkRoot(); f.Outcome != OK {
		return failures([]Finding{f})
	}
	if _, err := os.Stat(l.Dir); errors.Is(err, fs.ErrNotExist) {
		if purge {
			return nil
		}
		return &NoStackError{Dir: l.Dir}
	}
	if _, err := l.readInfo(); err != nil {
		return err
	}
	unlock, err := l.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if err := l.teardown(ctx, progress); err != nil {
		return err
	}
	if !purge {
		return nil
	}
	return tell(ctx, progress, step{"state", func(context.Context) (string, error) {
		return "removed " + l.Dir, removeTree(l.Dir)
	}})
}

// teardown stops and removes everything that the stack runs. Every step is
// tried whatever became of the ones before.
func (l Layout) teardown(ctx context.Context, progress func(Step)) error {
	rec, err := l.readRecord()
	if err != nil {
		return err
	}
	var errs []error
	try := func(name string, do func(context.Context) (string, error)) {
		errs = append(errs, tell(ctx, progress, step{name, do}))
	}
	shims, err := l.shimSockets()
	if err != nil {
		return err
	}
	for _, p := range slices.Backward(rec.Processes) {
		if !p.alive() {
			continue
		}
		if p.Name == containerdName {
			// Once the agent is gone nobody starts another task.
			try("jobs", func(ctx context.Context) (string, error) { return l.removeTasks(ctx, p) })
		}
		try(p.Name, func(ctx context.Context) (string, error) {
			return "stopped", p.stop(ctx, Grace)
		})
	}
	count := func(what string, n int) string {
		if n == 0 {
			return "none left"
		}
		return fmt.Sprintf("%d %s", n, what)
	}
	try("processes", func(ctx context.Context) (string, error) {
		n, err := l.killLeftovers(ctx)
		return count("killed", n), err
	})
	try("mounts", func(context.Context) (string, error) {
		n, err := unmountAll(l.Dir, l.Run)
		return count("unmounted", n), err
	})
	try("network namespaces", func(context.Context) (string, error) {
		n, err := removeNamespaces(netnsDir, l.namespacePrefix())
		return count("removed", n), err
	})
	try("cgroups", func(ctx context.Context) (string, error) {
		n, err := removeCgroups(ctx, cgroupRoot, l.Cgroup())
		return count("removed", n), err
	})
	try("sockets", func(context.Context) (string, error) {
		return "", errors.Join(removeShimSockets(shims), removeTree(l.Run), removeEmpty(runRoot))
	})
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := os.Remove(l.recordFile()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// removeEmpty removes dir if nothing is in it: another stack may share it.
func removeEmpty(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) || len(entries) > 0 {
		return nil
	}
	if err != nil {
		return err
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}
