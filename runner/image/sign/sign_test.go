package sign_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/runner/image"
	"github.com/coffer-run/coffer/runner/image/sign"
)

func key(t *testing.T, c elliptic.Curve) (*ecdsa.PrivateKey, image.Key) {
	t.Helper()
	k, err := ecdsa.GenerateKey(c, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&k.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return k, image.Key{Name: "releases", PEM: pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})}
}

func TestImage(t *testing.T) {
	k, public := key(t, elliptic.P256())
	digest := "sha256:" + strings.Repeat("ab", 32)
	b, err := sign.Image(k, digest)
	if err != nil {
		t.Fatal(err)
	}
	trust, err := image.NewTrust([]image.Key{public}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if s, err := trust.Verify(digest, [][]byte{b}); err != nil || s.Signer != "key releases" {
		t.Errorf("signer %q: %v", s.Signer, err)
	}
	if _, err := trust.Verify("sha256:"+strings.Repeat("cd", 32), [][]byte{b}); err == nil {
		t.Error("the signature holds for another image")
	}
	for _, bad := range []string{"", digest[7:], "sha256:ab", "sha384:" + strings.Repeat("ab", 32)} {
		if _, err := sign.Image(k, bad); err == nil {
			t.Errorf("%q is signed", bad)
		}
	}
	other, _ := key(t, elliptic.P384())
	for _, bad := range []*ecdsa.PrivateKey{nil, other} {
		if _, err := sign.Image(bad, digest); err == nil {
			t.Error("a key of another kind signs")
		}
	}
}

func TestSBOM(t *testing.T) {
	k, public := key(t, elliptic.P256())
	digest := "sha256:" + strings.Repeat("ab", 32)
	list := func(image string) []byte {
		return []byte(`{"bomFormat":"CycloneDX","metadata":{"component":{"version":"` + image + `"}}}`)
	}
	b, err := sign.SBOM(k, digest, list(digest))
	if err != nil {
		t.Fatal(err)
	}
	trust, err := image.NewTrust([]image.Key{public}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if s, err := trust.SBOM(digest, [][]byte{b}, nil); err != nil || s == nil || s.Signer != "key releases" {
		t.Errorf("%+v: %v", s, err)
	}
	for name, bad := range map[string][]byte{"of another image": list("sha256:" + strings.Repeat("cd", 32)), "of no image": list(""), "no list": []byte(`{}`), "nothing": nil} {
		if _, err := sign.SBOM(k, digest, bad); err == nil {
			t.Errorf("%s: signed", name)
		}
	}
}
