package keys

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/receipt"
)

func TestDataKeyIsRedacted(t *testing.T) {
	raw := bytes.Repeat([]byte{0xa7}, DataKeySize)
	k, err := NewDataKey(raw)
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("key", "key", k, "in", struct{ K *DataKey }{k})
	out := log.String()
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%d", "%q"} {
		out += fmt.Sprintf(verb, k)
	}
	if j, err := json.Marshal(k); err == nil {
		t.Errorf("encoded as JSON: %s", j)
	}
	for _, leak := range []string{hex.EncodeToString(raw[:4]), "167", string(raw[:4])} {
		if strings.Contains(out, leak) {
			t.Errorf("output holds %q: %s", leak, out)
		}
	}
}

func TestDataKeyRefusesWhenEmpty(t *testing.T) {
	var zero DataKey
	if _, err := zero.Derive(nil, "x", 32); err == nil {
		t.Error("zero key derives")
	}
	if zero.Equal(&zero) {
		t.Error("zero key equals itself")
	}
	k := GenerateDataKey()
	inner := k.b
	k.Destroy()
	if !bytes.Equal(inner, make([]byte, DataKeySize)) {
		t.Error("destroyed key was not overwritten")
	}
	if _, err := k.Derive(nil, "x", 32); err == nil {
		t.Error("destroyed key derives")
	}
	if _, _, err := k.Wrap(nil, nil, nil); err == nil {
		t.Error("destroyed key wraps")
	}
	for _, n := range []int{0, 16, 31, 33} {
		if _, err := NewDataKey(make([]byte, n)); err == nil {
			t.Errorf("key of %d bytes accepted", n)
		}
	}
}

func TestRecipientOpensOnlyWhatWasMeantForIt(t *testing.T) {
	r, err := GenerateRecipient()
	if err != nil {
		t.Fatal(err)
	}
	other, err := GenerateRecipient()
	if err != nil {
		t.Fatal(err)
	}
	k := GenerateDataKey()
	enc, ct, err := k.Wrap(r.Public(), []byte("info"), []byte("asset"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := r.Open(enc, ct, []byte("info"), []byte("asset"))
	if err != nil || !got.Equal(k) {
		t.Fatalf("own key does not open: %v", err)
	}
	flip := func(b []byte) []byte { c := bytes.Clone(b); c[len(c)/2] ^= 1; return c }
	for name, open := range map[string]func() (*DataKey, error){
		"another recipient":  func() (*DataKey, error) { return other.Open(enc, ct, []byte("info"), []byte("asset")) },
		"another release":    func() (*DataKey, error) { return r.Open(enc, ct, []byte("infp"), []byte("asset")) },
		"another asset":      func() (*DataKey, error) { return r.Open(enc, ct, []byte("info"), []byte("asseu")) },
		"changed ciphertext": func() (*DataKey, error) { return r.Open(enc, flip(ct), []byte("info"), []byte("asset")) },
		"changed enc":        func() (*DataKey, error) { return r.Open(flip(enc), ct, []byte("info"), []byte("asset")) },
		"empty":              func() (*DataKey, error) { return r.Open(nil, nil, []byte("info"), []byte("asset")) },
		"destroyed":          func() (*DataKey, error) { r.Destroy(); return r.Open(enc, ct, []byte("info"), []byte("asset")) },
	} {
		if name == "destroyed" {
			continue
		}
		if _, err := open(); err == nil {
			t.Errorf("%s: opened", name)
		}
	}
	r.Destroy()
	if _, err := r.Open(enc, ct, []byte("info"), []byte("asset")); err == nil {
		t.Error("destroyed recipient opened")
	}
}

func TestSessionSignsOnlyWhatItKnows(t *testing.T) {
	s, err := GenerateSession()
	if err != nil {
		t.Fatal(err)
	}
	req, err := receipt.ReleaseRequest{Version: receipt.RequestVersion, Broker: "b", Grant: "g", Attempt: 1, ResultID: "r", Asset: "a"}.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	sig, err := s.SignRelease(req)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := x509.ParsePKIXPublicKey(s.Public())
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(req)
	if !ecdsa.VerifyASN1(pub.(*ecdsa.PublicKey), sum[:], sig) {
		t.Error("signature does not verify")
	}
	refused := map[string][]byte{
		"empty":           nil,
		"white space":     append([]byte(" "), req...),
		"a statement":     []byte(`{"version":"coffer.run/bundle/v1"}`),
		"an extra field":  bytes.Replace(req, []byte(`{`), []byte(`{"a":1,`), 1),
		"a label":         labelled(LabelStatement, req),
		"a missing grant": bytes.Replace(req, []byte(`"g"`), []byte(`""`), 1),
		"too long":        append(bytes.Repeat([]byte(" "), receipt.MaxRequest), req...),
	}
	for name, b := range refused {
		if _, err := s.SignRelease(b); err == nil {
			t.Errorf("%s: signed as a release request", name)
		}
	}

	st := []byte(`{"a":1}`)
	sig, err = s.SignStatement(st)
	if err != nil {
		t.Fatal(err)
	}
	if err := VerifyLabelled(s.Public(), LabelStatement, st, sig); err != nil {
		t.Error(err)
	}
	if err := VerifyLabelled(s.Public(), receipt.CheckpointLabel, st, sig); err == nil {
		t.Error("a statement passes for a checkpoint")
	}
	sum = sha256.Sum256(st)
	if ecdsa.VerifyASN1(pub.(*ecdsa.PublicKey), sum[:], sig) {
		t.Error("a statement passes for a release request")
	}
	for name, b := range map[string][]byte{"empty": nil, "not JSON": []byte("x"), "not canonical": []byte(`{"b":1,"a":2}`), "too long": append([]byte("1"), bytes.Repeat([]byte("0"), MaxStatement)...)} {
		if _, err := s.SignStatement(b); err == nil {
			t.Errorf("%s: signed as a statement", name)
		}
	}
	s.Destroy()
	if _, err := s.SignStatement(st); err == nil {
		t.Error("destroyed session signs")
	}
}
