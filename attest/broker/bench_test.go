package broker_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

// prepared is one release that is ready to be asked for, by a job of its own.
type prepared struct {
	token              string
	request, signature []byte
}

func prepare(b *testing.B, n int) (*world, []prepared) {
	b.Helper()
	w := newWorld(b, false)
	g := w.grant(b, func(n *broker.NewGrant) { n.MaxReleases = broker.MaxGrantReleases })
	// The keys cost more to make than all the rest: jobs share a recipient key
	// up to the number of attempts that a grant allows.
	var jobs []*job
	out := make([]prepared, n)
	for i := range out {
		if i < broker.MaxGrantReleases {
			jobs = append(jobs, newJob(b, w, named(i)))
		}
		j := *jobs[i%len(jobs)]
		if i >= broker.MaxGrantReleases {
			j.attest(b, w, named(i%len(jobs)))
		}
		req, sig := sign(b, j.session, j.request(g, "weights"))
		out[i] = prepared{j.token, req, sig}
	}
	return w, out
}

// named gives every job an id of its own: the log entries of one are bounded.
func named(i int) func(*receipt.Result) {
	return func(r *receipt.Result) { r.JobID = fmt.Sprintf("job-%d", i) }
}

// BenchmarkRelease is one release after the other, each with its own commit. What
// it must cost at least is measured beside it in internal/bench.
func BenchmarkRelease(b *testing.B) {
	w, work := prepare(b, b.N)
	ctx := b.Context()
	took := make([]time.Duration, 0, len(work))
	b.ResetTimer()
	for _, p := range work {
		s := time.Now()
		if _, err := w.Release(ctx, node, broker.Ask{Result: p.token, Request: p.request, Signature: p.signature}); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(s))
	}
	b.StopTimer()
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-us")
}

// BenchmarkReleaseAtOnce has 16 clients ask, each for the next release as soon as it
// has one.
func BenchmarkReleaseAtOnce(b *testing.B) {
	w, work := prepare(b, b.N)
	ctx := b.Context()
	const clients = 16
	took := make([][]time.Duration, clients)
	b.ResetTimer()
	var wg sync.WaitGroup
	for i := range clients {
		wg.Go(func() {
			for k := i; k < len(work); k += clients {
				p, s := work[k], time.Now()
				if _, err := w.Release(ctx, node, broker.Ask{Result: p.token, Request: p.request, Signature: p.signature}); err != nil {
					b.Error(err)
				}
				took[i] = append(took[i], time.Since(s))
			}
		})
	}
	wg.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "releases/s")
	all := slices.Sorted(slices.Values(slices.Concat(took...)))
	b.ReportMetric(float64(all[len(all)/2].Microseconds()), "p50-us")
	b.ReportMetric(float64(all[len(all)*99/100].Microseconds()), "p99-us")
}

// BenchmarkCommit is one log entry in one durable transaction: the machine's
// fsync and little else.
func BenchmarkCommit(b *testing.B) {
	w := newWorld(b, false)
	i := uint64(0)
	for b.Loop() {
		if err := w.store.Update(b.Context(), func(ctx context.Context, tx broker.Tx) error {
			return tx.InsertEntry(ctx, translog.Entry{Index: 1<<40 + i, Body: make([]byte, 900), Hash: make([]byte, 48)}, "", "")
		}); err != nil {
			b.Fatal(err)
		}
		i++
	}
}
