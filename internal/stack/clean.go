package stack

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// mountsUnder returns the mount points at or below the given folders, deepest
// and latest first, from the text of a mountinfo file (proc(5)).
func mountsUnder(mountinfo string, dirs ...string) []string {
	type mount struct {
		path  string
		order int
	}
	var found []mount
	for line := range strings.Lines(mountinfo) {
		f := strings.Fields(line)
		if len(f) < 5 {
			continue
		}
		p := unescapeMount(f[4])
		for _, d := range dirs {
			if within(p, d) {
				found = append(found, mount{p, len(found)})
				break
			}
		}
	}
	sort.Slice(found, func(i, j int) bool {
		a, b := strings.Count(found[i].path, "/"), strings.Count(found[j].path, "/")
		if a != b {
			return a > b
		}
		return found[i].order > found[j].order
	})
	out := make([]string, len(found))
	for i, m := range found {
		out[i] = m.path
	}
	return out
}

func within(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

// unescapeMount undoes the octal escapes of space, tab, newline and backslash.
func unescapeMount(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// unmountAll unmounts everything below dirs, lazily where something is busy.
// Mounts may be stacked, so it looks again until none is left.
func unmountAll(dirs ...string) (int, error) {
	const rounds = 5
	n := 0
	var last error
	for range rounds {
		b, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			return n, err
		}
		mounts := mountsUnder(string(b), dirs...)
		if len(mounts) == 0 {
			return n, nil
		}
		for _, m := range mounts {
			err := unix.Unmount(m, unix.UMOUNT_NOFOLLOW)
			if err != nil {
				err = unix.Unmount(m, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
			}
			if err != nil {
				last = fmt.Errorf("unmount %s: %w", m, err)
				continue
			}
			n++
		}
	}
	return n, last
}

// cgroupRoot is where cgroup hierarchies are mounted: one folder per v1
// controller, or the v2 tree itself.
const cgroupRoot = "/sys/fs/cgroup"

// cgroups returns the stack's cgroup in every hierarchy under root that has it.
func cgroups(root, group string) ([]string, error) {
	candidates := []string{filepath.Join(root, group)}
	entries, err := os.ReadDir(root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		// In v1, cpu and cpuacct may be links to one folder cpu,cpuacct.
		if e.IsDir() && filepath.Join(root, e.Name()) != candidates[0] {
			candidates = append(candidates, filepath.Join(root, e.Name(), group))
		}
	}
	var out []string
	for _, c := range candidates {
		if fi, err := os.Lstat(c); err == nil && fi.IsDir() {
			out = append(out, c)
		}
	}
	return out, nil
}

// removeCgroups removes the stack's cgroups, children first. Processes in them
// must be gone; the kernel takes a moment to notice, so busy ones are retried.
func removeCgroups(ctx context.Context, root, group string) (int, error) {
	tops, err := cgroups(root, group)
	if err != nil {
		return 0, err
	}
	n := 0
	for _, top := range tops {
		var dirs []string
		err := filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if d.IsDir() {
				dirs = append(dirs, p)
			}
			return nil
		})
		if err != nil {
			return n, err
		}
		for i := len(dirs) - 1; i >= 0; i-- {
			if err := rmdirBusy(ctx, dirs[i]); err != nil {
				return n, err
			}
			n++
		}
	}
	return n, nil
}

func rmdirBusy(ctx context.Context, dir string) error {
	deadline := time.Now().Add(3 * time.Second)
	for {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return fmt.Errorf("remove cgroup %s: %w", dir, err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// netnsDir is where iproute2 and we keep named network namespaces.
const netnsDir = "/run/netns"

func (l Layout) namespacePrefix() string { return "coffer-" + l.ID }

func ownNamespace(name, prefix string) bool {
	return name == prefix || strings.HasPrefix(name, prefix+"-")
}

// removeNamespaces removes the network namespaces named after the stack.
func removeNamespaces(dir, prefix string) (int, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	n := 0
	for _, e := range entries {
		if !ownNamespace(e.Name(), prefix) {
			continue
		}
		p := filepath.Join(dir, e.Name())
		if err := unix.Unmount(p, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			return n, fmt.Errorf("unmount network namespace %s: %w", p, err)
		}
		if err := os.Remove(p); err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}

// removeTree removes dir, and refuses while anything is mounted below it: what
// is mounted there is not ours to delete.
func removeTree(dir string) error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	if m := mountsUnder(string(b), dir); len(m) > 0 {
		return fmt.Errorf("remove %s: %s is still mounted", dir, m[0])
	}
	return os.RemoveAll(dir)
}

// Traces lists what the stack has on the machine outside its folder: processes,
// mounts, cgroups, network namespaces, sockets. After Down there are none.
func (l Layout) Traces() ([]string, error) {
	ps, err := l.leftovers()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, p := range ps {
		out = append(out, fmt.Sprintf("process %s (%d)", p.Name, p.PID))
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for _, m := range mountsUnder(string(b), l.Dir, l.Run) {
		out = append(out, "mount "+m)
	}
	groups, err := cgroups(cgroupRoot, l.Cgroup())
	if err != nil {
		return nil, err
	}
	for _, g := range groups {
		out = append(out, "cgroup "+g)
	}
	entries, err := os.ReadDir(netnsDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range entries {
		if ownNamespace(e.Name(), l.namespacePrefix()) {
			out = append(out, "network namespace "+e.Name())
		}
	}
	if _, err := os.Lstat(l.Run); err == nil {
		out = append(out, "folder "+l.Run)
	}
	return out, nil
}
