package seal

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"testing"

	"github.com/coffer-run/coffer/enclave/keys"
)

// viewed is content in memory of which View gives as much as lies in one span.
type viewed struct {
	content []byte
	span    int64
	views   *int
	err     error
}

func (v viewed) View(off int64, n int) ([]byte, error) {
	if v.err != nil {
		return nil, v.err
	}
	if off/v.span != (off+int64(n)-1)/v.span {
		return nil, nil
	}
	*v.views++
	return v.content[off : off+int64(n)], nil
}

func (v viewed) ReadAt(p []byte, off int64) (int, error) {
	n := copy(p, v.content[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (viewed) Close() error { return nil }

// TestSealFromMemory: what is sealed where it lies opens to the same bytes, also
// where some of it does not lie together, and is not changed by sealing.
func TestSealFromMemory(t *testing.T) {
	key := keys.GenerateDataKey()
	const chunk = MinChunkSize
	content := make([]byte, 5*chunk+17)
	for i := range content {
		content[i] = byte(i * 7 >> 3)
	}
	before := bytes.Clone(content)
	for name, tc := range map[string]struct {
		span       int64
		views      int
		plainRoots bool
	}{
		"a span is a chunk":         {chunk, 6, false},
		"a span is many":            {4 * chunk, 6, false},
		"a chunk crosses spans":     {chunk + chunk/2, 4, false},
		"none lies together":        {chunk / 2, 1, false},
		"with the plaintext's root": {chunk, 6, true},
	} {
		t.Run(name, func(t *testing.T) {
			views := 0
			dst := filepath.Join(t.TempDir(), "sealed")
			s, err := Seal(t.Context(), key, "a", []Source{{Name: "f", Size: int64(len(content)), Open: func() (Reader, error) {
				return viewed{content, tc.span, &views, nil}, nil
			}}}, dst, Options{ChunkSize: chunk, Workers: 1, noPlainRoots: !tc.plainRoots})
			if err != nil {
				t.Fatal(err)
			}
			if views != tc.views {
				t.Errorf("%d chunks were sealed where they lie, want %d", views, tc.views)
			}
			if !bytes.Equal(content, before) {
				t.Fatal("sealing changed the plaintext")
			}
			if got, err := openAll(t, key, "a", dst, s.Digest); err != nil || !bytes.Equal(got["f"], before) {
				t.Error("it opens to other bytes")
			}
		})
	}
	lost := errors.New("the lease is over")
	dst := filepath.Join(t.TempDir(), "sealed")
	if _, err := Seal(t.Context(), key, "a", []Source{{Name: "f", Size: 10, Open: func() (Reader, error) { return viewed{content, chunk, nil, lost}, nil }}}, dst, Options{}); !errors.Is(err, lost) {
		t.Errorf("%v", err)
	}
}

// TestManyFilesFlushed: files that are brought to the disk while others are sealed
// are all there, and whole.
func TestManyFilesFlushed(t *testing.T) {
	key := keys.GenerateDataKey()
	var files []Source
	for i := range 3*maxFlushes + 1 {
		b := bytes.Repeat([]byte{byte(i)}, 1000*i)
		files = append(files, Source{Name: fmt.Sprintf("f%02d", i), Size: int64(len(b)), Open: func() (Reader, error) { return viewed{b, 1 << 20, new(int), nil}, nil }})
	}
	dst := filepath.Join(t.TempDir(), "sealed")
	s, err := Seal(t.Context(), key, "a", files, dst, Options{})
	if err != nil {
		t.Fatal(err)
	}
	got, err := openAll(t, key, "a", dst, s.Digest)
	if err != nil {
		t.Fatal(err)
	}
	for i := range files {
		if !bytes.Equal(got[files[i].Name], bytes.Repeat([]byte{byte(i)}, 1000*i)) {
			t.Errorf("file %d opens to other bytes", i)
		}
	}
	var f flushes
	lost := errors.New("disk")
	for range 2 * maxFlushes {
		if err := f.add(func() error { return lost }); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.wait(); !errors.Is(err, lost) {
		t.Errorf("a flush that failed: %v", err)
	}
}
