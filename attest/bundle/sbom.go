package bundle

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// ImageSBOMPart is an ImageSBOM. It is there if and only if the sandbox description
// has its digest.
const ImageSBOMPart Part = "image-sbom"

const (
	// MaxImageSBOM bounds what one bill of materials is made of, in bytes: a document,
	// or a Sigstore bundle with one.
	MaxImageSBOM = 4 << 20
	// MaxComponents bounds the components that a bill of materials lists.
	MaxComponents = 50_000
	// SBOMPredicate is the type of an in-toto statement that has a CycloneDX document as
	// its predicate (in-toto attestation framework, "CycloneDX").
	SBOMPredicate = "https://cyclonedx.org/bom"
)

// ImageSBOM is the image's bill of materials, as the agent found it. It has either
// Signer and Bundle, or Document. Whether the image holds what it lists nobody says.
type ImageSBOM struct {
	// Signer is "key NAME" or "SUBJECT by ISSUER", one of the profile's signers.
	Signer string `json:"signer,omitempty"`
	// Bundle is a Sigstore bundle (JSON, version 0.3): a statement of the type
	// SBOMPredicate or SPDXPredicate about the image.
	Bundle []byte `json:"bundle,omitempty"`
	// Document is CycloneDX or SPDX (JSON) that nobody signed, and that names the image.
	Document []byte `json:"document,omitempty"`
}

// SBOM is what is read of a CycloneDX document (ECMA-424) or an SPDX document.
type SBOM struct {
	// Document is the whole of it.
	Document []byte
	// Predicate is SBOMPredicate or SPDXPredicate: the type of a statement that has it.
	Predicate string
	// Images are the digests, "sha256:<hex>", by which the document names what it is of.
	Images []string
	// Components are those that it lists, nested ones after what they are in.
	Components []Component
}

// Component is one thing in an image, by the document's word.
type Component struct {
	Type    string `json:"type"`
	Name    string `json:"name"`
	Version string `json:"version"`
	// PURL is a package URL; empty if the document has none.
	PURL   string          `json:"purl"`
	Hashes []ComponentHash `json:"hashes"`
}

// ComponentHash is a digest of a component. Alg is as CycloneDX writes it, "SHA-256".
type ComponentHash struct {
	Alg     string `json:"alg"`
	Content string `json:"content"`
}

// SBOM reads the document. No signature is checked.
func (s ImageSBOM) SBOM() (SBOM, error) {
	signed := s.Signer != "" || len(s.Bundle) > 0
	switch {
	case signed && (s.Signer == "" || len(s.Bundle) == 0 || len(s.Document) > 0), !signed && len(s.Document) == 0:
		return SBOM{}, errors.New("bill of materials: want a signer and a bundle, or a document")
	case len(s.Bundle) > MaxImageSBOM || len(s.Document) > MaxImageSBOM:
		return SBOM{}, fmt.Errorf("bill of materials: more than %d bytes", MaxImageSBOM)
	case !signed:
		return ParseSBOM(s.Document)
	}
	var b struct {
		Envelope struct {
			Payload []byte `json:"payload"`
		} `json:"dsseEnvelope"`
	}
	var st struct {
		Type      string          `json:"predicateType"`
		Predicate json.RawMessage `json:"predicate"`
	}
	if err := json.Unmarshal(s.Bundle, &b); err != nil {
		return SBOM{}, errors.New("bill of materials: not a Sigstore bundle")
	}
	if err := json.Unmarshal(b.Envelope.Payload, &st); err != nil || st.Type != SBOMPredicate && st.Type != SPDXPredicate {
		return SBOM{}, fmt.Errorf("bill of materials: not a statement of type %s or %s", SBOMPredicate, SPDXPredicate)
	}
	out, err := ParseSBOM(st.Predicate)
	if err == nil && out.Predicate != st.Type {
		return SBOM{}, fmt.Errorf("bill of materials: a statement of type %.60q with a document of another", st.Type)
	}
	return out, err
}

// component is one as a document has it, with those in it.
type component struct {
	Component

	Components []component `json:"components"`
}

// ParseSBOM reads a CycloneDX document or an SPDX document in JSON.
func ParseSBOM(b []byte) (SBOM, error) {
	if len(b) > MaxImageSBOM {
		return SBOM{}, fmt.Errorf("bill of materials: %d bytes, at most %d are read", len(b), MaxImageSBOM)
	}
	var d struct {
		Format   string  `json:"bomFormat"`
		SPDX     *string `json:"spdxVersion"`
		Metadata struct {
			Component Component `json:"component"`
		} `json:"metadata"`
		Components []component `json:"components"`
	}
	if err := json.Unmarshal(b, &d); err != nil {
		return SBOM{}, fmt.Errorf("bill of materials: %w", err)
	}
	switch {
	case d.SPDX != nil && d.Format != "":
		return SBOM{}, errors.New("bill of materials: CycloneDX and SPDX at once")
	case d.SPDX != nil:
		return parseSPDX(b)
	case d.Format != "CycloneDX":
		return SBOM{}, fmt.Errorf("bill of materials: format %.40q: want CycloneDX or SPDX", d.Format)
	}
	out := SBOM{Document: b, Predicate: SBOMPredicate, Images: d.Metadata.Component.images()}
	if out.Components = flat(nil, d.Components); len(out.Components) > MaxComponents {
		return SBOM{}, fmt.Errorf("bill of materials: more than %d components", MaxComponents)
	}
	return out, nil
}

func flat(out []Component, l []component) []Component {
	for _, c := range l {
		if len(out) > MaxComponents {
			break
		}
		out = flat(append(out, c.Component), c.Components)
	}
	return out
}

// images are the digests by which tools name an image: as its version, among its
// hashes, or in a package URL of type oci, "pkg:oci/NAME@sha256:<hex>?...".
func (c Component) images() []string {
	named := []string{c.Version}
	for _, h := range c.Hashes {
		if h.Alg == "SHA-256" {
			named = append(named, "sha256:"+h.Content)
		}
	}
	if rest, ok := strings.CutPrefix(c.PURL, "pkg:oci/"); ok {
		_, version, _ := strings.Cut(rest, "@")
		version, _, _ = strings.Cut(version, "?")
		named = append(named, strings.ReplaceAll(version, "%3A", ":"))
	}
	named = slices.DeleteFunc(named, func(s string) bool { return !strings.HasPrefix(s, "sha256:") })
	slices.Sort(named)
	return slices.Compact(named)
}

// Of reports whether the document names the image, and no other.
func (s SBOM) Of(image string) bool { return len(s.Images) == 1 && s.Images[0] == image }
