package hold

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

type zeroContent int64

func (z zeroContent) size() int64                          { return int64(z) }
func (z zeroContent) open(<-chan struct{}) (source, error) { return z, nil }
func (zeroContent) fd() int                                { return -1 }
func (zeroContent) close()                                 {}

func (z zeroContent) read(dest []byte, off int64) (fuse.ReadResult, error) {
	return fuse.ReadResultData(dest[:min(int64(len(dest)), int64(z)-off)]), nil
}

// BenchmarkDecryptOnRead reads a file that is larger than the memory given for it,
// in order, 1 MiB at a time, beside one of which the server says nothing but zeros.
func BenchmarkDecryptOnRead(b *testing.B) {
	const size = 512 << 20
	f := onDemand(b, make([]byte, size))
	dir := shown(b, map[string]content{"sealed": f, "zeros": zeroContent(size)})

	// The reader is another process, as a job is: within one the runtime has both
	// sides wait for each other.
	read := func(name string) time.Duration {
		began := time.Now()
		out, err := exec.CommandContext(b.Context(), "dd", "if="+filepath.Join(dir, name), "of=/dev/null", "bs=1M").CombinedOutput()
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
	if err := f.d.close(); err != nil {
		b.Fatal(err)
	}
}
