package remote_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/runner/remote"
)

// verifierKeys are the public keys of a verifier that signs nothing.
func verifierKeys(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := receipt.NewSigner("verifier", key)
	if err != nil {
		t.Fatal(err)
	}
	jwks, err := signer.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	return jwks
}

// What goes into a bundle is what the verifier answered, whole and bounded.
func TestEndorsements(t *testing.T) {
	jwks := verifierKeys(t)
	for situation, row := range map[string]struct {
		status int
		answer string
		want   string
		err    string
	}{
		"some":            {http.StatusOK, `[{"kind":"crl"}]`, `[{"kind":"crl"}]`, ""},
		"none":            {http.StatusOK, `[]`, "", ""},
		"gone":            {http.StatusGone, "without crl vcek/v1/Genoa/crl", "", "without crl vcek/v1/Genoa/crl"},
		"not there":       {http.StatusNotFound, "404", "", "answer 404"},
		"more than a few": {http.StatusOK, strings.Repeat("a", bundle.MaxPart+1), "", "more than"},
	} {
		t.Run(situation, func(t *testing.T) {
			asked := ""
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				b, _ := io.ReadAll(r.Body)
				asked = r.Method + " " + r.URL.Path + " " + string(b)
				w.WriteHeader(row.status)
				_, _ = io.WriteString(w, row.answer)
			}))
			t.Cleanup(s.Close)
			v, err := remote.NewVerifier(remote.Service{URL: s.URL + "/", ID: "verifier", HTTP: s.Client(), JWKS: jwks})
			if err != nil {
				t.Fatal(err)
			}
			got, err := v.Endorsements(t.Context(), "the result")
			if string(got) != row.want || (err != nil) != (row.err != "") || err != nil && !strings.Contains(err.Error(), row.err) {
				t.Errorf("%s, %v", got, err)
			}
			if asked != "POST /endorsements the result" {
				t.Errorf("asked %q", asked)
			}
		})
	}
}

// A verifier that dies in the middle of its answer is away: the job attests again. What it
// says in a whole answer is its word.
func TestHalfAnAnswer(t *testing.T) {
	jwks := verifierKeys(t)
	for situation, row := range map[string]struct {
		status      int
		typ, answer string
		length      int
		away        bool
	}{
		"killed in the middle":       {http.StatusOK, "application/proto", "\x0a\x05he", 4096, true},
		"killed before the body":     {http.StatusOK, "application/proto", "", 4096, true},
		"an error of its own":        {http.StatusInternalServerError, "application/json", `{"code":"unknown","message":"a defect"}`, -1, false},
		"what it makes of the bytes": {http.StatusBadRequest, "application/json", `{"code":"invalid_argument","message":"no evidence"}`, -1, false},
	} {
		t.Run(situation, func(t *testing.T) {
			asked := 0
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				asked++
				w.Header().Set("Content-Type", row.typ)
				if row.length >= 0 {
					w.Header().Set("Content-Length", strconv.Itoa(row.length))
				}
				w.WriteHeader(row.status)
				_, _ = io.WriteString(w, row.answer)
			}))
			t.Cleanup(s.Close)
			v, err := remote.NewVerifier(remote.Service{URL: s.URL, ID: "verifier", HTTP: s.Client(), JWKS: jwks})
			if err != nil {
				t.Fatal(err)
			}
			_, _, err = v.Appraise(t.Context(), []byte("evidence"), receipt.Expect{})
			var u *remote.Unavailable
			if err == nil || errors.As(err, &u) != row.away {
				t.Errorf("%v, away: %v", err, !row.away)
			}
			if asked != 1 {
				t.Errorf("evidence was handed over %d times", asked)
			}
		})
	}
}
