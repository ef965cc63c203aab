package plan_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
)

func TestOutputOfAPlan(t *testing.T) {
	digest := func(o plan.Output) (plan.Digest, error) {
		o.LogBytes = 1
		return plan.Plan{
			Version: plan.Version, Name: "n", Image: "sha256:" + strings.Repeat("0", 64), Command: []string{"/bin/true"}, Inputs: []plan.Input{},
			Output: o, Policy: plan.Policy{Name: "p", Digest: plan.Sum(nil)}, SandboxProfile: plan.Sum(nil),
			Resources: plan.Resources{CPUMillis: 1, MemoryBytes: 1, Pids: 1, MaxSeconds: 1},
		}.Digest()
	}
	seen := map[plan.Digest]string{}
	for name, o := range map[string]plan.Output{
		"neither": {}, "one bit": {ExitCodes: plan.ExitPassFail},
		"a metric":     {Metrics: &plan.Metrics{Names: []string{"loss"}, MaxValues: 9, ValuesPerSecond: 1}},
		"another":      {Metrics: &plan.Metrics{Names: []string{"step"}, MaxValues: 9, ValuesPerSecond: 1}},
		"more of them": {Metrics: &plan.Metrics{Names: []string{"loss"}, MaxValues: 10, ValuesPerSecond: 1}},
		"faster":       {Metrics: &plan.Metrics{Names: []string{"loss"}, MaxValues: 9, ValuesPerSecond: 2}},
	} {
		d, err := digest(o)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if seen[d] != "" {
			t.Errorf("%s has the digest of %s", name, seen[d])
		}
		seen[d] = name
	}
	many := slices.Repeat([]string{"a"}, plan.MaxMetricNames+1)
	for i := range many {
		many[i] = strings.Repeat("a", i%32+1) + strings.Repeat("b", i/32)
	}
	slices.Sort(many)
	for name, o := range map[string]plan.Output{
		"exit codes of another form": {ExitCodes: "any"},
		"no metric":                  {Metrics: &plan.Metrics{MaxValues: 9, ValuesPerSecond: 1}},
		"no bound":                   {Metrics: &plan.Metrics{Names: []string{"a"}, ValuesPerSecond: 1}},
		"no rate":                    {Metrics: &plan.Metrics{Names: []string{"a"}, MaxValues: 9}},
		"a rate above the bound":     {Metrics: &plan.Metrics{Names: []string{"a"}, MaxValues: 9, ValuesPerSecond: 10}},
		"a bound that is none":       {Metrics: &plan.Metrics{Names: []string{"a"}, MaxValues: plan.MaxMetricValues + 1, ValuesPerSecond: 1}},
		"a name twice":               {Metrics: &plan.Metrics{Names: []string{"a", "a"}, MaxValues: 9, ValuesPerSecond: 1}},
		"another order":              {Metrics: &plan.Metrics{Names: []string{"b", "a"}, MaxValues: 9, ValuesPerSecond: 1}},
		"an upper-case name":         {Metrics: &plan.Metrics{Names: []string{"A"}, MaxValues: 9, ValuesPerSecond: 1}},
		"a long name":                {Metrics: &plan.Metrics{Names: []string{strings.Repeat("a", 33)}, MaxValues: 9, ValuesPerSecond: 1}},
		"a name of two lines":        {Metrics: &plan.Metrics{Names: []string{"a\nb"}, MaxValues: 9, ValuesPerSecond: 1}},
		"too many names":             {Metrics: &plan.Metrics{Names: many, MaxValues: 9, ValuesPerSecond: 1}},
	} {
		if _, err := digest(o); err == nil {
			t.Errorf("%s: a plan", name)
		}
	}
	for code, want := range map[int]int{0: 0, 1: 1, 75: 1, 255: 1, -1: 1} {
		if got := (plan.Output{ExitCodes: plan.ExitPassFail}).ExitCode(code); got != want {
			t.Errorf("of the exit code %d %d leaves, want %d", code, got, want)
		}
		if got := (plan.Output{}).ExitCode(code); got != code {
			t.Errorf("without a bound %d is %d", code, got)
		}
	}
}
