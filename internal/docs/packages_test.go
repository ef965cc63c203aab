package docs

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// The map has every package that lies directly in a zone and is for others, by its name in a row of a
// table.
func TestArchitectureNamesThePackages(t *testing.T) {
	page := documents(t)["docs/ARCHITECTURE.md"]
	named := map[string]bool{}
	for _, row := range regexp.MustCompile(`(?m)^\| (.*?) \|`).FindAllStringSubmatch(page, -1) {
		for _, name := range regexp.MustCompile("`([a-z/]+)`").FindAllStringSubmatch(row[1], -1) {
			named[name[1]] = true
		}
	}
	for _, zone := range []string{"attest", "enclave", "runner"} {
		dirs, err := os.ReadDir(filepath.Join(root, zone))
		if err != nil {
			t.Fatal(err)
		}
		found := 0
		for _, d := range dirs {
			if !d.IsDir() || strings.HasSuffix(d.Name(), "test") || d.Name() == "internal" || d.Name() == "testdata" {
				continue
			}
			if found++; !named[d.Name()] {
				t.Errorf("docs/ARCHITECTURE.md has no row for %s/%s", zone, d.Name())
			}
		}
		if found == 0 {
			t.Errorf("%s has no packages", zone)
		}
	}
}
