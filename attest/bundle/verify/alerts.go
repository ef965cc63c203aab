package verify

import (
	"fmt"
	"slices"
	"strings"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
)

// alerts holds what the node's rules found against the trace, and a job that a rule
// ended against that rule. That the rules were applied to all of the trace is the
// measured agent's word.
func (v *verification) alerts(g *check.List) {
	if v.sb == nil {
		return
	}
	stopped, isStopped := strings.CutPrefix(v.st.Outcome.Reason, bundle.ReasonRule)
	b, ok := v.part(bundle.AlertsPart)
	switch {
	case !ok && isStopped:
		g.Fail("alerts.stop", "the finding for which rule "+fmt.Sprintf("%.80q", stopped)+" ended the job", "none", "")
		return
	case !ok && v.sb.Profile.RuleSet != "" && v.reached(bundle.StageStart):
		g.Fail("alerts.complete", "what the node's rules found", "nothing that can be relied on", "the record is not complete")
		return
	case !ok:
		return
	}
	a, err := bundle.Decode[bundle.Alerts](b)
	if err != nil {
		g.Fail("alerts.form", "a list of findings", err.Error(), "")
		return
	}
	g.Equal("alerts.rules", string(v.sb.Profile.RuleSet), string(a.Rules), "the job was watched by other rules than those of its sandbox profile")
	kinds := map[uint64]string{}
	if b, ok := v.part(bundle.Trace); ok {
		if events, err := bundle.Decode[[]bundle.Event](b); err == nil {
			for _, e := range events {
				kinds[e.Sequence] = e.Kind
			}
		}
	}
	var rules []string
	for i, f := range a.Findings {
		if f.Sequence != uint64(i+1) {
			g.Fail("alerts.order", fmt.Sprintf("finding %d", i+1), fmt.Sprintf("finding %d", f.Sequence), "findings were cut out or reordered")
			return
		}
		if kind, ok := kinds[f.Trace]; f.Trace != 0 && ok && kind != f.Kind {
			g.Fail("alerts.trace", fmt.Sprintf("an event of the kind %.40q", f.Kind), fmt.Sprintf("%.40q, number %d of the trace", kind, f.Trace), "")
			return
		}
		if !slices.Contains(rules, f.Rule) {
			rules = append(rules, f.Rule)
		}
	}
	if isStopped && !slices.ContainsFunc(a.Findings, func(f bundle.Finding) bool { return f.Rule == stopped && f.Action == "stop" }) {
		g.Fail("alerts.stop", "the finding for which rule "+fmt.Sprintf("%.80q", stopped)+" ended the job", "none", "")
	}
	if i := slices.IndexFunc(a.Findings, func(f bundle.Finding) bool { return f.Action == "stop" }); i >= 0 && v.st.Outcome.State == bundle.Succeeded {
		g.Fail("alerts.stop", fmt.Sprintf("a job that rule %.80q ended", a.Findings[i].Rule), "one that succeeded", "")
	}
	if len(a.Findings) == 0 {
		g.Pass("alerts.findings", "the node's rules found nothing")
		return
	}
	g.Pass("alerts.findings", fmt.Sprintf("%d findings and %d more counted, of the rules %.400s", len(a.Findings), a.Untold, strings.Join(rules, ", ")))
}
