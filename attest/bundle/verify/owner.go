package verify

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/receipt/sshsig"
)

// owner checks what the owner of the assets signed: the policies that the keys were
// released under, of which the rules are a part, and the consent where a policy
// asks for no approval.
func (v *verification) owner(g *check.List, a bundle.Approved, terms receipt.GrantTerms, rels []receipt.Release, consented bool) {
	known := len(v.trust.Approvers[terms.Owner].Keys) > 0
	signed := map[plan.Digest]receipt.PolicyStatement{}
	for _, s := range a.Policies {
		if p, ok := v.signedPolicy(g, s, a, terms, known); ok {
			signed[plan.Sum(s.Document)] = p
		}
	}
	var word []string
	for _, r := range rels {
		p, there := signed[r.Policy]
		switch {
		case r.Policy == "":
			word = append(word, r.Asset)
		case !there || p.Asset != r.Asset:
			g.Fail(checkRules, "the policy that the receipt for "+r.Asset+" names, signed by "+terms.Owner, "none", "the record is not complete")
		case !known:
			g.Skip(checkRules, fmt.Sprintf("those of %s are in the policy that its receipt names, and signed; whether by %.80q: name the owner among the approvers", r.Asset, terms.Owner))
		default:
			g.Pass(checkRules, fmt.Sprintf("those of %s are signed by %s, revision %d", r.Asset, terms.Owner, p.Revision))
		}
	}
	if len(word) > 0 {
		g.Skip(checkRules, "those of "+strings.Join(word, ", ")+": what the broker told the agent")
		v.unsigned(known, "the policies of "+strings.Join(word, ", "), terms.Owner)
	}
	plain := slices.DeleteFunc(slices.Clone(terms.Assets), func(asset string) bool {
		return slices.ContainsFunc(a.Rules, func(r bundle.ApprovalRule) bool { return r.Asset == asset })
	})
	switch {
	case len(plain) == 0:
	case consented && known:
		g.Pass(checkConsent, fmt.Sprintf("%s, for %s", terms.Owner, strings.Join(plain, ", ")))
	case consented:
		g.Skip(checkConsent, fmt.Sprintf("signed for %s; whether by %.80q: name the owner among the approvers", strings.Join(plain, ", "), terms.Owner))
	default:
		g.Skip(checkConsent, fmt.Sprintf("no approvals asked for %s: the consent of %s, by the broker's word", strings.Join(plain, ", "), terms.Owner))
		v.unsigned(known, "the use of "+strings.Join(plain, ", "), terms.Owner)
	}
}

// unsigned ends in no verdict for a reader who has the owner's key and finds that it
// did not sign.
func (v *verification) unsigned(known bool, what, owner string) {
	if known {
		v.unproven = fmt.Sprintf("%s, whose key you list, signed nothing for %s", owner, what)
	}
}

// policyMissing fails if the receipts name policies and the bundle has none of them.
func (v *verification) policyMissing(g *check.List) {
	for _, r := range v.releases {
		if r.Policy != "" {
			g.Fail(checkRules, "the policy that the receipt for "+r.Asset+" names", "none", "the record is not complete")
		}
	}
}

// signedPolicy checks one signed policy statement of the grant's owner.
func (v *verification) signedPolicy(g *check.List, s bundle.SignedApproval, a bundle.Approved, terms receipt.GrantTerms, known bool) (receipt.PolicyStatement, bool) {
	p, err := receipt.ParsePolicyStatement(s.Document)
	if err != nil {
		g.Fail("policy.form", "a signed policy", err.Error(), "")
		return p, false
	}
	before := len(g.Failed())
	g.Equal("policy.broker", terms.Broker, p.Broker, "a policy for another broker")
	g.Equal("policy.owner", terms.Owner, p.Owner, "the owner of the assets alone sets their policies")
	if !slices.Contains(terms.Assets, p.Asset) {
		g.Fail("policy.asset", "a policy of an asset of the grant", fmt.Sprintf("%.80q", p.Asset), "")
	}
	var told []receipt.Rule
	for _, r := range a.Rules {
		if r.Asset == p.Asset {
			told = append(told, receipt.Rule{Group: r.Group, Count: r.Count})
		}
	}
	if !slices.Equal(told, p.Policy.Approvals) {
		g.Fail(checkRules, fmt.Sprintf("the rules that the owner signed for %s: %v", p.Asset, p.Policy.Approvals), fmt.Sprint(told), "the broker told the agent of other rules")
	}
	key, err := sshsig.Key(s.Signature)
	if err == nil {
		_, err = sshsig.Verify(s.Signature, s.Document, receipt.PolicyNamespace, []ssh.PublicKey{key})
	}
	switch {
	case err != nil:
		g.Fail("policy.signature", "a signature over the policy of "+p.Asset, err.Error(), "nobody signed this")
	case known && !v.trust.Approvers[terms.Owner].has(key):
		g.Fail("policy.signature", "a key of "+terms.Owner+" that you list", ssh.FingerprintSHA256(key), "somebody else signed, or your list lacks the key")
	default:
		g.Pass("policy.signature", fmt.Sprintf("%s, revision %d, by %s", p.Asset, p.Revision, ssh.FingerprintSHA256(key)))
	}
	return p, len(g.Failed()) == before
}

// heldGroup reports where the keys were, which is the broker's word.
func (v *verification) heldGroup(g *check.List) {
	const id = "keys.held"
	for _, r := range v.releases {
		switch h := r.Held; {
		case h == nil:
			g.Skip(id, r.Asset+": the receipt does not say which key store had the key")
		case h.Attested == "":
			g.Skip(id, fmt.Sprintf("%s: %.80q, key %.80q version %d, by the broker's word; the store asked for no attestation of the broker", r.Asset, h.Store, h.Key, h.Version))
		default:
			g.Skip(id, fmt.Sprintf("%s: %.80q, key %.80q version %d, by the broker's word; the store asked for the broker's attestation and was shown result %s", r.Asset, h.Store, h.Key, h.Version, h.Attested))
		}
	}
}
