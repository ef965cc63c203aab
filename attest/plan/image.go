package plan

import (
	"errors"
	"fmt"
)

// Where image content lies on a node.
const (
	// ImageStoreTmpfs is memory, which nobody outside of the machine can change.
	ImageStoreTmpfs = "tmpfs"
	// ImageStoreDisk is a plain disk, which belongs to who runs the machine. The
	// agent hashes the unpacked content before each start.
	ImageStoreDisk = "disk"
)

// MaxImageSigners bounds the keys and the identities of ImageSigners, each.
const MaxImageSigners = 32

// ImageSigners is who may sign the images of a node's jobs. One signature by one of
// them is enough.
type ImageSigners struct {
	Keys []ImageKey `json:"keys,omitempty"`
	// TrustedRoot is the digest of the Sigstore trusted root (JSON) under which the
	// certificates of Identities must be.
	TrustedRoot Digest          `json:"trustedRoot,omitempty"`
	Identities  []ImageIdentity `json:"identities,omitempty"`
}

// ImageKey is a signer who is known by a public key.
type ImageKey struct {
	Name string `json:"name"`
	// Key is a PKIX public key in DER.
	Key []byte `json:"key"`
}

// ImageIdentity is a signer who is known by a certificate's issuer and subject,
// both exact.
type ImageIdentity struct {
	Issuer  string `json:"issuer"`
	Subject string `json:"subject"`
}

// Digest returns the SHA-384 of the canonical form, by which policies name signers.
func (s ImageSigners) Digest() (Digest, error) {
	if err := s.validate(); err != nil {
		return "", err
	}
	b, err := Canonical(s)
	if err != nil {
		return "", err
	}
	return Sum(b), nil
}

// validate refuses a list of nobody: a profile without signers has none at all.
func (s ImageSigners) validate() error {
	switch {
	case len(s.Keys) == 0 && len(s.Identities) == 0:
		return errors.New("image signers: none is named")
	case len(s.Keys) > MaxImageSigners || len(s.Identities) > MaxImageSigners:
		return fmt.Errorf("image signers: more than %d", MaxImageSigners)
	case (len(s.Identities) > 0) != (s.TrustedRoot.Bytes() != nil):
		return errors.New("image signers: identities and the trusted root of their certificates come together")
	}
	for _, k := range s.Keys {
		if k.Name == "" || len(k.Key) == 0 {
			return errors.New("image signers: a key needs a name and its bytes")
		}
	}
	for _, id := range s.Identities {
		if id.Issuer == "" || id.Subject == "" {
			return errors.New("image signers: an identity needs issuer and subject")
		}
	}
	return nil
}

// validateImage wants a signature where the profile names who must have signed, and
// none where it does not.
func (s Sandbox) validateImage() error {
	switch {
	case s.ImageSBOM != "" && s.ImageSBOM.Bytes() == nil:
		return errors.New("sandbox with a bill of materials that is no digest")
	case s.Profile.ImageSigners == nil && s.ImageSignature != "":
		return errors.New("sandbox has a signature of its image, and its profile names no signer")
	case s.Profile.ImageSigners == nil:
		return nil
	case s.ImageSignature.Bytes() == nil:
		return errors.New("sandbox has no signature of its image, and its profile names signers")
	}
	return s.Profile.ImageSigners.validate()
}

// HasContainer reports whether sandboxes of this profile run an image.
func (p Profile) HasContainer() bool { return !p.none() }
