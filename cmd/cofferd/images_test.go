package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestDocumentedImages(t *testing.T) {
	c := documented(t, "images")
	if err := c.Images.validate(); err != nil {
		t.Fatal(err)
	}
	// Keys that are not there keep the agent from starting.
	if _, _, err := c.Images.open(); err == nil {
		t.Error("a node starts without the keys of its signers")
	}
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&k.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "releases.pub")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	s := &Signers{Keys: []SignerKey{{Name: "releases", File: file}}}
	images, who, err := (&Images{Signers: s}).open()
	if err != nil || images.Trust == nil || len(who.Keys) != 1 || who.Keys[0].Name != "releases" {
		t.Errorf("%+v, %+v: %v", images, who, err)
	}
	if images, who, err := (&Images{}).open(); err != nil || images.Trust != nil || who != nil {
		t.Errorf("without signers: %+v, %+v, %v", images, who, err)
	}
	var none *Images
	if images, who, err := none.open(); images != nil || who != nil || err != nil || none.validate() != nil {
		t.Errorf("without a configuration: %v, %v, %v", images, who, err)
	}
}

func TestImagesAreRefused(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad.pub")
	if err := os.WriteFile(bad, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, i := range map[string]*Images{
		"a relative folder":       {Signatures: "signatures"},
		"a registry with a path":  {Registries: []string{"registry.example.com/team"}},
		"a registry without name": {Registries: []string{""}},
		"a negative size":         {MaxBytes: -1},
		"nobody who signs":        {Signers: &Signers{}},
		"a key that is none":      {Signers: &Signers{Keys: []SignerKey{{Name: "k", File: bad}}}},
		"a key without a file":    {Signers: &Signers{Keys: []SignerKey{{Name: "k", File: filepath.Join(dir, "none")}}}},
		"a root without a file":   {Signers: &Signers{TrustedRoot: filepath.Join(dir, "none")}},
		"a root and no identity":  {Signers: &Signers{TrustedRoot: bad}},
	} {
		err := i.validate()
		if err == nil {
			_, _, err = i.open()
		}
		if err == nil || !strings.Contains(err.Error(), "image") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
