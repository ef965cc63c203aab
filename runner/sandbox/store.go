package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

// rootfs are the folders that the kernel made a sandbox's root of.
type rootfs struct {
	lower       []string // the topmost first
	upper, work string
}

// rootfs asks the kernel, not containerd: containerd's own records lie on the disk
// that is looked at.
func (s *Sandbox) rootfs() (rootfs, error) {
	dir, err := s.bundleDir()
	if err != nil {
		return rootfs{}, err
	}
	mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(filepath.Join(dir, "rootfs")))
	if err != nil {
		return rootfs{}, fmt.Errorf("look at the sandbox's root: %w", err)
	}
	if len(mounts) != 1 || mounts[0].FSType != "overlay" {
		return rootfs{}, errors.New("look at the sandbox's root: it is not one overlay")
	}
	var r rootfs
	for option := range strings.SplitSeq(mounts[0].VFSOptions, ",") {
		name, value, _ := strings.Cut(option, "=")
		switch name {
		case "lowerdir":
			r.lower = strings.Split(value, ":")
		case "lowerdir+":
			r.lower = append(r.lower, value)
		case "upperdir":
			r.upper = value
		case "workdir":
			r.work = value
		}
	}
	for _, d := range append([]string{r.upper, r.work}, r.lower...) {
		// containerd shortens the paths of images with very many layers.
		if !filepath.IsAbs(d) || strings.Contains(d, `\`) {
			return rootfs{}, fmt.Errorf("look at the sandbox's root: folder %.200q: want an absolute path; an image with fewer layers may help", d)
		}
	}
	if len(r.lower) == 0 {
		return rootfs{}, errors.New("look at the sandbox's root: it has no layers")
	}
	return r, nil
}

// checkStore makes sure that a store which is said to be in memory is: the folders of
// this sandbox, and those from which containerd unpacks.
func (s *Sandbox) checkStore(ctx context.Context) error {
	if s.node.cfg.ImageStore != plan.ImageStoreTmpfs {
		return nil
	}
	root, err := s.rootfs()
	if err != nil {
		return err
	}
	folders := append([]string{root.upper, root.work}, root.lower...)
	for filter, export := range map[string]string{"type==io.containerd.content.v1": "root", "type==io.containerd.metadata.v1": "path"} {
		res, err := s.node.client.IntrospectionService().Plugins(ctx, filter)
		if err != nil {
			return fmt.Errorf("ask containerd for its folders: %w", err)
		}
		found := false
		for _, p := range res.GetPlugins() {
			if dir := p.GetExports()[export]; dir != "" {
				folders, found = append(folders, dir), true
			}
		}
		if !found {
			return fmt.Errorf("ask containerd for its folders: it names no %s of %s", export, filter)
		}
	}
	var l check.List
	for _, dir := range folders {
		inMemory(&l, dir)
	}
	on, err := SwapOn()
	if err != nil {
		return err
	}
	if on {
		l.Fail("sandbox.image-store", "no swap", "swap is on", "swapoff -a: memory that is swapped out lies on a disk")
	}
	if len(l.Failed()) > 0 {
		return check.Refuse("sandbox", l)
	}
	return nil
}

func inMemory(l *check.List, dir string) {
	const id = "sandbox.image-store"
	var st unix.Statfs_t
	switch err := unix.Statfs(dir, &st); {
	case err != nil:
		l.Fail(id, "tmpfs", fmt.Sprintf("%s: %v", dir, err), "")
	case st.Type != unix.TMPFS_MAGIC:
		l.Fail(id, "tmpfs", fmt.Sprintf("%s is on a file system of type %#x", dir, st.Type), "mount a tmpfs for containerd's root, or say disk in the agent's imageStore")
	default:
		l.Pass(id, dir)
	}
}

// SwapOn says whether memory of this machine may be written to a disk.
func SwapOn() (bool, error) {
	b, err := os.ReadFile("/proc/swaps")
	if err != nil {
		return false, fmt.Errorf("look for swap: %w", err)
	}
	return strings.Count(strings.TrimSpace(string(b)), "\n") > 0, nil
}
