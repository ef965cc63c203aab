package broker

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/go-jose/go-jose/v4"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
)

// kbsRSA bounds the RSA keys of KBS clients, in bits.
const (
	kbsMinRSA = 2048
	kbsMaxRSA = 4096
)

// kbsActor is who acts for a KBS session. Nobody is authenticated in that protocol
// but by evidence; access policies see an agent of this name.
func kbsActor() Actor { return Actor{Role: roleAgent, Name: "kbs"} }

// KBSSession is a session of the Confidential Containers KBS protocol.
type KBSSession struct {
	// ID is a job id of this session alone.
	ID    string
	Nonce string
	TEE   string
	// Key is the client's tee-pubkey, to which answers are encrypted.
	Key *jose.JSONWebKey
}

// kbsAlgorithm is how keys are encrypted to k; empty for a key of another kind.
func kbsAlgorithm(k *jose.JSONWebKey) jose.KeyAlgorithm {
	switch pub := k.Key.(type) {
	case *rsa.PublicKey:
		if n := pub.N.BitLen(); n >= kbsMinRSA && n <= kbsMaxRSA {
			return jose.RSA_OAEP_256
		}
	case *ecdsa.PublicKey:
		return jose.ECDH_ES_A256KW
	}
	return ""
}

// KBSKey checks a client's tee-pubkey, a JSON Web Key: RSA of 2048 to 4096 bits, or
// an elliptic curve's.
func KBSKey(jwk []byte) (*jose.JSONWebKey, error) {
	var k jose.JSONWebKey
	if err := k.UnmarshalJSON(jwk); err != nil {
		return nil, fmt.Errorf("%w: tee-pubkey: %w", ErrInvalid, err)
	}
	alg := kbsAlgorithm(&k)
	switch {
	case !k.Valid() || !k.IsPublic() || alg == "":
		return nil, fmt.Errorf("%w: tee-pubkey: want a public RSA key of %d to %d bits or one of an elliptic curve", ErrInvalid, kbsMinRSA, kbsMaxRSA)
	case k.Algorithm != "" && k.Algorithm != string(alg):
		return nil, fmt.Errorf("%w: tee-pubkey: algorithm %.40q, want %q", ErrInvalid, k.Algorithm, alg)
	}
	return &k, nil
}

// CheckKBS checks a verifier's result over a session's evidence.
func (b *Broker) CheckKBS(s KBSSession, token string) error {
	_, err := b.claimKBS(s, token)
	return err
}

// claimKBS makes a claim of a session. The init-data's digest stands where a job
// has its plan's: it is what a grant names and what people approve.
func (b *Broker) claimKBS(s KBSSession, token string) (claim, error) {
	if s.ID == "" || s.Key == nil {
		return claim{}, errors.New("check KBS result: no session")
	}
	issuer := issuerOf(token)
	keys, ok := b.verifiers[issuer]
	if !ok {
		var l check.List
		l.Fail("result.issuer", "a result of a verifier that this broker trusts", strconv.Quote(trim(issuer)), "have the broker's operator configure the verifier")
		return claim{}, check.Refuse(stage, l)
	}
	thumbprint, err := s.Key.Thumbprint(crypto.SHA256)
	if err != nil {
		return claim{}, fmt.Errorf("%w: tee-pubkey: %w", ErrInvalid, err)
	}
	r, err := receipt.VerifyKBS(keys, token, receipt.KBSExpect{Audience: b.id, Nonce: s.Nonce, Session: s.ID, TEE: s.TEE, Key: thumbprint, AllowSimulated: b.simulation}, b.now())
	if err != nil {
		return claim{}, restage(err)
	}
	return claim{
		actor: kbsActor(), verifier: issuer, recipient: plan.Sum(thumbprint), protocol: ProtocolKBS,
		result: receipt.Result{
			Issuer: r.Issuer, Audience: r.Audience, ID: r.ID, Nonce: r.Nonce, IssuedAt: r.IssuedAt, Expires: r.Expires, JobID: r.Session,
			PlanDigest: r.InitData, EvidenceDigest: r.Evidence, Simulated: r.Simulated, Submods: r.Submods,
		},
	}, nil
}

// ReleaseKBS encrypts an asset's data key to the session's tee-pubkey: a flattened
// JSON Web Encryption. It counts under a grant whose plan is the digest of the
// session's init-data, and is logged as every release. The same session gets the
// same answer again. An asset that does not exist, has another owner or kind, or
// whose policy does not name the protocol is ErrNotFound.
func (b *Broker) ReleaseKBS(ctx context.Context, s KBSSession, token, owner string, kind Kind, asset string) ([]byte, error) {
	c, err := b.claimKBS(s, token)
	if err != nil {
		return nil, err
	}
	c.request = receipt.ReleaseRequest{Broker: b.id, Attempt: 1, ResultID: c.result.ID, Asset: asset}
	c.digest = plan.Sum([]byte("coffer/v1 kbs\x00" + s.ID + "\x00" + asset))
	var v verdict
	look := func(ctx context.Context, r Reader) (err error) {
		v, err = b.decideKBS(ctx, r, &c, owner, kind)
		return err
	}
	if err := b.view(ctx, look); err != nil {
		return nil, err
	}
	if v.prior != nil {
		return v.prior.Ciphertext, nil
	}
	rel := Release{
		ReleaseKey: c.key(), ID: newID("release"), Attempt: 1, JobID: c.result.JobID, Plan: c.result.PlanDigest, AssetDigest: v.asset.Digest,
		Request: c.digest, Enc: []byte{}, Simulated: c.result.Simulated,
	}
	if rel.Ciphertext, rel.Held, err = b.encryptKBS(ctx, s.Key, v.asset); err != nil {
		return nil, err
	}
	err = b.update(ctx, func(ctx context.Context, tx Tx) error {
		// The grant may have been spent or revoked since: this look decides.
		if err := look(ctx, tx); err != nil {
			return err
		}
		if v.prior != nil {
			rel = *v.prior
			return nil
		}
		rel.Grant, rel.NotAfter = v.grant.ID, v.grant.NotAfter
		rel, err = b.record(ctx, tx, c, v, rel)
		return err
	})
	return rel.Ciphertext, err
}

// decideKBS holds a session's claim against the stored state, and chooses the
// oldest grant that allows it.
func (b *Broker) decideKBS(ctx context.Context, r Reader, c *claim, owner string, kind Kind) (verdict, error) {
	a, err := r.Asset(ctx, c.request.Asset)
	switch {
	case err != nil:
		return verdict{}, err
	case a.Owner != owner || a.Kind != kind || !a.Policy.serves(ProtocolKBS):
		return verdict{}, ErrNotFound
	}
	if prior, err := r.Release(ctx, c.key()); err == nil && prior.Request == c.digest {
		c.request.Grant = prior.Grant
		v, err := b.weighKBS(ctx, r, *c, a, true)
		v.prior = &prior
		return v, err
	} else if err != nil && !errors.Is(err, ErrNotFound) {
		return verdict{}, err
	}
	// The second look begins with what the first one chose: it keeps others waiting.
	if c.request.Grant != "" {
		v, err := b.weighKBS(ctx, r, *c, a, false)
		var refusal *check.Refusal
		if !errors.As(err, &refusal) {
			return v, err
		}
	}
	var l check.List
	l.Fail("grant.id", "a grant of this asset for the init-data "+string(c.result.PlanDigest), "none", "ask the owner of the asset for a grant")
	var refused error = check.Refuse(stage, l)
	// Page by page: what others asked for hides no grant.
	for after, more := int64(0), true; more; {
		grants, err := r.Grants(ctx, GrantFilter{Plan: c.result.PlanDigest, After: after, Limit: MaxPage})
		if err != nil {
			return verdict{}, err
		}
		more = len(grants) == MaxPage
		for _, g := range grants {
			after = g.Seq
			if !slices.Contains(g.Assets, a.Name) {
				continue
			}
			c.request.Grant = g.ID
			v, err := b.weighKBS(ctx, r, *c, a, false)
			var refusal *check.Refusal
			if !errors.As(err, &refusal) {
				return v, err
			}
			refused = err
		}
	}
	return verdict{}, refused
}

// weighKBS holds a claim against one grant. again is whether it was answered before
// and so counts no more.
func (b *Broker) weighKBS(ctx context.Context, r Reader, c claim, a Asset, again bool) (verdict, error) {
	var l check.List
	if err := checkAgent(ctx, r, &l, c.result.JobID, c.actor); err != nil {
		return verdict{}, err
	}
	g, err := r.Grant(ctx, c.request.Grant)
	if err != nil {
		return verdict{}, err
	}
	assets, err := b.assets(ctx, r, g.Assets)
	if err != nil {
		return verdict{}, err
	}
	l = append(l, b.checkGrant(g, a, c)...)
	l.Equal("grant.owner", a.Owner, g.Owner, "ask the owner of the asset for a grant")
	s, err := b.stand(ctx, r, g, assets)
	if err != nil {
		return verdict{}, err
	}
	for _, missing := range append(s.unsigned, s.missing...) {
		l.Fail("grant.approvals", "a grant with every approval that its assets ask for", "it lacks "+missing, "ask them: coffer grant approve "+g.ID)
	}
	results := c.results()
	if err := checkRevoked(ctx, r, &l, Lease{
		JobID: c.result.JobID, Agent: c.actor.String(), Plan: c.result.PlanDigest, Chips: claims(results, "snp.chip-id"), Measurements: claims(results, "snp.measurement"),
		Uses: []LeaseUse{{Grant: g.ID, Requester: g.Requester, Asset: a.Name, Owner: a.Owner}},
	}); err != nil {
		return verdict{}, err
	}
	a.Policy.checkResults(&l, c)
	c.checkOpen(&l, a)
	v := verdict{grant: g, asset: a, approvals: s.counted}
	if !again {
		if err := b.countKBS(ctx, r, &l, c, &v); err != nil {
			return verdict{}, err
		}
	}
	if len(l.Failed()) > 0 {
		return verdict{}, check.Refuse(stage, l)
	}
	access := Access{Principal: c.actor, Action: ActionRelease, Resource: a.resource(), Time: b.now(), Simulated: c.result.Simulated}
	access.Resource.Plan = c.result.PlanDigest
	return v, b.authorize(ctx, access)
}

// countKBS says what a release adds, and whether the grant has it left.
func (b *Broker) countKBS(ctx context.Context, r Reader, l *check.List, c claim, v *verdict) error {
	for _, use := range c.uses() {
		uses, err := r.Uses(ctx, use.Verifier, use.Nonce, use.ResultID)
		if err != nil {
			return err
		}
		if len(uses) == 0 {
			v.newUses = append(v.newUses, use)
		}
		for _, u := range uses {
			if u != use {
				l.Fail("release.replay", "a nonce, a result and a key that belong together", "one of them was used with another", "attest again in a new session")
			}
		}
	}
	counted, err := r.Counted(ctx, v.grant.ID, c.result.JobID, c.recipient)
	if err != nil {
		return err
	}
	v.newAttempt = !counted
	v.countRelease(l)
	return nil
}

// encryptKBS opens the stored data key and encrypts it to k.
func (b *Broker) encryptKBS(ctx context.Context, k *jose.JSONWebKey, a Asset) ([]byte, *receipt.Held, error) {
	e, err := jose.NewEncrypter(jose.A256GCM, jose.Recipient{Algorithm: kbsAlgorithm(k), Key: k.Key}, nil)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: tee-pubkey: %w", ErrInvalid, err)
	}
	key, held, err := b.unwrap(ctx, a)
	if err != nil {
		return nil, nil, err
	}
	defer key.Destroy()
	jwe, err := e.Encrypt(key.Reveal())
	if err != nil {
		return nil, nil, fmt.Errorf("encrypt key of asset %s: %w", a.Name, err)
	}
	return []byte(jwe.FullSerialize()), held, nil
}
