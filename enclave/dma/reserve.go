package dma

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Reserve is memory that is made ready before it is known what for: regions
// without content, seals or readers. It belongs to the process that makes it, and
// nobody else has ever had a descriptor or a map of it. A file takes one of them,
// which gets the file's length and from then on is as New makes them. A nil
// Reserve is empty. Its methods are called by one goroutine at a time.
type Reserve struct{ spares []*Region }

// NewReserve makes a region of each of sizes, in bytes, on memory node number
// near-1 as far as there is room; 0: anywhere. Pages come with Prefault.
func NewReserve(name string, sizes []int64, near int) (*Reserve, error) {
	s := &Reserve{}
	for _, n := range sizes {
		if n <= 0 {
			return nil, errors.Join(fmt.Errorf("reserve: region of %d bytes", n), s.Close())
		}
		r, err := unsealed(name, n)
		if err != nil {
			return nil, errors.Join(err, s.Close())
		}
		s.spares = append(s.spares, r)
		if near > 0 {
			// A hint, as in Pool.
			_ = r.prefer(near - 1)
		}
	}
	return s, nil
}

// Prefault has workers fault in all pages, until all are there or ctx ends.
func (s *Reserve) Prefault(ctx context.Context, workers int) error {
	for _, r := range s.spares {
		if err := r.Prefault(ctx, workers); err != nil {
			return err
		}
	}
	return nil
}

// take returns the region that is nearest to size, the larger of two, with this
// length and sealed. It is nil if there is none, if every one is more than twice as large, for cutting it
// gives up more than it brings, or if one cannot be made so: it is given up then.
func (s *Reserve) take(size int64) *Region {
	if s == nil {
		return nil
	}
	var r *Region
	for _, o := range s.spares {
		d := distance(o, size)
		if o.size/2 <= size && (r == nil || d < distance(r, size) || d == distance(r, size) && o.size > r.size) {
			r = o
		}
	}
	if r == nil {
		return nil
	}
	s.spares = slices.DeleteFunc(s.spares, func(o *Region) bool { return o == r })
	if r.resize(size) != nil || r.seal() != nil {
		_ = r.Close()
		return nil
	}
	return r
}

func distance(r *Region, size int64) int64 { return max(r.size-size, size-r.size) }

// Close gives back what nobody took.
func (s *Reserve) Close() error {
	if s == nil {
		return nil
	}
	var err error
	for _, r := range s.spares {
		err = errors.Join(err, r.Close())
	}
	s.spares = nil
	return err
}

// resize changes the length of a region that is not sealed. What is cut off goes
// back to the kernel; what is added are new pages, which are not there yet.
func (r *Region) resize(size int64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if size == r.size {
		return nil
	}
	if size <= 0 || int64(int(size)) != size {
		return fmt.Errorf("region of %d bytes", size)
	}
	if err := unix.Ftruncate(int(r.alloc.Fd()), size); err != nil {
		return fmt.Errorf("size region: %w", err)
	}
	// The lock and the advice go with the map.
	mem, err := unix.Mremap(r.mem, int(size), unix.MREMAP_MAYMOVE)
	if err != nil {
		return fmt.Errorf("map region: %w", err)
	}
	in := make([]atomic.Bool, pieces(size))
	for i := range in {
		// The last piece of the shorter one may have been a part of a piece.
		whole := int64(i+1)*piece <= r.size || size <= r.size
		in[i].Store(whole && r.in[i].Load())
	}
	r.mem, r.in, r.size = mem, in, size
	r.allocated.Store(min(r.allocated.Load(), size))
	return nil
}
