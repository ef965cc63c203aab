package hold

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/coffer-run/coffer/enclave/dma"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/enclave/seal"
)

// demand serves inputs that are larger than the memory given for them. A file is
// decrypted into a region when it is opened, for which regions that nobody has
// open are scrubbed and reused, the least recently opened first. A file for which
// there is no room is decrypted chunk by chunk, as it is read.
type demand struct {
	pool *dma.Pool
	// use says whether keys may be used.
	use         func() error
	cache       *chunkCache
	passthrough bool
	// ending is over with the job: nothing opens or reads after that.
	ending context.Context
	log    *slog.Logger
	files  []*demandFile
	// clock orders opens.
	clock atomic.Int64
}

// demandFile is one file. Locks, in order: mu of the file that is opened, mu of
// one that gives way, for which nobody waits.
type demandFile struct {
	d      *demand
	input  string
	folder *seal.Folder
	key    *keys.DataKey
	entry  seal.Entry
	opened atomic.Int64

	// mu is held while the file is decrypted into its region, and guards what
	// follows.
	mu     sync.Mutex
	region *dma.Region
	// users are the open handles on region, readers those on sealed.
	users, readers int
	sealed         *seal.OpenedFile
}

func (d *demand) add(in *heldInput, key *keys.DataKey, e seal.Entry) *demandFile {
	f := &demandFile{d: d, input: in.Name, folder: in.folder, key: key, entry: e}
	d.files = append(d.files, f)
	return f
}

// close waits for decryption under way and scrubs the cache. Regions are the
// pool's to scrub.
func (d *demand) close() error {
	for _, f := range d.files {
		// Whoever has the lock fills a region, and stops at its next chunk.
		f.mu.Lock()
		f.mu.Unlock() //nolint:staticcheck // nothing to do but wait
	}
	return d.cache.close()
}

// error keeps the file's name, which is secret, out of what people read.
func (f *demandFile) error(err error) error {
	return fmt.Errorf("input %s: file %s: %w", f.input, f.entry.ID, err)
}

func (f *demandFile) size() int64 { return f.entry.Size }

func (f *demandFile) open(<-chan struct{}) (source, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.d.ending.Err() != nil {
		return nil, errOver
	}
	f.opened.Store(f.d.clock.Add(1))
	// While handles read it by chunks it stays that way: the kernel does not let
	// one file be both mapped through its own pages and passed through.
	if f.region == nil && f.readers == 0 {
		r, err := f.d.room(f)
		if err != nil {
			return nil, f.error(err)
		}
		if r != nil {
			if err := f.fill(r); err != nil {
				return nil, f.error(errors.Join(err, f.d.pool.Put(r)))
			}
			f.region = r
		}
	}
	if f.region == nil {
		s, err := f.openChunks()
		if err != nil {
			return nil, f.error(err)
		}
		return s, nil
	}
	s, err := openRegion(f.region, f.d.passthrough)
	if err != nil {
		return nil, f.error(err)
	}
	f.users++
	return &placedSource{regionSource: s, f: f}, nil
}

// room returns a region for f, or nil if there is none to be had.
func (d *demand) room(f *demandFile) (*dma.Region, error) {
	for {
		r, err := d.pool.Get(regionName, f.entry.Size)
		if err == nil {
			return r, nil
		}
		if !errors.Is(err, dma.ErrFull) {
			return nil, err
		}
		if !d.pool.Fits(f.entry.Size) || !d.evict() {
			return nil, nil
		}
	}
}

// evict scrubs the region that was opened least recently among those that nobody
// uses, and says whether there was one. A file that is being decrypted is passed
// over, and so is one whose memory someone still maps though it is closed.
func (d *demand) evict() bool {
	idle := slices.Clone(d.files)
	slices.SortFunc(idle, func(a, b *demandFile) int { return cmp.Compare(a.opened.Load(), b.opened.Load()) })
	for _, f := range idle {
		if f.opened.Load() == 0 || !f.mu.TryLock() {
			continue
		}
		done := false
		if f.region != nil && f.users == 0 {
			err := d.pool.Put(f.region)
			if done = !errors.Is(err, dma.ErrShared); done {
				f.region = nil
				if err != nil {
					d.log.Error("evicted region", "error", err)
				}
			}
		}
		f.mu.Unlock()
		if done {
			return true
		}
	}
	return false
}

func (f *demandFile) fill(r *dma.Region) error {
	if err := f.d.use(); err != nil {
		return err
	}
	o, err := f.folder.Open(f.key, f.entry)
	if err != nil {
		return err
	}
	defer o.Close()
	return fillRegion(f.d.ending, f.d.use, o, r)
}

// placedSource is a handle on a file that has a region.
type placedSource struct {
	*regionSource
	f *demandFile
}

func (s *placedSource) close() {
	s.regionSource.close()
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	s.f.users--
}

// hold is a second close away from closing the source, and fails where it would
// have to wait.
func (s *chunkSource) hold() bool {
	if !s.f.mu.TryLock() {
		return false
	}
	defer s.f.mu.Unlock()
	s.f.readers++
	return true
}

// chunkSource is a handle on a file that has none.
type chunkSource struct {
	f *demandFile
	o *seal.OpenedFile
	// next is the chunk after the one read last.
	next atomic.Int64
}

// openChunks is called with f.mu held.
func (f *demandFile) openChunks() (source, error) {
	if f.readers == 0 {
		if err := f.d.use(); err != nil {
			return nil, err
		}
		o, err := f.folder.Open(f.key, f.entry)
		if err != nil {
			return nil, err
		}
		o.Map()
		f.sealed = o
		go f.giveWay(o)
	}
	f.readers++
	return &chunkSource{f: f, o: f.sealed}, nil
}

// yieldEvery is how long a writer of a sealed file waits for the lease that the
// map takes, while nobody reads.
const yieldEvery = 100 * time.Millisecond

// giveWay looks between reads whether a writer waits for o, until o is closed.
func (f *demandFile) giveWay(o *seal.OpenedFile) {
	for range time.Tick(yieldEvery) {
		f.mu.Lock()
		if f.sealed != o {
			f.mu.Unlock()
			return
		}
		o.Yield()
		f.mu.Unlock()
	}
}

func (s *chunkSource) close() {
	f := s.f
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.readers--; f.readers == 0 {
		_ = f.sealed.Close()
		f.sealed = nil
	}
}

func (*chunkSource) fd() int { return -1 }

func (s *chunkSource) read(dest []byte, off int64) (fuse.ReadResult, error) {
	size := int64(s.o.ChunkSize())
	n := int(min(int64(len(dest)), s.f.entry.Size-off))
	for done := 0; ; {
		i := (off + int64(done)) / size
		// Who reads on from where it stopped gets the chunks after as well.
		if next := s.next.Swap(i + 1); i == next || i == next-1 {
			s.f.d.cache.ahead(s, i+1)
		}
		b, err := s.f.d.cache.get(s, i)
		if err != nil {
			return nil, s.f.error(err)
		}
		in := int(off + int64(done) - i*size)
		if done == 0 && in+n <= len(b.data) {
			// What lies in one chunk goes out from where it is.
			return &chunkResult{b: b, data: b.data[in : in+n]}, nil
		}
		done += copy(dest[done:n], b.data[in:])
		s.f.d.cache.unref(b)
		if done == n {
			return fuse.ReadResultData(dest[:n]), nil
		}
	}
}

// chunkResult keeps a chunk in memory until the kernel has taken it.
type chunkResult struct {
	b    *chunk
	data []byte
}

// Slices is what makes go-fuse call Done after the reply is written. Of a result that has
// only Bytes it would do so before, and the chunk could be another by then.
func (r *chunkResult) Slices() ([][]byte, fuse.Status) { return [][]byte{r.data}, fuse.OK }

func (r *chunkResult) Bytes([]byte) ([]byte, fuse.Status) { return r.data, fuse.OK }
func (r *chunkResult) Size() int                          { return len(r.data) }
func (r *chunkResult) Done()                              { r.b.cache.unref(r.b) }
