package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner"
	"github.com/coffer-run/coffer/runner/image"
)

// Images says who must have signed images, and where those come from that the node's
// store lacks.
type Images struct {
	// Signers are those of whom one must have signed; without any, images run that
	// nobody signed.
	Signers *Signers `json:"signers,omitempty"`
	// Signatures is a folder: in it, a folder of Sigstore bundles, *.json, for each
	// image by the hex digits of its digest.
	Signatures string `json:"signatures,omitempty"`
	// Registries lists the hosts, with ports if any, that images are fetched from. The
	// passwords are those of the user's Docker configuration ($DOCKER_CONFIG).
	Registries []string `json:"registries,omitempty"`
	// MaxBytes refuses larger images, compressed; default 32 GiB.
	MaxBytes int64 `json:"maxBytes,omitempty"`
	// MaxUnpackedBytes refuses images whose files take more; default 64 GiB.
	MaxUnpackedBytes int64 `json:"maxUnpackedBytes,omitempty"`
}

// Signers are keys, and identities under a trusted root.
type Signers struct {
	Keys []SignerKey `json:"keys,omitempty"`
	// TrustedRoot is a file: a Sigstore trusted root (JSON).
	TrustedRoot string           `json:"trustedRoot,omitempty"`
	Identities  []image.Identity `json:"identities,omitempty"`
}

// SignerKey is a public key in a file (PEM).
type SignerKey struct {
	Name string `json:"name"`
	File string `json:"file"`
}

const defaultImageBytes = 32 << 30

func (i *Images) validate() error {
	if i == nil {
		return nil
	}
	if i.Signatures != "" && !filepath.IsAbs(i.Signatures) {
		return errors.New("configuration: images: want signatures as an absolute path")
	}
	if i.MaxBytes < 0 || i.MaxUnpackedBytes < 0 {
		return errors.New("configuration: images: maxBytes or maxUnpackedBytes is negative")
	}
	for _, r := range i.Registries {
		if r == "" || strings.ContainsAny(r, "/@ ") {
			return fmt.Errorf("configuration: images: registry %.80q: want a host, or host:port", r)
		}
	}
	return nil
}

// unpacked is the most that one image may take; 0 for the default.
func (i *Images) unpacked() int64 {
	if i == nil {
		return 0
	}
	return i.MaxUnpackedBytes
}

// open reads the signers. Without images nothing is returned.
func (i *Images) open() (*runner.Images, *plan.ImageSigners, error) {
	if i == nil {
		return nil, nil, nil
	}
	out := &runner.Images{
		Signatures: i.Signatures, Hosts: i.Registries,
		Registries: image.Registries{Keychain: authn.DefaultKeychain, MaxBytes: i.MaxBytes},
	}
	if i.MaxBytes == 0 {
		out.Registries.MaxBytes = defaultImageBytes
	}
	if i.Signers == nil {
		return out, nil, nil
	}
	var keys []image.Key
	for _, k := range i.Signers.Keys {
		b, err := os.ReadFile(k.File)
		if err != nil {
			return nil, nil, fmt.Errorf("configuration: images: key %q: %w", k.Name, err)
		}
		keys = append(keys, image.Key{Name: k.Name, PEM: b})
	}
	var root []byte
	if i.Signers.TrustedRoot != "" {
		var err error
		if root, err = os.ReadFile(i.Signers.TrustedRoot); err != nil {
			return nil, nil, fmt.Errorf("configuration: images: %w", err)
		}
	}
	trust, err := image.NewTrust(keys, root, i.Signers.Identities)
	if err != nil {
		return nil, nil, fmt.Errorf("configuration: %w", err)
	}
	out.Trust = trust
	who := trust.Signers()
	return out, &who, nil
}
