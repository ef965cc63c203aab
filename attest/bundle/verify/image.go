package verify

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

// imageSignature holds the image's signature against the signers of the profile.
// A key's signature is checked here. One with a certificate is the measured agent's
// word: the log's entry and the certificate's chain are checked by those who have
// Sigstore's trusted root.
func (v *verification) imageSignature(g *check.List) {
	const id = "sandbox.image-signature"
	b, there := v.part(bundle.ImageSignaturePart)
	signers := v.sb.Profile.ImageSigners
	switch {
	case signers == nil && there:
		g.Fail(id, "no signature: the profile names nobody who must sign", "one", "")
		return
	case signers == nil:
		return
	case !there:
		g.Fail(id, "the signature of the image", "none that can be relied on", "the record is not complete")
		return
	}
	if !g.Equal("sandbox.image-signature-bound", string(v.sb.ImageSignature), string(plan.Sum(b)), "the evidence speaks of another signature") {
		return
	}
	s, err := bundle.Decode[bundle.ImageSignature](b)
	if err != nil || len(s.Bundle) > bundle.MaxImageSignature {
		g.Fail(id, "a signature", "none that can be read", "")
		return
	}
	if name, ok := strings.CutPrefix(s.Signer, "key "); ok {
		err = errors.New("none of the profile's")
		for _, k := range signers.Keys {
			if k.Name == name {
				if err = signedImage(s.Bundle, k.Key, v.sb.Image); err == nil {
					g.Pass(id, "by key "+name)
					return
				}
			}
		}
		g.Fail(id, "a signature of "+v.sb.Image+" by a key of the profile", fmt.Sprintf("key %.80q: %v", name, err), "")
		return
	}
	for _, who := range signers.Identities {
		if s.Signer == who.Subject+" by "+who.Issuer {
			g.Skip(id, fmt.Sprintf("%.200q signed it, by the measured agent's word: cosign checks the signature", s.Signer))
			return
		}
	}
	g.Fail(id, "a signer of the profile", fmt.Sprintf("%.200q", s.Signer), "")
}

// signPredicate is what cosign signs an image with, inside an in-toto statement.
const signPredicate = "https://sigstore.dev/cosign/sign/v1"

// sigstoreBundle is what is read of a Sigstore bundle (version 0.3).
type sigstoreBundle struct {
	Envelope *struct {
		Payload     []byte `json:"payload"`
		PayloadType string `json:"payloadType"`
		Signatures  []struct {
			Sig []byte `json:"sig"`
		} `json:"signatures"`
	} `json:"dsseEnvelope"`
	Message *struct {
		Signature []byte `json:"signature"`
	} `json:"messageSignature"`
}

// signedImage checks a Sigstore bundle that a key made of an image's digest: a DSSE
// envelope with an in-toto statement of cosign's, or a signature of the manifest.
func signedImage(body, der []byte, image string) error {
	var b sigstoreBundle
	if err := json.Unmarshal(body, &b); err != nil {
		return errors.New("not a Sigstore bundle")
	}
	if b.Message == nil || b.Envelope != nil {
		return b.states(der, image, signPredicate)
	}
	want, key, err := imageAndKey(image, der)
	if err != nil {
		return err
	}
	return signedBy(key, nil, want, b.Message.Signature)
}

func imageAndKey(image string, der []byte) (digest []byte, key any, err error) {
	digest, err = hex.DecodeString(strings.TrimPrefix(image, "sha256:"))
	if err != nil || len(digest) != sha256.Size {
		return nil, nil, errors.New("the image's digest is none")
	}
	if key, err = x509.ParsePKIXPublicKey(der); err != nil {
		return nil, nil, fmt.Errorf("the profile's key: %w", err)
	}
	return digest, key, nil
}

// states checks that a key signed an in-toto statement of a type about an image.
func (b sigstoreBundle) states(der []byte, image, predicate string) error {
	want, key, err := imageAndKey(image, der)
	if err != nil {
		return err
	}
	if b.Envelope == nil || b.Message != nil || len(b.Envelope.Signatures) != 1 {
		return errors.New("not a Sigstore bundle with one signature")
	}
	pae := dsse.PAE(b.Envelope.PayloadType, b.Envelope.Payload)
	sum := sha256.Sum256(pae)
	if err := signedBy(key, pae, sum[:], b.Envelope.Signatures[0].Sig); err != nil {
		return err
	}
	var st struct {
		Predicate string `json:"predicateType"`
		Subject   []struct {
			Digest map[string]string `json:"digest"`
		} `json:"subject"`
	}
	if err := json.Unmarshal(b.Envelope.Payload, &st); err != nil || st.Predicate != predicate {
		return fmt.Errorf("a statement that is none of type %s", predicate)
	}
	for _, s := range st.Subject {
		if s.Digest["sha256"] == hex.EncodeToString(want) {
			return nil
		}
	}
	return errors.New("a statement about another image")
}

// signedBy checks a signature over message, whose SHA-256 is sum. message is nil if
// nobody has it.
func signedBy(key any, message, sum, signature []byte) error {
	ok := false
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		ok = ecdsa.VerifyASN1(k, sum, signature)
	case *rsa.PublicKey:
		ok = rsa.VerifyPKCS1v15(k, crypto.SHA256, sum, signature) == nil
	case ed25519.PublicKey:
		ok = message != nil && ed25519.Verify(k, message, signature)
	}
	if !ok {
		return errors.New("not signed by this key")
	}
	return nil
}
