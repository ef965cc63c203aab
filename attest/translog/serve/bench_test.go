package serve

import (
	"slices"
	"testing"
	"time"
)

// BenchmarkSequence copies 2048 entries into a new tree, to a signed checkpoint.
func BenchmarkSequence(b *testing.B) {
	const entries = 2048
	for b.Loop() {
		b.StopTimer()
		m := newMemory(b, entries)
		l := open(b, config(b, m))
		b.StartTimer()
		stop := start(b, l)
		published(b, l, entries)
		b.StopTimer()
		check(b, stop())
		b.StartTimer()
	}
	b.ReportMetric(float64(b.N)*entries/b.Elapsed().Seconds(), "entries/s")
}

// BenchmarkProof is from an entry's commit to a checkpoint and a proof of it.
func BenchmarkProof(b *testing.B) {
	m := newMemory(b, 1)
	l := open(b, config(b, m))
	start(b, l)
	published(b, l, 1)
	var took []time.Duration
	for n := 1; b.Loop(); n++ {
		began := time.Now()
		m.grow(b, 1)
		l.Wake()
		if _, err := l.Proofs(b.Context(), []uint64{uint64(n)}); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
}
