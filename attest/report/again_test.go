package report

import (
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/plan"
)

func TestPageOfLaterAttestations(t *testing.T) {
	l, trust := lab(t)
	file := job(t, l, bundletest.Options{Reattest: &plan.Reattest{EverySeconds: 60, WithinSeconds: 30, OnFailure: plan.ReattestStop}}, nil)
	r := verify.Verify(file, trust)
	if r.Verdict != verify.Verified {
		t.Fatalf("verdict %s: %v", r.Verdict, r.Checks().Failed())
	}
	page := write(t, r, file)
	selfContained(t, page)
	for _, want := range []string{"Attested again while it ran", "2 times affirmed,", ">timer</td>", "goes on"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not say %q", want)
		}
	}
	if n := strings.Count(page, `<circle class="mark"`); n != 2 {
		t.Errorf("%d marks in the picture, want 2", n)
	}
	without := job(t, l, bundletest.Options{}, nil)
	if page := write(t, verify.Verify(without, trust), without); strings.Contains(page, "Attested again") || strings.Contains(page, "<circle") {
		t.Error("a job that attested once has later attestations")
	}
}

// A record may have thousands: what went wrong is listed, whenever it was.
func TestManyLaterAttestations(t *testing.T) {
	const many, second = 4096, int64(1e9)
	var list bundle.Reattestations
	for i := range int64(many) {
		a := bundle.Reattestation{Number: int(i + 1), Cause: "timer", StartUnixNano: i * second, Verdict: bundle.ReattestAffirmed, Then: bundle.ReattestGoesOn}
		switch i {
		case 7:
			a.Verdict, a.Then, a.Failed, a.Message = bundle.ReattestRefused, bundle.ReattestPaused, []string{"gpu.ready"}, "said the verifier"
		case 8:
			a.Then = bundle.ReattestResumed
		}
		list.List = append(list.List, a)
	}
	list.Omitted = 3
	var v view
	v.timeline([]bundle.Step{{Stage: bundle.StageStart, Nanos: second}, {Stage: bundle.StageRun, Nanos: many * second, Outcome: bundle.StepDone}})
	v.reattested(list)
	a := v.Again
	if a.Affirmed != many-1 || a.Other != 1 || a.Omitted != 3 || len(a.Listed) != maxAffirmed+1 && len(a.Listed) != maxAffirmed+2 || len(a.Listed)+a.Unlisted != many {
		t.Errorf("%d affirmed, %d not, %d omitted, %d listed and %d not", a.Affirmed, a.Other, a.Omitted, len(a.Listed), a.Unlisted)
	}
	if one := a.Listed[0]; !one.Failed || one.Why != "gpu.ready said the verifier" || one.Then != "paused" {
		t.Errorf("the first that is listed is %+v", one)
	}
	if last := a.Listed[len(a.Listed)-1]; last.Number != many {
		t.Errorf("the last that is listed is %d", last.Number)
	}
	if n := len(v.Marks); n < 10 || float64(n) > pictureWidth/markEvery {
		t.Errorf("%d marks", n)
	}
	failed := 0
	for _, m := range v.Marks {
		if m.X < labelWidth || m.X > pictureWidth || m.Y <= v.Way[1].Y {
			t.Errorf("a mark at %f, %f", m.X, m.Y)
		}
		if m.Failed {
			failed++
		}
	}
	if failed != 1 {
		t.Errorf("%d marks show a refusal, want 1", failed)
	}
	// A record with a list and no stage in which the job ran has no bar for marks.
	var none view
	none.timeline([]bundle.Step{{Stage: bundle.StageVerify}})
	none.reattested(list)
	if len(none.Marks) != 0 || none.Again == nil {
		t.Error("marks without a bar")
	}
}
