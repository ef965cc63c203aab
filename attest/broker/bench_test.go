package broker_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/hpke"
	"crypto/sha256"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

// prepared is one release that is ready to be asked for, by a job of its own.
type prepared struct {
	token              string
	request, signature []byte
	job                *job
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
		out[i] = prepared{j.token, req, sig, &j}
	}
	return w, out
}

// named gives every job an id of its own: the log entries of one are bounded.
func named(i int) func(*receipt.Result) {
	return func(r *receipt.Result) { r.JobID = fmt.Sprintf("job-%d", i) }
}

// BenchmarkRelease reports a release beside its floor measured in the same run:
// the signatures that it verifies and makes, the seal, and one durable commit.
func BenchmarkRelease(b *testing.B) {
	w, work := prepare(b, b.N)
	floorWork := work[:min(len(work), 500)]
	start := time.Now()
	for i, p := range floorWork {
		floor(b, w, uint64(i), p)
	}
	floorTime := time.Since(start) / time.Duration(len(floorWork))
	ctx := b.Context()
	took := make([]time.Duration, 0, len(work))
	b.ResetTimer()
	for _, p := range work {
		s := time.Now()
		if _, err := w.Release(ctx, node, p.token, p.request, p.signature); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(s))
	}
	b.StopTimer()
	slices.Sort(took)
	b.ReportMetric(float64(floorTime.Microseconds()), "floor-us/op")
	b.ReportMetric(float64(b.Elapsed())/float64(b.N)/float64(floorTime), "x-floor")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-us")
}

// BenchmarkReleaseParallel is as many releases as the machine's cores can do.
func BenchmarkReleaseParallel(b *testing.B) {
	w, work := prepare(b, b.N)
	ctx := b.Context()
	var next atomic.Int64
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			p := work[next.Add(1)-1]
			if _, err := w.Release(ctx, node, p.token, p.request, p.signature); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "releases/s")
}

// BenchmarkCommit is one log entry in one durable transaction: the machine's
// fsync and little else.
func BenchmarkCommit(b *testing.B) {
	w := newWorld(b, false)
	i := uint64(0)
	for b.Loop() {
		commit(b, w, i)
		i++
	}
}

func commit(b *testing.B, w *world, i uint64) {
	if err := w.store.Update(b.Context(), func(ctx context.Context, tx broker.Tx) error {
		return tx.InsertEntry(ctx, translog.Entry{Index: 1<<40 + i, Body: make([]byte, 900), Hash: make([]byte, 48)}, "", "")
	}); err != nil {
		b.Fatal(err)
	}
}

func floor(b *testing.B, w *world, i uint64, p prepared) {
	b.Helper()
	v, err := receipt.VerifyResult(w.cfg.Verifiers[0], p.token, receipt.Expect{Audience: brokerID, AnyJob: true}, w.clock())
	if err != nil {
		b.Fatal(err)
	}
	pub := must[*ecdsa.PublicKey](b)(v.SessionKey())
	sum := sha256.Sum256(p.request)
	if !ecdsa.VerifyASN1(pub, sum[:], p.signature) {
		b.Fatal("signature")
	}
	kem, kdf, aead := broker.Suite()
	rk := must[hpke.PublicKey](b)(kem.NewPublicKey(v.Result().Confirmation.Recipient))
	_, s, err := hpke.NewSender(rk, kdf, aead, []byte("info"))
	if err != nil {
		b.Fatal(err)
	}
	ct := must[[]byte](b)(s.Seal(nil, make([]byte, broker.DataKeySize)))
	commit(b, w, i)
	must[string](b)(w.cfg.Signer.Sign(receipt.TypeRelease, receipt.Release{Issuer: brokerID, WrappedDigest: plan.Sum(ct)}))
}
