package e2e

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
)

// What the verifier says of the machine before there is a job is what it says of the
// job's evidence, and no part of the plan.
func TestPlanPredictsTheVerdict(t *testing.T) {
	n := need(t)
	type preview struct {
		Digest  string          `json:"planDigest"`
		Plan    json.RawMessage `json:"plan"`
		Verdict struct {
			Verdict   string        `json:"verdict"`
			Simulated bool          `json:"simulated"`
			Failed    []failedCheck `json:"failedChecks"`
			Unknown   string        `json:"unknown"`
		} `json:"predictedVerdict"`
	}
	job := n.jobFile(t, "predicted", func(s string) string { return strings.Replace(s, "maxDuration: 30m", "maxDuration: 29m", 1) })
	predict := func(policy string) (p preview) {
		t.Helper()
		out := n.must(t, "plan", job, "--set", "attestationPolicy="+policy, "-o", "json")
		if err := json.Unmarshal([]byte(out), &p); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return p
	}
	good := predict("simulation")
	if good.Verdict.Verdict != "accepted" || !good.Verdict.Simulated || len(good.Verdict.Failed) > 0 {
		t.Errorf("under simulation: %+v", good.Verdict)
	}
	if again := predict("simulation"); again.Digest != good.Digest || strings.Contains(string(good.Plan), "verdict") {
		t.Errorf("the prediction is in the plan: %s, then %s", good.Digest, again.Digest)
	}
	// A production policy refuses emulated devices, and lacks reference values.
	bad := predict("production")
	if bad.Verdict.Verdict != "refused" || !slices.ContainsFunc(bad.Verdict.Failed, func(c failedCheck) bool { return c.ID == "policy.snp.simulated" }) {
		t.Errorf("under production: %+v", bad.Verdict)
	}
}

// A job ends when its budget is spent, and is not tried again.
func TestBudget(t *testing.T) {
	n := need(t)
	job := n.jobFile(t, "budget", func(s string) string {
		return strings.Replace(s, `EPOCHS: "1"`, `EPOCHS: "50"`, 1) + "\nbudget: {gpuTime: 2s}\nretry: {limit: 2, onEvents: [deadline]}\n"
	})
	n.grant(t, n.planDigest(t, job), 3)
	s := n.wait(t, n.submit(t, job), "ended", ended)
	if s.State != "failed" || s.Reason != "budget" {
		t.Errorf("%+v", s)
	}
	n.verified(t, s.ID)
}
