package broker

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"time"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

const (
	// DefaultLease is how long a job runs on without a renewal.
	DefaultLease = 60 * time.Second
	// DefaultGrace is how long a job that is told to stop may go on.
	DefaultGrace = 10 * time.Second
	// MaxRules bounds the approval rules of one policy and MaxApprovers the
	// approvals that one rule asks for.
	MaxRules     = 8
	MaxApprovers = 16
	// maxVerifiers bounds the verifiers that one policy names.
	maxVerifiers = 8
	// MinResultAge and MaxResultAge bound MaxResultAgeSeconds: twice what a node can
	// do at its quickest, and as much as a plan may ask for.
	MinResultAge = 2 * plan.MinReattest
	MaxResultAge = plan.MaxReattest
)

// Kinds of recipient keys.
const (
	KEMHybrid = "mlkem768-x25519"
	KEMX25519 = "x25519"
)

// Protocols that serve an asset.
const (
	ProtocolCoffer = "coffer"
	ProtocolKBS    = "kbs"
)

// Labels are what access policies look at.
type Labels receipt.AssetLabels

// Rule asks for approvals by Count members of Group.
type Rule = receipt.Rule

// Policy says under what an asset's key is released. The zero Policy stands for
// DefaultPolicy.
type Policy receipt.AssetPolicy

// DefaultPolicy is what an asset has that names none.
func DefaultPolicy() Policy {
	return Policy{LeaseSeconds: int64(DefaultLease / time.Second), GraceSeconds: int64(DefaultGrace / time.Second)}
}

var (
	labelForm    = regexp.MustCompile(`^([a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?)?$`)
	groupForm    = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._@-]{0,62}$`)
	keyStoreForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$`)
)

func (l Labels) validate() error {
	for name, v := range map[string]string{"sensitivity": l.Sensitivity, "region": l.Region, "project": l.Project} {
		if !labelForm.MatchString(v) {
			return fmt.Errorf("%w: label %s %.80q: want lower-case letters, digits, '-' and '.', at most 63", ErrInvalid, name, v)
		}
	}
	return nil
}

// settled fills in the defaults that depend on nothing, and checks the rest.
func (b *Broker) settled(p Policy) (Policy, error) {
	if p.LeaseSeconds == 0 {
		p.LeaseSeconds = DefaultPolicy().LeaseSeconds
	}
	if p.Threshold == 1 && len(p.Verifiers) == 0 {
		p.Threshold = 0
	}
	among := len(p.Verifiers)
	if among == 0 {
		among = len(b.verifiers)
	}
	lease := time.Duration(p.LeaseSeconds) * time.Second
	switch {
	case len(p.Approvals) > MaxRules:
		return p, fmt.Errorf("%w: policy: at most %d approval rules", ErrInvalid, MaxRules)
	case len(p.Verifiers) > maxVerifiers || repeats(p.Verifiers):
		return p, fmt.Errorf("%w: policy: at most %d verifiers, each once", ErrInvalid, maxVerifiers)
	case p.Threshold < 0 || p.Threshold > among:
		return p, fmt.Errorf("%w: policy: results of %d of %d verifiers", ErrInvalid, p.Threshold, among)
	case repeats(p.KEMs) || !within(p.KEMs, KEMHybrid, KEMX25519):
		return p, fmt.Errorf("%w: policy: kems are %q and %q, each once", ErrInvalid, KEMHybrid, KEMX25519)
	case repeats(p.Protocols) || !within(p.Protocols, ProtocolCoffer, ProtocolKBS):
		return p, fmt.Errorf("%w: policy: protocols are %q and %q, each once", ErrInvalid, ProtocolCoffer, ProtocolKBS)
	case p.LeaseSeconds < 0 || p.LeaseSeconds > int64(receipt.MaxLease/time.Second) || lease < receipt.MinLease:
		return p, fmt.Errorf("%w: policy: a lease lasts %s to %s", ErrInvalid, receipt.MinLease, receipt.MaxLease)
	case p.GraceSeconds < 0 || p.GraceSeconds > int64(receipt.MaxGrace/time.Second):
		return p, fmt.Errorf("%w: policy: a grace of at most %s", ErrInvalid, receipt.MaxGrace)
	case p.MaxReleases < 0 || p.MaxReleases > MaxGrantReleases:
		return p, fmt.Errorf("%w: policy: at most %d releases", ErrInvalid, MaxGrantReleases)
	case p.MaxDurationSeconds < 0 || p.MaxDurationSeconds > int64(MaxGrantDuration/time.Second):
		return p, fmt.Errorf("%w: policy: grants of at most %d days", ErrInvalid, MaxGrantDuration/(24*time.Hour))
	case p.MaxResultAgeSeconds != 0 && (p.MaxResultAgeSeconds < MinResultAge || p.MaxResultAgeSeconds > MaxResultAge):
		return p, fmt.Errorf("%w: policy: results of at most %d to %d s of age", ErrInvalid, MinResultAge, MaxResultAge)
	case repeats(p.Affirming) || !within(p.Affirming, vectorClaims()...):
		return p, fmt.Errorf("%w: policy: affirming names claims of the trust vector, each once: %q", ErrInvalid, vectorClaims())
	}
	for _, v := range p.Verifiers {
		if _, known := b.verifiers[v]; !known {
			return p, fmt.Errorf("%w: policy: the broker knows no verifier %.80q: its operator configures them", ErrInvalid, v)
		}
	}
	var groups []string
	for _, r := range p.Approvals {
		if !groupForm.MatchString(r.Group) || r.Count < 1 || r.Count > MaxApprovers {
			return p, fmt.Errorf("%w: policy: rule of group %.80q: want a name and a count from 1 to %d", ErrInvalid, r.Group, MaxApprovers)
		}
		groups = append(groups, r.Group)
	}
	if repeats(groups) {
		return p, fmt.Errorf("%w: policy: one rule for one group", ErrInvalid)
	}
	return p, nil
}

func repeats(l []string) bool { return len(set(l)) != len(l) }

func within(l []string, known ...string) bool {
	return !slices.ContainsFunc(l, func(s string) bool { return !slices.Contains(known, s) })
}

// serves says whether the policy names a protocol.
func (p Policy) serves(protocol string) bool {
	if len(p.Protocols) == 0 {
		return protocol == ProtocolCoffer
	}
	return slices.Contains(p.Protocols, protocol)
}

// kems are the kinds of recipient keys that the policy allows.
func (p Policy) kems() []string {
	if len(p.KEMs) == 0 {
		return []string{KEMHybrid}
	}
	return p.KEMs
}

// accepts says whether the policy allows a kind of recipient key.
func (p Policy) accepts(kem string) bool { return slices.Contains(p.kems(), kem) }

// vector returns the claims of a trust vector by their names in AR4SI.
func vector(v receipt.TrustVector) map[string]int8 {
	return map[string]int8{
		"instance-identity": v.InstanceIdentity, "configuration": v.Configuration, "executables": v.Executables, "file-system": v.FileSystem,
		"hardware": v.Hardware, "runtime-opaque": v.RuntimeOpaque, "storage-opaque": v.StorageOpaque, "sourced-data": v.SourcedData,
	}
}

func vectorClaims() []string {
	var out []string
	for name := range vector(receipt.TrustVector{}) {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

// checkResults holds the results of a claim against the policy.
func (p Policy) checkResults(l *check.List, c claim) {
	if !p.serves(c.protocol) {
		l.Fail("asset.protocol", "an asset that this protocol serves", "one for "+fmt.Sprint(p.Protocols), "ask the owner to name the protocol in the asset's policy")
	}
	counted := 0
	for i, r := range c.results() {
		trusted := len(p.Verifiers) == 0 || slices.Contains(p.Verifiers, r.verifier)
		if trusted {
			counted++
		} else if i == 0 {
			l.Fail("asset.verifiers", "a result of "+fmt.Sprint(p.Verifiers), trim(r.verifier), "attest to a verifier that the asset's policy names")
		}
	}
	if want := max(p.Threshold, 1); counted < want {
		l.Fail("asset.verifier-threshold", strconv.Itoa(want)+" results of verifiers that the asset's policy trusts", strconv.Itoa(counted), "attest to more of them with the same keys")
	}
	p.checkAffirming(l, c.result)
}

// checkAffirming holds the trust vectors of a result against the policy.
func (p Policy) checkAffirming(l *check.List, r receipt.Result) {
	for _, name := range p.Affirming {
		affirmed := false
		for _, s := range r.Submods {
			// A vector with this one claim has the claim's tier.
			v := receipt.TrustVector{Hardware: vector(s.Vector)[name]}
			affirmed = affirmed || v.Tier() == receipt.Affirming
		}
		if !affirmed {
			l.Fail("asset.affirming", name+" affirmed by a device", "it is not", "ask the verifier's operator for reference values of "+name)
		}
	}
}

// document is what the log records of a policy.
func (a Asset) document() ([]byte, error) {
	return plan.Canonical(struct {
		Policy Policy `json:"policy"`
		Labels Labels `json:"labels"`
	}{a.Policy, a.Labels})
}

// UpdateAssetPolicy replaces the policy and the labels of an asset of owner. It
// holds from the next release on, under old grants too. A revision that is not
// the asset's is ErrExists: someone else changed it. signed is the owner's
// statement of the next revision, which an owner whose keys the Directory knows
// must make.
func (b *Broker) UpdateAssetPolicy(ctx context.Context, owner Actor, name string, p Policy, labels Labels, revision int64, signed *Signed) (Asset, error) {
	p, err := b.settled(p)
	if err != nil {
		return Asset{}, err
	}
	if err := labels.validate(); err != nil {
		return Asset{}, err
	}
	var a Asset
	err = b.update(ctx, func(ctx context.Context, tx Tx) (err error) {
		if a, err = tx.Asset(ctx, name); err != nil {
			return fmt.Errorf("asset %.80q: %w", name, err)
		}
		if err := b.may(ctx, owner, ActionUpdateAssetPolicy, a.resource()); err != nil {
			return err
		}
		if a.Owner != owner.Name {
			var l check.List
			l.Fail("asset.owner", "an asset of "+owner.Name, "an asset of "+a.Owner, "ask "+a.Owner)
			return check.Refuse("policy", l)
		}
		if a.Revision != revision {
			return fmt.Errorf("asset %s: %w: its revision is %d, not %d: read it again", a.Name, ErrExists, a.Revision, revision)
		}
		a.Policy, a.Labels, a.Revision = p, labels, a.Revision+1
		if err := b.sign(ctx, &a, signed); err != nil {
			return err
		}
		doc, err := a.document()
		if err != nil {
			return err
		}
		if err := tx.SetAssetPolicy(ctx, a); err != nil {
			return err
		}
		_, err = b.log(ctx, tx, translog.Body{Kind: translog.KindAssetPolicy, Actor: owner.String(), AssetPolicy: &translog.AssetPolicy{Name: a.Name, Revision: a.Revision, Policy: doc}})
		return err
	})
	if err != nil {
		return Asset{}, err
	}
	return a, nil
}
