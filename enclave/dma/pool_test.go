package dma

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

func fill(t *testing.T, r *Region, with byte) {
	t.Helper()
	zero, content := make([]byte, 1<<20), bytes.Repeat([]byte{with}, 1<<20)
	err := r.Fill(t.Context(), len(content), 2, func() func(int64, []byte) error {
		return func(_ int64, dst []byte) error {
			if !bytes.Equal(dst, zero[:len(dst)]) {
				t.Error("a region that is filled is not zero")
			}
			copy(dst, content)
			return nil
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestRegionsComeBack(t *testing.T) {
	const size = 6<<20 + 5
	p := NewPool(2 * size)
	a, err := p.Get("a", size)
	if err != nil {
		t.Fatal(err)
	}
	fill(t, a, 1)
	if err := p.Put(a); err != nil {
		t.Fatal(err)
	}
	b, err := p.Get("b", size)
	if err != nil || a != b {
		t.Fatalf("another region than the one that came back: %v", err)
	}
	if b.scrubbed.Load() || !b.in[3].Load() {
		t.Error("the region came back without its pages, or shut")
	}
	fill(t, b, 2)
	got := make([]byte, size)
	if _, err := b.ReadAt(got, 0); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{2}, size)) {
		t.Errorf("content: %v", err)
	}
	if p.Held() != size {
		t.Errorf("%d bytes are held", p.Held())
	}
	if _, err := p.Get("c", size+1); !errors.Is(err, ErrFull) || !p.Fits(size+1) {
		t.Errorf("beyond the bound: %v", err)
	}
	// A region of another size takes the place of a free one.
	if err := p.Put(b); err != nil {
		t.Fatal(err)
	}
	c, err := p.Get("c", 2*size)
	if err != nil || p.Held() != 2*size {
		t.Fatalf("%v, %d bytes held", err, p.Held())
	}
	if err := b.Fill(context.Background(), 1<<20, 1, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("a region that was given up: %v", err)
	}
	fill(t, c, 3)
	fd := roFD(t, c)
	if err := p.Close(); err != nil || p.Held() != 0 {
		t.Errorf("%v, %d bytes held", err, p.Held())
	}
	b1 := make([]byte, 1)
	if _, err := unix.Pread(fd, b1, 100); err != nil || b1[0] != 0 {
		t.Errorf("a closed pool's region reads %v, %v", b1, err)
	}
	if _, err := p.Get("d", 1); !errors.Is(err, ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

// What someone else has open or mapped does not change under their feet.
func TestSharedRegionIsNotTaken(t *testing.T) {
	const size = 2 << 20
	p := NewPool(0)
	r, err := p.Get("r", size)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	fill(t, r, 7)
	fd, err := r.ReadOnlyFD()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Put(r); !errors.Is(err, ErrShared) {
		t.Errorf("while it is open: %v", err)
	}
	m, err := unix.Mmap(fd, 0, size, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	dup, err := unix.Dup(fd)
	if err != nil {
		t.Fatal(err)
	}
	_ = unix.Close(fd)
	if err := p.Put(r); !errors.Is(err, ErrShared) {
		t.Errorf("while it is mapped and duplicated: %v", err)
	}
	_ = unix.Close(dup)
	if err := p.Put(r); !errors.Is(err, ErrShared) {
		t.Errorf("while it is mapped: %v", err)
	}
	if m[size-1] != 7 {
		t.Error("the region changed")
	}
	if _, err := r.ReadAt(make([]byte, 1), 0); err != nil {
		t.Errorf("a region that could not be taken is shut: %v", err)
	}
	if err := unix.Munmap(m); err != nil {
		t.Fatal(err)
	}
	if err := p.Put(r); err != nil {
		t.Errorf("alone: %v", err)
	}
}

func TestPrefault(t *testing.T) {
	r, err := New("test", 40<<20+1)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Prefault(ctx, 2); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	began := make(chan struct{})
	go func() {
		close(began)
		if err := r.Prefault(t.Context(), 2); err != nil {
			t.Error(err)
		}
	}()
	<-began
	fill(t, r, 9)
	for i := range r.in {
		if !r.in[i].Load() {
			t.Fatalf("piece %d is not there", i)
		}
	}
	if err := r.Scrub(); err != nil {
		t.Fatal(err)
	}
	if err := r.Prefault(t.Context(), 1); !errors.Is(err, ErrClosed) {
		t.Errorf("scrubbed: %v", err)
	}
}
