package dma

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func filled(t *testing.T, size int64, chunk int) *Region {
	t.Helper()
	r, err := New("test", size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	err = r.Fill(t.Context(), chunk, 3, func() func(int64, []byte) error {
		return func(i int64, dst []byte) error {
			for j := range dst {
				dst[j] = byte(i + 1)
			}
			return nil
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func roFD(t *testing.T, r *Region) int {
	t.Helper()
	fd, err := r.ReadOnlyFD()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

func TestRegionHoldsWhatWasFilled(t *testing.T) {
	for _, size := range []int64{0, 1, 4096, 10_000, 1 << 20} {
		r := filled(t, size, 4096)
		b, err := io.ReadAll(io.NewSectionReader(r, 0, 1<<30))
		if err != nil || int64(len(b)) != size {
			t.Fatalf("size %d: read %d, %v", size, len(b), err)
		}
		for i, c := range b {
			if c != byte(i/4096+1) {
				t.Fatalf("size %d: byte %d is %d", size, i, c)
			}
		}
	}
}

func TestRegionRefusesWriters(t *testing.T) {
	r := filled(t, 8192, 4096)
	ro := roFD(t, r)
	path := fmt.Sprintf("/proc/self/fd/%d", ro)
	for name, write := range map[string]func() error{
		"pwrite":    func() error { _, err := unix.Pwrite(ro, []byte("x"), 0); return err },
		"ftruncate": func() error { return unix.Ftruncate(ro, 0) },
		"truncate":  func() error { return os.Truncate(path, 0) },
		"grow":      func() error { return os.Truncate(path, 1<<20) },
		"writable map": func() error {
			_, err := unix.Mmap(ro, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			return err
		},
		"read-only map made writable": func() error {
			m, err := unix.Mmap(ro, 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = unix.Munmap(m) }()
			return unix.Mprotect(m, unix.PROT_READ|unix.PROT_WRITE)
		},
		"reopened for writing": func() error {
			fd, err := unix.Open(path, unix.O_RDWR, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			_, err = unix.Pwrite(fd, []byte("x"), 0)
			return err
		},
		"reopened and mapped for writing": func() error {
			fd, err := unix.Open(path, unix.O_RDWR, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			_, err = unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			return err
		},
		"hole": func() error { return unix.Fallocate(ro, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096) },
		"seals taken away": func() error {
			_, err := unix.FcntlInt(uintptr(ro), unix.F_ADD_SEALS, unix.F_SEAL_WRITE)
			return err
		},
	} {
		if err := write(); err == nil {
			t.Errorf("%s: allowed", name)
		}
	}
	b := make([]byte, 1)
	if _, err := r.ReadAt(b, 0); err != nil || b[0] != 1 {
		t.Errorf("content changed: %v %v", b, err)
	}
}

func TestScrub(t *testing.T) {
	r := filled(t, 3<<20+17, 1<<20)
	fd, err := r.ReadOnlyFD()
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "kept")
	defer f.Close()
	before := make([]byte, 1)
	if _, err := f.ReadAt(before, 2<<20); err != nil || before[0] != 3 {
		t.Fatalf("%v %v", before, err)
	}
	if err := r.Scrub(); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(f)
	if err != nil || len(b) != 3<<20+17 || !bytes.Equal(b, make([]byte, len(b))) {
		t.Errorf("a reader that kept its descriptor sees content: %v", err)
	}
	if _, err := r.ReadAt(before, 0); !errors.Is(err, ErrClosed) {
		t.Errorf("scrubbed region reads: %v", err)
	}
	if _, err := r.ReadOnlyFD(); !errors.Is(err, ErrClosed) {
		t.Errorf("scrubbed region hands out descriptors: %v", err)
	}
	if err := r.Fill(context.Background(), 4096, 1, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("scrubbed region fills: %v", err)
	}
	if err := errors.Join(r.Close(), r.Close(), r.Scrub()); err != nil {
		t.Error(err)
	}
}

func TestFillFails(t *testing.T) {
	r, err := New("test", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	boom := errors.New("boom")
	err = r.Fill(t.Context(), 4096, 2, func() func(int64, []byte) error {
		return func(i int64, dst []byte) error {
			if i == 100 {
				return boom
			}
			return nil
		}
	})
	if !errors.Is(err, boom) {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Fill(ctx, 4096, 2, func() func(int64, []byte) error { return func(int64, []byte) error { return nil } }); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestBlocks(t *testing.T) {
	p := NewBlocks(3 * MaxBlock)
	var all [][]byte
	for range 3 {
		b, err := p.Get(MaxBlock)
		if err != nil {
			t.Fatal(err)
		}
		b[5] = 1
		all = append(all, b)
	}
	if _, err := p.Get(1); !errors.Is(err, ErrFull) {
		t.Errorf("beyond the bound: %v", err)
	}
	if err := p.Put(all[0]); err != nil {
		t.Fatal(err)
	}
	b, err := p.Get(MinBlock + 1)
	if err != nil || len(b) != 2*MinBlock {
		t.Fatalf("%d bytes, %v", len(b), err)
	}
	if !allZero(b) {
		t.Error("block is not zero")
	}
	if err := errors.Join(p.Put(b), p.Put(all[1]), p.Put(all[2])); err != nil {
		t.Error(err)
	}
	if p.Used() != 0 {
		t.Errorf("%d bytes are still used", p.Used())
	}
	if err := p.Close(); err != nil || p.held != 0 {
		t.Errorf("close: %v, %d bytes held", err, p.held)
	}
	if _, err := p.Get(1); !errors.Is(err, ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}
