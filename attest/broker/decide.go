package broker

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/translog"
)

// verdict is what the stored state says to a claim that it does not refuse.
type verdict struct {
	grant Grant
	asset Asset
	// prior is the stored answer to the same request.
	prior *Release
	// newUses and newAttempt say what the release adds.
	newUses    []Use
	newAttempt bool
	// lease is what the job runs under with this release.
	lease Lease
	// approvals are the digests of the approvals that count.
	approvals []plan.Digest
	// until is when time alone may turn the verdict.
	until time.Time
	// heads are of the log that the verdict was made over; nil if nobody looked.
	heads *heads
}

// heads are where the log and a job's part of it stand, and which of the sets of
// access policies, counted from the broker's start, was in force.
type heads struct {
	log, job   translog.Head
	policySets uint64
}

// decide holds a claim against the stored state. It changes nothing, and runs
// once to refuse early and once in the transaction. Each step refuses with all that
// it found, and relies on what the steps before it have checked.
func (b *Broker) decide(ctx context.Context, r Reader, c claim) (verdict, error) {
	v, had, err := b.granted(ctx, r, c)
	if err != nil {
		return verdict{}, err
	}
	if err := b.mayRun(ctx, r, c, had, &v); err != nil {
		return verdict{}, err
	}
	replays, err := c.answered(ctx, r, &v)
	if err != nil {
		return verdict{}, err
	}
	if v.prior != nil {
		return v, nil
	}
	if err := c.withinBounds(ctx, r, replays, &v); err != nil {
		return verdict{}, err
	}
	return v, nil
}

// granted finds the grant and whether it stands: it is on this asset, plan, verifier and
// submitter, its approvals count at this moment, and the job's agent asks. had is the
// lease that the job has already, zero without one.
func (b *Broker) granted(ctx context.Context, r Reader, c claim) (v verdict, had Lease, err error) {
	var l check.List
	l.Equal("release.broker", b.id, trim(c.request.Broker), "send the request to the broker that it names")
	at := heads{policySets: b.policySets.Load()}
	if at.log, err = r.Head(ctx); err != nil {
		return verdict{}, Lease{}, err
	}
	if at.job, err = r.JobHead(ctx, c.result.JobID); err != nil {
		return verdict{}, Lease{}, err
	}
	// A job that the log does not know has no lease and no agent.
	if at.job.Size > 0 {
		had, err = r.Lease(ctx, c.result.JobID)
		switch {
		case errors.Is(err, ErrNotFound):
			if err := checkAgent(ctx, r, &l, c.result.JobID, c.actor); err != nil {
				return verdict{}, Lease{}, err
			}
		case err != nil:
			return verdict{}, Lease{}, err
		case had.Agent != c.actor.String():
			// The first release checked that the job was nobody else's.
			notTheAgent(&l, c.actor)
		}
	}
	g, err := r.Grant(ctx, c.request.Grant)
	if errors.Is(err, ErrNotFound) {
		l.Fail("grant.id", "a grant of this broker", strconv.Quote(trim(c.request.Grant)), "ask the owner of the asset for a grant for this plan")
		return verdict{}, Lease{}, check.Refuse(stage, l)
	}
	if err != nil {
		return verdict{}, Lease{}, err
	}
	assets, err := b.assets(ctx, r, g.Assets)
	if err != nil {
		return verdict{}, Lease{}, err
	}
	v = verdict{grant: g, heads: &at}
	if i := slices.IndexFunc(assets, func(a Asset) bool { return a.Name == c.request.Asset }); i >= 0 {
		v.asset = assets[i]
	}
	l = append(l, b.checkGrant(g, v.asset, c)...)
	s, err := b.stand(ctx, r, g, assets)
	if err != nil {
		return verdict{}, Lease{}, err
	}
	if len(s.unsigned) > 0 {
		l.Fail("asset.policy-signature", "policies that their owner signed", "it lacks "+strings.Join(s.unsigned, "; "), "ask "+g.Owner+": coffer assets policy NAME --key FILE")
	}
	if v.approvals, v.until = s.counted, earlier(s.until, ends(g, v.asset)); len(s.missing) > 0 {
		l.Fail("grant.approvals", "a grant with every approval that its assets ask for", "it lacks "+strings.Join(s.missing, "; "), "ask them: coffer grant approve "+g.ID)
	}
	if len(l.Failed()) > 0 {
		return verdict{}, Lease{}, check.Refuse(stage, l)
	}
	// Creating a grant checks this; here it costs nothing and holds even if the
	// store was changed behind our back.
	if v.asset.Owner != g.Owner {
		l.Fail("grant.owner", "a grant by the owner of the asset", "a grant by "+g.Owner, "ask the owner of the asset for a grant")
		return verdict{}, Lease{}, check.Refuse(stage, l)
	}
	return v, had, nil
}

// mayRun checks that the access policies let the caller have the key, and that nothing
// stops the job: it is not reported gone, and neither a refused attestation nor a revocation
// ends it. It adds the lease under which the job then runs.
func (b *Broker) mayRun(ctx context.Context, r Reader, c claim, had Lease, v *verdict) error {
	access := Access{Principal: c.actor, Action: ActionRelease, Resource: v.asset.resource(), Time: b.now(), Simulated: c.result.Simulated}
	access.Resource.Plan = c.result.PlanDigest
	if err := b.authorize(ctx, access); err != nil {
		return err
	}
	var l check.List
	// It is the agent's word that the job is gone. Its holder may live and have keys of
	// the first lease: whatever else was released to the job would be a lease to it too.
	if !had.Ended.IsZero() {
		l.Fail("job.ended", "a job that may run", "reported gone at "+stamp(had.Ended), "start another job")
		return check.Refuse(stage, l)
	}
	var err error
	if v.lease, err = c.lease(had, *v, b.now()); err != nil {
		return err
	}
	if had.Attested.Refused != "" {
		l.Fail("job.stopped", "a job that may run", had.Attested.Refused, "show the broker a result that affirms")
	}
	if a := had.Attested; a.MaxAge > 0 {
		v.until = earlier(v.until, time.Unix(a.IssuedAt+a.MaxAge, 0))
	}
	if reason := had.reason(b.now()); reason != "" {
		l.Fail("job.stopped", "a job that may run", reason, "start another job under a grant that stands")
	}
	if err := checkRevoked(ctx, r, &l, v.lease); err != nil {
		return err
	}
	if len(l.Failed()) > 0 {
		return check.Refuse(stage, l)
	}
	return nil
}

// answered looks for the answer that this very request had before, and lists what of the
// result was used with anything else. What is released is used in the same transaction,
// so that a result that nobody used has no answer.
func (c claim) answered(ctx context.Context, r Reader, v *verdict) (check.List, error) {
	var l check.List
	replayed, known := false, false
	for _, use := range c.uses() {
		uses, err := r.Uses(ctx, use.Verifier, use.Nonce, use.ResultID)
		if err != nil {
			return nil, err
		}
		if len(uses) == 0 {
			v.newUses = append(v.newUses, use)
		}
		for _, u := range uses {
			replayed = replayed || u != use
			known = known || u.Verifier == c.verifier && u.ResultID == c.result.ID
		}
	}
	if known {
		prior, err := r.Release(ctx, c.key())
		switch {
		case err == nil && prior.Request == c.digest:
			v.prior = &prior
			return nil, nil
		case err == nil:
			l.Fail("release.replay", "one request for one asset under one result", "another request was answered", "attest again for another attempt")
		case !errors.Is(err, ErrNotFound):
			return nil, err
		}
	}
	if replayed {
		l.Fail("release.replay", "a nonce, a result and a recipient key that belong together", "one of them was used with another", "attest again with a fresh nonce")
	}
	return l, nil
}

// countRelease fails for a new attempt when the grant, or the asset's policy, has no release left for it.
func (v *verdict) countRelease(l *check.List) {
	most := v.grant.MaxReleases
	if p := v.asset.Policy.MaxReleases; p > 0 {
		most = min(most, p)
	}
	if v.newAttempt && v.grant.Used >= most {
		l.Fail("grant.exhausted", "a grant with releases left", fmt.Sprintf("%d of %d used", v.grant.Used, most), "ask the owner for a new grant")
	}
}

// withinBounds checks what a release that nobody had before adds to: the job's log
// entries, the grant's releases, and what the asset's policy asks of results and keys. l has
// what was found before.
func (c claim) withinBounds(ctx context.Context, r Reader, l check.List, v *verdict) error {
	if limit := uint64(MaxJobEntries - bundleEntries); v.heads.job.Size >= limit {
		l.Fail("job.entries", fmt.Sprintf("a job with fewer than %d log entries", limit), strconv.FormatUint(v.heads.job.Size, 10), "start another job")
	}
	// A job that the log does not know was not counted either.
	v.newAttempt = true
	if v.heads.job.Size > 0 {
		counted, err := r.Counted(ctx, v.grant.ID, c.result.JobID, c.recipient)
		if err != nil {
			return err
		}
		v.newAttempt = !counted
	}
	v.countRelease(&l)
	v.asset.Policy.checkResults(&l, c)
	c.checkOpen(&l, v.asset)
	if err := c.checkResealed(ctx, r, &l, v.asset); err != nil {
		return err
	}
	if kem := kemOf(c.result.Confirmation.Recipient); kem != nil && !v.asset.Policy.accepts(kem.name) {
		l.Fail("asset.kem", "a recipient key of "+fmt.Sprint(v.asset.Policy.kems()), kem.name, "the job's holder makes the recipient key: ask the owner which kinds the asset's policy allows")
	}
	if len(l.Failed()) > 0 {
		return check.Refuse(stage, l)
	}
	return nil
}

// ends is when a grant is over for an asset, whose policy may have come later.
func ends(g Grant, a Asset) time.Time {
	if most := time.Duration(a.Policy.MaxDurationSeconds) * time.Second; most > 0 && g.NotAfter.Sub(g.NotBefore) > most {
		return g.NotBefore.Add(most)
	}
	return g.NotAfter
}

// earlier returns the earlier of two times, of which a may be zero, which is never.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || b.Before(a) {
		return b
	}
	return a
}

func (b *Broker) checkGrant(g Grant, a Asset, c claim) check.List {
	var l check.List
	now := b.now()
	l.Equal("grant.plan", string(g.Plan), string(c.result.PlanDigest), "the grant is for another plan: compare the job with the one that was approved")
	if !slices.Contains(g.Assets, c.request.Asset) {
		l.Fail("grant.asset", "one of the grant's assets", strconv.Quote(trim(c.request.Asset)), "ask the owner for a grant that names this asset")
	}
	if !g.Revoked.IsZero() {
		l.Fail("grant.revoked", "a grant that stands", "revoked at "+stamp(g.Revoked), "ask the owner why")
	}
	if now.Before(g.NotBefore) {
		l.Fail("grant.not-before", "a grant that is valid at "+stamp(now), "valid from "+stamp(g.NotBefore), "wait")
	}
	if !g.Denied.IsZero() {
		l.Fail("grant.denied", "a grant that stands", "denied at "+stamp(g.Denied), "ask "+g.EndedBy+" why")
	}
	if end := ends(g, a); !now.Before(end) {
		l.Fail("grant.expiry", "a grant that is valid at "+stamp(now), "expired at "+stamp(end), "ask the owner for a new grant")
	}
	var agents, submitters []string
	for _, p := range g.Principals {
		if strings.HasPrefix(p, roleAgent+"/") || strings.HasPrefix(p, "spiffe://") {
			agents = append(agents, p)
		} else {
			submitters = append(submitters, p)
		}
	}
	if len(agents) > 0 && !slices.Contains(agents, c.actor.String()) && (c.actor.ID == "" || !slices.Contains(agents, c.actor.ID)) {
		l.Fail("grant.principal", "an agent that the grant names", c.actor.String(), "run the job on one of the nodes that the grant names")
	}
	if len(submitters) > 0 && !slices.Contains(submitters, c.request.Submitter) {
		l.Fail("grant.submitter", "a submitter that the grant names", strconv.Quote(c.request.Submitter), "ask for a grant that names the submitter")
	}
	if c.result.Simulated && !g.AllowSimulated {
		l.Fail("grant.simulated", "evidence rooted in a vendor's anchor", "evidence rooted in a simulation anchor", "run on confidential hardware, or ask for a grant that allows simulation")
	}
	return l
}
