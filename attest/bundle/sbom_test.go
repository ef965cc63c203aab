package bundle_test

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
)

func TestParseSBOM(t *testing.T) {
	image := "sha256:" + strings.Repeat("ab", 32)
	s, err := bundle.ParseSBOM(bundletest.SBOM(image))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, c := range s.Components {
		names = append(names, c.Name+" "+c.Version)
	}
	if !s.Of(image) || !slices.Equal(names, []string{"python3 3.11.2-1", "numpy 1.24.2"}) {
		t.Errorf("of %v: %v", s.Images, names)
	}
	for name, row := range map[string]struct {
		component string
		of        bool
	}{
		"by its version":                {`{"version":"` + image + `"}`, true},
		"by a hash":                     {`{"version":"latest","hashes":[{"alg":"SHA-1","content":"00"},{"alg":"SHA-256","content":"` + image[7:] + `"}]}`, true},
		"by a package URL":              {`{"purl":"pkg:oci/train@sha256%3A` + image[7:] + `?arch=amd64"}`, true},
		"by all of them":                {`{"version":"` + image + `","purl":"pkg:oci/train@` + image + `"}`, true},
		"by its name, which is no name": {`{"name":"` + image + `"}`, false},
		"as two images":                 {`{"version":"` + image + `","purl":"pkg:oci/train@sha256:00"}`, false},
		"not at all":                    {`{}`, false},
	} {
		s, err := bundle.ParseSBOM([]byte(`{"bomFormat":"CycloneDX","metadata":{"component":` + row.component + `}}`))
		if err != nil || s.Of(image) != row.of {
			t.Errorf("an image named %s: %v: %v", name, s.Images, err)
		}
	}
	many := `{"bomFormat":"CycloneDX","components":[` + strings.Repeat(`{},`, bundle.MaxComponents) + `{}]}`
	for name, bad := range map[string][]byte{
		"nothing": nil, "no JSON": []byte("x"), "another format": []byte(`{"bomFormat":"SPDX"}`), "too many components": []byte(many),
		"too many within one another": []byte(`{"bomFormat":"CycloneDX","components":[{"components":[` + strings.Repeat(`{},`, bundle.MaxComponents) + `{}]}]}`),
		"too large":                   append(bytes.Repeat([]byte(" "), bundle.MaxImageSBOM), `{"bomFormat":"CycloneDX"}`...),
	} {
		if _, err := bundle.ParseSBOM(bad); err == nil {
			t.Errorf("%s is read", name)
		}
	}
}

// What is read is bounded, whoever wrote it.
func FuzzParseSBOM(f *testing.F) {
	image := "sha256:" + strings.Repeat("ab", 32)
	f.Add([]byte(bundletest.SBOM(image)))
	f.Add([]byte(`{"bomFormat":"CycloneDX","components":[{"components":[{}]}],"metadata":{"component":{"purl":"pkg:oci/x@?"}}}`))
	f.Add([]byte(`{"spdxVersion":"SPDX-2.3","documentDescribes":["a"],"packages":[{"SPDXID":"a","externalRefs":[{"referenceType":"purl","referenceLocator":"pkg:oci/x@?"}]},{}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := bundle.ParseSBOM(b)
		if err != nil {
			return
		}
		if len(s.Components) > bundle.MaxComponents || s.Of("") {
			t.Errorf("%d components of %q", len(s.Components), s.Images)
		}
	})
}
