package dma

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// vmFlags are the kernel's words for the map that has address at in it.
func vmFlags(t *testing.T, mem []byte) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	_, after, ok := strings.Cut(string(b), fmt.Sprintf("\n%x-", addressOf(mem)))
	if !ok {
		t.Fatal("the region is not mapped")
	}
	_, after, _ = strings.Cut(after, "VmFlags: ")
	line, _, _ := strings.Cut(after, "\n")
	return strings.TrimSpace(line)
}

func addressOf(mem []byte) uintptr {
	var at uintptr
	_, _ = fmt.Sscanf(fmt.Sprintf("%p", mem), "0x%x", &at)
	return at
}

func isResident(t *testing.T, r *Region) bool {
	t.Helper()
	b := make([]byte, (len(r.mem)+4095)/4096)
	if _, _, e := unix.Syscall(unix.SYS_MINCORE, addressOf(r.mem), uintptr(len(r.mem)), addressOf(b)); e != 0 {
		t.Fatal(e)
	}
	for _, p := range b {
		if p&1 == 0 {
			return false
		}
	}
	return true
}

// What a file takes of a reserve is a region as New makes it, of the file's length,
// with the pages that were ready.
func TestTakenRegionIsAsANewOne(t *testing.T) {
	const ready = 4 << 20
	for name, size := range map[string]int64{
		"as long":                 ready,
		"a byte shorter":          ready - 1,
		"shorter, within a page":  2<<20 + 17,
		"longer, within a page":   ready + 5000,
		"many times as long":      9<<20 + 3,
		"longer by a whole piece": ready + piece,
	} {
		t.Run(name, func(t *testing.T) {
			s, err := NewReserve("r", []int64{ready}, 0)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Prefault(t.Context(), 1); err != nil {
				t.Fatal(err)
			}
			p := NewPool(0)
			defer p.Close()
			r := p.Take(s, size)
			if r == nil {
				t.Fatal("nothing was taken")
			}
			if len(s.spares) != 0 || p.Held() != size || r.Size() != size || int64(len(r.mem)) != size {
				t.Fatalf("%d left, %d held, %d long, %d mapped", len(s.spares), p.Held(), r.Size(), len(r.mem))
			}
			if size <= ready && !isResident(t, r) {
				t.Error("pages that were ready are not there")
			}
			fresh, err := New("n", size)
			if err != nil {
				t.Fatal(err)
			}
			defer fresh.Close()
			if got, want := vmFlags(t, r.mem), vmFlags(t, fresh.mem); got != want || !strings.Contains(got, " lo") || !strings.Contains(got, " dd") {
				t.Errorf("the map is %q, that of a new region %q", got, want)
			}
			seals := func(r *Region) int {
				n, err := unix.FcntlInt(r.ro.Fd(), unix.F_GET_SEALS, 0)
				if err != nil {
					t.Fatal(err)
				}
				return n
			}
			if got, want := seals(r), seals(fresh); got != want {
				t.Errorf("seals %#x, those of a new region %#x", got, want)
			}
			fd, err := r.ReadOnlyFD()
			if err != nil {
				t.Fatal(err)
			}
			if n, err := unix.Seek(fd, 0, unix.SEEK_END); err != nil || n != size {
				t.Errorf("a reader finds the end at %d, %v", n, err)
			}
			b := make([]byte, size)
			if _, err := r.ReadAt(b, 0); err != nil || !bytes.Equal(b, make([]byte, size)) {
				t.Errorf("it is not zero: %v", err)
			}
			if err := r.Prefault(t.Context(), 2); err != nil || !isResident(t, r) {
				t.Errorf("what is missing did not come: %v", err)
			}
			fill(t, r, 9)
			if _, err := r.ReadAt(b, 0); err != nil || !bytes.Equal(b, bytes.Repeat([]byte{9}, int(size))) {
				t.Errorf("content: %v", err)
			}
			if err := p.Put(r); !errors.Is(err, ErrShared) {
				t.Errorf("it comes back from under a reader: %v", err)
			}
			if err := errors.Join(unix.Close(fd), p.Put(r)); err != nil {
				t.Errorf("it does not come back: %v", err)
			}
			again, err := p.Get("again", size)
			if err != nil || again != r {
				t.Fatalf("it did not come back: %v", err)
			}
			if _, err := again.ReadAt(b, 0); err != nil || !bytes.Equal(b, make([]byte, size)) {
				t.Errorf("it came back with content: %v", err)
			}
		})
	}
}

func TestWhichRegionIsTaken(t *testing.T) {
	const mb = 1 << 20
	for name, c := range map[string]struct {
		ready []int64
		take  []int64
		want  []int64 // how long the taken one was; 0: none is taken
	}{
		"the nearest":                   {[]int64{8 * mb, 2 * mb, 4 * mb}, []int64{4 * mb, 2*mb + 1, 7 * mb}, []int64{4 * mb, 2 * mb, 8 * mb}},
		"the larger of two as near":     {[]int64{2 * mb, 4 * mb}, []int64{3 * mb}, []int64{4 * mb}},
		"each once":                     {[]int64{2 * mb}, []int64{2 * mb, 2 * mb}, []int64{2 * mb, 0}},
		"none more than twice as large": {[]int64{4 * mb}, []int64{2*mb - 1}, []int64{0}},
		"a small one by a large file":   {[]int64{2 * mb}, []int64{90 * mb}, []int64{2 * mb}},
	} {
		s, err := NewReserve("r", c.ready, 0)
		if err != nil {
			t.Fatal(err)
		}
		for i, size := range c.take {
			before := map[*Region]int64{}
			for _, r := range s.spares {
				before[r] = r.size
			}
			r := s.take(size)
			if was := before[r]; was != c.want[i] {
				t.Errorf("%s: a file of %d took the one of %d, want that of %d", name, size, was, c.want[i])
			}
			if r != nil {
				_ = r.Close()
			}
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestReserveRefuses(t *testing.T) {
	for _, sizes := range [][]int64{{0}, {-1}, {1 << 20, 0}} {
		if _, err := NewReserve("r", sizes, 0); err == nil {
			t.Errorf("%d was made", sizes)
		}
	}
	s, err := NewReserve("r", []int64{4 << 20}, 1)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Prefault(ctx, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	p := NewPool(3 << 20)
	if p.Take(s, 4<<20) != nil || len(s.spares) != 1 {
		t.Error("a region beyond the pool's bound was taken")
	}
	// One that cannot get the length is given up, and no error for whoever needs memory.
	s.spares[0].alloc.Close()
	if p.Take(s, 3<<20) != nil || len(s.spares) != 0 || p.Held() != 0 {
		t.Error("a region was taken that could not be sealed")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	var none *Reserve
	if none.take(1) != nil || none.Close() != nil {
		t.Error("no reserve has something")
	}
}
