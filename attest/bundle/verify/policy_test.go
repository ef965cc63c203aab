package verify_test

import (
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/policy"
)

// A policy that does not ship is applied if the caller names it, with the
// reference values that the caller names. Neither comes from the bundle.
func TestNamedPolicy(t *testing.T) {
	l := newLab(t)
	own, sourced := l.Policy(bundletest.OwnPolicy), l.Policy(bundletest.SourcedPolicy)
	other := own
	other.Data = map[string]any{"changed": true}
	values := func(mode string) string {
		t.Helper()
		token, err := l.References(mode)
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	good := values("SPT")
	for _, row := range []struct {
		situation  string
		plans      string
		policies   []policy.Policy
		references []string
		verdict    verify.Verdict
		// by is the check that says so.
		by      string
		outcome check.Outcome
		says    string
	}{
		{"nobody names it", bundletest.OwnPolicy, nil, nil, verify.Verified, "policy.known", check.NotChecked, "none that was named"},
		{"it is named", bundletest.OwnPolicy, []policy.Policy{other, own}, nil, verify.Verified, "policy.known", check.Pass, "own"},
		{"another version is named", bundletest.OwnPolicy, []policy.Policy{other}, nil, verify.Verified, "policy.known", check.NotChecked, "none that was named"},
		{"with its reference values", bundletest.SourcedPolicy, []policy.Policy{sourced}, []string{good}, verify.Verified, "policy.references", check.Pass, "values.test: 1"},
		{"without its reference values", bundletest.SourcedPolicy, []policy.Policy{sourced}, nil, verify.Failed, "policy.references", check.Fail, "none"},
		{"with others than the devices meet", bundletest.SourcedPolicy, []policy.Policy{sourced}, []string{values("MPT")}, verify.Failed, "policy.gpu.feature-flag", check.Fail, "SPT"},
		{"with values that nobody signed", bundletest.SourcedPolicy, []policy.Policy{sourced}, []string{good, good[:len(good)-8] + "AAAAAAAA"}, verify.Failed, "policy.rules", check.Fail, "reference values 2"},
		{"with values for a policy that asks for none", bundletest.OwnPolicy, []policy.Policy{own}, []string{good}, verify.Failed, "policy.rules", check.Fail, "names no source"},
	} {
		t.Run(row.situation, func(t *testing.T) {
			file := build(t, newJob(t, l, bundletest.Options{Policy: row.plans}))
			trust := pinned(t, l)
			trust.Policies, trust.References = row.policies, row.references
			r := verify.Verify(file, trust)
			if r.Verdict != row.verdict {
				t.Errorf("verdict %s: %s", r.Verdict, r.Summary)
			}
			for _, c := range r.Checks() {
				if c.ID == row.by {
					if c.Outcome != row.outcome || !strings.Contains(c.Found, row.says) {
						t.Errorf("%s: %s, %s", c.ID, c.Outcome, c.Found)
					}
					return
				}
			}
			t.Errorf("no check %s", row.by)
		})
	}
}
