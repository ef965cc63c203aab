package receipt_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/base64"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/coffer-run/coffer/attest/receipt"
)

// A token that was found good is held in memory by its keys. Nothing that differs
// from it in any way, and nothing but the signature, passes for that.
func TestRememberedTokenIsNotTrustedForMore(t *testing.T) {
	l := newLab(t)
	r := l.result(t)
	token, err := l.signer.Sign(receipt.TypeResult, r)
	if err != nil {
		t.Fatal(err)
	}
	want := receipt.Expect{Audience: "broker.test", AnyJob: true}
	for range 2 {
		v, err := receipt.VerifyResult(l.keys, token, want, l.now)
		if err != nil {
			t.Fatal(err)
		}
		if v.Result().ID != r.ID {
			t.Fatalf("result is %q", v.Result().ID)
		}
	}
	part := strings.Split(token, ".")
	other := r
	other.JobID = "job-2"
	changed, err := l.signer.Sign(receipt.TypeResult, other)
	if err != nil {
		t.Fatal(err)
	}
	rogue, err := receipt.NewSigner(issuer, newKey(t, elliptic.P384()))
	if err != nil {
		t.Fatal(err)
	}
	forged, err := rogue.Sign(receipt.TypeResult, r)
	if err != nil {
		t.Fatal(err)
	}
	signature, err := base64.RawURLEncoding.DecodeString(part[2])
	if err != nil {
		t.Fatal(err)
	}
	signature[95] ^= 1
	for name, spoiled := range map[string]string{
		"its signature under other claims":           part[0] + "." + strings.Split(changed, ".")[1] + "." + part[2],
		"its claims under another of its signatures": part[0] + "." + part[1] + "." + strings.Split(changed, ".")[2],
		"its claims signed by another key":           forged,
		"its header over another key's signature":    part[0] + "." + part[1] + "." + strings.Split(forged, ".")[2],
		"a bit of its signature":                     part[0] + "." + part[1] + "." + base64.RawURLEncoding.EncodeToString(signature),
		"no signature":                               part[0] + "." + part[1] + ".",
		"a part more":                                token + ".",
		"padding":                                    token + "=",
	} {
		for range 2 {
			if _, err := receipt.VerifyResult(l.keys, spoiled, want, l.now); err == nil {
				t.Errorf("%s: accepted", name)
			}
		}
	}

	for name, at := range map[string]time.Time{"expired": time.Unix(r.Expires, 0), "not yet valid": l.now.Add(-receipt.Leeway - time.Second)} {
		if _, err := receipt.VerifyResult(l.keys, token, want, at); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := receipt.VerifyResult(l.keys, token, receipt.Expect{Audience: "another", AnyJob: true}, l.now); err == nil {
		t.Error("for another audience: accepted")
	}
	if err := l.keys.Open("another-type", token, &receipt.Result{}); err == nil {
		t.Error("as another type: accepted")
	}

	// The set of keys that comes after does without the key, or is another
	// issuer's.
	for name, keys := range map[string]receipt.Keys{
		"key withdrawn":  keySet(t, issuer, newKey(t, elliptic.P384())),
		"another issuer": keySet(t, "other.test", l.key),
		"no keys":        {},
	} {
		if _, err := receipt.VerifyResult(keys, token, want, l.now); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func keySet(t *testing.T, of string, key *ecdsa.PrivateKey) receipt.Keys {
	t.Helper()
	s, err := receipt.NewSigner(of, key)
	if err != nil {
		t.Fatal(err)
	}
	jwks, err := s.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	k, err := receipt.ParseKeys(of, jwks)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// A second look at a token verifies no signature.
func BenchmarkOpenAgain(b *testing.B) {
	l := newLab(b)
	token, err := l.signer.Sign("thing", struct {
		Issuer string `json:"iss"`
	}{issuer})
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		var c struct {
			Issuer string `json:"iss"`
		}
		if err := l.keys.Open("thing", token, &c); err != nil {
			b.Fatal(err)
		}
	}
}

// The two numbers of a signature keep their length when they are small.
func TestSignatureOfSmallNumbers(t *testing.T) {
	l := newLab(t)
	claims := struct {
		Issuer string `json:"iss"`
	}{issuer}
	for small := 0; small < 4; {
		token, err := l.signer.Sign("thing", claims)
		if err != nil {
			t.Fatal(err)
		}
		signature, err := base64.RawURLEncoding.DecodeString(token[strings.LastIndex(token, ".")+1:])
		if err != nil || len(signature) != 96 {
			t.Fatalf("signature of %d bytes: %v", len(signature), err)
		}
		if signature[0] != 0 && signature[48] != 0 {
			continue
		}
		small++
		read := claims
		read.Issuer = ""
		if err := l.keys.Open("thing", token, &read); err != nil {
			t.Error(err)
		}
	}
}

// A Signer's header is the one that the library writes, so that its tokens are read
// without the library.
func TestHeaderIsTheLibrarys(t *testing.T) {
	l := newLab(t)
	kid, err := receipt.KeyID(&l.key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES384, Key: jose.JSONWebKey{Key: l.key, KeyID: kid}}, (&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		t.Fatal(err)
	}
	jws, err := s.Sign([]byte("{}"))
	if err != nil {
		t.Fatal(err)
	}
	want, err := jws.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	token, err := l.signer.Sign("t", struct{}{})
	if err != nil {
		t.Fatal(err)
	}
	if header, _, _ := strings.Cut(token, "."); !strings.HasPrefix(want, header+".") {
		t.Errorf("header %s, the library writes %s", header, want)
	}
	if own, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.ES384}); err != nil {
		t.Error(err)
	} else if _, err := own.Verify(&l.key.PublicKey); err != nil {
		t.Error(err)
	}
}

// TestTokensHaveOneEncoding changes how a good token is written, and nothing in it.
func TestTokensHaveOneEncoding(t *testing.T) {
	l := newLab(t)
	token, err := l.signer.Sign(receipt.TypeResult, l.result(t))
	if err != nil {
		t.Fatal(err)
	}
	want := receipt.Expect{Audience: "broker.test", AnyJob: true}
	part := strings.Split(token, ".")
	whole := func(header, body, signature string) string { return header + "." + body + "." + signature }
	// The last letter of a part that does not fill its bits, with the rest of them set.
	slack := func(part string) string {
		const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
		at := strings.IndexByte(letters, part[len(part)-1])
		return part[:len(part)-1] + letters[at|1:][:1]
	}
	body := part[1]
	rows := map[string]string{
		"a line break in the claims":    whole(part[0], body[:4]+"\n"+body[4:], part[2]),
		"a return in the claims":        whole(part[0], body[:4]+"\r"+body[4:], part[2]),
		"a line break in the signature": whole(part[0], body, part[2]+"\n"),
		"padded claims":                 whole(part[0], body+"=", part[2]),
		"a padded signature":            whole(part[0], body, part[2]+"="),
		"a part more":                   token + ".",
		"a part less":                   part[0] + "." + body,
		"a header alone":                part[0],
		"a header and a dot":            part[0] + ".",
		"three parts with nothing":      part[0] + "..",
		"a short signature":             whole(part[0], body, part[2][:124]),
		"a signature twice":             whole(part[0], body, part[2]+part[2]),
		"no signature":                  whole(part[0], body, base64.RawURLEncoding.EncodeToString(make([]byte, 96))),
	}
	if len(body)%4 != 0 && slack(body) != body {
		rows["bits to spare in the claims"] = whole(part[0], slack(body), part[2])
	}
	for name, other := range rows {
		fresh := keySet(t, issuer, l.key)
		for range 2 {
			if _, err := receipt.VerifyResult(fresh, other, want, l.now); err == nil {
				t.Errorf("%s: accepted", name)
			}
		}
	}
	if _, err := receipt.VerifyResult(keySet(t, issuer, l.key), token, want, l.now); err != nil {
		t.Error(err)
	}
}
