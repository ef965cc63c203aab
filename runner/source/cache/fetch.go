package cache

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
)

// Bucket is a bucket of an object store.
type Bucket interface {
	// Read opens length bytes of an object from an offset on, or all of it if
	// length is negative. size is that of the whole object, in bytes. An error that
	// another try will not mend MUST match ErrPermanent. Reading ends when ctx does.
	Read(ctx context.Context, object string, off, length int64) (r io.ReadCloser, size int64, err error)
	Close() error
}

// ErrPermanent is in the errors of a Bucket that another try will not mend, such
// as an object that is not there.
var ErrPermanent = errors.New("not tried again")

const (
	// parallel bounds ranges, and files, that are fetched at the same time. Each
	// range holds one chunk in memory, 16 MiB at most.
	parallel = 8
	// lies is how often a file is fetched whole before a wrong digest is final.
	lies = 2
)

// options are limits that tests make small.
type options struct {
	// segment is how much one request asks for, in bytes; at least a chunk.
	segment int64
	// stall is how long a source may send nothing, and slow how long one request
	// may take.
	stall, slow time.Duration
	// tries bounds requests in a row that bring no new chunk. Between them is a
	// pause from first to longest, doubling.
	tries          int
	first, longest time.Duration
	// step is called between changes on disk.
	step func()
}

var defaults = options{
	segment: 16 << 20, stall: 30 * time.Second, slow: 10 * time.Minute,
	tries: 6, first: 250 * time.Millisecond, longest: 15 * time.Second,
}

func (o options) at() {
	if o.step != nil {
		o.step()
	}
}

var (
	errStalled = errors.New("the source sent nothing for too long")
	errSlow    = errors.New("the source is too slow")
)

// diskError is of the node's disk, and no source is asked again because of it.
type diskError struct{ err error }

func (e *diskError) Error() string { return "write to cache: " + e.err.Error() }
func (e *diskError) Unwrap() error { return e.err }

// fetch makes entries/NAME: manifest, room, files, and a rename that makes them
// one.
func (c *Cache) fetch(ctx context.Context, f *flight, name string, digest plan.Digest) (err error) {
	began := time.Now()
	b, err := c.Open(ctx, f.at)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	raw, err := c.fetchManifest(ctx, b, f.at.Object(manifestName))
	if err != nil {
		return err
	}
	m, err := parseManifest(raw, digest)
	if err != nil {
		return fmt.Errorf("%w: %w", err, ErrPermanent)
	}
	if err := c.reserve(ctx, f, name, m.total()+int64(len(raw))); err != nil {
		return err
	}
	data, leaves := c.path(partialDir, name), c.path(partialDir, name+leavesSuffix)
	for _, d := range []string{data, leaves} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return &diskError{err}
		}
		c.o.at()
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	ranges := make(chan struct{}, parallel)
	for _, s := range m.Files {
		g.Go(func() error {
			p := &part{cache: c, bucket: b, file: s, chunk: m.ChunkSize, object: f.at.Object(s.name()), ranges: ranges, got: &f.got}
			return p.fetch(gctx, filepath.Join(data, s.name()), filepath.Join(leaves, s.ID))
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(data, manifestName), raw, 0o600); err != nil {
		return &diskError{err}
	}
	c.o.at()
	if err := c.publish(data, leaves, c.path(entriesDir, name)); err != nil {
		return &diskError{err}
	}
	c.Log.InfoContext(ctx, "fetched sealed folder", slog.String("from", f.at.String()), slog.Int64("bytes", m.total()), slog.Duration("took", time.Since(began)))
	return nil
}

// publish makes a folder whose files are durable an entry.
func (c *Cache) publish(data, leaves, entry string) error {
	for _, path := range []string{filepath.Join(data, manifestName), data} {
		if err := syncPath(path); err != nil {
			return err
		}
		c.o.at()
	}
	c.mu.Lock()
	err := os.Rename(data, entry)
	c.mu.Unlock()
	if err != nil {
		return err
	}
	c.o.at()
	if err := syncPath(filepath.Dir(entry)); err != nil {
		return err
	}
	c.o.at()
	return os.RemoveAll(leaves)
}

func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

func (c *Cache) fetchManifest(ctx context.Context, b Bucket, object string) (out []byte, err error) {
	err = c.retry(ctx, object, func(ctx context.Context, alive func()) (bool, error) {
		r, size, err := b.Read(ctx, object, 0, -1)
		if err != nil {
			return false, err
		}
		defer r.Close()
		if size > maxManifest {
			return false, fmt.Errorf("%d bytes, at most %d are allowed: %w", size, maxManifest, ErrPermanent)
		}
		out, err = io.ReadAll(io.LimitReader(liveReader{r, alive}, maxManifest+1))
		if err == nil && int64(len(out)) != size {
			err = fmt.Errorf("%d bytes came of %d", len(out), size)
		}
		return false, err
	})
	return out, err
}

// retry calls once until it succeeds, fails for good, or fails too often in a row
// without progress. once calls alive whenever the source shows life.
func (c *Cache) retry(ctx context.Context, what string, once func(ctx context.Context, alive func()) (progress bool, err error)) error {
	pause := c.o.first
	for try := 1; ; try++ {
		progress, err := c.once(ctx, once)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if progress {
			try, pause = 1, c.o.first
		}
		var disk *diskError
		if errors.Is(err, ErrPermanent) || errors.As(err, &disk) {
			return fmt.Errorf("%s: %w", what, err)
		}
		if try >= c.o.tries {
			return fmt.Errorf("%s: given up after %d tries: %w", what, try, err)
		}
		c.Log.WarnContext(ctx, "trying again", slog.String("object", what), slog.Any("error", err), slog.Int("try", try))
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		// Nodes that failed together should not come back together.
		case <-time.After(pause/2 + rand.N(pause/2+1)): // #nosec G404 -- no secret hangs on it
		}
		pause = min(2*pause, c.o.longest)
	}
}

func (c *Cache) once(ctx context.Context, call func(ctx context.Context, alive func()) (bool, error)) (bool, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	ctx, stop := context.WithTimeoutCause(ctx, c.o.slow, errSlow)
	defer stop()
	silence := time.AfterFunc(c.o.stall, func() { cancel(errStalled) })
	defer silence.Stop()
	progress, err := call(ctx, func() { silence.Reset(c.o.stall) })
	if cause := context.Cause(ctx); err != nil && cause != nil {
		err = cause
	}
	return progress, err
}

// liveReader reports every arrival of bytes.
type liveReader struct {
	r     io.Reader
	alive func()
}

func (l liveReader) Read(b []byte) (int, error) {
	n, err := l.r.Read(b)
	if n > 0 {
		l.alive()
	}
	return n, err
}

// part is one sealed file on its way.
type part struct {
	cache  *Cache
	bucket Bucket
	file   sealedFile
	chunk  int
	object string
	ranges chan struct{}
	got    *atomic.Int64 // of the flight

	data, log *os.File
	// leaves are zero where the chunk is still to come. A leaf is in the log when
	// its chunk is in the file; neither is synced until the end, for nothing of a
	// partial file is believed without hashing it again.
	leaves []leaf
}

// fetch completes the file at a path. logPath keeps the leaves between agents.
func (p *part) fetch(ctx context.Context, path, logPath string) (err error) {
	if err := p.open(path, logPath); err != nil {
		return &diskError{err}
	}
	defer func() { err = errors.Join(err, p.data.Close(), p.log.Close()) }()
	if err := p.resume(ctx); err != nil {
		return err
	}
	for try := 1; ; try++ {
		if err := p.fill(ctx); err != nil {
			return err
		}
		got := merkleRoot(p.leaves)
		if got == p.file.Root {
			break
		}
		// Which chunk is wrong, the root does not say.
		p.forget()
		if err := p.log.Truncate(0); err != nil {
			return &diskError{err}
		}
		p.cache.o.at()
		if try == lies {
			return fmt.Errorf("%s: its content has the Merkle root %s, the manifest says %s: the source is damaged or lies: %w", p.object, got, p.file.Root, ErrPermanent)
		}
		p.cache.Log.WarnContext(ctx, "fetching again what has the wrong digest", slog.String("object", p.object))
	}
	if err := p.data.Sync(); err != nil {
		return &diskError{err}
	}
	p.cache.o.at()
	return nil
}

func (p *part) forget() { p.forgetRange(0, len(p.leaves)-1) }

func (p *part) open(path, logPath string) (err error) {
	if p.data, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return err
	}
	p.cache.o.at()
	if p.log, err = os.OpenFile(logPath, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return errors.Join(err, p.data.Close())
	}
	p.cache.o.at()
	// A disk that is too small says so before anything is fetched.
	err = unix.Fallocate(int(p.data.Fd()), 0, 0, p.file.CipherSize)
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = nil
	}
	if err == nil {
		err = p.data.Truncate(p.file.CipherSize)
	}
	p.cache.o.at()
	if err != nil {
		return errors.Join(err, p.data.Close(), p.log.Close())
	}
	return nil
}

// resume believes what the log says of chunks that are in the file and have that
// digest.
func (p *part) resume(ctx context.Context) error {
	p.leaves = make([]leaf, 1+chunksOf(p.file.CipherSize, p.chunk))
	known := make([]byte, len(p.leaves)*sha256.Size)
	// A log that is short or cannot be read knows less.
	n, _ := p.log.ReadAt(known, 0)
	buf := make([]byte, p.chunk+tagSize)
	for i := range p.leaves {
		if (i+1)*sha256.Size > n || ctx.Err() != nil {
			break
		}
		want := leaf(known[i*sha256.Size:])
		if want == (leaf{}) {
			continue
		}
		off, length := p.place(i)
		if _, err := p.data.ReadAt(buf[:length], off); err == nil && leafOf(buf[:length]) == want {
			p.leaves[i] = want
			p.got.Add(length)
		}
	}
	return context.Cause(ctx)
}

func (p *part) place(i int) (off, n int64) { return leafRange(int64(i), p.file.CipherSize, p.chunk) }

// fill fetches every chunk that is missing, several ranges at a time.
func (p *part) fill(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	step := max(1, int(p.cache.o.segment/int64(p.chunk+tagSize)))
	for first := 0; first < len(p.leaves); first += step {
		last := min(first+step, len(p.leaves)) - 1
		if a, _ := p.missing(first, last); a < 0 {
			continue
		}
		select {
		case p.ranges <- struct{}{}:
		case <-gctx.Done():
		}
		if gctx.Err() != nil {
			break
		}
		g.Go(func() error {
			defer func() { <-p.ranges }()
			return p.cache.retry(gctx, p.object, func(ctx context.Context, alive func()) (bool, error) {
				a, z := p.missing(first, last)
				if a < 0 {
					return false, nil
				}
				err := p.read(ctx, a, z, alive)
				b, _ := p.missing(first, last)
				return b != a, err
			})
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return context.Cause(ctx)
}

// missing is the first and the last missing leaf from first to last; a is
// negative if there is none.
func (p *part) missing(first, last int) (a, z int) {
	a = -1
	for i := first; i <= last; i++ {
		if p.leaves[i] == (leaf{}) {
			if a < 0 {
				a = i
			}
			z = i
		}
	}
	return a, z
}

// read fetches the leaves from a to z in one request.
func (p *part) read(ctx context.Context, a, z int, alive func()) error {
	from, _ := p.place(a)
	end, n := p.place(z)
	end += n
	r, size, err := p.bucket.Read(ctx, p.object, from, end-from)
	if err != nil {
		return err
	}
	defer r.Close()
	if size != p.file.CipherSize {
		return fmt.Errorf("the object has %d bytes, the manifest says %d: %w", size, p.file.CipherSize, ErrPermanent)
	}
	live := liveReader{r, alive}
	buf := make([]byte, p.chunk+tagSize)
	for i := a; i <= z; i++ {
		off, n := p.place(i)
		if m, err := io.ReadFull(live, buf[:n]); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("it ended %d bytes early: %w", end-off-int64(m), err)
		}
		if _, err := p.data.WriteAt(buf[:n], off); err != nil {
			return &diskError{err}
		}
		p.cache.o.at()
		l := leafOf(buf[:n])
		if _, err := p.log.WriteAt(l[:], int64(i)*sha256.Size); err != nil {
			return &diskError{err}
		}
		p.cache.o.at()
		if p.leaves[i] == (leaf{}) {
			p.got.Add(n)
		}
		p.leaves[i] = l
	}
	// A store that sends more than it was asked for sends something else.
	if n, err := io.ReadFull(live, buf[:1]); n > 0 {
		p.forgetRange(a, z)
		return errors.New("it sent more bytes than were asked for")
	} else if !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

// forgetRange drops what a request brought. The log may keep it: only the root
// makes a file good.
func (p *part) forgetRange(a, z int) {
	from, _ := p.place(a)
	end, n := p.place(z)
	p.got.Add(from - end - n)
	clear(p.leaves[a : z+1])
}

func readFile(path string) ([]byte, error) {
	st, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxManifest {
		return nil, &fs.PathError{Op: "read manifest", Path: path, Err: errors.New("no file of a manifest's size")}
	}
	return os.ReadFile(path)
}
