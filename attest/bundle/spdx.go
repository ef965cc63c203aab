package bundle

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// SPDXPredicate is the type of an in-toto statement that has an SPDX document as its
// predicate (in-toto attestation framework, "SPDX").
const SPDXPredicate = "https://spdx.dev/Document"

// spdxVersions are those of one form (SPDX specification 2.2 and 2.3, JSON).
var spdxVersions = []string{"SPDX-2.2", "SPDX-2.3"}

type spdxDocument struct {
	Version       string             `json:"spdxVersion"`
	ID            string             `json:"SPDXID"`
	Describes     []string           `json:"documentDescribes"`
	Packages      []spdxPackage      `json:"packages"`
	Relationships []spdxRelationship `json:"relationships"`
}

type spdxPackage struct {
	ID        string `json:"SPDXID"`
	Name      string `json:"name"`
	Version   string `json:"versionInfo"`
	Purpose   string `json:"primaryPackagePurpose"`
	Checksums []struct {
		Algorithm string `json:"algorithm"`
		Value     string `json:"checksumValue"`
	} `json:"checksums"`
	References []struct {
		Type    string `json:"referenceType"`
		Locator string `json:"referenceLocator"`
	} `json:"externalRefs"`
}

type spdxRelationship struct {
	From string `json:"spdxElementId"`
	Type string `json:"relationshipType"`
	To   string `json:"relatedSpdxElement"`
}

// parseSPDX reads an SPDX document in JSON: the packages that it describes name the
// image, and the others are its components.
func parseSPDX(b []byte) (SBOM, error) {
	var d spdxDocument
	if err := json.Unmarshal(b, &d); err != nil {
		return SBOM{}, fmt.Errorf("bill of materials: %w", err)
	}
	if !slices.Contains(spdxVersions, d.Version) {
		return SBOM{}, fmt.Errorf("bill of materials: version %.40q: want one of %s", d.Version, strings.Join(spdxVersions, ", "))
	}
	if len(d.Packages) > MaxComponents {
		return SBOM{}, fmt.Errorf("bill of materials: more than %d components", MaxComponents)
	}
	described := map[string]bool{}
	for _, id := range d.Describes {
		described[id] = true
	}
	for _, r := range d.Relationships {
		switch {
		case r.Type == "DESCRIBES" && r.From == d.ID:
			described[r.To] = true
		case r.Type == "DESCRIBED_BY" && r.To == d.ID:
			described[r.From] = true
		}
	}
	out := SBOM{Document: b, Predicate: SPDXPredicate}
	for _, p := range d.Packages {
		c := p.component()
		if described[p.ID] {
			out.Images = append(out.Images, c.images()...)
		} else {
			out.Components = append(out.Components, c)
		}
	}
	slices.Sort(out.Images)
	out.Images = slices.Compact(out.Images)
	return out, nil
}

// component is the package in CycloneDX's words.
func (p spdxPackage) component() Component {
	c := Component{Type: strings.ToLower(p.Purpose), Name: p.Name, Version: p.Version, Hashes: []ComponentHash{}}
	for _, h := range p.Checksums {
		alg := h.Algorithm
		if rest, ok := strings.CutPrefix(alg, "SHA"); ok && !strings.Contains(rest, "-") {
			alg = "SHA-" + rest
		}
		c.Hashes = append(c.Hashes, ComponentHash{Alg: alg, Content: h.Value})
	}
	for _, r := range p.References {
		if r.Type == "purl" {
			c.PURL = r.Locator
			break
		}
	}
	return c
}
