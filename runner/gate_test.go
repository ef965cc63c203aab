package runner

import "testing"

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
