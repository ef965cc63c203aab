package verify_test

import (
	"slices"
	"testing"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

// withAlerts builds an honest job's bundle that says something else of the rules,
// signed as such.
func withAlerts(t *testing.T, l *bundletest.Lab, change func(*bundle.Alerts)) verify.Report {
	t.Helper()
	j := newJob(t, l, bundletest.Options{})
	a, err := bundle.Decode[bundle.Alerts](j.Parts[bundle.AlertsPart])
	if err != nil {
		t.Fatal(err)
	}
	change(&a)
	if j.Parts[bundle.AlertsPart], err = plan.Canonical(a); err != nil {
		t.Fatal(err)
	}
	return verify.Verify(build(t, j), pinned(t, l))
}

func TestFindingsAreHeldAgainstTraceAndEnd(t *testing.T) {
	l := newLab(t)
	for name, tt := range map[string]struct {
		fails  string
		change func(*bundle.Alerts)
	}{
		"other rules than the profile's":  {"alerts.rules", func(a *bundle.Alerts) { a.Rules = plan.Sum([]byte("none")) }},
		"no rules":                        {"alerts.rules", func(a *bundle.Alerts) { a.Rules = "" }},
		"the first finding cut out":       {"alerts.order", func(a *bundle.Alerts) { a.Findings[0].Sequence = 2 }},
		"an event that was another":       {"alerts.trace", func(a *bundle.Alerts) { a.Findings[0].Kind = "ptrace" }},
		"a rule that stops, and did not":  {"alerts.stop", func(a *bundle.Alerts) { a.Findings[0].Action = "stop" }},
		"a rule that stops, at the trace": {"alerts.trace", func(a *bundle.Alerts) { a.Findings[0].Action, a.Findings[0].Kind = "stop", bundle.EventTraceLost }},
	} {
		t.Run(name, func(t *testing.T) {
			r := withAlerts(t, l, tt.change)
			if got := slices.Compact(slices.Sorted(slices.Values(failedIDs(r)))); r.Verdict != verify.Failed || !slices.Equal(got, []string{tt.fails}) {
				t.Errorf("verdict %s, failed %v, want %s alone", r.Verdict, got, tt.fails)
			}
		})
	}
	t.Run("unchanged", func(t *testing.T) {
		r := withAlerts(t, l, func(*bundle.Alerts) {})
		if o := outcomes(r, "alerts.findings"); r.Verdict != verify.Verified || !slices.Equal(o, []check.Outcome{check.Pass}) {
			t.Errorf("%s, %v", r.Verdict, o)
		}
	})
	t.Run("no record", func(t *testing.T) {
		j := newJob(t, l, bundletest.Options{})
		delete(j.Parts, bundle.AlertsPart)
		if r := verify.Verify(build(t, j), pinned(t, l)); r.Verdict != verify.Failed || !slices.Equal(failedIDs(r), []string{"alerts.complete"}) {
			t.Errorf("%s, %v", r.Verdict, failedIDs(r))
		}
	})
	t.Run("a reason without its finding", func(t *testing.T) {
		j := newJob(t, l, bundletest.Options{})
		j.Outcome = bundle.Outcome{State: bundle.Failed, Stage: bundle.StageRun, Reason: bundle.ReasonRule + "ptrace"}
		if r := verify.Verify(build(t, j), pinned(t, l)); !slices.Contains(failedIDs(r), "alerts.stop") {
			t.Errorf("%s, %v", r.Verdict, failedIDs(r))
		}
	})
}
