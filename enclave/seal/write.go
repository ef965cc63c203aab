package seal

import (
	"cmp"
	"context"
	"crypto/cipher"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/keys"
)

// Reader is one source of plaintext. Close reports an error if what was read
// changed meanwhile.
type Reader interface {
	io.ReaderAt
	io.Closer
}

// Viewer is a Reader whose content lies in memory and does not change before Close.
type Viewer interface {
	Reader
	// View returns the n bytes from off on where they lie; nil if they do not lie
	// together. Nobody may write to them.
	View(off int64, n int) ([]byte, error)
}

// Source is one file to be sealed.
type Source struct {
	// Name is a relative, slash-separated path.
	Name string
	Size int64
	Open func() (Reader, error)
}

// Options are those of Seal. The zero value is good.
type Options struct {
	// ChunkSize is DefaultChunkSize if zero.
	ChunkSize int
	// Workers is GOMAXPROCS if zero.
	Workers int
	// Progress is called, from several goroutines, with bytes done and in all.
	Progress func(done, total int64)

	// noPlainRoots leaves the plaintext's digests out of the manifest.
	noPlainRoots bool
	// direct is from what sealed size on files are written past the page cache; none
	// are if it is zero.
	direct int64
	// salt makes test vectors; there is no way to set it from outside.
	salt func() [saltSize]byte
	// step is called between any two changes on disk, for tests that end there.
	step func()
}

func (o Options) at() {
	if o.step != nil {
		o.step()
	}
}

// Sealed is what Seal made.
type Sealed struct {
	Digest plan.Digest
	Files  int
	// Bytes are those of the plaintext.
	Bytes int64
}

// Seal writes the sources, sealed under key, into the new folder dst. The
// folder appears whole or not at all: it is made as dst + ".tmp", synced, and
// renamed. A dst that exists is an error.
func Seal(ctx context.Context, key *keys.DataKey, asset string, sources []Source, dst string, o Options) (Sealed, error) {
	dst = filepath.Clean(dst)
	parent, err := os.OpenRoot(filepath.Dir(dst))
	if err != nil {
		return Sealed{}, fmt.Errorf("seal: %w", err)
	}
	defer parent.Close()
	return sealInto(ctx, key, asset, sources, parent, filepath.Base(dst), o, nil)
}

// sealInto seals into parent/name. before runs when the folder is complete but
// for its place, and may add to it.
func sealInto(ctx context.Context, key *keys.DataKey, asset string, sources []Source, parent *os.Root, name string, o Options, before func(tmp *os.Root, s Sealed) error) (_ Sealed, err error) {
	o.ChunkSize = cmp.Or(o.ChunkSize, DefaultChunkSize)
	if err := checkChunkSize(o.ChunkSize); err != nil {
		return Sealed{}, fmt.Errorf("seal: %w", err)
	}
	if asset == "" {
		return Sealed{}, errors.New("seal: no asset name")
	}
	if len(sources) == 0 || len(sources) > MaxFiles {
		return Sealed{}, fmt.Errorf("seal: %d files, want 1 to %d", len(sources), MaxFiles)
	}
	sources = slices.Clone(sources)
	slices.SortFunc(sources, func(a, b Source) int { return cmp.Compare(a.Name, b.Name) })
	names := make([]string, len(sources))
	var total int64
	for i, s := range sources {
		names[i] = s.Name
		total += s.Size
	}
	if err := checkNames(names); err != nil {
		return Sealed{}, fmt.Errorf("seal: %w", err)
	}
	if _, err := parent.Lstat(name); err == nil {
		return Sealed{}, fmt.Errorf("seal: %s exists", name)
	}
	tmpName := name + ".tmp"
	if err := parent.Mkdir(tmpName, 0o700); err != nil {
		return Sealed{}, fmt.Errorf("seal: %w (left by an interrupted sealing? remove it)", err)
	}
	defer func() {
		if err != nil {
			_ = parent.RemoveAll(tmpName)
		}
	}()
	o.at()
	tmp, err := parent.OpenRoot(tmpName)
	if err != nil {
		return Sealed{}, fmt.Errorf("seal: %w", err)
	}
	defer tmp.Close()

	var done atomic.Int64
	progress := func(n int) {
		if o.Progress != nil {
			o.Progress(done.Add(int64(n)), total)
		}
	}
	m := Manifest{Version: Version, Asset: asset, ChunkSize: o.ChunkSize}
	var p privatePart
	var flushing flushes
	defer func() { err = errors.Join(err, flushing.wait()) }()
	for i, s := range sources {
		f, e, err := sealFile(ctx, key, s, tmp, fileID(i), o, progress, flushing.add)
		if err != nil {
			return Sealed{}, fmt.Errorf("seal %s: %w", s.Name, err)
		}
		o.at()
		m.Files = append(m.Files, f)
		p.Files = append(p.Files, e)
	}
	if err := flushing.wait(); err != nil {
		return Sealed{}, fmt.Errorf("seal: %w", err)
	}
	o.at()
	var salt []byte
	if o.salt != nil {
		s := o.salt()
		salt = s[:]
	}
	b, err := sealManifest(key, m, p, salt)
	if err != nil {
		return Sealed{}, fmt.Errorf("seal manifest: %w", err)
	}
	if len(b) > MaxManifest {
		return Sealed{}, fmt.Errorf("seal: manifest of %d bytes, at most %d are allowed", len(b), MaxManifest)
	}
	if err := writeNew(tmp, ManifestName, b); err != nil {
		return Sealed{}, fmt.Errorf("seal: %w", err)
	}
	o.at()
	out := Sealed{Digest: plan.Sum(b), Files: len(m.Files), Bytes: total}
	if before != nil {
		if err := before(tmp, out); err != nil {
			return Sealed{}, err
		}
		o.at()
	}
	if err := syncDir(tmp); err != nil {
		return Sealed{}, fmt.Errorf("seal: %w", err)
	}
	o.at()
	if err := renameNew(parent, tmpName, name); err != nil {
		return Sealed{}, fmt.Errorf("seal: %w", err)
	}
	o.at()
	return out, nil
}

// sealJob is the state that the workers on one file share.
type sealJob struct {
	aead   cipher.AEAD
	header header
	layout layout
	src    io.ReaderAt
	// output makes one worker's way to the file.
	output func() (output, error)
	// span is how many chunks a worker seals in order; next is the first chunk that
	// no worker has.
	span int64
	next atomic.Int64
	// cipherLeaves begins with the header block; plainLeaves does not, and is nil
	// if the plaintext is not digested.
	cipherLeaves, plainLeaves []leaf
	progress                  func(n int)
}

// flushes are files that are on their way to the disk while others are sealed.
type flushes struct {
	wg    sync.WaitGroup
	slots chan struct{}
	mu    sync.Mutex
	err   error
}

// maxFlushes bounds the files that one sealing brings to the disk at one time.
const maxFlushes = 4

// add runs f, which closes one file, and waits if there are too many.
func (s *flushes) add(f func() error) error {
	if s.slots == nil {
		s.slots = make(chan struct{}, maxFlushes)
	}
	s.slots <- struct{}{}
	s.wg.Go(func() {
		err := f()
		s.mu.Lock()
		s.err = errors.Join(s.err, err)
		s.mu.Unlock()
		<-s.slots
	})
	return nil
}

// wait returns when all files are on the disk, or with what went wrong, once.
func (s *flushes) wait() error {
	s.wg.Wait()
	err := s.err
	s.err = nil
	return err
}

// atOnce is for a file that must be on the disk when it has been sealed.
func atOnce(f func() error) error { return f() }

// sealFile seals one file. flush is given what makes it durable and closes it.
func sealFile(ctx context.Context, key *keys.DataKey, s Source, tmp *os.Root, id string, o Options, progress func(int), flush func(func() error) error) (_ SealedFile, _ privateEntry, err error) {
	l, err := layoutOf(s.Size, o.ChunkSize)
	if err != nil {
		return SealedFile{}, privateEntry{}, err
	}
	var h header
	var aead cipher.AEAD
	if o.salt != nil {
		h, aead, err = headerWithSalt(key, o.ChunkSize, o.salt())
	} else {
		h, aead, err = newHeader(key, o.ChunkSize)
	}
	if err != nil {
		return SealedFile{}, privateEntry{}, err
	}
	src, err := s.Open()
	if err != nil {
		return SealedFile{}, privateEntry{}, err
	}
	defer func() {
		if cerr := src.Close(); err == nil {
			err = cerr
		}
	}()
	dst, err := tmp.OpenFile(SealedName(id), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return SealedFile{}, privateEntry{}, err
	}
	handed := false
	defer func() {
		if !handed {
			_ = dst.Close()
		}
	}()
	o.at()
	j := &sealJob{aead: aead, header: h, layout: l, src: src, progress: progress, cipherLeaves: make([]leaf, 1+l.chunks), span: 1,
		output: func() (output, error) { return &buffered{dst: dst, buf: make([]byte, l.maxChunk())}, nil }}
	if !o.noPlainRoots {
		j.plainLeaves = make([]leaf, l.chunks)
	}
	block := make([]byte, PayloadOffset)
	copy(block, h[:])
	newLeafHasher().sum(block, &j.cipherLeaves[0])
	if _, err := dst.WriteAt(block, 0); err != nil {
		return SealedFile{}, privateEntry{}, fmt.Errorf("write sealed file: %w", err)
	}
	o.at()
	if o.direct > 0 && l.cipherSize() >= o.direct {
		err = j.runDirect(ctx, o.workers(l.chunks), tmp, SealedName(id), dst)
	} else {
		err = j.run(ctx, o.workers(l.chunks))
	}
	if err != nil {
		return SealedFile{}, privateEntry{}, err
	}
	o.at()
	handed = true
	if err := flush(func() error {
		if err := errors.Join(dst.Sync(), dst.Close()); err != nil {
			return fmt.Errorf("sync sealed file: %w", err)
		}
		return nil
	}); err != nil {
		return SealedFile{}, privateEntry{}, err
	}
	e := privateEntry{Name: s.Name, Size: s.Size, Salt: slices.Clone(h.salt())}
	if j.plainLeaves != nil {
		e.Root = merkleRoot(j.plainLeaves)
	}
	return SealedFile{ID: id, CipherSize: l.cipherSize(), Root: merkleRoot(j.cipherLeaves)}, e, nil
}

// workers is how many goroutines seal so many chunks.
func (o Options) workers(chunks int64) int {
	n := o.Workers
	if n <= 0 {
		n = runtime.GOMAXPROCS(0)
	}
	return int(min(int64(n), chunks))
}

func (j *sealJob) run(ctx context.Context, workers int) error {
	errs := make([]error, workers)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			if errs[w] = j.work(ctx); errs[w] != nil {
				cancel(errs[w])
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (j *sealJob) work(ctx context.Context) (err error) {
	out, err := j.output()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.close()) }()
	h := newLeafHasher()
	for {
		first := j.next.Add(j.span) - j.span
		if first >= j.layout.chunks {
			return nil
		}
		out.begin(j.layout.offset(first))
		for i := first; i < min(first+j.span, j.layout.chunks); i++ {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err := j.seal(i, out, h); err != nil {
				return err
			}
		}
		if err := out.end(); err != nil {
			return err
		}
	}
}

// seal seals chunk i.
func (j *sealJob) seal(i int64, out output, h leafHasher) error {
	n := j.layout.plainLen(i)
	buf, err := out.next(n + TagSize)
	if err != nil {
		return err
	}
	plain, err := j.plain(buf[:n], i*int64(j.layout.chunkSize))
	if err != nil {
		return fmt.Errorf("read source: %w", err)
	}
	if j.plainLeaves != nil {
		h.sum(plain, &j.plainLeaves[i])
	}
	var nonce [12]byte
	setNonce(&nonce, i, i == j.layout.chunks-1)
	c := j.aead.Seal(buf[:0], nonce[:], plain, j.header[:])
	h.sum(c, &j.cipherLeaves[1+i])
	if err := out.add(len(c)); err != nil {
		return err
	}
	j.progress(n)
	return nil
}

// plain is the source's content from off on, as long as buf: where it lies, or copied
// into buf.
func (j *sealJob) plain(buf []byte, off int64) ([]byte, error) {
	if v, ok := j.src.(Viewer); ok {
		b, err := v.View(off, len(buf))
		if err != nil {
			return nil, err
		}
		if len(b) == len(buf) {
			return b, nil
		}
	}
	if m, err := j.src.ReadAt(buf, off); m < len(buf) {
		return nil, cmp.Or(err, io.ErrUnexpectedEOF)
	}
	return buf, nil
}

func writeNew(root *os.Root, name string, b []byte) error {
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", name, err)
	}
	return f.Close()
}

func syncDir(root *os.Root) error {
	d, err := root.Open(".")
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync folder: %w", err)
	}
	return nil
}

// renameNew renames within root, refuses to replace, and makes it durable.
func renameNew(root *os.Root, from, to string) error {
	d, err := root.Open(".")
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Renameat2(int(d.Fd()), from, int(d.Fd()), to, unix.RENAME_NOREPLACE); err != nil {
		return fmt.Errorf("rename %s to %s: %w", from, to, err)
	}
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync folder: %w", err)
	}
	return nil
}
