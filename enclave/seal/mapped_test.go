package seal

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sealedFile returns a sealed file of three chunks, opened, and its path.
func sealedFile(t *testing.T) (o *OpenedFile, path string, plain []byte) {
	t.Helper()
	key := testKey(t, 1)
	plain = pattern(2*testChunk + 100)
	dir, s := sealTest(t, key, "a", map[string][]byte{"f": plain})
	f, err := ReadFolder(openRoot(t, dir), "a", s.Digest)
	must(t, err)
	es, err := f.Entries(key)
	must(t, err)
	o, err = f.Open(key, es[0])
	must(t, err)
	t.Cleanup(func() { _ = o.Close() })
	return o, filepath.Join(dir, SealedName(es[0].ID)), plain
}

// wantMapped maps o, or skips where there are no leases.
func wantMapped(t *testing.T, o *OpenedFile) {
	t.Helper()
	if o.Map(); o.mapped == nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("no read lease on a file that nobody writes to")
		}
		t.Skip("no read leases here")
	}
}

func wantPlain(t *testing.T, o *OpenedFile, plain []byte) {
	t.Helper()
	var b bytes.Buffer
	if _, err := o.WriteTo(&b); err != nil || !bytes.Equal(b.Bytes(), plain) {
		t.Fatalf("%d bytes of %d, or others: %v", b.Len(), len(plain), err)
	}
}

func TestMappedFileReadsTheSame(t *testing.T) {
	o, _, plain := sealedFile(t)
	wantMapped(t, o)
	wantPlain(t, o, plain)
	if o.mapped.b == nil {
		t.Error("the map was not used")
	}
	p := make([]byte, 100)
	if n, err := o.ReadAt(p, testChunk-50); n != 100 || err != nil || !bytes.Equal(p, plain[testChunk-50:testChunk+50]) {
		t.Error("bytes across two chunks differ:", err)
	}
}

func TestFileOpenForWritingIsNotMapped(t *testing.T) {
	o, path, plain := sealedFile(t)
	w, err := os.OpenFile(path, os.O_WRONLY, 0)
	must(t, err)
	defer w.Close()
	if o.Map(); o.mapped != nil {
		t.Fatal("mapped under a writer")
	}
	wantPlain(t, o, plain)
}

func TestFileOfAnotherLengthIsNotMapped(t *testing.T) {
	o, path, _ := sealedFile(t)
	must(t, os.Truncate(path, o.layout.cipherSize()-1))
	if o.Map(); o.mapped != nil {
		t.Fatal("mapped, and shorter than its manifest says")
	}
}

// Who comes to write gets in when the map is gone, which is at the next chunk.
func TestWriterEndsTheMap(t *testing.T) {
	for _, row := range []struct {
		name  string
		write func(path string) error
		whole bool
	}{
		{"opens", func(path string) error {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err == nil {
				err = f.Close()
			}
			return err
		}, true},
		{"cuts", func(path string) error { return os.Truncate(path, PayloadOffset+10) }, false},
		{"empties", func(path string) error { return os.Truncate(path, 0) }, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			o, path, plain := sealedFile(t)
			wantMapped(t, o)
			written := make(chan error, 1)
			go func() { written <- row.write(path) }()
			// It waits in the kernel for the lease.
			for o.mapped.leased() {
				time.Sleep(time.Millisecond)
			}
			select {
			case err := <-written:
				t.Fatal("the writer did not wait:", err)
			default:
			}
			got := make([]byte, testChunk)
			// The writer may have been faster than the second look at the chunk.
			if err := o.ReadChunk(0, got); err == nil && !bytes.Equal(got, plain[:testChunk]) || err != nil && (row.whole || !errors.Is(err, ErrDamaged)) {
				t.Error("the chunk read meanwhile differs:", err)
			}
			must(t, <-written)
			if o.mapped.b != nil {
				t.Error("the map is still there")
			}
			copy(got, "left from before")
			err := o.ReadChunk(1, got)
			if row.whole && (err != nil || !bytes.Equal(got, plain[testChunk:2*testChunk])) {
				t.Error("the next chunk differs:", err)
			}
			if !row.whole && (!errors.Is(err, ErrDamaged) || !bytes.Equal(got, make([]byte, testChunk))) {
				t.Error("a chunk that is not there was read:", err)
			}
		})
	}
}

// What was decrypted while a writer came is void: another may have written what
// the tag was not computed over.
func TestChunkIsVoidIfAWriterCameMeanwhile(t *testing.T) {
	o, path, _ := sealedFile(t)
	wantMapped(t, o)
	ok := o.mapped.use(0, 10, func([]byte) {
		fd, err := unix.Open(path, unix.O_WRONLY|unix.O_NONBLOCK, 0)
		if err == nil {
			_ = unix.Close(fd)
		}
		if !errors.Is(err, unix.EAGAIN) {
			t.Errorf("opened for writing under the lease: %v", err)
		}
	})
	if ok || o.mapped.b != nil {
		t.Error("the chunk counts, or the map is still there")
	}
}

// Without a lease a file can be cut under the cipher's hands. Both ways of
// meeting that are an error and no signal.
func TestCutFileIsNoSignal(t *testing.T) {
	o, path, _ := sealedFile(t)
	wantMapped(t, o)
	m := o.mapped
	m.giveBack()
	w := o.Worker()
	setNonce(&w.nonce, 0, false)
	dst := make([]byte, testChunk)
	n := testChunk + TagSize
	t.Run("while it decrypts", func(t *testing.T) {
		if m.read(o.layout.offset(0), n, func(c []byte) {
			must(t, os.Truncate(path, 0))
			_ = w.open(0, dst, c)
			t.Error("pages that are not there were read")
		}) {
			t.Error("it counts")
		}
	})
	t.Run("before", func(t *testing.T) {
		if m.read(o.layout.offset(0), n, func([]byte) { t.Error("called") }) {
			t.Error("it counts")
		}
	})
	t.Run("another panic is its own", func(t *testing.T) {
		defer func() {
			if recover() == nil {
				t.Error("swallowed")
			}
		}()
		f, err := os.Create(filepath.Join(t.TempDir(), "f"))
		must(t, err)
		defer f.Close()
		must(t, f.Truncate(4096))
		ro, err := os.Open(f.Name())
		must(t, err)
		defer ro.Close()
		must(t, f.Close())
		one := mapFile(int(ro.Fd()), 4096)
		defer one.close()
		one.read(0, 1, func([]byte) { panic("a defect") })
	})
}

// A process that locks all its memory, as the holder does, keeps no ciphertext in
// it: the pages of a mapped file stay the kernel's to take back.
func TestMappedFileIsNotLocked(t *testing.T) {
	// 4 is MCL_ONFAULT (mlockall(2)).
	if err := unix.Mlockall(unix.MCL_FUTURE | 4); err != nil {
		t.Skip("memory cannot be locked here: ", err)
	}
	defer func() { _ = unix.Munlockall() }()
	o, _, _ := sealedFile(t)
	wantMapped(t, o)
	b, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	at := fmt.Sprintf("%x-", uintptr(unsafe.Pointer(unsafe.SliceData(o.mapped.b))))
	_, entry, found := strings.Cut(string(b), "\n"+at)
	_, flags, _ := strings.Cut(entry, "VmFlags:")
	flags, _, _ = strings.Cut(flags, "\n")
	if !found || slices.Contains(strings.Fields(flags), "lo") {
		t.Errorf("flags %q, found %v", flags, found)
	}
}
