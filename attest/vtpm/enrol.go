package vtpm

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

const (
	maxChain       = 6
	maxCertificate = 8 << 10
	// SecretSize is the length of the secret of a credential activation.
	SecretSize = 32
)

var (
	// tcg-kp-EKCertificate, TCG EK Credential Profile, section 3.5.16.
	oidEKCertificate = asn1.ObjectIdentifier{2, 23, 133, 8, 1}
	oidSubjectAlt    = asn1.ObjectIdentifier{2, 5, 29, 17}
)

// Enrolment is one begun credential activation. Whoever returns Secret has
// shown that the attestation key and the endorsement key sit in one TPM.
type Enrolment struct {
	// CredentialBlob is TPM2B_ID_OBJECT, EncryptedSecret TPM2B_ENCRYPTED_SECRET.
	CredentialBlob  []byte
	EncryptedSecret []byte
	Secret          [SecretSize]byte
	// AKName is the TPM name of the attestation key, in hex.
	AKName string
	// EKDigest is the SHA-384 of the endorsement key certificate.
	EKDigest plan.Digest
	// Class is the trust class of the anchor to which the certificate leads.
	Class anchor.Class
	// Simulated is true if that is a simulation's anchor.
	Simulated bool
}

// BeginEnrolment makes a credential that only the TPM of the endorsement key in
// ekChain can open, and only for the attestation key akPublic (TPM 2.0 Part 1,
// section 24). ekChain is DER, the endorsement key's certificate first. What it
// does not accept is a *check.Refusal at stage "enrol".
func BeginEnrolment(ekChain [][]byte, akPublic []byte, anchors anchor.Set, now time.Time) (*Enrolment, error) {
	var l check.List
	ak := parseAK(akPublic, nil, &l)
	leaf, class, err := verifyEK(ekChain, anchors, now)
	if err != nil {
		l.Fail("ek.chain", "an endorsement key certificate that leads to a known root", err.Error(), "give the verifier the root of this TPM's maker, with its trust class")
	}
	var ek *tpm2.TPMTPublic
	if leaf != nil {
		if ek, err = ekPublic(leaf); err != nil {
			l.Fail("ek.key", "an endorsement key in a default template", err.Error(), "use the RSA-2048 or P-256 endorsement key")
		}
	}
	if len(l.Failed()) > 0 || ek == nil || ak == nil {
		return nil, check.Refuse("enrol", l)
	}
	e := &Enrolment{AKName: hex.EncodeToString(ak.name), EKDigest: plan.Sum(leaf.Raw), Class: class, Simulated: anchors.Simulated()}
	if _, err := rand.Read(e.Secret[:]); err != nil {
		return nil, fmt.Errorf("enrol attestation key: %w", err)
	}
	to, err := tpm2.ImportEncapsulationKey(ek)
	if err != nil {
		return nil, fmt.Errorf("enrol attestation key: endorsement key: %w", err)
	}
	blob, secret, err := tpm2.CreateCredential(rand.Reader, to, ak.name, e.Secret[:])
	if err != nil {
		return nil, fmt.Errorf("enrol attestation key: make credential: %w", err)
	}
	e.CredentialBlob = tpm2.Marshal(tpm2.TPM2BDigest{Buffer: blob})
	e.EncryptedSecret = tpm2.Marshal(tpm2.TPM2BDigest{Buffer: secret})
	return e, nil
}

// verifyEK checks the chain of an endorsement key certificate up to one of the
// given roots and returns the certificate and the root's trust class.
func verifyEK(chain [][]byte, anchors anchor.Set, now time.Time) (*x509.Certificate, anchor.Class, error) {
	if len(chain) == 0 || len(chain) > maxChain {
		return nil, "", fmt.Errorf("chain of %d certificates: want 1 to %d", len(chain), maxChain)
	}
	roots, inter := x509.NewCertPool(), x509.NewCertPool()
	for _, r := range anchors.EKRoots() {
		roots.AddCert(r.Certificate)
	}
	var leaf *x509.Certificate
	for i, der := range chain {
		if len(der) > maxCertificate {
			return nil, "", fmt.Errorf("certificate %d has %d bytes, at most %d are allowed", i, len(der), maxCertificate)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, "", fmt.Errorf("certificate %d: %w", i, err)
		}
		if i == 0 {
			leaf = c
			continue
		}
		inter.AddCert(c)
	}
	if leaf.IsCA {
		return nil, "", errors.New("the endorsement key certificate is a CA's")
	}
	if !slices.ContainsFunc(leaf.UnknownExtKeyUsage, oidEKCertificate.Equal) {
		return nil, "", fmt.Errorf("certificate is not for an endorsement key (extended key usage %s)", oidEKCertificate)
	}
	// The profile (section 3.2.9) makes the subject alternative name critical
	// and puts the TPM's maker and model into a directory name, which crypto/x509
	// does not read. Nothing here relies on it.
	leaf.UnhandledCriticalExtensions = slices.DeleteFunc(leaf.UnhandledCriticalExtensions, oidSubjectAlt.Equal)
	found, err := leaf.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: inter, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return nil, "", err
	}
	var class anchor.Class
	for i, path := range found {
		c, ok := anchors.EKRoot(path[len(path)-1].Raw)
		if !ok || c == "" {
			return nil, "", errors.New("chain ends in no known root")
		}
		if i > 0 && c != class {
			return nil, "", errors.New("chain leads to roots of different trust classes")
		}
		class = c
	}
	return leaf, class, nil
}

// ekPublic rebuilds the TPM's public area of an endorsement key from its
// certificate: templates L-1 and L-2 of the TCG EK Credential Profile, sections
// B.3.3 and B.3.4. For a key made by another template the TPM cannot open the
// credential.
func ekPublic(c *x509.Certificate) (*tpm2.TPMTPublic, error) {
	switch k := c.PublicKey.(type) {
	case *rsa.PublicKey:
		if k.N.BitLen() != 2048 || k.E != 65537 {
			return nil, fmt.Errorf("RSA key of %d bits and exponent %d: want 2048 and 65537", k.N.BitLen(), k.E)
		}
		pub := tpm2.RSAEKTemplate
		pub.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: k.N.FillBytes(make([]byte, 256))})
		return &pub, nil
	case *ecdsa.PublicKey:
		if k.Curve != elliptic.P256() {
			return nil, fmt.Errorf("key on %s: want P-256", k.Curve.Params().Name)
		}
		point, err := k.Bytes()
		if err != nil {
			return nil, err
		}
		pub := tpm2.ECCEKTemplate
		pub.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: point[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: point[33:]},
		})
		return &pub, nil
	default:
		return nil, fmt.Errorf("key type %T is neither RSA nor ECDSA", k)
	}
}
