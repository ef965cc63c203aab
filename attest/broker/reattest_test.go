package broker_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hpke"
	"crypto/rand"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

// planned is aPlan with a rule for later attestations.
func planned(t testing.TB, r *plan.Reattest) ([]byte, plan.Digest) {
	t.Helper()
	canonical, _ := aPlan(t)
	p := must[plan.Plan](t)(plan.Parse(canonical))
	p.Reattest = r
	b := must[[]byte](t)(p.Canonical())
	return b, plan.Sum(b)
}

// runs is a job that has the key of data under a plan.
func (w *world) runs(t testing.TB, id string, r *plan.Reattest, change func(*receipt.Result)) *job {
	t.Helper()
	canonical, digest := planned(t, r)
	g := w.grant(t, func(n *broker.NewGrant) {
		n.Plan, n.Assets, n.AllowSimulated = digest, []string{"data"}, w.cfg.Simulation
	})
	j := newJob(t, w, func(r *receipt.Result) {
		claimed(r)
		r.JobID, r.PlanDigest = id, digest
		if change != nil {
			change(r)
		}
	})
	req, sig := sign(t, j.session, j.request(g, "data"))
	must[broker.Answer](t)(w.Release(t.Context(), node, broker.Ask{Result: j.token, Request: req, Signature: sig, Plan: canonical}))
	return j
}

// again gets a running job its next result.
func (j *job) again(t testing.TB, w *world, change func(*receipt.Result)) string {
	t.Helper()
	id, p := j.result.JobID, j.result.PlanDigest
	j.attest(t, w, func(r *receipt.Result) {
		claimed(r)
		r.JobID, r.PlanDigest = id, p
		if change != nil {
			change(r)
		}
	})
	return j.token
}

// refusedBy makes a result one that does not affirm.
func refusedBy(id string) func(*receipt.Result) {
	return func(r *receipt.Result) {
		s := r.Submods["cpu0"]
		s.Status = receipt.Contraindicated
		s.Checks.Fail(id, "this", "that", "")
		r.Submods["cpu0"] = s
	}
}

func reattestFailed(err error) []string {
	var r *check.Refusal
	if !errors.As(err, &r) || r.Stage != "reattest" {
		return nil
	}
	var ids []string
	for _, c := range r.Checks.Failed() {
		ids = append(ids, c.ID)
	}
	return ids
}

func TestANewResultKeepsALease(t *testing.T) {
	for name, tc := range map[string]struct {
		policy int64
		plan   *plan.Reattest
		want   int64
	}{
		"the asset's policy asks":    {policy: 60, want: 60},
		"the plan asks":              {plan: &plan.Reattest{EverySeconds: 30, WithinSeconds: 10}, want: 40},
		"both ask, the policy more":  {policy: 20, plan: &plan.Reattest{EverySeconds: 30, WithinSeconds: 10}, want: 20},
		"both ask, the plan more":    {policy: 100, plan: &plan.Reattest{EverySeconds: 30, WithinSeconds: 10}, want: 40},
		"the plan has a default end": {plan: &plan.Reattest{EverySeconds: 30}, want: 30 + plan.DefaultReattestWithin},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, false)
			w.policy(t, "data", func(p *broker.Policy) { p.MaxResultAgeSeconds = tc.policy })
			j := w.runs(t, "job-1", tc.plan, nil)
			for range 3 {
				w.advance(time.Duration(tc.want) * time.Second)
				if l, refused := w.renew(t, j); l.State != receipt.LeaseRunning {
					t.Fatalf("a result of just that age: %+v, %s", l, refused)
				}
				if err := w.Reattest(t.Context(), node, "job-1", j.again(t, w, nil)); err != nil {
					t.Fatal(err)
				}
			}
			// An agent that attests no more loses the lease, whatever it says.
			w.advance(time.Duration(tc.want+1) * time.Second)
			l, _ := w.renew(t, j)
			if l.State != receipt.LeaseStop || l.Reason != receipt.LateReason(j.result.IssuedAt, tc.want) || l.Grace() != broker.DefaultGrace {
				t.Errorf("%+v", l)
			}
			if got := reattestFailed(w.Reattest(t.Context(), node, "job-1", j.again(t, w, nil))); !slices.Equal(got, []string{"reattest.stopped"}) {
				t.Errorf("after the stop: %v", got)
			}
			if kinds := w.kindsOf(t, "job-1"); !slices.Equal(kinds, []translog.Kind{translog.KindRelease, translog.KindReattest, translog.KindReattest, translog.KindReattest, translog.KindStop}) {
				t.Errorf("%v", kinds)
			}
		})
	}
	t.Run("nobody asks", func(t *testing.T) {
		w := newWorld(t, false)
		j := w.runs(t, "job-1", nil, nil)
		w.advance(90 * 24 * time.Hour)
		if l, refused := w.renew(t, j); l.State != receipt.LeaseRunning {
			t.Errorf("%+v, %s", l, refused)
		}
	})
}

func TestReleaseSaysHowOldAResultMayBecome(t *testing.T) {
	asks := &plan.Reattest{EverySeconds: 10, WithinSeconds: 5}
	for name, tc := range map[string]struct {
		plan   *plan.Reattest
		hidden bool
		policy int64
		want   int64
	}{
		"nobody asks":                            {},
		"the plan asks":                          {plan: asks, want: 15},
		"the policy asks for more":               {plan: asks, policy: 12, want: 12},
		"the policy asks for less":               {plan: asks, policy: 60, want: 15},
		"the plan asks and is not shown":         {plan: asks, hidden: true, want: broker.MinResultAge},
		"the plan is not shown":                  {hidden: true, want: broker.MinResultAge},
		"the plan is not shown, the policy asks": {hidden: true, policy: 60, want: broker.MinResultAge},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, false)
			w.policy(t, "data", func(p *broker.Policy) { p.MaxResultAgeSeconds = tc.policy })
			canonical, digest := planned(t, tc.plan)
			g := w.grant(t, func(n *broker.NewGrant) { n.Plan = digest })
			j := newJob(t, w, func(r *receipt.Result) { claimed(r); r.PlanDigest = digest })
			req, sig := sign(t, j.session, j.request(g, "data"))
			ask := broker.Ask{Result: j.token, Request: req, Signature: sig, Plan: canonical}
			if tc.hidden {
				ask.Plan = nil
			}
			// What was answered stays, also when the plan is shown later.
			for range 2 {
				a := must[broker.Answer](t)(w.Release(t.Context(), node, ask))
				var r receipt.Release
				if err := w.brokerKeys.Open(receipt.TypeRelease, a.Receipt, &r); err != nil || r.ResultSeconds != tc.want {
					t.Errorf("%d s, %v", r.ResultSeconds, err)
				}
				ask.Plan = canonical
			}
			w.advance(time.Duration(tc.want+1) * time.Second)
			if l, refused := w.renew(t, j); (l.State == receipt.LeaseRunning) != (tc.want == 0) {
				t.Errorf("%+v, %s", l, refused)
			}
		})
	}
}

func TestARefusedResultEndsTheJob(t *testing.T) {
	w := newWorld(t, false)
	j := w.runs(t, "job-1", nil, nil)
	if err := w.Reattest(t.Context(), node, "job-1", j.again(t, w, refusedBy("snp.tcb"))); err != nil {
		t.Fatal(err)
	}
	l, _ := w.renew(t, j)
	if l.State != receipt.LeaseStop || l.Reason != "reattest-refused: cpu0 contraindicated, snp.tcb" || l.GraceSeconds != 0 {
		t.Errorf("%+v", l)
	}
	// What affirms again comes too late, and nothing more is released.
	if got := reattestFailed(w.Reattest(t.Context(), node, "job-1", j.again(t, w, nil))); !slices.Equal(got, []string{"reattest.stopped"}) {
		t.Errorf("%v", got)
	}
	g := w.grant(t, func(n *broker.NewGrant) { n.Plan = j.result.PlanDigest })
	if a, err := j.release(t, w.Broker, g, "weights"); a.Receipt != "" || !slices.Contains(failed(err), "job.stopped") {
		t.Errorf("released: %v", err)
	}
}

func TestAPausedJobWaitsForItsLeaseAtMost(t *testing.T) {
	pauses := &plan.Reattest{EverySeconds: 30, OnFailure: plan.ReattestPause}
	for _, tc := range []struct {
		name  string
		after time.Duration
		run   bool
	}{{"affirmed in time", broker.DefaultLease - time.Second, true}, {"too late", broker.DefaultLease, false}} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t, false)
			j := w.runs(t, "job-1", pauses, nil)
			if err := w.Reattest(t.Context(), node, "job-1", j.again(t, w, refusedBy("gpu.measurements"))); err != nil {
				t.Fatal(err)
			}
			if l, refused := w.renew(t, j); l.State != "" || !strings.HasPrefix(refused, "reattest-refused: ") {
				t.Fatalf("%+v, %q", l, refused)
			}
			g := w.grant(t, func(n *broker.NewGrant) { n.Plan = j.result.PlanDigest })
			j.again(t, w, nil)
			if a, err := j.release(t, w.Broker, g, "weights"); a.Receipt != "" || !slices.Equal(failed(err), []string{"job.stopped"}) {
				t.Errorf("released to a paused job: %v", err)
			}
			w.advance(tc.after)
			// A second refusal does not begin the time anew.
			err := w.Reattest(t.Context(), node, "job-1", j.again(t, w, refusedBy("gpu.measurements")))
			if tc.run != (err == nil) {
				t.Fatal(err)
			}
			if err := w.Reattest(t.Context(), node, "job-1", j.again(t, w, nil)); tc.run != (err == nil) {
				t.Fatal(err)
			}
			l, refused := w.renew(t, j)
			if tc.run && l.State != receipt.LeaseRunning || !tc.run && l.State != receipt.LeaseStop {
				t.Errorf("%+v, %q", l, refused)
			}
		})
	}
}

// TestResultsThatDoNotCount shows, for each check, a result in which only that
// check stands between the agent and a lease that goes on.
// onGPU makes a result one of a job with a GPU.
func onGPU(r *receipt.Result) {
	r.Submods["gpu0"] = receipt.Appraisal{Status: receipt.Affirming, Claims: map[string]any{"gpu.device": "1"}}
}

func TestResultsThatDoNotCount(t *testing.T) {
	other := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	for name, tc := range map[string]struct {
		change func(*testing.T, *world, *job, *receipt.Result)
		who    broker.Actor
		// show is what is shown in place of the result.
		show func(t *testing.T, w *world, j *job, token string) string
		want []string
	}{
		"another job's":    {change: func(_ *testing.T, _ *world, _ *job, r *receipt.Result) { r.JobID = "job-2" }, want: []string{"reattest.job"}},
		"another plan's":   {change: func(_ *testing.T, _ *world, _ *job, r *receipt.Result) { r.PlanDigest = plan.Sum([]byte("other")) }, want: []string{"reattest.plan"}},
		"another broker's": {change: func(_ *testing.T, _ *world, _ *job, r *receipt.Result) { r.Audience = "broker.other" }, want: []string{"reattest.audience"}},
		"another session key's": {change: func(t *testing.T, _ *world, _ *job, r *receipt.Result) {
			k := &job{session: other, recipient: must[hpke.PrivateKey](t)(hpke.MLKEM768X25519().GenerateKey())}
			w := newWorld(t, false)
			k.attest(t, w, nil)
			r.Confirmation.JWK = k.result.Confirmation.JWK
		}, want: []string{"reattest.session-key"}},
		"another recipient's": {change: func(t *testing.T, _ *world, _ *job, r *receipt.Result) {
			r.Confirmation.Recipient = must[hpke.PrivateKey](t)(hpke.MLKEM768X25519().GenerateKey()).PublicKey().Bytes()
		}, want: []string{"reattest.recipient"}},
		"another chip's": {change: func(_ *testing.T, _ *world, _ *job, r *receipt.Result) {
			r.Submods["cpu0"].Claims["snp.chip-id"] = strings.Repeat("c2", 64)
		}, want: []string{"reattest.chip"}},
		"another guest's": {change: func(_ *testing.T, _ *world, _ *job, r *receipt.Result) {
			r.Submods["cpu0"].Claims["snp.measurement"] = strings.Repeat("af", 48)
		}, want: []string{"reattest.measurement"}},
		"another sandbox's": {change: func(_ *testing.T, _ *world, _ *job, r *receipt.Result) { r.SandboxDigest = plan.Sum([]byte("other")) }, want: []string{"reattest.sandbox"}},
		"another GPU's": {change: func(_ *testing.T, _ *world, _ *job, r *receipt.Result) {
			r.Submods["gpu0"] = receipt.Appraisal{Status: receipt.Affirming, Claims: map[string]any{"gpu.device": "2"}}
		}, want: []string{"reattest.gpus"}},
		"without the GPU":                   {change: func(_ *testing.T, _ *world, _ *job, r *receipt.Result) { delete(r.Submods, "gpu0") }, want: []string{"reattest.gpus"}},
		"a simulation's, of a real release": {change: func(_ *testing.T, _ *world, _ *job, r *receipt.Result) { r.Simulated = true }, want: []string{"reattest.simulated"}},
		"kept back since before the newest": {change: func(_ *testing.T, _ *world, _ *job, r *receipt.Result) { r.IssuedAt -= 60; r.Expires -= 60 }, want: []string{"reattest.newer"}},
		"expired": {change: func(_ *testing.T, w *world, _ *job, r *receipt.Result) {
			w.advance(5 * time.Second)
			r.Expires = w.clock().Unix()
		}, want: []string{"reattest.expiry"}},
		"of tomorrow": {change: func(_ *testing.T, _ *world, _ *job, r *receipt.Result) { r.IssuedAt += 3600; r.Expires += 3600 }, want: []string{"reattest.expiry"}},
		"shown before": {show: func(t *testing.T, w *world, _ *job, token string) string {
			if err := w.Reattest(t.Context(), node, "job-1", token); err != nil {
				t.Fatal(err)
			}
			return token
		}, want: []string{"reattest.newer", "reattest.replay"}},
		"a nonce that was answered before": {change: func(t *testing.T, w *world, j *job, r *receipt.Result) {
			first := *r
			first.ID = rand.Text()
			if err := w.Reattest(t.Context(), node, "job-1", must[string](t)(w.verifier.Sign(receipt.TypeResult, first))); err != nil {
				t.Fatal(err)
			}
		}, want: []string{"reattest.replay"}},
		"a relying party's own check": {show: func(t *testing.T, w *world, j *job, _ string) string {
			return must[string](t)(w.verifier.Sign("evidence-check", j.result))
		}, want: []string{"result.signature"}},
		"signed by nobody known": {show: func(t *testing.T, _ *world, j *job, _ string) string {
			s, _ := newSigner(t, verifierID)
			return must[string](t)(s.Sign(receipt.TypeResult, j.result))
		}, want: []string{"result.signature"}},
		"by a verifier that is not trusted": {show: func(t *testing.T, _ *world, j *job, _ string) string {
			s, _ := newSigner(t, "verifier.other")
			j.result.Issuer = s.Issuer()
			return must[string](t)(s.Sign(receipt.TypeResult, j.result))
		}, want: []string{"result.issuer"}},
		"by an agent whose job it is not": {who: stranger, want: []string{"reattest.lease"}},
		"of a chip that was revoked": {change: func(t *testing.T, w *world, _ *job, _ *receipt.Result) {
			if _, _, err := w.RevokeTarget(t.Context(), broker.Actor{Role: "operator", Name: "olga"}, broker.Target{Kind: broker.RevokeChip, Value: chipID}, "gone"); err != nil {
				t.Fatal(err)
			}
		}, want: []string{"reattest.stopped"}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, true)
			w.policy(t, "data", func(p *broker.Policy) { p.MaxResultAgeSeconds = 60 })
			j := w.runs(t, "job-1", nil, onGPU)
			w.advance(50 * time.Second)
			token := j.again(t, w, func(r *receipt.Result) {
				onGPU(r)
				if tc.change != nil {
					tc.change(t, w, j, r)
				}
			})
			if tc.show != nil {
				token = tc.show(t, w, j, token)
			}
			who := node
			if tc.who.Name != "" {
				who = tc.who
			}
			if got := reattestFailed(w.Reattest(t.Context(), who, "job-1", token)); !slices.Equal(got, tc.want) {
				t.Fatalf("failed checks %v, want exactly %v", got, tc.want)
			}
		})
	}
	t.Run("a person", func(t *testing.T) {
		w := newWorld(t, false)
		j := w.runs(t, "job-1", nil, nil)
		if err := w.Reattest(t.Context(), alice, "job-1", j.again(t, w, nil)); !refusedWith(err, "role") {
			t.Error(err)
		}
	})
	t.Run("the trust vector that the policy asks for", func(t *testing.T) {
		w := newWorld(t, false)
		w.policy(t, "data", func(p *broker.Policy) { p.Affirming = []string{"hardware"} })
		sure := func(r *receipt.Result) {
			s := r.Submods["cpu0"]
			s.Vector.Hardware = 2
			r.Submods["cpu0"] = s
		}
		j := w.runs(t, "job-1", nil, sure)
		if err := w.Reattest(t.Context(), node, "job-1", j.again(t, w, sure)); err != nil {
			t.Error(err)
		}
		if got := reattestFailed(w.Reattest(t.Context(), node, "job-1", j.again(t, w, nil))); !slices.Equal(got, []string{"asset.affirming"}) {
			t.Errorf("%v", got)
		}
	})
}

// A job that has a key for which only real evidence was good enough does not keep
// it by results of a simulation, though another of its keys takes those.
func TestSimulatedResultsKeepNoRealKey(t *testing.T) {
	w := newWorld(t, true)
	canonical, digest := planned(t, nil)
	realOnly := w.grant(t, func(n *broker.NewGrant) { n.Plan, n.Assets = digest, []string{"data"} })
	either := w.grant(t, func(n *broker.NewGrant) { n.Plan, n.Assets, n.AllowSimulated = digest, []string{"weights"}, true })
	j := newJob(t, w, func(r *receipt.Result) { claimed(r); r.PlanDigest = digest })
	release := func(g broker.Grant, asset string) {
		t.Helper()
		req, sig := sign(t, j.session, j.request(g, asset))
		must[broker.Answer](t)(w.Release(t.Context(), node, broker.Ask{Result: j.token, Request: req, Signature: sig, Plan: canonical}))
	}
	release(realOnly, "data")
	simulated := func(r *receipt.Result) { r.Simulated = true }
	j.again(t, w, simulated)
	release(either, "weights")
	if got := reattestFailed(w.Reattest(t.Context(), node, "job-1", j.again(t, w, simulated))); !slices.Equal(got, []string{"reattest.simulated"}) {
		t.Errorf("%v", got)
	}
}

func TestResultAgesThatNoPolicyMayHave(t *testing.T) {
	w := newWorld(t, false)
	a := must[broker.Asset](t)(w.ReadAsset(t.Context(), alice, "data"))
	for _, age := range []int64{-1, 1, broker.MinResultAge - 1, broker.MaxResultAge + 1} {
		p := a.Policy
		p.MaxResultAgeSeconds = age
		if _, err := w.UpdateAssetPolicy(t.Context(), alice, "data", p, a.Labels, a.Revision, nil); !errors.Is(err, broker.ErrInvalid) {
			t.Errorf("%d s: %v", age, err)
		}
	}
}
