package runner

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/runner/image"
	"github.com/coffer-run/coffer/runner/image/sign"
	"github.com/coffer-run/coffer/runner/sandbox"
)

// What lies beside an image is found by the kind of file that it is, and kept in a form
// in which it is found again.
func TestFoundBesideAnImage(t *testing.T) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&k.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	trust, err := image.NewTrust([]image.Key{{Name: "releases", PEM: pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})}}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	digest := "sha256:" + strings.Repeat("ab", 32)
	list := []byte(`{"bomFormat":"CycloneDX","metadata":{"component":{"version":"` + digest + `"}}}`)
	signature, err := sign.Image(k, digest)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := sign.SBOM(k, digest, list)
	if err != nil {
		t.Fatal(err)
	}
	spdx := []byte(`{"spdxVersion":"SPDX-2.3","documentDescribes":["i"],"packages":[{"SPDXID":"i","versionInfo":"` + digest + `"}]}`)
	spdxSigned, err := sign.SBOM(k, digest, spdx)
	if err != nil {
		t.Fatal(err)
	}
	img := sandbox.Image{Name: "train", Digest: digest}
	for name, row := range map[string]struct {
		trust *image.Trust
		files map[string][]byte
		// sbom is who signed it, "nobody", or "" for none.
		sbom string
	}{
		"nothing but a signature":       {trust, map[string][]byte{"a.json": signature}, ""},
		"signed":                        {trust, map[string][]byte{"a.json": signature, "b.json": signed, "c.cdx.json": list}, "key releases"},
		"signed by nobody":              {trust, map[string][]byte{"a.json": signature, "c.cdx.json": list}, "nobody"},
		"an image that nobody signed":   {nil, map[string][]byte{"c.cdx.json": list}, "nobody"},
		"SPDX, signed":                  {trust, map[string][]byte{"a.json": signature, "b.json": spdxSigned}, "key releases"},
		"SPDX, signed by nobody":        {nil, map[string][]byte{"c.spdx.json": spdx}, "nobody"},
		"a file that is neither":        {nil, map[string][]byte{"c.txt": list}, ""},
		"a list that is no list at all": {nil, map[string][]byte{"c.cdx.json": signature}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			i := &Images{Trust: row.trust, Signatures: t.TempDir()}
			put := func(files map[string][]byte) {
				t.Helper()
				if err := os.MkdirAll(i.dir(digest), 0o700); err != nil {
					t.Fatal(err)
				}
				for name, b := range files {
					if err := os.WriteFile(filepath.Join(i.dir(digest), name), b, 0o600); err != nil {
						t.Fatal(err)
					}
				}
			}
			look := func() admitted {
				t.Helper()
				f, err := i.kept(digest)
				if err != nil {
					t.Fatal(err)
				}
				a, err := i.admit(img, f)
				if err != nil {
					t.Fatal(err)
				}
				who := ""
				if a.sbom != nil {
					s, err := bundle.Decode[bundle.ImageSBOM](a.sbom)
					if err != nil {
						t.Fatal(err)
					}
					if who = s.Signer; who == "" {
						who = "nobody"
					}
				}
				if who != row.sbom || (a.signature != nil) != (row.trust != nil) {
					t.Errorf("signed by %q, want %q; signature %t", who, row.sbom, a.signature != nil)
				}
				return a
			}
			put(row.files)
			a := look()
			look() // what was remembered says the same
			if err := os.RemoveAll(i.dir(digest)); err != nil {
				t.Fatal(err)
			}
			if err := i.keep(a); err != nil {
				t.Fatal(err)
			}
			look()
		})
	}
	t.Run("remembered under what there was", func(t *testing.T) {
		i := &Images{}
		for n := range 3 * maxSBOMs {
			d := "sha256:" + strings.Repeat("00", 31) + string("0123456789abcdef"[n/16]) + string("0123456789abcdef"[n%16])
			own := []byte(strings.ReplaceAll(string(list), digest, d))
			for range 2 {
				if part, err := i.sbom(d, found{documents: [][]byte{own}}); err != nil || part == nil {
					t.Fatal(d, err)
				}
			}
			if part, err := i.sbom(d, found{documents: [][]byte{list}}); err != nil || part != nil {
				t.Fatalf("%s has another's list: %v", d, err)
			}
			if len(i.sboms) > maxSBOMs {
				t.Fatalf("%d remembered: %v", len(i.sboms), slices.Collect(maps.Keys(i.sboms)))
			}
		}
	})
}
