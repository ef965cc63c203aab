package hold

import (
	"bytes"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/coffer-run/coffer/enclave/dma"
)

// TestViewIsWhatIsRead: where content lies together it is what ReadAt gives, however
// the file was written.
func TestViewIsWhatIsRead(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	viewed := 0
	for range 50 {
		tree := &checkpointTree{pool: dma.NewBlocks(16 << 20), now: time.Now}
		n := &checkpointNode{t: tree}
		h := &checkpointHandle{n}
		for range 1 + r.IntN(5) {
			b := bytes.Repeat([]byte{byte(1 + r.IntN(255))}, 1+r.IntN(3*blockSpan/2))
			if _, e := h.Write(t.Context(), b, r.Int64N(4*blockSpan)); e != 0 {
				t.Fatal(e)
			}
			if r.IntN(4) == 0 {
				n.resize(r.Int64N(5 * blockSpan))
			}
		}
		src := nodeReader{n}
		if b, err := src.View(0, 1); err == nil {
			t.Fatalf("%d bytes of a file that can be written", len(b))
		}
		n.setShut(true)
		for off := int64(0); off < n.size; off += blockSpan / 2 {
			k := int(min(1+r.Int64N(blockSpan), n.size-off))
			got, err := src.View(off, k)
			if err != nil {
				t.Fatal(err)
			}
			if got == nil {
				continue // a hole, or more than one block
			}
			viewed++
			want := make([]byte, k)
			if _, err := src.ReadAt(want, off); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%d bytes at %d of %d differ: %v", k, off, n.size, err)
			}
		}
		for _, past := range []int64{-1, n.size, n.size + blockSpan} {
			if b, err := src.View(past, 1); err != nil || b != nil {
				t.Errorf("at %d of %d: %d bytes, %v", past, n.size, len(b), err)
			}
		}
		n.data.Lock()
		n.dead = true
		n.data.Unlock()
		if b, err := src.View(0, 1); err == nil {
			t.Errorf("%d bytes of a file that is gone", len(b))
		}
		n.resize(0)
		if err := tree.pool.Close(); err != nil {
			t.Error(err)
		}
	}
	if viewed < 50 {
		t.Errorf("%d views", viewed)
	}
}
