package verifier_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
)

// What a policy says of a device is its status in the result, and never better
// than what else was found. Nobody relies on any of these.
func TestStatusIsThePolicysWord(t *testing.T) {
	rules := func(tier string) func(*policy.Policy) {
		return func(p *policy.Policy) {
			p.Name = "mine"
			standard, err := policy.StandardRules()
			if err != nil {
				t.Fatal(err)
			}
			p.Rules = map[string]string{}
			for name, text := range standard {
				p.Rules[name] = strings.Replace(text, `"tier": "affirming"`, `"tier": "`+tier+`"`, 1)
				if p.Rules[name] == text {
					t.Fatal("the rules have no tier to replace")
				}
			}
		}
	}
	all := func(s receipt.Tier) map[string]receipt.Tier {
		return map[string]receipt.Tier{"cpu0": s, "tpm0": s, "gpu0": s}
	}
	for _, row := range []struct {
		situation string
		policy    func(*policy.Policy)
		attack    func(a *attester)
		status    map[string]receipt.Tier
		by        string
	}{
		{"rules that only warn", rules("warning"), nil, all(receipt.Warning), "policy.snp.tier"},
		{"rules that say nothing", rules("none"), nil, all(receipt.None), "policy.snp.tier"},
		{"rules that contraindicate", rules("contraindicated"), nil, all(receipt.Contraindicated), "policy.snp.tier"},
		{"rules that only warn, of a device that is not genuine", rules("warning"), func(a *attester) { a.e.GPUs[0].Report[100] ^= 1 },
			map[string]receipt.Tier{"cpu0": receipt.Contraindicated, "tpm0": receipt.Contraindicated, "gpu0": receipt.Contraindicated}, "gpu.parse"},
		{"a nonce that is no verifier's", nil, func(a *attester) { a.e.Nonce = strings.Repeat("n", 98); a.collect() }, all(receipt.Contraindicated), "nonce.authentic"},
		{"a plan that asks for another number of GPUs", nil, func(a *attester) {
			a.e.Plan = a.plan(func(p *plan.Plan) { p.Resources.GPUs = 0 })
			a.collect()
		}, all(receipt.None), "policy.gpu.count"},
	} {
		t.Run(row.situation, func(t *testing.T) {
			w := newWorld(t)
			if row.policy != nil {
				row.policy(&w.policy)
				w.v = w.verifier(nil)
			}
			a := w.attester().collect()
			if row.attack != nil {
				row.attack(a)
			}
			token, r := a.appraise()
			for name, want := range row.status {
				if s := r.Submods[name]; s.Status != want {
					t.Errorf("%s is %s, want %s", name, s.Status, want)
				}
			}
			var ids []string
			for _, c := range r.AllChecks().Failed() {
				ids = append(ids, c.ID)
			}
			if !slices.Contains(ids, row.by) {
				t.Errorf("failed %v, want %s", ids, row.by)
			}
			if _, err := w.relyingParty(token); err == nil {
				t.Error("relied on")
			}
		})
	}
}

// Texts are compared as they are, not as they are shown.
func TestTextsThatLookAlike(t *testing.T) {
	w := newWorld(t)
	a := w.attester()
	a.e.JobID = "job?1"
	a.e.Sandbox = w.sandbox(func(s *plan.Sandbox) { s.JobID = "job\x011" })
	a.collect().wantRefused("sandbox.job")
}
