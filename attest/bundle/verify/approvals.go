package verify

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/receipt/sshsig"
)

// Approvers are the people whose approvals of grants a reader counts, by name.
type Approvers map[string]Approver

// Approver is one person: the groups for which the approvals count, and the keys
// that sign them.
type Approver struct {
	Groups []string
	Keys   []ssh.PublicKey
}

// MaxApprovers bounds the encoded list of approvers, in bytes.
const MaxApprovers = 1 << 20

// ParseApprovers reads lines "NAME GROUP[,GROUP...] KEY", KEY as in an
// authorized_keys file. Empty lines and those that begin with # are passed over. A
// person with several keys has several lines, with the same groups. A key that
// stands there twice and an empty list are errors.
func ParseApprovers(text []byte) (Approvers, error) {
	if len(text) > MaxApprovers {
		return nil, fmt.Errorf("approvers: %d bytes, at most %d are allowed", len(text), MaxApprovers)
	}
	out := Approvers{}
	seen := map[string]bool{}
	for line := range bytes.Lines(text) {
		line = bytes.TrimSpace(line)
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		words := strings.Fields(string(line))
		if len(words) < 4 {
			return nil, fmt.Errorf("approvers: %.60q: want NAME GROUPS KEY", line)
		}
		name, groups := words[0], strings.Split(words[1], ",")
		if slices.Contains(groups, "") {
			return nil, fmt.Errorf("approvers: %.60q: a group without a name", line)
		}
		keys, err := sshsig.ParseKeys([]byte(strings.Join(words[2:], " ")))
		if err != nil {
			return nil, fmt.Errorf("approvers: %.60q: %w", name, err)
		}
		// One key of two people would let one of them count as both.
		if id := string(keys[0].Marshal()); seen[id] {
			return nil, fmt.Errorf("approvers: %.60q: %s stands there twice", name, ssh.FingerprintSHA256(keys[0]))
		} else {
			seen[id] = true
		}
		a, known := out[name]
		if known && !slices.Equal(a.Groups, groups) {
			return nil, fmt.Errorf("approvers: %.60q has other groups in another line", name)
		}
		out[name] = Approver{Groups: groups, Keys: append(a.Keys, keys...)}
	}
	if len(out) == 0 {
		return nil, errors.New("approvers: none")
	}
	return out, nil
}

func (a Approver) has(key ssh.PublicKey) bool {
	return slices.ContainsFunc(a.Keys, func(k ssh.PublicKey) bool { return sshsig.Same(k, key) })
}

// Names of checks about what an owner signed.
const (
	checkRules   = "approvals.rules"
	checkConsent = "approvals.consent"
)

// approvalGroup checks on whose word keys were released. The receipts, which the
// broker signed and logged, say which approvals counted; the part has them.
func (v *verification) approvalGroup() {
	g := v.group("approvals", "Who approved it")
	defer v.done("approvals", g)
	under := map[string][]receipt.Release{}
	named := 0
	for _, r := range v.releases {
		under[r.Grant] = append(under[r.Grant], r)
		named += len(r.Approvals)
	}
	defer func() {
		if v.trust.Approvers != nil && len(v.releases) > 0 && !v.stands && v.unproven == "" {
			v.unproven = "none of the approvers named stands behind its keys"
		}
	}()
	v.heldGroup(g)
	b, ok := v.part(bundle.Approvals)
	switch {
	case !ok && len(v.releases) == 0:
		g.Skip("approvals.complete", "the record has no release to approve")
		return
	case !ok && named == 0:
		g.Skip("approvals.complete", "the receipts name no approval: the owner's consent, by the broker's word")
		v.policyMissing(g)
		return
	case !ok:
		g.Skip("approvals.complete", "the receipts name approvals by their digests, and the bundle does not carry them")
		v.policyMissing(g)
		if v.trust.Approvers != nil {
			v.unproven = "the bundle does not carry the approvals that counted"
		}
		return
	}
	list, err := bundle.Decode[[]bundle.Approved](b)
	if err != nil {
		g.Fail("approvals.form", "a list of grants and their approvals", err.Error(), "")
		return
	}
	for _, a := range list {
		terms, err := parseTerms(a.Terms)
		if err != nil {
			g.Fail("approvals.form", "the canonical terms of a grant", err.Error(), "")
			continue
		}
		rels, used := under[terms.Grant]
		if !used {
			g.Fail("approvals.grant", "a grant that keys were released under, once", fmt.Sprintf("%.80q", terms.Grant), "approvals of another grant prove nothing here")
			continue
		}
		delete(under, terms.Grant)
		v.approved(g, a, terms, rels)
	}
	for _, id := range slices.Sorted(maps.Keys(under)) {
		g.Fail("approvals.complete", "the approvals of each grant", "none of "+id, "the record is not complete")
	}
}

func parseTerms(b []byte) (receipt.GrantTerms, error) {
	var t receipt.GrantTerms
	if err := plan.Decode(b, bundle.MaxPart, &t); err != nil {
		return t, err
	}
	c, err := t.Canonical()
	if err == nil && !bytes.Equal(c, b) {
		err = errors.New("not in canonical form (RFC 8785)")
	}
	return t, err
}

// signatory is who signed one decision, by which key.
type signatory struct {
	name     string
	key      ssh.PublicKey
	decision string
}

// approved checks one grant with its approvals against the releases under it.
func (v *verification) approved(g *check.List, a bundle.Approved, terms receipt.GrantTerms, rels []receipt.Release) {
	g.Equal("approvals.plan", string(v.st.PlanDigest), string(terms.Plan), "the grant is for another plan")
	var digests []plan.Digest
	for _, s := range a.Approvals {
		digests = append(digests, plan.Sum(s.Document))
	}
	slices.Sort(digests)
	for _, r := range rels {
		g.Equal("approvals.broker", r.Issuer, terms.Broker, "the grant is another broker's")
		if !slices.Contains(terms.Assets, r.Asset) || r.NotAfter != terms.NotAfter || r.IssuedAt < terms.NotBefore-int64(receipt.Leeway/time.Second) || r.Simulated && !terms.AllowSimulated {
			g.Fail("approvals.terms", "terms that allow the release of "+r.Asset, "others", "the grant's terms are not those that the key was released under")
		} else {
			g.Pass("approvals.terms", r.Asset)
		}
		counted := slices.Sorted(slices.Values(r.Approvals))
		if !slices.Equal(digests, counted) {
			g.Fail("approvals.complete", fmt.Sprintf("the %d approvals that the receipt for %s names", len(counted), r.Asset), fmt.Sprintf("%d, or others", len(digests)), "approvals were left out, added or replaced")
		} else {
			g.Pass("approvals.complete", fmt.Sprintf("%d for %s, as its receipt names them", len(digests), r.Asset))
		}
	}
	var by []signatory
	consented := false
	for _, s := range a.Approvals {
		who, ok := v.approval(g, s, terms, plan.Sum(a.Terms), rels)
		if !ok {
			continue
		}
		if who.decision == receipt.DecisionConsent {
			consented = true
			continue
		}
		if slices.ContainsFunc(by, func(o signatory) bool { return o.name == who.name || sshsig.Same(o.key, who.key) }) {
			g.Fail("approval.distinct", "approvals of different people with different keys", "two of "+who.name+" or of one key", "one person counts once")
			continue
		}
		by = append(by, who)
	}
	v.threshold(g, a, terms, by)
	v.owner(g, a, terms, rels, consented)
}

// approval checks one signed approval of the terms with the given digest.
func (v *verification) approval(g *check.List, s bundle.SignedApproval, terms receipt.GrantTerms, digest plan.Digest, rels []receipt.Release) (signatory, bool) {
	a, err := receipt.ParseApproval(s.Document)
	if err != nil {
		g.Fail("approval.form", "a signed approval", err.Error(), "")
		return signatory{}, false
	}
	who := signatory{name: a.Approver, decision: a.Decision}
	before := len(g.Failed())
	g.Equal("approval.broker", terms.Broker, a.Broker, "an approval for another broker")
	g.Equal("approval.grant", terms.Grant, a.Grant, "an approval of another grant")
	g.Equal("approval.plan", string(v.st.PlanDigest), string(a.Plan), "an approval of another plan")
	g.Equal("approval.assets", strings.Join(terms.Assets, ","), strings.Join(a.Assets, ","), "an approval of other assets")
	g.Equal("approval.terms", string(digest), string(a.Terms), "an approval of other terms")
	for _, r := range rels {
		if r.IssuedAt >= a.Expires || r.IssuedAt+int64(receipt.Leeway/time.Second) < a.Time {
			g.Fail("approval.time", "made before the release of "+r.Asset+", and valid then", fmt.Sprintf("from %s to %s", stamp(a.Time), stamp(a.Expires)), "the key was released without this approval")
		}
	}
	_, requester, _ := strings.Cut(terms.Requester, "/")
	consent := a.Decision == receipt.DecisionConsent
	switch {
	case consent:
		g.Equal("approval.owner", terms.Owner, a.Approver, "the owner of the assets alone consents")
	case a.Decision != receipt.DecisionApprove:
		g.Fail("approval.decision", "an approval or a consent", a.Decision, "a signature stands for what it says")
	case requester == a.Approver:
		g.Fail("approval.own", "an approver who is not the requester", a.Approver, "nobody approves their own request")
	}
	if who.key, err = sshsig.Key(s.Signature); err == nil {
		_, err = sshsig.Verify(s.Signature, s.Document, receipt.ApprovalNamespace, []ssh.PublicKey{who.key})
	}
	if err != nil {
		g.Fail("approval.signature", "a signature over the approval", err.Error(), "nobody signed this")
		return signatory{}, false
	}
	g.Pass("approval.signature", fmt.Sprintf("%.80q by %s", a.Approver, ssh.FingerprintSHA256(who.key)))
	switch {
	case v.trust.Approvers == nil:
		g.Skip("approvals.keys", fmt.Sprintf("whether that is a key of %.80q: name the approvers", a.Approver))
	case consent && len(v.trust.Approvers[a.Approver].Keys) == 0:
		g.Skip("approvals.keys", fmt.Sprintf("whether that is a key of the owner, %.80q: name the owner among the approvers", a.Approver))
		return who, len(g.Failed()) == before
	case !consent && v.trust.Approvers[requester].has(who.key):
		g.Fail("approval.own", "a key that is not the requester's", "a key of "+requester, "nobody approves their own request")
	case !v.trust.Approvers[a.Approver].has(who.key):
		g.Fail("approvals.keys", "a key of "+a.Approver+" that you list", ssh.FingerprintSHA256(who.key), "somebody else signed, or your list lacks the key")
	default:
		g.Pass("approvals.keys", a.Approver)
		v.stands = true
	}
	return who, len(g.Failed()) == before
}

// threshold checks that every rule has as many approvals as it asks for. Whose rules
// they are is for owner.
func (v *verification) threshold(g *check.List, a bundle.Approved, terms receipt.GrantTerms, by []signatory) {
	const id = "approvals.threshold"
	if len(a.Rules) == 0 {
		if len(by) > 0 {
			g.Fail(id, "a rule that asks for the approvals that counted", "none", "the record is not complete")
		}
		return
	}
	for _, r := range a.Rules {
		if r.Count < 1 || !slices.Contains(terms.Assets, r.Asset) {
			g.Fail(id, "a rule of an asset of the grant", fmt.Sprintf("%d of %.80q for %.80q", r.Count, r.Group, r.Asset), "")
			continue
		}
		var in []string
		for _, s := range by {
			if v.trust.Approvers == nil || slices.Contains(v.trust.Approvers[s.name].Groups, r.Group) {
				in = append(in, s.name)
			}
		}
		switch {
		case len(in) < r.Count:
			g.Fail(id, fmt.Sprintf("approvals of %d of group %s for %s", r.Count, r.Group, r.Asset), fmt.Sprintf("%d: %s", len(in), strings.Join(in, ", ")), "the key was released with too few approvals, or your list lacks somebody")
		case v.trust.Approvers == nil:
			g.Skip(id, fmt.Sprintf("%d of %s asked for %s, %d approvals: name the approvers to see who is in that group", r.Count, r.Group, r.Asset, len(in)))
		default:
			g.Pass(id, fmt.Sprintf("%d of %s for %s: %s", r.Count, r.Group, r.Asset, strings.Join(in, ", ")))
		}
	}
}

func stamp(seconds int64) string { return time.Unix(seconds, 0).UTC().Format(time.RFC3339) }
