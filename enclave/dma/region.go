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
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// piece is what is faulted in at a time, in bytes. A region below allocAhead is
// not worth a descriptor for allocating its pages ahead of their use.
const (
	piece      = 1 << 20
	allocAhead = 4 << 20
	allocPiece = 16 << 20
)

// Region is one memfd with the only writable map of it. Its methods may be
// called by many goroutines at once.
type Region struct {
	size int64
	// ro is the descriptor reopened for reading only.
	ro *os.File
	// mu guards mem and alloc: held for reading while they are used, for writing
	// when they go.
	mu  sync.RWMutex
	mem []byte
	// alloc is the first descriptor, which the seals keep from writing: it only
	// has the kernel allocate pages. nil once there are all.
	alloc *os.File
	// allocated is where the next allocation begins; in says of each piece
	// whether its pages are there.
	allocated atomic.Int64
	in        []atomic.Bool
	// scrubbed is set once mem was zeroed and read back.
	scrubbed atomic.Bool
}

var (
	// ErrClosed means that a region is gone.
	ErrClosed = errors.New("region is closed")
	// ErrShared means that someone else still has a region open or mapped.
	ErrShared = errors.New("region is in use")
)

// New makes a region of size bytes: mapped, every page locked from the moment it
// is there, kept out of core dumps, and sealed against every other writer. It is
// an error if memory cannot be locked, for plaintext must not be swapped out.
// Pages come with Prefault, or as Fill reaches them.
func New(name string, size int64) (*Region, error) {
	r, err := unsealed(name, size)
	if err != nil {
		return nil, err
	}
	if err := r.seal(); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// unsealed makes a region that is all that New says but sealed: its length can
// still change, and nobody can read it.
func unsealed(name string, size int64) (_ *Region, err error) {
	if size < 0 || int64(int(size)) != size {
		return nil, fmt.Errorf("region of %d bytes", size)
	}
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("create region: %w", err)
	}
	first := os.NewFile(uintptr(fd), name)
	if err := unix.Ftruncate(fd, size); err != nil {
		_ = first.Close()
		return nil, fmt.Errorf("size region: %w", err)
	}
	r := &Region{size: size, alloc: first, in: make([]atomic.Bool, pieces(size))}
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
		if err := lockOnFault(r.mem); err != nil {
			return nil, fmt.Errorf("lock region of %d bytes (is RLIMIT_MEMLOCK too small?): %w", size, err)
		}
	}
	return r, nil
}

// seal keeps the region's length, and everyone but its one map from writing. It
// can be read from then on.
func (r *Region) seal() error {
	// F_SEAL_WRITE would need this map gone, and then nobody could scrub.
	if _, err := unix.FcntlInt(r.alloc.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_FUTURE_WRITE|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		return fmt.Errorf("seal region: %w", err)
	}
	var err error
	if r.ro, err = reopen(r.alloc); err != nil {
		return err
	}
	if r.size >= allocAhead {
		return nil
	}
	err = r.alloc.Close()
	r.alloc = nil
	if err != nil {
		return fmt.Errorf("close region: %w", err)
	}
	return nil
}

// pieces is how many pieces a region of size bytes has.
func pieces(size int64) int64 { return (size + piece - 1) / piece }

func reopen(f *os.File) (*os.File, error) {
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("reopen region for reading: %w", err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// lockOnFault locks pages as they appear: locking them all at once afterwards
// goes through every page again.
func lockOnFault(mem []byte) error {
	_, _, e := unix.Syscall(unix.SYS_MLOCK2, uintptr(unsafe.Pointer(unsafe.SliceData(mem))), uintptr(len(mem)), unix.MLOCK_ONFAULT) // #nosec G103 -- the address of a map
	if e != 0 {
		return e
	}
	return nil
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
	// Opened, not duplicated: the kernel counts opens, and Recycle asks it.
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", r.ro.Fd()), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("reopen region for reading: %w", err)
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
	if err := r.fill(ctx, chunkSize, workers, open); err != nil {
		return err
	}
	// All pages are there: the descriptor that allocates them has done its work.
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.alloc == nil {
		return nil
	}
	err := r.alloc.Close()
	r.alloc = nil
	return err
}

func (r *Region) fill(ctx context.Context, chunkSize, workers int, open func() func(i int64, dst []byte) error) error {
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
	ahead := r.allocateAhead(ctx)
	defer ahead()
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
				if err := r.populate(at, end); err != nil {
					cancel(err)
					return
				}
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

// Prefault has workers fault in the pages that are not there yet, until all are
// or ctx ends. Fill may run at the same time.
func (r *Region) Prefault(ctx context.Context, workers int) error {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if r.size > 0 && r.mem == nil || r.scrubbed.Load() {
		return ErrClosed
	}
	if workers <= 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	ahead := r.allocateAhead(ctx)
	defer ahead()
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(workers, len(r.in)) {
		wg.Go(func() {
			for ctx.Err() == nil {
				at := next.Add(piece) - piece
				if at >= r.size {
					return
				}
				if err := r.populate(at, min(at+piece, r.size)); err != nil {
					cancel(err)
					return
				}
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

// populate faults in the pieces that have bytes from at to end. r.mu is held for
// reading.
func (r *Region) populate(at, end int64) error {
	for i := at / piece; i*piece < end; i++ {
		if r.in[i].Load() {
			continue
		}
		// EINVAL: a kernel before 5.14. Pages then come as they are written.
		if err := unix.Madvise(r.mem[i*piece:min((i+1)*piece, r.size)], unix.MADV_POPULATE_WRITE); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("fault in region (is the memory limit too small?): %w", err)
		}
		r.in[i].Store(true)
	}
	return nil
}

// allocateAhead has the kernel allocate pages ahead of those that fault them in,
// which makes a fault cheaper by a fifth. It is one goroutine, for the kernel
// lets only one in, and nobody waits for it. The function it returns ends it.
// r.mu is held for reading until then.
func (r *Region) allocateAhead(ctx context.Context) (end func()) {
	if r.alloc == nil || r.allocated.Load() >= r.size {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			at := r.allocated.Add(allocPiece) - allocPiece
			if at >= r.size || unix.Fallocate(int(r.alloc.Fd()), 0, at, min(allocPiece, r.size-at)) != nil {
				return
			}
		}
	}()
	return func() {
		cancel()
		<-done
	}
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
	// Where no page was faulted in nothing was written.
	for i := range r.in {
		if r.in[i].Load() {
			clear(r.mem[i*piece : min(int64(i+1)*piece, r.size)])
		}
	}
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

// Recycle scrubs the region and makes it ready to be filled again, with its
// pages. It is an error, ErrShared, and nothing happens, while anyone else has
// the region open or mapped: they would see other content under their feet.
func (r *Region) Recycle() error {
	if err := r.unshared(); err != nil {
		return err
	}
	if err := r.Scrub(); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.size > 0 && r.mem == nil {
		return ErrClosed
	}
	r.scrubbed.Store(false)
	return nil
}

// unshared asks the kernel whether r.ro is the only open file of the region: a
// write lease (fcntl(2), F_SETLEASE) is given only then. A map holds the file it
// was made from open. A kernel that gives no leases here leaves regions unused.
func (r *Region) unshared() error {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if r.ro == nil {
		return ErrClosed
	}
	if _, err := unix.FcntlInt(r.ro.Fd(), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
		return fmt.Errorf("%w: %w", ErrShared, err)
	}
	if _, err := unix.FcntlInt(r.ro.Fd(), unix.F_SETLEASE, unix.F_UNLCK); err != nil {
		return fmt.Errorf("give back lease of region: %w", err)
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
	if r.alloc != nil {
		err = errors.Join(err, r.alloc.Close())
		r.alloc = nil
	}
	if r.ro != nil {
		cerr := r.ro.Close()
		if !errors.Is(cerr, os.ErrClosed) {
			err = errors.Join(err, cerr)
		}
	}
	return err
}

// HugePages is what the kernel is set to do with MADV_HUGEPAGE on regions: one of
// the words of shmem_enabled, empty if it does not say. hugetlbfs is not used: its
// files are whole huge pages long, and a reader must find the end of the file
// where it is and be able to map any page.
func HugePages() string {
	b, err := os.ReadFile("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
	if err != nil {
		return ""
	}
	_, after, _ := strings.Cut(string(b), "[")
	word, _, _ := strings.Cut(after, "]")
	return word
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
