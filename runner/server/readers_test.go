package server

import (
	"errors"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/journal"
)

func TestMayRead(t *testing.T) {
	with := func(readers string) []byte {
		b, err := plan.Plan{
			Version: plan.Version, Name: "n", Image: "sha256:" + strings.Repeat("a", 64), Command: []string{"/bin/true"}, Inputs: []plan.Input{},
			Output: plan.Output{LogBytes: 1, LogReaders: readers}, Resources: plan.Resources{CPUMillis: 1, MemoryBytes: 1, Pids: 1, MaxSeconds: 1},
			Policy: plan.Policy{Name: "p", Digest: plan.Sum(nil)}, SandboxProfile: plan.Sum(nil),
		}.Canonical()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	nobody, owners, engineers := with(""), with(plan.ReadersOwners), with(plan.ReadersEngineers)
	yes := func(plan.Plan) (bool, error) { return true, nil }
	no := func(plan.Plan) (bool, error) { return false, nil }
	for name, c := range map[string]struct {
		caller Caller
		plan   []byte
		owns   func(plan.Plan) (bool, error)
		may    bool
	}{
		"who submitted it":                   {Caller{"user/ada", []string{"engineer"}}, nobody, no, true},
		"a scheduler that submitted it":      {Caller{"user/ada", []string{"scheduler"}}, nobody, no, true},
		"who submitted it, an engineer once": {Caller{"user/ada", []string{"auditor"}}, nobody, no, false},
		"nobody":                             {Caller{}, nobody, yes, false},
		"nobody, with a role":                {Caller{Roles: []string{"engineer", "owner"}}, engineers, yes, false},
		"another engineer":                   {Caller{"user/eve", []string{"engineer"}}, nobody, yes, false},
		"an owner, unnamed":                  {Caller{"user/olga", []string{"owner"}}, nobody, yes, false},
		"an owner":                           {Caller{"user/olga", []string{"owner"}}, owners, yes, true},
		"an owner of other assets":           {Caller{"user/olga", []string{"owner"}}, owners, no, false},
		"who owns, and has no role for it":   {Caller{"user/olga", []string{"engineer"}}, owners, yes, false},
		"engineers may":                      {Caller{"user/eve", []string{"engineer"}}, engineers, no, true},
		"an operator is no engineer":         {Caller{"user/eve", []string{"operator"}}, engineers, yes, false},
		"an owner where engineers may":       {Caller{"user/olga", []string{"owner"}}, engineers, yes, false},
	} {
		if got, err := mayRead(c.caller, journal.Job{Submitter: "user/ada", Plan: c.plan}, c.owns); err != nil || got != c.may {
			t.Errorf("%s: %v %v", name, got, err)
		}
	}
	away := func(plan.Plan) (bool, error) { return true, errors.New("away") }
	if _, err := mayRead(Caller{"user/olga", []string{"owner"}}, journal.Job{Submitter: "user/ada", Plan: owners}, away); err == nil {
		t.Error("a broker that is away lets an owner read")
	}
	if got, err := mayRead(Caller{"user/eve", []string{"engineer"}}, journal.Job{Submitter: "user/ada", Plan: []byte("{")}, yes); err == nil || got {
		t.Errorf("a plan that does not parse: %v %v", got, err)
	}
}
