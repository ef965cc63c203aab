package verifier_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/verifier"
)

func newSigningKey(t testing.TB, c elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(c, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// Each row is a step that would leave results or nonces that somebody could not
// verify. None changes anything.
func TestRotationRefusesAnOutage(t *testing.T) {
	w := newWorld(t)
	current, next := newSigningKey(t, elliptic.P384()), newSigningKey(t, elliptic.P384())
	signer := func(k *ecdsa.PrivateKey, id string) *receipt.Signer {
		s, err := receipt.NewSigner(id, k)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	pub := func(k ...*ecdsa.PrivateKey) (out []*ecdsa.PublicKey) {
		for _, k := range k {
			out = append(out, &k.PublicKey)
		}
		return out
	}
	secret := func(b byte) []byte { return bytes.Repeat([]byte{b}, verifier.NonceKeySize) }
	v := w.verifier(func(o *verifier.Options) {
		o.Signer, o.Published, o.NonceKeys = signer(current, verifierID), pub(next), [][]byte{secret(1), secret(2)}
	})
	before := string(v.JWKS())
	a, b := signer(current, verifierID), signer(next, verifierID)
	both := [][]byte{secret(1), secret(2)}
	for situation, row := range map[string]struct {
		keys verifier.Keys
		says string
	}{
		"nothing":                          {verifier.Keys{}, "no signing key"},
		"another verifier's signer":        {verifier.Keys{Signer: signer(current, "other"), Published: pub(next), NonceKeys: both}, "is named"},
		"a signer nobody knows":            {verifier.Keys{Signer: signer(newSigningKey(t, elliptic.P384()), verifierID), Published: pub(current, next), NonceKeys: both}, "not published before"},
		"the signer is dropped":            {verifier.Keys{Signer: b, NonceKeys: both}, "would not be published"},
		"no nonce key":                     {verifier.Keys{Signer: b, Published: pub(current)}, "no nonce key"},
		"a nonce key no replica knows":     {verifier.Keys{Signer: a, Published: pub(next), NonceKeys: [][]byte{secret(3), secret(1)}}, "not accepted before"},
		"the nonce key in use is dropped":  {verifier.Keys{Signer: a, Published: pub(next), NonceKeys: [][]byte{secret(2)}}, "just made"},
		"a short nonce key":                {verifier.Keys{Signer: a, Published: pub(next), NonceKeys: [][]byte{secret(1), {1}}}, "nonce key of 1 bytes"},
		"one nonce key twice":              {verifier.Keys{Signer: a, Published: pub(next), NonceKeys: [][]byte{secret(1), secret(1)}}, "twice"},
		"one key twice":                    {verifier.Keys{Signer: a, Published: pub(current), NonceKeys: both}, "twice"},
		"a published key on another curve": {verifier.Keys{Signer: a, Published: pub(newSigningKey(t, elliptic.P256())), NonceKeys: both}, "not on P-384"},
		"keys without end":                 {verifier.Keys{Signer: a, Published: make([]*ecdsa.PublicKey, 8), NonceKeys: both}, "more than 8"},
	} {
		if err := v.Reload(w.with(row.keys)); err == nil || !strings.Contains(err.Error(), row.says) {
			t.Errorf("%s: %v, want something about %q", situation, err, row.says)
		}
		if string(v.JWKS()) != before {
			t.Fatalf("%s: the keys changed", situation)
		}
	}
	if err := v.Reload(w.with(verifier.Keys{Signer: b, Published: pub(current), NonceKeys: [][]byte{secret(2), secret(1)}})); err != nil {
		t.Errorf("the next step: %v", err)
	}
}

// Published keys verify, and sign nothing.
func TestPublishedKeysVerifyCredentials(t *testing.T) {
	w := newWorld(t)
	old := newSigningKey(t, elliptic.P384())
	signer, err := receipt.NewSigner(verifierID, old)
	if err != nil {
		t.Fatal(err)
	}
	w.signer = signer
	w.akCred = w.enrol(w.verifier(nil))
	w.signer = newSigner(t, verifierID)
	w.v = w.verifier(func(o *verifier.Options) { o.Published = []*ecdsa.PublicKey{&old.PublicKey} })
	if _, r := w.attester().collect().appraise(); len(r.AllChecks().Failed()) > 0 {
		t.Errorf("a credential under a published key: %v", r.AllChecks().Failed())
	}
	w.v = w.verifier(nil)
	w.attester().collect().wantRefused("tpm.ak-credential", "policy.tpm.require", "policy.tpm.trust-class")
}

// with returns the options with other keys.
func (w *world) with(k verifier.Keys) verifier.Options {
	o := w.options()
	o.Signer, o.Published, o.NonceKeys = k.Signer, k.Published, k.NonceKeys
	return o
}
