package verify_test

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
)

var everyTen = bundletest.Options{Reattest: &plan.Reattest{EverySeconds: 10, WithinSeconds: 20}}

func TestLaterAttestations(t *testing.T) {
	l := newLab(t)
	j := newJob(t, l, everyTen)
	r := verify.Verify(build(t, j), pinned(t, l))
	if r.Verdict != verify.Verified || !slices.Equal(outcomes(r, "reattest.result"), []check.Outcome{check.Pass, check.Pass}) ||
		!slices.Equal(outcomes(r, "reattest.age"), []check.Outcome{check.Pass}) || !slices.Equal(outcomes(r, "log.reattest"), []check.Outcome{check.Pass}) {
		dump(t, r)
	}
	own := pinned(t, l)
	own.VerifierKeys = nil
	if got := outcomes(verify.Verify(build(t, j), own), "reattest.result"); !slices.Equal(got, []check.Outcome{check.NotChecked, check.NotChecked}) {
		t.Errorf("under the bundle's own keys: %v", got)
	}
	if got := outcomes(verify.Verify(build(t, newJob(t, l, bundletest.Options{})), pinned(t, l)), "reattest.complete"); !slices.Equal(got, []check.Outcome{check.NotChecked}) {
		t.Errorf("a job that is not asked: %v", got)
	}
}

// refused is a job whose third attestation was refused, and that ended for it.
func refused(t *testing.T, l *bundletest.Lab, o bundletest.Options) *bundletest.Job {
	t.Helper()
	j := newJob(t, l, o)
	a, err := j.Later(bundletest.Options{FlipGPU: true}, 30*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if a.Verdict != bundle.ReattestRefused {
		t.Fatalf("%+v", a)
	}
	if err := j.Attested(a); err != nil {
		t.Fatal(err)
	}
	at := l.Now.Add(31 * time.Second).UnixNano()
	run := slices.IndexFunc(j.Timeline, func(s bundle.Step) bool { return s.Stage == bundle.StageRun })
	j.Timeline[run].Outcome, j.Timeline[run].Nanos = bundle.StepFailed, at-j.Timeline[run].StartUnixNano
	reason := receipt.RefusedReason(resultOf(t, l, a))
	j.Outcome = bundle.Outcome{State: bundle.Failed, Stage: bundle.StageRun, Reason: bundle.ReasonReattestRefused, Stop: &bundle.Stop{By: reason, ToldUnixNano: at, GoneUnixNano: at, ScrubbedUnixNano: at}}
	logged(t, l, j, reason)
	return j
}

func resultOf(t *testing.T, l *bundletest.Lab, a bundle.Reattestation) (r receipt.Result) {
	t.Helper()
	jwks, err := l.Verifier.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	keys, err := receipt.ParseKeys(bundletest.VerifierID, jwks)
	if err != nil {
		t.Fatal(err)
	}
	if err := keys.Open(receipt.TypeResult, a.Result, &r); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestAJobThatFailedAnAttestation(t *testing.T) {
	l := newLab(t)
	r := verify.Verify(build(t, refused(t, l, everyTen)), pinned(t, l))
	if r.Verdict != verify.Verified || r.Outcome.Reason != bundle.ReasonReattestRefused || len(outcomes(r, "reattest.result")) != 3 || !slices.Equal(outcomes(r, "log.stop"), []check.Outcome{check.Pass}) {
		dump(t, r)
	}
	paused := everyTen
	paused.Reattest = &plan.Reattest{EverySeconds: 10, WithinSeconds: 20, OnFailure: plan.ReattestPause}
	j := newJob(t, l, paused)
	for i, o := range []bundletest.Options{{FlipGPU: true}, {}} {
		a, err := j.Later(o, time.Duration(30+i)*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		if a.Then = bundle.ReattestPaused; i == 1 {
			a.Then = bundle.ReattestResumed
		}
		if err := j.Attested(a); err != nil {
			t.Fatal(err)
		}
	}
	if r := verify.Verify(build(t, j), pinned(t, l)); r.Verdict != verify.Verified {
		dump(t, r)
	}
}

// TestLiesAboutLaterAttestations has an agent that signs with the job's key say
// what is not so: each lie is found by the one check that is named.
func TestLiesAboutLaterAttestations(t *testing.T) {
	l := newLab(t)
	other := newJob(t, l, bundletest.Options{ID: "job-2", Reattest: everyTen.Reattest})
	foreign, err := other.Later(bundletest.Options{}, 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	good, ended, trust := newJob(t, l, everyTen), refused(t, l, everyTen), pinned(t, l)
	list := func(change func(*bundle.Reattestations)) func(*testing.T, *bundletest.Job) {
		return edit(bundle.ReattestPart, change)
	}
	for name, tc := range map[string]struct {
		refused bool
		lie     func(*testing.T, *bundletest.Job)
		want    []string
	}{
		"all of them left out":               {lie: func(_ *testing.T, j *bundletest.Job) { delete(j.Parts, bundle.ReattestPart) }, want: []string{"reattest.complete", "log.reattest"}},
		"one left out, unsaid":               {lie: list(func(r *bundle.Reattestations) { r.List = r.List[1:] }), want: []string{"reattest.order", "log.reattest"}},
		"one left out, said":                 {lie: list(func(r *bundle.Reattestations) { r.List, r.Omitted = r.List[1:], 1 }), want: []string{"reattest.raw"}},
		"one without its result, with room":  {lie: list(func(r *bundle.Reattestations) { r.List[0].Result, r.List[0].Evidence = "", nil }), want: []string{"reattest.raw"}},
		"the refused one left out":           {refused: true, lie: list(func(r *bundle.Reattestations) { r.List = r.List[:2] }), want: []string{"reattest.then", "log.reattest"}},
		"the refused one without its result": {refused: true, lie: list(func(r *bundle.Reattestations) { r.List[2].Result, r.List[2].Evidence = "", nil }), want: []string{"reattest.signature", "log.reattest"}},
		"reordered":                          {lie: list(func(r *bundle.Reattestations) { r.List[0], r.List[1] = r.List[1], r.List[0] }), want: []string{"reattest.order", "reattest.newer"}},
		"the same one twice": {lie: list(func(r *bundle.Reattestations) {
			r.List[1].Result, r.List[1].Evidence, r.List[1].ResultDigest, r.List[1].EvidenceDigest = r.List[0].Result, r.List[0].Evidence, r.List[0].ResultDigest, r.List[0].EvidenceDigest
		}), want: []string{"reattest.newer", "log.reattest"}},
		"another job's": {lie: list(func(r *bundle.Reattestations) {
			foreign.Number, foreign.Shown = 1, true
			r.List[0] = foreign
		}), want: []string{"reattest.job", "reattest.keys", "reattest.plan", "reattest.sandbox", "log.reattest"}},
		"a refusal called an affirmation": {refused: true, lie: list(func(r *bundle.Reattestations) {
			r.List[2].Verdict, r.List[2].Failed, r.List[2].Then = bundle.ReattestAffirmed, nil, bundle.ReattestGoesOn
		}), want: []string{"reattest.then", "reattest.verdict"}},
		"a refusal after which the job went on": {refused: true, lie: list(func(r *bundle.Reattestations) { r.List[2].Then = bundle.ReattestGoesOn }), want: []string{"reattest.then"}},
		"a refusal for other checks":            {refused: true, lie: list(func(r *bundle.Reattestations) { r.List[2].Failed = []string{"gpu.ocsp"} }), want: []string{"reattest.verdict"}},
		"stopped, and succeeded": {refused: true, lie: func(_ *testing.T, j *bundletest.Job) {
			j.Outcome = bundle.Outcome{State: bundle.Succeeded, Stage: bundle.StageRun}
			run := slices.IndexFunc(j.Timeline, func(s bundle.Step) bool { return s.Stage == bundle.StageRun })
			j.Timeline[run].Outcome = bundle.StepDone
		}, want: []string{"reattest.then"}},
		"other evidence under the result": {lie: list(func(r *bundle.Reattestations) {
			r.List[1].Evidence, r.List[1].EvidenceDigest = r.List[0].Evidence, r.List[0].EvidenceDigest
		}), want: []string{"reattest.evidence", "reattest.nonce"}},
		"a result that the broker did not take": {lie: list(func(r *bundle.Reattestations) { r.List[1].Shown = false }), want: []string{"log.reattest"}},
		"an attestation of another time":        {lie: list(func(r *bundle.Reattestations) { r.List[0].StartUnixNano = 0 }), want: []string{"reattest.time"}},
		"a result that was there before it attested": {lie: list(func(r *bundle.Reattestations) {
			r.List[1].StartUnixNano += int64(time.Hour)
		}), want: []string{"reattest.time"}},
		"a run that outlived its results": {lie: func(_ *testing.T, j *bundletest.Job) {
			run := slices.IndexFunc(j.Timeline, func(s bundle.Step) bool { return s.Stage == bundle.StageRun })
			j.Timeline[run].Nanos += int64(time.Minute)
		}, want: []string{"reattest.age"}},
	} {
		t.Run(name, func(t *testing.T) {
			j := *good
			if tc.refused {
				j = *ended
			}
			j.Parts, j.Timeline = maps.Clone(j.Parts), slices.Clone(j.Timeline)
			tc.lie(t, &j)
			got := failedIDs(verify.Verify(build(t, &j), trust))
			slices.Sort(tc.want)
			if !slices.Equal(got, tc.want) {
				t.Errorf("failed %v, want %v", got, tc.want)
			}
		})
	}
}

// Each of these the verifier affirmed and the broker took: a reader has this record
// alone to see that the job's keys answered from another machine.
func TestLaterAttestationsOfAnotherMachine(t *testing.T) {
	vendor := must2(simulate.New(simulate.Options{GPUs: 2, Fast: true}))(t)
	l := must2(bundletest.On(vendor.Chip(), vendor.GPUs(), vendor.Anchors(), time.Now()))(t)
	chip, gpus := l.Chip, l.GPUs
	for name, move := range map[string]func(){
		"":             func() {},
		"another chip": func() { l.Chip = must2(vendor.NewChip())(t) },
		"another GPU":  func() { l.GPUs = gpus[1:] },
	} {
		t.Run(name, func(t *testing.T) {
			j := newJob(t, l, everyTen)
			move()
			a, err := j.Later(bundletest.Options{}, 30*time.Second)
			l.Chip, l.GPUs = chip, gpus
			must(t, err)
			if a.Verdict != bundle.ReattestAffirmed {
				t.Fatalf("%+v", a)
			}
			must(t, j.Attested(a))
			want := []string{"reattest.machine"}
			if name == "" {
				want = nil
			}
			if got := failedIDs(verify.Verify(build(t, j), pinned(t, l))); !slices.Equal(got, want) {
				t.Errorf("failed %v, want %v", got, want)
			}
		})
	}
}

// A list that is full leaves out evidence and results. When they were issued is then
// the broker's word, by its log.
func TestAgesOfAttestationsWithoutResults(t *testing.T) {
	l := newLab(t)
	j := newJob(t, l, everyTen)
	must(t, j.Attests(func(r *bundle.Reattestations) {
		full := r.List[1]
		full.Number, full.Verdict, full.Failed, full.Evidence = 3, bundle.ReattestNone, nil, nil
		full.Result = strings.Repeat("x", bundle.MaxReattestRaw)
		full.Then = bundle.ReattestStopped
		r.List[0].Result, r.List[0].Evidence, r.List[1].Result, r.List[1].Evidence = "", nil, "", nil
		r.List = append(r.List, full)
	}))
	for long, want := range map[time.Duration]check.Outcome{0: check.Pass, time.Minute: check.Fail} {
		k := *j
		k.Timeline = slices.Clone(j.Timeline)
		run := slices.IndexFunc(k.Timeline, func(s bundle.Step) bool { return s.Stage == bundle.StageRun })
		k.Timeline[run].Nanos += int64(long)
		if got := outcomes(verify.Verify(build(t, &k), pinned(t, l)), "log.reattest-age"); !slices.Equal(got, []check.Outcome{want}) {
			t.Errorf("a run of %s more: %v", long, got)
		}
	}
}

func TestOldAttestationsMakeRoom(t *testing.T) {
	var l bundle.Reattestations
	big := make([]byte, bundle.MaxReattestRaw/5)
	for i := range 10 {
		a := bundle.Reattestation{Number: i + 1, Verdict: bundle.ReattestAffirmed, Evidence: big, Result: "result"}
		if i == 0 {
			a.Verdict = bundle.ReattestRefused
		}
		l.Add(a)
	}
	var kept []int
	for _, a := range l.List {
		if a.Result != "" {
			kept = append(kept, a.Number)
		}
	}
	if !slices.Equal(kept, []int{1, 9, 10}) || l.Omitted != 0 {
		t.Errorf("evidence of %v is kept", kept)
	}
	for i := range bundle.MaxReattestations {
		l.Add(bundle.Reattestation{Number: 11 + i, Verdict: bundle.ReattestAffirmed})
	}
	if len(l.List) != bundle.MaxReattestations || l.Omitted != 10 || l.List[0].Number != 1 {
		t.Errorf("%d listed, %d omitted, the first is number %d", len(l.List), l.Omitted, l.List[0].Number)
	}
}
