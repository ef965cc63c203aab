package main

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"net/url"
	"strings"

	cyclonedx "github.com/CycloneDX/cyclonedx-go"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// bom is the image's bill of materials: CycloneDX 1.6 (ECMA-424), which names the
// image by the digest of its manifest and the Debian packages that its system layer
// is made from, as their lines have them. The image holds a part of their files. It has
// no time and no number of its own, so that one image has one.
func bom(name string, digest v1.Hash, packages []byte) ([]byte, error) {
	components := []cyclonedx.Component{}
	for line := range strings.Lines(string(packages)) {
		c, err := debian(strings.TrimSpace(line))
		if err != nil {
			return nil, fmt.Errorf("bill of materials of %s: %w", name, err)
		}
		components = append(components, c)
	}
	b := cyclonedx.NewBOM()
	b.SpecVersion, b.JSONSchema = cyclonedx.SpecVersion1_6, "http://cyclonedx.org/schema/bom-1.6.schema.json"
	b.Metadata = &cyclonedx.Metadata{Component: &cyclonedx.Component{
		BOMRef: "image", Type: cyclonedx.ComponentTypeContainer, Name: "coffer.local/" + name, Version: digest.String(),
		Hashes: &[]cyclonedx.Hash{{Algorithm: cyclonedx.HashAlgoSHA256, Value: digest.Hex}},
	}}
	b.Components = &components
	var out bytes.Buffer
	if err := cyclonedx.NewBOMEncoder(&out, cyclonedx.BOMFileFormatJSON).SetPretty(true).SetEscapeHTML(false).EncodeVersion(b, cyclonedx.SpecVersion1_6); err != nil {
		return nil, fmt.Errorf("bill of materials of %s: %w", name, err)
	}
	return out.Bytes(), nil
}

// debian reads "NAME_VERSION_ARCH.deb sha256:HEX". The package URL is that of the
// purl specification's type deb.
func debian(line string) (cyclonedx.Component, error) {
	file, sum, _ := strings.Cut(line, " sha256:")
	parts := strings.Split(strings.TrimSuffix(file, ".deb"), "_")
	if raw, err := hex.DecodeString(sum); err != nil || len(raw) != 32 || len(parts) != 3 || !strings.HasSuffix(file, ".deb") {
		return cyclonedx.Component{}, fmt.Errorf("%.200q names no package", line)
	}
	// apt writes the colon of an epoch as %3a in file names.
	version, err := url.PathUnescape(parts[1])
	if err != nil {
		return cyclonedx.Component{}, fmt.Errorf("%.200q names no package: %w", line, err)
	}
	purl := "pkg:deb/debian/" + url.QueryEscape(parts[0]) + "@" + url.QueryEscape(version) + "?arch=" + parts[2]
	return cyclonedx.Component{
		BOMRef: purl, Type: cyclonedx.ComponentTypeLibrary, Name: parts[0], Version: version, PackageURL: purl,
		Hashes: &[]cyclonedx.Hash{{Algorithm: cyclonedx.HashAlgoSHA256, Value: sum}},
	}, nil
}
