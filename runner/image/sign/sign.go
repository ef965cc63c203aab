// Package sign signs images with a key, as cosign does. It is for who publishes
// images; nothing here decides what runs.
//
// Not done: keeping keys, and certificates and logs of Sigstore, which cosign does.
package sign

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"

	coffer "github.com/coffer-run/coffer/attest/bundle"
)

const (
	mediaType   = "application/vnd.dev.sigstore.bundle.v0.3+json"
	payloadType = "application/vnd.in-toto+json"
)

type statement struct {
	Type          string          `json:"_type"`
	Subject       []subject       `json:"subject"`
	PredicateType string          `json:"predicateType"`
	Predicate     json.RawMessage `json:"predicate"`
}

type subject struct {
	Name   string            `json:"name"`
	Digest map[string]string `json:"digest"`
}

type bundle struct {
	MediaType string   `json:"mediaType"`
	Material  material `json:"verificationMaterial"`
	Envelope  envelope `json:"dsseEnvelope"`
}

type material struct {
	PublicKey struct {
		Hint string `json:"hint"`
	} `json:"publicKey"`
}

type envelope struct {
	Payload     []byte      `json:"payload"`
	PayloadType string      `json:"payloadType"`
	Signatures  []signature `json:"signatures"`
}

type signature struct {
	Sig []byte `json:"sig"`
}

// Image returns a Sigstore bundle (JSON, version 0.3): an in-toto statement of the
// type that cosign signs images with, about the digest of an image's manifest,
// "sha256:<hex>". The key is on P-256, which is what verifiers of such bundles hash
// for.
func Image(key *ecdsa.PrivateKey, digest string) ([]byte, error) {
	return state(key, digest, "https://sigstore.dev/cosign/sign/v1", json.RawMessage(`{}`))
}

// SBOM returns a Sigstore bundle as Image does, with a bill of materials of the image
// (CycloneDX or SPDX in JSON), as `cosign attest --type cyclonedx` or spdxjson makes it.
func SBOM(key *ecdsa.PrivateKey, digest string, document []byte) ([]byte, error) {
	s, err := coffer.ParseSBOM(document)
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	if !s.Of(digest) {
		return nil, fmt.Errorf("sign: a bill of materials of %q, not of %s", s.Images, digest)
	}
	return state(key, digest, s.Predicate, document)
}

func state(key *ecdsa.PrivateKey, digest, predicate string, body json.RawMessage) ([]byte, error) {
	sum := strings.TrimPrefix(digest, "sha256:")
	if b, err := hex.DecodeString(sum); err != nil || len(b) != sha256.Size || sum == digest {
		return nil, fmt.Errorf("sign image %.100q: want sha256: and 64 hex digits", digest)
	}
	if key == nil || key.Curve != elliptic.P256() {
		return nil, errors.New("sign image: want a key on P-256")
	}
	payload, err := json.Marshal(statement{
		Type: "https://in-toto.io/Statement/v1", PredicateType: predicate, Predicate: body, Subject: []subject{{Digest: map[string]string{"sha256": sum}}},
	})
	if err != nil {
		return nil, fmt.Errorf("sign image: %w", err)
	}
	hash := sha256.Sum256(dsse.PAE(payloadType, payload))
	sig, err := ecdsa.SignASN1(rand.Reader, key, hash[:])
	if err != nil {
		return nil, fmt.Errorf("sign image: %w", err)
	}
	return json.Marshal(bundle{MediaType: mediaType, Envelope: envelope{Payload: payload, PayloadType: payloadType, Signatures: []signature{{sig}}}})
}
