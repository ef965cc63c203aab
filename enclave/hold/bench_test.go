package hold_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"errors"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/enclave/dma"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/enclave/seal"
)

// benchSize is a file that is larger than any cache and fits a small machine.
const benchSize = 1 << 30

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

// ratios collects, round by round, how long each way took, and reports the median
// rate of each and the median of each round's own ratios. A machine that has other
// work disturbs time but hardly processor time, so ratios come in both.
type ratios struct {
	b     *testing.B
	names []string
	times map[string][]took
}

type took struct{ wall, cpu time.Duration }

func cpuTime() time.Duration {
	var r unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &r)
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

func (r *ratios) time(name string, f func()) {
	began, cpu := time.Now(), cpuTime()
	f()
	t := took{time.Since(began), cpuTime() - cpu}
	if r.times == nil {
		r.times = map[string][]took{}
	}
	if r.times[name] == nil {
		r.names = append(r.names, name)
	}
	r.times[name] = append(r.times[name], t)
}

func (r *ratios) report(bytes float64) {
	for _, n := range r.names {
		var l []time.Duration
		for _, t := range r.times[n] {
			l = append(l, t.wall)
		}
		slices.Sort(l)
		r.b.ReportMetric(bytes/l[len(l)/2].Seconds()/1e9, n+"-GB/s")
	}
}

// ratio reports the median of what f makes of a round.
func (r *ratios) ratio(name string, f func(in func(string) float64) float64) {
	var wall, cpu []float64
	for i := range r.times[r.names[0]] {
		wall = append(wall, f(func(n string) float64 { return r.times[n][i].wall.Seconds() }))
		cpu = append(cpu, f(func(n string) float64 { return r.times[n][i].cpu.Seconds() }))
	}
	slices.Sort(wall)
	slices.Sort(cpu)
	r.b.ReportMetric(wall[len(wall)/2], name)
	r.b.ReportMetric(cpu[len(cpu)/2], name+"-by-cpu")
}

// BenchmarkRegions fills regions from a file in the page cache: a fresh one, and
// one of the pool whose pages are there. The cipher is one AEAD call per chunk,
// resident to resident, with as many workers.
func BenchmarkRegions(b *testing.B) {
	o, done := benchSealed(b)
	defer done()
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
	dst := make([]byte, benchSize)
	clear(dst)
	open := func() {
		var next atomic.Int64
		var wg sync.WaitGroup
		for range runtime.GOMAXPROCS(0) {
			wg.Go(func() {
				nonce := make([]byte, 12)
				for i := int(next.Add(1) - 1); i < benchSize/chunk; i = int(next.Add(1) - 1) {
					j := i % 128
					if _, err := aead.Open(dst[i*chunk:i*chunk], nonce, src[j*(chunk+16):(j+1)*(chunk+16)], nil); err != nil {
						b.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
	}
	check := func(err error) {
		if err != nil {
			b.Fatal(err)
		}
	}
	fill := func(r *dma.Region) {
		check(r.Fill(b.Context(), o.ChunkSize(), 0, func() func(int64, []byte) error { return o.Worker().ReadChunk }))
	}
	pool := dma.NewPool(benchSize)
	defer pool.Close()
	r, err := pool.Get("bench", o.Size())
	check(err)
	check(r.Prefault(b.Context(), 0))
	rs := &ratios{b: b}
	for b.Loop() {
		rs.time("cipher", open)
		rs.time("prefaulted", func() { fill(r) })
		check(pool.Put(r))
		r, err = pool.Get("bench", o.Size())
		check(err)
		fd, err := unix.MemfdCreate("bench", unix.MFD_CLOEXEC)
		check(err)
		check(unix.Ftruncate(fd, benchSize))
		mem, err := unix.Mmap(fd, 0, benchSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		check(err)
		rs.time("prefault", func() { populate(b, mem) })
		check(errors.Join(unix.Munmap(mem), unix.Close(fd)))
		var f *dma.Region
		rs.time("fresh", func() {
			f, err = dma.New("bench", o.Size())
			check(err)
			fill(f)
		})
		check(f.Close())
	}
	rs.report(benchSize)
	rs.ratio("prefaulted/cipher", func(in func(string) float64) float64 { return in("cipher") / in("prefaulted") })
	rs.ratio("fresh/floor", func(in func(string) float64) float64 { return (in("cipher") + in("prefault")) / in("fresh") })
}

// populate is the floor for new memory: every core faults pages in, and no more.
func populate(b *testing.B, mem []byte) {
	const piece = 16 << 20
	var next atomic.Int64
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for at := next.Add(piece) - piece; at < int64(len(mem)); at = next.Add(piece) - piece {
				if err := unix.Madvise(mem[at:at+piece], unix.MADV_POPULATE_WRITE); err != nil {
					b.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func BenchmarkScrub(b *testing.B) {
	b.SetBytes(benchSize)
	for b.Loop() {
		b.StopTimer()
		r, err := dma.New("bench", benchSize)
		if err != nil {
			b.Fatal(err)
		}
		if err := r.Prefault(b.Context(), 0); err != nil {
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

// BenchmarkSeal seals from memory to disk, durable when it returns, beside the
// cipher alone and the disk alone.
func BenchmarkSeal(b *testing.B) {
	key := keys.GenerateDataKey()
	check := func(err error) {
		if err != nil {
			b.Fatal(err)
		}
	}
	block, err := aes.NewCipher(make([]byte, 32))
	check(err)
	aead, err := cipher.NewGCM(block)
	check(err)
	const chunk = seal.DefaultChunkSize
	plain := make([]byte, benchSize)
	for i := 0; i < len(plain); i += 512 {
		plain[i] = byte(i >> 9)
	}
	each := func(f func(at int)) {
		var next atomic.Int64
		var wg sync.WaitGroup
		for range runtime.GOMAXPROCS(0) {
			wg.Go(func() {
				for at := next.Add(chunk) - chunk; at < benchSize; at = next.Add(chunk) - chunk {
					f(int(at))
				}
			})
		}
		wg.Wait()
	}
	dir := b.TempDir()
	rs := &ratios{b: b}
	bufs := sync.Pool{New: func() any { return new([chunk + 16]byte) }}
	for b.Loop() {
		rs.time("seal", func() {
			_, err := seal.Seal(b.Context(), key, "a", []seal.Source{{Name: "f", Size: benchSize, Open: func() (seal.Reader, error) { return memReader{bytes.NewReader(plain)}, nil }}}, dir+"/s", seal.Options{})
			check(err)
		})
		check(os.RemoveAll(dir + "/s"))
		rs.time("cipher", func() {
			each(func(at int) {
				out := bufs.Get().(*[chunk + 16]byte)
				aead.Seal(out[:0], make([]byte, 12), plain[at:at+chunk], nil)
				bufs.Put(out)
			})
		})
		f, err := os.Create(dir + "/plain")
		check(err)
		rs.time("disk", func() {
			each(func(at int) {
				if _, err := f.WriteAt(plain[at:at+chunk], int64(at)); err != nil {
					b.Error(err)
				}
			})
			check(f.Sync())
		})
		check(f.Close())
		check(os.Remove(dir + "/plain"))
		// What the format asks for beside the cipher: digests of both sides.
		rs.time("sha256", func() { each(func(at int) { sha256.Sum256(plain[at : at+chunk]) }) })
	}
	rs.report(benchSize)
	rs.ratio("seal/floor", func(in func(string) float64) float64 { return max(in("cipher"), in("disk")) / in("seal") })
}
