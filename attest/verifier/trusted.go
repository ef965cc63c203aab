package verifier

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/policy/rego"
)

// trusted is what a verifier believes and demands: all that operators change
// while it serves, but the keys. It is not changed once made; an appraisal uses
// one from its first check to its last.
type trusted struct {
	anchors  anchor.Set
	policies map[plan.Digest]*rego.Policy
	// references are what each policy was compiled with.
	references map[plan.Digest][]policy.References
	// kbs is nil if there is no policy for guests of the KBS protocol.
	kbs    *rego.Policy
	kbsRef plan.Policy
	// rules is the digest of policies and reference values.
	rules plan.Digest
}

// rulesOf is the digest of the policies and reference values of o, in whichever order
// they come.
func rulesOf(o Options) (plan.Digest, error) {
	var all []string
	for _, p := range o.Policies {
		d, err := p.Digest()
		if err != nil {
			return "", err
		}
		all = append(all, string(d))
	}
	for _, r := range o.References {
		all = append(all, string(plan.Sum([]byte(r))))
	}
	slices.Sort(all)
	return plan.Sum([]byte(strings.Join(all, "\n"))), nil
}

func newTrusted(o Options, now time.Time) (*trusted, error) {
	switch {
	case o.Anchors.Empty():
		return nil, errors.New("no trust anchors")
	case len(o.Policies) == 0:
		return nil, errors.New("no policies")
	}
	t := &trusted{anchors: o.Anchors, policies: map[plan.Digest]*rego.Policy{}, references: map[plan.Digest][]policy.References{}}
	used, refused := make([]bool, len(o.References)), make([]error, len(o.References))
	for _, p := range o.Policies {
		d, err := p.Digest()
		if err != nil {
			return nil, err
		}
		if p.AllowSimulated && !o.Anchors.Simulated() {
			return nil, fmt.Errorf("policy %s allows simulation, and this verifier has no simulation's anchors", p.Name)
		}
		for i, token := range o.References {
			r, err := p.OpenReferences(token, now)
			if err != nil {
				refused[i] = errors.Join(refused[i], err)
				continue
			}
			t.references[d], used[i] = append(t.references[d], r), true
		}
		if t.policies[d], err = rego.Compile(p, t.references[d]...); err != nil {
			return nil, err
		}
	}
	for i := range o.References {
		if !used[i] {
			return nil, fmt.Errorf("reference values %d: %w", i, refused[i])
		}
	}
	var err error
	if t.rules, err = rulesOf(o); err != nil {
		return nil, err
	}
	return t, t.chooseKBSPolicy(o)
}

// Rules is the digest of the policies and reference values that evidence is held
// against. It is another one when they are.
func (v *Verifier) Rules() plan.Digest { return v.trusted.Load().rules }

// Reload changes policies, reference values, anchors and keys to those of o while
// the verifier serves, all of them or, if one is not acceptable, none. Keys change
// in steps (Keys). Appraisals under way end as they began. Everything else
// in o is of no account, but that the verifier stays the simulation's or the
// vendors' that it is.
//
// What was trusted before stays in what was signed under it: a result for
// receipt.ResultLifetime, the credential of an attestation key for
// vtpm.CredentialLifetime.
func (v *Verifier) Reload(o Options) error {
	if o.Anchors.Simulated() != v.simulated {
		return errors.New("reload: anchors of a simulation and those of vendors do not replace each other")
	}
	t, err := newTrusted(o, v.clock())
	if err != nil {
		return fmt.Errorf("reload: %w", err)
	}
	keys, err := newKeySet(v.id, Keys{Signer: o.Signer, Published: o.Published, NonceKeys: o.NonceKeys})
	if err != nil {
		return fmt.Errorf("reload: %w", err)
	}
	v.changing.Lock()
	defer v.changing.Unlock()
	if err := v.keys.Load().follows(keys); err != nil {
		return fmt.Errorf("reload: %w", err)
	}
	v.keys.Store(keys)
	v.trusted.Store(t)
	return nil
}
