package receipt

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"time"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

// RequestVersion is the only release request version there is.
const RequestVersion = "coffer.run/release-request/v1"

const (
	// MaxRequest bounds an encoded release request, in bytes.
	MaxRequest = 4 << 10
	// MaxAttempt bounds the number of an attempt. JSON numbers are doubles
	// (RFC 8785, section 3.2.2.3): a larger integer than 2^53 changes its value
	// in canonical form.
	MaxAttempt = 1_000_000
)

// ReleaseRequest asks for one asset's key. The job's session key signs its
// canonical form, so that a result alone, whoever holds it, obtains nothing.
type ReleaseRequest struct {
	Version string `json:"version"`
	Broker  string `json:"broker"`
	Grant   string `json:"grant"`
	// Attempt counts the tries of one job, from 1 to MaxAttempt.
	Attempt  int    `json:"attempt"`
	ResultID string `json:"resultId"`
	Asset    string `json:"asset"`
	// Submitter is who submitted the job, "ROLE/NAME", as the agent says, which
	// is measured. Needed where a grant names submitters.
	Submitter string `json:"submitter,omitempty"`
}

// Canonical returns the bytes that are signed.
func (r ReleaseRequest) Canonical() ([]byte, error) {
	if r.Version != RequestVersion || r.Broker == "" || r.Grant == "" || r.Attempt < 1 || r.ResultID == "" || r.Asset == "" {
		return nil, errors.New("release request is incomplete")
	}
	if r.Attempt > MaxAttempt {
		return nil, fmt.Errorf("release request is for attempt %d, at most %d are allowed", r.Attempt, MaxAttempt)
	}
	return plan.Canonical(r)
}

// ParseReleaseRequest reads a request and checks the session key's signature
// over it: ECDSA P-256 over SHA-256, ASN.1. v says which session key that is.
// Only the canonical form is a request: keys given twice or in other letters
// would let two readers of the same signed bytes see two requests.
func ParseReleaseRequest(v Verified, request, signature []byte) (ReleaseRequest, error) {
	var r ReleaseRequest
	if err := plan.Decode(request, MaxRequest, &r); err != nil {
		return ReleaseRequest{}, fmt.Errorf("parse release request: %w", err)
	}
	canonical, err := r.Canonical()
	if err != nil {
		return ReleaseRequest{}, err
	}
	if !bytes.Equal(canonical, request) {
		return ReleaseRequest{}, errors.New("release request is not in canonical form (RFC 8785)")
	}
	pub, err := v.SessionKey()
	if err != nil {
		return ReleaseRequest{}, err
	}
	var l check.List
	sum := sha256.Sum256(request)
	if !ecdsa.VerifyASN1(pub, sum[:], signature) {
		l.Fail("release.session-key", "a request signed by the session key in the result", "another signature", "only the attested job itself can ask for its keys")
	}
	if r.ResultID != v.Result().ID {
		l.Fail("release.result", v.Result().ID, r.ResultID, "sign the request over the result that it comes with")
	}
	if len(l) > 0 {
		return ReleaseRequest{}, check.Refuse("release", l)
	}
	return r, nil
}

// WrapInfo is the HPKE info (RFC 9180, section 5.1) of a released data key: a
// ciphertext for one grant, plan, asset, result or lease opens under no other.
func WrapInfo(grant string, p plan.Digest, asset, resultID string, lease LeaseTerms) ([]byte, error) {
	if err := lease.validate(); err != nil {
		return nil, err
	}
	return plan.Canonical(map[string]any{"label": "coffer/v1 release", "grant": grant, "plan": string(p), "asset": asset, "resultId": resultID, "lease": lease})
}

// OwnerWrapInfo is the HPKE info with which an owner hands a data key to the broker.
const OwnerWrapInfo = "coffer/v1 owner-wrap"

// TypeRelease is the token type of release receipts.
const TypeRelease = "release"

// Release is the claims set of a release receipt.
type Release struct {
	Issuer   string      `json:"iss"`
	ID       string      `json:"jti"`
	IssuedAt int64       `json:"iat"`
	Grant    string      `json:"grant"`
	Attempt  int         `json:"attempt"`
	JobID    string      `json:"job"`
	Plan     plan.Digest `json:"plan"`
	Asset    string      `json:"asset"`
	// AssetDigest is that of the sealed manifest; empty for checkpoints.
	AssetDigest plan.Digest `json:"assetDigest,omitempty"`
	ResultID    string      `json:"resultId"`
	// WrappedDigest is the SHA-384 of enc and ciphertext, one after the other.
	WrappedDigest plan.Digest `json:"wrappedDigest"`
	NotAfter      int64       `json:"notAfter"`
	Simulated     bool        `json:"simulated"`
	// LeaseSeconds is how long the job may run without renewing its lease,
	// counted from when the release request was signed.
	LeaseSeconds int64 `json:"leaseSeconds"`
	// LeaseKey is the id of the key that signs the job's leases (LeaseTerms).
	LeaseKey string `json:"leaseKey"`
	// ResultSeconds is how old the job's newest attestation result may become before
	// the broker stops the job; 0 is no bound.
	ResultSeconds int64 `json:"resultSeconds,omitempty"`
	// Approvals are the digests of the signed approvals and consents that counted.
	Approvals []plan.Digest `json:"approvals,omitempty"`
	// Policy is the digest of the asset's policy statement, which its owner signed;
	// empty if nobody did.
	Policy plan.Digest `json:"policy,omitempty"`
	// Held says which key store had the key.
	Held *Held `json:"held,omitempty"`
	// LogIndex and LogHash are the entry of the evidence log that records this.
	LogIndex uint64 `json:"logIndex"`
	LogHash  []byte `json:"logHash"`
}

// Grant is a release receipt that was checked, with the wrapped key that it
// speaks of. Only VerifyRelease makes one. It holds no secret that its bearer
// can open.
type Grant struct {
	release    Release
	token      string
	enc        []byte
	ciphertext []byte
	ok         bool
}

// Release returns the claims. It panics on the zero value.
func (g Grant) Release() Release {
	if !g.ok {
		panic("receipt: use of an unverified grant")
	}
	return g.release
}

// Token returns the signed form. It panics on the zero value.
func (g Grant) Token() string {
	if !g.ok {
		panic("receipt: use of an unverified grant")
	}
	return g.token
}

// Wrapped returns the HPKE encapsulated key and ciphertext.
func (g Grant) Wrapped() (enc, ciphertext []byte) {
	if !g.ok {
		panic("receipt: use of an unverified grant")
	}
	return g.enc, g.ciphertext
}

// VerifyRelease checks a broker's answer to req under v.
func VerifyRelease(keys Keys, v Verified, req ReleaseRequest, enc, ciphertext []byte, token string, now time.Time) (Grant, error) {
	var r Release
	var l check.List
	if err := keys.Open(TypeRelease, token, &r); err != nil {
		l.Fail("grant.signature", "a receipt signed by "+keys.issuer, err.Error(), "ask the broker again")
		return Grant{}, check.Refuse("release", l)
	}
	res := v.Result()
	l.Equal("grant.id", req.Grant, r.Grant, "")
	l.Equal("grant.asset", req.Asset, r.Asset, "")
	l.Equal("grant.job", res.JobID, r.JobID, "")
	l.Equal("grant.plan", string(res.PlanDigest), string(r.Plan), "")
	l.Equal("grant.result", res.ID, r.ResultID, "")
	l.Equal("grant.wrapped", string(plan.Sum(append(append([]byte(nil), enc...), ciphertext...))), string(r.WrappedDigest), "the wrapped key is not the one in the receipt")
	if r.NotAfter == 0 || now.Unix() > r.NotAfter {
		l.Fail("grant.expiry", "a grant that is valid now", "expired", "ask the owner for a new grant")
	}
	if len(l.Failed()) > 0 {
		return Grant{}, check.Refuse("release", l)
	}
	return Grant{release: r, token: token, enc: enc, ciphertext: ciphertext, ok: true}, nil
}
