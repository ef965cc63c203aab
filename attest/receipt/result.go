// Package receipt holds the signed values that pass between stages. Checking a
// signature here is the only way to obtain a Verified or a Grant, so a stage
// that takes one as its argument cannot be reached without it.
//
// Trusted: the public keys given to the constructors. Checked: algorithm,
// signature, that the claims read one way only, issuer, audience, times, job,
// plan, tiers and trust vectors. Not checked: the evidence behind a result; that
// was the verifier's work.
package receipt

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"reflect"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	josejson "github.com/go-jose/go-jose/v4/json"
	jsonv2 "github.com/go-json-experiment/json"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

// Profile is the EAT profile of the results: draft-ietf-rats-ear.
const Profile = "tag:github.com,2023:veraison/ear"

const (
	// ResultLifetime is how long an attestation result may be relied on.
	ResultLifetime = 5 * time.Minute
	// MaxToken bounds every signed value, in bytes.
	MaxToken = 256 << 10
	// Leeway is how far two clocks may differ.
	Leeway = 5 * time.Second
)

// Tier is the trust tier of one appraisal (draft-ietf-rats-ar4si, section 2.3.2).
type Tier string

// Tiers in the words of EAR.
const (
	Affirming       Tier = "affirming"
	Warning         Tier = "warning"
	Contraindicated Tier = "contraindicated"
	None            Tier = "none"
)

// TrustVector is the AR4SI vector: each claim has a value in one of the ranges
// of the trust tiers (draft-ietf-rats-ar4si, section 2.3.2).
type TrustVector struct {
	InstanceIdentity int8 `json:"instance-identity"`
	Configuration    int8 `json:"configuration"`
	Executables      int8 `json:"executables"`
	FileSystem       int8 `json:"file-system"`
	Hardware         int8 `json:"hardware"`
	RuntimeOpaque    int8 `json:"runtime-opaque"`
	StorageOpaque    int8 `json:"storage-opaque"`
	SourcedData      int8 `json:"sourced-data"`
}

// Tier returns the worst tier that a claim of the vector is in. A claim that
// says nothing weighs nothing; a vector of such claims is None.
func (v TrustVector) Tier() Tier {
	out := None
	for _, c := range [...]int8{v.InstanceIdentity, v.Configuration, v.Executables, v.FileSystem, v.Hardware, v.RuntimeOpaque, v.StorageOpaque, v.SourcedData} {
		switch t := claimTier(c); {
		case t == Contraindicated:
			return t
		case t == Warning, t == Affirming && out == None:
			out = t
		}
	}
	return out
}

// claimTier is section 2.3.2: -1 to 1 is none, to 31 and -32 affirming, to 95
// and -96 warning, and the rest contraindicated.
func claimTier(c int8) Tier {
	switch {
	case c >= 96 || c < -96:
		return Contraindicated
	case c >= 32 || c < -32:
		return Warning
	case c > 1 || c < -1:
		return Affirming
	}
	return None
}

// Appraisal is the result for one device, a submodule of the EAR.
type Appraisal struct {
	Status   Tier        `json:"ear.status"`
	Vector   TrustVector `json:"ear.trustworthiness-vector"`
	PolicyID string      `json:"ear.appraisal-policy-id"`
	// Claims are what the evidence was found to say, under the field's names.
	Claims map[string]any `json:"ear.veraison.annotated-evidence"`
	// Checks are all checks made on this device, passed or not.
	Checks check.List `json:"coffer.checks"`
}

// VerifierIdentity is ear.verifier-id.
type VerifierIdentity struct {
	Developer string `json:"developer"`
	Build     string `json:"build"`
}

// Confirmation names the keys that the evidence bound (RFC 7800).
type Confirmation struct {
	// JWK is the session key: proof of possession is a signature by it.
	JWK *jose.JSONWebKey `json:"jwk"`
	// Recipient is the HPKE public key to which secrets may be wrapped.
	Recipient []byte `json:"coffer.recipient-key"`
}

// Result is the claims set of an attestation result (EAR).
type Result struct {
	Profile  string               `json:"eat_profile"`
	Verifier VerifierIdentity     `json:"ear.verifier-id"`
	Issuer   string               `json:"iss"`
	Audience string               `json:"aud"`
	ID       string               `json:"jti"`
	IssuedAt int64                `json:"iat"`
	Expires  int64                `json:"exp"`
	Nonce    string               `json:"eat_nonce"` // hex of SHA-256 of the nonce token
	Submods  map[string]Appraisal `json:"submods"`

	Confirmation  Confirmation `json:"cnf"`
	JobID         string       `json:"coffer.job"`
	PlanDigest    plan.Digest  `json:"coffer.plan"`
	SandboxDigest plan.Digest  `json:"coffer.sandbox"`
	Policy        plan.Policy  `json:"coffer.policy"`
	// EvidenceDigest is the SHA-384 of the envelope that was appraised.
	EvidenceDigest plan.Digest `json:"coffer.evidence"`
	// Simulated is true if any device's chain ended in a simulation anchor.
	Simulated bool `json:"coffer.simulated"`
	// Binding are the checks that belong to no single device.
	Checks check.List `json:"coffer.checks"`
}

// AllChecks returns every check of the result, devices in name order.
func (r Result) AllChecks() check.List {
	out := append(check.List(nil), r.Checks...)
	names := make([]string, 0, len(r.Submods))
	for n := range r.Submods {
		names = append(names, n)
	}
	sort.Strings(names)
	for _, n := range names {
		out = append(out, r.Submods[n].Checks...)
	}
	return out
}

// Signer signs results, receipts and credentials with ES384.
type Signer struct {
	issuer string
	key    *ecdsa.PrivateKey
	// header is the first part of every token, which is the same for all.
	header string
	kid    string

	scratch scratch
}

// NewSigner returns a signer for issuer. key must be on P-384.
func NewSigner(issuer string, key *ecdsa.PrivateKey) (*Signer, error) {
	if issuer == "" || key == nil || key.Curve.Params().BitSize != 384 {
		return nil, errors.New("signer needs an issuer and a P-384 key")
	}
	kid, err := KeyID(&key.PublicKey)
	if err != nil {
		return nil, err
	}
	return &Signer{issuer: issuer, key: key, header: headerOf(kid), kid: kid}, nil
}

// headerOf is the first part of every token that a Signer signs by the key of this
// id, which is base64url (RFC 7515, section 4.1).
func headerOf(kid string) string {
	return base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"ES384","kid":"` + kid + `","typ":"JWT"}`))
}

// Issuer returns the name under which the signer signs.
func (s *Signer) Issuer() string { return s.issuer }

// JWKS returns the public half as a JSON Web Key Set.
func (s *Signer) JWKS() ([]byte, error) {
	return json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: &s.key.PublicKey, KeyID: s.kid, Algorithm: string(jose.ES384), Use: "sig"}}})
}

// Sign returns claims as a compact JWT. typ separates kinds of tokens from each
// other (RFC 8725, section 3.11): it is the "coffer.type" claim that Keys.Open
// requires.
func (s *Signer) Sign(typ string, claims any) (string, error) {
	body, err := appendClaims(s.scratch.get(), typ, claims)
	if err != nil {
		return "", err
	}
	// The compact form (RFC 7515, section 7.1) behind the claims, in the same memory:
	// results are long, and the library copies them five times.
	enc := base64.RawURLEncoding
	all := slices.Grow(body, len(s.header)+enc.EncodedLen(len(body))+enc.EncodedLen(signatureSize)+2)
	defer s.scratch.put(all)
	token := append(append(all[len(body):], s.header...), '.')
	token = enc.AppendEncode(token, body)
	sum := sha512.Sum384(token)
	r, v, err := ecdsa.Sign(rand.Reader, s.key, sum[:])
	if err != nil {
		return "", fmt.Errorf("sign %s: %w", typ, err)
	}
	// Both numbers at their full length, one after the other (RFC 7518, section 3.4).
	var signature [signatureSize]byte
	r.FillBytes(signature[:signatureSize/2])
	v.FillBytes(signature[signatureSize/2:])
	token = append(token, '.')
	return string(enc.AppendEncode(token, signature[:])), nil
}

// signatureSize is the length of an ES384 signature, in bytes.
const signatureSize = 96

// Decoded are claims whose type decodes everything in them and keeps no raw JSON,
// so that encoding them names each member once.
type Decoded interface {
	// TokenIssuer is the claim "iss".
	TokenIssuer() string
}

// TokenIssuer is as in Decoded.
func (r *Result) TokenIssuer() string { return r.Issuer }

// decode reads claims so that no other reader can see others in the same bytes:
// the decoder refuses a key given twice and tells letters apart, and what it
// read, encoded again, has the value of the whole body, so that nothing was
// skipped as unknown. The type and the issuer must be the ones that are wanted.
func decode(typ, issuer string, body []byte, claims any) error {
	if err := jsonv2.Unmarshal(body, claims); err != nil {
		return err
	}
	again, err := appendClaims(nil, typ, claims)
	if err != nil {
		return err
	}
	// The very bytes that encode writes begin with the type and have one reading.
	if d, ok := claims.(Decoded); ok && bytes.Equal(again, body) {
		return named(issuer, d.TokenIssuer())
	}
	var whole, read map[string]any
	if err := josejson.Unmarshal(body, &whole); err != nil {
		return err
	}
	if t, _ := whole["coffer.type"].(string); t != typ {
		return fmt.Errorf("is of type %.40q", t)
	}
	by, _ := whole["iss"].(string)
	if err := named(issuer, by); err != nil {
		return err
	}
	if err := josejson.Unmarshal(again, &read); err != nil {
		return err
	}
	if !reflect.DeepEqual(whole, read) {
		return errors.New("the claims have a form or a member that is not known")
	}
	return nil
}

func named(want, issuer string) error {
	if issuer != want {
		return fmt.Errorf("names issuer %.80q, want %q", issuer, want)
	}
	return nil
}

// KeyID is the RFC 7638 thumbprint of a public key.
func KeyID(pub *ecdsa.PublicKey) (string, error) {
	t, err := (&jose.JSONWebKey{Key: pub}).Thumbprint(crypto.SHA256)
	if err != nil {
		return "", fmt.Errorf("key thumbprint: %w", err)
	}
	return base64.RawURLEncoding.EncodeToString(t), nil
}

// Keys are the public keys that one issuer signs with. The zero value verifies
// nothing.
type Keys struct {
	issuer string
	keys   map[string]*ecdsa.PublicKey
	// headers are those of a Signer's tokens, by which its key is found.
	headers map[string]*ecdsa.PublicKey
	// good are tokens that verified by these keys.
	good *tokens
}

// ParseKeys reads a JSON Web Key Set of P-384 signature keys for issuer.
func ParseKeys(issuer string, jwks []byte) (Keys, error) {
	if issuer == "" {
		return Keys{}, errors.New("parse keys: no issuer")
	}
	if len(jwks) > MaxToken {
		return Keys{}, errors.New("parse keys: key set too large")
	}
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(jwks, &set); err != nil {
		return Keys{}, fmt.Errorf("parse keys of %s: %w", issuer, err)
	}
	k := Keys{issuer: issuer, keys: map[string]*ecdsa.PublicKey{}, headers: map[string]*ecdsa.PublicKey{}, good: &tokens{}}
	for _, j := range set.Keys {
		pub, ok := j.Key.(*ecdsa.PublicKey)
		if !ok || pub.Curve.Params().BitSize != 384 {
			return Keys{}, fmt.Errorf("parse keys of %s: key %.60q is not a P-384 public key", issuer, j.KeyID)
		}
		id, err := KeyID(pub)
		if err != nil {
			return Keys{}, err
		}
		k.keys[id], k.headers[headerOf(id)] = pub, pub
	}
	if len(k.keys) == 0 {
		return Keys{}, fmt.Errorf("parse keys of %s: no keys", issuer)
	}
	return k, nil
}

// Issuer returns whose keys these are.
func (k Keys) Issuer() string { return k.issuer }

// Open checks the signature of a token and decodes its claims into claims, which
// must be a pointer to the zero value of all claims that the type has. Only ES384
// by a known key counts; the algorithm in the header chooses nothing. The keys
// remember the tokens that they verified: one that is shown again costs no second
// signature, and its claims are read anew. Times are in the claims, for the caller to check.
func (k Keys) Open(typ, token string, claims any) error {
	if len(token) > MaxToken {
		return fmt.Errorf("%s token of %d bytes is too large", typ, len(token))
	}
	body, err := k.verified(typ, token)
	if err != nil {
		return err
	}
	if err := decode(typ, k.issuer, body, claims); err != nil {
		return fmt.Errorf("%s token: %w", typ, err)
	}
	return nil
}

// verified returns the claims of a token whose signature is by one of the keys.
func (k Keys) verified(typ, token string) ([]byte, error) {
	id := sha256.Sum256([]byte(token))
	header, rest, _ := strings.Cut(token, ".")
	body, signature, three := strings.Cut(rest, ".")
	if k.good.has(id) {
		return base64.RawURLEncoding.DecodeString(body)
	}
	if pub := k.headers[header]; pub != nil && three {
		out, err := signed(pub, token[:len(header)+1+len(body)], body, signature)
		if err != nil {
			return nil, fmt.Errorf("%s token: %w", typ, err)
		}
		k.good.add(id)
		return out, nil
	}
	jws, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.ES384})
	if err != nil {
		return nil, fmt.Errorf("%s token: %w", typ, err)
	}
	// Base64 lets the last bits of a part be anything: of all ways to write a token,
	// one counts.
	if only, err := jws.CompactSerialize(); err != nil || only != token {
		return nil, fmt.Errorf("%s token is not in its one encoding", typ)
	}
	pub := k.keys[jws.Signatures[0].Protected.KeyID]
	if pub == nil {
		return nil, fmt.Errorf("%s token is signed by a key that is none of %q's", typ, k.issuer)
	}
	out, err := jws.Verify(pub)
	if err != nil {
		return nil, fmt.Errorf("%s token: signature: %w", typ, err)
	}
	k.good.add(id)
	return out, nil
}

// signed returns the claims of a token whose header is a Signer's own, which says
// all that the library would ask of it: header and body as signed, and the
// signature of ES384 over them (RFC 7518, section 3.4). Of all ways to write the
// parts in base64url, one counts: the reader passes over line breaks.
func signed(pub *ecdsa.PublicKey, both, body, signature string) ([]byte, error) {
	enc := base64.RawURLEncoding.Strict()
	if strings.ContainsAny(body, "\r\n") || strings.ContainsAny(signature, "\r\n") {
		return nil, errors.New("not in its one encoding")
	}
	out, err := enc.DecodeString(body)
	if err != nil {
		return nil, fmt.Errorf("claims: %w", err)
	}
	b, err := enc.DecodeString(signature)
	if err != nil || len(b) != signatureSize {
		return nil, errors.New("signature is not of ES384")
	}
	sum := sha512.Sum384([]byte(both))
	if !ecdsa.Verify(pub, sum[:], new(big.Int).SetBytes(b[:signatureSize/2]), new(big.Int).SetBytes(b[signatureSize/2:])) {
		return nil, errors.New("signature is not by this key")
	}
	return out, nil
}

// TypeResult is the token type of attestation results.
const TypeResult = "attestation-result"

// TypeCheck is the token type of what a verifier says of evidence to somebody who
// releases no key on it. Brokers, and bundles, take TypeResult alone.
const TypeCheck = "evidence-check"

// Expect is what a relying party requires of a result. Empty fields are errors,
// except JobID and PlanDigest together, which a relying party that learns them
// from the result leaves empty by using AnyJob.
type Expect struct {
	Audience string
	JobID    string
	Plan     plan.Digest
	// AnyJob accepts a result for any job and plan: a broker learns both from
	// the result and holds them against the grant.
	AnyJob bool
	// AllowSimulated accepts results rooted in simulation anchors.
	AllowSimulated bool
}

// Verified is a result that was checked and affirms. Only VerifyResult makes one.
type Verified struct {
	result Result
	token  string
	ok     bool
}

// Result returns the claims. It panics on the zero value, which no check made.
func (v Verified) Result() Result {
	if !v.ok {
		panic("receipt: use of an unverified result")
	}
	return v.result
}

// Token returns the signed form. It panics on the zero value.
func (v Verified) Token() string {
	if !v.ok {
		panic("receipt: use of an unverified result")
	}
	return v.token
}

// SessionKey returns the key by which requests under this result are signed.
func (v Verified) SessionKey() (*ecdsa.PublicKey, error) {
	jwk := v.Result().Confirmation.JWK
	if jwk == nil {
		return nil, errors.New("result confirms no session key")
	}
	pub, ok := jwk.Key.(*ecdsa.PublicKey)
	if !ok || pub.Curve.Params().BitSize != 256 {
		return nil, errors.New("result confirms no P-256 session key")
	}
	return pub, nil
}

// VerifyResult checks token against the verifier's keys and what the relying
// party expects, at the given time. Everything it refuses is a *check.Refusal
// at stage "verify" that lists every failed check.
func VerifyResult(keys Keys, token string, want Expect, now time.Time) (Verified, error) {
	var r Result
	var l check.List
	if err := keys.Open(TypeResult, token, &r); err != nil {
		l.Fail("result.signature", "a result signed by "+keys.issuer, err.Error(), "ask the verifier for a new result")
		return Verified{}, check.Refuse("verify", l)
	}
	if want.Audience == "" || (!want.AnyJob && (want.JobID == "" || want.Plan == "")) {
		return Verified{}, errors.New("verify result: expectation is incomplete")
	}
	l.Equal("result.profile", Profile, r.Profile, "use a verifier that speaks EAR")
	l.Equal("result.audience", want.Audience, r.Audience, "ask the verifier for a result for this audience")
	if !want.AnyJob {
		l.Equal("result.job", want.JobID, r.JobID, "a result speaks for one job only")
		l.Equal("result.plan", string(want.Plan), string(r.PlanDigest), "a result speaks for one plan only")
	}
	switch exp := time.Unix(r.Expires, 0); {
	case r.Expires == 0 || !now.Before(exp):
		l.Fail("result.expiry", "a result that is valid at "+now.UTC().Format(time.RFC3339), "expired at "+exp.UTC().Format(time.RFC3339), "attest again")
	case exp.Sub(time.Unix(r.IssuedAt, 0)) > ResultLifetime:
		l.Fail("result.expiry", "at most "+ResultLifetime.String(), exp.Sub(time.Unix(r.IssuedAt, 0)).String(), "results are short-lived")
	default:
		l.Pass("result.expiry", exp.UTC().Format(time.RFC3339))
	}
	if time.Unix(r.IssuedAt, 0).After(now.Add(Leeway)) {
		l.Fail("result.issued", "not after "+now.UTC().Format(time.RFC3339), time.Unix(r.IssuedAt, 0).UTC().Format(time.RFC3339), "compare the clocks")
	}
	if r.ID == "" || r.Nonce == "" || r.PlanDigest.Bytes() == nil || r.SandboxDigest.Bytes() == nil || r.EvidenceDigest.Bytes() == nil ||
		r.Confirmation.JWK == nil || len(r.Confirmation.Recipient) == 0 {
		l.Fail("result.complete", "id, nonce, digests and confirmed keys", "some are missing", "use a verifier of the same version")
	}
	if r.Simulated && !want.AllowSimulated {
		l.Fail("result.simulated", "evidence rooted in a vendor's anchor", "evidence rooted in a simulation anchor", "run on confidential hardware, or name a policy that allows simulation")
	}
	if len(r.Submods) == 0 {
		l.Fail("result.submods", "at least one appraised device", "none", "")
	}
	names := make([]string, 0, len(r.Submods))
	for n := range r.Submods {
		names = append(names, n)
	}
	sort.Strings(names)
	for _, n := range names {
		s := r.Submods[n]
		if s.Status != Affirming {
			l.Fail("result."+n, string(Affirming), string(s.Status), "see the failed checks of "+n)
		} else if t := s.Vector.Tier(); t == Warning || t == Contraindicated {
			l.Fail("result."+n, "a trust vector that fits its tier "+string(Affirming), "one that says "+string(t), "use a verifier of the same version")
		}
	}
	l = append(l, r.AllChecks().Failed()...)
	if len(l.Failed()) > 0 {
		return Verified{}, check.Refuse("verify", l)
	}
	return Verified{result: r, token: token, ok: true}, nil
}

// SessionJWK wraps a session public key for a Confirmation.
func SessionJWK(pkix []byte) (*jose.JSONWebKey, error) {
	k, err := x509.ParsePKIXPublicKey(pkix)
	if err != nil {
		return nil, fmt.Errorf("session key: %w", err)
	}
	pub, ok := k.(*ecdsa.PublicKey)
	if !ok || pub.Curve.Params().BitSize != 256 {
		return nil, errors.New("session key is not on P-256")
	}
	return &jose.JSONWebKey{Key: pub, Algorithm: string(jose.ES256), Use: "sig"}, nil
}
