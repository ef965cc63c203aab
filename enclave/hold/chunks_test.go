package hold

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/coffer-run/coffer/enclave/dma"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/enclave/seal"
)

type memory struct{ *bytes.Reader }

func (memory) Close() error { return nil }

// onDemand has one sealed file with what plain says, and no memory but its chunks'.
func onDemand(tb testing.TB, plain []byte) *demandFile {
	tb.Helper()
	check := func(err error) {
		tb.Helper()
		if err != nil {
			tb.Fatal(err)
		}
	}
	key := keys.GenerateDataKey()
	dir := filepath.Join(tb.TempDir(), "sealed")
	s, err := seal.Seal(tb.Context(), key, "a", []seal.Source{{Name: "f", Size: int64(len(plain)), Open: func() (seal.Reader, error) { return memory{bytes.NewReader(plain)}, nil }}}, dir, seal.Options{})
	check(err)
	root, err := os.OpenRoot(dir)
	check(err)
	tb.Cleanup(func() { check(root.Close()) })
	folder, err := seal.ReadFolder(root, "a", s.Digest)
	check(err)
	es, err := folder.Entries(key)
	check(err)
	pool := dma.NewPool(1)
	tb.Cleanup(func() { check(pool.Close()) })
	always := func() error { return nil }
	d := &demand{pool: pool, use: always, cache: newChunkCache(tb.Context(), always, maxCache, seal.DefaultChunkSize), ending: tb.Context(), log: slog.Default()}
	return d.add(&heldInput{folder: folder}, key, es[0])
}

// shown mounts files, by name, below the folder that it returns.
func shown(tb testing.TB, files map[string]content) string {
	tb.Helper()
	if os.Geteuid() != 0 {
		tb.Skip("mounting a FUSE file system needs root")
	}
	run := tb.TempDir()
	tree, err := mountInputs(run, 0, 0, func(<-chan struct{}) error { return nil }, func(err error) { tb.Error(err) }, time.Now())
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := tree.unmount(); err != nil {
			tb.Error(err)
		}
	})
	tree.addInput(tb.Context(), "in")
	for name, c := range files {
		tree.addFile(tb.Context(), "in", name, c)
	}
	return filepath.Join(run, "in")
}

// spoiled clears what a reply is made of as soon as the reply is said to be done.
type spoiled struct{ *chunkResult }

func (s spoiled) Done() {
	clear(s.data)
	s.chunkResult.Done()
}

type spoiledFile struct{ *demandFile }

type spoiledSource struct{ source }

func (f spoiledFile) open(cancel <-chan struct{}) (source, error) {
	s, err := f.demandFile.open(cancel)
	return spoiledSource{s}, err
}

func (s spoiledSource) read(dest []byte, off int64) (fuse.ReadResult, error) {
	r, err := s.source.read(dest, off)
	if err != nil {
		return nil, err
	}
	return spoiled{r.(*chunkResult)}, nil
}

// A chunk stays what it is until the kernel has taken the reply that is made of it.
func TestChunkOfAReplyUnderWay(t *testing.T) {
	want := bytes.Repeat([]byte("weights"), 10_000)
	f := onDemand(t, want)
	dir := shown(t, map[string]content{"f": spoiledFile{f}})
	// The reader is another process: see BenchmarkDecryptOnRead.
	got, err := exec.CommandContext(t.Context(), "cat", filepath.Join(dir, "f")).Output()
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes, %v, other than the file's", len(got), err)
	}
	ok(t, f.d.close())
}

// However many cores and however large the chunks, the holder's buffers stay
// within what they are given.
func TestBuffersAreBounded(t *testing.T) {
	for size := seal.MinChunkSize; size <= seal.MaxChunkSize; size *= 2 {
		if n := workersFor(size); n < 1 || n*size > maxBuffers {
			t.Errorf("chunks of %d bytes: %d workers", size, n)
		}
		c := newChunkCache(context.Background(), func() error { return nil }, max(maxCache, 2*int64(size)), size)
		if c.window < 1 || c.blocks.Limit() > maxCache || cap(c.slots)*size > maxBuffers {
			t.Errorf("chunks of %d bytes: %d ahead, %d slots, %d bytes", size, c.window, cap(c.slots), c.blocks.Limit())
		}
	}
}
