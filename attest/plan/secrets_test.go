package plan_test

import (
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
)

func TestSecretsOfAPlan(t *testing.T) {
	with := func(in plan.Input) plan.Plan {
		in.Asset, in.Digest = "a", plan.Sum(nil)
		return plan.Plan{
			Version: plan.Version, Name: "n", Image: "sha256:" + strings.Repeat("0", 64), Command: []string{"/bin/true"}, Inputs: []plan.Input{in},
			Output: plan.Output{LogBytes: 1}, Policy: plan.Policy{Name: "p", Digest: plan.Sum(nil)}, SandboxProfile: plan.Sum(nil),
			Resources: plan.Resources{CPUMillis: 1, MemoryBytes: 1, Pids: 1, MaxSeconds: 1},
		}
	}
	secret, err := with(plan.Input{Name: "token", Mount: "/run/secrets/token", Secret: true}).Digest()
	if err != nil {
		t.Fatal(err)
	}
	if input, err := with(plan.Input{Name: "token", Mount: "/inputs/token"}).Digest(); err != nil || input == secret {
		t.Errorf("an input has the digest %s (%v), the secret %s", input, err, secret)
	}
	for name, in := range map[string]plan.Input{
		"a secret elsewhere":              {Name: "token", Mount: "/inputs/token", Secret: true},
		"a secret at another's place":     {Name: "token", Mount: "/run/secrets/other", Secret: true},
		"a secret that leaves the folder": {Name: "../token", Mount: "/run/token", Secret: true},
		"a secret that is the folder":     {Name: ".", Mount: "/run/secrets", Secret: true},
		"an input among the secrets":      {Name: "token", Mount: "/run/secrets/token"},
		"an input over the secrets":       {Name: "token", Mount: "/run/secrets"},
	} {
		if _, err := with(in).Digest(); err == nil {
			t.Errorf("%s: a plan", name)
		}
	}
}
