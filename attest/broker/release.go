package broker

import (
	"bytes"
	"context"
	"crypto/ecdh"
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

// Ask is what an agent sends to get one asset's key.
type Ask struct {
	// Result is a signed attestation result for this broker.
	Result string
	// Request is the canonical receipt.ReleaseRequest, and Signature the session
	// key's over it.
	Request   []byte
	Signature []byte
	// More are results of other verifiers for the same keys, job and plan.
	More []string
	// Plan is the canonical plan, by which the broker learns the image, and how often
	// the job has to attest again. Empty is an image that is not known, and a job that
	// has to as often as a plan can ask for: MinResultAge.
	Plan []byte
}

// claim is a request whose signatures were checked.
type claim struct {
	actor     Actor
	verifier  string
	result    receipt.Result
	more      []presented
	request   receipt.ReleaseRequest
	digest    plan.Digest // of the request's bytes
	recipient plan.Digest
	image     string
	// shown is whether the plan was. reseal and reattest are the plan's, if it has any
	// and was shown.
	shown    bool
	reseal   *plan.Reseal
	reattest *plan.Reattest
	// protocol is ProtocolCoffer or ProtocolKBS.
	protocol string
}

// results are the result that the request is over, and the others.
func (c claim) results() []presented {
	return append([]presented{{c.verifier, c.result}}, c.more...)
}

func (c claim) key() ReleaseKey {
	return ReleaseKey{Verifier: c.verifier, ResultID: c.result.ID, Asset: c.request.Asset}
}

// Release wraps one asset's data key to the recipient key in an attestation
// result. The same request under the same result gets the same ciphertext as
// long as the grant stands, and counts once. A release opens the job's lease.
//
// A *check.Refusal at stage "release" is final and lists every failed check;
// ErrUnavailable is worth the same request again.
func (b *Broker) Release(ctx context.Context, agent Actor, ask Ask) (Answer, error) {
	var c claim
	err := b.turns.do(ctx, func() (err error) {
		c, err = b.authenticate(agent, ask)
		return err
	})
	if err != nil {
		return Answer{}, err
	}

	var v verdict
	err = b.peek(ctx, func(ctx context.Context, r Reader) (err error) {
		v, err = b.decide(ctx, r, c)
		return err
	})
	if err != nil {
		return Answer{}, err
	}
	if v.prior != nil {
		return b.answer(ctx, *v.prior)
	}

	rel := Release{
		ReleaseKey: c.key(), ID: newID("release"), Grant: v.grant.ID, Attempt: c.request.Attempt, JobID: c.result.JobID, Plan: c.result.PlanDigest,
		AssetDigest: v.asset.Digest, Request: c.digest, NotAfter: v.grant.NotAfter, Simulated: c.result.Simulated,
		LeaseSeconds: v.lease.Seconds, LeaseKey: b.signer.LeaseTerms(0).Key, Approvals: v.approvals,
	}
	// The wrapped key exists before the transaction, so that what commits is
	// the complete answer.
	if rel.Enc, rel.Ciphertext, rel.Held, err = b.wrap(ctx, c, v.asset, rel.LeaseSeconds); err != nil {
		return Answer{}, err
	}
	err = b.update(ctx, func(ctx context.Context, tx Tx) error {
		// The grant may have been spent or revoked since: this look decides. What
		// decide reads changes only together with an entry in the log, or with the set
		// of access policies, which is logged before it is in force. So the first look
		// holds as long as both and the clock say so. Not so the lease of a job, which
		// only one that the log knows can have.
		head, err := tx.Head(ctx)
		if err != nil {
			return err
		}
		if v.heads.job.Size > 0 || head.Size != v.heads.log.Size || !bytes.Equal(head.Hash, v.heads.log.Hash) || b.policySets.Load() != v.heads.policySets || !b.now().Before(v.until) {
			if v, err = b.decide(ctx, tx, c); err != nil {
				return err
			}
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
	return b.answer(ctx, rel)
}

// authenticate checks what needs no state: the verifier's signature and
// verdict, and the session key's signature.
func (b *Broker) authenticate(agent Actor, ask Ask) (claim, error) {
	issuer, v, err := b.verifyResult(ask.Result)
	if err != nil {
		return claim{}, err
	}
	req, err := receipt.ParseReleaseRequest(v, ask.Request, ask.Signature)
	if err != nil {
		return claim{}, restage(err)
	}
	res := v.Result()
	var l check.List
	if !jobForm.MatchString(res.JobID) {
		l.Fail("result.job", "a job id", strconv.Quote(trim(res.JobID)), "use a verifier of the same version")
	}
	if req.Submitter != "" && !principal(req.Submitter) {
		l.Fail("release.submitter", "ROLE/NAME", strconv.Quote(trim(req.Submitter)), "use an agent of the same version")
	}
	c := claim{actor: agent, protocol: ProtocolCoffer, verifier: issuer, result: res, request: req, digest: plan.Sum(ask.Request), recipient: plan.Sum(res.Confirmation.Recipient)}
	if c.more, err = b.moreResults(&l, ask.More, v, issuer); err != nil {
		return claim{}, err
	}
	for _, m := range c.more {
		c.result.Simulated = c.result.Simulated || m.result.Simulated
	}
	if len(ask.Plan) > 0 {
		p, err := plan.Parse(ask.Plan)
		switch {
		case err != nil:
			l.Fail("release.plan", "the canonical plan", trim(err.Error()), "send the plan as it was approved")
		case plan.Sum(ask.Plan) != res.PlanDigest:
			l.Fail("release.plan", string(res.PlanDigest), string(plan.Sum(ask.Plan)), "send the plan that the evidence binds")
		default:
			c.shown, c.image, c.reseal, c.reattest = true, p.Image, p.Reseal, p.Reattest
		}
	}
	if len(l.Failed()) > 0 {
		return claim{}, check.Refuse(stage, l)
	}
	return c, nil
}

// verifyResult checks a result by the keys of the verifier that it names.
func (b *Broker) verifyResult(token string) (string, receipt.Verified, error) {
	want := receipt.Expect{Audience: b.id, AnyJob: true, AllowSimulated: b.simulation}
	// If only one is trusted, what verifies by its keys names it.
	if len(b.verifiers) == 1 {
		for issuer, keys := range b.verifiers {
			v, err := receipt.VerifyResult(keys, token, want, b.now())
			if err == nil {
				return issuer, v, nil
			}
			if issuerOf(token) == issuer {
				return "", receipt.Verified{}, restage(err)
			}
		}
	}
	issuer := issuerOf(token)
	keys, ok := b.verifiers[issuer]
	if !ok {
		var l check.List
		l.Fail("result.issuer", "a result of a verifier that this broker trusts", strconv.Quote(trim(issuer)), "attest to a verifier that the broker's operator configured")
		return "", receipt.Verified{}, check.Refuse(stage, l)
	}
	v, err := receipt.VerifyResult(keys, token, want, b.now())
	if err != nil {
		return "", receipt.Verified{}, restage(err)
	}
	return issuer, v, nil
}

// moreResults checks results of other verifiers: each is by another one and
// speaks of the same keys, job, plan and sandbox as v. The session key's
// signature over the request covers them through that.
func (b *Broker) moreResults(l *check.List, tokens []string, v receipt.Verified, issuer string) ([]presented, error) {
	if len(tokens) == 0 {
		return nil, nil
	}
	if len(tokens) >= maxVerifiers {
		l.Fail("result.more", fmt.Sprintf("at most %d results", maxVerifiers), strconv.Itoa(len(tokens)+1), "")
		return nil, nil
	}
	session, err := v.SessionKey()
	if err != nil {
		return nil, restage(err)
	}
	of := v.Result()
	seen := []string{issuer}
	var out []presented
	for _, token := range tokens {
		name, other, err := b.verifyResult(token)
		if err != nil {
			return nil, err
		}
		r := other.Result()
		key, err := other.SessionKey()
		if err != nil {
			return nil, restage(err)
		}
		if slices.Contains(seen, name) {
			l.Fail("result.more", "results of different verifiers", "two of "+name, "")
		}
		seen = append(seen, name)
		l.Equal("result.more.job", of.JobID, r.JobID, "attest the same job to every verifier")
		l.Equal("result.more.plan", string(of.PlanDigest), string(r.PlanDigest), "attest the same plan to every verifier")
		l.Equal("result.more.sandbox", string(of.SandboxDigest), string(r.SandboxDigest), "attest the same sandbox to every verifier")
		if !key.Equal(session) || string(r.Confirmation.Recipient) != string(of.Confirmation.Recipient) {
			l.Fail("result.more.keys", "the same recipient and session key", "others", "attest the same keys to every verifier")
		}
		out = append(out, presented{name, r})
	}
	return out, nil
}

// uses are what each result of the claim spends.
func (c claim) uses() []Use {
	var out []Use
	for _, r := range c.results() {
		out = append(out, Use{Verifier: r.verifier, Nonce: r.result.Nonce, ResultID: r.result.ID, Recipient: c.recipient})
	}
	return out
}

type namedKEM struct {
	name string
	kem  hpke.KEM
}

// kemOf tells the kind of a recipient key by its size (RFC 9180, section 7.1:
// X25519 has 32 bytes; the hybrid's public key is ML-KEM-768's and that), and nil
// for every other size.
func kemOf(key []byte) *namedKEM {
	switch len(key) {
	case 1184 + 32:
		return &namedKEM{KEMHybrid, hpke.MLKEM768X25519()}
	case 32:
		return &namedKEM{KEMX25519, hpke.DHKEM(ecdh.X25519())}
	}
	return nil
}

// unwrap asks the asset's key store for its data key, each time anew. A key that
// its owner disabled is a refusal: the owner said no, and the store is well.
func (b *Broker) unwrap(ctx context.Context, a Asset) (*DataKey, *receipt.Held, error) {
	store, ok := b.keys[a.KeyStore]
	if !ok {
		return nil, nil, fmt.Errorf("%w: key of asset %s is in key store %q, which is not configured", ErrUnavailable, a.Name, a.KeyStore)
	}
	ad, err := a.associated()
	if err != nil {
		return nil, nil, err
	}
	var key *DataKey
	var held *receipt.Held
	switch s := store.(type) {
	case Keeper:
		var h receipt.Held
		key, h, err = s.UnwrapHeld(ctx, a.Wrapped, ad)
		held = &h
	case *LocalKeys:
		held = s.held()
		key, err = s.Unwrap(ctx, a.Wrapped, ad)
	default:
		key, err = s.Unwrap(ctx, a.Wrapped, ad)
	}
	switch {
	case errors.Is(err, ErrKeyDisabled):
		var l check.List
		l.Fail("asset.key-disabled", "an enabled key-encryption key for asset "+a.Name, "one in "+a.keyStore()+" that its owner disabled or removed", "ask "+a.Owner+", who owns the asset, to have it enabled")
		return nil, nil, check.Refuse(stage, l)
	case err != nil:
		return nil, nil, fmt.Errorf("%w: key of asset %s: %w", ErrUnavailable, a.Name, err)
	}
	return key, held, nil
}

// wrap opens the stored data key and seals it to the recipient key.
func (b *Broker) wrap(ctx context.Context, c claim, a Asset, leaseSeconds int64) (enc, ciphertext []byte, held *receipt.Held, err error) {
	_, kdf, aead := Suite()
	var pub hpke.PublicKey
	if kem := kemOf(c.result.Confirmation.Recipient); kem != nil {
		pub, err = kem.kem.NewPublicKey(c.result.Confirmation.Recipient)
	}
	if pub == nil || err != nil {
		var l check.List
		l.Fail("release.recipient-key", "an ML-KEM-768+X25519 public key", "another key", "the job's holder makes the recipient key")
		return nil, nil, nil, check.Refuse(stage, l)
	}
	info, err := receipt.WrapInfo(c.request.Grant, c.result.PlanDigest, c.request.Asset, c.result.ID, b.signer.LeaseTerms(leaseSeconds))
	if err != nil {
		return nil, nil, nil, err
	}
	key, held, err := b.unwrap(ctx, a)
	if err != nil {
		return nil, nil, nil, err
	}
	defer key.Destroy()
	err = b.turns.do(ctx, func() error {
		var s *hpke.Sender
		if enc, s, err = hpke.NewSender(pub, kdf, aead, info); err != nil {
			// X25519 keys of small order are found here (RFC 7748, section 6.1).
			var l check.List
			l.Fail("release.recipient-key", "a public key that can be encrypted to", trim(err.Error()), "the job's holder makes the recipient key")
			return check.Refuse(stage, l)
		}
		if ciphertext, err = s.Seal([]byte(a.Name), key.Reveal()); err != nil {
			return fmt.Errorf("wrap key of asset %s: %w", a.Name, err)
		}
		return nil
	})
	if err != nil {
		return nil, nil, nil, err
	}
	return enc, ciphertext, held, nil
}

// record spends the grant, the nonce and the result, and writes the log entry
// and the answer, all in tx.
func (b *Broker) record(ctx context.Context, tx Tx, c claim, v verdict, rel Release) (Release, error) {
	for _, u := range v.newUses {
		if err := tx.InsertUse(ctx, u); err != nil {
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
	// A KBS client has no lease: nobody would renew it.
	if c.protocol != ProtocolKBS {
		if err := tx.PutLease(ctx, v.lease); err != nil {
			return Release{}, err
		}
	}
	// The key is wrapped under the lease's seconds.
	if rel.LeaseSeconds != v.lease.Seconds {
		return Release{}, fmt.Errorf("%w: the lease of job %s changed meanwhile", ErrUnavailable, rel.JobID)
	}
	rel.ResultSeconds = v.lease.Attested.MaxAge
	rel.Approvals, rel.Policy = v.approvals, v.asset.policyDigest()
	var more []translog.Result
	for _, m := range c.more {
		more = append(more, translog.Result{Verifier: m.verifier, ResultID: m.result.ID, Evidence: m.result.EvidenceDigest})
	}
	entry, err := b.logAfter(ctx, tx, v.heads, translog.Body{Kind: translog.KindRelease, Actor: c.actor.String(), Job: c.result.JobID, Release: &translog.Release{
		Grant: v.grant.ID, Attempt: rel.Attempt, Plan: rel.Plan, Asset: rel.Asset, Verifier: rel.Verifier, ResultID: rel.ResultID,
		Recipient: c.recipient, Request: rel.Request, Wrapped: rel.wrapped(), Evidence: c.result.EvidenceDigest, Simulated: rel.Simulated, Used: v.grant.Used,
		Approvals: v.approvals, More: more,
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
func (b *Broker) answer(ctx context.Context, r Release) (Answer, error) {
	var token string
	err := b.turns.do(ctx, func() (err error) {
		token, err = b.signer.Sign(receipt.TypeRelease, receipt.Release{
			Issuer: b.id, ID: r.ID, IssuedAt: r.Time.Unix(), Grant: r.Grant, Attempt: r.Attempt, JobID: r.JobID, Plan: r.Plan, Asset: r.Asset,
			AssetDigest: r.AssetDigest, ResultID: r.ResultID, WrappedDigest: r.wrapped(), NotAfter: r.NotAfter.Unix(), Simulated: r.Simulated,
			LeaseSeconds: r.LeaseSeconds, LeaseKey: r.LeaseKey, ResultSeconds: r.ResultSeconds, Approvals: r.Approvals, Policy: r.Policy, Held: r.Held, LogIndex: r.LogIndex, LogHash: r.LogHash,
		})
		return err
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
