package hold

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/coffer-run/coffer/enclave/dma"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/enclave/seal"
)

// withReserve is a holder that has memory ready, and inputs with files of sizes.
func withReserve(t *testing.T, bound int64, ready []int64, inputs ...[]int64) *Holder {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("mounting a FUSE file system needs root")
		}
		t.Skip("mounting a FUSE file system needs root")
	}
	run, err := os.MkdirTemp("/tmp", "coffer-run-")
	ok(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(run) })
	reserve, err := dma.NewReserve(regionName, ready, 0)
	ok(t, err)
	ok(t, reserve.Prefault(t.Context(), 2))
	h, err := Create(t.Context(), Config{RunDir: run, JobID: "job-1", UID: 65532, GID: 65532, LogBytes: 1000, RegionBytes: bound, Reserve: reserve, Procs: procsOf(t), Log: slog.New(slog.DiscardHandler)})
	ok(t, err)
	t.Cleanup(func() {
		st, err := h.finish(context.WithoutCancel(t.Context()))
		if err != nil || h.pool.Held() != 0 || st.RegionBytes != 0 {
			t.Errorf("finish: %d bytes are held, %v", h.pool.Held(), err)
		}
	})
	for i, sizes := range inputs {
		name := string(rune('a' + i))
		var files []seal.Source
		for j, n := range sizes {
			files = append(files, sourceOf(string(rune('0'+j)), bytes.Repeat([]byte{7}, int(n))))
		}
		dir := filepath.Join(t.TempDir(), "sealed")
		s, err := seal.Seal(t.Context(), keys.GenerateDataKey(), name, files, dir, seal.Options{})
		ok(t, err)
		root, err := os.OpenRoot(dir)
		ok(t, err)
		ok(t, h.input(t.Context(), holdapi.Input{Name: name, Asset: name, Digest: s.Digest}, root))
	}
	return h
}

func TestShareOfTheReserve(t *testing.T) {
	const mb = 1 << 20
	for name, c := range map[string]struct {
		bound  int64
		ready  []int64
		inputs [][]int64
		want   []int64 // sizes of the regions that the pool has then, which were ready
	}{
		"the largest file first, of whichever input": {0, []int64{3 * mb}, [][]int64{{2 * mb}, {3*mb + 5, 2 * mb}}, []int64{3*mb + 5}},
		"one for each":               {0, []int64{mb, 3 * mb}, [][]int64{{mb}, {2 * mb}}, []int64{mb, 2 * mb}},
		"nothing for small files":    {0, []int64{2 * mb}, [][]int64{{mb - 1, 100}}, nil},
		"nothing if they do not fit": {3*mb - 1, []int64{2 * mb}, [][]int64{{2 * mb}, {mb}}, nil},
		"all if they just fit":       {3 * mb, []int64{2 * mb}, [][]int64{{2 * mb}, {mb}}, []int64{2 * mb}},
	} {
		t.Run(name, func(t *testing.T) {
			h := withReserve(t, c.bound, c.ready, c.inputs...)
			if got := h.pool.Held(); got != 0 {
				t.Errorf("before all inputs were there %d bytes were taken", got)
			}
			// What is not there is not made either: this looks at what was taken.
			h.end()
			ok(t, h.settle())
			if h.reserve != nil {
				t.Error("there still is a reserve")
			}
			for _, in := range h.inputs {
				in.unprepare()
			}
			sum := int64(0)
			for _, n := range c.want {
				sum += n
			}
			if got := h.pool.Held(); got != sum {
				t.Errorf("%d bytes were taken, want %d of %d", got, sum, c.want)
			}
			ok(t, h.settle())
		})
	}
}

// An agent that never says that all inputs are there loses nothing by it, and a job
// that ends early leaves nothing.
func TestReserveWithoutSettling(t *testing.T) {
	h := withReserve(t, 0, []int64{2 << 20}, []int64{2 << 20})
	if _, err := h.decrypt(t.Context()); codeOf(err) != holdapi.CodeState || h.reserve != nil || h.pool.Held() != 2<<20 {
		t.Errorf("decrypt without a key: %v, %d bytes are held", err, h.pool.Held())
	}
	h = withReserve(t, 0, []int64{2 << 20}, []int64{2 << 20})
	_, err := h.finish(t.Context())
	ok(t, err)
	if err := h.settle(); codeOf(err) != holdapi.CodeState || h.pool.Held() != 0 {
		t.Errorf("settled after the end: %v", err)
	}
}
