package verify

import (
	"slices"
	"testing"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
)

// Checks that need endorsements may have been made by the verifier and not be
// possible here. They are never passed, and fail only if nobody made them.
func TestVerifiersWord(t *testing.T) {
	p, err := policy.Named("production")
	if err != nil {
		t.Fatal(err)
	}
	outcome := func(there check.Outcome) []check.Outcome {
		v := &verification{result: &receipt.Result{Submods: map[string]receipt.Appraisal{
			"cpu0": {Checks: check.List{{ID: "snp.crl", Outcome: there}}},
		}}}
		var out []check.Outcome
		for _, c := range v.decide(p, policy.Evidence{SNP: &policy.Device{Checks: check.List{{ID: "snp.crl", Outcome: check.NotChecked}}}}) {
			if c.ID == "policy.snp.require" && (c.Expected == "snp.crl to be checked" || len(c.Found) > 7 && c.Found[:7] == "snp.crl") {
				out = append(out, c.Outcome)
			}
		}
		return out
	}
	if got := outcome(check.Pass); !slices.Equal(got, []check.Outcome{check.NotChecked}) {
		t.Errorf("made there alone: %v", got)
	}
	if got := outcome(check.NotChecked); !slices.Equal(got, []check.Outcome{check.Fail}) {
		t.Errorf("made nowhere: %v", got)
	}
}
