package dma

import (
	"errors"
	"slices"
	"sync"
)

// Pool makes regions up to a bound and keeps those that come back, scrubbed and
// with their pages, for files of the same size: a region cannot change its size
// once it is sealed, and readers must see no more than the file.
//
// A pool belongs to one process, and the process that holds a job's plaintext is
// that job's alone. A pool for a whole node would need a process that outlives
// jobs, which lends regions out with their only writable map, and which a job has
// to trust with its plaintext. What can be made ready before there is a job is a
// Reserve, by the process that becomes its holder.
type Pool struct {
	mu sync.Mutex
	// limit bounds held; none if zero or less.
	limit int64
	// held counts the bytes of live, which has all regions, free ones included.
	held   int64
	live   map[*Region]bool
	free   map[int64][]*Region
	near   int
	closed bool
}

// NewPool returns a pool that holds at most limit bytes, or any number if limit
// is zero.
func NewPool(limit int64) *Pool {
	return &Pool{limit: limit, live: map[*Region]bool{}, free: map[int64][]*Region{}}
}

// Near has regions that are made from then on lie on memory node number node-1, as
// far as there is room; 0: anywhere.
func (p *Pool) Near(node int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.near = node
}

// Get returns a region of size bytes that holds zeros. ErrFull means that the
// bound leaves no room even after every free region is given up.
func (p *Pool) Get(name string, size int64) (*Region, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, ErrClosed
	}
	if l := p.free[size]; len(l) > 0 {
		r := l[len(l)-1]
		p.free[size] = l[:len(l)-1]
		return r, nil
	}
	if err := p.room(size); err != nil {
		return nil, err
	}
	r, err := New(name, size)
	if err != nil {
		return nil, err
	}
	if p.near > 0 {
		// A hint: on a machine without this node pages come from any.
		_ = r.prefer(p.near - 1)
	}
	p.live[r] = true
	p.held += size
	return r, nil
}

// Take returns a region of size bytes out of a reserve, or nil if it has none that
// suits or the bound leaves no room.
func (p *Pool) Take(s *Reserve, size int64) *Region {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.room(size) != nil {
		return nil
	}
	r := s.take(size)
	if r != nil {
		p.live[r] = true
		p.held += size
	}
	return r
}

// room gives free regions up until size bytes fit. p.mu is held.
func (p *Pool) room(size int64) error {
	if p.limit > 0 {
		if size > p.limit {
			return ErrFull
		}
		for s, l := range p.free {
			for len(l) > 0 && p.held+size > p.limit {
				r := l[len(l)-1]
				l = l[:len(l)-1]
				p.free[s] = l
				if err := p.drop(r); err != nil {
					return err
				}
			}
		}
		if p.held+size > p.limit {
			return ErrFull
		}
	}
	return nil
}

// Put scrubs a region and takes it back. ErrShared means that it cannot be taken
// yet, and that nothing happened to it.
func (p *Pool) Put(r *Region) error {
	err := r.Recycle()
	if errors.Is(err, ErrShared) {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil || p.closed {
		return errors.Join(err, p.drop(r))
	}
	p.free[r.size] = append(p.free[r.size], r)
	return nil
}

// Fits says whether a region of size bytes has room when there is no other.
func (p *Pool) Fits(size int64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.limit <= 0 || size <= p.limit
}

// Reserve takes n bytes of the bound for another use. What is left of it may be
// nothing.
func (p *Pool) Reserve(n int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.limit = max(p.limit-n, 1)
}

// Scrub zeroes every region. None of them can be filled or read again.
func (p *Pool) Scrub() error {
	p.mu.Lock()
	all := make([]*Region, 0, len(p.live))
	for r := range p.live {
		all = append(all, r)
	}
	clear(p.free)
	p.mu.Unlock()
	var err error
	for _, r := range all {
		err = errors.Join(err, r.Scrub())
	}
	return err
}

// Held is what all regions are, in bytes.
func (p *Pool) Held() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.held
}

// Close scrubs every region and gives it back to the kernel.
func (p *Pool) Close() error {
	err := p.Scrub()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for r := range p.live {
		err = errors.Join(err, p.drop(r))
	}
	return err
}

// drop gives a region up. p.mu is held.
func (p *Pool) drop(r *Region) error {
	if !p.live[r] {
		return nil
	}
	delete(p.live, r)
	p.held -= r.size
	p.free[r.size] = slices.DeleteFunc(p.free[r.size], func(o *Region) bool { return o == r })
	return r.Close()
}
