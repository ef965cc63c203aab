package verify

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

// imageSBOM holds the image's bill of materials against the sandbox description,
// which the evidence binds, and a key's signature of it against the profile's
// signers. What it lists is its author's word: nobody compares it with the image.
func (v *verification) imageSBOM(g *check.List) {
	const id, bound, contents = "sandbox.image-sbom", "sandbox.image-sbom-bound", "sandbox.image-contents"
	b, there := v.part(bundle.ImageSBOMPart)
	switch {
	case !v.sb.Profile.HasContainer() && !there:
		return
	case v.sb.ImageSBOM == "" && there:
		g.Fail(bound, "no bill of materials: the evidence speaks of none", "one", "")
		return
	case v.sb.ImageSBOM == "":
		g.Skip(id, "the image came without a bill of materials")
		return
	case !there:
		g.Fail(bound, "the bill of materials of which the evidence speaks", "none that can be relied on", "the record is not complete")
		return
	case !g.Equal(bound, string(v.sb.ImageSBOM), string(plan.Sum(b)), "the evidence speaks of another bill of materials"):
		return
	}
	part, err := bundle.Decode[bundle.ImageSBOM](b)
	var s bundle.SBOM
	if err == nil {
		s, err = part.SBOM()
	}
	switch {
	case err != nil:
		g.Fail(id, "a bill of materials in CycloneDX or SPDX", err.Error(), "")
		return
	case len(s.Images) > 0 && !s.Of(v.sb.Image), len(s.Images) == 0 && part.Signer == "":
		g.Fail(id, "one of "+v.sb.Image, fmt.Sprintf("one of %.200q", strings.Join(s.Images, ", ")), "it tells of another image")
		return
	}
	g.Skip(contents, fmt.Sprintf("%d components, as declared: nobody compared the list with the image", len(s.Components)))
	signers := v.sb.Profile.ImageSigners
	switch name, byKey := strings.CutPrefix(part.Signer, "key "); {
	case part.Signer == "":
		g.Skip(id, "of this image by its own word: nobody signed it")
	case signers == nil:
		g.Fail(id, "no signer: the profile names none", fmt.Sprintf("%.200q", part.Signer), "")
	case byKey:
		err := errors.New("none of the profile's")
		for _, k := range signers.Keys {
			var sb sigstoreBundle
			if k.Name != name {
				continue
			}
			if err = json.Unmarshal(part.Bundle, &sb); err == nil {
				err = sb.states(k.Key, v.sb.Image, s.Predicate)
			}
			if err == nil {
				g.Pass(id, "of this image, signed by key "+name)
				return
			}
		}
		g.Fail(id, "a bill of materials of "+v.sb.Image+", signed by a key of the profile", fmt.Sprintf("key %.80q: %v", name, err), "")
	default:
		for _, who := range signers.Identities {
			if part.Signer == who.Subject+" by "+who.Issuer {
				g.Skip(id, fmt.Sprintf("%.200q signed it, by the measured agent's word: cosign checks the signature", part.Signer))
				return
			}
		}
		g.Fail(id, "a signer of the profile", fmt.Sprintf("%.200q", part.Signer), "")
	}
}
