package report

import (
	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
)

// maxListed bounds the components that a page lists.
const maxListed = 500

// materials is what an image is made from, by its bill of materials.
type materials struct {
	Signer string
	Digest plan.Digest
	Count  int
	Listed []bundle.Component
	More   int
}

// materialsOf returns nil for a list that cannot be read: the checks say so.
func materialsOf(s bundle.ImageSBOM, digest plan.Digest) *materials {
	read, err := s.SBOM()
	if err != nil {
		return nil
	}
	out := &materials{Signer: s.Signer, Digest: digest, Count: len(read.Components), Listed: read.Components}
	out.Listed = out.Listed[:min(out.Count, maxListed)]
	out.More = out.Count - len(out.Listed)
	return out
}
