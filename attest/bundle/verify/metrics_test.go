package verify

import (
	"testing"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

func TestMetricsOfTheRecord(t *testing.T) {
	allowed := &plan.Metrics{Names: []string{"loss", "step"}, MaxValues: 10, ValuesPerSecond: 1}
	one := func(name string, count int64) bundle.Metric {
		return bundle.Metric{Name: name, Count: count, Last: 2, Min: 1, Max: 3}
	}
	of := func(values ...bundle.Metric) *bundle.Metrics { return &bundle.Metrics{Values: values} }
	for name, row := range map[string]struct {
		plan *plan.Metrics
		got  *bundle.Metrics
		want string // the failed check, "" for none
	}{
		"neither":                   {nil, nil, ""},
		"none were reported":        {allowed, of(), ""},
		"as many as the plan has":   {allowed, of(one("loss", 4), one("step", 6)), ""},
		"one more":                  {allowed, of(one("loss", 5), one("step", 6)), "metrics.budget"},
		"more than a number holds":  {allowed, of(one("loss", 1<<62), one("step", 1<<62)), "metrics.budget"},
		"fewer than none cut":       {allowed, &bundle.Metrics{Cut: -1}, "metrics.budget"},
		"a plan without":            {nil, of(), "metrics.plan"},
		"a record without":          {allowed, nil, "metrics.plan"},
		"a name that it has not":    {allowed, of(one("secret", 1)), "metrics.form"},
		"a name twice":              {allowed, of(one("loss", 1), one("loss", 1)), "metrics.form"},
		"another order":             {allowed, of(one("step", 1), one("loss", 1)), "metrics.form"},
		"a name without a value":    {allowed, of(one("loss", 0)), "metrics.form"},
		"a last above the most":     {allowed, of(bundle.Metric{Name: "loss", Count: 1, Last: 4, Min: 1, Max: 3}), "metrics.form"},
		"a last below the least":    {allowed, of(bundle.Metric{Name: "loss", Count: 1, Last: 0, Min: 1, Max: 3}), "metrics.form"},
		"fewer values than nothing": {allowed, of(one("loss", -5)), "metrics.form"},
	} {
		v := &verification{pl: &plan.Plan{Output: plan.Output{Metrics: row.plan}}, status: &bundle.Status{Metrics: row.got}}
		v.st.Outcome.State = bundle.Succeeded
		var g check.List
		v.metrics(&g)
		failed := ""
		for _, c := range g {
			if c.Outcome == check.Fail {
				failed += c.ID
			}
		}
		if failed != row.want {
			t.Errorf("%s: %q fails, want %q", name, failed, row.want)
		}
	}
}

func TestExitCodeOfTheRecord(t *testing.T) {
	for _, row := range []struct {
		allowed string
		code    int
		fails   bool
	}{{"", 75, false}, {plan.ExitPassFail, 0, false}, {plan.ExitPassFail, 1, false}, {plan.ExitPassFail, 75, true}, {plan.ExitPassFail, -1, true}} {
		v := &verification{pl: &plan.Plan{Output: plan.Output{ExitCodes: row.allowed}}}
		v.st.Outcome = bundle.Outcome{State: bundle.Failed, ExitCode: row.code}
		var g check.List
		v.exitCode(&g)
		if fails := len(g) == 1 && g[0].Outcome == check.Fail; fails != row.fails {
			t.Errorf("%q, exit code %d: %v", row.allowed, row.code, g)
		}
	}
}
