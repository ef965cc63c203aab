package jobspec

import (
	"slices"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
)

func TestMetrics(t *testing.T) {
	planOf := func(lines string) plan.Output {
		t.Helper()
		s, err := withRetry(t, lines)
		if err != nil {
			t.Fatal(err)
		}
		p, err := s.Plan(Resolved{Image: "sha256:" + strings.Repeat("0", 64), Policy: plan.Policy{Name: "p", Digest: plan.Sum(nil)}, Profile: plan.Sum(nil)})
		if err != nil {
			t.Fatal(err)
		}
		return p.Output
	}
	o := planOf("output: {metrics: {names: [step, loss], maxValues: 1000}, exitCodes: pass-fail}")
	if m := o.Metrics; m == nil || !slices.Equal(m.Names, []string{"loss", "step"}) || m.MaxValues != 1000 || m.ValuesPerSecond != DefaultMetricValuesPerSecond || o.ExitCodes != plan.ExitPassFail {
		t.Errorf("the plan has %+v, %+v", o, m)
	}
	if o := planOf("output: {metrics: {names: [step], maxValues: 7}}"); o.Metrics.ValuesPerSecond != 7 {
		t.Errorf("the rate is %d", o.Metrics.ValuesPerSecond)
	}
	if a, b := planOf("output: {exitCodes: any}"), planOf(""); a != b {
		t.Errorf("the default is %+v, absent %+v", a, b)
	}
	for name, row := range map[string]struct{ lines, want string }{
		"no names":           {"output: {metrics: {names: [], maxValues: 1}}", "output.metrics.names"},
		"no bound":           {"output: {metrics: {names: [a]}}", "output.metrics.maxValues"},
		"a name twice":       {"output: {metrics: {names: [a, a], maxValues: 1}}", "output.metrics.names"},
		"a long name":        {"output: {metrics: {names: [" + strings.Repeat("a", 33) + "], maxValues: 1}}", "output.metrics.names[0]"},
		"an upper-case name": {"output: {metrics: {names: [Loss], maxValues: 1}}", "output.metrics.names[0]"},
		"too fast":           {"output: {metrics: {names: [a], maxValues: 1, valuesPerSecond: 2}}", "output.metrics.valuesPerSecond"},
		"other exit codes":   {"output: {exitCodes: none}", "output.exitCodes"},
		"a code to retry on": {"output: {exitCodes: pass-fail}\nretry: {limit: 1, onExitCodes: [75]}", "retry.onExitCodes"},
	} {
		if _, err := withRetry(t, row.lines); err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: %v, want a problem of %s", name, err, row.want)
		}
	}
}
