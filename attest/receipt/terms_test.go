package receipt_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
)

func TestLeaseTerms(t *testing.T) {
	newSigner := func(name string) (*receipt.Signer, []byte) {
		key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		s, err := receipt.NewSigner(name, key)
		if err != nil {
			t.Fatal(err)
		}
		jwks, err := s.JWKS()
		if err != nil {
			t.Fatal(err)
		}
		return s, jwks
	}
	broker, jwks := newSigner("broker.test")
	_, others := newSigner("broker.test")
	terms := broker.LeaseTerms(60)
	digest := plan.Sum([]byte("plan"))
	wrap := func(l receipt.LeaseTerms) ([]byte, error) { return receipt.WrapInfo("g", digest, "a", "r", l) }
	honest, err := wrap(terms)
	if err != nil {
		t.Fatal(err)
	}
	if rel := (receipt.Release{Issuer: "broker.test", LeaseKey: terms.Key, LeaseSeconds: 60}); rel.LeaseTerms() != terms {
		t.Errorf("a receipt says %+v, the broker %+v", rel.LeaseTerms(), terms)
	}

	for name, edit := range map[string]func(*receipt.LeaseTerms){
		"none":      func(l *receipt.LeaseTerms) { *l = receipt.LeaseTerms{} },
		"no broker": func(l *receipt.LeaseTerms) { l.Broker = "" },
		"no key":    func(l *receipt.LeaseTerms) { l.Key = "" },
		"no time":   func(l *receipt.LeaseTerms) { l.Seconds = 0 },
		"too short": func(l *receipt.LeaseTerms) { l.Seconds = 4 },
		"too long":  func(l *receipt.LeaseTerms) { l.Seconds = 3601 },
		"negative":  func(l *receipt.LeaseTerms) { l.Seconds = -60 },
	} {
		l := terms
		edit(&l)
		if _, err := wrap(l); err == nil {
			t.Errorf("%s: a key is wrapped under %+v", name, l)
		}
		if _, err := l.Keys(jwks); err == nil {
			t.Errorf("%s: there are keys for %+v", name, l)
		}
	}
	for name, edit := range map[string]func(*receipt.LeaseTerms){
		"another broker": func(l *receipt.LeaseTerms) { l.Broker = "broker.other" },
		"another key":    func(l *receipt.LeaseTerms) { l.Key = "x" },
		"another time":   func(l *receipt.LeaseTerms) { l.Seconds++ },
	} {
		l := terms
		edit(&l)
		if got, err := wrap(l); err != nil || bytes.Equal(got, honest) {
			t.Errorf("%s: the info is the same (%v)", name, err)
		}
	}

	if _, err := terms.Keys(others); err == nil {
		t.Error("a key set without the key was taken")
	}
	keys, err := terms.Keys(jwks)
	if err != nil {
		t.Fatal(err)
	}
	challenge := make([]byte, receipt.ChallengeSize)
	token, err := receipt.SignLease(broker, receipt.Lease{JobID: "j", Plan: digest, Session: digest, Challenge: challenge, State: receipt.LeaseRunning, Seconds: 60})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := receipt.VerifyLease(keys, token, "j", digest, digest, challenge); err != nil {
		t.Error(err)
	}
}
