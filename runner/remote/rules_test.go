package remote_test

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	verifierv1 "github.com/coffer-run/coffer/attest/api/verifier/v1"
	"github.com/coffer-run/coffer/attest/api/verifier/v1/verifierv1connect"
	"github.com/coffer-run/coffer/runner/remote"
)

// ruler is a verifier that says by which rules it judges.
type ruler struct {
	verifierv1connect.UnimplementedVerifierServiceHandler
	id, rules string
	away      bool
	asked     int
}

func (r *ruler) Challenge(context.Context, *connect.Request[verifierv1.ChallengeRequest]) (*connect.Response[verifierv1.ChallengeResponse], error) {
	r.asked++
	if r.away {
		return nil, connect.NewError(connect.CodeUnavailable, errors.New("away"))
	}
	return connect.NewResponse(&verifierv1.ChallengeResponse{Nonce: "n", VerifierId: r.id, RulesDigest: r.rules}), nil
}

// answers is a transport without a network.
type answers func(*http.Request) *http.Response

func (a answers) RoundTrip(r *http.Request) (*http.Response, error) { return a(r), nil }

// Many jobs ask at once and the verifier once in a while. One that is away has the rules
// that it had.
func TestRulesAreAskedForOnce(t *testing.T) {
	jwks := verifierKeys(t)
	synctest.Test(t, func(t *testing.T) {
		r := &ruler{id: "verifier", rules: "a"}
		_, handler := verifierv1connect.NewVerifierServiceHandler(r)
		client := &http.Client{Transport: answers(func(req *http.Request) *http.Response {
			w := httptest.NewRecorder()
			handler.ServeHTTP(w, req)
			return w.Result()
		})}
		v, err := remote.NewVerifier(remote.Service{URL: "http://verifier", ID: "verifier", HTTP: client, JWKS: jwks})
		if err != nil {
			t.Fatal(err)
		}
		look := func(want string, asked int) {
			t.Helper()
			if got := v.Rules(t.Context(), 10*time.Second); got != want || r.asked != asked {
				t.Errorf("%q, asked %d times; want %q, %d", got, r.asked, want, asked)
			}
		}
		look("a", 1)
		r.rules = "b"
		look("a", 1)
		if _, err := v.Challenge(t.Context()); err != nil {
			t.Fatal(err)
		}
		look("b", 2)
		time.Sleep(11 * time.Second)
		r.away = true
		look("b", 3)
		look("b", 3)
		time.Sleep(11 * time.Second)
		r.away, r.id, r.rules = false, "another", "c"
		look("b", 4)
	})
}
