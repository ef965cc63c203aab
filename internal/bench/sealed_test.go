package bench

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/enclave/dma"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/enclave/seal"
)

const (
	// fileSize is larger than any cache and fits a small machine.
	fileSize = 512 << 20
	chunk    = seal.DefaultChunkSize
	tag      = 16
)

// fileRounds is few, for each takes seconds.
const fileRounds = 7

// each calls f for every i below n, from as many goroutines as there are cores.
func each(n int, f func(i int)) {
	var next atomic.Int64
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				f(i)
			}
		})
	}
	wg.Wait()
}

func gcm(t *testing.T) cipher.AEAD {
	t.Helper()
	block := must[cipher.Block](t)(aes.NewCipher(make([]byte, 32)))
	return must[cipher.AEAD](t)(cipher.NewGCM(block))
}

func rate(d time.Duration) float64 { return fileSize / d.Seconds() / 1e9 }

type memory struct{ *bytes.Reader }

func (memory) Close() error { return nil }

// plaintext has every page in memory.
func plaintext() []byte {
	b := make([]byte, fileSize)
	for i := 0; i < len(b); i += 512 {
		b[i] = byte(i >> 9)
	}
	return b
}

func source(b []byte) []seal.Source {
	return []seal.Source{{Name: "f", Size: int64(len(b)), Open: func() (seal.Reader, error) { return memory{bytes.NewReader(b)}, nil }}}
}

// regions measures how a sealed file, in the page cache, gets into memory.
func regions(t *testing.T) []row {
	key := keys.GenerateDataKey()
	plain := plaintext()
	dir := filepath.Join(t.TempDir(), "sealed")
	s := must[seal.Sealed](t)(seal.Seal(t.Context(), key, "a", source(plain), dir, seal.Options{}))
	root := must[*os.Root](t)(os.OpenRoot(dir))
	t.Cleanup(func() { root.Close() })
	folder := must[*seal.Folder](t)(seal.ReadFolder(root, "a", s.Digest))
	entries := must[[]seal.Entry](t)(folder.Entries(key))
	f := must[*seal.OpenedFile](t)(folder.Open(key, entries[0]))
	t.Cleanup(func() { f.Close() })
	inPlace := must[*seal.OpenedFile](t)(folder.Open(key, entries[0]))
	t.Cleanup(func() { inPlace.Close() })
	inPlace.Map()

	// The cipher alone, from memory to memory that is there.
	aead, nonce := gcm(t), make([]byte, 12)
	const window = 128
	sealed := make([]byte, 0, window*(chunk+tag))
	for i := range window {
		sealed = aead.Seal(sealed, nonce, plain[i*chunk:(i+1)*chunk], nil)
	}
	opened := plain
	open := func() time.Duration {
		began := time.Now()
		each(fileSize/chunk, func(i int) {
			j := i % window
			if _, err := aead.Open(opened[i*chunk:i*chunk], nonce, sealed[j*(chunk+tag):(j+1)*(chunk+tag)], nil); err != nil {
				t.Error(err)
			}
		})
		return time.Since(began)
	}
	// New pages alone, shared memory as regions are made of.
	prefault := func() time.Duration {
		fd := must[int](t)(unix.MemfdCreate("bench", unix.MFD_CLOEXEC))
		defer unix.Close(fd)
		if err := unix.Ftruncate(fd, fileSize); err != nil {
			t.Fatal(err)
		}
		mem := must[[]byte](t)(unix.Mmap(fd, 0, fileSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED))
		const piece = 16 << 20
		began := time.Now()
		each(fileSize/piece, func(i int) {
			if err := unix.Madvise(mem[i*piece:(i+1)*piece], unix.MADV_POPULATE_WRITE); err != nil {
				t.Error(err)
			}
		})
		took := time.Since(began)
		if err := unix.Munmap(mem); err != nil {
			t.Fatal(err)
		}
		return took
	}
	fill := func(r *dma.Region, f *seal.OpenedFile) {
		if err := r.Fill(t.Context(), f.ChunkSize(), 0, func() func(int64, []byte) error { return f.Worker().ReadChunk }); err != nil {
			t.Fatal(err)
		}
	}
	fresh := func() time.Duration {
		began := time.Now()
		r := must[*dma.Region](t)(dma.New("bench", f.Size()))
		fill(r, inPlace)
		took := time.Since(began)
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		return took
	}
	kept := must[*dma.Region](t)(dma.New("bench", f.Size()))
	t.Cleanup(func() { kept.Close() })
	again := func(f *seal.OpenedFile) func() time.Duration {
		return func() time.Duration { return timed(1, func() { fill(kept, f) }) }
	}
	m, ratio := rounds(t, fileRounds, func(s sample) float64 { return float64(s[1]+s[2]) / float64(s[0]) }, fresh, open, prefault)
	k, copied := rounds(t, fileRounds, func(s sample) float64 { return float64(s[1]) / float64(s[0]) }, again(f), open, again(inPlace))
	_, mapped := rounds(t, fileRounds, func(s sample) float64 { return float64(s[1]) / float64(s[0]) }, again(inPlace), open)
	out := []row{
		atLeast("sealed file to fresh region / 1/(1/cipher + 1/prefault)", ratio, "x", 0.90),
		info("  sealed file to fresh region", rate(m[0]), "GB/s"),
		info("  cipher, AES-256-GCM open, resident to resident, all cores", rate(m[1]), "GB/s"),
		info("  prefault of new shared memory, all cores", rate(m[2]), "GB/s"),
		atLeast("sealed file, read, to a region whose memory is there / cipher", copied, "x", 0.65),
		atLeast("sealed file, mapped, to a region whose memory is there / cipher", mapped, "x", 0.90),
		info("  sealed file, read, to a region whose memory is there", rate(k[0]), "GB/s"),
		info("  sealed file, mapped, to a region whose memory is there", rate(k[2]), "GB/s"),
	}
	// What people seal files with, beside both of ours in every round.
	for _, o := range []other{age, gocryptfs} {
		read, missing := o.prepare(t, plain)
		if missing != "" {
			out = append(out, info("pool, fresh / "+o.name+" on the same bytes: not measured, "+missing, 0, ""))
			continue
		}
		m, ratio := rounds(t, 3, func(s sample) float64 { return float64(s[0]) / float64(s[1]) }, read, again(inPlace), fresh)
		out = append(out,
			atLeast("sealed file to a region whose memory is there / "+o.name+" on the same bytes", ratio, "x", 4),
			atLeast("sealed file to fresh region / "+o.name+" on the same bytes", float64(m[0])/float64(m[2]), "x", 2),
			info("  "+o.name, rate(m[0]), "GB/s"),
		)
	}
	return out
}
