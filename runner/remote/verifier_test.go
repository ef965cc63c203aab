package remote_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/runner/remote"
)

// What goes into a bundle is what the verifier answered, whole and bounded.
func TestEndorsements(t *testing.T) {
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
