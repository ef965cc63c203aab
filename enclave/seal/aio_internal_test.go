package seal

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// One write is under way at a time, and what became of it is told once.
func TestWritesUnderWay(t *testing.T) {
	if iocbSize, eventSize := unsafe.Sizeof(iocb{}), unsafe.Sizeof(ioEvent{}); iocbSize != 64 || eventSize != 32 {
		t.Fatalf("the kernel's structures have 64 and 32 bytes, ours %d and %d", iocbSize, eventSize)
	}
	a, err := openAIO()
	if err != nil {
		t.Skip(err)
	}
	defer func() {
		if err := a.close(); err != nil {
			t.Error(err)
		}
	}()
	if rest, _, err := a.wait(); rest != nil || err != nil {
		t.Errorf("before the first: %d bytes, %v", len(rest), err)
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	mem, err := unix.Mmap(-1, 0, directAlign, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem) //nolint:errcheck // the test is over
	copy(mem, bytes.Repeat([]byte{7}, directAlign))
	if err := a.begin(f, mem, directAlign); err != nil {
		t.Fatal(err)
	}
	if err := a.begin(f, mem, 0); err == nil {
		t.Error("a second one begins")
	}
	if rest, _, err := a.wait(); len(rest) != 0 || err != nil {
		t.Fatalf("%d bytes are left, %v", len(rest), err)
	}
	if got, err := os.ReadFile(f.Name()); err != nil || !bytes.Equal(got, append(make([]byte, directAlign), mem...)) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	readOnly, err := os.Open(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	defer readOnly.Close()
	err = a.begin(readOnly, mem, 0)
	if err == nil {
		_, _, err = a.wait()
	}
	if !errors.Is(err, unix.EBADF) {
		t.Errorf("to a file that is open for reading: %v", err)
	}
}
