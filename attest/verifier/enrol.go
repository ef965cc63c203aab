package verifier

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/vtpm"
)

// maxEnrolment bounds a sealed enrolment, in bytes of base64url.
const maxEnrolment = 4 << 10

// enrolment is what the verifier must remember between the two halves of an
// enrolment. The client carries it, sealed: any replica can finish.
type enrolment struct {
	Secret    []byte       `json:"secret"`
	AKName    string       `json:"akName"`
	EKDigest  plan.Digest  `json:"ekDigest"`
	Class     anchor.Class `json:"class"`
	Simulated bool         `json:"simulated"`
	Expires   int64        `json:"expires"`
}

// BeginEnrolment returns a credential that only the TPM of ekChain's key can
// open, and only for the attestation key, with the sealed state of the
// enrolment. What it does not accept is a *check.Refusal at stage "enrol".
func (v *Verifier) BeginEnrolment(ekChain [][]byte, akPublic []byte) (credentialBlob, encryptedSecret []byte, token string, err error) {
	now := v.clock()
	e, err := vtpm.BeginEnrolment(ekChain, akPublic, v.trusted.Load().anchors, now)
	if err != nil {
		return nil, nil, "", err
	}
	b, err := plan.Canonical(enrolment{
		Secret: e.Secret[:], AKName: e.AKName, EKDigest: e.EKDigest, Class: e.Class, Simulated: e.Simulated,
		Expires: now.Add(EnrolmentLifetime).Unix(),
	})
	if err != nil {
		return nil, nil, "", fmt.Errorf("seal enrolment: %w", err)
	}
	aead, err := sealer(v.keys.Load().sealing[0])
	if err != nil {
		return nil, nil, "", fmt.Errorf("seal enrolment: %w", err)
	}
	sealed := aead.Seal(nil, nil, b, []byte(v.id)) // #nosec G407 -- this AEAD draws its own nonce and puts it in front
	token = base64.RawURLEncoding.EncodeToString(sealed)
	return e.CredentialBlob, e.EncryptedSecret, token, nil
}

// FinishEnrolment exchanges the opened secret for a credential of the
// attestation key. A wrong secret, and a token that is expired or not this
// verifier's, are a *check.Refusal at stage "enrol".
func (v *Verifier) FinishEnrolment(token string, secret []byte) (string, error) {
	now := v.clock()
	var l check.List
	const hint = "begin the enrolment again"
	e, err := v.openEnrolment(token)
	if err != nil {
		l.Fail("enrolment.token", "an enrolment that this verifier began", err.Error(), hint)
		return "", check.Refuse("enrol", l)
	}
	if exp := time.Unix(e.Expires, 0); !now.Before(exp) {
		l.Fail("enrolment.fresh", "an enrolment of the last "+EnrolmentLifetime.String(), "expired at "+exp.UTC().Format(time.RFC3339), hint)
	}
	if len(e.Secret) != vtpm.SecretSize || subtle.ConstantTimeCompare(e.Secret, secret) != 1 {
		l.Fail("enrolment.secret", "the secret in the credential", "another", "open the credential with the TPM that holds both keys")
	}
	if len(l.Failed()) > 0 {
		return "", check.Refuse("enrol", l)
	}
	id, err := tokenID()
	if err != nil {
		return "", err
	}
	return v.keys.Load().signer.Sign(vtpm.TypeCredential, vtpm.Credential{
		Issuer: v.id, ID: id, IssuedAt: now.Unix(), Expires: now.Add(vtpm.CredentialLifetime).Unix(),
		AKName: e.AKName, EKDigest: e.EKDigest, Class: string(e.Class), Simulated: e.Simulated,
	})
}

func (v *Verifier) openEnrolment(token string) (enrolment, error) {
	if len(token) > maxEnrolment {
		return enrolment{}, fmt.Errorf("%d bytes, at most %d are allowed", len(token), maxEnrolment)
	}
	b, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil {
		return enrolment{}, errors.New("not base64url")
	}
	for _, k := range v.keys.Load().sealing {
		aead, err := sealer(k)
		if err != nil {
			return enrolment{}, err
		}
		plain, err := aead.Open(nil, nil, b, []byte(v.id))
		if err != nil {
			continue
		}
		var e enrolment
		if err := plan.Decode(plain, maxEnrolment, &e); err != nil {
			return enrolment{}, err
		}
		return e, nil
	}
	return enrolment{}, errors.New("not begun by this verifier")
}

// sealer is AES-256-GCM with random nonces: enrolments are far from 2^32 a key.
func sealer(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

func tokenID() (string, error) {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", fmt.Errorf("make token id: %w", err)
	}
	return hex.EncodeToString(b[:]), nil
}
