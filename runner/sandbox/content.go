package sandbox

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

const (
	// maxEntries bounds the files of one image, of all its layers.
	maxEntries = 1_000_000
	// maxFollow bounds the links in one path.
	maxFollow = 8
	// maxDocument bounds a manifest or an index, in bytes.
	maxDocument = 8 << 20

	whiteout, opaque = ".wh.", ".wh..wh..opq"
)

// entry is one file as a layer has it.
type entry struct {
	kind     byte // tar's type; a whiteout is the character device that it becomes
	mode     uint32
	uid, gid int
	size     int64
	sum      [sha256.Size]byte // of a regular file
	link     string            // a symbolic link's target
	device   uint64
	opaque   bool // a folder that hides what lower layers have in it
}

// layer is what an image's layer holds, by path without a leading slash.
type layer map[string]entry

// contents remembers what images hold, each read once.
type contents struct {
	mu    sync.Mutex // guards what follows
	known map[string][]layer
}

// contents reads the layers of an image, the lowest first. Every document and every
// layer is held against its digest, from the image's own on.
func (n *Node) contents(ctx context.Context, image Image) ([]layer, error) {
	n.content.mu.Lock()
	defer n.content.mu.Unlock()
	if c, ok := n.content.known[image.Digest]; ok {
		return c, nil
	}
	img, err := n.client.ImageService().Get(ctx, image.Name)
	if err != nil {
		return nil, err
	}
	if got := img.Target.Digest.String(); got != image.Digest {
		return nil, fmt.Errorf("it is %s now, and was %s", got, image.Digest)
	}
	manifest, err := images.Manifest(ctx, documents{n.client.ContentStore()}, img.Target, platforms.Default())
	if err != nil {
		return nil, err
	}
	var out []layer
	for _, d := range manifest.Layers {
		l, err := n.readLayer(ctx, d, out)
		if err != nil {
			return nil, fmt.Errorf("layer %s: %w", d.Digest, err)
		}
		out = append(out, l)
	}
	n.content.known[image.Digest] = out
	return out, nil
}

// documents reads manifests and indexes, and holds each against its digest, which
// containerd does not do of what it has.
type documents struct{ content.Provider }

func (d documents) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	at, err := d.Provider.ReaderAt(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer at.Close() //nolint:errcheck // it was read only
	if at.Size() > maxDocument {
		return nil, fmt.Errorf("document %s has %d bytes, at most %d are read", desc.Digest, at.Size(), maxDocument)
	}
	b, err := io.ReadAll(io.NewSectionReader(at, 0, at.Size()))
	if err != nil {
		return nil, err
	}
	if got := desc.Digest.Algorithm().FromBytes(b); got != desc.Digest {
		return nil, fmt.Errorf("document %s has the content of %s", desc.Digest, got)
	}
	return whole{bytes.NewReader(b)}, nil
}

type whole struct{ *bytes.Reader }

func (whole) Close() error { return nil }

func (n *Node) readLayer(ctx context.Context, d ocispec.Descriptor, lower []layer) (layer, error) {
	at, err := n.client.ContentStore().ReaderAt(ctx, d)
	if err != nil {
		return nil, err
	}
	defer at.Close() //nolint:errcheck // it was read only
	verifier := d.Digest.Verifier()
	blob := io.TeeReader(io.NewSectionReader(at, 0, at.Size()), verifier)
	plain, err := compression.DecompressStream(blob)
	if err != nil {
		return nil, err
	}
	defer plain.Close() //nolint:errcheck // it was read only
	out, err := parseLayer(plain, lower)
	if err != nil {
		return nil, err
	}
	// What follows the archive belongs to the digest too.
	if _, err := io.Copy(io.Discard, plain); err != nil { //nolint:gosec // it is dropped
		return nil, err
	}
	if _, err := io.Copy(io.Discard, blob); err != nil {
		return nil, err
	}
	if !verifier.Verified() {
		return nil, errors.New("its content is not what its digest says")
	}
	return out, nil
}

// parseLayer reads a layer's archive (OCI image specification, "Image Layer
// Filesystem Changeset"). lower are the layers below it, to which hard links may lead.
func parseLayer(r io.Reader, lower []layer) (layer, error) {
	out := layer{}
	for t := tar.NewReader(r); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		if len(out) >= maxEntries {
			return nil, fmt.Errorf("more than %d files", maxEntries)
		}
		name := out.follow(inside(h.Name), maxFollow)
		if path.Base(name) == opaque {
			dir := path.Dir(name)
			e := out[dir]
			e.opaque = true
			out[dir] = e
			continue
		}
		if hidden, ok := strings.CutPrefix(path.Base(name), whiteout); ok {
			out[path.Join(path.Dir(name), hidden)] = entry{kind: tar.TypeChar}
			continue
		}
		e := entry{kind: h.Typeflag, mode: uint32(h.Mode & 0o7777), uid: h.Uid, gid: h.Gid, opaque: out[name].opaque} //nolint:gosec // masked
		switch h.Typeflag {
		case tar.TypeReg:
			sum := sha256.New()
			if e.size, err = io.Copy(sum, t); err != nil { //nolint:gosec // it is hashed, not kept
				return nil, err
			}
			e.sum = [sha256.Size]byte(sum.Sum(nil))
		case tar.TypeLink:
			target, ok := find(append(slices.Clone(lower), out), out.follow(inside(h.Linkname), maxFollow))
			if !ok {
				return nil, fmt.Errorf("%.200q is a link to %.200q, which is not there", name, h.Linkname)
			}
			e = target
		case tar.TypeSymlink:
			e.link = h.Linkname
		case tar.TypeChar, tar.TypeBlock:
			e.device = unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)) //nolint:gosec // the kernel's numbers are as small
		case tar.TypeDir, tar.TypeFifo:
		default:
			return nil, fmt.Errorf("%.200q is of type %q", name, h.Typeflag)
		}
		out[name] = e
	}
}

// inside is a path in the image, "." for its root.
func inside(name string) string {
	return path.Join(".", path.Join("/", name)[1:])
}

// follow is where a file is unpacked whose folder is a link in the same layer:
// containerd follows those, and those of no other layer.
func (l layer) follow(name string, links int) string {
	dir := path.Dir(name)
	if dir == "." {
		return name
	}
	dir = l.follow(dir, links)
	for ; links > 0 && l[dir].kind == tar.TypeSymlink; links-- {
		to := l[dir].link
		if !path.IsAbs(to) {
			to = path.Join(path.Dir(dir), to)
		}
		dir = l.follow(inside(to), links-1)
	}
	return path.Join(dir, path.Base(name))
}

func find(layers []layer, name string) (entry, bool) {
	for _, l := range slices.Backward(layers) {
		if e, ok := l[name]; ok {
			return e, true
		}
	}
	return entry{}, false
}

// RecheckContent hashes the unpacked image of a sandbox on a plain disk, which
// somebody else may have written to since the image was unpacked, and refuses every
// difference to the layers that the plan's digest names. Where images lie in memory
// Create has seen to it that they do, and nothing is hashed. Extended attributes other
// than overlayfs's, and times, are not compared.
func (s *Sandbox) RecheckContent(ctx context.Context, image Image) error {
	if s.node.cfg.ImageStore != plan.ImageStoreDisk {
		return nil
	}
	want, err := s.node.contents(ctx, image)
	if err != nil {
		return fmt.Errorf("recheck image %s: %w", image.Name, err)
	}
	root, err := s.rootfs()
	if err != nil {
		return err
	}
	var l check.List
	fail := func(found string) {
		l.Fail("sandbox.image-content", "the unpacked files of "+image.Digest, found, "somebody wrote to this node's disk: remove the image, import it again, and find out who")
	}
	if len(root.lower) != len(want) {
		fail(fmt.Sprintf("%d layers, want %d", len(root.lower), len(want)))
		return check.Refuse("start", l)
	}
	for i, dir := range root.lower {
		// The topmost is named first.
		diff, err := want[len(want)-1-i].compare(dir)
		if err != nil {
			return fmt.Errorf("recheck image %s: %w", image.Name, err)
		}
		if diff != "" {
			fail(diff)
		}
	}
	diff, err := mountPoints(root.upper)
	if err != nil {
		return fmt.Errorf("recheck image %s: %w", image.Name, err)
	}
	if diff != "" {
		fail(diff)
	}
	if len(l.Failed()) > 0 {
		return check.Refuse("start", l)
	}
	return nil
}

// compare returns the first difference of a folder to the layer, or nothing.
func (l layer) compare(dir string) (string, error) {
	left := maps.Clone(l)
	folders := map[string]bool{".": true}
	for name := range l {
		for p := path.Dir(name); !folders[p]; p = path.Dir(p) {
			folders[p] = true
		}
	}
	var files []string
	diff := ""
	err := filepath.WalkDir(dir, func(at string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, at)
		if err != nil {
			return err
		}
		want, listed := l[name]
		delete(left, name)
		var found string
		if found, err = want.differs(at, listed, folders[name]); err != nil {
			return err
		}
		if found != "" {
			diff = name + ": " + found
			return fs.SkipAll
		}
		if listed && want.kind == tar.TypeReg {
			files = append(files, name)
		}
		return nil
	})
	if err != nil || diff != "" {
		return diff, err
	}
	for name, e := range left {
		// The opaque mark of a folder that the layer does not list stands for itself.
		if e.kind != 0 || e.opaque {
			return name + ": not there", nil
		}
	}
	return l.hash(dir, files)
}

// differs compares everything but a file's content. implied is true for a folder that
// the layer does not list and that has something of it.
func (e entry) differs(at string, listed, implied bool) (string, error) {
	fi, err := os.Lstat(at)
	if err != nil {
		return "", err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return "", errors.New("no ownership of files on this system")
	}
	marked, odd, err := overlayMarks(at)
	switch {
	case err != nil:
		return "", err
	case odd != "":
		return "the mark " + odd, nil
	case marked != e.opaque:
		return "another mark of overlayfs", nil
	case !listed && !implied:
		return "not in the image", nil
	case !listed || e.kind == 0:
		if !fi.IsDir() {
			return "not a folder", nil
		}
		return "", nil
	}
	modes := map[byte]uint32{tar.TypeReg: unix.S_IFREG, tar.TypeDir: unix.S_IFDIR, tar.TypeSymlink: unix.S_IFLNK, tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK, tar.TypeFifo: unix.S_IFIFO}
	switch {
	case st.Mode&unix.S_IFMT != modes[e.kind]:
		return "another type", nil
	case e.kind == tar.TypeChar && e.device == 0 && st.Rdev == 0:
		return "", nil // a whiteout has an owner of no meaning
	case st.Uid != uint32(e.uid) || st.Gid != uint32(e.gid): //nolint:gosec // as the kernel has them
		return fmt.Sprintf("owner %d:%d", st.Uid, st.Gid), nil
	case e.kind != tar.TypeSymlink && st.Mode&0o7777 != e.mode:
		return fmt.Sprintf("mode %04o", st.Mode&0o7777), nil
	case e.kind == tar.TypeReg && st.Size != e.size:
		return fmt.Sprintf("%d bytes", st.Size), nil
	case (e.kind == tar.TypeChar || e.kind == tar.TypeBlock) && st.Rdev != e.device:
		return "another device", nil
	case e.kind == tar.TypeSymlink:
		to, err := os.Readlink(at)
		if err != nil {
			return "", err
		}
		if to != e.link {
			return fmt.Sprintf("a link to %.200q", to), nil
		}
	}
	return "", nil
}

// overlayMarks reads overlayfs's attributes: whether a folder hides what is below it,
// and any other, which could show files from somewhere else.
func overlayMarks(at string) (hides bool, odd string, err error) {
	const prefix = "trusted.overlay."
	var list [4096]byte
	n, err := unix.Llistxattr(at, list[:])
	if errors.Is(err, unix.ENOTSUP) {
		return false, "", nil
	}
	if err != nil {
		return false, "", fmt.Errorf("attributes of %s: %w", at, err)
	}
	for name := range strings.SplitSeq(string(list[:n]), "\x00") {
		switch {
		case name == prefix+"opaque":
			hides = true
		case strings.HasPrefix(name, prefix) && name != prefix+"origin" && name != prefix+"impure" && name != prefix+"uuid":
			odd = name
		}
	}
	return hides, odd, nil
}

// hash compares the content of files, several at once.
func (l layer) hash(dir string, files []string) (string, error) {
	var group errgroup.Group
	group.SetLimit(runtime.GOMAXPROCS(0))
	var mu sync.Mutex
	diff := ""
	for _, name := range files {
		group.Go(func() error {
			got, err := fileSum(filepath.Join(dir, name))
			if err != nil {
				return err
			}
			if want := l[name].sum; got != want {
				mu.Lock()
				defer mu.Unlock()
				diff = name + ": sha256:" + hex.EncodeToString(got[:])
			}
			return nil
		})
	}
	return diff, group.Wait()
}

func fileSum(at string) ([sha256.Size]byte, error) {
	f, err := os.OpenFile(at, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return [sha256.Size]byte{}, err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return [sha256.Size]byte{}, err
	}
	return [sha256.Size]byte(h.Sum(nil)), nil
}

// mountPoints returns the first thing in a sandbox's writable layer that is no empty
// file and no folder: before the start it holds what the runtime mounts upon.
func mountPoints(dir string) (string, error) {
	diff := ""
	err := filepath.WalkDir(dir, func(at string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		hides, odd, err := overlayMarks(at)
		if err != nil {
			return err
		}
		if hides || odd != "" || !fi.IsDir() && !(fi.Mode().IsRegular() && fi.Size() == 0) {
			diff = strings.TrimPrefix(at, dir) + ": written before the start"
			return fs.SkipAll
		}
		return nil
	})
	return diff, err
}
