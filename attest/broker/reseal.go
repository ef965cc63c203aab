package broker

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

// open says whether the asset waits for a job to seal it: weights or a data set
// that were registered with neither digest nor key. The broker made the key, and
// nobody but such a job gets it.
func (a Asset) open() bool { return a.Kind != KindCheckpoints && a.Digest == "" }

// checkOpen holds an asset against what the claim's plan reseals: the key of an
// open asset is for the plan that seals it, and a plan seals nothing that is
// sealed.
func (c claim) checkOpen(l *check.List, a Asset) {
	to := c.reseal != nil && c.reseal.To == a.Name
	switch {
	case a.open() && !to:
		l.Fail("asset.open", "a plan that reseals to "+a.Name, "another plan, or none", "the asset has no digest yet: a re-sealing sets it")
	case !a.open() && to:
		l.Fail("asset.sealed", "an asset whose digest is open", a.Name+" has "+string(a.Digest), "reseal to another asset")
	}
}

// checkResealed fails l unless the open asset a and what the claim's plan seals anew
// under its key have one owner: else the plaintext of one would lie under a key that
// another gives out.
func (c claim) checkResealed(ctx context.Context, r Reader, l *check.List, a Asset) error {
	if !a.open() || c.reseal == nil {
		return nil
	}
	from, err := r.Asset(ctx, c.reseal.Asset)
	if errors.Is(err, ErrNotFound) {
		l.Fail("reseal.from", "an asset of this broker", strconv.Quote(c.reseal.Asset), "register what is to be sealed anew")
		return nil
	}
	if err != nil {
		return err
	}
	l.Equal("reseal.owner", from.Owner, a.Owner, "what is sealed anew stays its owner's")
	return nil
}

// resealing is what a commit of a re-sealing was checked to be.
type resealing struct {
	record receipt.ResealRecord
	digest plan.Digest // of the record
	to     Asset
	// done is when and where it was committed before; nil if it was not.
	done *translog.Entry
	time int64
}

// CommitReseal sets the digest of an open asset to what an attested job sealed
// under its key, once, and signs for it: a receipt.Resealed. document is the job's
// canonical plan, record a receipt.ResealRecord and signature the session key's
// over it. The same record again gets the same answer.
func (b *Broker) CommitReseal(ctx context.Context, agent Actor, job string, document, record, signature []byte) (string, error) {
	if !jobForm.MatchString(job) || len(record) > receipt.MaxResealRecord {
		return "", fmt.Errorf("%w: re-sealing of job %.80q with a record of %d bytes, at most %d are allowed", ErrInvalid, job, len(record), receipt.MaxResealRecord)
	}
	if err := b.may(ctx, agent, ActionCommitReseal, Resource{Kind: "job", Name: job}); err != nil {
		return "", err
	}
	p, err := plan.Parse(document)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	r, err := receipt.ParseResealRecord(record)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if p.Reseal == nil {
		return "", fmt.Errorf("%w: the plan of job %s reseals nothing", ErrInvalid, job)
	}
	look := func(ctx context.Context, s Reader) (resealing, error) {
		return b.checkReseal(ctx, s, agent, job, document, *p.Reseal, r, record, signature)
	}
	var first resealing
	if err := b.view(ctx, func(ctx context.Context, s Reader) (err error) {
		first, err = look(ctx, s)
		return err
	}); err != nil {
		return "", err
	}
	if first.done != nil {
		return b.resealed(job, first, *first.done, first.time)
	}
	// What the key is wrapped under names the digest. Key stores are slow, so this
	// is done before the transaction.
	sealed, err := b.rewrapAs(ctx, first.to, r.Digest)
	if err != nil {
		return "", err
	}
	var entry translog.Entry
	var now time.Time
	err = b.update(ctx, func(ctx context.Context, tx Tx) error {
		again, err := look(ctx, tx)
		if err != nil {
			return err
		}
		if again.done != nil {
			entry, now = *again.done, time.UnixMilli(again.time)
			return nil
		}
		if !bytes.Equal(again.to.Wrapped, first.to.Wrapped) || again.to.KeyStore != first.to.KeyStore {
			return fmt.Errorf("%w: the key of asset %s was wrapped anew meanwhile", ErrUnavailable, r.To)
		}
		if err := b.room(ctx, tx, job); err != nil {
			return err
		}
		if err := tx.SetAssetDigest(ctx, sealed); err != nil {
			return err
		}
		now = b.now()
		entry, err = b.log(ctx, tx, translog.Body{Kind: translog.KindReseal, Actor: agent.String(), Job: job, Reseal: &translog.Reseal{
			Plan: r.Plan, From: r.From, FromDigest: r.FromDigest, Asset: r.To, Digest: r.Digest, Record: again.digest,
		}})
		return err
	})
	if err != nil {
		return "", err
	}
	return b.resealed(job, first, entry, now.UnixMilli())
}

// checkReseal holds a commit against the lease of the job and the two assets. It
// changes nothing, and runs once to refuse early and once in the transaction.
func (b *Broker) checkReseal(ctx context.Context, s Reader, agent Actor, job string, document []byte, part plan.Reseal, r receipt.ResealRecord, record, signature []byte) (resealing, error) {
	out := resealing{record: r, digest: plan.Sum(record)}
	lease, refused, err := leaseOf(ctx, s, agent, job)
	if err != nil {
		return out, err
	}
	var l check.List
	if refused != "" {
		l.Fail("reseal.lease", "a running job of this agent", refused, "")
		return out, check.Refuse("reseal", l)
	}
	if reason := lease.reason(b.now()); reason != "" {
		l.Fail("reseal.stopped", "a job that may run", reason, "")
	}
	key, err := x509.ParsePKIXPublicKey(lease.Session)
	if err != nil {
		return out, fmt.Errorf("session key of job %s: %w", job, err)
	}
	session, _ := key.(*ecdsa.PublicKey)
	if err := receipt.VerifyReseal(session, record, signature); err != nil {
		var refusal *check.Refusal
		if !errors.As(err, &refusal) {
			return out, err
		}
		l = append(l, refusal.Checks...)
	}
	l.Equal("reseal.plan", string(lease.Plan), string(plan.Sum(document)), "send the plan under which the keys were released")
	l.Equal("reseal.job", job, trim(r.JobID), "")
	l.Equal("reseal.record-plan", string(lease.Plan), string(r.Plan), "")
	l.Equal("reseal.from", part.Asset, trim(r.From), "")
	l.Equal("reseal.from-digest", string(part.Digest), string(r.FromDigest), "")
	l.Equal("reseal.to", part.To, trim(r.To), "")
	for _, name := range []string{part.Asset, part.To} {
		if !slices.ContainsFunc(lease.Uses, func(u LeaseUse) bool { return u.Asset == name }) {
			l.Fail("reseal.asset", "an asset whose key the job has", strconv.Quote(trim(name)), "")
		}
	}
	if len(l.Failed()) > 0 {
		return out, check.Refuse("reseal", l)
	}
	assets, err := b.assets(ctx, s, []string{part.Asset, part.To})
	if err != nil {
		return out, err
	}
	from, to := assets[0], assets[1]
	l.Equal("reseal.owner", from.Owner, to.Owner, "what is sealed anew stays its owner's")
	if part.Checkpoint {
		// Which checkpoint it is, the plan says that people approved.
		l.Equal("reseal.source", string(KindCheckpoints), string(from.Kind), "the plan seals a checkpoint anew")
	} else {
		l.Equal("reseal.source", string(from.Digest), string(part.Digest), "the source is not the one in the plan")
		l.Equal("reseal.kind", string(from.Kind), string(to.Kind), "what is sealed anew stays what it is")
	}
	if !to.open() {
		e, when, err := committedReseal(ctx, s, job, out.digest)
		if err != nil {
			return out, err
		}
		if e == nil || to.Digest != r.Digest {
			l.Fail("reseal.digest", "an asset whose digest is open", to.Name+" has "+string(to.Digest), "reseal to another asset")
		}
		out.done, out.time = e, when
	}
	if len(l.Failed()) > 0 {
		return out, check.Refuse("reseal", l)
	}
	out.to = to
	return out, nil
}

// committedReseal finds the log entry that records the commit of a record of the
// job's, with its time in milliseconds since 1970; nil if there is none.
func committedReseal(ctx context.Context, r Reader, job string, record plan.Digest) (*translog.Entry, int64, error) {
	entries, err := r.Entries(ctx, job, 0, MaxJobEntries)
	if err != nil {
		return nil, 0, err
	}
	for _, e := range entries {
		body, err := e.Open()
		if err != nil {
			return nil, 0, err
		}
		if body.Kind == translog.KindReseal && body.Reseal.Record == record {
			return &e, body.TimeMillis, nil
		}
	}
	return nil, 0, nil
}

// rewrapAs returns the asset with a digest, and its data key wrapped for that.
func (b *Broker) rewrapAs(ctx context.Context, a Asset, digest plan.Digest) (Asset, error) {
	key, _, err := b.unwrap(ctx, a)
	if err != nil {
		return Asset{}, err
	}
	defer key.Destroy()
	a.Digest = digest
	ad, err := a.associated()
	if err != nil {
		return Asset{}, err
	}
	if a.Wrapped, err = b.keys[a.KeyStore].Wrap(ctx, key, ad); err != nil {
		return Asset{}, fmt.Errorf("%w: wrap key of asset %s: %w", ErrUnavailable, a.Name, err)
	}
	return a, nil
}

// resealed signs for a committed re-sealing.
func (b *Broker) resealed(job string, r resealing, e translog.Entry, millis int64) (string, error) {
	token, err := b.signer.Sign(receipt.TypeResealed, receipt.Resealed{
		Issuer: b.id, IssuedAt: millis / 1000, JobID: job, Plan: r.record.Plan, Asset: r.record.To, Digest: r.record.Digest, Record: r.digest, LogIndex: e.Index, LogHash: e.Hash,
	})
	if err != nil {
		return "", fmt.Errorf("%w: sign re-sealing: %w", ErrUnavailable, err)
	}
	return token, nil
}
