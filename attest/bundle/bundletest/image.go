package bundletest

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"strings"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
)

// Types of what cosign signs images with.
const (
	SignPredicate = "https://sigstore.dev/cosign/sign/v1"
	payloadType   = "application/vnd.in-toto+json"
)

// signImage has the profile name ImageKey, and signs the image with it.
func (j *Job) signImage(p *plan.Profile, image string) error {
	der, err := x509.MarshalPKIXPublicKey(&j.lab.ImageKey.PublicKey)
	if err != nil {
		return err
	}
	p.ImageSigners = &plan.ImageSigners{
		Keys: []plan.ImageKey{{Name: "releases", Key: der}}, TrustedRoot: plan.Sum([]byte("root")),
		Identities: []plan.ImageIdentity{{Issuer: "https://issuer.example.com", Subject: "alice@example.com"}},
	}
	b, err := SignImage(j.lab.ImageKey, SignPredicate, image)
	if err != nil {
		return err
	}
	if err := j.json(bundle.ImageSignaturePart, bundle.ImageSignature{Signer: "key releases", Bundle: b}); err != nil {
		return err
	}
	if b, err = SignAbout(j.lab.ImageKey, bundle.SBOMPredicate, SBOM(image), image); err != nil {
		return err
	}
	return j.json(bundle.ImageSBOMPart, bundle.ImageSBOM{Signer: "key releases", Bundle: b})
}

// SBOM is a bill of materials (CycloneDX) of an image with two components, one in the
// other.
func SBOM(image string) json.RawMessage {
	return json.RawMessage(`{"bomFormat":"CycloneDX","specVersion":"1.6","metadata":{"component":{"type":"container","name":"image","version":"` + image + `"}},` +
		`"components":[{"type":"library","name":"python3","version":"3.11.2-1","purl":"pkg:deb/debian/python3@3.11.2-1",` +
		`"hashes":[{"alg":"SHA-256","content":"` + strings.Repeat("ab", sha256.Size) + `"}],"components":[{"type":"library","name":"numpy","version":"1.24.2"}]}]}`)
}

// SignImage returns a Sigstore bundle: a statement of a type about an image, which
// says nothing else.
func SignImage(key *ecdsa.PrivateKey, predicate, image string) ([]byte, error) {
	return SignAbout(key, predicate, json.RawMessage(`{}`), image)
}

// SignAbout returns a Sigstore bundle: a statement of a type with a predicate about an image.
func SignAbout(key *ecdsa.PrivateKey, predicate string, body json.RawMessage, image string) ([]byte, error) {
	payload, err := json.Marshal(map[string]any{
		"_type": "https://in-toto.io/Statement/v1", "predicateType": predicate, "predicate": body,
		"subject": []any{map[string]any{"digest": map[string]string{"sha256": strings.TrimPrefix(image, "sha256:")}}},
	})
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(dsse.PAE(payloadType, payload))
	sig, err := ecdsa.SignASN1(rand.Reader, key, sum[:])
	if err != nil {
		return nil, err
	}
	return json.Marshal(map[string]any{
		"mediaType":            "application/vnd.dev.sigstore.bundle.v0.3+json",
		"verificationMaterial": map[string]any{"publicKey": map[string]string{"hint": ""}},
		"dsseEnvelope":         map[string]any{"payload": payload, "payloadType": payloadType, "signatures": []any{map[string]any{"sig": sig}}},
	})
}
