package broker

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

// MaxReason bounds the reason of a revocation, in bytes.
const MaxReason = 512

// MaxOwnerRevocations bounds what one owner revokes besides grants and assets. Each
// release looks through all of it.
const MaxOwnerRevocations = 1_000

// leasePage is how many leases are looked at at a time.
const leasePage = 500

var targetForms = map[RevocationKind]func(string) bool{
	RevokeGrant:       regexp.MustCompile(`^grant-[a-z0-9]{1,64}$`).MatchString,
	RevokeAsset:       assetForm.MatchString,
	RevokePrincipal:   roleName,
	RevokeNode:        oneName,
	RevokeChip:        regexp.MustCompile(`^[0-9a-f]{128}$`).MatchString,
	RevokeImage:       regexp.MustCompile(`^sha256:[0-9a-f]{64}$`).MatchString,
	RevokeMeasurement: regexp.MustCompile(`^[0-9a-f]{96}$`).MatchString,
}

var (
	roleForm = regexp.MustCompile(`^[a-z-]{1,32}$`)
	nameForm = regexp.MustCompile(`^[^\s/]+$`)
)

// roleName says whether s is "ROLE/NAME".
func roleName(s string) bool {
	role, name, ok := strings.Cut(s, "/")
	return ok && roleForm.MatchString(role) && oneName(name)
}

// oneName says whether s is a name of at most 255 characters. A bound in the pattern
// would take half a megabyte of every program that links this package.
func oneName(s string) bool { return utf8.RuneCountInString(s) <= 255 && nameForm.MatchString(s) }

func (t Target) validate() error {
	fits, ok := targetForms[t.Kind]
	if !ok || !fits(t.Value) {
		return fmt.Errorf("%w: revocation of %.40q %.140q: want a grant, asset, ROLE/NAME, node, chip id, image digest or measurement, in lower case", ErrInvalid, t.Kind, t.Value)
	}
	return nil
}

// Revoke takes a grant back: no release happens under it after Revoke returns,
// and jobs that run under it are told to stop. Revoking twice changes nothing.
func (b *Broker) Revoke(ctx context.Context, who Actor, id, reason string) (Grant, error) {
	g, _, err := b.revokeGrant(ctx, who, id, reason)
	return g, err
}

func checkReason(reason string) error {
	if reason == "" || len(reason) > MaxReason {
		return fmt.Errorf("%w: a revocation has a reason of at most %d bytes", ErrInvalid, MaxReason)
	}
	return nil
}

func (b *Broker) revokeGrant(ctx context.Context, who Actor, id, reason string) (g Grant, jobs []string, err error) {
	if err := checkReason(reason); err != nil {
		return Grant{}, nil, err
	}
	err = b.update(ctx, func(ctx context.Context, tx Tx) (err error) {
		if g, err = tx.Grant(ctx, id); err != nil {
			return fmt.Errorf("grant %.80q: %w", id, err)
		}
		if err := b.mayRevoke(ctx, who, g.Owner, g.resource()); err != nil {
			return err
		}
		if !g.Revoked.IsZero() {
			return nil
		}
		g.Revoked, g.Reason, g.EndedBy = b.now().UTC().Truncate(time.Second), reason, who.String()
		if err := tx.SetGrant(ctx, g); err != nil {
			return err
		}
		if _, err = b.log(ctx, tx, translog.Body{Kind: translog.KindRevoke, Actor: who.String(), Revoke: &translog.Revoke{Grant: g.ID, Reason: reason}}); err != nil {
			return err
		}
		jobs, err = b.stop(ctx, tx, Revocation{Target: Target{RevokeGrant, g.ID}, Reason: reason})
		return err
	})
	return g, jobs, err
}

// mayRevoke lets owners revoke what is theirs and whoever may RevokeAny the rest.
func (b *Broker) mayRevoke(ctx context.Context, who Actor, owner string, r Resource) error {
	if b.may(ctx, who, ActionRevokeAny, r) == nil {
		return nil
	}
	if err := b.may(ctx, who, ActionRevoke, r); err != nil {
		return err
	}
	if owner != who.Name {
		var l check.List
		l.Fail(r.Kind+".owner", "a "+r.Kind+" of "+who.Name, "one of "+owner, "ask "+owner+" to revoke it")
		return check.Refuse("revoke", l)
	}
	return nil
}

// RevokeTarget takes t back. What is no grant or asset is revoked for all owners
// by who may RevokeAny, and else for the caller's own assets. It returns the
// jobs that the next renewal tells to stop. Revoking twice changes nothing.
func (b *Broker) RevokeTarget(ctx context.Context, who Actor, t Target, reason string) (Revocation, []string, error) {
	if err := t.validate(); err != nil {
		return Revocation{}, nil, err
	}
	if err := checkReason(reason); err != nil {
		return Revocation{}, nil, err
	}
	if t.Kind == RevokeGrant {
		g, jobs, err := b.revokeGrant(ctx, who, t.Value, reason)
		return Revocation{Target: t, Reason: g.Reason, By: g.EndedBy, Time: g.Revoked}, jobs, err
	}
	rev := Revocation{Target: t, Reason: reason, By: who.String(), Time: b.now().UTC().Truncate(time.Second)}
	var jobs []string
	err := b.update(ctx, func(ctx context.Context, tx Tx) error {
		if t.Kind == RevokeAsset {
			a, err := tx.Asset(ctx, t.Value)
			if err != nil {
				return fmt.Errorf("asset %.80q: %w", t.Value, err)
			}
			if err := b.mayRevoke(ctx, who, a.Owner, a.resource()); err != nil {
				return err
			}
		} else if b.may(ctx, who, ActionRevokeAny, Resource{}) != nil {
			rev.Scope = who.Name
			if err := b.may(ctx, who, ActionRevoke, Resource{Owner: who.Name}); err != nil {
				return err
			}
		}
		old, err := tx.Revoked(ctx, []Target{t})
		if err != nil {
			return err
		}
		if i := slices.IndexFunc(old, func(o Revocation) bool { return o.Scope == rev.Scope }); i >= 0 {
			rev = old[i]
			return nil
		}
		if rev.Scope != "" {
			switch n, err := tx.OwnRevocations(ctx, rev.Scope); {
			case err != nil:
				return err
			case n >= MaxOwnerRevocations:
				return fmt.Errorf("%w: %s revoked %d times, which is as often as an owner may: revoke the grants or the asset, or ask an operator", ErrTooMany, who, n)
			}
		}
		if err := tx.InsertRevocation(ctx, rev); err != nil {
			return err
		}
		if _, err := b.log(ctx, tx, translog.Body{Kind: translog.KindRevoke, Actor: who.String(), Revoke: rev.entry()}); err != nil {
			return err
		}
		jobs, err = b.stop(ctx, tx, rev)
		return err
	})
	return rev, jobs, err
}

func (r Revocation) entry() *translog.Revoke {
	return &translog.Revoke{Kind: string(r.Kind), Value: r.Value, Scope: r.Scope, Reason: r.Reason}
}

// Revocations returns what stands revoked besides grants. More than MaxList are
// ErrTooMany.
func (b *Broker) Revocations(ctx context.Context, who Actor) ([]Revocation, error) {
	if err := b.may(ctx, who, ActionListRevocations, Resource{}); err != nil {
		return nil, err
	}
	var l []Revocation
	err := b.view(ctx, func(ctx context.Context, r Reader) (err error) {
		l, err = r.Revocations(ctx, MaxList+1)
		return err
	})
	if len(l) > MaxList {
		return nil, fmt.Errorf("%w: more than %d revocations", ErrTooMany, MaxList)
	}
	return l, err
}

// LiftRevocation ends the revocation of a node or a chip for all owners. What is
// revoked otherwise stays so: whoever needs it asks for a new grant.
func (b *Broker) LiftRevocation(ctx context.Context, who Actor, t Target, reason string) error {
	if err := b.may(ctx, who, ActionLiftRevocation, Resource{}); err != nil {
		return err
	}
	if err := checkReason(reason); err != nil {
		return err
	}
	if t.Kind != RevokeNode && t.Kind != RevokeChip {
		return fmt.Errorf("%w: only the revocation of a node or of a chip is lifted; %s stays revoked", ErrInvalid, t.Kind)
	}
	if err := t.validate(); err != nil {
		return err
	}
	return b.update(ctx, func(ctx context.Context, tx Tx) error {
		if err := tx.DeleteRevocation(ctx, t, ""); err != nil {
			return fmt.Errorf("revocation of %s: %w", t, err)
		}
		_, err := b.log(ctx, tx, translog.Body{Kind: translog.KindLift, Actor: who.String(), Lift: Revocation{Target: t, Reason: reason}.entry()})
		return err
	})
}

// stop marks the running jobs that rev concerns and returns their ids.
func (b *Broker) stop(ctx context.Context, tx Tx, rev Revocation) (jobs []string, err error) {
	after := ""
	for {
		l, err := tx.OpenLeases(ctx, after, leasePage)
		if err != nil {
			return nil, err
		}
		for _, lease := range l {
			after = lease.JobID
			if lease.Stop != "" || !rev.covers(lease) {
				continue
			}
			lease.Stop = "revoked." + string(rev.Kind) + ": " + rev.Reason
			if err := tx.PutLease(ctx, lease); err != nil {
				return nil, err
			}
			jobs = append(jobs, lease.JobID)
		}
		if len(l) < leasePage {
			return jobs, nil
		}
	}
}

// targets is everything whose revocation concerns a job.
func (l Lease) targets() []Target {
	out := []Target{{RevokePrincipal, l.Agent}}
	if _, node, ok := strings.Cut(l.Agent, "/"); ok {
		out = append(out, Target{RevokeNode, node})
	}
	if l.Submitter != "" {
		out = append(out, Target{RevokePrincipal, l.Submitter})
	}
	if l.Image != "" {
		out = append(out, Target{RevokeImage, l.Image})
	}
	for _, c := range l.Chips {
		out = append(out, Target{RevokeChip, c})
	}
	for _, m := range l.Measurements {
		out = append(out, Target{RevokeMeasurement, m})
	}
	for _, u := range l.Uses {
		for _, t := range []Target{{RevokeGrant, u.Grant}, {RevokeAsset, u.Asset}, {RevokePrincipal, u.Requester}} {
			if !slices.Contains(out, t) {
				out = append(out, t)
			}
		}
	}
	return out
}

// scopes says whether a job uses anything of those for whom r revoked.
func (r Revocation) scopes(l Lease) bool {
	return r.Scope == "" || slices.ContainsFunc(l.Uses, func(u LeaseUse) bool { return u.Owner == r.Scope })
}

func (r Revocation) covers(l Lease) bool {
	return r.scopes(l) && slices.Contains(l.targets(), r.Target)
}

// checkRevoked refuses a job that something revoked concerns. What the broker
// was not told of a job is refused as long as anything of that kind is revoked, for
// all or by an owner of what the job uses.
func checkRevoked(ctx context.Context, r Reader, l *check.List, job Lease) error {
	hints := map[RevocationKind]string{}
	if job.Image == "" {
		hints[RevokeImage] = "use an agent that sends the plan with the request"
	}
	if len(job.Chips) == 0 {
		hints[RevokeChip] = "use a verifier that puts chip ids into results"
	}
	if len(job.Measurements) == 0 {
		hints[RevokeMeasurement] = "use a verifier that puts measurements into results"
	}
	of := job.targets()
	for kind := range hints {
		of = append(of, Target{Kind: kind})
	}
	revoked, err := r.Revoked(ctx, of)
	if err != nil {
		return err
	}
	for _, rev := range revoked {
		switch {
		case rev.Value == "" && rev.scopes(job):
			l.Fail("revoked."+string(rev.Kind), "a known one, as some are revoked", "not known", hints[rev.Kind])
		case rev.covers(job):
			l.Fail("revoked."+string(rev.Kind), "nothing that was revoked", rev.Value+" was revoked at "+stamp(rev.Time), "ask "+rev.By+" why")
		}
	}
	return nil
}

// claims returns the distinct values of a text claim in the appraisals of results.
func claims(results []presented, name string) []string {
	var out []string
	for _, r := range results {
		for _, s := range r.result.Submods {
			if v, ok := s.Claims[name].(string); ok && v != "" && !slices.Contains(out, v) {
				out = append(out, v)
			}
		}
	}
	slices.Sort(out)
	return out
}

// presented is a checked result and whose it is.
type presented struct {
	verifier string
	result   receipt.Result
}
