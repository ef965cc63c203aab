package broker

import (
	"context"
	"crypto/sha512"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/receipt/sshsig"
	"github.com/coffer-run/coffer/attest/translog"
)

const (
	// MaxGrantAssets bounds the assets of one grant.
	MaxGrantAssets = 64
	// MaxGrantReleases bounds the attempts that one grant allows.
	MaxGrantReleases = 1000
	// MaxGrantDuration bounds how long a grant may last.
	MaxGrantDuration = 366 * 24 * time.Hour
	// MaxPrincipals bounds who a grant names.
	MaxPrincipals = 64
	// MaxPurpose bounds what a requester says a grant is for, in bytes.
	MaxPurpose = 512
	// MaxKey bounds an idempotency key, in bytes.
	MaxKey = 128
	// MaxPlanGrants bounds the grants that one requester asks for one plan, and
	// MaxRequests those for all plans, over and revoked ones included.
	MaxPlanGrants = 1_000
	MaxRequests   = 10_000
	// MaxGrantApprovals bounds the approvals of one grant by one approver, expired
	// ones included.
	MaxGrantApprovals = 16
	// MaxPage bounds one page of grants.
	MaxPage = 1_000
)

var spiffeForm = regexp.MustCompile(`^spiffe://[a-z0-9._-]+(/[A-Za-z0-9._-]+)+$`)

// principal says whether s is "ROLE/NAME" or a SPIFFE ID.
func principal(s string) bool {
	return len(s) <= 512 && (roleName(s) || spiffeForm.MatchString(s))
}

// NewGrant is a request to let one plan use assets of one owner.
type NewGrant struct {
	Assets []string
	Plan   plan.Digest
	// NotBefore may be zero, which is now.
	NotBefore time.Time
	NotAfter  time.Time
	// MaxReleases may be 0: one release for each attempt that Document allows, or 1
	// without it.
	MaxReleases int
	// Document is the canonical plan, or empty.
	Document       []byte
	AllowSimulated bool
	Principals     []string
	Purpose        string
	// Key may be empty. The same requester gets the same grant for the same key.
	Key string
}

// GrantView is a grant as it stands now.
type GrantView struct {
	Grant
	State State
	// Missing names what the grant lacks, one line each.
	Missing []string
	// Terms are the canonical terms that approvals are over.
	Terms     []byte
	Approvals []StoredApproval
}

// CreateGrant makes a grant over assets that owner owns, with the owner's
// consent. It is active at once unless a policy of the assets asks for approvals. The
// consent of an owner whose keys the Directory knows is a signature: it is given
// by ConsentGrant.
func (b *Broker) CreateGrant(ctx context.Context, owner Actor, n NewGrant) (Grant, error) {
	return b.request(ctx, owner, ActionCreateGrant, n)
}

// RequestGrant asks for a grant. It lacks the approvals that the policies of the
// assets ask for, and the owner's consent if one of them asks for none.
func (b *Broker) RequestGrant(ctx context.Context, requester Actor, n NewGrant) (Grant, error) {
	return b.request(ctx, requester, ActionRequestGrant, n)
}

func (b *Broker) request(ctx context.Context, who Actor, action Action, n NewGrant) (Grant, error) {
	now := b.now().UTC().Truncate(time.Second)
	atOnce := n.NotBefore.IsZero()
	if atOnce {
		n.NotBefore = now
	}
	if err := n.settle(); err != nil {
		return Grant{}, err
	}
	if err := b.checkNew(n, now); err != nil {
		return Grant{}, err
	}
	g := Grant{
		ID: newID("grant"), Assets: slices.Sorted(maps.Keys(set(n.Assets))), Plan: n.Plan,
		NotBefore: n.NotBefore.UTC().Truncate(time.Second), NotAfter: n.NotAfter.UTC().Truncate(time.Second),
		MaxReleases: n.MaxReleases, AllowSimulated: n.AllowSimulated, Requester: who.String(), Key: n.Key, Requested: now,
		Principals: slices.Sorted(maps.Keys(set(n.Principals))), Purpose: n.Purpose, Consented: action == ActionCreateGrant,
	}
	err := b.update(ctx, func(ctx context.Context, tx Tx) error {
		if n.Key != "" {
			switch old, err := tx.GrantByKey(ctx, g.Requester, n.Key); {
			case err == nil && g.repeats(old) && (atOnce || g.NotBefore.Equal(old.NotBefore)):
				g = old
				return nil
			case err == nil:
				return fmt.Errorf("grant under this idempotency key %w, with other terms", ErrExists)
			case !errors.Is(err, ErrNotFound):
				return err
			}
		}
		assets, err := b.assets(ctx, tx, g.Assets)
		if err != nil {
			return err
		}
		// An owner who signs consents to the terms once they are there.
		if g.Consented {
			keys, _, err := b.approver(ctx, who.Name)
			if err != nil {
				return err
			}
			g.Consented = len(keys) == 0
		}
		if err := b.checkRequest(ctx, who, action, &g, assets); err != nil {
			return err
		}
		for _, bound := range []struct {
			of   plan.Digest
			most int
		}{{g.Plan, MaxPlanGrants}, {"", MaxRequests}} {
			switch n, err := tx.RequestedGrants(ctx, g.Requester, bound.of); {
			case err != nil:
				return err
			case n >= bound.most:
				return fmt.Errorf("%w: %s asked for %d grants, which is as many as one may ask for", ErrTooMany, who, n)
			}
		}
		terms, err := b.terms(g)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrInvalid, err)
		}
		if err := tx.InsertGrant(ctx, g); err != nil {
			return fmt.Errorf("grant %s: %w", g.ID, err)
		}
		_, err = b.log(ctx, tx, translog.Body{Kind: translog.KindGrant, Actor: who.String(), Grant: &translog.Grant{
			ID: g.ID, Assets: g.Assets, Plan: g.Plan, NotBefore: g.NotBefore.Unix(), NotAfter: g.NotAfter.Unix(), MaxReleases: g.MaxReleases, AllowSimulated: g.AllowSimulated,
			Terms: plan.Sum(terms), Requested: !g.Consented,
		}})
		return err
	})
	if err != nil {
		return Grant{}, err
	}
	return g, nil
}

// settle fills in the number of releases: a release is one recipient key, and each
// attempt of a job has its own.
func (n *NewGrant) settle() error {
	attempts := 1
	if len(n.Document) > 0 {
		p, err := plan.Parse(n.Document)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrInvalid, err)
		}
		if got := plan.Sum(n.Document); got != n.Plan {
			return fmt.Errorf("%w: the plan has digest %s, and the grant names %s", ErrInvalid, got, trim(string(n.Plan)))
		}
		attempts = p.Attempts()
	}
	if n.MaxReleases == 0 {
		n.MaxReleases = attempts
	}
	return nil
}

func (b *Broker) checkNew(n NewGrant, now time.Time) error {
	switch {
	case len(n.Assets) == 0 || len(n.Assets) > MaxGrantAssets:
		return fmt.Errorf("%w: a grant names 1 to %d assets", ErrInvalid, MaxGrantAssets)
	case repeats(n.Assets):
		return fmt.Errorf("%w: a grant names each asset once", ErrInvalid)
	case n.MaxReleases < 1 || n.MaxReleases > MaxGrantReleases:
		return fmt.Errorf("%w: a grant allows 1 to %d releases", ErrInvalid, MaxGrantReleases)
	case !n.NotAfter.After(now) || !n.NotAfter.After(n.NotBefore):
		return fmt.Errorf("%w: a grant ends after now and after it begins", ErrInvalid)
	case n.NotAfter.Sub(n.NotBefore) > MaxGrantDuration || n.NotAfter.Sub(now) > MaxGrantDuration:
		return fmt.Errorf("%w: a grant lasts at most %d days", ErrInvalid, MaxGrantDuration/(24*time.Hour))
	case n.AllowSimulated && !b.simulation:
		return fmt.Errorf("%w: this broker accepts no simulated evidence", ErrInvalid)
	case len(n.Principals) > MaxPrincipals || repeats(n.Principals):
		return fmt.Errorf("%w: a grant names at most %d principals, each once", ErrInvalid, MaxPrincipals)
	case len(n.Purpose) > MaxPurpose || len(n.Key) > MaxKey:
		return fmt.Errorf("%w: a purpose has at most %d bytes and an idempotency key %d", ErrInvalid, MaxPurpose, MaxKey)
	}
	for _, p := range n.Principals {
		if !principal(p) {
			return fmt.Errorf("%w: principal %.80q: want ROLE/NAME or a SPIFFE ID", ErrInvalid, p)
		}
	}
	if _, err := plan.ParseDigest(string(n.Plan)); err != nil {
		return fmt.Errorf("%w: plan: %w", ErrInvalid, err)
	}
	return nil
}

// checkRequest holds a new grant against its assets and finds their owner.
func (b *Broker) checkRequest(ctx context.Context, who Actor, action Action, g *Grant, assets []Asset) error {
	var l check.List
	g.Owner = assets[0].Owner
	if action == ActionCreateGrant {
		g.Owner = who.Name
	}
	if err := b.mayAll(ctx, who, action, *g, assets); err != nil {
		return err
	}
	for _, a := range assets {
		if a.Owner != g.Owner {
			l.Fail("grant.owner", "assets of "+g.Owner, a.Name+" of "+a.Owner, "ask the owner of "+a.Name+" for a grant")
		}
		if a.Policy.MaxReleases > 0 && g.MaxReleases > a.Policy.MaxReleases {
			l.Fail("grant.max-releases", "at most "+strconv.Itoa(a.Policy.MaxReleases)+" releases of "+a.Name, strconv.Itoa(g.MaxReleases), "ask for fewer")
		}
		if most := time.Duration(a.Policy.MaxDurationSeconds) * time.Second; most > 0 && g.NotAfter.Sub(g.NotBefore) > most {
			l.Fail("grant.duration", "at most "+most.String()+" for "+a.Name, g.NotAfter.Sub(g.NotBefore).String(), "ask for less")
		}
	}
	if len(l) > 0 {
		return check.Refuse("grant", l)
	}
	return nil
}

// repeats says whether g asks for what old is.
func (g Grant) repeats(old Grant) bool {
	return slices.Equal(g.Assets, old.Assets) && g.Plan == old.Plan && g.MaxReleases == old.MaxReleases && g.AllowSimulated == old.AllowSimulated &&
		slices.Equal(g.Principals, old.Principals) && g.Purpose == old.Purpose && g.NotAfter.Equal(old.NotAfter)
}

func (b *Broker) terms(g Grant) ([]byte, error) {
	return receipt.GrantTerms{
		Version: receipt.TermsVersion, Broker: b.id, Grant: g.ID, Owner: g.Owner, Requester: g.Requester, Assets: g.Assets, Plan: g.Plan, Principals: g.Principals,
		NotBefore: g.NotBefore.Unix(), NotAfter: g.NotAfter.Unix(), MaxReleases: g.MaxReleases, AllowSimulated: g.AllowSimulated, Purpose: g.Purpose,
	}.Canonical()
}

func (b *Broker) assets(ctx context.Context, r Reader, names []string) ([]Asset, error) {
	out := make([]Asset, 0, len(names))
	for _, name := range names {
		a, err := r.Asset(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("asset %.80q: %w", name, err)
		}
		out = append(out, a)
	}
	return out, nil
}

// standing is what a grant lacks, and which approvals count.
type standing struct {
	missing []string
	// unsigned are the policies that their owner should have signed and did not.
	unsigned []string
	// counted are the digests of the approvals, and of the owner's consent.
	counted []plan.Digest
	// until is when the first approval that counts expires; zero without any.
	until time.Time
}

// stand counts the approvals of a grant as the directory and the policies are
// at this moment. It trusts nothing of what was decided when they came in: every
// signature is checked again.
func (b *Broker) stand(ctx context.Context, r Reader, g Grant, assets []Asset) (standing, error) {
	var s standing
	rules := map[string]int{}
	var plain []string
	for _, a := range assets {
		if len(a.Policy.Approvals) == 0 {
			plain = append(plain, a.Name)
		}
		for _, rule := range a.Policy.Approvals {
			rules[rule.Group] = max(rules[rule.Group], rule.Count)
		}
	}
	keys, _, err := b.approver(ctx, g.Owner)
	if err != nil {
		return standing{}, err
	}
	s.unsigned = b.unsigned(assets, g.Owner, keys)
	if len(rules) == 0 && len(keys) == 0 {
		if !g.Consented {
			s.missing = append(s.missing, lacksConsent(g, plain))
		}
		return s, nil
	}
	approvals, err := r.Approvals(ctx, g.ID)
	if err != nil {
		return standing{}, err
	}
	// Approvals that one asset's policy asks for are no word on another: whoever
	// asks chooses which assets stand in one grant. Where the owner's keys are known
	// the store's word on the consent counts for nothing.
	if len(plain) > 0 {
		consented := g.Consented
		if len(keys) > 0 {
			consent, expires, err := b.consent(ctx, g, approvals)
			if err != nil {
				return standing{}, err
			}
			if consented = consent != ""; consented {
				s.counted, s.until = append(s.counted, consent), expires
			}
		}
		if !consented {
			s.missing = append(s.missing, lacksConsent(g, plain))
		}
	}
	if len(rules) == 0 {
		return s, nil
	}
	revoked, err := revokedApprovers(ctx, r, g, approvals)
	if err != nil {
		return standing{}, err
	}
	type approver struct {
		groups []string
		digest plan.Digest
	}
	seen := map[string]approver{}
	spent := map[string]struct{}{}
	for _, a := range approvals {
		if _, gone := revoked[a.Approver]; gone {
			continue
		}
		key, groups, expires, err := b.approve(ctx, g, a, receipt.DecisionApprove)
		if errors.Is(err, ErrUnavailable) {
			return standing{}, err
		}
		if err != nil {
			continue
		}
		if _, twice := seen[a.Approver]; twice {
			continue
		}
		// Two names with one key are one person.
		if _, twice := spent[string(key.Marshal())]; twice {
			continue
		}
		seen[a.Approver], spent[string(key.Marshal())] = approver{groups, a.Digest}, struct{}{}
		s.until = earlier(s.until, expires)
	}
	used := map[plan.Digest]struct{}{}
	for _, group := range slices.Sorted(maps.Keys(rules)) {
		var by []string
		for _, name := range slices.Sorted(maps.Keys(seen)) {
			if slices.Contains(seen[name].groups, group) {
				by = append(by, name)
				used[seen[name].digest] = struct{}{}
			}
		}
		if want := rules[group]; len(by) < want {
			text := fmt.Sprintf("%d of %d approvals of group %s", want-len(by), want, group)
			if len(by) > 0 {
				text += " (approved: " + strings.Join(by, ", ") + ")"
			}
			s.missing = append(s.missing, text)
		}
	}
	s.counted = slices.Sorted(slices.Values(append(s.counted, slices.Collect(maps.Keys(used))...)))
	return s, nil
}

func lacksConsent(g Grant, assets []string) string {
	return "the consent of " + g.Owner + ", who owns " + strings.Join(assets, ", ")
}

// revokedApprovers are the names, among those of approvals, of people who were
// revoked as principals, by whichever of the two ways in which they come. Whoever
// holds such a person's key approves nothing.
func revokedApprovers(ctx context.Context, r Reader, g Grant, approvals []StoredApproval) (map[string]struct{}, error) {
	if len(approvals) == 0 {
		return nil, nil
	}
	var of []Target
	for _, a := range approvals {
		of = append(of, Target{RevokePrincipal, roleApprover + "/" + a.Approver}, Target{RevokePrincipal, RoleUser + "/" + a.Approver})
	}
	l, err := r.Revoked(ctx, of)
	if err != nil {
		return nil, err
	}
	out := map[string]struct{}{}
	for _, rev := range l {
		if _, name, ok := strings.Cut(rev.Value, "/"); ok && (rev.Scope == "" || rev.Scope == g.Owner) {
			out[name] = struct{}{}
		}
	}
	return out, nil
}

// approve checks one signed decision on g from scratch and returns the key that
// signed it, the groups that its maker is in, and when it expires. Only an error
// that is ErrUnavailable is worth asking again.
func (b *Broker) approve(ctx context.Context, g Grant, s StoredApproval, decision string) (key ssh.PublicKey, groups []string, expires time.Time, err error) {
	a, err := receipt.ParseApproval(s.Document)
	if err != nil {
		return nil, nil, expires, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	terms, err := b.terms(g)
	if err != nil {
		return nil, nil, expires, err
	}
	var l check.List
	now := b.now()
	l.Equal("approval.decision", decision, a.Decision, "a signature stands for what it says")
	l.Equal("approval.broker", b.id, trim(a.Broker), "sign an approval for this broker")
	l.Equal("approval.grant", g.ID, trim(a.Grant), "sign an approval of this grant")
	l.Equal("approval.plan", string(g.Plan), string(a.Plan), "an approval is for one plan")
	l.Equal("approval.assets", strings.Join(g.Assets, ","), trim(strings.Join(a.Assets, ",")), "an approval is for the grant's assets")
	l.Equal("approval.terms", string(plan.Sum(terms)), string(a.Terms), "sign an approval of the grant as it is")
	l.Equal("approval.approver", s.Approver, trim(a.Approver), "sign under your own name")
	_, requester, _ := strings.Cut(g.Requester, "/")
	others := decision == receipt.DecisionApprove
	if others && requester == a.Approver {
		l.Fail("approval.own", "an approver who is not the requester", a.Approver, "nobody approves their own request")
	}
	if !now.Before(time.Unix(a.Expires, 0)) {
		l.Fail("approval.expiry", "an approval that is valid at "+stamp(now), "expired at "+stamp(time.Unix(a.Expires, 0)), "approve again")
	}
	if made := time.Unix(a.Time, 0); made.After(now.Add(receipt.Leeway)) || made.Before(g.Requested.Add(-receipt.Leeway)) {
		l.Fail("approval.time", "made after "+stamp(g.Requested)+" and not in the future", stamp(made), "compare the clocks")
	}
	keys, groups, err := b.approver(ctx, a.Approver)
	if err != nil {
		return nil, nil, expires, err
	}
	key, err = b.signatures.verify(s.Signature, s.Document, receipt.ApprovalNamespace, keys)
	if err != nil {
		l.Fail("approval.signature", "a signature by a key of "+a.Approver, trim(err.Error()), "sign with a key that the broker knows you by")
		return nil, nil, expires, check.Refuse("approve", l)
	}
	if others && requester != a.Approver {
		own, _, err := b.approver(ctx, requester)
		if err != nil {
			return nil, nil, expires, err
		}
		if slices.ContainsFunc(own, func(k ssh.PublicKey) bool { return sshsig.Same(k, key) }) {
			l.Fail("approval.own", "a key that is not the requester's", "a key of "+requester, "nobody approves their own request")
		}
	}
	if len(l.Failed()) > 0 {
		return nil, nil, expires, check.Refuse("approve", l)
	}
	return key, groups, time.Unix(a.Expires, 0), nil
}

// approver asks the directory. Somebody it does not know has no keys.
func (b *Broker) approver(ctx context.Context, name string) ([]ssh.PublicKey, []string, error) {
	if b.directory == nil {
		return nil, nil, nil
	}
	keys, groups, err := b.directory.Approver(ctx, name)
	switch {
	case errors.Is(err, ErrNotFound):
		return nil, nil, nil
	case err != nil:
		return nil, nil, fmt.Errorf("%w: look up approver %.80q: %w", ErrUnavailable, name, err)
	}
	return keys, groups, nil
}

// ApproveGrant adds a signed approval to a grant. The same approval again
// changes nothing.
func (b *Broker) ApproveGrant(ctx context.Context, who Actor, id string, document, signature []byte) (GrantView, error) {
	if len(document) > receipt.MaxApproval || len(signature) > sshsig.MaxSize {
		return GrantView{}, fmt.Errorf("%w: an approval has at most %d bytes and its signature %d", ErrInvalid, receipt.MaxApproval, sshsig.MaxSize)
	}
	var v GrantView
	err := b.update(ctx, func(ctx context.Context, tx Tx) error {
		g, assets, err := b.open(ctx, tx, "approve", id)
		if err != nil {
			return err
		}
		if err := b.mayAll(ctx, who, ActionApproveGrant, g, assets); err != nil {
			return err
		}
		s := StoredApproval{Grant: g.ID, Approver: who.Name, Document: document, Signature: signature, Digest: plan.Sum(document)}
		key, groups, _, err := b.approve(ctx, g, s, receipt.DecisionApprove)
		if err != nil {
			return err
		}
		asked := slices.ContainsFunc(assets, func(a Asset) bool {
			return slices.ContainsFunc(a.Policy.Approvals, func(r Rule) bool { return slices.Contains(groups, r.Group) })
		})
		if !asked {
			var l check.List
			l.Fail("approval.group", "an approver in a group that the assets' policies name", fmt.Sprint(groups), "ask a member of such a group")
			return check.Refuse("approve", l)
		}
		added, err := addSigned(ctx, tx, s)
		if err != nil {
			return err
		}
		if added {
			if _, err := b.log(ctx, tx, translog.Body{Kind: translog.KindApproval, Actor: who.String(), Approval: &translog.Approval{
				Grant: g.ID, Plan: g.Plan, Approver: who.Name, Document: s.Digest, Key: ssh.FingerprintSHA256(key),
			}}); err != nil {
				return err
			}
		}
		v, err = b.look(ctx, tx, g, assets)
		return err
	})
	return v, err
}

// ConsentGrant is the owner's yes to a grant. Where the policies ask for approvals
// it stands for none of them. An owner whose keys the Directory knows signs it: a
// receipt.Approval that decides "consent". Others leave signed nil.
func (b *Broker) ConsentGrant(ctx context.Context, owner Actor, id string, signed *Signed) (GrantView, error) {
	if err := signed.bounds(); err != nil {
		return GrantView{}, err
	}
	var v GrantView
	err := b.update(ctx, func(ctx context.Context, tx Tx) error {
		g, assets, err := b.open(ctx, tx, "consent", id)
		if err != nil {
			return err
		}
		if err := b.mayAll(ctx, owner, ActionConsentGrant, g, assets); err != nil {
			return err
		}
		if g.Owner != owner.Name {
			var l check.List
			l.Fail("grant.owner", "a grant over assets of "+owner.Name, "assets of "+g.Owner, "ask "+g.Owner)
			return check.Refuse("consent", l)
		}
		entry := translog.Approval{Grant: g.ID, Plan: g.Plan, Approver: owner.Name}
		added, err := b.decided(ctx, tx, "consent", owner, g, signed, receipt.DecisionConsent, &entry)
		if err != nil {
			return err
		}
		if !g.Consented || added {
			g.Consented = true
			if err := tx.SetGrant(ctx, g); err != nil {
				return err
			}
			if _, err := b.log(ctx, tx, translog.Body{Kind: translog.KindApproval, Actor: owner.String(), Approval: &entry}); err != nil {
				return err
			}
		}
		v, err = b.look(ctx, tx, g, assets)
		return err
	})
	return v, err
}

// decided takes a signed decision of somebody who is not counted by groups, and
// notes in entry what was signed by which key. Without a signature it refuses
// those whose keys the directory knows.
func (b *Broker) decided(ctx context.Context, tx Tx, stage string, who Actor, g Grant, signed *Signed, decision string, entry *translog.Approval) (added bool, err error) {
	if signed == nil {
		keys, _, err := b.approver(ctx, who.Name)
		if err != nil {
			return false, err
		}
		return false, mustSign(stage, who, keys)
	}
	s := StoredApproval{Grant: g.ID, Approver: who.Name, Document: signed.Document, Signature: signed.Signature, Digest: plan.Sum(signed.Document)}
	key, _, _, err := b.approve(ctx, g, s, decision)
	if err != nil {
		return false, err
	}
	entry.Document, entry.Key = s.Digest, ssh.FingerprintSHA256(key)
	return addSigned(ctx, tx, s)
}

// DenyGrant ends a grant that was asked for. Who may approve it or owns the
// assets may deny it, once and for all. Whose keys the Directory knows signs it: a
// receipt.Approval that decides "deny" and has the reason. Others leave signed nil.
func (b *Broker) DenyGrant(ctx context.Context, who Actor, id, reason string, signed *Signed) (GrantView, error) {
	if err := signed.bounds(); err != nil {
		return GrantView{}, err
	}
	if signed != nil {
		a, err := receipt.ParseApproval(signed.Document)
		if err != nil {
			return GrantView{}, fmt.Errorf("%w: %w", ErrInvalid, err)
		}
		reason = a.Reason
	}
	if reason == "" || len(reason) > MaxReason {
		return GrantView{}, fmt.Errorf("%w: a denial has a reason of at most %d bytes", ErrInvalid, MaxReason)
	}
	var v GrantView
	err := b.update(ctx, func(ctx context.Context, tx Tx) error {
		g, assets, err := b.open(ctx, tx, "deny", id)
		if err != nil {
			return err
		}
		if err := b.may(ctx, who, ActionDenyGrant, g.resource()); err != nil {
			return err
		}
		if v, err = b.look(ctx, tx, g, assets); err != nil {
			return err
		}
		_, groups, err := b.approver(ctx, who.Name)
		if err != nil {
			return err
		}
		asked := slices.ContainsFunc(assets, func(a Asset) bool {
			return slices.ContainsFunc(a.Policy.Approvals, func(r Rule) bool { return slices.Contains(groups, r.Group) })
		})
		var l check.List
		if g.Owner != who.Name && !asked {
			l.Fail("grant.owner", "the owner of the assets or one of their approvers", who.Name, "ask "+g.Owner)
		}
		if v.State != StateRequested {
			l.Fail("grant.state", string(StateRequested), string(v.State), "revoke the grant instead")
		}
		if len(l) > 0 {
			return check.Refuse("deny", l)
		}
		var entry translog.Approval
		if _, err := b.decided(ctx, tx, "deny", who, g, signed, receipt.DecisionDeny, &entry); err != nil {
			return err
		}
		g.Denied, g.Reason, g.EndedBy = b.now().UTC().Truncate(time.Second), reason, who.String()
		if err := tx.SetGrant(ctx, g); err != nil {
			return err
		}
		if _, err := b.log(ctx, tx, translog.Body{Kind: translog.KindDeny, Actor: who.String(), Deny: &translog.Deny{Grant: g.ID, Reason: reason, Document: entry.Document, Key: entry.Key}}); err != nil {
			return err
		}
		v, err = b.look(ctx, tx, g, assets)
		return err
	})
	return v, err
}

// mayAll asks the Authorizer about each asset of a grant.
func (b *Broker) mayAll(ctx context.Context, who Actor, a Action, g Grant, assets []Asset) error {
	for _, asset := range assets {
		r := asset.resource()
		r.Plan = g.Plan
		if err := b.may(ctx, who, a, r); err != nil {
			return err
		}
	}
	return nil
}

// open reads a grant that has not ended, and its assets.
func (b *Broker) open(ctx context.Context, r Reader, stage, id string) (Grant, []Asset, error) {
	g, err := r.Grant(ctx, id)
	if err != nil {
		return Grant{}, nil, fmt.Errorf("grant %.80q: %w", id, err)
	}
	switch s := g.State(b.now(), false); s {
	case StateRevoked, StateDenied, StateExpired:
		var l check.List
		l.Fail("grant.state", "a grant that has not ended", string(s), "ask for another grant")
		return Grant{}, nil, check.Refuse(stage, l)
	default:
	}
	assets, err := b.assets(ctx, r, g.Assets)
	return g, assets, err
}

// look says how a grant stands.
func (b *Broker) look(ctx context.Context, r Reader, g Grant, assets []Asset) (GrantView, error) {
	v := GrantView{Grant: g}
	s, err := b.stand(ctx, r, g, assets)
	if err != nil {
		return v, err
	}
	v.Missing = append(s.unsigned, s.missing...)
	v.State = g.State(b.now(), len(v.Missing) > 0)
	if v.Terms, err = b.terms(g); err != nil {
		return v, err
	}
	v.Approvals, err = r.Approvals(ctx, g.ID)
	return v, err
}

// Grant returns one grant with its approvals and what it lacks.
func (b *Broker) Grant(ctx context.Context, who Actor, id string) (GrantView, error) {
	v, err := b.GrantAsIs(ctx, id)
	if err != nil {
		return GrantView{}, err
	}
	if err := b.may(ctx, who, ActionReadGrant, v.resource()); err != nil {
		return GrantView{}, err
	}
	return v, nil
}

// GrantAsIs is Grant for whoever the broker has just let change the grant: it
// asks no Authorizer.
func (b *Broker) GrantAsIs(ctx context.Context, id string) (GrantView, error) {
	var v GrantView
	err := b.view(ctx, func(ctx context.Context, r Reader) error {
		g, err := r.Grant(ctx, id)
		if err != nil {
			return fmt.Errorf("grant %.80q: %w", id, err)
		}
		assets, err := b.assets(ctx, r, g.Assets)
		if err != nil {
			return err
		}
		v, err = b.look(ctx, r, g, assets)
		return err
	})
	return v, err
}

// Listing says which grants to list. Empty fields match all.
type Listing struct {
	Plan      plan.Digest
	State     State
	Principal string
	// Mine lists those alone that the caller asked for.
	Mine bool
	// Size is at most how many are looked at, 1 to MaxPage; 0 is all, or
	// ErrTooMany if there are more than MaxList.
	Size int
	// After is Next of the page before.
	After int64
}

// ListGrants returns grants in the order of their making. next is not 0 if
// there may be more.
func (b *Broker) ListGrants(ctx context.Context, who Actor, f Listing) (out []GrantView, next int64, err error) {
	if f.Size < 0 || f.Size > MaxPage || f.After < 0 {
		return nil, 0, fmt.Errorf("%w: a page has 1 to %d grants", ErrInvalid, MaxPage)
	}
	limit := f.Size
	if limit == 0 {
		limit = MaxList + 1
	}
	err = b.view(ctx, func(ctx context.Context, r Reader) error {
		filter := GrantFilter{Plan: f.Plan, Principal: f.Principal, After: f.After, Limit: limit}
		err := b.may(ctx, who, ActionListGrants, Resource{Kind: "grant", Plan: f.Plan})
		if f.Mine {
			filter.Requester = who.String()
			err = b.may(ctx, who, ActionListOwnGrants, Resource{})
		}
		if err != nil {
			return err
		}
		l, err := r.Grants(ctx, filter)
		if err != nil {
			return err
		}
		if f.Size == 0 && len(l) > MaxList {
			return fmt.Errorf("%w: more than %d grants: name a plan, or ask for pages", ErrTooMany, MaxList)
		}
		if len(l) == f.Size && len(l) > 0 {
			next = l[len(l)-1].Seq
		}
		known := map[string]Asset{}
		for _, g := range l {
			var assets []Asset
			for _, name := range g.Assets {
				a, ok := known[name]
				if !ok {
					if a, err = r.Asset(ctx, name); err != nil {
						return fmt.Errorf("asset %.80q: %w", name, err)
					}
					known[name] = a
				}
				assets = append(assets, a)
			}
			s, err := b.stand(ctx, r, g, assets)
			if err != nil {
				return err
			}
			v := GrantView{Grant: g, Missing: append(s.unsigned, s.missing...)}
			v.State = g.State(b.now(), len(v.Missing) > 0)
			if f.State == "" || f.State == v.State {
				out = append(out, v)
			}
		}
		return nil
	})
	if err != nil {
		return nil, 0, err
	}
	return out, next, nil
}

// signatures remembers which documents have a good signature by which key.
// Whether that key still counts is asked every time.
type signatures struct {
	mu   sync.Mutex
	good map[[sha512.Size384]byte]ssh.PublicKey
}

// maxSignatures bounds what is remembered; then all of it is forgotten.
const maxSignatures = 4096

func (s *signatures) verify(signature, document []byte, namespace string, keys []ssh.PublicKey) (ssh.PublicKey, error) {
	d := sha512.Sum384(document)
	id := sha512.Sum384(slices.Concat(d[:], signature, []byte(namespace)))
	s.mu.Lock()
	key := s.good[id]
	s.mu.Unlock()
	if key != nil && slices.ContainsFunc(keys, func(k ssh.PublicKey) bool { return sshsig.Same(k, key) }) {
		return key, nil
	}
	key, err := sshsig.Verify(signature, document, namespace, keys)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.good == nil || len(s.good) >= maxSignatures {
		s.good = map[[sha512.Size384]byte]ssh.PublicKey{}
	}
	s.good[id] = key
	return key, nil
}
