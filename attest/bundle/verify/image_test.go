package verify_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"slices"
	"testing"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/plan"
)

// The evidence speaks of each signature below: what is false is the signature.
func TestImageSignature(t *testing.T) {
	l := newLab(t)
	const image = "sha256:0000000000000000000000000000000000000000000000000000000000000000"
	other := must2(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	signed := func(k *ecdsa.PrivateKey, predicate, image string) []byte {
		return must2(bundletest.SignImage(k, predicate, image))(t)
	}
	honest := signed(l.ImageKey, bundletest.SignPredicate, image)
	hash := make([]byte, sha256.Size)
	message := must2(json.Marshal(map[string]any{"messageSignature": map[string]any{"signature": must2(ecdsa.SignASN1(rand.Reader, l.ImageKey, hash))(t)}}))(t)
	foreign := sha256.Sum256([]byte("another"))
	stranger := must2(json.Marshal(map[string]any{"messageSignature": map[string]any{"signature": must2(ecdsa.SignASN1(rand.Reader, l.ImageKey, foreign[:]))(t)}}))(t)
	const id = "sandbox.image-signature"
	for name, row := range map[string]struct {
		part  any
		fails string
		pass  bool
	}{
		"by the key":                      {part: bundle.ImageSignature{Signer: "key releases", Bundle: honest}, pass: true},
		"of the manifest, by the key":     {part: bundle.ImageSignature{Signer: "key releases", Bundle: message}, pass: true},
		"by an identity":                  {part: bundle.ImageSignature{Signer: "alice@example.com by https://issuer.example.com", Bundle: honest}},
		"of another manifest, by the key": {part: bundle.ImageSignature{Signer: "key releases", Bundle: stranger}, fails: id},
		"by another key":                  {part: bundle.ImageSignature{Signer: "key releases", Bundle: signed(other, bundletest.SignPredicate, image)}, fails: id},
		"by a key of another name":        {part: bundle.ImageSignature{Signer: "key stranger", Bundle: honest}, fails: id},
		"by another identity":             {part: bundle.ImageSignature{Signer: "mallory by https://issuer.example.com", Bundle: honest}, fails: id},
		"of another image":                {part: bundle.ImageSignature{Signer: "key releases", Bundle: signed(l.ImageKey, bundletest.SignPredicate, "sha256:ff"+image[9:])}, fails: id},
		"a scan, no signature":            {part: bundle.ImageSignature{Signer: "key releases", Bundle: signed(l.ImageKey, "https://example.com/scan", image)}, fails: id},
		"no bundle":                       {part: bundle.ImageSignature{Signer: "key releases", Bundle: []byte("{}")}, fails: id},
		"no JSON":                         {part: bundle.ImageSignature{Signer: "key releases", Bundle: []byte("x")}, fails: id},
		"nothing":                         {part: map[string]any{}, fails: id},
		"another form":                    {part: map[string]any{"signer": 7}, fails: id},
	} {
		t.Run(name, func(t *testing.T) {
			b := must2(plan.Canonical(row.part))(t)
			j := newJob(t, l, bundletest.Options{ImageSignature: b})
			r := verify.Verify(build(t, j), pinned(t, l))
			var want []string
			if row.fails != "" {
				want = []string{row.fails}
			}
			if !slices.Equal(failedIDs(r), want) || passes(r, id) != row.pass {
				t.Errorf("failed %v, want %v; passes %t", failedIDs(r), want, passes(r, id))
			}
		})
	}
	t.Run("another than the evidence speaks of", func(t *testing.T) {
		j := newJob(t, l, bundletest.Options{})
		j.Parts[bundle.ImageSignaturePart] = must2(plan.Canonical(bundle.ImageSignature{Signer: "key releases", Bundle: honest}))(t)
		if r := verify.Verify(build(t, j), pinned(t, l)); !slices.Equal(failedIDs(r), []string{id + "-bound"}) {
			t.Errorf("failed %v", failedIDs(r))
		}
	})
	t.Run("left out", func(t *testing.T) {
		j := newJob(t, l, bundletest.Options{})
		delete(j.Parts, bundle.ImageSignaturePart)
		if r := verify.Verify(build(t, j), pinned(t, l)); !slices.Equal(failedIDs(r), []string{id}) {
			t.Errorf("failed %v", failedIDs(r))
		}
	})
}
