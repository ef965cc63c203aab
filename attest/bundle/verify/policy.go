package verify

import (
	"fmt"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/policy/rego"
)

// policy finds the policy that the plan pins, by digest: among those that the
// caller named, and those that ship.
func (v *verification) policy(l *check.List) (policy.Policy, bool) {
	want := v.pl.Policy
	for _, p := range v.trust.Policies {
		if d, err := p.Digest(); err == nil && d == want.Digest {
			return p, l.Equal("policy.known", p.Name, want.Name, "the plan calls the policy by another name")
		}
	}
	p, err := policy.Named(want.Name)
	if err != nil {
		l.Skip("policy.known", fmt.Sprintf("policy %.80q is none that was named, nor one of this program's: what is acceptable was the verifier's judgement", want.Name))
		return policy.Policy{}, false
	}
	if d, err := p.Digest(); err != nil || d != want.Digest {
		l.Skip("policy.known", fmt.Sprintf("this program has another version of policy %s, and none that was named is it: what is acceptable was the verifier's judgement", p.Name))
		return policy.Policy{}, false
	}
	l.Pass("policy.known", p.Name)
	return p, true
}

// compile makes the policy ready with the reference values that the caller
// named. One that is not of the policy's sources, or was not valid at the clock,
// is an error: the caller would believe that it was applied.
func (v *verification) compile(p policy.Policy) (*rego.Policy, error) {
	var references []policy.References
	for i, token := range v.trust.References {
		r, err := p.OpenReferences(token, v.rep.At)
		if err != nil {
			return nil, fmt.Errorf("reference values %d of those named: %w", i+1, err)
		}
		references = append(references, r)
	}
	return rego.Compile(p, references...)
}
