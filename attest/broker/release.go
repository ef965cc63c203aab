package broker

import (
	"context"
	"crypto/hpke"
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

// stage is where every refusal of a release says that it happened.
const stage = "release"

// Answer is what a released key travels in. Only the holder of the recipient
// key in the result can open it.
type Answer struct {
	Enc        []byte
	Ciphertext []byte
	// Receipt is a signed receipt.Release.
	Receipt string
}

// claim is a request whose signatures were checked.
type claim struct {
	actor     Actor
	verifier  string
	result    receipt.Result
	request   receipt.ReleaseRequest
	digest    plan.Digest // of the request's bytes
	recipient plan.Digest
}

func (c claim) key() ReleaseKey {
	return ReleaseKey{Verifier: c.verifier, ResultID: c.result.ID, Asset: c.request.Asset}
}

// verdict is what the stored state says to a claim that it does not refuse.
type verdict struct {
	grant Grant
	asset Asset
	// prior is the stored answer to the same request.
	prior *Release
	// newUse and newAttempt say what the release adds.
	newUse, newAttempt bool
}

// Release wraps one asset's data key to the recipient key in an attestation
// result. request is the canonical receipt.ReleaseRequest and signature the
// session key's over it. The same request under the same result gets the same
// ciphertext as long as the grant stands, and counts once.
//
// A *check.Refusal at stage "release" is final and lists every failed check;
// ErrUnavailable is worth the same request again.
func (b *Broker) Release(ctx context.Context, agent Actor, token string, request, signature []byte) (Answer, error) {
	c, err := b.authenticate(agent, token, request, signature)
	if err != nil {
		return Answer{}, err
	}

	var v verdict
	err = b.view(ctx, func(ctx context.Context, r Reader) (err error) {
		v, err = b.decide(ctx, r, c)
		return err
	})
	if err != nil {
		return Answer{}, err
	}
	if v.prior != nil {
		return b.answer(*v.prior)
	}

	rel := Release{
		ReleaseKey: c.key(), ID: newID("release"), Grant: v.grant.ID, Attempt: c.request.Attempt, JobID: c.result.JobID, Plan: c.result.PlanDigest,
		AssetDigest: v.asset.Digest, Request: c.digest, NotAfter: v.grant.NotAfter, Simulated: c.result.Simulated,
	}
	// The wrapped key exists before the transaction, so that what commits is
	// the complete answer.
	if rel.Enc, rel.Ciphertext, err = b.wrap(ctx, c, v.asset); err != nil {
		return Answer{}, err
	}
	err = b.update(ctx, func(ctx context.Context, tx Tx) error {
		// The grant may have been spent or revoked since: this look decides.
		v, err := b.decide(ctx, tx, c)
		if err != nil {
			return err
		}
		if v.prior != nil {
			rel = *v.prior
			return nil
		}
		rel, err = b.record(ctx, tx, c, v, rel)
		return err
	})
	if err != nil {
		return Answer{}, err
	}
	return b.answer(rel)
}

// authenticate checks what needs no state: the verifier's signature and
// verdict, and the session key's signature.
func (b *Broker) authenticate(agent Actor, token string, request, signature []byte) (claim, error) {
	issuer := issuerOf(token)
	keys, ok := b.verifiers[issuer]
	if !ok {
		var l check.List
		l.Fail("result.issuer", "a result of a verifier that this broker trusts", strconv.Quote(trim(issuer)), "attest to a verifier that the broker's operator configured")
		return claim{}, check.Refuse(stage, l)
	}
	v, err := receipt.VerifyResult(keys, token, receipt.Expect{Audience: b.id, AnyJob: true, AllowSimulated: b.simulation}, b.now())
	if err != nil {
		return claim{}, restage(err)
	}
	req, err := receipt.ParseReleaseRequest(v, request, signature)
	if err != nil {
		return claim{}, restage(err)
	}
	res := v.Result()
	if !jobForm.MatchString(res.JobID) {
		var l check.List
		l.Fail("result.job", "a job id", strconv.Quote(trim(res.JobID)), "use a verifier of the same version")
		return claim{}, check.Refuse(stage, l)
	}
	return claim{actor: agent, verifier: issuer, result: res, request: req, digest: plan.Sum(request), recipient: plan.Sum(res.Confirmation.Recipient)}, nil
}

// decide holds a claim against the stored state. It changes nothing, and runs
// once to refuse early and once in the transaction.
func (b *Broker) decide(ctx context.Context, r Reader, c claim) (verdict, error) {
	var l check.List
	l.Equal("release.broker", b.id, trim(c.request.Broker), "send the request to the broker that it names")
	if err := checkAgent(ctx, r, &l, c.result.JobID, c.actor); err != nil {
		return verdict{}, err
	}
	g, err := r.Grant(ctx, c.request.Grant)
	if errors.Is(err, ErrNotFound) {
		l.Fail("grant.id", "a grant of this broker", strconv.Quote(trim(c.request.Grant)), "ask the owner of the asset for a grant for this plan")
		return verdict{}, check.Refuse(stage, l)
	}
	if err != nil {
		return verdict{}, err
	}
	l = append(l, b.checkGrant(g, c)...)
	if len(l.Failed()) > 0 {
		return verdict{}, check.Refuse(stage, l)
	}

	v := verdict{grant: g}
	prior, err := r.Release(ctx, c.key())
	switch {
	case err == nil && prior.Request == c.digest:
		v.prior = &prior
		return v, nil
	case err == nil:
		l.Fail("release.replay", "one request for one asset under one result", "another request was answered", "attest again for another attempt")
	case !errors.Is(err, ErrNotFound):
		return verdict{}, err
	}

	uses, err := r.Uses(ctx, c.verifier, c.result.Nonce, c.result.ID)
	if err != nil {
		return verdict{}, err
	}
	v.newUse = len(uses) == 0
	for _, u := range uses {
		if u != c.use() {
			l.Fail("release.replay", "a nonce, a result and a recipient key that belong together", "one of them was used with another", "attest again with a fresh nonce")
		}
	}

	head, err := r.JobHead(ctx, c.result.JobID)
	if err != nil {
		return verdict{}, err
	}
	if limit := uint64(MaxJobEntries - bundleEntries); head.Size >= limit {
		l.Fail("job.entries", fmt.Sprintf("a job with fewer than %d log entries", limit), strconv.FormatUint(head.Size, 10), "start another job")
	}

	counted, err := r.Counted(ctx, g.ID, c.result.JobID, c.recipient)
	if err != nil {
		return verdict{}, err
	}
	v.newAttempt = !counted
	if v.newAttempt && g.Used >= g.MaxReleases {
		l.Fail("grant.exhausted", "a grant with releases left", fmt.Sprintf("%d of %d used", g.Used, g.MaxReleases), "ask the owner for a new grant")
	}
	if len(l.Failed()) > 0 {
		return verdict{}, check.Refuse(stage, l)
	}

	if v.asset, err = r.Asset(ctx, c.request.Asset); err != nil {
		return verdict{}, err
	}
	// Creating a grant checks this; here it costs nothing and holds even if the
	// store was changed behind our back.
	if v.asset.Owner != g.Owner {
		l.Fail("grant.owner", "a grant by the owner of the asset", "a grant by "+g.Owner, "ask the owner of the asset for a grant")
		return verdict{}, check.Refuse(stage, l)
	}
	return v, nil
}

func (b *Broker) checkGrant(g Grant, c claim) check.List {
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
	if !now.Before(g.NotAfter) {
		l.Fail("grant.expiry", "a grant that is valid at "+stamp(now), "expired at "+stamp(g.NotAfter), "ask the owner for a new grant")
	}
	if c.result.Simulated && !g.AllowSimulated {
		l.Fail("grant.simulated", "evidence rooted in a vendor's anchor", "evidence rooted in a simulation anchor", "run on confidential hardware, or ask for a grant that allows simulation")
	}
	return l
}

func (c claim) use() Use {
	return Use{Verifier: c.verifier, Nonce: c.result.Nonce, ResultID: c.result.ID, Recipient: c.recipient}
}

// wrap opens the stored data key and seals it to the recipient key.
func (b *Broker) wrap(ctx context.Context, c claim, a Asset) (enc, ciphertext []byte, err error) {
	kem, kdf, aead := Suite()
	pub, err := kem.NewPublicKey(c.result.Confirmation.Recipient)
	if err != nil {
		var l check.List
		l.Fail("release.recipient-key", "an ML-KEM-768+X25519 public key", "another key", "the job's holder makes the recipient key")
		return nil, nil, check.Refuse(stage, l)
	}
	info, err := receipt.WrapInfo(c.request.Grant, c.result.PlanDigest, c.request.Asset, c.result.ID)
	if err != nil {
		return nil, nil, err
	}
	ad, err := a.associated()
	if err != nil {
		return nil, nil, err
	}
	key, err := b.keys.Unwrap(ctx, a.Wrapped, ad)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: key of asset %s: %w", ErrUnavailable, a.Name, err)
	}
	defer key.Destroy()
	enc, s, err := hpke.NewSender(pub, kdf, aead, info)
	if err != nil {
		return nil, nil, fmt.Errorf("wrap key of asset %s: %w", a.Name, err)
	}
	ciphertext, err = s.Seal([]byte(a.Name), key.Reveal())
	if err != nil {
		return nil, nil, fmt.Errorf("wrap key of asset %s: %w", a.Name, err)
	}
	return enc, ciphertext, nil
}

// record spends the grant, the nonce and the result, and writes the log entry
// and the answer, all in tx.
func (b *Broker) record(ctx context.Context, tx Tx, c claim, v verdict, rel Release) (Release, error) {
	if v.newUse {
		if err := tx.InsertUse(ctx, c.use()); err != nil {
			return Release{}, unexpected(err)
		}
	}
	if v.newAttempt {
		v.grant.Used++
		if err := tx.SetGrant(ctx, v.grant); err != nil {
			return Release{}, err
		}
		if err := tx.InsertCounted(ctx, v.grant.ID, c.result.JobID, c.recipient); err != nil {
			return Release{}, unexpected(err)
		}
	}
	entry, err := b.log(ctx, tx, translog.Body{Kind: translog.KindRelease, Actor: c.actor.String(), Job: c.result.JobID, Release: &translog.Release{
		Grant: v.grant.ID, Attempt: rel.Attempt, Plan: rel.Plan, Asset: rel.Asset, Verifier: rel.Verifier, ResultID: rel.ResultID,
		Recipient: c.recipient, Request: rel.Request, Wrapped: rel.wrapped(), Evidence: c.result.EvidenceDigest, Simulated: rel.Simulated, Used: v.grant.Used,
	}})
	if err != nil {
		return Release{}, err
	}
	rel.Time, rel.LogIndex, rel.LogHash = b.now().UTC().Truncate(time.Second), entry.Index, entry.Hash
	return rel, unexpected(tx.InsertRelease(ctx, rel))
}

// answer signs the receipt of a committed release. It happens after the commit,
// because the receipt names the log entry, and again for a repeated request:
// the claims are the stored ones, so any copy of the receipt is as good.
func (b *Broker) answer(r Release) (Answer, error) {
	token, err := b.signer.Sign(receipt.TypeRelease, receipt.Release{
		Issuer: b.id, ID: r.ID, IssuedAt: r.Time.Unix(), Grant: r.Grant, Attempt: r.Attempt, JobID: r.JobID, Plan: r.Plan, Asset: r.Asset,
		AssetDigest: r.AssetDigest, ResultID: r.ResultID, WrappedDigest: r.wrapped(), NotAfter: r.NotAfter.Unix(), Simulated: r.Simulated,
		LogIndex: r.LogIndex, LogHash: r.LogHash,
	})
	if err != nil {
		return Answer{}, fmt.Errorf("%w: sign receipt: %w", ErrUnavailable, err)
	}
	return Answer{Enc: r.Enc, Ciphertext: r.Ciphertext, Receipt: token}, nil
}

func (r Release) wrapped() plan.Digest {
	return plan.Sum(slices.Concat(r.Enc, r.Ciphertext))
}

// restage reports a refusal at this gate, and malformed input as a refusal too:
// neither changes by asking again.
func restage(err error) error {
	var r *check.Refusal
	if errors.As(err, &r) {
		return check.Refuse(stage, r.Checks)
	}
	var l check.List
	l.Fail("release.request", "a well-formed release request", trim(err.Error()), "use an agent of the same version")
	return check.Refuse(stage, l)
}

// unexpected keeps a store's "exists" from passing for an answer where decide
// has just seen that nothing exists.
func unexpected(err error) error {
	if errors.Is(err, ErrExists) {
		return fmt.Errorf("store is inconsistent: %v", err) //nolint:errorlint // the sentinel must not come through
	}
	return err
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// trim bounds foreign text in checks.
func trim(s string) string {
	if len(s) > 120 {
		return s[:120] + "..."
	}
	return s
}
