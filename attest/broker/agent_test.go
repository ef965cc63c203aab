package broker_test

import (
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
)

// TestEndThatDidNotHappen: an agent that says that a job is gone, or logs its record,
// while its holder lives, has another key released to the job, under terms that do not
// stop it. The broker would then renew the lease of the holder, which has the first
// keys too, past what their owner said.
func TestEndThatDidNotHappen(t *testing.T) {
	reports := map[string]func(t *testing.T, w *world){
		"reported gone": func(t *testing.T, w *world) {
			if err := w.ReportStopped(t.Context(), node, "job-1", broker.Stopped{}); err != nil {
				t.Fatal(err)
			}
		},
		"record logged": func(t *testing.T, w *world) {
			must[string](t)(w.LogBundle(t.Context(), node, "job-1", plan.Sum([]byte("bundle"))))
		},
	}
	owners := map[string]func(t *testing.T, w *world, g broker.Grant){
		"the grant was taken back": func(t *testing.T, w *world, g broker.Grant) {
			must[broker.Grant](t)(w.Revoke(t.Context(), alice, g.ID, "leak"))
		},
		"the grant has ended, and with it its jobs": func(_ *testing.T, w *world, _ broker.Grant) { w.advance(time.Hour) },
		"results have become too old":               func(_ *testing.T, w *world, _ broker.Grant) { w.advance(40 * time.Minute) },
	}
	holders := map[string]func(t *testing.T, w *world, j *job, again func(*receipt.Result)) *job{
		"the same holder": func(t *testing.T, w *world, j *job, again func(*receipt.Result)) *job {
			j.attest(t, w, again)
			return j
		},
		"another holder": func(t *testing.T, w *world, _ *job, again func(*receipt.Result)) *job { return newJob(t, w, again) },
	}
	for said, report := range reports {
		for took, take := range owners {
			for whose, holder := range holders {
				t.Run(said+", "+took+", "+whose, func(t *testing.T) {
					w := newWorld(t, false)
					w.policy(t, "data", func(p *broker.Policy) { p.StopAtExpiry, p.MaxResultAgeSeconds = true, 1800 })
					j, g := w.run(t, "job-1")
					other := w.grant(t, func(n *broker.NewGrant) {
						n.Plan, n.Assets, n.NotAfter = g.Plan, []string{"weights"}, w.clock().Add(2*time.Hour)
					})
					report(t, w)
					take(t, w, g)
					a, err := holder(t, w, j, func(r *receipt.Result) { claimed(r); r.PlanDigest = g.Plan }).release(t, w.Broker, other, "weights")
					wantRefused(t, a, err, "job.ended")
					if l, _ := w.renew(t, j); l.State == receipt.LeaseRunning {
						t.Errorf("the holder that has the first keys goes on: %+v", l)
					}
				})
			}
		}
	}
}

// TestLeasesAreForTheLastHolder: an agent that was killed before it heard of a release
// begins the job again with another holder. The one before may live where the agent
// lies; results of the later one's machine must not keep its keys.
func TestLeasesAreForTheLastHolder(t *testing.T) {
	w := newWorld(t, false)
	first, g := w.run(t, "job-1")
	other := w.grant(t, func(n *broker.NewGrant) { n.Plan = g.Plan })
	second := newJob(t, w, func(r *receipt.Result) { claimed(r); r.PlanDigest = g.Plan })
	must[broker.Answer](t)(second.release(t, w.Broker, other, "weights"))
	c := challenge()
	r := must[[]broker.Renewed](t)(w.Renew(t.Context(), node, []broker.Renewal{{JobID: "job-1", Challenge: c}}))
	if _, err := receipt.VerifyLease(w.brokerKeys, r[0].Lease, "job-1", g.Plan, second.sessionDigest(t), c); err != nil {
		t.Error(err)
	}
	if _, err := receipt.VerifyLease(w.brokerKeys, r[0].Lease, "job-1", g.Plan, first.sessionDigest(t), c); err == nil || !strings.Contains(err.Error(), "lease.session") {
		t.Errorf("the holder before: %v", err)
	}
}
