package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/sign"
	"github.com/sigstore/sigstore-go/pkg/testing/ca"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/coffer-run/coffer/attest/check"
)

const (
	alice, issuer = "alice@example.com", "https://issuer.example.com"
	payloadType   = "application/vnd.in-toto+json"
)

// signer is a key pair that signs as cosign does.
type signer struct{ *sign.EphemeralKeypair }

func newSigner(t *testing.T) signer {
	t.Helper()
	k, err := sign.NewEphemeralKeypair(nil)
	if err != nil {
		t.Fatal(err)
	}
	return signer{k}
}

func (s signer) key(t *testing.T, name string) Key {
	t.Helper()
	p, err := s.GetPublicKeyPem()
	if err != nil {
		t.Fatal(err)
	}
	return Key{Name: name, PEM: []byte(p)}
}

// statement is an in-toto statement of a type about a digest.
func statement(t *testing.T, predicate, digest string) []byte {
	t.Helper()
	b, err := json.Marshal(map[string]any{
		"_type": "https://in-toto.io/Statement/v1", "predicateType": predicate, "predicate": map[string]any{},
		"subject": []any{map[string]any{"name": "", "digest": map[string]string{"sha256": strings.TrimPrefix(digest, "sha256:")}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (s signer) bundle(t *testing.T, content sign.Content) []byte {
	t.Helper()
	b, err := sign.Bundle(content, s, sign.BundleOptions{Context: context.Background()})
	if err != nil {
		t.Fatal(err)
	}
	out, err := protojson.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// sign makes what cosign makes: a statement about the digest.
func (s signer) sign(t *testing.T, digest string) []byte {
	t.Helper()
	return s.bundle(t, &sign.DSSEData{Data: statement(t, signPredicate, digest), PayloadType: payloadType})
}

func sum(b string) string {
	h := sha256.Sum256([]byte(b))
	return "sha256:" + hex.EncodeToString(h[:])
}

func trust(t *testing.T, keys ...Key) *Trust {
	t.Helper()
	tr, err := NewTrust(keys, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

// wantRefusal wants the one check, and a word of what was found.
func wantRefusal(t *testing.T, err error, word string) {
	t.Helper()
	var refusal *check.Refusal
	if !errors.As(err, &refusal) {
		t.Fatalf("got %v, want a refusal", err)
	}
	for _, f := range refusal.Checks {
		if f.ID != "image.signature" {
			t.Errorf("check %q failed, want image.signature", f.ID)
		}
	}
	if !strings.Contains(err.Error(), word) {
		t.Errorf("refusal %q does not say %q", err, word)
	}
}

func TestKeySignatures(t *testing.T) {
	releases, stranger := newSigner(t), newSigner(t)
	image := sum("manifest")
	tr := trust(t, newSigner(t).key(t, "spare"), releases.key(t, "releases"))

	for name, b := range map[string][]byte{
		"a statement, as cosign signs": releases.sign(t, image),
		"the manifest itself":          releases.bundle(t, &sign.PlainData{Data: []byte("manifest")}),
	} {
		got, err := tr.Verify(image, [][]byte{stranger.sign(t, image), b})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if got.Signer != "key releases" || string(got.Bundle) != string(b) {
			t.Errorf("%s: signer %q and another bundle", name, got.Signer)
		}
	}

	tampered := releases.sign(t, image)
	i := strings.Index(string(tampered), `"sig":"`) + len(`"sig":"`) + 20
	tampered[i] ^= 1
	tests := map[string]struct {
		digest  string
		bundles [][]byte
		word    string
	}{
		"unsigned":                           {image, nil, "no signature"},
		"signed by a stranger":               {image, [][]byte{stranger.sign(t, image)}, "not by key releases"},
		"a signature of another image":       {sum("moved"), [][]byte{releases.sign(t, image)}, "digest"},
		"the bytes of another image":         {image, [][]byte{releases.bundle(t, &sign.PlainData{Data: []byte("other")})}, "signature"},
		"a changed signature":                {image, [][]byte{tampered}, "signature"},
		"a scan's statement, no signature":   {image, [][]byte{releases.bundle(t, &sign.DSSEData{Data: statement(t, "https://cosign.sigstore.dev/attestation/vuln/v1", image), PayloadType: payloadType})}, "which is no signature"},
		"a statement that is no in-toto one": {image, [][]byte{releases.bundle(t, &sign.DSSEData{Data: statement(t, signPredicate, image), PayloadType: "text/plain"})}, "payload"},
		"not a bundle":                       {image, [][]byte{[]byte("{}")}, "not a Sigstore bundle"},
		"a bundle without end":               {image, [][]byte{make([]byte, MaxBundle+1)}, "at most"},
		"too many":                           {image, make([][]byte, MaxBundles+1), "at most 16"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := tr.Verify(tt.digest, tt.bundles)
			wantRefusal(t, err, tt.word)
		})
	}
}

func TestNobodyIsTrusted(t *testing.T) {
	s := newSigner(t)
	image := sum("manifest")
	_, err := new(Trust).Verify(image, [][]byte{s.sign(t, image)})
	wantRefusal(t, err, "nobody")
	for name, make := range map[string]func() (*Trust, error){
		"nothing":                     func() (*Trust, error) { return NewTrust(nil, nil, nil) },
		"a key without a name":        func() (*Trust, error) { return NewTrust([]Key{s.key(t, "")}, nil, nil) },
		"a key that is none":          func() (*Trust, error) { return NewTrust([]Key{{Name: "x", PEM: []byte("x")}}, nil, nil) },
		"identities without a root":   func() (*Trust, error) { return NewTrust(nil, nil, []Identity{{issuer, alice}}) },
		"a root without identities":   func() (*Trust, error) { return NewTrust(nil, []byte("{}"), nil) },
		"an identity without issuer":  func() (*Trust, error) { return NewTrust(nil, []byte("{}"), []Identity{{"", alice}}) },
		"an identity without subject": func() (*Trust, error) { return NewTrust(nil, []byte("{}"), []Identity{{issuer, ""}}) },
		"a root that is none":         func() (*Trust, error) { return NewTrust(nil, []byte("x"), []Identity{{issuer, alice}}) },
	} {
		if _, err := make(); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

// withoutCertificateLogs is a private deployment, whose CA feeds no certificate log.
type withoutCertificateLogs struct{ root.TrustedMaterial }

func (withoutCertificateLogs) CTLogs() map[string]*root.TransparencyLog { return nil }

func TestCertificateSignatures(t *testing.T) {
	sigstore, err := ca.NewVirtualSigstore()
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte("manifest"))
	tr := &Trust{allowed: []Identity{{"https://other.example.com", "bob@example.com"}, {issuer, alice}}}
	if err := tr.trustCertificates(withoutCertificateLogs{sigstore}); err != nil {
		t.Fatal(err)
	}
	signed := func(who, by string, at time.Time) *ca.TestEntity {
		e, err := sigstore.SignAtTime(who, by, []byte("manifest"), at)
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	soon := time.Now().Add(5 * time.Minute)
	got, err := tr.signer(digest[:], signed(alice, issuer, soon), onlySigns)
	if err != nil {
		t.Fatal(err)
	}
	if got != alice+" by "+issuer {
		t.Errorf("signer %q", got)
	}

	strangers, err := ca.NewVirtualSigstore()
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := strangers.Sign(alice, issuer, []byte("manifest"))
	if err != nil {
		t.Fatal(err)
	}
	logged := &Trust{allowed: tr.allowed}
	if err := logged.trustCertificates(sigstore); err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		trust  *Trust
		entity *ca.TestEntity
		digest [32]byte
	}{
		"another person":                            {tr, signed("mallory@example.com", issuer, soon), digest},
		"the name at another issuer":                {tr, signed(alice, "https://other.example.com", soon), digest},
		"another image":                             {tr, signed(alice, issuer, soon), sha256.Sum256([]byte("moved"))},
		"another root":                              {tr, foreign, digest},
		"signed when the certificate had run out":   {tr, signed(alice, issuer, time.Now().Add(24*time.Hour)), digest},
		"a certificate that no log has":             {logged, signed(alice, issuer, soon), digest},
		"a certificate where keys only are trusted": {trust(t, newSigner(t).key(t, "releases")), signed(alice, issuer, soon), digest},
	}
	for name, tt := range tests {
		if signer, err := tt.trust.signer(tt.digest[:], tt.entity, onlySigns); err == nil {
			t.Errorf("%s: passes as signed by %s", name, signer)
		}
	}
}

func FuzzVerify(f *testing.F) {
	k, err := sign.NewEphemeralKeypair(nil)
	if err != nil {
		f.Fatal(err)
	}
	p, err := k.GetPublicKeyPem()
	if err != nil {
		f.Fatal(err)
	}
	tr, err := NewTrust([]Key{{Name: "k", PEM: []byte(p)}}, nil, nil)
	if err != nil {
		f.Fatal(err)
	}
	b, err := sign.Bundle(&sign.PlainData{Data: []byte("manifest")}, k, sign.BundleOptions{})
	if err != nil {
		f.Fatal(err)
	}
	seed, err := protojson.Marshal(b)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := tr.Verify(sum("another manifest"), [][]byte{b}); err == nil {
			t.Fatal("a signature of another image passes")
		}
	})
}
