package receipt

import (
	"errors"
	"slices"
	"time"

	"maps"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

// TypeKBS is the token type of a result over evidence of the Confidential
// Containers KBS protocol. It is a type of its own: such evidence binds no plan, no
// sandbox and no session key, and must not pass where those are needed.
const TypeKBS = "kbs-result"

// KBSResult is what a verifier signs of such evidence.
type KBSResult struct {
	Issuer   string `json:"iss"`
	Audience string `json:"aud"`
	ID       string `json:"jti"`
	IssuedAt int64  `json:"iat"`
	Expires  int64  `json:"exp"`
	// Nonce and Session are the broker's, TEE what the guest said that it is.
	Nonce   string `json:"eat_nonce"`
	Session string `json:"coffer.session"`
	TEE     string `json:"coffer.tee"`
	// Key is the SHA-256 thumbprint (RFC 7638) of the tee-pubkey that the evidence
	// binds together with the nonce.
	Key []byte `json:"coffer.tee-key"`
	// InitData is the SHA-384 of the init-data that the evidence binds.
	InitData  plan.Digest          `json:"coffer.init-data"`
	Evidence  plan.Digest          `json:"coffer.evidence"`
	Simulated bool                 `json:"coffer.simulated"`
	Submods   map[string]Appraisal `json:"submods"`
}

// KBSExpect is what a broker knows of a session. Every field but AllowSimulated is
// required.
type KBSExpect struct {
	Audience, Nonce, Session, TEE string
	Key                           []byte
	AllowSimulated                bool
}

// VerifyKBS checks a KBS result: signature, what it is for, lifetime, and that it
// affirms every device. Its error is a refusal that names every failed check.
func VerifyKBS(keys Keys, token string, want KBSExpect, now time.Time) (KBSResult, error) {
	var r KBSResult
	var l check.List
	if err := keys.Open(TypeKBS, token, &r); err != nil {
		l.Fail("kbs.signature", "a KBS result signed by "+keys.issuer, err.Error(), "ask the verifier for a new result")
		return KBSResult{}, check.Refuse("verify", l)
	}
	if want.Audience == "" || want.Nonce == "" || want.Session == "" || want.TEE == "" || len(want.Key) == 0 {
		return KBSResult{}, errors.New("verify KBS result: expectation is incomplete")
	}
	l.Equal("kbs.audience", want.Audience, r.Audience, "ask the verifier for a result for this audience")
	l.Equal("kbs.nonce", want.Nonce, r.Nonce, "attest with the nonce of this session")
	l.Equal("kbs.session", want.Session, r.Session, "a result speaks for one session only")
	l.Equal("kbs.tee", want.TEE, r.TEE, "attest as what the session was opened for")
	if !slices.Equal(want.Key, r.Key) {
		l.Fail("kbs.tee-key", "evidence that binds the key of this session", "another key", "a key is delivered only to whom the evidence names")
	}
	exp, iat := time.Unix(r.Expires, 0), time.Unix(r.IssuedAt, 0)
	if r.Expires == 0 || !now.Before(exp) || exp.Sub(iat) > ResultLifetime || iat.After(now.Add(Leeway)) {
		l.Fail("kbs.lifetime", "a result that is valid at "+now.UTC().Format(time.RFC3339), iat.UTC().Format(time.RFC3339)+" to "+exp.UTC().Format(time.RFC3339), "attest again")
	}
	if r.ID == "" || r.InitData.Bytes() == nil || r.Evidence.Bytes() == nil || len(r.Submods) == 0 {
		l.Fail("kbs.complete", "id, init-data, evidence and appraised devices", "some are missing", "attest with init-data: it is what a grant names")
	}
	if r.Simulated && !want.AllowSimulated {
		l.Fail("kbs.simulated", "evidence rooted in a vendor's anchor", "evidence rooted in a simulation anchor", "run on confidential hardware")
	}
	for _, n := range slices.Sorted(maps.Keys(r.Submods)) {
		s := r.Submods[n]
		if t := s.Vector.Tier(); s.Status != Affirming || t == Warning || t == Contraindicated {
			l.Fail("kbs."+n, string(Affirming), string(s.Status), "see the failed checks of "+n)
		}
		l = append(l, s.Checks.Failed()...)
	}
	if len(l.Failed()) > 0 {
		return KBSResult{}, check.Refuse("verify", l)
	}
	return r, nil
}
