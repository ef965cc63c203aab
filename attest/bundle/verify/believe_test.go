package verify

import (
	"slices"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/composite"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/vtpm"
)

// Checks that need endorsements may have been made by the verifier and not be
// possible here. They are never passed, and fail only if nobody made them.
func TestVerifiersWord(t *testing.T) {
	p, err := policy.Named("production")
	if err != nil {
		t.Fatal(err)
	}
	outcome := func(there check.Outcome, pinned []byte) []check.Outcome {
		v := &verification{trust: Trust{VerifierKeys: pinned}, result: &receipt.Result{Submods: map[string]receipt.Appraisal{
			"cpu0": {Checks: check.List{{ID: "snp.crl", Outcome: there}}},
		}}}
		var out []check.Outcome
		rules, whole := v.decide(p, policy.Evidence{SNP: &policy.Device{Checks: check.List{{ID: "snp.crl", Outcome: check.NotChecked}}}})
		if whole && !slices.Contains(ids(rules.Failed()), "policy.snp.require") {
			t.Error("a policy with an open question was applied in full")
		}
		for _, c := range rules {
			if c.ID == "policy.snp.require" && (c.Expected == "snp.crl to be checked" || len(c.Found) > 7 && c.Found[:7] == "snp.crl") {
				out = append(out, c.Outcome)
				if pinned == nil && !strings.HasSuffix(c.Found, nobodysWord) {
					t.Errorf("told as somebody's word: %s", c.Found)
				}
			}
		}
		return out
	}
	pinned := []byte("{}")
	if got := outcome(check.Pass, pinned); !slices.Equal(got, []check.Outcome{check.NotChecked}) {
		t.Errorf("made there alone: %v", got)
	}
	if got := outcome(check.NotChecked, pinned); !slices.Equal(got, []check.Outcome{check.Fail}) {
		t.Errorf("made nowhere: %v", got)
	}
	if got := outcome(check.Pass, nil); !slices.Equal(got, []check.Outcome{check.NotChecked}) {
		t.Errorf("by the word of nobody who is known: %v", got)
	}
	if got := outcome(check.NotChecked, nil); !slices.Equal(got, []check.Outcome{check.NotChecked}) {
		t.Errorf("made nowhere, and nobody known says so: %v", got)
	}
}

// A credential under keys from the bundle proves nothing. The platform's report
// and a pinned key need no such keys.
func TestWhoseWordStandsForTheAttestationKey(t *testing.T) {
	for by, want := range map[string]check.Outcome{
		vtpm.AKByCredential: check.NotChecked, vtpm.AKByPlatform: check.Pass, vtpm.AKByPin: check.Pass,
	} {
		d := &composite.Device{Kind: composite.TPM, Claims: map[string]any{"tpm.ak-by": by}, Checks: check.List{{ID: "tpm.ak-credential", Outcome: check.Pass}}}
		if got := told(d, false, false); len(got) != 1 || got[0].Outcome != want {
			t.Errorf("%s, no keys pinned: %+v", by, got)
		}
		if got := told(d, false, true); len(got) != 1 || got[0].Outcome != check.Pass {
			t.Errorf("%s, keys pinned: %+v", by, got)
		}
	}
}
