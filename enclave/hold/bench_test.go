package hold_test

import (
	"crypto/aes"
	"crypto/cipher"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/coffer-run/coffer/enclave/dma"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/enclave/seal"
)

// benchSize is a file that is larger than any cache and fits a small machine.
const benchSize = 512 << 20

// zeros is a source that costs nothing to read.
type zeros struct{}

func (zeros) ReadAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (zeros) Close() error                          { return nil }

func benchSealed(b *testing.B) (*seal.OpenedFile, func()) {
	b.Helper()
	key := keys.GenerateDataKey()
	dir := b.TempDir()
	s, err := seal.Seal(b.Context(), key, "a", []seal.Source{{Name: "f", Size: benchSize, Open: func() (seal.Reader, error) { return zeros{}, nil }}}, dir+"/s", seal.Options{})
	if err != nil {
		b.Fatal(err)
	}
	root, err := os.OpenRoot(dir + "/s")
	if err != nil {
		b.Fatal(err)
	}
	f, err := seal.ReadFolder(root, "a", s.Digest)
	if err != nil {
		b.Fatal(err)
	}
	es, err := f.Entries(key)
	if err != nil {
		b.Fatal(err)
	}
	o, err := f.Open(key, es[0])
	if err != nil {
		b.Fatal(err)
	}
	return o, func() { _, _ = o.Close(), root.Close() }
}

// BenchmarkCipher is what the others are held against: one AEAD call per chunk,
// resident to resident, as many workers as cores.
func BenchmarkCipher(b *testing.B) {
	block, err := aes.NewCipher(make([]byte, 32))
	if err != nil {
		b.Fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		b.Fatal(err)
	}
	const chunk = seal.DefaultChunkSize
	src := make([]byte, 0, 128<<20+16*128)
	for range 128 {
		src = aead.Seal(src, make([]byte, 12), make([]byte, chunk), nil)
	}
	dst := make([]byte, 128<<20)
	b.SetBytes(int64(len(dst)))
	for b.Loop() {
		var next atomic.Int64
		var wg sync.WaitGroup
		for range runtime.GOMAXPROCS(0) {
			wg.Go(func() {
				nonce := make([]byte, 12)
				for {
					i := int(next.Add(1) - 1)
					if i >= 128 {
						return
					}
					if _, err := aead.Open(dst[i*chunk:i*chunk], nonce, src[i*(chunk+16):(i+1)*(chunk+16)], nil); err != nil {
						b.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
	}
}

func BenchmarkPrefault(b *testing.B) {
	b.SetBytes(benchSize)
	for b.Loop() {
		r, err := dma.New("bench", benchSize)
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := r.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// BenchmarkFillFresh decrypts a file in the page cache into a new region.
func BenchmarkFillFresh(b *testing.B) {
	o, done := benchSealed(b)
	defer done()
	b.SetBytes(benchSize)
	for b.Loop() {
		r, err := dma.New("bench", o.Size())
		if err != nil {
			b.Fatal(err)
		}
		if err := r.Fill(b.Context(), o.ChunkSize(), 0, func() func(int64, []byte) error { return o.Worker().ReadChunk }); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := r.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// BenchmarkFillPrefaulted is the same into a region that was there before.
func BenchmarkFillPrefaulted(b *testing.B) {
	o, done := benchSealed(b)
	defer done()
	r, err := dma.New("bench", o.Size())
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	b.SetBytes(benchSize)
	for b.Loop() {
		if err := r.Fill(b.Context(), o.ChunkSize(), 0, func() func(int64, []byte) error { return o.Worker().ReadChunk }); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkScrub(b *testing.B) {
	b.SetBytes(benchSize)
	for b.Loop() {
		b.StopTimer()
		r, err := dma.New("bench", benchSize)
		if err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		if err := r.Scrub(); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := r.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// BenchmarkSeal seals to a disk whose cache takes it.
func BenchmarkSeal(b *testing.B) {
	key := keys.GenerateDataKey()
	b.SetBytes(benchSize)
	for b.Loop() {
		b.StopTimer()
		dir, err := os.MkdirTemp("", "coffer-bench")
		if err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		_, err = seal.Seal(b.Context(), key, "a", []seal.Source{{Name: "f", Size: benchSize, Open: func() (seal.Reader, error) { return zeros{}, nil }}}, dir+"/s", seal.Options{})
		b.StopTimer()
		if err != nil {
			b.Fatal(err)
		}
		if err := os.RemoveAll(dir); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
