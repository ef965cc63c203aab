package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

var digits = strings.Repeat("0a", 32)

func TestBOM(t *testing.T) {
	packages := "ca-certificates_20250419~deb12u2_all.deb sha256:" + digits + "\nlibstdc++6_12.2.0-14+deb12u1_amd64.deb sha256:" + digits + "\nperl_1%3a5.36.0-7_amd64.deb sha256:" + digits + "\n"
	image := v1.Hash{Algorithm: "sha256", Hex: strings.Repeat("1", 64)}
	got, err := bom("numpy", image, []byte(packages))
	if err != nil {
		t.Fatal(err)
	}
	if again, err := bom("numpy", image, []byte(packages)); err != nil || !bytes.Equal(again, got) {
		t.Errorf("twice, it is not the same: %v", err)
	}
	type component struct {
		Type, Name, Version, Purl string
		Hashes                    []struct{ Alg, Content string }
	}
	var b struct {
		BOMFormat, SpecVersion string
		Metadata               struct{ Component component }
		Components             []component
	}
	if err := json.Unmarshal(got, &b); err != nil {
		t.Fatal(err)
	}
	c := b.Metadata.Component
	if b.BOMFormat != "CycloneDX" || b.SpecVersion != "1.6" || c.Type != "container" || c.Version != image.String() || len(c.Hashes) != 1 || c.Hashes[0].Content != image.Hex || c.Hashes[0].Alg != "SHA-256" {
		t.Errorf("%s", got)
	}
	want := []string{
		"pkg:deb/debian/ca-certificates@20250419~deb12u2?arch=all", "pkg:deb/debian/libstdc%2B%2B6@12.2.0-14%2Bdeb12u1?arch=amd64", "pkg:deb/debian/perl@1%3A5.36.0-7?arch=amd64",
	}
	if len(b.Components) != len(want) {
		t.Fatalf("%d components", len(b.Components))
	}
	for i, purl := range want {
		if g := b.Components[i]; g.Purl != purl || len(g.Hashes) != 1 || g.Hashes[0].Content != digits {
			t.Errorf("%+v, want %s", g, purl)
		}
	}
	if b.Components[2].Version != "1:5.36.0-7" {
		t.Errorf("an epoch: %s", b.Components[2].Version)
	}
	for name, line := range map[string]string{
		"no digest": "a_1_all.deb", "a short digest": "a_1_all.deb sha256:00", "no version": "a_all.deb sha256:" + digits, "no package": "a_1_all.rpm sha256:" + digits, "an empty line": "\n",
	} {
		if _, err := bom("x", image, []byte(line)); err == nil {
			t.Errorf("%s passes", name)
		}
	}
}

// The images that were built have one, of themselves.
func TestBOMOfBuiltImages(t *testing.T) {
	dir := os.Getenv("COFFER_IMAGES")
	for _, name := range []string{"numpy", "torch"} {
		digest, err := os.ReadFile(filepath.Join(dir, name+".digest"))
		packages, perr := os.ReadFile(filepath.Join(dir, name+".packages"))
		if dir == "" || err != nil || perr != nil {
			t.Skip("no images were built")
		}
		h, err := v1.NewHash(strings.TrimSpace(string(digest)))
		if err != nil {
			t.Fatal(err)
		}
		b, err := bom(name, h, packages)
		if err != nil {
			t.Fatal(err)
		}
		if n := bytes.Count(b, []byte(`"purl"`)); n != bytes.Count(packages, []byte("\n")) || n < 10 {
			t.Errorf("%s: %d packages", name, n)
		}
	}
}
