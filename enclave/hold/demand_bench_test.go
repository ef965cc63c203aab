package hold

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/coffer-run/coffer/enclave/dma"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/enclave/seal"
)

type zeroContent int64

func (z zeroContent) size() int64                          { return int64(z) }
func (z zeroContent) open(<-chan struct{}) (source, error) { return z, nil }
func (zeroContent) fd() int                                { return -1 }
func (zeroContent) close()                                 {}

func (z zeroContent) read(dest []byte, off int64) (fuse.ReadResult, error) {
	return fuse.ReadResultData(dest[:min(int64(len(dest)), int64(z)-off)]), nil
}

type memory struct{ *bytes.Reader }

func (memory) Close() error { return nil }

// BenchmarkDecryptOnRead reads a file that is larger than the memory given for it,
// in order, 1 MiB at a time, beside one of which the server says nothing but zeros.
func BenchmarkDecryptOnRead(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("mounting a FUSE file system needs root")
	}
	check := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	const size = 512 << 20
	key := keys.GenerateDataKey()
	dir := filepath.Join(b.TempDir(), "sealed")
	plain := make([]byte, size)
	s, err := seal.Seal(b.Context(), key, "a", []seal.Source{{Name: "f", Size: size, Open: func() (seal.Reader, error) { return memory{bytes.NewReader(plain)}, nil }}}, dir, seal.Options{})
	check(err)
	root, err := os.OpenRoot(dir)
	check(err)
	defer root.Close()
	folder, err := seal.ReadFolder(root, "a", s.Digest)
	check(err)
	es, err := folder.Entries(key)
	check(err)

	run := b.TempDir()
	tree, err := mountInputs(run, 0, 0, func(<-chan struct{}) error { return nil }, func(err error) { b.Error(err) }, time.Now())
	check(err)
	defer func() { check(tree.unmount()) }()
	pool := dma.NewPool(1)
	defer pool.Close()
	always := func() error { return nil }
	d := &demand{pool: pool, use: always, cache: newChunkCache(b.Context(), always, maxCache, seal.DefaultChunkSize), ending: b.Context(), log: slog.Default()}
	tree.addInput(b.Context(), "in")
	tree.addFile(b.Context(), "in", "sealed", d.add(&heldInput{folder: folder}, key, es[0]))
	tree.addFile(b.Context(), "in", "zeros", zeroContent(size))

	// The reader is another process, as a job is: within one the runtime has both
	// sides wait for each other.
	read := func(name string) time.Duration {
		began := time.Now()
		out, err := exec.CommandContext(b.Context(), "dd", "if="+filepath.Join(run, "in", name), "of=/dev/null", "bs=1M").CombinedOutput()
		if err != nil || !strings.Contains(string(out), fmt.Sprintf("%d bytes", size)) {
			b.Fatalf("%v: %s", err, out)
		}
		return time.Since(began)
	}
	read("sealed")
	read("zeros")
	var ratio, sealed, zeros []float64
	for b.Loop() {
		z, s := read("zeros").Seconds(), read("sealed").Seconds()
		ratio, sealed, zeros = append(ratio, z/s), append(sealed, size/s/1e9), append(zeros, size/z/1e9)
	}
	for name, l := range map[string][]float64{"sealed/zeros": ratio, "sealed-GB/s": sealed, "zeros-GB/s": zeros} {
		slices.Sort(l)
		b.ReportMetric(l[len(l)/2], name)
	}
	check(d.close())
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
