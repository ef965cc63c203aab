// Package mutatetest holds a reader of evidence against every small change of
// what it accepts: each bit, each length at which it could be cut off, each length
// field at 0, 1 and its largest value. With -short and under the race detector it
// takes a sample of the bits. A change that is accepted, a panic, and
// memory without bound fail the test.
package mutatetest

import (
	"bytes"
	"runtime"
	"runtime/metrics"
	"sync"
	"sync/atomic"
	"testing"
)

// Length is where a length field or a count lies.
type Length struct {
	// At is its offset, Size its bytes: 1 to 8.
	At, Size int
	// Big is true if its first byte is the highest.
	Big bool
}

// Target is what is changed, and who looks at it.
type Target struct {
	// Kind is what the output calls it.
	Kind string
	// Good is accepted as it is.
	Good []byte
	// Lengths are all that Good has.
	Lengths []Length
	// Accepts reports whether b would count as evidence. It may be called by
	// several at once, and must not keep b.
	Accepts func(b []byte) bool
	// Free reports whether nothing covers a bit, so that a change of it may be
	// accepted. Nil means that all are covered.
	Free func(bit int) bool
	// Whole reports whether nothing is lost by cutting Good off at n. Nil means
	// that everything is needed.
	Whole func(n int) bool
	// Every takes one bit in so many, and one truncation in so many bytes; odd, so
	// that each bit of a byte has its turn. 0 takes all. It is for what takes
	// milliseconds to look at.
	Every int
	// MaxAlloc bounds what one look may allocate, in bytes.
	MaxAlloc uint64
}

// allocated returns the bytes allocated so far. It does not stop the world; small
// objects count a span at a time.
func allocated() uint64 {
	s := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}

// sample is of how many bits one is looked at where there is no time for all: with
// -short, and under the race detector, which makes elliptic curves ten times
// slower.
const sample = 23

// Run makes every change. Its counts are in the test's output.
func Run(t *testing.T, x Target) {
	t.Helper()
	if !x.Accepts(bytes.Clone(x.Good)) {
		t.Fatalf("%s: what is good is refused", x.Kind)
	}
	every := max(1, x.Every)
	if raceDetector || testing.Short() {
		every *= sample
	}
	var flips, free atomic.Int64
	var next atomic.Int64
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			b := bytes.Clone(x.Good)
			for {
				bit := int(next.Add(int64(every))) - every
				if bit >= 8*len(b) || t.Failed() {
					return
				}
				b[bit/8] ^= 1 << (bit % 8)
				switch ok := x.Accepts(b); {
				case !ok:
					flips.Add(1)
				case x.Free != nil && x.Free(bit):
					free.Add(1)
				default:
					t.Errorf("%s: accepted with bit %d of byte %d flipped", x.Kind, bit%8, bit/8)
				}
				b[bit/8] ^= 1 << (bit % 8)
			}
		})
	}
	workers.Wait()

	var most uint64
	refused := func(what string, at int, b []byte) bool {
		t.Helper()
		before := allocated()
		ok := x.Accepts(b)
		if n := allocated() - before; n > most {
			if most = n; n > x.MaxAlloc {
				t.Errorf("%s: %s at %d allocates %d bytes, at most %d are allowed", x.Kind, what, at, n, x.MaxAlloc)
			}
		}
		return !ok
	}
	cuts := 0
	for n := 0; n < len(x.Good); n += max(1, every/8) {
		if !refused("truncation", n, bytes.Clone(x.Good[:n])) && (x.Whole == nil || !x.Whole(n)) {
			t.Errorf("%s: accepted when cut off at %d of %d bytes", x.Kind, n, len(x.Good))
		}
		cuts++
	}
	lengths := 0
	for _, l := range x.Lengths {
		for _, v := range []uint64{0, 1, 1<<(8*l.Size) - 1} {
			b := bytes.Clone(x.Good)
			for i := range l.Size {
				shift := 8 * i
				if l.Big {
					shift = 8 * (l.Size - 1 - i)
				}
				b[l.At+i] = byte(v >> shift)
			}
			if bytes.Equal(b, x.Good) {
				continue
			}
			if !refused("length field", l.At, b) {
				t.Errorf("%s: accepted with the length at %d set to %d", x.Kind, l.At, v)
			}
			lengths++
		}
	}
	t.Logf("mutations of %s: %d flips refused, %d in what nothing covers; %d truncations and %d length fields refused; at most %d KiB allocated",
		x.Kind, flips.Load(), free.Load(), cuts, lengths, (most+1023)/1024)
}
