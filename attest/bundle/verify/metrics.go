package verify

import (
	"fmt"
	"slices"

	"github.com/coffer-run/coffer/attest/check"
)

// metrics holds the numbers that a job reported against the bounds of its plan.
func (v *verification) metrics(g *check.List) {
	if v.pl == nil || v.status == nil {
		return
	}
	allowed, m := v.pl.Output.Metrics, v.status.Metrics
	if allowed == nil || m == nil {
		v.strict(g, "metrics.plan", (allowed == nil) == (m == nil), "metrics if and only if the plan allows some", said(m == nil, "none", "metrics"))
		return
	}
	total, last := int64(0), -1
	for _, one := range m.Values {
		i := slices.Index(allowed.Names, one.Name)
		if i <= last || one.Count < 1 || one.Min > one.Last || one.Last > one.Max {
			g.Fail("metrics.form", "the plan's names in their order, with one value or more each", fmt.Sprintf("%.40q, %d values, %g between %g and %g", one.Name, one.Count, one.Last, one.Min, one.Max), "")
			return
		}
		last = i
		total += min(one.Count, allowed.MaxValues+1)
	}
	if total > allowed.MaxValues || m.Cut < 0 {
		g.Fail("metrics.budget", fmt.Sprintf("at most %d values", allowed.MaxValues), fmt.Sprintf("%d values", total), "the job said more than the plan allows")
		return
	}
	g.Pass("metrics.budget", fmt.Sprintf("%d of %d values, %d cut", total, allowed.MaxValues, m.Cut))
}

// exitCode holds the exit code against what of it the plan lets out.
func (v *verification) exitCode(g *check.List) {
	if v.pl == nil || v.pl.Output.ExitCodes == "" {
		return
	}
	code := v.st.Outcome.ExitCode
	if code != v.pl.Output.ExitCode(code) {
		g.Fail("outcome.exit-code", "0 or 1", fmt.Sprint(code), "the record says more of the exit code than the plan allows")
		return
	}
	g.Pass("outcome.exit-code", fmt.Sprintf("%d: whether it is 0 is all that left the node", code))
}
