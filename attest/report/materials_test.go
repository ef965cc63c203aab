package report

import (
	"fmt"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/plan"
)

func TestPageListsWhatTheImageIsMadeFrom(t *testing.T) {
	l, trust := lab(t)
	list := func(n int) []byte {
		var c []string
		for i := range n {
			c = append(c, fmt.Sprintf(`{"name":"package-%d<b>","version":"1.%d"}`, i, i))
		}
		b, err := plan.Canonical(bundle.ImageSBOM{Document: []byte(`{"bomFormat":"CycloneDX","metadata":{"component":{"version":"sha256:` + strings.Repeat("00", 32) + `"}},"components":[` + strings.Join(c, ",") + `]}`)})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for name, row := range map[string]struct {
		options   bundletest.Options
		has, lack []string
	}{
		"signed": {has: []string{`<a href="#materials">2 components, as declared</a> by key releases`, "pkg:deb/debian/python3@3.11.2-1", "numpy"}, lack: []string{"and not on this page"}},
		"signed by nobody, and long": {
			options: bundletest.Options{ImageSBOM: list(maxListed + 7)},
			has:     []string{"507 components, as declared</a> by nobody who signed it", "package-499&lt;b&gt;", "7 more are in the record, and not on this page."}, lack: []string{"package-500", "<b>"},
		},
		"none": {options: bundletest.Options{NoImageSBOM: true}, has: []string{"The image came without a bill of materials."}, lack: []string{`id="materials"`}},
	} {
		file := job(t, l, row.options, nil)
		page := write(t, verify.Verify(file, trust), file)
		for _, want := range row.has {
			if !strings.Contains(page, want) {
				t.Errorf("%s: the page does not say %q", name, want)
			}
		}
		for _, not := range row.lack {
			if strings.Contains(page, not) {
				t.Errorf("%s: the page has %q", name, not)
			}
		}
	}
}
