package bundle_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"

	spdxjson "github.com/spdx/tools-golang/json"
	"github.com/spdx/tools-golang/spdx/v2/common"
	spdx "github.com/spdx/tools-golang/spdx/v2/v2_3"

	"github.com/coffer-run/coffer/attest/bundle"
)

// A document that SPDX's own library writes is read as what it says.
func TestParseSPDX(t *testing.T) {
	image := strings.Repeat("ab", 32)
	doc := &spdx.Document{
		SPDXVersion: spdx.Version, DataLicense: spdx.DataLicense, SPDXIdentifier: "DOCUMENT", DocumentName: "train", DocumentNamespace: "https://example.org/train",
		CreationInfo: &spdx.CreationInfo{Created: "2026-01-02T03:04:05Z", Creators: []common.Creator{{CreatorType: "Tool", Creator: "test"}}},
		Packages: []*spdx.Package{
			{
				PackageSPDXIdentifier: "image", PackageName: "train", PackageVersion: "latest", PackageDownloadLocation: "NOASSERTION", PrimaryPackagePurpose: "CONTAINER",
				PackageChecksums: []common.Checksum{{Algorithm: common.SHA256, Value: image}},
			},
			{
				PackageSPDXIdentifier: "numpy", PackageName: "numpy", PackageVersion: "1.24.2", PackageDownloadLocation: "NOASSERTION", PrimaryPackagePurpose: "LIBRARY",
				PackageChecksums:          []common.Checksum{{Algorithm: common.SHA512, Value: "00"}, {Algorithm: common.SHA3_256, Value: "11"}, {Algorithm: common.MD5, Value: "22"}},
				PackageExternalReferences: []*spdx.PackageExternalReference{{Category: "SECURITY", RefType: "cpe23Type", Locator: "cpe"}, {Category: "PACKAGE-MANAGER", RefType: "purl", Locator: "pkg:deb/debian/python3-numpy@1.24.2"}},
			},
		},
		Relationships: []*spdx.Relationship{
			{RefA: common.MakeDocElementID("", "DOCUMENT"), RefB: common.MakeDocElementID("", "image"), Relationship: "DESCRIBES"},
			{RefA: common.MakeDocElementID("", "image"), RefB: common.MakeDocElementID("", "numpy"), Relationship: "CONTAINS"},
		},
	}
	var out bytes.Buffer
	if err := spdxjson.Write(doc, &out); err != nil {
		t.Fatal(err)
	}
	s, err := bundle.ParseSBOM(out.Bytes())
	want := []bundle.Component{{
		Type: "library", Name: "numpy", Version: "1.24.2", PURL: "pkg:deb/debian/python3-numpy@1.24.2",
		Hashes: []bundle.ComponentHash{{Alg: "SHA-512", Content: "00"}, {Alg: "SHA3-256", Content: "11"}, {Alg: "MD5", Content: "22"}},
	}}
	if err != nil || !s.Of("sha256:"+image) || s.Predicate != bundle.SPDXPredicate || !reflect.DeepEqual(s.Components, want) {
		t.Errorf("of %v, %s: %+v: %v", s.Images, s.Predicate, s.Components, err)
	}
}

func TestSPDXOfAnImage(t *testing.T) {
	image := "sha256:" + strings.Repeat("ab", 32)
	other := "sha256:" + strings.Repeat("cd", 32)
	document := func(describes, packages, relationships string) []byte {
		return fmt.Appendf(nil, `{"spdxVersion":"SPDX-2.3","SPDXID":"SPDXRef-DOCUMENT","documentDescribes":[%s],"packages":[%s],"relationships":[%s]}`, describes, packages, relationships)
	}
	pkg := func(id, version string) string {
		return fmt.Sprintf(`{"SPDXID":%q,"name":"n","versionInfo":%q}`, id, version)
	}
	relation := func(from, kind, to string) string {
		return fmt.Sprintf(`{"spdxElementId":%q,"relationshipType":%q,"relatedSpdxElement":%q}`, from, kind, to)
	}
	for name, row := range map[string]struct {
		document []byte
		of       bool
	}{
		"described":                        {document("", pkg("i", image), relation("SPDXRef-DOCUMENT", "DESCRIBES", "i")), true},
		"described by the document":        {document("", pkg("i", image), relation("i", "DESCRIBED_BY", "SPDXRef-DOCUMENT")), true},
		"in the list of what it describes": {document(`"i"`, pkg("i", image), ""), true},
		"listed, and not described":        {document("", pkg("i", image), ""), false},
		"described by another package":     {document("", pkg("i", image), relation("x", "DESCRIBES", "i")), false},
		"beside another":                   {document(`"i","k"`, pkg("i", image)+","+pkg("k", other), ""), false},
		"contained in another":             {document(`"k"`, pkg("i", image)+","+pkg("k", other), relation("k", "CONTAINS", "i")), false},
		"by a package URL":                 {document(`"i"`, `{"SPDXID":"i","externalRefs":[{"referenceType":"purl","referenceLocator":"pkg:oci/t@sha256%3A`+image[7:]+`"}]}`, ""), true},
		"not at all":                       {document("", "", ""), false},
	} {
		if s, err := bundle.ParseSBOM(row.document); err != nil || s.Of(image) != row.of {
			t.Errorf("an image that is %s: %v: %v", name, s.Images, err)
		}
	}
	for name, bad := range map[string]string{
		"another version":       `{"spdxVersion":"SPDX-3.0"}`,
		"no version":            `{"spdxVersion":""}`,
		"two formats":           `{"spdxVersion":"SPDX-2.3","bomFormat":"CycloneDX"}`,
		"too many packages":     `{"spdxVersion":"SPDX-2.3","packages":[` + strings.Repeat("{},", bundle.MaxComponents) + `{}]}`,
		"packages that are not": `{"spdxVersion":"SPDX-2.3","packages":{}}`,
	} {
		if _, err := bundle.ParseSBOM([]byte(bad)); err == nil {
			t.Errorf("%s is read", name)
		}
	}
	// A statement's type and its document are of one format.
	for predicate, ok := range map[string]bool{bundle.SPDXPredicate: true, bundle.SBOMPredicate: false, "https://slsa.dev/provenance/v1": false} {
		payload, err := json.Marshal(map[string]any{"predicateType": predicate, "predicate": json.RawMessage(document(`"i"`, pkg("i", image), ""))})
		if err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(map[string]any{"dsseEnvelope": map[string]any{"payload": payload}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := (bundle.ImageSBOM{Signer: "key k", Bundle: b}).SBOM(); (err == nil) != ok {
			t.Errorf("a statement of type %s: %v", predicate, err)
		}
	}
}
