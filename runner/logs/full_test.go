package logs

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/runner/bootkey"
)

// TestFullDisk fills the disk before a log begins, and while it is written: what could
// not be kept is said to be, and is kept when there is room.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("root is needed, to mount a small disk")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	filler := filepath.Join(dir, "filler")
	fill := func() {
		f, err := os.Create(filler)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for err == nil {
			_, err = f.Write(make([]byte, 4096))
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
	}
	free := func() {
		if err := os.Remove(filler); err != nil {
			t.Fatal(err)
		}
	}
	s, err := Open(filepath.Join(dir, "logs"), bootkey.New(), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	fill()
	if _, err := s.Create("job", 1<<20, nil); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("a log begins on a full disk: %v", err)
	}
	if err := s.Read("job", func(Entry) error { return nil }); !errors.Is(err, ErrNotKept) {
		t.Errorf("of a log that could not begin: %v, want that none is kept", err)
	}
	free()
	l, err := s.Create("job", 1<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	line := strings.Repeat("x", 8000)
	add := func(i int) error {
		_, err := l.Append(Entry{Stream: Stdout, Offset: int64(i * len(line)), At: time.Now(), Data: []byte(line)})
		return err
	}
	if err := add(0); err != nil {
		t.Fatal(err)
	}
	fill()
	// The first try ends the segment, the others cannot begin another one.
	for range 3 {
		if err := add(1); !errors.Is(err, unix.ENOSPC) {
			t.Fatalf("a line is kept on a full disk: %v", err)
		}
	}
	free()
	for i := range 2 {
		if err := add(i + 1); err != nil {
			t.Fatalf("with room again line %d is not kept: %v", i+1, err)
		}
	}
	if err := l.Forget(); err != nil {
		t.Fatal(err)
	}
	var got []int64
	err = s.Read("job", func(e Entry) error { got = append(got, e.Offset/int64(len(line))); return nil })
	if errors.Is(err, fs.ErrNotExist) || len(got) != 3 || got[0] != 0 || got[1] != 1 || got[2] != 2 {
		t.Errorf("lines %v, %v; want 0 to 2", got, err)
	}
	t.Logf("read: %v", err)
}
