package image

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/sigstore/sigstore-go/pkg/verify"

	"github.com/coffer-run/coffer/attest/bundle"
)

// SBOMType and SPDXType are the media types of documents in JSON: CycloneDX (ECMA-424,
// "Media types") and SPDX (as registered with IANA).
const (
	SBOMType = "application/vnd.cyclonedx+json"
	SPDXType = "application/spdx+json"
)

// SBOM chooses the bill of materials of an image, "sha256:<hex>": the first of bundles
// that is a statement by a trusted signer, or else the first of documents, which nobody
// signed, that names this image and no other. Without either it returns nil: no image
// has to have one.
//
// What a list says is its author's word. A list is the image's by the signature or by
// what it says itself; whoever names it in evidence has it fixed from then on.
func (t *Trust) SBOM(digest string, bundles, documents [][]byte) (*bundle.ImageSBOM, error) {
	sum, err := hex.DecodeString(strings.TrimPrefix(digest, "sha256:"))
	if err != nil || len(sum) != 32 || !strings.HasPrefix(digest, "sha256:") {
		return nil, fmt.Errorf("image digest %.100q: want sha256: and 64 hex digits", digest)
	}
	for _, b := range bundles[:min(len(bundles), MaxBundles)] {
		if t == nil || !bytes.Contains(b, []byte("dsseEnvelope")) {
			continue
		}
		signer, err := t.verifyOne(sum, b, bundle.MaxImageSBOM, onlyLists)
		if err != nil {
			continue
		}
		out := &bundle.ImageSBOM{Signer: signer, Bundle: b}
		if s, err := out.SBOM(); err == nil && (len(s.Images) == 0 || s.Of(digest)) {
			return out, nil
		}
	}
	i := slices.IndexFunc(documents, func(d []byte) bool {
		s, err := bundle.ParseSBOM(d)
		return err == nil && s.Of(digest)
	})
	if i < 0 {
		return nil, nil
	}
	return &bundle.ImageSBOM{Document: documents[i]}, nil
}

// onlyLists refuses statements about an image that are no bill of materials.
func onlyLists(r *verify.VerificationResult) error {
	if t := r.Statement.GetPredicateType(); t != bundle.SBOMPredicate && t != bundle.SPDXPredicate {
		return fmt.Errorf("no statement of type %s or %s", bundle.SBOMPredicate, bundle.SPDXPredicate)
	}
	return nil
}
