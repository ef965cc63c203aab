package hold

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/enclave/dma"
)

const (
	// maxHandles bounds open files on each of the two file systems.
	maxHandles = 65_536
	minHandles = 256
	// maxFUSE is the largest request, in bytes.
	maxFUSE = 1 << 20
)

// fileTree is what the two file systems share.
type fileTree struct {
	server *fuse.Server
	path   string
	// passthrough: the kernel can read a descriptor of ours in our stead.
	passthrough bool
	// maxHandles bounds handles. full: the bound was met, and failed was told so.
	maxHandles int64
	handles    atomic.Int64
	full       atomic.Bool
	// failed is told why a path was refused. It may be nil.
	failed func(err error)
}

func (t *fileTree) mount(path, name string, root fs.InodeEmbedder, options ...string) error {
	o := &fs.Options{MountOptions: fuse.MountOptions{
		AllowOther: true, DirectMount: true, DirectMountStrict: true, DisableXAttrs: true, IgnoreSecurityLabels: true,
		FsName: name, Name: "coffer", MaxWrite: maxFUSE, MaxReadAhead: maxFUSE,
		// What is read is in memory already: a pipe between would be one more copy.
		DisableSplice:     true,
		ExtraCapabilities: fuse.CAP_DIRECT_IO_ALLOW_MMAP, Options: options,
	}}
	s, err := fs.Mount(path, root, o)
	if err != nil {
		return fmt.Errorf("mount %s: %w", name, err)
	}
	t.server, t.path, t.maxHandles = s, path, handleLimit()
	t.passthrough = s.KernelSettings().Flags64()&fuse.CAP_PASSTHROUGH != 0
	return nil
}

// handleLimit leaves the holder descriptors for its own work: each open file may
// take one of them.
func handleLimit() int64 {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return minHandles
	}
	return int64(max(minHandles, min(maxHandles, l.Cur/4)))
}

// unmount takes the mount away even if someone still stands in it.
func (t *fileTree) unmount() error {
	if t.server == nil {
		return nil
	}
	err := unix.Unmount(t.path, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EBUSY) {
		err = unix.Unmount(t.path, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
	}
	if err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("unmount %s: %w", t.path, err)
	}
	t.server = nil
	return nil
}

func (t *fileTree) openHandle() syscall.Errno {
	if t.handles.Add(1) > t.maxHandles {
		t.handles.Add(-1)
		if t.full.CompareAndSwap(false, true) && t.failed != nil {
			t.failed(fmt.Errorf("the job has %d files open at once, which is the limit", t.maxHandles))
		}
		return syscall.ENFILE
	}
	return 0
}

func (t *fileTree) closeHandle() { t.handles.Add(-1) }

// inputTree is inputs/: a folder for each input, empty until it is decrypted.
// Nothing in those folders is listed, found or opened before the trace has shown
// the container's start, for names are secret as well.
type inputTree struct {
	fileTree
	// wait returns an error while the gate is shut.
	wait func(done <-chan struct{}) error
	uid  uint32
	gid  uint32
	made time.Time
	root *inputDir

	mu   sync.Mutex
	dirs map[string]*inputDir
}

type inputDir struct {
	fs.Inode
	t     *inputTree
	gated bool
}

type inputFile struct {
	fs.Inode
	t    *inputTree
	c    content
	mode uint32
}

// content is what an input's file holds.
type content interface {
	size() int64
	// open is called once for each handle. It may wait for the content, until done.
	open(done <-chan struct{}) (source, error)
}

// source is what one handle reads. Its methods may be called at the same time,
// but for close, which is the last.
type source interface {
	// fd is the file's memory for the kernel to read in our stead. Negative: there
	// is none, and reads come to read.
	fd() int
	// read returns bytes from off on, which is before the end: as many as dest
	// has room for, or up to the end. It may use dest.
	read(dest []byte, off int64) (fuse.ReadResult, error)
	close()
}

type regionSource struct {
	r    *dma.Region
	file int
}

func openRegion(r *dma.Region, passthrough bool) (*regionSource, error) {
	if !passthrough || r.Size() == 0 {
		return &regionSource{r, -1}, nil
	}
	fd, err := r.ReadOnlyFD()
	if err != nil {
		return nil, err
	}
	return &regionSource{r, fd}, nil
}

func (s *regionSource) fd() int { return s.file }

func (s *regionSource) read(dest []byte, off int64) (fuse.ReadResult, error) {
	n := min(int64(len(dest)), s.r.Size()-off)
	if _, err := s.r.ReadAt(dest[:n], off); err != nil {
		return nil, err
	}
	return fuse.ReadResultData(dest[:n]), nil
}

func (s *regionSource) close() {
	if s.file >= 0 {
		_ = unix.Close(s.file)
	}
}

var (
	_ fs.NodeLookuper        = (*inputDir)(nil)
	_ fs.NodeReaddirer       = (*inputDir)(nil)
	_ fs.NodeGetattrer       = (*inputDir)(nil)
	_ fs.NodeAccesser        = (*inputDir)(nil)
	_ fs.NodeGetattrer       = (*inputFile)(nil)
	_ fs.NodeAccesser        = (*inputFile)(nil)
	_ fs.NodeOpener          = (*inputFile)(nil)
	_ fs.FileReader          = (*inputHandle)(nil)
	_ fs.FileReleaser        = (*inputHandle)(nil)
	_ fs.FilePassthroughFder = (*inputHandle)(nil)
)

func mountInputs(path string, uid, gid uint32, wait func(<-chan struct{}) error, failed func(error), now time.Time) (*inputTree, error) {
	t := &inputTree{fileTree: fileTree{failed: failed}, wait: wait, uid: uid, gid: gid, made: now, dirs: map[string]*inputDir{}}
	t.root = &inputDir{t: t}
	if err := t.mount(path, "coffer-inputs", t.root, "ro"); err != nil {
		return nil, err
	}
	return t, nil
}

func (t *inputTree) newDir(ctx context.Context, parent *inputDir, name string, gated bool) *inputDir {
	d := &inputDir{t: t, gated: gated}
	parent.AddChild(name, parent.NewPersistentInode(ctx, d, fs.StableAttr{Mode: syscall.S_IFDIR}), false)
	return d
}

// addInput makes the empty folder of an input.
func (t *inputTree) addInput(ctx context.Context, name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.dirs[name] = t.newDir(ctx, t.root, name, true)
}

// addFile puts a file under an input's folder. name was checked by seal.
func (t *inputTree) addFile(ctx context.Context, input, name string, c content) {
	t.put(ctx, input, name, &inputFile{t: t, c: c, mode: 0o444})
}

func (t *inputTree) put(ctx context.Context, input, name string, f *inputFile) {
	t.mu.Lock()
	defer t.mu.Unlock()
	d, at := t.dirs[input], input
	parts := strings.Split(name, "/")
	for _, p := range parts[:len(parts)-1] {
		at = path.Join(at, p)
		next := t.dirs[at]
		if next == nil {
			next = t.newDir(ctx, d, p, true)
			t.dirs[at] = next
		}
		d = next
	}
	d.AddChild(parts[len(parts)-1], d.NewPersistentInode(ctx, f, fs.StableAttr{Mode: syscall.S_IFREG}), false)
}

// gate waits for the container's start.
func (t *inputTree) gate(ctx context.Context) syscall.Errno {
	err := t.wait(ctx.Done())
	if err == nil {
		return 0
	}
	if ctx.Err() != nil {
		return syscall.EINTR
	}
	t.failed(err)
	return syscall.EIO
}

func (t *inputTree) attr(a *fuse.Attr, mode uint32, size int64) {
	a.Mode, a.Size, a.Nlink, a.Blksize = mode, uint64(size), 1, maxFUSE
	a.Blocks = (a.Size + 511) / 512
	a.Uid, a.Gid = t.uid, t.gid
	a.SetTimes(&t.made, &t.made, &t.made)
}

func (d *inputDir) fill(a *fuse.Attr) { d.t.attr(a, syscall.S_IFDIR|0o555, 0) }

// Getattr is allowed before the start: the runtime looks at the folders that it
// mounts.
func (d *inputDir) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	d.fill(&out.Attr)
	return 0
}

func (d *inputDir) Access(_ context.Context, mask uint32) syscall.Errno { return readOnly(mask) }

func (d *inputDir) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if d.gated {
		if e := d.t.gate(ctx); e != 0 {
			return nil, e
		}
	}
	ch := d.GetChild(name)
	if ch == nil {
		return nil, syscall.ENOENT
	}
	switch n := ch.Operations().(type) {
	case *inputDir:
		n.fill(&out.Attr)
	case *inputFile:
		n.fill(&out.Attr)
	}
	return ch, 0
}

func (d *inputDir) Readdir(ctx context.Context) (fs.DirStream, syscall.Errno) {
	if d.gated {
		if e := d.t.gate(ctx); e != 0 {
			return nil, e
		}
	}
	var l []fuse.DirEntry
	for name, ch := range d.Children() {
		l = append(l, fuse.DirEntry{Name: name, Mode: ch.Mode(), Ino: ch.StableAttr().Ino})
	}
	slices.SortFunc(l, func(a, b fuse.DirEntry) int { return strings.Compare(a.Name, b.Name) })
	return fs.NewListDirStream(l), 0
}

func (f *inputFile) fill(a *fuse.Attr) { f.t.attr(a, syscall.S_IFREG|f.mode, f.c.size()) }

func (f *inputFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	f.fill(&out.Attr)
	return 0
}

func (f *inputFile) Access(_ context.Context, mask uint32) syscall.Errno { return readOnly(mask) }

func readOnly(mask uint32) syscall.Errno {
	if mask&unix.W_OK != 0 {
		return syscall.EROFS
	}
	return 0
}

func (f *inputFile) Open(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if flags&(syscall.O_WRONLY|syscall.O_RDWR|syscall.O_TRUNC|syscall.O_APPEND) != 0 {
		return nil, 0, syscall.EROFS
	}
	if e := f.t.gate(ctx); e != 0 {
		return nil, 0, e
	}
	if e := f.t.openHandle(); e != 0 {
		return nil, 0, e
	}
	src, err := f.c.open(ctx.Done())
	if err != nil {
		f.t.closeHandle()
		if errors.Is(err, errInterrupted) {
			return nil, 0, syscall.EINTR
		}
		f.t.failed(err)
		return nil, 0, syscall.EIO
	}
	// Who waited may do so no longer.
	if e := f.t.gate(ctx); e != 0 {
		f.t.closeHandle()
		src.close()
		return nil, 0, e
	}
	h := &inputHandle{f: f, source: src}
	// A close has nothing to write and need not ask the holder. It would have to at each
	// start of a program by a process that has the file open, and would wait for a holder
	// that is paused.
	if src.fd() >= 0 {
		return h, fuse.FOPEN_NOFLUSH, 0
	}
	// Reads come here, and must not leave plaintext in a page cache that nobody
	// scrubs.
	return h, fuse.FOPEN_NOFLUSH | fuse.FOPEN_DIRECT_IO, 0
}

type inputHandle struct {
	f *inputFile
	source
}

// PassthroughFd lets the kernel read the file's memory itself.
func (h *inputHandle) PassthroughFd() (int, bool) { return h.fd(), h.fd() >= 0 }

func (h *inputHandle) Read(_ context.Context, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	if off >= h.f.c.size() {
		return fuse.ReadResultData(nil), 0
	}
	r, err := h.read(dest, off)
	if err != nil {
		h.f.t.failed(err)
		return nil, syscall.EIO
	}
	return r, 0
}

func (h *inputHandle) Release(context.Context) syscall.Errno {
	h.f.t.closeHandle()
	h.close()
	return 0
}
