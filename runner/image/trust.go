// Package image says who signed an image, and fetches images with their signatures
// from registries and OCI layouts.
//
// Trusted: the keys and roots of the node's configuration. Checked: that a trusted
// signer signed the digest of the very manifest, offline, with the times that the
// signature carries. Not checked: what the signer looked at before signing, and
// whether a key was revoked after the configuration was written.
package image

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	sigstore "github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/verify"
	"github.com/sigstore/sigstore/pkg/signature"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

const (
	// BundleType is the start of the media type of a Sigstore bundle; a version follows
	// (Sigstore bundle format, "Media type").
	BundleType = "application/vnd.dev.sigstore.bundle"
	// MaxBundle bounds one signature, in bytes, and MaxBundles how many bundles of an image are looked at.
	MaxBundle, MaxBundles = 256 << 10, 16
	// signPredicate is what cosign signs an image with, inside an in-toto statement.
	signPredicate = "https://sigstore.dev/cosign/sign/v1"
)

// Key is a signer who is known by a public key.
type Key struct {
	// Name stands for the key in evidence.
	Name string
	// PEM is a PKIX public key.
	PEM []byte
}

// Identity is a signer who is known by a certificate's issuer and subject, both exact.
type Identity struct {
	Issuer  string `json:"issuer"`
	Subject string `json:"subject"`
}

// Trust is who may sign images. The zero value trusts nobody.
type Trust struct {
	keys       []trustedKey
	identities *verify.Verifier
	allowed    []Identity
	signers    plan.ImageSigners
}

type trustedKey struct {
	name     string
	verifier *verify.Verifier
}

// Signature is a checked signature of one image.
type Signature struct {
	// Signer is "key NAME" or "SUBJECT by ISSUER".
	Signer string `json:"signer"`
	// Bundle is the Sigstore bundle that was checked.
	Bundle json.RawMessage `json:"bundle"`
}

// NewTrust reads keys, and identities under a Sigstore trusted root (JSON), which
// is required if and only if identities are given.
func NewTrust(keys []Key, trustedRoot []byte, identities []Identity) (*Trust, error) {
	t := &Trust{allowed: slices.Clone(identities)}
	for _, k := range keys {
		v, err := keyVerifier(k)
		if err != nil {
			return nil, fmt.Errorf("image signer %q: %w", k.Name, err)
		}
		if slices.ContainsFunc(t.keys, func(other trustedKey) bool { return other.name == k.Name }) {
			return nil, fmt.Errorf("image signer %q is named twice", k.Name)
		}
		t.keys = append(t.keys, trustedKey{name: k.Name, verifier: v})
		block, _ := pem.Decode(k.PEM)
		t.signers.Keys = append(t.signers.Keys, plan.ImageKey{Name: k.Name, Key: block.Bytes})
	}
	if (len(identities) > 0) != (len(trustedRoot) > 0) {
		return nil, errors.New("image signers: identities and the trusted root of their certificates come together")
	}
	for _, id := range identities {
		if id.Issuer == "" || id.Subject == "" {
			return nil, errors.New("image signers: an identity needs issuer and subject")
		}
		t.signers.Identities = append(t.signers.Identities, plan.ImageIdentity(id))
	}
	if len(identities) > 0 {
		material, err := root.NewTrustedRootFromJSON(trustedRoot)
		if err != nil {
			return nil, fmt.Errorf("image signers: read trusted root: %w", err)
		}
		if err := t.trustCertificates(material); err != nil {
			return nil, err
		}
		t.signers.TrustedRoot = plan.Sum(trustedRoot)
	}
	if _, err := t.signers.Digest(); err != nil {
		return nil, err
	}
	return t, nil
}

// trustCertificates wants the log's entry, and its time or a time-stamping
// authority's, in which the short-lived certificate was valid. Where the trusted
// root has certificate logs, the certificate must be in one; a private Fulcio may have none.
func (t *Trust) trustCertificates(m root.TrustedMaterial) error {
	options := []verify.VerifierOption{verify.WithTransparencyLog(1), verify.WithObserverTimestamps(1)}
	if len(m.CTLogs()) > 0 {
		options = append(options, verify.WithSignedCertificateTimestamps(1))
	}
	v, err := verify.NewVerifier(m, options...)
	if err != nil {
		return fmt.Errorf("image signers: %w", err)
	}
	t.identities = v
	return nil
}

func keyVerifier(k Key) (*verify.Verifier, error) {
	block, rest := pem.Decode(k.PEM)
	if k.Name == "" || block == nil || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("want a name and one PEM public key")
	}
	pub, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parse public key: %w", err)
	}
	v, err := signature.LoadVerifier(pub, crypto.SHA256)
	if err != nil {
		return nil, err
	}
	// The hint in a bundle says which key signed. Whoever made the bundle wrote it: the key is the one configured.
	expiring := root.NewExpiringKey(v, time.Time{}, time.Time{})
	material := root.NewTrustedPublicKeyMaterial(func(string) (root.TimeConstrainedVerifier, error) { return expiring, nil })
	return verify.NewVerifier(material, verify.WithNoObserverTimestamps())
}

// Verify returns the first of an image's signatures that a trusted signer made of
// its manifest's digest, "sha256:<hex>". The error is a refusal that says of each
// signature why it does not count.
func (t *Trust) Verify(digest string, bundles [][]byte) (Signature, error) {
	sum, err := hex.DecodeString(strings.TrimPrefix(digest, "sha256:"))
	if err != nil || len(sum) != 32 || !strings.HasPrefix(digest, "sha256:") {
		return Signature{}, fmt.Errorf("image digest %.100q: want sha256: and 64 hex digits", digest)
	}
	want := "a signature of " + digest + " by " + t.names()
	var l check.List
	if len(bundles) == 0 {
		l.Fail("image.signature", want, "no signature", "sign the image and push the signature beside it, or run an image that is signed")
	}
	if len(bundles) > MaxBundles {
		l.Fail("image.signature", fmt.Sprintf("at most %d signatures", MaxBundles), fmt.Sprintf("%d", len(bundles)), "remove signatures that do not count from the registry")
		bundles = bundles[:0]
	}
	for _, b := range bundles {
		signer, err := t.verifyOne(sum, b, MaxBundle, onlySigns)
		if err == nil {
			return Signature{Signer: signer, Bundle: b}, nil
		}
		l.Fail("image.signature", want, err.Error(), "have one of the named signers sign this digest")
	}
	return Signature{}, check.Refuse("admit", l)
}

// Signers names those who are trusted, as sandbox profiles do.
func (t *Trust) Signers() plan.ImageSigners { return t.signers }

func (t *Trust) names() string {
	var names []string
	for _, k := range t.keys {
		names = append(names, "key "+k.name)
	}
	for _, id := range t.allowed {
		names = append(names, id.Subject+" by "+id.Issuer)
	}
	if len(names) == 0 {
		return "nobody"
	}
	return strings.Join(names, ", or ")
}

// verifyOne names who of those who are trusted signed an image. says judges what they
// signed about it.
func (t *Trust) verifyOne(sum, b []byte, limit int, says func(*verify.VerificationResult) error) (string, error) {
	if len(b) > limit {
		return "", fmt.Errorf("a signature of %d bytes: at most %d are read", len(b), limit)
	}
	var entity sigstore.Bundle
	if err := entity.UnmarshalJSON(b); err != nil {
		return "", fmt.Errorf("not a Sigstore bundle: %w", err)
	}
	return t.signer(sum, &entity, says)
}

// signer names the trusted signer of an entity.
func (t *Trust) signer(sum []byte, entity verify.SignedEntity, says func(*verify.VerificationResult) error) (string, error) {
	artifact := verify.WithArtifactDigest("sha256", sum)
	content, err := entity.VerificationContent()
	if err != nil {
		return "", fmt.Errorf("read signature: %w", err)
	}
	if content.Certificate() == nil {
		problem := errors.New("signed with a key, and no key is trusted")
		for _, k := range t.keys {
			result, err := k.verifier.Verify(entity, verify.NewPolicy(artifact, verify.WithKey()))
			if err == nil {
				err = says(result)
			}
			if err == nil {
				return "key " + k.name, nil
			}
			problem = fmt.Errorf("not by key %s: %w", k.name, err)
		}
		return "", problem
	}
	if t.identities == nil {
		return "", errors.New("signed with a certificate, and no identity is trusted")
	}
	var options []verify.PolicyOption
	for _, id := range t.allowed {
		match, err := verify.NewShortCertificateIdentity(id.Issuer, "", id.Subject, "")
		if err != nil {
			return "", fmt.Errorf("identity of the configuration: %w", err)
		}
		options = append(options, verify.WithCertificateIdentity(match))
	}
	result, err := t.identities.Verify(entity, verify.NewPolicy(artifact, options...))
	if err != nil {
		return "", err
	}
	if err := says(result); err != nil {
		return "", err
	}
	c := result.Signature.Certificate
	return c.SubjectAlternativeName + " by " + c.Issuer, nil
}

// onlySigns refuses statements about an image that are no approval of it: a list of
// what it contains, or that a scan found it wanting, is signed by the same people.
func onlySigns(r *verify.VerificationResult) error {
	if r.Statement != nil && r.Statement.GetPredicateType() != signPredicate {
		return fmt.Errorf("a statement of type %.100q, which is no signature", r.Statement.GetPredicateType())
	}
	return nil
}
