package verify_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/plan"
)

// The evidence speaks of each bill of materials below: what is false is the bill.
func TestImageSBOM(t *testing.T) {
	l := newLab(t)
	image := "sha256:" + strings.Repeat("00", 32)
	another := "sha256:" + strings.Repeat("ff", 32)
	stranger := must2(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	signed := func(k *ecdsa.PrivateKey, predicate string, body json.RawMessage, about string) []byte {
		return must2(bundletest.SignAbout(k, predicate, body, about))(t)
	}
	honest := signed(l.ImageKey, bundle.SBOMPredicate, bundletest.SBOM(image), image)
	nameless := json.RawMessage(`{"bomFormat":"CycloneDX","components":[]}`)
	spdx := func(image string) json.RawMessage {
		return json.RawMessage(`{"spdxVersion":"SPDX-2.3","documentDescribes":["i"],"packages":[{"SPDXID":"i","versionInfo":"` + image + `"},{"SPDXID":"p","name":"python3"}]}`)
	}
	const id = "sandbox.image-sbom"
	by := func(signer string, b []byte) bundle.ImageSBOM { return bundle.ImageSBOM{Signer: signer, Bundle: b} }
	for name, row := range map[string]struct {
		part any
		// outcome is "pass", "fail" or "not checked".
		outcome string
	}{
		"by the key":                                   {by("key releases", honest), "pass"},
		"by the key, and naming no image itself":       {by("key releases", signed(l.ImageKey, bundle.SBOMPredicate, nameless, image)), "pass"},
		"by the key, in SPDX":                          {by("key releases", signed(l.ImageKey, bundle.SPDXPredicate, spdx(image), image)), "pass"},
		"in SPDX, by another key":                      {by("key releases", signed(stranger, bundle.SPDXPredicate, spdx(image), image)), "fail"},
		"in SPDX, of another image":                    {by("key releases", signed(l.ImageKey, bundle.SPDXPredicate, spdx(another), image)), "fail"},
		"in SPDX, stated as CycloneDX":                 {by("key releases", signed(l.ImageKey, bundle.SBOMPredicate, spdx(image), image)), "fail"},
		"in SPDX, by nobody":                           {bundle.ImageSBOM{Document: spdx(image)}, "not checked"},
		"by an identity":                               {by("alice@example.com by https://issuer.example.com", honest), "not checked"},
		"by nobody":                                    {bundle.ImageSBOM{Document: bundletest.SBOM(image)}, "not checked"},
		"by nobody, of another image":                  {bundle.ImageSBOM{Document: bundletest.SBOM(another)}, "fail"},
		"by nobody, of no image":                       {bundle.ImageSBOM{Document: nameless}, "fail"},
		"by another key":                               {by("key releases", signed(stranger, bundle.SBOMPredicate, bundletest.SBOM(image), image)), "fail"},
		"by a key of another name":                     {by("key stranger", honest), "fail"},
		"by another identity":                          {by("mallory by https://issuer.example.com", honest), "fail"},
		"a statement about another image":              {by("key releases", signed(l.ImageKey, bundle.SBOMPredicate, nameless, another)), "fail"},
		"a statement about this image, a list of that": {by("key releases", signed(l.ImageKey, bundle.SBOMPredicate, bundletest.SBOM(another), image)), "fail"},
		"a signature of the image, no list":            {by("key releases", signed(l.ImageKey, bundletest.SignPredicate, bundletest.SBOM(image), image)), "fail"},
		"in another format":                            {by("key releases", signed(l.ImageKey, bundle.SBOMPredicate, json.RawMessage(`{"bomFormat":"SPDX"}`), image)), "fail"},
		"both signed and not":                          {bundle.ImageSBOM{Signer: "key releases", Bundle: honest, Document: bundletest.SBOM(image)}, "fail"},
		"signed, and nothing":                          {bundle.ImageSBOM{Signer: "key releases"}, "fail"},
		"nothing":                                      {map[string]any{}, "fail"},
		"another form":                                 {map[string]any{"signer": 7}, "fail"},
	} {
		t.Run(name, func(t *testing.T) {
			r := verify.Verify(build(t, newJob(t, l, bundletest.Options{ImageSBOM: must2(plan.Canonical(row.part))(t)})), pinned(t, l))
			found := ""
			for _, c := range r.Checks() {
				if c.ID == id {
					found = string(c.Outcome)
				}
			}
			if found != row.outcome || (len(failedIDs(r)) > 0) != (row.outcome == "fail") {
				t.Errorf("%s, want %s; failed %v", found, row.outcome, failedIDs(r))
			}
			if passes(r, "sandbox.image-contents") {
				t.Error("that the image holds what is listed was checked by nobody")
			}
		})
	}
	for name, row := range map[string]struct {
		options bundletest.Options
		change  func(j *bundletest.Job)
		fails   []string
	}{
		"another than the evidence speaks of": {change: func(j *bundletest.Job) {
			j.Parts[bundle.ImageSBOMPart] = must2(plan.Canonical(by("key releases", signed(l.ImageKey, bundle.SBOMPredicate, nameless, image))))(t)
		}, fails: []string{id + "-bound"}},
		"left out": {change: func(j *bundletest.Job) { delete(j.Parts, bundle.ImageSBOMPart) }, fails: []string{id + "-bound"}},
		"put in": {options: bundletest.Options{NoImageSBOM: true}, change: func(j *bundletest.Job) {
			j.Parts[bundle.ImageSBOMPart] = must2(plan.Canonical(by("key releases", honest)))(t)
		}, fails: []string{id + "-bound"}},
		"none": {options: bundletest.Options{NoImageSBOM: true}, change: func(*bundletest.Job) {}},
	} {
		t.Run(name, func(t *testing.T) {
			j := newJob(t, l, row.options)
			row.change(j)
			if r := verify.Verify(build(t, j), pinned(t, l)); !slices.Equal(failedIDs(r), row.fails) || passes(r, id) {
				t.Errorf("failed %v, want %v", failedIDs(r), row.fails)
			}
		})
	}
}
