package receipt_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"reflect"
	"testing"

	"github.com/coffer-run/coffer/attest/receipt"
)

// FuzzOpen: of all tokens only those open that were signed, and say what was.
func FuzzOpen(f *testing.F) {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	s, err := receipt.NewSigner(issuer, key)
	if err != nil {
		f.Fatal(err)
	}
	jwks, err := s.JWKS()
	if err != nil {
		f.Fatal(err)
	}
	keys, err := receipt.ParseKeys(issuer, jwks)
	if err != nil {
		f.Fatal(err)
	}
	token, err := s.Sign(receipt.TypeResult, receipt.Result{Issuer: issuer, JobID: "job"})
	if err != nil {
		f.Fatal(err)
	}
	var signed receipt.Result
	if err := keys.Open(receipt.TypeResult, token, &signed); err != nil {
		f.Fatal(err)
	}
	other, err := s.Sign(receipt.TypeRelease, receipt.Release{Issuer: issuer, JobID: "job"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(token)
	f.Add(other)
	f.Fuzz(func(t *testing.T, b string) {
		var got receipt.Result
		if err := keys.Open(receipt.TypeResult, b, &got); err == nil && !reflect.DeepEqual(got, signed) {
			t.Fatalf("opened %+v", got)
		}
	})
}
