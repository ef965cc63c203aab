package remote_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"net/http/httptest"
	"testing"

	"connectrpc.com/connect"

	verifierv1 "github.com/coffer-run/coffer/attest/api/verifier/v1"
	"github.com/coffer-run/coffer/attest/api/verifier/v1/verifierv1connect"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/runner/remote"
)

// saysVerifier answers Check with what a test signs.
type saysVerifier struct {
	verifierv1connect.UnimplementedVerifierServiceHandler
	token string
}

func (s *saysVerifier) Check(context.Context, *connect.Request[verifierv1.CheckRequest]) (*connect.Response[verifierv1.CheckResponse], error) {
	return connect.NewResponse(&verifierv1.CheckResponse{Result: s.token}), nil
}

// What the verifier says of other evidence, or to somebody else, is no answer.
func TestCheckIsOfTheEvidence(t *testing.T) {
	signer := func() *receipt.Signer {
		key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		s, err := receipt.NewSigner("verifier", key)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	ours, others := signer(), signer()
	jwks, err := ours.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	says := &saysVerifier{}
	_, h := verifierv1connect.NewVerifierServiceHandler(says)
	srv := httptest.NewServer(h)
	defer srv.Close()
	v, err := remote.NewVerifier(remote.Service{URL: srv.URL, ID: "verifier", HTTP: srv.Client(), JWKS: jwks})
	if err != nil {
		t.Fatal(err)
	}
	evidence, p := []byte("evidence"), plan.Sum([]byte("plan"))
	for name, c := range map[string]struct {
		by     *receipt.Signer
		typ    string
		change func(*receipt.Result)
		good   bool
	}{
		"as it should be":       {ours, receipt.TypeCheck, func(*receipt.Result) {}, true},
		"another signer's":      {others, receipt.TypeCheck, func(*receipt.Result) {}, false},
		"a broker's result":     {ours, receipt.TypeResult, func(*receipt.Result) {}, false},
		"for another audience":  {ours, receipt.TypeCheck, func(r *receipt.Result) { r.Audience = "x" }, false},
		"of another job":        {ours, receipt.TypeCheck, func(r *receipt.Result) { r.JobID = "x" }, false},
		"of another plan":       {ours, receipt.TypeCheck, func(r *receipt.Result) { r.PlanDigest = plan.Sum(nil) }, false},
		"of other evidence":     {ours, receipt.TypeCheck, func(r *receipt.Result) { r.EvidenceDigest = plan.Sum(nil) }, false},
		"by another verifier's": {ours, receipt.TypeCheck, func(r *receipt.Result) { r.Issuer = "x" }, false},
	} {
		r := receipt.Result{Issuer: "verifier", Audience: "a", JobID: "j", PlanDigest: p, EvidenceDigest: plan.Sum(evidence)}
		c.change(&r)
		if says.token, err = c.by.Sign(c.typ, r); err != nil {
			t.Fatal(err)
		}
		if got, err := v.Check(t.Context(), evidence, "a", "j", p); (err == nil) != c.good || c.good && got.JobID != "j" {
			t.Errorf("%s: %+v %v", name, got, err)
		}
	}
}
