package plan_test

import (
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
)

func small() plan.Plan {
	return plan.Plan{
		Version: plan.Version, Name: "n", Image: "sha256:" + strings.Repeat("a", 64), Command: []string{"/bin/true"}, Inputs: []plan.Input{},
		Output:    plan.Output{LogBytes: 1},
		Resources: plan.Resources{CPUMillis: 1, MemoryBytes: 1, Pids: 1, GPUs: 2, MaxSeconds: 1},
		Policy:    plan.Policy{Name: "p", Digest: plan.Sum(nil)}, SandboxProfile: plan.Sum(nil),
	}
}

func TestBudgetForm(t *testing.T) {
	const day, year = 24 * 3600, 365 * 24 * 3600
	for name, c := range map[string]struct {
		change func(*plan.Plan)
		good   bool
	}{
		"nothing of it":           {func(*plan.Plan) {}, true},
		"time":                    {func(p *plan.Plan) { p.Budget = &plan.Budget{Seconds: 1} }, true},
		"GPU time":                {func(p *plan.Plan) { p.Budget = &plan.Budget{GPUSeconds: 2} }, true},
		"a second for two GPUs":   {func(p *plan.Plan) { p.Budget = &plan.Budget{GPUSeconds: 1} }, false},
		"GPU time without GPUs":   {func(p *plan.Plan) { p.Resources.GPUs, p.Budget = 0, &plan.Budget{GPUSeconds: 9} }, false},
		"an empty budget":         {func(p *plan.Plan) { p.Budget = &plan.Budget{} }, false},
		"a negative budget":       {func(p *plan.Plan) { p.Budget = &plan.Budget{Seconds: -1} }, false},
		"negative, beside a good": {func(p *plan.Plan) { p.Budget = &plan.Budget{Seconds: 5, GPUSeconds: -4} }, false},
		"more than ten years":     {func(p *plan.Plan) { p.Budget = &plan.Budget{Seconds: 10*year + 1} }, false},
		"mode on":                 {func(p *plan.Plan) { p.Resources.CC = plan.CCOn }, true},
		"mode required":           {func(p *plan.Plan) { p.Resources.CC = plan.CCRequired }, true},
		"mode off, in words":      {func(p *plan.Plan) { p.Resources.CC = "off" }, false},
		"a mode of no GPUs":       {func(p *plan.Plan) { p.Resources.GPUs, p.Resources.CC = 0, plan.CCOn }, false},
		"a day":                   {func(p *plan.Plan) { p.Evidence = &plan.Retention{RetainSeconds: day} }, true},
		"less than a day":         {func(p *plan.Plan) { p.Evidence = &plan.Retention{RetainSeconds: day - 1} }, false},
		"no time to keep it":      {func(p *plan.Plan) { p.Evidence = &plan.Retention{} }, false},
		"owners read":             {func(p *plan.Plan) { p.Output.LogReaders = plan.ReadersOwners }, true},
		"everybody reads":         {func(p *plan.Plan) { p.Output.LogReaders = "everybody" }, false},
	} {
		p := small()
		c.change(&p)
		if _, err := p.Canonical(); (err == nil) != c.good {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestBudgetSeconds(t *testing.T) {
	for name, c := range map[string]struct {
		budget  *plan.Budget
		want    int64
		bounded bool
	}{
		"none":                      {nil, 0, false},
		"time":                      {&plan.Budget{Seconds: 7}, 7, true},
		"GPU time, of two":          {&plan.Budget{GPUSeconds: 9}, 4, true},
		"time is the smaller":       {&plan.Budget{Seconds: 3, GPUSeconds: 9}, 3, true},
		"half the GPU time is less": {&plan.Budget{Seconds: 5, GPUSeconds: 9}, 4, true},
	} {
		p := small()
		p.Budget = c.budget
		if got, bounded := p.BudgetSeconds(); got != c.want || bounded != c.bounded {
			t.Errorf("%s: %d %v", name, got, bounded)
		}
	}
}
