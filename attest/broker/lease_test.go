package broker_test

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hpke"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

var (
	chipID      = strings.Repeat("c1", 64)
	measurement = strings.Repeat("ae", 48)
	imageDigest = "sha256:" + strings.Repeat("1a", 32)
)

// claimed puts a chip and a measurement into a result, as the verifier does.
func claimed(r *receipt.Result) {
	r.Submods = map[string]receipt.Appraisal{"cpu0": {Status: receipt.Affirming, Claims: map[string]any{"snp.chip-id": chipID, "snp.measurement": measurement}}}
}

func aPlan(t testing.TB) ([]byte, plan.Digest) {
	t.Helper()
	b := must[[]byte](t)(plan.Plan{
		Version: plan.Version, Name: "job", Image: imageDigest, Command: []string{"train"}, Inputs: []plan.Input{}, Output: plan.Output{LogBytes: 1},
		Resources: plan.Resources{CPUMillis: 1, MemoryBytes: 1, Pids: 1, MaxSeconds: 1}, Policy: plan.Policy{Name: "p", Digest: plan.Sum(nil)}, SandboxProfile: plan.Sum(nil),
	}.Canonical())
	return b, plan.Sum(b)
}

// run is a job that has the keys of weights and data.
func (w *world) run(t testing.TB, id string) (*job, broker.Grant) {
	t.Helper()
	canonical, digest := aPlan(t)
	g := w.grant(t, func(n *broker.NewGrant) { n.Plan = digest })
	j := newJob(t, w, func(r *receipt.Result) { claimed(r); r.JobID, r.PlanDigest = id, digest })
	for _, asset := range g.Assets {
		r := j.request(g, asset)
		r.Submitter = "engineer/erin"
		req, sig := sign(t, j.session, r)
		must[broker.Answer](t)(w.Release(t.Context(), node, broker.Ask{Result: j.token, Request: req, Signature: sig, Plan: canonical}))
	}
	return j, g
}

func (j *job) sessionDigest(t testing.TB) plan.Digest {
	t.Helper()
	return plan.Sum(must[[]byte](t)(x509.MarshalPKIXPublicKey(&j.session.PublicKey)))
}

func challenge() []byte {
	c := make([]byte, receipt.ChallengeSize)
	_, _ = rand.Read(c)
	return c
}

func (w *world) renew(t testing.TB, j *job) (receipt.Lease, string) {
	t.Helper()
	c := challenge()
	r := must[[]broker.Renewed](t)(w.Renew(t.Context(), node, []broker.Renewal{{JobID: j.result.JobID, Challenge: c}}))
	if len(r) != 1 || r[0].JobID != j.result.JobID || (r[0].Lease == "") == (r[0].Refused == "") {
		t.Fatalf("%+v", r)
	}
	if r[0].Refused != "" {
		return receipt.Lease{}, r[0].Refused
	}
	return must[receipt.Lease](t)(receipt.VerifyLease(w.brokerKeys, r[0].Lease, j.result.JobID, j.result.PlanDigest, j.sessionDigest(t), c)), ""
}

func (w *world) kindsOf(t testing.TB, job string) (kinds []translog.Kind) {
	t.Helper()
	bodies := must[[]translog.Body](t)(translog.VerifyJob(brokerID, job, must[[]translog.Entry](t)(w.Entries(t.Context(), alice, job))))
	for _, b := range bodies {
		kinds = append(kinds, b.Kind)
	}
	return kinds
}

func TestRenew(t *testing.T) {
	w := newWorld(t, false)
	j, _ := w.run(t, "job-1")
	k, _ := w.run(t, "job-2")
	before := w.kindsOf(t, "job-1")
	for range 3 {
		if l, refused := w.renew(t, j); l.State != receipt.LeaseRunning || l.Duration() != broker.DefaultLease || refused != "" {
			t.Errorf("%+v, %s", l, refused)
		}
	}
	if after := w.kindsOf(t, "job-1"); !slices.Equal(before, after) {
		t.Errorf("renewals were logged: %v", after)
	}
	c := [][]byte{challenge(), challenge(), challenge()}
	r := must[[]broker.Renewed](t)(w.Renew(t.Context(), node, []broker.Renewal{{"job-1", c[0]}, {"job-9", c[1]}, {"job-2", c[2]}}))
	if _, err := receipt.VerifyLease(w.brokerKeys, r[0].Lease, "job-1", j.result.PlanDigest, j.sessionDigest(t), c[0]); err != nil {
		t.Error(err)
	}
	if !strings.HasPrefix(r[1].Refused, "lease.missing:") || r[1].Lease != "" {
		t.Errorf("%+v", r[1])
	}
	if _, err := receipt.VerifyLease(w.brokerKeys, r[2].Lease, "job-2", k.result.PlanDigest, k.sessionDigest(t), c[2]); err != nil {
		t.Error(err)
	}
	r = must[[]broker.Renewed](t)(w.Renew(t.Context(), stranger, []broker.Renewal{{"job-1", c[0]}}))
	if !strings.HasPrefix(r[0].Refused, "job.agent:") || r[0].Lease != "" {
		t.Errorf("a stranger got %+v", r[0])
	}
	if _, err := w.Renew(t.Context(), alice, []broker.Renewal{{"job-1", c[0]}}); !refusedWith(err, "role") {
		t.Errorf("an owner renews: %v", err)
	}
	many := make([]broker.Renewal, broker.MaxRenewals+1)
	for name, l := range map[string][]broker.Renewal{"none": nil, "too many": many, "short challenge": {{"job-1", c[0][1:]}}, "no challenge": {{"job-1", nil}}, "no job": {{"", c[0]}}} {
		if _, err := w.Renew(t.Context(), node, l); !errors.Is(err, broker.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestLeaseIsTheStrictestPolicys(t *testing.T) {
	w := newWorld(t, false)
	w.policy(t, "weights", func(p *broker.Policy) { p.LeaseSeconds, p.GraceSeconds = 20, 3 })
	w.policy(t, "data", func(p *broker.Policy) { p.LeaseSeconds, p.GraceSeconds = 40, 30 })
	j, g := w.run(t, "job-1")
	if l, _ := w.renew(t, j); l.Seconds != 20 {
		t.Errorf("%d s", l.Seconds)
	}
	must[broker.Grant](t)(w.Revoke(t.Context(), alice, g.ID, "over"))
	if l, _ := w.renew(t, j); l.GraceSeconds != 3 {
		t.Errorf("%d s", l.GraceSeconds)
	}
}

// TestRevoke takes each thing back while job-1 runs under it and job-2 does not
// (where it can): job-1 is told to stop, and gets nothing more.
func TestRevokeStopsJobs(t *testing.T) {
	for name, tc := range map[string]struct {
		who    broker.Actor
		target func(g broker.Grant) broker.Target
		// stays says whether another job, under another grant, goes on.
		stays bool
	}{
		"grant by its owner":      {alice, func(g broker.Grant) broker.Target { return broker.Target{Kind: broker.RevokeGrant, Value: g.ID} }, true},
		"grant by the operator":   {oscar, func(g broker.Grant) broker.Target { return broker.Target{Kind: broker.RevokeGrant, Value: g.ID} }, true},
		"asset by its owner":      {alice, of(broker.RevokeAsset, "data"), false},
		"asset by the operator":   {oscar, of(broker.RevokeAsset, "data"), false},
		"agent":                   {oscar, of(broker.RevokePrincipal, "agent/node-1"), false},
		"submitter":               {oscar, of(broker.RevokePrincipal, "engineer/erin"), false},
		"requester":               {oscar, of(broker.RevokePrincipal, "owner/alice"), false},
		"node":                    {oscar, of(broker.RevokeNode, "node-1"), false},
		"chip":                    {oscar, of(broker.RevokeChip, chipID), false},
		"image":                   {oscar, of(broker.RevokeImage, imageDigest), false},
		"measurement":             {oscar, of(broker.RevokeMeasurement, measurement), false},
		"measurement by an owner": {alice, of(broker.RevokeMeasurement, measurement), false},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, false)
			j, g := w.run(t, "job-1")
			k, _ := w.run(t, "job-2")
			target := tc.target(g)
			rev, jobs, err := w.RevokeTarget(t.Context(), tc.who, target, "leaked")
			want := []string{"job-1", "job-2"}
			if tc.stays {
				want = want[:1]
			}
			if err != nil || !slices.Equal(jobs, want) || rev.Target != target || rev.By != tc.who.String() {
				t.Errorf("%+v, %v, %v", rev, jobs, err)
			}
			for range 2 {
				l, refused := w.renew(t, j)
				if l.State != receipt.LeaseStop || l.Reason != "revoked."+string(target.Kind)+": leaked" || l.Grace() != broker.DefaultGrace || refused != "" {
					t.Errorf("%+v, %s", l, refused)
				}
			}
			if l, _ := w.renew(t, k); (l.State == receipt.LeaseRunning) != tc.stays {
				t.Errorf("the other job: %+v", l)
			}
			if kinds := w.kindsOf(t, "job-1"); !slices.Equal(kinds[len(kinds)-1:], []translog.Kind{translog.KindStop}) || len(kinds) != 3 {
				t.Errorf("log %v", kinds)
			}
			// The answer that the job has already is not given again either.
			if a, err := j.release(t, w.Broker, g, "weights"); err == nil || a.Ciphertext != nil {
				t.Error("released again")
			}
			if _, again, err := w.RevokeTarget(t.Context(), tc.who, target, "twice"); err != nil || len(again) != 0 {
				t.Errorf("%v, %v", again, err)
			}
			gone := w.clock().Add(2 * time.Second)
			stop := broker.Stopped{Told: w.clock(), Gone: gone, Scrubbed: gone, Reason: "revoked"}
			for range 2 {
				if err := w.ReportStopped(t.Context(), node, "job-1", stop); err != nil {
					t.Error(err)
				}
			}
			if _, refused := w.renew(t, j); !strings.HasPrefix(refused, "lease.ended:") {
				t.Errorf("renewed after the end: %s", refused)
			}
			if kinds := w.kindsOf(t, "job-1"); !slices.Equal(kinds[len(kinds)-1:], []translog.Kind{translog.KindStopped}) || len(kinds) != 4 {
				t.Errorf("log %v", kinds)
			}
			if _, err := w.CheckLog(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

func of(kind broker.RevocationKind, value string) func(broker.Grant) broker.Target {
	return func(broker.Grant) broker.Target { return broker.Target{Kind: kind, Value: value} }
}

// TestRevokedBeforeTheRelease: the revocation is all that is between a new job
// and the key.
func TestRevokedBeforeTheRelease(t *testing.T) {
	canonical, digest := aPlan(t)
	for name, tc := range map[string]struct {
		who    broker.Actor
		target broker.Target
		change func(*receipt.Result)
		noPlan bool
		want   string // empty: released
	}{
		"asset":                            {who: alice, target: broker.Target{Kind: broker.RevokeAsset, Value: "weights"}, want: "revoked.asset"},
		"another asset of the grant":       {who: alice, target: broker.Target{Kind: broker.RevokeAsset, Value: "data"}},
		"agent":                            {who: oscar, target: broker.Target{Kind: broker.RevokePrincipal, Value: "agent/node-1"}, want: "revoked.principal"},
		"submitter":                        {who: oscar, target: broker.Target{Kind: broker.RevokePrincipal, Value: "engineer/erin"}, want: "revoked.principal"},
		"requester":                        {who: oscar, target: broker.Target{Kind: broker.RevokePrincipal, Value: "owner/alice"}, want: "revoked.principal"},
		"someone else":                     {who: oscar, target: broker.Target{Kind: broker.RevokePrincipal, Value: "engineer/eve"}},
		"node":                             {who: oscar, target: broker.Target{Kind: broker.RevokeNode, Value: "node-1"}, want: "revoked.node"},
		"another node":                     {who: oscar, target: broker.Target{Kind: broker.RevokeNode, Value: "node-11"}},
		"chip":                             {who: oscar, target: broker.Target{Kind: broker.RevokeChip, Value: chipID}, want: "revoked.chip-id"},
		"another chip":                     {who: oscar, target: broker.Target{Kind: broker.RevokeChip, Value: strings.Repeat("c2", 64)}},
		"a chip, and this one not known":   {who: oscar, target: broker.Target{Kind: broker.RevokeChip, Value: strings.Repeat("c2", 64)}, change: func(r *receipt.Result) { delete(r.Submods["cpu0"].Claims, "snp.chip-id") }, want: "revoked.chip-id"},
		"a chip, and this one no text":     {who: oscar, target: broker.Target{Kind: broker.RevokeChip, Value: chipID}, change: func(r *receipt.Result) { r.Submods["cpu0"].Claims["snp.chip-id"] = []any{chipID} }, want: "revoked.chip-id"},
		"measurement":                      {who: oscar, target: broker.Target{Kind: broker.RevokeMeasurement, Value: measurement}, want: "revoked.measurement"},
		"measurement for the owner":        {who: alice, target: broker.Target{Kind: broker.RevokeMeasurement, Value: measurement}, want: "revoked.measurement"},
		"measurement for another owner":    {who: bob, target: broker.Target{Kind: broker.RevokeMeasurement, Value: measurement}},
		"measurement, and it is not known": {who: oscar, target: broker.Target{Kind: broker.RevokeMeasurement, Value: strings.Repeat("00", 48)}, change: func(r *receipt.Result) { delete(r.Submods["cpu0"].Claims, "snp.measurement") }, want: "revoked.measurement"},
		"image":                            {who: oscar, target: broker.Target{Kind: broker.RevokeImage, Value: imageDigest}, want: "revoked.image"},
		"image, and the plan is not sent":  {who: oscar, target: broker.Target{Kind: broker.RevokeImage, Value: "sha256:" + strings.Repeat("00", 32)}, noPlan: true, want: "revoked.image"},
		"an image, the owner's, and the plan is not sent": {who: alice, target: broker.Target{Kind: broker.RevokeImage, Value: "sha256:" + strings.Repeat("00", 32)}, noPlan: true, want: "revoked.image"},
		"another owner's image, and the plan is not sent": {who: bob, target: broker.Target{Kind: broker.RevokeImage, Value: "sha256:" + strings.Repeat("00", 32)}, noPlan: true},
		"another owner's chip, and this one not known":    {who: bob, target: broker.Target{Kind: broker.RevokeChip, Value: strings.Repeat("c2", 64)}, change: func(r *receipt.Result) { delete(r.Submods["cpu0"].Claims, "snp.chip-id") }},
		"another image": {who: oscar, target: broker.Target{Kind: broker.RevokeImage, Value: "sha256:" + strings.Repeat("00", 32)}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, false)
			g := w.grant(t, func(n *broker.NewGrant) { n.Plan = digest })
			j := newJob(t, w, func(r *receipt.Result) {
				claimed(r)
				r.PlanDigest = digest
				if tc.change != nil {
					tc.change(r)
				}
			})
			if _, _, err := w.RevokeTarget(t.Context(), tc.who, tc.target, "bad"); err != nil {
				t.Fatal(err)
			}
			r := j.request(g, "weights")
			r.Submitter = "engineer/erin"
			req, sig := sign(t, j.session, r)
			ask := broker.Ask{Result: j.token, Request: req, Signature: sig, Plan: canonical}
			if tc.noPlan {
				ask.Plan = nil
			}
			a, err := w.Release(t.Context(), node, ask)
			if tc.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantRefused(t, a, err, tc.want)
		})
	}
}

// TestRevokedInTheTransaction is a revocation that commits between the first
// look and the release's transaction.
func TestRevokedInTheTransaction(t *testing.T) {
	w := newWorld(t, false)
	g := w.grant(t, nil)
	j := newJob(t, w, nil)
	b := w.with(t, &faulty{before: func() {
		if _, _, err := w.RevokeTarget(t.Context(), oscar, broker.Target{Kind: broker.RevokeNode, Value: "node-1"}, "stolen"); err != nil {
			t.Error(err)
		}
	}})
	a, err := j.release(t, b, g, "weights")
	wantRefused(t, a, err, "revoked.node")
}

func TestPlanOfTheRequest(t *testing.T) {
	w := newWorld(t, false)
	canonical, digest := aPlan(t)
	g := w.grant(t, func(n *broker.NewGrant) { n.Plan = digest })
	other := bytes.Replace(canonical, []byte(`"train"`), []byte(`"steal"`), 1)
	for name, sent := range map[string][]byte{"another plan": other, "no canonical form": append([]byte(" "), canonical...), "no plan": []byte("{}"), "noise": {0xff}} {
		j := newJob(t, w, func(r *receipt.Result) { r.PlanDigest = digest })
		req, sig := sign(t, j.session, j.request(g, "weights"))
		a, err := w.Release(t.Context(), node, broker.Ask{Result: j.token, Request: req, Signature: sig, Plan: sent})
		t.Log(name)
		wantRefused(t, a, err, "release.plan")
	}
}

func TestRevokeRefuses(t *testing.T) {
	w := newWorld(t, false)
	g := w.grant(t, nil)
	for name, tc := range map[string]struct {
		who    broker.Actor
		target broker.Target
		reason string
		want   string // check id, or "" for ErrInvalid
	}{
		"another's grant":    {bob, broker.Target{Kind: broker.RevokeGrant, Value: g.ID}, "x", "grant.owner"},
		"another's asset":    {bob, broker.Target{Kind: broker.RevokeAsset, Value: "data"}, "x", "asset.owner"},
		"as an engineer":     {erin, broker.Target{Kind: broker.RevokeNode, Value: "node-1"}, "x", "role"},
		"as an agent":        {node, broker.Target{Kind: broker.RevokeNode, Value: "node-2"}, "x", "role"},
		"no reason":          {oscar, broker.Target{Kind: broker.RevokeNode, Value: "node-1"}, "", ""},
		"long reason":        {oscar, broker.Target{Kind: broker.RevokeNode, Value: "node-1"}, strings.Repeat("x", broker.MaxReason+1), ""},
		"no kind":            {oscar, broker.Target{Value: "node-1"}, "x", ""},
		"unknown kind":       {oscar, broker.Target{Kind: "planet", Value: "node-1"}, "x", ""},
		"no value":           {oscar, broker.Target{Kind: broker.RevokeNode}, "x", ""},
		"chip in capitals":   {oscar, broker.Target{Kind: broker.RevokeChip, Value: strings.ToUpper(chipID)}, "x", ""},
		"short chip":         {oscar, broker.Target{Kind: broker.RevokeChip, Value: "ab"}, "x", ""},
		"image of a tag":     {oscar, broker.Target{Kind: broker.RevokeImage, Value: "train:latest"}, "x", ""},
		"principal, no role": {oscar, broker.Target{Kind: broker.RevokePrincipal, Value: "erin"}, "x", ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, jobs, err := w.RevokeTarget(t.Context(), tc.who, tc.target, tc.reason)
			if tc.want == "" && !errors.Is(err, broker.ErrInvalid) || tc.want != "" && !refusedWith(err, tc.want) || jobs != nil {
				t.Errorf("got %v, %v, want %s", jobs, err, tc.want)
			}
		})
	}
	if l := must[[]broker.Revocation](t)(w.Revocations(t.Context(), oscar)); len(l) != 0 {
		t.Errorf("%d revocations", len(l))
	}
}

// TestOneOwnerRevokesWithoutEnd: what each release looks through is bounded, and what
// others revoke and the owner's own asset are not concerned.
func TestOneOwnerRevokesWithoutEnd(t *testing.T) {
	w := newWorld(t, false)
	w.asset(t, bob, "bobs", broker.KindDataset)
	if err := w.store.Update(t.Context(), func(ctx context.Context, tx broker.Tx) (err error) {
		for i := range broker.MaxOwnerRevocations - 1 {
			err = errors.Join(err, tx.InsertRevocation(ctx, broker.Revocation{Target: broker.Target{Kind: broker.RevokeNode, Value: fmt.Sprintf("n-%d", i)}, Scope: "bob", Reason: "x", By: "owner/bob", Time: w.clock()}))
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	revoke := func(who broker.Actor, kind broker.RevocationKind, value string) error {
		_, _, err := w.RevokeTarget(t.Context(), who, broker.Target{Kind: kind, Value: value}, "x")
		return err
	}
	for range 2 { // the second changes nothing
		if err := revoke(bob, broker.RevokeNode, "last"); err != nil {
			t.Error(err)
		}
	}
	if err := revoke(bob, broker.RevokeNode, "one-more"); !errors.Is(err, broker.ErrTooMany) {
		t.Error(err)
	}
	if err := errors.Join(revoke(bob, broker.RevokeAsset, "bobs"), revoke(alice, broker.RevokeNode, "one-more"), revoke(oscar, broker.RevokeNode, "one-more")); err != nil {
		t.Error(err)
	}
}

func TestLiftRevocation(t *testing.T) {
	w := newWorld(t, false)
	g := w.grant(t, nil)
	node1 := broker.Target{Kind: broker.RevokeNode, Value: "node-1"}
	revoke := func(target broker.Target) {
		t.Helper()
		if _, _, err := w.RevokeTarget(t.Context(), oscar, target, "lost"); err != nil {
			t.Fatal(err)
		}
	}
	revoke(node1)
	a, err := newJob(t, w, nil).release(t, w.Broker, g, "weights")
	wantRefused(t, a, err, "revoked.node")
	if err := w.LiftRevocation(t.Context(), alice, node1, "found"); !refusedWith(err, "role") {
		t.Errorf("an owner lifted it: %v", err)
	}
	if err := w.LiftRevocation(t.Context(), oscar, node1, ""); !errors.Is(err, broker.ErrInvalid) {
		t.Error(err)
	}
	if err := w.LiftRevocation(t.Context(), oscar, node1, "found"); err != nil {
		t.Fatal(err)
	}
	must[broker.Answer](t)(newJob(t, w, nil).release(t, w.Broker, g, "weights"))
	if err := w.LiftRevocation(t.Context(), oscar, node1, "again"); !errors.Is(err, broker.ErrNotFound) {
		t.Error(err)
	}
	for _, target := range []broker.Target{{Kind: broker.RevokeAsset, Value: "data"}, {Kind: broker.RevokeMeasurement, Value: measurement}, {Kind: broker.RevokeImage, Value: imageDigest}, {Kind: broker.RevokePrincipal, Value: "agent/node-9"}} {
		revoke(target)
		if err := w.LiftRevocation(t.Context(), oscar, target, "please"); !errors.Is(err, broker.ErrInvalid) {
			t.Errorf("%s: %v", target, err)
		}
	}
	if l := must[[]broker.Revocation](t)(w.Revocations(t.Context(), oscar)); len(l) != 4 {
		t.Errorf("%d revocations", len(l))
	}
	if _, err := w.CheckLog(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestStoppedJobGetsNothing: after its lease was stopped a job may not go on
// under another grant.
func TestStoppedJobGetsNothing(t *testing.T) {
	w := newWorld(t, false)
	j, g := w.run(t, "job-1")
	must[broker.Grant](t)(w.Revoke(t.Context(), alice, g.ID, "over"))
	other := w.grant(t, func(n *broker.NewGrant) { n.Plan = g.Plan })
	j.attest(t, w, func(r *receipt.Result) { claimed(r); r.PlanDigest = g.Plan })
	a, err := j.release(t, w.Broker, other, "weights")
	wantRefused(t, a, err, "job.stopped")
}

// TestJobPastItsEndGetsNothing: a job that has to stop because a grant ended gets no
// key under another one, also before a renewal has told it so.
func TestJobPastItsEndGetsNothing(t *testing.T) {
	w := newWorld(t, false)
	w.policy(t, "data", func(p *broker.Policy) { p.StopAtExpiry = true })
	j, g := w.run(t, "job-1")
	other := w.grant(t, func(n *broker.NewGrant) { n.Plan, n.NotAfter = g.Plan, w.clock().Add(2*time.Hour) })
	w.advance(time.Hour)
	again := func(r *receipt.Result) { claimed(r); r.PlanDigest = g.Plan }
	j.attest(t, w, again)
	a, err := j.release(t, w.Broker, other, "weights")
	wantRefused(t, a, err, "job.stopped")
}

// TestSubmitterStaysKnown: a later release that does not say who submitted the job
// takes nothing from what an earlier one said.
func TestSubmitterStaysKnown(t *testing.T) {
	w := newWorld(t, false)
	g := w.grant(t, nil)
	j := newJob(t, w, nil)
	r := j.request(g, "weights")
	r.Submitter = "engineer/erin"
	req, sig := sign(t, j.session, r)
	must[broker.Answer](t)(w.Release(t.Context(), node, broker.Ask{Result: j.token, Request: req, Signature: sig}))
	must[broker.Answer](t)(j.release(t, w.Broker, g, "data"))
	_, jobs, err := w.RevokeTarget(t.Context(), oscar, broker.Target{Kind: broker.RevokePrincipal, Value: "engineer/erin"}, "left")
	if err != nil || !slices.Equal(jobs, []string{"job-1"}) {
		t.Errorf("%v, %v", jobs, err)
	}
}

// TestTheGrantEndsAsThePolicySays: a policy that allows less than the grant has.
func TestTheGrantEndsAsThePolicySays(t *testing.T) {
	w := newWorld(t, false)
	canonical, digest := aPlan(t)
	g := w.grant(t, func(n *broker.NewGrant) { n.Plan = digest })
	w.policy(t, "data", func(p *broker.Policy) { p.StopAtExpiry, p.MaxDurationSeconds = true, 60 })
	j := newJob(t, w, func(r *receipt.Result) { r.PlanDigest = digest })
	req, sig := sign(t, j.session, j.request(g, "data"))
	must[broker.Answer](t)(w.Release(t.Context(), node, broker.Ask{Result: j.token, Request: req, Signature: sig, Plan: canonical}))
	w.advance(time.Minute - time.Second)
	if l, _ := w.renew(t, j); l.State != receipt.LeaseRunning {
		t.Errorf("before the end: %+v", l)
	}
	w.advance(time.Second)
	if l, _ := w.renew(t, j); l.State != receipt.LeaseStop || !strings.HasPrefix(l.Reason, "expired:") {
		t.Errorf("after the end: %+v", l)
	}
}

func TestExpiryAndRunningJobs(t *testing.T) {
	for name, stops := range map[string]bool{"by default jobs run on": false, "the policy stops them": true} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, false)
			w.policy(t, "data", func(p *broker.Policy) { p.StopAtExpiry = stops })
			j, _ := w.run(t, "job-1")
			w.advance(time.Hour - time.Second)
			if l, _ := w.renew(t, j); l.State != receipt.LeaseRunning {
				t.Errorf("before the end: %+v", l)
			}
			w.advance(time.Second)
			l, _ := w.renew(t, j)
			if (l.State == receipt.LeaseStop) != stops || stops && !strings.HasPrefix(l.Reason, "expired:") {
				t.Errorf("after the end: %+v", l)
			}
		})
	}
}

func TestBundleEndsTheLease(t *testing.T) {
	w := newWorld(t, false)
	j, g := w.run(t, "job-1")
	must[string](t)(w.LogBundle(t.Context(), node, "job-1", plan.Sum([]byte("bundle"))))
	if _, refused := w.renew(t, j); !strings.HasPrefix(refused, "lease.ended:") {
		t.Error(refused)
	}
	if _, jobs, err := w.RevokeTarget(t.Context(), alice, broker.Target{Kind: broker.RevokeGrant, Value: g.ID}, "over"); err != nil || len(jobs) != 0 {
		t.Errorf("%v, %v", jobs, err)
	}
	if err := w.ReportStopped(t.Context(), node, "job-9", broker.Stopped{}); !errors.Is(err, broker.ErrNotFound) {
		t.Error(err)
	}
	_, _ = w.run(t, "job-2")
	if err := w.ReportStopped(t.Context(), stranger, "job-2", broker.Stopped{}); !refusedWith(err, "job.agent") {
		t.Error(err)
	}
}

// record is a signed checkpoint record of j.
func (j *job) record(t testing.TB, change func(*receipt.CheckpointRecord)) (record, signature []byte, digest plan.Digest) {
	t.Helper()
	r := receipt.CheckpointRecord{
		Version: receipt.CheckpointVersion, JobID: j.result.JobID, Plan: j.result.PlanDigest, Asset: "ckpt", Sequence: 1, Name: "step", Digest: plan.Sum([]byte("1")), Bytes: 1, UnixNano: 1,
	}
	if change != nil {
		change(&r)
	}
	record = must[[]byte](t)(plan.Canonical(r))
	sum := sha256.Sum256(append([]byte("coffer/v1 checkpoint\x00"), record...))
	return record, must[[]byte](t)(ecdsa.SignASN1(rand.Reader, j.session, sum[:])), r.Digest
}

func TestCountersignCheckpoint(t *testing.T) {
	w := newWorld(t, false)
	w.asset(t, alice, "ckpt", broker.KindCheckpoints)
	g := w.grant(t, func(n *broker.NewGrant) { n.Assets = []string{"ckpt"}; n.MaxReleases = 9 })
	j := newJob(t, w, nil)
	must[broker.Answer](t)(j.release(t, w.Broker, g, "ckpt"))
	at := func(seq uint64, content string, parent plan.Digest) func(*receipt.CheckpointRecord) {
		return func(r *receipt.CheckpointRecord) {
			r.Sequence, r.Digest, r.Parent = seq, plan.Sum([]byte(content)), parent
		}
	}
	one, two, three := plan.Sum([]byte("1")), plan.Sum([]byte("2")), plan.Sum([]byte("3"))
	var heads []receipt.CheckpointHead
	for i, change := range []func(*receipt.CheckpointRecord){at(1, "1", ""), at(2, "2", one), at(3, "3", two), at(3, "3", two)} {
		rec, sig, digest := j.record(t, change)
		token := must[string](t)(w.CountersignCheckpoint(t.Context(), node, "job-1", rec, sig))
		var h receipt.CheckpointHead
		if err := w.brokerKeys.Open(receipt.TypeCheckpointHead, token, &h); err != nil || h.Sequence != min(uint64(i)+1, 3) || h.Digest != digest || h.Record != plan.Sum(rec) || h.Asset != "ckpt" {
			t.Errorf("%+v, %v", h, err)
		}
		heads = append(heads, h)
	}
	if fmt.Sprint(heads[2]) != fmt.Sprint(heads[3]) {
		t.Errorf("the same record got %+v, then %+v", heads[2], heads[3])
	}
	other := newJob(t, w, func(r *receipt.Result) { r.JobID = "job-2" })
	must[broker.Answer](t)(other.release(t, w.Broker, g, "ckpt"))
	elsewhere := *j
	elsewhere.session = must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	for name, tc := range map[string]struct {
		agent  broker.Actor
		job    string
		by     *job
		change func(*receipt.CheckpointRecord)
		want   string // check id, or "" for ErrInvalid
	}{
		"rolled back":               {node, "job-1", j, at(2, "2", one), "checkpoint.rollback"},
		"rolled back to the start":  {node, "job-1", j, at(1, "1", ""), "checkpoint.rollback"},
		"forked":                    {node, "job-1", j, at(3, "other", two), "checkpoint.fork"},
		"another parent":            {node, "job-1", j, at(4, "4", two), "checkpoint.fork"},
		"one left out":              {node, "job-1", j, at(5, "5", three), "checkpoint.gap"},
		"of another job":            {node, "job-1", j, func(r *receipt.CheckpointRecord) { at(4, "4", three)(r); r.JobID = "job-2" }, "checkpoint.job"},
		"of another plan":           {node, "job-1", j, func(r *receipt.CheckpointRecord) { at(4, "4", three)(r); r.Plan = plan.Sum([]byte("B")) }, "checkpoint.plan"},
		"under another asset":       {node, "job-1", j, func(r *receipt.CheckpointRecord) { at(1, "4", "")(r); r.Asset = "weights" }, "checkpoint.asset"},
		"by another session key":    {node, "job-1", &elsewhere, at(4, "4", three), "checkpoint.session-key"},
		"by another job":            {node, "job-2", j, at(1, "1", ""), "checkpoint.session-key"},
		"by another agent":          {stranger, "job-1", j, at(4, "4", three), "checkpoint.lease"},
		"of a job without a lease":  {node, "job-9", j, at(4, "4", three), "checkpoint.lease"},
		"by an engineer":            {erin, "job-1", j, at(4, "4", three), "role"},
		"another version":           {node, "job-1", j, func(r *receipt.CheckpointRecord) { r.Version = "v0" }, ""},
		"a first one with a parent": {node, "job-1", j, at(1, "1", one), ""},
		"number zero":               {node, "job-1", j, at(0, "1", ""), ""},
	} {
		t.Run(name, func(t *testing.T) {
			rec, sig, _ := tc.by.record(t, tc.change)
			token, err := w.CountersignCheckpoint(t.Context(), tc.agent, tc.job, rec, sig)
			if tc.want == "" && !errors.Is(err, broker.ErrInvalid) || tc.want != "" && !refusedWith(err, tc.want) || token != "" {
				t.Errorf("got %q, %v, want %s", token, err, tc.want)
			}
		})
	}
	if kinds := w.kindsOf(t, "job-1"); len(kinds) != 4 {
		t.Errorf("log %v", kinds)
	}
}

// second is another verifier that w's broker trusts.
func (w *world) second(t testing.TB, name string) *receipt.Signer {
	t.Helper()
	s, keys := newSigner(t, name)
	w.cfg.Verifiers = append(w.cfg.Verifiers, keys)
	w.Broker = must[*broker.Broker](t)(broker.New(w.cfg))
	return s
}

// also is another verifier's result for the same job.
func (j *job) also(t testing.TB, s *receipt.Signer, change func(*receipt.Result)) string {
	t.Helper()
	r := j.result
	r.Issuer, r.ID, r.Nonce = s.Issuer(), rand.Text(), rand.Text()
	if change != nil {
		change(&r)
	}
	return must[string](t)(s.Sign(receipt.TypeResult, r))
}

// TestTwoVerifiers: the policy asks for results of two verifiers that it names.
func TestTwoVerifiers(t *testing.T) {
	for name, tc := range map[string]struct {
		more func(t *testing.T, j *job, second, third *receipt.Signer) []string
		want []string
	}{
		"two results": {func(t *testing.T, j *job, second, _ *receipt.Signer) []string {
			return []string{j.also(t, second, nil)}
		}, nil},
		"one result":        {func(*testing.T, *job, *receipt.Signer, *receipt.Signer) []string { return nil }, []string{"asset.verifier-threshold"}},
		"one of another":    {func(t *testing.T, j *job, _, third *receipt.Signer) []string { return []string{j.also(t, third, nil)} }, []string{"asset.verifier-threshold"}},
		"the same twice":    {func(_ *testing.T, j *job, _, _ *receipt.Signer) []string { return []string{j.token} }, []string{"result.more"}},
		"of another job":    {more(func(r *receipt.Result) { r.JobID = "job-2" }), []string{"result.more.job"}},
		"of another plan":   {more(func(r *receipt.Result) { r.PlanDigest = plan.Sum([]byte("B")) }), []string{"result.more.plan"}},
		"another sandbox":   {more(func(r *receipt.Result) { r.SandboxDigest = plan.Sum([]byte("B")) }), []string{"result.more.sandbox"}},
		"another recipient": {more(func(r *receipt.Result) { r.Confirmation.Recipient = make([]byte, 1216) }), []string{"result.more.keys"}},
		"another audience":  {more(func(r *receipt.Result) { r.Audience = "other" }), []string{"result.audience"}},
		"an old result":     {more(func(r *receipt.Result) { r.IssuedAt -= 3600; r.Expires -= 3600 }), []string{"result.expiry"}},
		"one that says no": {more(func(r *receipt.Result) {
			r.Submods = map[string]receipt.Appraisal{"cpu0": {Status: receipt.Contraindicated}}
		}), []string{"result.cpu0"}},
		"by an impostor": {func(t *testing.T, j *job, second, _ *receipt.Signer) []string {
			fake, _ := newSigner(t, second.Issuer())
			return []string{j.also(t, fake, nil)}
		}, []string{"result.signature"}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, false)
			second, third := w.second(t, "second.test"), w.second(t, "third.test")
			w.policy(t, "weights", func(p *broker.Policy) { p.Verifiers, p.Threshold = []string{verifierID, "second.test"}, 2 })
			g := w.grant(t, nil)
			j := newJob(t, w, nil)
			req, sig := sign(t, j.session, j.request(g, "weights"))
			ask := broker.Ask{Result: j.token, Request: req, Signature: sig, More: tc.more(t, j, second, third)}
			a, err := w.Release(t.Context(), node, ask)
			if tc.want != nil {
				wantRefused(t, a, err, tc.want...)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			b := must[translog.Body](t)(must[[]translog.Entry](t)(w.Entries(t.Context(), alice, "job-1"))[0].Open())
			if len(b.Release.More) != 1 || b.Release.More[0].Verifier != "second.test" {
				t.Errorf("log %+v", b.Release)
			}
			// The other verifier's result is spent with the first one's.
			k := newJob(t, w, nil)
			k.recipient, k.session = j.recipient, j.session
			k.attest(t, w, nil)
			req, sig = sign(t, k.session, k.request(g, "weights"))
			if _, err := w.Release(t.Context(), node, broker.Ask{Result: k.token, Request: req, Signature: sig, More: ask.More}); err != nil {
				t.Errorf("the same keys, attested again to the first verifier: %v", err)
			}
		})
	}
	t.Run("the verifier is not one that the policy names", func(t *testing.T) {
		w := newWorld(t, false)
		w.second(t, "second.test")
		w.policy(t, "weights", func(p *broker.Policy) { p.Verifiers = []string{"second.test"} })
		a, err := newJob(t, w, nil).release(t, w.Broker, w.grant(t, nil), "weights")
		wantRefused(t, a, err, "asset.verifiers", "asset.verifier-threshold")
	})
}

func more(change func(*receipt.Result)) func(*testing.T, *job, *receipt.Signer, *receipt.Signer) []string {
	return func(t *testing.T, j *job, second, _ *receipt.Signer) []string {
		return []string{j.also(t, second, change)}
	}
}

// TestX25519 is a recipient key without ML-KEM, which a policy must allow.
func TestX25519(t *testing.T) {
	w := newWorld(t, false)
	g := w.grant(t, nil)
	recipient := must[hpke.PrivateKey](t)(hpke.DHKEM(ecdh.X25519()).GenerateKey())
	j := newJob(t, w, func(r *receipt.Result) { r.Confirmation.Recipient = recipient.PublicKey().Bytes() })
	j.recipient = recipient
	a, err := j.release(t, w.Broker, g, "weights")
	wantRefused(t, a, err, "asset.kem")
	w.policy(t, "weights", func(p *broker.Policy) { p.KEMs = []string{broker.KEMX25519} })
	a = must[broker.Answer](t)(j.release(t, w.Broker, g, "weights"))
	if key, err := j.open(a, g, "weights"); err != nil || !bytes.Equal(key, w.keys["weights"]) {
		t.Error(err)
	}
	a, err = newJob(t, w, func(r *receipt.Result) { r.JobID = "job-2" }).release(t, w.Broker, w.grant(t, nil), "weights")
	wantRefused(t, a, err, "asset.kem")
	small := newJob(t, w, func(r *receipt.Result) { r.JobID, r.Confirmation.Recipient = "job-3", make([]byte, 32) })
	a, err = small.release(t, w.Broker, w.grant(t, nil), "weights")
	wantRefused(t, a, err, "release.recipient-key")
}

// TestPolicyAtRelease: only the asset's policy, changed after the grant was
// made, stands between the job and the key.
func TestPolicyAtRelease(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*broker.Policy)
		result func(*receipt.Result)
		later  time.Duration
		want   string
	}{
		"only for another protocol": {change: func(p *broker.Policy) { p.Protocols = []string{broker.ProtocolKBS} }, want: "asset.protocol"},
		"for both protocols":        {change: func(p *broker.Policy) { p.Protocols = []string{broker.ProtocolKBS, broker.ProtocolCoffer} }},
		"hardware says nothing":     {change: func(p *broker.Policy) { p.Affirming = []string{"hardware"} }, want: "asset.affirming"},
		"hardware is affirmed": {change: func(p *broker.Policy) { p.Affirming = []string{"hardware"} }, result: func(r *receipt.Result) {
			r.Submods = map[string]receipt.Appraisal{"cpu0": {Status: receipt.Affirming, Vector: receipt.TrustVector{Hardware: 2}}}
		}},
		"something else is affirmed": {change: func(p *broker.Policy) { p.Affirming = []string{"hardware"} }, result: func(r *receipt.Result) {
			r.Submods = map[string]receipt.Appraisal{"cpu0": {Status: receipt.Affirming, Vector: receipt.TrustVector{Executables: 2}}}
		}, want: "asset.affirming"},
		"grants are shorter":                  {change: func(p *broker.Policy) { p.MaxDurationSeconds = 60 }, later: time.Minute, want: "grant.expiry"},
		"grants are shorter, and it is early": {change: func(p *broker.Policy) { p.MaxDurationSeconds = 60 }, later: 59 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, false)
			g := w.grant(t, nil)
			w.policy(t, "weights", tc.change)
			w.advance(tc.later)
			a, err := newJob(t, w, tc.result).release(t, w.Broker, g, "weights")
			if tc.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantRefused(t, a, err, tc.want)
		})
	}
	t.Run("fewer releases", func(t *testing.T) {
		w := newWorld(t, false)
		g := w.grant(t, func(n *broker.NewGrant) { n.MaxReleases = 5 })
		must[broker.Answer](t)(newJob(t, w, nil).release(t, w.Broker, g, "weights"))
		w.policy(t, "weights", func(p *broker.Policy) { p.MaxReleases = 1 })
		a, err := newJob(t, w, nil).release(t, w.Broker, g, "weights")
		wantRefused(t, a, err, "grant.exhausted")
	})
}

func TestUpdateAssetPolicyRefuses(t *testing.T) {
	w := newWorld(t, false)
	for name, tc := range map[string]struct {
		who    broker.Actor
		change func(*broker.Policy, *broker.Labels, *int64)
		is     error
		want   string
	}{
		"another owner":       {who: bob, want: "asset.owner"},
		"an engineer":         {who: erin, want: "role"},
		"an old revision":     {change: func(_ *broker.Policy, _ *broker.Labels, r *int64) { *r-- }, is: broker.ErrExists},
		"label in capitals":   {change: func(_ *broker.Policy, l *broker.Labels, _ *int64) { l.Region = "EU" }, is: broker.ErrInvalid},
		"long label":          {change: func(_ *broker.Policy, l *broker.Labels, _ *int64) { l.Project = strings.Repeat("x", 64) }, is: broker.ErrInvalid},
		"rule for nobody":     {change: func(p *broker.Policy, _ *broker.Labels, _ *int64) { p.Approvals = []broker.Rule{{Count: 1}} }, is: broker.ErrInvalid},
		"rule of no approval": {change: func(p *broker.Policy, _ *broker.Labels, _ *int64) { p.Approvals = []broker.Rule{{Group: "a"}} }, is: broker.ErrInvalid},
		"two rules for one group": {change: func(p *broker.Policy, _ *broker.Labels, _ *int64) {
			p.Approvals = []broker.Rule{{Group: "a", Count: 1}, {Group: "a", Count: 2}}
		}, is: broker.ErrInvalid},
		"verifier unknown here": {change: func(p *broker.Policy, _ *broker.Labels, _ *int64) { p.Verifiers = []string{"x"} }, is: broker.ErrInvalid},
		"two of one verifier":   {change: func(p *broker.Policy, _ *broker.Labels, _ *int64) { p.Threshold = 2 }, is: broker.ErrInvalid},
		"negative threshold":    {change: func(p *broker.Policy, _ *broker.Labels, _ *int64) { p.Threshold = -1 }, is: broker.ErrInvalid},
		"unknown KEM":           {change: func(p *broker.Policy, _ *broker.Labels, _ *int64) { p.KEMs = []string{"rsa"} }, is: broker.ErrInvalid},
		"unknown protocol":      {change: func(p *broker.Policy, _ *broker.Labels, _ *int64) { p.Protocols = []string{"ftp"} }, is: broker.ErrInvalid},
		"unknown claim":         {change: func(p *broker.Policy, _ *broker.Labels, _ *int64) { p.Affirming = []string{"luck"} }, is: broker.ErrInvalid},
		"lease of a second":     {change: func(p *broker.Policy, _ *broker.Labels, _ *int64) { p.LeaseSeconds = 1 }, is: broker.ErrInvalid},
		"lease of a day":        {change: func(p *broker.Policy, _ *broker.Labels, _ *int64) { p.LeaseSeconds = 86400 }, is: broker.ErrInvalid},
		"lease without end":     {change: func(p *broker.Policy, _ *broker.Labels, _ *int64) { p.LeaseSeconds = 1 << 62 }, is: broker.ErrInvalid},
		"grace of a day":        {change: func(p *broker.Policy, _ *broker.Labels, _ *int64) { p.GraceSeconds = 86400 }, is: broker.ErrInvalid},
		"negative grace":        {change: func(p *broker.Policy, _ *broker.Labels, _ *int64) { p.GraceSeconds = -1 }, is: broker.ErrInvalid},
		"duration without end":  {change: func(p *broker.Policy, _ *broker.Labels, _ *int64) { p.MaxDurationSeconds = 1 << 62 }, is: broker.ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			who := alice
			if tc.who.Name != "" {
				who = tc.who
			}
			a := must[broker.Asset](t)(w.ReadAsset(t.Context(), alice, "data"))
			if tc.change != nil {
				tc.change(&a.Policy, &a.Labels, &a.Revision)
			}
			_, err := w.UpdateAssetPolicy(t.Context(), who, "data", a.Policy, a.Labels, a.Revision, nil)
			if tc.is != nil && !errors.Is(err, tc.is) || tc.want != "" && !refusedWith(err, tc.want) || err == nil {
				t.Errorf("got %v, want %v%s", err, tc.is, tc.want)
			}
		})
	}
	if a := must[broker.Asset](t)(w.ReadAsset(t.Context(), alice, "data")); a.Revision != 1 {
		t.Errorf("revision %d", a.Revision)
	}
	w.policy(t, "data", func(p *broker.Policy) { p.LeaseSeconds = 30 })
	if a := must[broker.Asset](t)(w.ReadAsset(t.Context(), alice, "data")); a.Revision != 2 || a.Policy.LeaseSeconds != 30 {
		t.Errorf("%+v", a)
	}
	if _, err := w.CheckLog(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestPolicySets records which set is in force, and never an older one.
func TestPolicySets(t *testing.T) {
	w := newWorld(t, false)
	by := broker.Actor{Role: "operator", Name: "oscar"}
	one, two := plan.Sum([]byte("1")), plan.Sum([]byte("2"))
	used := uint64(0)
	put := func(serial uint64, d plan.Digest) error {
		return w.LogPolicySet(t.Context(), by, serial, d, func() error { used = serial; return nil })
	}
	before := must[translog.Head](t)(w.CheckLog(t.Context())).Size
	for range 2 {
		if err := put(3, one); err != nil {
			t.Fatal(err)
		}
	}
	if err := put(3, two); !refusedWith(err, "policy.serial") {
		t.Errorf("another set under the same number: %v", err)
	}
	if err := put(2, two); !refusedWith(err, "policy.serial") {
		t.Errorf("an older set: %v", err)
	}
	if used != 3 {
		t.Errorf("set %d is in force", used)
	}
	if err := put(0, two); !errors.Is(err, broker.ErrInvalid) {
		t.Error(err)
	}
	if err := put(4, two); err != nil {
		t.Error(err)
	}
	if size := must[translog.Head](t)(w.CheckLog(t.Context())).Size; size != before+2 {
		t.Errorf("%d entries more", size-before)
	}
}
