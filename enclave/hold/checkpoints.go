package hold

import (
	"context"
	"errors"
	"io"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/enclave/dma"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/enclave/seal"
)

const (
	// commitSuffix is what a rename takes off to commit.
	commitSuffix = ".tmp"
	// maxNodes bounds uncommitted files and folders.
	maxNodes = 100_000
	// blockSpan is the part of a file that one block holds.
	blockSpan = 1 << 20
	// fallocKeepSize is FALLOC_FL_KEEP_SIZE.
	fallocKeepSize = 1
)

// commitName is what a checkpoint may be called: it becomes part of a folder's
// name in the sink.
var commitName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

// checkpointTree is checkpoints/: what the job writes, in locked memory, until
// renaming NAME.tmp to NAME in its root seals NAME as one unit. Then the plaintext
// is scrubbed and the entry is gone.
//
// Locks, in order: committing, mu, checkpointNode.data, scrubMu.
type checkpointTree struct {
	fileTree
	uid, gid uint32
	now      func() time.Time
	// commit seals the files of one checkpoint. It returns once they are durable.
	commit func(name string, files []seal.Source) error

	// committing is held for a whole commit: commits have an order.
	committing sync.Mutex

	// mu guards the shape of the tree, and all of a node but its content.
	mu    sync.Mutex
	pool  *dma.Blocks // nil until there is a sink
	nodes int
	root  *checkpointNode
	// resume is the folder in root with what the job goes on from; nil if there is
	// none.
	resume *inputDir
	over   bool

	scrubMu  sync.Mutex
	scrubErr error
}

type checkpointNode struct {
	fs.Inode
	t *checkpointTree

	// children is nil for a file.
	children map[string]*checkpointNode
	// linked: it has a name. frozen: it is being sealed. gone: it was sealed,
	// removed, or the job is over.
	linked, frozen, gone bool
	opens                int
	mode, uid, gid       uint32

	// data guards what follows.
	data   sync.RWMutex
	mtime  time.Time
	size   int64
	blocks [][]byte
	// shut refuses writers, dead readers as well.
	shut, dead bool
}

type checkpointHandle struct{ n *checkpointNode }

var (
	_ fs.NodeLookuper  = (*checkpointNode)(nil)
	_ fs.NodeReaddirer = (*checkpointNode)(nil)
	_ fs.NodeGetattrer = (*checkpointNode)(nil)
	_ fs.NodeSetattrer = (*checkpointNode)(nil)
	_ fs.NodeAccesser  = (*checkpointNode)(nil)
	_ fs.NodeStatfser  = (*checkpointNode)(nil)
	_ fs.NodeCreater   = (*checkpointNode)(nil)
	_ fs.NodeMkdirer   = (*checkpointNode)(nil)
	_ fs.NodeUnlinker  = (*checkpointNode)(nil)
	_ fs.NodeRmdirer   = (*checkpointNode)(nil)
	_ fs.NodeRenamer   = (*checkpointNode)(nil)
	_ fs.NodeOpener    = (*checkpointNode)(nil)
	_ fs.NodeFsyncer   = (*checkpointNode)(nil)
	_ fs.FileReader    = (*checkpointHandle)(nil)
	_ fs.FileWriter    = (*checkpointHandle)(nil)
	_ fs.FileFlusher   = (*checkpointHandle)(nil)
	_ fs.FileAllocater = (*checkpointHandle)(nil)
	_ fs.FileReleaser  = (*checkpointHandle)(nil)
)

func mountCheckpoints(path string, uid, gid uint32, commit func(string, []seal.Source) error, now func() time.Time) (*checkpointTree, error) {
	t := &checkpointTree{uid: uid, gid: gid, now: now, commit: commit}
	t.root = t.newNode(true, 0o700)
	t.root.linked = true
	if err := t.mount(path, "coffer-checkpoints", t.root); err != nil {
		return nil, err
	}
	return t, nil
}

// enable lets the job write, up to limit bytes.
func (t *checkpointTree) enable(limit int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pool = dma.NewBlocks(limit)
}

// close scrubs everything that was not committed and says whether it worked.
func (t *checkpointTree) close() error {
	t.committing.Lock()
	defer t.committing.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.over = true
	t.root.walk("", func(_ string, n *checkpointNode) { n.drop() })
	t.scrubMu.Lock()
	err := t.scrubErr
	t.scrubMu.Unlock()
	if t.pool != nil {
		err = errors.Join(err, t.pool.Close())
	}
	return err
}

// held is what uncommitted files hold, in bytes of memory.
func (t *checkpointTree) held() int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.pool == nil {
		return 0
	}
	return t.pool.Used()
}

func (t *checkpointTree) newNode(dir bool, perm uint32) *checkpointNode {
	n := &checkpointNode{t: t, mode: perm & 0o777, uid: t.uid, gid: t.gid, mtime: t.now()}
	if dir {
		n.children = map[string]*checkpointNode{}
	}
	return n
}

// usable says whether d's entries may change. t.mu is held.
func (d *checkpointNode) usable() syscall.Errno {
	switch {
	case d.t.over || d.gone:
		return syscall.EIO
	case !d.dir():
		return syscall.ENOTDIR
	case d.frozen:
		return syscall.EBUSY
	case d.t.pool == nil:
		return syscall.EROFS
	}
	return 0
}

func (n *checkpointNode) dir() bool { return n.children != nil }

// walk visits n and everything below it, with paths below n. t.mu is held.
func (n *checkpointNode) walk(at string, f func(path string, n *checkpointNode)) {
	f(at, n)
	for name, c := range n.children {
		c.walk(strings.TrimPrefix(at+"/"+name, "/"), f)
	}
}

// drop scrubs n's content and refuses everything from now on. t.mu is held.
func (n *checkpointNode) drop() {
	if n.gone {
		return
	}
	n.gone = true
	if n != n.t.root {
		n.t.nodes--
		n.ForgetPersistent()
	}
	n.data.Lock()
	defer n.data.Unlock()
	n.shut, n.dead = true, true
	n.resize(0)
}

// setShut closes or opens n for writers.
func (n *checkpointNode) setShut(shut bool) {
	n.data.Lock()
	defer n.data.Unlock()
	n.shut = shut
}

// resize changes the size, keeping what is cut off from ever coming back.
// n.data is held.
func (n *checkpointNode) resize(size int64) {
	if size < n.size {
		keep := int((size + blockSpan - 1) / blockSpan)
		for i := keep; i < len(n.blocks); i++ {
			n.setBlock(i, nil)
		}
		n.blocks = n.blocks[:min(keep, len(n.blocks))]
		if at := int(size % blockSpan); at > 0 && keep == len(n.blocks) && len(n.blocks[keep-1]) > at {
			clear(n.blocks[keep-1][at:])
		}
	}
	n.size = size
}

func (n *checkpointNode) setBlock(i int, b []byte) {
	if n.blocks[i] != nil {
		if err := n.t.pool.Put(n.blocks[i]); err != nil {
			n.t.scrubMu.Lock()
			n.t.scrubErr = errors.Join(n.t.scrubErr, err)
			n.t.scrubMu.Unlock()
		}
	}
	n.blocks[i] = b
}

// grow makes block i at least need bytes long. n.data is held.
func (n *checkpointNode) grow(i int64, need int) error {
	for int64(len(n.blocks)) <= i {
		n.blocks = append(n.blocks, nil)
	}
	old := n.blocks[i]
	if len(old) >= need {
		return nil
	}
	if i > 0 {
		need = blockSpan
	}
	b, err := n.t.pool.Get(need)
	if err != nil {
		return err
	}
	copy(b, old)
	n.setBlock(int(i), b)
	return nil
}

// readAt fills p, which lies within the size. n.data is held.
func (n *checkpointNode) readAt(p []byte, off int64) {
	for len(p) > 0 {
		i, in := off/blockSpan, int(off%blockSpan)
		k := min(len(p), blockSpan-in)
		var m int
		if i < int64(len(n.blocks)) && len(n.blocks[i]) > in {
			m = copy(p[:k], n.blocks[i][in:])
		}
		clear(p[m:k])
		p, off = p[k:], off+int64(k)
	}
}

// attr fills a. t.mu is held.
func (n *checkpointNode) attr(a *fuse.Attr) {
	n.data.RLock()
	defer n.data.RUnlock()
	a.Mode, a.Nlink, a.Blksize = n.mode|syscall.S_IFREG, 1, maxFUSE
	if n.dir() {
		a.Mode = n.mode | syscall.S_IFDIR
	}
	a.Size = uint64(n.size)
	a.Blocks = (a.Size + 511) / 512
	a.Uid, a.Gid = n.uid, n.gid
	a.SetTimes(&n.mtime, &n.mtime, &n.mtime)
}

func (n *checkpointNode) Access(context.Context, uint32) syscall.Errno { return 0 }

func (n *checkpointNode) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	n.t.mu.Lock()
	defer n.t.mu.Unlock()
	n.attr(&out.Attr)
	return 0
}

func (n *checkpointNode) Setattr(_ context.Context, _ fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	n.t.mu.Lock()
	defer n.t.mu.Unlock()
	if n.gone || n.t.over {
		return syscall.EIO
	}
	if size, ok := in.GetSize(); ok {
		if e := n.truncate(size); e != 0 {
			return e
		}
	}
	if mode, ok := in.GetMode(); ok {
		n.mode = mode & 0o777
	}
	// The sandbox's file server hands what it creates to the job's user.
	if uid, ok := in.GetUID(); ok {
		n.uid = uid
	}
	if gid, ok := in.GetGID(); ok {
		n.gid = gid
	}
	if m, ok := in.GetMTime(); ok {
		n.data.Lock()
		n.mtime = m
		n.data.Unlock()
	}
	n.attr(&out.Attr)
	return 0
}

// truncate is called with t.mu held.
func (n *checkpointNode) truncate(size uint64) syscall.Errno {
	if n.dir() {
		return syscall.EISDIR
	}
	if n.t.pool == nil || size > uint64(n.t.pool.Limit()) {
		return syscall.ENOSPC
	}
	n.data.Lock()
	defer n.data.Unlock()
	if n.shut {
		return syscall.EBUSY
	}
	n.resize(int64(size))
	n.mtime = n.t.now()
	return 0
}

func (n *checkpointNode) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	n.t.mu.Lock()
	defer n.t.mu.Unlock()
	out.Bsize, out.Frsize, out.NameLen = 4096, 4096, 255
	out.Files, out.Ffree = maxNodes, uint64(maxNodes-n.t.nodes)
	if p := n.t.pool; p != nil {
		out.Blocks = uint64(p.Limit()) / 4096
		out.Bfree = uint64(p.Limit()-p.Used()) / 4096
		out.Bavail = out.Bfree
	}
	return 0
}

func (n *checkpointNode) Lookup(_ context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	n.t.mu.Lock()
	defer n.t.mu.Unlock()
	if n.resumes(name) {
		n.t.resume.fill(&out.Attr)
		return n.t.resume.EmbeddedInode(), 0
	}
	c := n.children[name]
	if c == nil {
		return nil, syscall.ENOENT
	}
	c.attr(&out.Attr)
	return c.EmbeddedInode(), 0
}

func (n *checkpointNode) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	n.t.mu.Lock()
	defer n.t.mu.Unlock()
	var l []fuse.DirEntry
	if n.resumes(holdapi.ResumeName) {
		l = append(l, fuse.DirEntry{Name: holdapi.ResumeName, Mode: syscall.S_IFDIR, Ino: n.t.resume.StableAttr().Ino})
	}
	for name, c := range n.children {
		l = append(l, fuse.DirEntry{Name: name, Mode: c.StableAttr().Mode, Ino: c.StableAttr().Ino})
	}
	slices.SortFunc(l, func(a, b fuse.DirEntry) int { return strings.Compare(a.Name, b.Name) })
	return fs.NewListDirStream(l), 0
}

// add makes a new entry. t.mu is held.
func (n *checkpointNode) add(ctx context.Context, name string, dir bool, mode uint32) (*checkpointNode, syscall.Errno) {
	if e := n.usable(); e != 0 {
		return nil, e
	}
	switch {
	case len(name) > 255:
		return nil, syscall.ENAMETOOLONG
	case !utf8.ValidString(name):
		return nil, syscall.EILSEQ
	case n.children[name] != nil, n.resumes(name):
		return nil, syscall.EEXIST
	case n.t.nodes >= maxNodes:
		return nil, syscall.ENOSPC
	}
	c := n.t.newNode(dir, mode)
	kind := uint32(syscall.S_IFREG)
	if dir {
		kind = syscall.S_IFDIR
	}
	n.NewPersistentInode(ctx, c, fs.StableAttr{Mode: kind})
	c.linked = true
	n.children[name] = c
	n.t.nodes++
	return c, 0
}

func (n *checkpointNode) Mkdir(ctx context.Context, name string, mode uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	n.t.mu.Lock()
	defer n.t.mu.Unlock()
	c, e := n.add(ctx, name, true, mode)
	if e != 0 {
		return nil, e
	}
	c.attr(&out.Attr)
	return c.EmbeddedInode(), 0
}

func (n *checkpointNode) Create(ctx context.Context, name string, _, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	n.t.mu.Lock()
	defer n.t.mu.Unlock()
	if e := n.t.openHandle(); e != 0 {
		return nil, nil, 0, e
	}
	c, e := n.add(ctx, name, false, mode)
	if e != 0 {
		n.t.closeHandle()
		return nil, nil, 0, e
	}
	c.opens++
	c.attr(&out.Attr)
	return c.EmbeddedInode(), &checkpointHandle{c}, fuse.FOPEN_DIRECT_IO, 0
}

func (n *checkpointNode) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	n.t.mu.Lock()
	defer n.t.mu.Unlock()
	if n.gone || n.t.over {
		return nil, 0, syscall.EIO
	}
	if n.frozen && flags&(syscall.O_WRONLY|syscall.O_RDWR) != 0 {
		return nil, 0, syscall.EBUSY
	}
	if flags&syscall.O_TRUNC != 0 {
		if e := n.truncate(0); e != 0 {
			return nil, 0, e
		}
	}
	if e := n.t.openHandle(); e != 0 {
		return nil, 0, e
	}
	n.opens++
	// Direct: no copy of the plaintext in a page cache that nobody scrubs.
	return &checkpointHandle{n}, fuse.FOPEN_DIRECT_IO, 0
}

// Fsync has nothing to do: what is written here is durable only once committed.
func (n *checkpointNode) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno { return 0 }

func (n *checkpointNode) Unlink(_ context.Context, name string) syscall.Errno {
	return n.remove(name, false)
}

func (n *checkpointNode) Rmdir(_ context.Context, name string) syscall.Errno {
	return n.remove(name, true)
}

func (n *checkpointNode) remove(name string, dir bool) syscall.Errno {
	n.t.mu.Lock()
	defer n.t.mu.Unlock()
	if e := n.usable(); e != 0 {
		return e
	}
	c := n.children[name]
	switch {
	case n.resumes(name):
		return syscall.EROFS
	case c == nil:
		return syscall.ENOENT
	case c.frozen:
		return syscall.EBUSY
	case dir && !c.dir():
		return syscall.ENOTDIR
	case !dir && c.dir():
		return syscall.EISDIR
	case len(c.children) > 0:
		return syscall.ENOTEMPTY
	}
	n.unlink(name)
	return 0
}

// unlink takes a name away. Content lives as long as it is open. t.mu is held.
func (n *checkpointNode) unlink(name string) {
	c := n.children[name]
	delete(n.children, name)
	c.linked = false
	if c.opens == 0 {
		c.drop()
	}
}

// Rename moves, or commits.
func (n *checkpointNode) Rename(_ context.Context, name string, newParent fs.InodeEmbedder, newName string, flags uint32) syscall.Errno {
	to, ok := newParent.(*checkpointNode)
	if !ok {
		return syscall.EXDEV
	}
	if flags&^unix.RENAME_NOREPLACE != 0 {
		return syscall.EINVAL
	}
	if n == n.t.root && to == n.t.root && name == newName+commitSuffix {
		return n.t.commitEntry(name, newName, flags)
	}
	n.t.mu.Lock()
	defer n.t.mu.Unlock()
	c, e := n.checkRename(name, to, newName, flags)
	if e != 0 {
		return e
	}
	if to.children[newName] == c {
		return 0
	}
	if to.children[newName] != nil {
		to.unlink(newName)
	}
	delete(n.children, name)
	to.children[newName] = c
	return 0
}

// checkRename returns what would be moved. t.mu is held.
func (n *checkpointNode) checkRename(name string, to *checkpointNode, newName string, flags uint32) (*checkpointNode, syscall.Errno) {
	if e := n.usable(); e != 0 {
		return nil, e
	}
	if e := to.usable(); e != 0 {
		return nil, e
	}
	c, old := n.children[name], to.children[newName]
	switch {
	case c == nil:
		return nil, syscall.ENOENT
	case c.frozen || old != nil && old.frozen:
		return nil, syscall.EBUSY
	case to.resumes(newName):
		return nil, syscall.EEXIST
	case len(newName) > 255:
		return nil, syscall.ENAMETOOLONG
	case !utf8.ValidString(newName):
		return nil, syscall.EILSEQ
	case old == nil || old == c:
		return c, 0
	case flags&unix.RENAME_NOREPLACE != 0:
		return nil, syscall.EEXIST
	case c.dir() && !old.dir():
		return nil, syscall.ENOTDIR
	case !c.dir() && old.dir():
		return nil, syscall.EISDIR
	case len(old.children) > 0:
		return nil, syscall.ENOTEMPTY
	}
	return c, 0
}

// commitEntry seals root/name as newName: every file or none. It returns once
// the sealed folder is durable.
func (t *checkpointTree) commitEntry(name, newName string, flags uint32) syscall.Errno {
	// In the sink that ending marks a commit that was cut off.
	if !commitName.MatchString(newName) || strings.HasSuffix(newName, commitSuffix) {
		return syscall.EINVAL
	}
	t.committing.Lock()
	defer t.committing.Unlock()
	t.mu.Lock()
	c, e := t.root.checkRename(name, t.root, newName, flags)
	if e != 0 {
		t.mu.Unlock()
		return e
	}
	var files []seal.Source
	c.walk("", func(at string, n *checkpointNode) {
		n.frozen = true
		n.setShut(true)
		if n.dir() {
			return
		}
		if at == "" {
			at = newName
		}
		files = append(files, seal.Source{Name: at, Size: n.size, Open: func() (seal.Reader, error) { return nodeReader{n}, nil }})
	})
	t.mu.Unlock()

	err := t.commit(newName, files)

	t.mu.Lock()
	defer t.mu.Unlock()
	if err != nil {
		c.walk("", func(_ string, n *checkpointNode) {
			n.frozen = false
			n.setShut(false)
		})
		if errors.Is(err, syscall.ENOSPC) {
			return syscall.ENOSPC
		}
		return syscall.EIO
	}
	c.walk("", func(_ string, n *checkpointNode) {
		n.linked = false
		n.drop()
	})
	delete(t.root.children, name)
	if t.root.children[newName] != nil {
		t.root.unlink(newName)
	}
	return 0
}

// nodeReader reads frozen content for sealing.
type nodeReader struct{ n *checkpointNode }

func (r nodeReader) ReadAt(p []byte, off int64) (int, error) {
	r.n.data.RLock()
	defer r.n.data.RUnlock()
	if r.n.dead || !r.n.shut {
		return 0, errors.New("file is not frozen")
	}
	if off < 0 || off >= r.n.size {
		return 0, io.EOF
	}
	k := min(int64(len(p)), r.n.size-off)
	r.n.readAt(p[:k], off)
	if k < int64(len(p)) {
		return int(k), io.EOF
	}
	return int(k), nil
}

// View is of seal.Viewer. Blocks are neither written nor given back while a commit is
// under way: the node is frozen, and close waits for the commit.
func (r nodeReader) View(off int64, n int) ([]byte, error) {
	r.n.data.RLock()
	defer r.n.data.RUnlock()
	if r.n.dead || !r.n.shut {
		return nil, errors.New("file is not frozen")
	}
	i, in := off/blockSpan, int(off%blockSpan)
	if off < 0 || off+int64(n) > r.n.size || i >= int64(len(r.n.blocks)) || in+n > len(r.n.blocks[i]) {
		return nil, nil
	}
	return r.n.blocks[i][in : in+n], nil
}

func (nodeReader) Close() error { return nil }

func (h *checkpointHandle) Read(_ context.Context, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n := h.n
	n.data.RLock()
	defer n.data.RUnlock()
	if n.dead {
		return nil, syscall.EIO
	}
	if off >= n.size {
		return fuse.ReadResultData(nil), 0
	}
	dest = dest[:min(int64(len(dest)), n.size-off)]
	n.readAt(dest, off)
	return fuse.ReadResultData(dest), 0
}

func (h *checkpointHandle) Write(_ context.Context, b []byte, off int64) (uint32, syscall.Errno) {
	n := h.n
	n.data.Lock()
	defer n.data.Unlock()
	if n.dead {
		return 0, syscall.EIO
	}
	if n.shut {
		return 0, syscall.EBUSY
	}
	if off < 0 || off+int64(len(b)) > n.t.pool.Limit() {
		return 0, syscall.ENOSPC
	}
	done := 0
	for done < len(b) {
		i, in := off/blockSpan, int(off%blockSpan)
		k := min(len(b)-done, blockSpan-in)
		if err := n.grow(i, in+k); err != nil {
			if done > 0 {
				break
			}
			if errors.Is(err, dma.ErrFull) {
				return 0, syscall.ENOSPC
			}
			return 0, syscall.EIO
		}
		copy(n.blocks[i][in:], b[done:done+k])
		done, off = done+k, off+int64(k)
		n.size = max(n.size, off)
	}
	n.mtime = n.t.now()
	return uint32(done), 0
}

func (h *checkpointHandle) Flush(context.Context) syscall.Errno { return 0 }

func (h *checkpointHandle) Allocate(_ context.Context, off, size uint64, mode uint32) syscall.Errno {
	if mode&^fallocKeepSize != 0 {
		return syscall.EOPNOTSUPP
	}
	n := h.n
	n.data.Lock()
	defer n.data.Unlock()
	limit := uint64(n.t.pool.Limit())
	if off > limit || size > limit-off {
		return syscall.ENOSPC
	}
	if n.shut {
		return syscall.EBUSY
	}
	if end := int64(off + size); mode == 0 && end > n.size {
		n.resize(end)
	}
	return 0
}

func (h *checkpointHandle) Release(context.Context) syscall.Errno {
	n := h.n
	n.t.closeHandle()
	n.t.mu.Lock()
	defer n.t.mu.Unlock()
	n.opens--
	if !n.linked && n.opens == 0 {
		n.drop()
	}
	return 0
}
