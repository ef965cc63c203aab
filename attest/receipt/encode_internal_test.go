package receipt

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"math"
	"reflect"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"github.com/coffer-run/coffer/attest/check"
)

// awkward are texts that encoding/json does not write as they are.
var awkward = []string{"", "plain", "a \"quote\"", `back\slash`, "<b>&amp;</b>", "tab\tand\x00zero", "\u2028\u2029", "not \xff text", "ünïcode", "\x7f"}

// fill sets everything in v, so that a member that is forgotten shows.
func fill(t *testing.T, v reflect.Value, next func() string) {
	switch v.Interface().(type) {
	case *jose.JSONWebKey:
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		v.Set(reflect.ValueOf(&jose.JSONWebKey{Key: &key.PublicKey, KeyID: next(), Algorithm: next(), Use: next()}))
		return
	case map[string]any:
		v.Set(reflect.ValueOf(map[string]any{
			next(): next(), "a": true, "b": -5, "c": uint64(math.MaxUint64), "d": uint32(7), "e": 1.5e300, "f": []string{next()}, "g": []any{next(), 3},
			"h": map[string]string{next(): next(), next(): next()}, "i": map[string]any{next(): map[string]any{}}, "j": nil, "k": map[string]string(nil), "l": json.Number("7"),
		}))
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			fill(t, v.Field(i), next)
		}
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		for range 3 {
			e := reflect.New(v.Type().Elem()).Elem()
			fill(t, e, next)
			v.SetMapIndex(reflect.ValueOf(next()), e)
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 3, 3))
		for i := range v.Len() {
			fill(t, v.Index(i), next)
		}
	case reflect.String:
		v.SetString(next())
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int8, reflect.Int64:
		v.SetInt(-7)
	case reflect.Uint8:
		v.SetUint(200)
	default:
		t.Fatalf("no value for %s", v.Type())
	}
}

// The bytes that are signed are those of encoding/json: nobody else needs to know
// how they were written.
func TestResultsAreWrittenAsByEncodingJSON(t *testing.T) {
	results := map[string]Result{"nothing": {}, "empty": {Submods: map[string]Appraisal{}, Checks: check.List{}, Confirmation: Confirmation{Recipient: []byte{}}}}
	for from, name := range awkward {
		at := from
		var r Result
		fill(t, reflect.ValueOf(&r).Elem(), func() string {
			at++
			return awkward[at%len(awkward)] + awkward[at/len(awkward)%len(awkward)]
		})
		results[name+" first"] = r
	}
	for name, r := range results {
		want, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		got, err := r.appendJSON(nil)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %v\n%s\nwant\n%s", name, err, got, want)
		}
	}
}

// Keys are written without the library where they are those of sessions: with small
// numbers too, which keep their length.
func TestSessionKeysAreWrittenAsByTheLibrary(t *testing.T) {
	short := 0
	for range 1 << 12 {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		point, err := key.PublicKey.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		if point[1] != 0 && point[33] != 0 && short > 0 {
			continue
		}
		short++
		for _, k := range []*jose.JSONWebKey{
			{Key: &key.PublicKey, Algorithm: "ES256", Use: "sig"}, {Key: &key.PublicKey}, {Key: &key.PublicKey, Algorithm: "<", Use: "sig"}, {Key: &key.PublicKey, KeyID: "k", Algorithm: "ES256", Use: "sig"}, nil,
		} {
			want, err := json.Marshal(Confirmation{JWK: k})
			if err != nil {
				t.Fatal(err)
			}
			got, err := Result{Confirmation: Confirmation{JWK: k}}.appendJSON(nil)
			if err != nil || !bytes.Contains(got, want) {
				t.Fatalf("%s\nwant %s", got, want)
			}
		}
	}
	if short < 2 {
		t.Error("no key with a small number")
	}
}

func TestClaimsThatAreNoJSON(t *testing.T) {
	for name, r := range map[string]Result{
		"a number that is none": {Submods: map[string]Appraisal{"cpu0": {Claims: map[string]any{"n": math.NaN()}}}},
		"a function":            {Submods: map[string]Appraisal{"cpu0": {Claims: map[string]any{"l": []any{func() {}}}}}},
		"no key":                {Confirmation: Confirmation{JWK: &jose.JSONWebKey{}}},
	} {
		if b, err := appendClaims(nil, TypeResult, r); err == nil {
			t.Errorf("%s is written as %s", name, b)
		}
	}
}

// Tokens share memory while they are made, and nothing after.
func TestTokensShareNoMemory(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewSigner("verifier", key)
	if err != nil {
		t.Fatal(err)
	}
	first, err := s.Sign(TypeResult, map[string]string{"name": "first", "iss": "verifier"})
	if err != nil {
		t.Fatal(err)
	}
	was := string(bytes.Clone([]byte(first)))
	for range 8 {
		if _, err := s.Sign(TypeResult, map[string]string{"name": "another, which is longer", "iss": "verifier"}); err != nil {
			t.Fatal(err)
		}
	}
	if first != was {
		t.Error("a token changed when another was made")
	}
}

func FuzzWriteResult(f *testing.F) {
	f.Add([]byte(`{"iss":"a","submods":{"cpu0":{"ear.veraison.annotated-evidence":{"a":[1,"<",null,{"b":1e9}]},"coffer.checks":[{"id":"x","found":"\u2028"}]}}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var r Result
		if json.Unmarshal(b, &r) != nil {
			return
		}
		want, failed := json.Marshal(r)
		got, err := r.appendJSON(nil)
		if (err == nil) != (failed == nil) || err == nil && !bytes.Equal(got, want) {
			t.Fatalf("%v, %v\n%s\nwant\n%s", err, failed, got, want)
		}
	})
}
