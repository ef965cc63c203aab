package dma

import (
	"errors"
	"fmt"
	"math/bits"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// MinBlock and MaxBlock bound the size of a block. Sizes are powers of two.
	MinBlock = 64 << 10
	MaxBlock = 16 << 20
)

// ErrFull means that a pool's bound is reached.
var ErrFull = errors.New("memory bound is reached")

// Blocks hands out blocks of anonymous locked memory, zeroed, up to a bound.
type Blocks struct {
	mu    sync.Mutex
	limit int64
	// used counts bytes handed out, held those mapped.
	used, held int64
	free       map[int][][]byte
	closed     bool
}

// NewBlocks returns a pool that hands out at most limit bytes.
func NewBlocks(limit int64) *Blocks {
	return &Blocks{limit: limit, free: map[int][][]byte{}}
}

// BlockSize is the size of the smallest block that holds n bytes.
func BlockSize(n int) int {
	if n <= MinBlock {
		return MinBlock
	}
	return 1 << bits.Len(uint(n-1))
}

// Get returns a zeroed block of BlockSize(n) bytes.
func (p *Blocks) Get(n int) ([]byte, error) {
	if n < 0 || n > MaxBlock {
		return nil, fmt.Errorf("block of %d bytes: at most %d", n, MaxBlock)
	}
	size := BlockSize(n)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, ErrClosed
	}
	if p.used+int64(size) > p.limit {
		return nil, ErrFull
	}
	if l := p.free[size]; len(l) > 0 {
		b := l[len(l)-1]
		p.free[size] = l[:len(l)-1]
		p.used += int64(size)
		return b, nil
	}
	// What is kept for reuse in other sizes counts against the bound as well.
	if p.held+int64(size) > p.limit {
		if err := p.release(); err != nil {
			return nil, err
		}
	}
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map block: %w", err)
	}
	if err := errors.Join(unix.Madvise(b, unix.MADV_DONTDUMP), unix.Mlock(b)); err != nil {
		_ = unix.Munmap(b)
		return nil, fmt.Errorf("lock block: %w", err)
	}
	p.used += int64(size)
	p.held += int64(size)
	return b, nil
}

// Put zeroes a block and takes it back.
func (p *Blocks) Put(b []byte) error {
	clear(b)
	if !allZero(b) {
		return errors.New("block is not zero after it was scrubbed")
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.used -= int64(len(b))
	if p.closed {
		p.held -= int64(len(b))
		return unix.Munmap(b)
	}
	p.free[len(b)] = append(p.free[len(b)], b)
	return nil
}

// Used is what is handed out, in bytes.
func (p *Blocks) Used() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.used
}

// Limit is the bound, in bytes.
func (p *Blocks) Limit() int64 { return p.limit }

// Close gives free blocks back to the kernel; others follow as they are put back.
func (p *Blocks) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	return p.release()
}

func (p *Blocks) release() error {
	var err error
	for size, l := range p.free {
		for _, b := range l {
			err = errors.Join(err, unix.Munmap(b))
			p.held -= int64(size)
		}
		delete(p.free, size)
	}
	return err
}
