package seal

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/keys"
)

// sealedBytes seals plain as one file under a fixed salt and returns the sealed
// file, and where it lies.
func sealedBytes(t *testing.T, plain []byte, o Options) ([]byte, string) {
	t.Helper()
	o.salt = func() [saltSize]byte { return [saltSize]byte{1} }
	dir := filepath.Join(t.TempDir(), "s")
	_, err := Seal(t.Context(), testKey(t, 1), "a", []Source{memSource("f", plain)}, dir, o)
	must(t, err)
	name := filepath.Join(dir, SealedName(fileID(0)))
	b, err := os.ReadFile(name)
	must(t, err)
	return b, name
}

// A file is the same whichever way it was written.
func TestDirectWritesTheSameFile(t *testing.T) {
	for _, tc := range []struct {
		name           string
		size           int
		chunk, workers int
	}{
		{"empty", 0, MinChunkSize, 2},
		{"a few bytes", 10, MinChunkSize, 2},
		{"one block with its tag", directAlign - TagSize, MinChunkSize, 1},
		{"whole chunks", 4 * MinChunkSize, MinChunkSize, 2},
		{"a last chunk within the block of the one before", 2*MinChunkSize + 1, MinChunkSize, 2},
		{"a last chunk of its own span and block", 8*MinChunkSize + 1, MinChunkSize, 1},
		{"more workers than chunks", 3 * MinChunkSize, MinChunkSize, 8},
		{"spans larger than a buffer", 21<<20 + 5, MinChunkSize, 1},
		{"the default chunk", 9<<20 + 1234, DefaultChunkSize, 2},
		{"chunks larger than a buffer", 40 << 20, 16 << 20, 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			plain := bytes.Repeat(pattern(1<<16+1), tc.size>>16+1)[:tc.size]
			want, _ := sealedBytes(t, plain, Options{ChunkSize: tc.chunk, Workers: tc.workers})
			got, _ := sealedBytes(t, plain, Options{ChunkSize: tc.chunk, Workers: tc.workers, direct: 1})
			if !bytes.Equal(got, want) {
				t.Errorf("%d bytes, of which the first %d are the same; want %d", len(got), same(got, want), len(want))
			}
		})
	}
}

func same(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

// A large checkpoint goes past the page cache where the file system has that, and
// a small one does not.
func TestCheckpointsGoPastThePageCache(t *testing.T) {
	probe, err := os.OpenFile(filepath.Join(t.TempDir(), "probe"), os.O_CREATE|os.O_RDWR|unix.O_DIRECT, 0o600)
	if err != nil {
		t.Skip("this file system has no direct writes:", err)
	}
	defer probe.Close()
	var st unix.Statfs_t
	must(t, unix.Statfs(filepath.Dir(probe.Name()), &st))
	if st.Type == unix.TMPFS_MAGIC {
		t.Skip("here files are the page cache")
	}
	plain := make([]byte, 16<<20)
	for _, tc := range []struct {
		name  string
		bytes int
		past  bool
	}{{"large", directMin, true}, {"small", directMin / 2, false}} {
		session, err := keys.GenerateSession()
		must(t, err)
		dir := t.TempDir()
		_, err = SealCheckpoint(t.Context(), testKey(t, 1), session, []Source{memSource("f", plain[:tc.bytes])}, openRoot(t, dir),
			Commit{JobID: "job", Plan: plan.Sum([]byte("p")), Asset: "a", Sequence: 1, Name: "c", Folder: "c"}, time.Now, Options{})
		must(t, err)
		cached, pages := resident(t, filepath.Join(dir, "c", SealedName(fileID(0))))
		// The first block and those where spans meet are written through the cache.
		if past := cached <= pages/20; past != tc.past {
			t.Errorf("%s: %d of %d pages are in the cache", tc.name, cached, pages)
		}
	}
}

// resident counts a file's pages that are in the page cache (mincore(2)).
func resident(t *testing.T, name string) (in, all int) {
	t.Helper()
	f, err := os.Open(name)
	must(t, err)
	defer f.Close()
	info, err := f.Stat()
	must(t, err)
	b, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	must(t, err)
	defer func() { must(t, unix.Munmap(b)) }()
	vec := make([]byte, (len(b)+directAlign-1)/directAlign)
	if _, _, e := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), uintptr(unsafe.Pointer(unsafe.SliceData(vec)))); e != 0 { // #nosec G103 -- addresses of a map and its answer
		t.Fatal(e)
	}
	for _, v := range vec {
		in += int(v & 1)
	}
	return in, len(vec)
}

var errSource = errors.New("source is gone")

// failing is a source that ends with an error in the middle.
type failing struct{ Reader }

func (f failing) ReadAt(p []byte, off int64) (int, error) {
	if off >= 12<<20 {
		return 0, errSource
	}
	return f.Reader.ReadAt(p, off)
}

// What fails while other writes are under way fails as a whole and leaves nothing.
func TestDirectFails(t *testing.T) {
	plain := make([]byte, 16<<20)
	t.Run("source", func(t *testing.T) {
		dir := t.TempDir()
		src := memSource("f", plain)
		open := src.Open
		src.Open = func() (Reader, error) {
			r, err := open()
			return failing{r}, err
		}
		_, err := Seal(t.Context(), testKey(t, 1), "a", []Source{src}, filepath.Join(dir, "s"), Options{direct: 1})
		if !errors.Is(err, errSource) {
			t.Error(err)
		}
		nothingIn(t, dir)
	})
	for _, room := range []int{1, 8, 15} {
		t.Run(fmt.Sprintf("disk of %d MiB", room), func(t *testing.T) {
			if os.Geteuid() != 0 {
				if os.Getenv("CI") == "true" {
					t.Fatal("mounting a small disk needs root")
				}
				t.Skip("mounting a small disk needs root")
			}
			dir := t.TempDir()
			must(t, unix.Mount("coffer-test", dir, "tmpfs", 0, fmt.Sprintf("size=%dm,mode=0700", room)))
			t.Cleanup(func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) })
			_, err := Seal(t.Context(), testKey(t, 1), "a", []Source{memSource("f", plain)}, filepath.Join(dir, "s"), Options{direct: 1})
			if !errors.Is(err, unix.ENOSPC) {
				t.Error(err)
			}
			nothingIn(t, dir)
		})
	}
}

// A write that fails while the next buffer is filled is told at the latest when
// the output is closed.
func TestDirectTellsOfEachWrite(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	must(t, err)
	defer full.Close()
	d := &direct{f: full, dst: full, buffer: 2 * directAlign}
	out, err := d.stream()
	must(t, err)
	out.begin(directAlign)
	b, err := out.next(directAlign)
	must(t, err)
	must(t, out.add(len(b)))
	if err := cmp.Or(out.end(), out.close()); !errors.Is(err, unix.ENOSPC) {
		t.Error(err)
	}
	d = &direct{dst: full}
	d.keep(0, []byte("edge"))
	if err := d.finish(); !errors.Is(err, unix.ENOSPC) {
		t.Error(err)
	}
}

// Where the disk wants more alignment than there is, bytes go through the cache.
func TestDirectFallsBack(t *testing.T) {
	name := filepath.Join(t.TempDir(), "f")
	dst, err := os.Create(name)
	must(t, err)
	defer dst.Close()
	f, err := os.OpenFile(name, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Skip("this file system has no direct writes:", err)
	}
	defer f.Close()
	want := pattern(3*directAlign + 1)
	must(t, (&direct{f: f, dst: dst}).write(want, 0))
	if got, err := os.ReadFile(name); err != nil || !bytes.Equal(got, want) {
		t.Error(err, "not what was written")
	}
}

// However many cores there are, their buffers stay within what they are given.
func TestDirectBuffersAreBounded(t *testing.T) {
	for size := MinChunkSize; size <= MaxChunkSize; size *= 2 {
		l, err := layoutOf(1<<30, size)
		must(t, err)
		d := &direct{buffer: bufferFor(l)}
		if n := d.workers(128); n < 1 || n*2*d.buffer > maxDirectMemory || d.workers(1) != 1 || d.buffer < l.maxChunk()+directAlign || d.buffer%directAlign != 0 {
			t.Errorf("chunks of %d bytes: %d workers with buffers of %d bytes", size, n, d.buffer)
		}
	}
}

func nothingIn(t *testing.T, dir string) {
	t.Helper()
	l, err := os.ReadDir(dir)
	must(t, err)
	if len(l) > 0 {
		t.Errorf("%d entries are left, the first %s", len(l), l[0].Name())
	}
}
