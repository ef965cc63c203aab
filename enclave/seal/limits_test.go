package seal

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"runtime"
	"testing"
)

// Whatever chunk size a header claims, its reader takes no more memory than the
// file has bytes, with the key and its commitment on the attacker's side.
func TestChunkSizeTakesNoMemory(t *testing.T) {
	key := testKey(t, 1)
	sizes := []uint32{0, 1, 16, 4095, MinChunkSize - 1, MinChunkSize, MinChunkSize + 1, MinChunkSize * 3, DefaultChunkSize, MaxChunkSize, MaxChunkSize + 1, 2 * MaxChunkSize, 1 << 31, 1<<32 - 1}
	for _, size := range sizes {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			h, _, err := newHeader(key, MinChunkSize)
			must(t, err)
			binary.BigEndian.PutUint32(h[16:20], size)
			k, aead, err := fileKey(key, &h)
			must(t, err)
			copy(h[commitmentAt:], commitment(k, h[:commitmentAt]))
			var nonce [12]byte
			setNonce(&nonce, 0, true)
			b := make([]byte, PayloadOffset)
			copy(b, h[:])
			b = aead.Seal(b, nonce[:], []byte("little"), h[:])

			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			f, err := OpenFile(key, bytes.NewReader(b), int64(len(b)))
			if err == nil {
				_, err = f.WriteTo(io.Discard)
			}
			runtime.ReadMemStats(&after)
			if good := checkChunkSize(int(size)) == nil; (err == nil) != good {
				t.Errorf("opened: %v", err)
			}
			if n := after.TotalAlloc - before.TotalAlloc; n > 256<<10 {
				t.Errorf("took %d bytes for a file of %d", n, len(b))
			}
		})
	}
}
