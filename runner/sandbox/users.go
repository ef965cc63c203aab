package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/mount"
	cfs "github.com/containerd/continuity/fs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// RootUID and RootGID are who the runtime's own processes of a job are on the machine: the
// sandbox's kernel, and what opens files for it. They are root in a user namespace of the
// sandbox's, which knows two users and no more, and nobody outside. Files of all others,
// the machine's root among them, are a stranger's to them.
const RootUID, RootGID = 65533, 65533

// mapUsers gives a specification its user namespace (OCI runtime specification,
// config-linux.md, "User namespace mappings").
func mapUsers(s *specs.Spec) {
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	s.Linux.UIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: RootUID, Size: 1}, {ContainerID: UID, HostID: UID, Size: 1}}
	s.Linux.GIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: RootGID, Size: 1}, {ContainerID: GID, HostID: GID, Size: 1}}
}

// makeMountPoints makes what the specification mounts onto, in the container's own layer
// over its image, which belongs to the machine's root: the runtime may not write there.
func (n *Node) makeMountPoints(ctx context.Context, snapshot string, s *specs.Spec) error {
	type point struct {
		path string
		dir  bool
	}
	var points []point
	for _, m := range s.Mounts {
		if m.Type != "bind" {
			continue // the sandbox's kernel has those for itself
		}
		fi, err := os.Stat(m.Source)
		if err != nil {
			return fmt.Errorf("create sandbox: what is mounted at %s: %w", m.Destination, err)
		}
		points = append(points, point{m.Destination, fi.IsDir()})
	}
	for _, d := range s.Linux.Devices {
		points = append(points, point{d.Path, false})
	}
	if len(points) == 0 {
		return nil
	}
	mounts, err := n.client.SnapshotService(snapshotter).Mounts(ctx, snapshot)
	if err != nil {
		return fmt.Errorf("create sandbox: ask for its root: %w", err)
	}
	if err := mount.WithTempMount(ctx, mounts, func(root string) error {
		for _, p := range points {
			if err := makeMountPoint(root, p.path, p.dir); err != nil {
				return fmt.Errorf("mount point %s: %w", p.path, err)
			}
		}
		return nil
	}); err != nil {
		return fmt.Errorf("create sandbox: %w", err)
	}
	return nil
}

// makeMountPoint makes a folder or an empty file below root. The links of an image lead
// nowhere else.
func makeMountPoint(root, at string, dir bool) error {
	to, err := cfs.RootPath(root, at)
	if err != nil {
		return err
	}
	if dir {
		return os.MkdirAll(to, 0o755) //nolint:gosec // a job looks into it
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil { //nolint:gosec // a job looks into it
		return err
	}
	f, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644) //nolint:gosec // as above
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return f.Close()
}
