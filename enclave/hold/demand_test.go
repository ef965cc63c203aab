package hold_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/enclave/seal"
)

const mib = 1 << 20

// demandHolder has one input of ten files of 1 MiB and one of 9, in 4 MiB of memory.
func demandHolder(t *testing.T) (h *holder, dir string, files map[string][]byte) {
	t.Helper()
	h = start(t, "--region-bytes", fmt.Sprint(4*mib))
	files = map[string][]byte{"big": pattern(9*mib + 5), "empty": nil}
	for i := range 10 {
		files[fmt.Sprintf("f%d", i)] = pattern(mib - i%2)
	}
	key := keys.GenerateDataKey()
	dir, digest := sealed(t, key, "a", files)
	must(t, h.c.Input(t.Context(), holdapi.Input{Name: "in", Asset: "a", Digest: digest}, dir))
	must(t, h.deliver(key, "a"))
	d, err := h.c.Decrypt(t.Context())
	must(t, err)
	if d.Files != 12 || d.Bytes != 0 {
		t.Errorf("decrypted %+v", d)
	}
	h.trace().start()
	h.waitStarted()
	return h, dir, files
}

func (h *holder) inMemory() int64 {
	h.t.Helper()
	st, err := h.c.Status(h.t.Context())
	must(h.t, err)
	return st.RegionBytes
}

func (h *holder) finish() {
	h.t.Helper()
	st, err := h.c.Finish(h.t.Context())
	if err != nil || !st.Scrubbed || st.RegionBytes != 0 {
		h.t.Errorf("%+v %v", st, err)
	}
}

func (h *holder) wasTold(want string) {
	h.t.Helper()
	es, err := h.c.Events(h.t.Context(), holdapi.Events{})
	must(h.t, err)
	for _, e := range es {
		if e.Kind == "input-error" && strings.Contains(e.Detail, want) {
			return
		}
	}
	h.t.Errorf("no event says %q: %+v", want, es)
}

func TestInputsBeyondMemory(t *testing.T) {
	h, _, files := demandHolder(t)
	// In any order, by several readers, and more than once.
	var wg sync.WaitGroup
	for w := range 3 {
		wg.Go(func() {
			for range 3 {
				for n, want := range files {
					got, err := os.ReadFile(h.path("inputs/in", n))
					if err != nil || !bytes.Equal(got, want) {
						t.Errorf("reader %d: %s: %d bytes, %v", w, n, len(got), err)
					}
				}
			}
		})
	}
	wg.Wait()
	if m := h.inMemory(); m == 0 || m > 4*mib {
		t.Errorf("%d bytes are in memory", m)
	}
	f, err := os.Open(h.path("inputs/in/big"))
	must(t, err)
	defer f.Close()
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		off, n := rnd.Int64N(9*mib+5), rnd.IntN(300_000)
		b := make([]byte, n)
		m, err := f.ReadAt(b, off)
		if err != nil && !errors.Is(err, io.EOF) || !bytes.Equal(b[:m], files["big"][off:off+int64(m)]) || m < n && off+int64(m) < 9*mib+5 {
			t.Fatalf("%d bytes at %d: %d, %v", n, off, m, err)
		}
	}
	h.finish()
	if m, err := f.ReadAt(make([]byte, 10), 0); err == nil && m > 0 {
		t.Error("a file is read after the end")
	}
}

// A region that someone has open or maps does not change under their feet.
func TestEvictionPassesOverWhatIsUsed(t *testing.T) {
	h, _, files := demandHolder(t)
	f, err := os.Open(h.path("inputs/in/f0"))
	must(t, err)
	m, err := unix.Mmap(int(f.Fd()), 0, mib, unix.PROT_READ, unix.MAP_SHARED)
	must(t, err)
	defer func() { _ = unix.Munmap(m) }()
	must(t, f.Close())
	open, err := os.Open(h.path("inputs/in/f2"))
	must(t, err)
	defer open.Close()
	for range 2 {
		for n, want := range files {
			if got, err := os.ReadFile(h.path("inputs/in", n)); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: %d bytes, %v", n, len(got), err)
			}
		}
	}
	if !bytes.Equal(m, files["f0"]) {
		t.Error("the map of a closed file changed")
	}
	if got, err := io.ReadAll(open); err != nil || !bytes.Equal(got, files["f2"]) {
		t.Errorf("the open file: %d bytes, %v", len(got), err)
	}
	if m := h.inMemory(); m > 4*mib {
		t.Errorf("%d bytes are in memory", m)
	}
}

// When every region is in use, files are read without one.
func TestEveryRegionIsInUse(t *testing.T) {
	h, _, files := demandHolder(t)
	for n, want := range files {
		f, err := os.Open(h.path("inputs/in", n))
		must(t, err)
		defer f.Close()
		if got, err := io.ReadAll(f); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", n, len(got), err)
		}
	}
	if m := h.inMemory(); m > 4*mib {
		t.Errorf("%d bytes are in memory", m)
	}
	h.finish()
}

func TestSourceChangesWhileItIsRead(t *testing.T) {
	for name, c := range map[string]struct {
		change func(path string, b []byte) error
		said   string
		// reach is how much of the file is still right.
		reach int
	}{
		"a bit is flipped": {func(p string, b []byte) error {
			b = bytes.Clone(b)
			b[seal.PayloadOffset+70*(seal.MinChunkSize+seal.TagSize)+9] ^= 4
			return os.WriteFile(p, b, 0o600)
		}, "chunk 70 does not authenticate", 70 * seal.MinChunkSize},
		"it is cut": {func(p string, _ []byte) error {
			return os.Truncate(p, seal.PayloadOffset+70*(seal.MinChunkSize+seal.TagSize)+100)
		}, "read chunk 70: unexpected EOF", 70 * seal.MinChunkSize},
		"two chunks change places": {func(p string, b []byte) error {
			const n = seal.MinChunkSize + seal.TagSize
			x := bytes.Clone(b)
			copy(x[seal.PayloadOffset+70*n:], b[seal.PayloadOffset+71*n:seal.PayloadOffset+72*n])
			copy(x[seal.PayloadOffset+71*n:], b[seal.PayloadOffset+70*n:seal.PayloadOffset+71*n])
			return os.WriteFile(p, x, 0o600)
		}, "does not authenticate", 70 * seal.MinChunkSize},
	} {
		t.Run(name, func(t *testing.T) {
			h, dir, files := demandHolder(t)
			// Ids are in the order of names.
			p := filepath.Join(dir, "000000.sealed")
			whole, err := os.ReadFile(p)
			must(t, err)
			f, err := os.Open(h.path("inputs/in/big"))
			must(t, err)
			defer f.Close()
			b := make([]byte, 10*mib)
			_, err = f.ReadAt(b[:100], 0)
			must(t, err)
			began := time.Now()
			must(t, c.change(p, whole))
			// The kernel's patience, lease-break-time, is 45 s.
			if took := time.Since(began); took > 40*time.Second {
				t.Errorf("the writer waited %v for the file", took)
			}
			n, err := f.ReadAt(b, 0)
			if !errors.Is(err, unix.EIO) {
				t.Errorf("%d bytes, %v", n, err)
			}
			if n > c.reach || !bytes.Equal(b[:n], files["big"][:n]) {
				t.Errorf("wrong bytes among %d", n)
			}
			h.wasTold("000000: " + "sealed data is damaged")
			h.wasTold(c.said)
			// A read that failed is forgotten: the file was put right.
			must(t, os.WriteFile(p, whole, 0o600))
			if n, err := f.ReadAt(b[:9*mib], 0); err != nil || !bytes.Equal(b[:n], files["big"][:n]) {
				t.Errorf("the whole file again: %d bytes, %v", n, err)
			}
			// One that has a region, and changed before it was opened.
			p = filepath.Join(dir, "000002.sealed")
			small, err := os.ReadFile(p)
			must(t, err)
			small[len(small)-1] ^= 1
			must(t, os.WriteFile(p, small, 0o600))
			if _, err := os.ReadFile(h.path("inputs/in/f0")); !errors.Is(err, unix.EIO) {
				t.Errorf("a changed file opens: %v", err)
			}
			h.wasTold("file 000002: sealed data is damaged")
			h.finish()
		})
	}
}

// A job that opens files without end is told so, and the holder lives on.
func TestHandlesWithoutEnd(t *testing.T) {
	h := start(t)
	key := keys.GenerateDataKey()
	dir, digest := sealed(t, key, "a", map[string][]byte{"f": pattern(100)})
	must(t, h.c.Input(t.Context(), holdapi.Input{Name: "in", Asset: "a", Digest: digest}, dir))
	must(t, h.deliver(key, "a"))
	_, err := h.c.Decrypt(t.Context())
	must(t, err)
	h.trace().start()
	h.waitStarted()
	// The limit is a quarter of the descriptors that a process may have.
	var fds []int
	defer func() {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	}()
	var failed error
	for range 70_000 {
		fd, err := unix.Open(h.path("inputs/in/f"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			failed = err
			break
		}
		fds = append(fds, fd)
	}
	if !errors.Is(failed, unix.ENFILE) {
		t.Fatalf("after %d: %v", len(fds), failed)
	}
	h.wasTold("files open at once, which is the limit")
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
	fds = nil
	h.until("a file to open again", func() bool {
		b, err := os.ReadFile(h.path("inputs/in/f"))
		return err == nil && bytes.Equal(b, pattern(100))
	})
	h.finish()
}
