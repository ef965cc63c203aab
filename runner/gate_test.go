package runner

import (
	"errors"
	"slices"
	"testing"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

func TestMayUse(t *testing.T) {
	a := &Agent{Deps: Deps{Name: "node-1"}}
	j := newJob("j", "engineer/ada")
	for name, c := range map[string]struct {
		principals []string
		want       bool
	}{
		"nobody is named":               {nil, true},
		"this agent":                    {[]string{"agent/node-1"}, true},
		"another agent":                 {[]string{"agent/node-2"}, false},
		"this submitter":                {[]string{"engineer/bob", "engineer/ada"}, true},
		"another submitter":             {[]string{"engineer/bob"}, false},
		"this agent, another submitter": {[]string{"agent/node-1", "engineer/bob"}, false},
		"another agent, this submitter": {[]string{"agent/node-2", "engineer/ada"}, false},
		"both":                          {[]string{"agent/node-1", "engineer/ada"}, true},
	} {
		if got := a.mayUse(&grantInfo{Principals: c.principals}, j); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// A refusal names every asset without a grant, and not the first alone.
func TestGrantsFor(t *testing.T) {
	a := &Agent{Deps: Deps{Name: "node-1"}}
	j := newJob("j", "engineer/ada")
	j.plan = plan.Plan{Inputs: []plan.Input{{Asset: "data"}, {Asset: "model"}}, Checkpoints: &plan.Checkpoints{Asset: "ckpt"}}
	old := &grantInfo{Id: "old", State: "revoked", Assets: []string{"data"}}
	both := &grantInfo{Id: "both", State: grantActive, Assets: []string{"data", "model"}}
	elsewhere := &grantInfo{Id: "elsewhere", State: grantActive, Assets: []string{"ckpt"}, Principals: []string{"agent/node-2"}}
	for name, c := range map[string]struct {
		known   []*grantInfo
		want    []string
		refused []string
	}{
		"none":                           {nil, nil, []string{"data", "model", "ckpt"}},
		"one asset has none":             {[]*grantInfo{both}, nil, []string{"ckpt"}},
		"one that counts, before others": {[]*grantInfo{old, both, elsewhere}, []string{"both", "both", "elsewhere"}, nil},
		"one that does not count alone":  {[]*grantInfo{old}, nil, []string{"model", "ckpt"}},
	} {
		got, err := a.grantsFor(j, c.known)
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %q", name, got)
		}
		var refused *check.Refusal
		if (err != nil) != (len(c.refused) > 0) || err != nil && !errors.As(err, &refused) {
			t.Errorf("%s: %v", name, err)
		}
		if refused == nil {
			continue
		}
		var named []string
		for _, k := range refused.Checks {
			if k.ID != "grant.missing" || k.Hint == "" {
				t.Errorf("%s: %+v", name, k)
			}
			for _, asset := range []string{"data", "model", "ckpt"} {
				if k.Expected == "a grant on asset "+asset+" for plan " {
					named = append(named, asset)
				}
			}
		}
		if !slices.Equal(named, c.refused) {
			t.Errorf("%s: refused for %q, want %q", name, named, c.refused)
		}
	}
}
