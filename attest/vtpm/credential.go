package vtpm

import (
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
)

// TypeCredential is the token type of attestation key credentials.
const TypeCredential = "ak-credential"

// CredentialLifetime is how long a credential may be relied on: an endorsement
// key that loses its trust stops counting within a day.
const CredentialLifetime = 24 * time.Hour

// Credential is a verifier's statement that an attestation key sits in the TPM
// of an endorsement key, as credential activation showed.
type Credential struct {
	Issuer   string `json:"iss"`
	ID       string `json:"jti"`
	IssuedAt int64  `json:"iat"`
	Expires  int64  `json:"exp"`
	// AKName is the TPM name of the attestation key, in hex.
	AKName string `json:"coffer.ak-name"`
	// EKDigest is the SHA-384 of the endorsement key certificate.
	EKDigest plan.Digest `json:"coffer.ek"`
	// Class is the trust class of the anchor that the certificate led to.
	Class string `json:"coffer.tpm-class"`
	// Simulated is true if that was a simulation anchor.
	Simulated bool `json:"coffer.simulated"`
}

// TokenIssuer is as in receipt.Decoded.
func (c *Credential) TokenIssuer() string { return c.Issuer }

// OpenCredential checks a credential's signature, issuer and times.
func OpenCredential(keys receipt.Keys, token string, now time.Time) (Credential, error) {
	var c Credential
	if err := keys.Open(TypeCredential, token, &c); err != nil {
		return Credential{}, err
	}
	iat, exp := time.Unix(c.IssuedAt, 0), time.Unix(c.Expires, 0)
	switch {
	case c.IssuedAt == 0 || c.Expires == 0 || exp.Sub(iat) > CredentialLifetime:
		return Credential{}, fmt.Errorf("credential is not limited to %s", CredentialLifetime)
	case !now.Before(exp):
		return Credential{}, fmt.Errorf("credential expired at %s", exp.UTC().Format(time.RFC3339))
	case iat.After(now.Add(receipt.Leeway)):
		return Credential{}, fmt.Errorf("credential is not valid before %s", iat.UTC().Format(time.RFC3339))
	}
	if b, err := hex.DecodeString(c.AKName); err != nil || len(b) != 34 || c.EKDigest.Bytes() == nil || c.Class == "" || c.ID == "" {
		return Credential{}, errors.New("credential is incomplete")
	}
	return c, nil
}
