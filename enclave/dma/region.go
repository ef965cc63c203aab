// Package dma holds plaintext in memory that never reaches a disk: regions that
// are handed out by read-only descriptor and that only their owner can zero, and
// blocks for data that is still being written.
//
// Trusted: the kernel's memfd seals and memory locks. Checked: that a region is
// locked before it is filled, refuses writers before it is handed out, and reads
// back as zeros when scrubbed. Not checked: what a reader of the descriptor does
// with what it read.
package dma

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Region is one memfd with the only writable map of it. Its methods may be
// called by many goroutines at once.
type Region struct {
	size int64
	// ro is the descriptor reopened for reading only.
	ro *os.File
	// mu guards mem: held for reading while mem is used, for writing when it goes.
	mu  sync.RWMutex
	mem []byte
	// scrubbed is set once mem was zeroed and read back.
	scrubbed atomic.Bool
}

// ErrClosed means that a region is gone.
var ErrClosed = errors.New("region is closed")

// New makes a region of size bytes: mapped, locked, kept out of core dumps, and
// sealed against every other writer. It is an error if memory cannot be locked,
// for plaintext must not be swapped out.
func New(name string, size int64) (_ *Region, err error) {
	if size < 0 || int64(int(size)) != size {
		return nil, fmt.Errorf("region of %d bytes", size)
	}
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("create region: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, size); err != nil {
		return nil, fmt.Errorf("size region: %w", err)
	}
	r := &Region{size: size}
	defer func() {
		if err != nil {
			_ = r.Close()
		}
	}()
	if size > 0 {
		if r.mem, err = unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
			return nil, fmt.Errorf("map region: %w", err)
		}
		// A hint: where shared memory has no huge pages the kernel refuses it.
		_ = unix.Madvise(r.mem, unix.MADV_HUGEPAGE)
		if err := unix.Madvise(r.mem, unix.MADV_DONTDUMP); err != nil {
			return nil, fmt.Errorf("keep region out of core dumps: %w", err)
		}
		prefault(r.mem)
		if err := unix.Mlock(r.mem); err != nil {
			return nil, fmt.Errorf("lock region of %d bytes (is RLIMIT_MEMLOCK or the memory limit too small?): %w", size, err)
		}
	}
	// F_SEAL_WRITE would need this map gone, and then nobody could scrub.
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_FUTURE_WRITE|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		return nil, fmt.Errorf("seal region: %w", err)
	}
	ro, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("reopen region for reading: %w", err)
	}
	r.ro = os.NewFile(uintptr(ro), name)
	return r, nil
}

// Size is in bytes.
func (r *Region) Size() int64 { return r.size }

// ReadOnlyFD returns a new descriptor that cannot write. It is the caller's to
// close, and outlives the region: then it reads zeros.
func (r *Region) ReadOnlyFD() (int, error) {
	// The lock keeps Close away: a number that was given back may be anything.
	r.mu.RLock()
	defer r.mu.RUnlock()
	if r.scrubbed.Load() {
		return -1, ErrClosed
	}
	fd, err := unix.FcntlInt(r.ro.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("duplicate region descriptor: %w", err)
	}
	return fd, nil
}

// ReadAt implements io.ReaderAt. A scrubbed region refuses: its zeros are no content.
func (r *Region) ReadAt(p []byte, off int64) (int, error) {
	if r.scrubbed.Load() {
		return 0, ErrClosed
	}
	return r.ro.ReadAt(p, off)
}

// Fill writes the whole region, chunk by chunk, by several workers. open makes
// one worker's function, which fills dst with chunk i and leaves no plaintext in
// it on an error. After an error the caller scrubs the region.
func (r *Region) Fill(ctx context.Context, chunkSize, workers int, open func() func(i int64, dst []byte) error) error {
	if chunkSize <= 0 {
		return fmt.Errorf("fill region: chunks of %d bytes", chunkSize)
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	if r.size > 0 && r.mem == nil || r.scrubbed.Load() {
		return ErrClosed
	}
	// An empty file still has a chunk that must authenticate.
	chunks := max((r.size+int64(chunkSize)-1)/int64(chunkSize), 1)
	if workers <= 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	workers = int(min(int64(workers), chunks))
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			read := open()
			for {
				i := next.Add(1) - 1
				if i >= chunks || ctx.Err() != nil {
					return
				}
				at := i * int64(chunkSize)
				end := min(at+int64(chunkSize), r.size)
				if err := read(i, r.mem[at:end:end]); err != nil {
					cancel(err)
					return
				}
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

// Scrub zeroes the region through its one writable map and reads it back
// through the read-only descriptor. Readers of that descriptor see zeros from
// then on.
func (r *Region) Scrub() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.size > 0 && r.mem == nil {
		if r.scrubbed.Load() {
			return nil
		}
		return ErrClosed
	}
	r.scrubbed.Store(true)
	clear(r.mem)
	buf := make([]byte, min(r.size, 1<<20))
	for off := int64(0); off < r.size; off += int64(len(buf)) {
		b := buf[:min(int64(len(buf)), r.size-off)]
		if _, err := r.ro.ReadAt(b, off); err != nil {
			r.scrubbed.Store(false)
			return fmt.Errorf("read back scrubbed region: %w", err)
		}
		if !allZero(b) {
			r.scrubbed.Store(false)
			return errors.New("region is not zero after it was scrubbed")
		}
	}
	return nil
}

// Close scrubs the region if it was not, and gives it back to the kernel. Pages
// live on for whoever still holds a descriptor; they hold zeros.
func (r *Region) Close() error {
	var err error
	if r.ro != nil && !r.scrubbed.Load() {
		err = r.Scrub()
		if errors.Is(err, ErrClosed) {
			err = nil
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.mem != nil {
		err = errors.Join(err, unix.Munmap(r.mem))
		r.mem = nil
	}
	if r.ro != nil {
		cerr := r.ro.Close()
		if !errors.Is(cerr, os.ErrClosed) {
			err = errors.Join(err, cerr)
		}
	}
	return err
}

// prefault has several cores fault pages in, which is slower than the cipher. A
// kernel that cannot (before 5.14), or a limit that is reached, shows when the
// pages are locked.
func prefault(mem []byte) {
	const piece = 16 << 20
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), (len(mem)+piece-1)/piece) {
		wg.Go(func() {
			for {
				at := int(next.Add(piece)) - piece
				if at >= len(mem) || unix.Madvise(mem[at:min(at+piece, len(mem))], unix.MADV_POPULATE_WRITE) != nil {
					return
				}
			}
		})
	}
	wg.Wait()
}

func allZero(b []byte) bool {
	var or byte
	for len(b) >= 8 {
		or |= b[0] | b[1] | b[2] | b[3] | b[4] | b[5] | b[6] | b[7]
		b = b[8:]
	}
	for _, c := range b {
		or |= c
	}
	return or == 0
}
