package remote_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"net/http"
	"net/http/httptest"
	"testing"

	"connectrpc.com/connect"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/api/broker/v1/brokerv1connect"
	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/runner/remote"
)

// approvedBroker has one grant over two assets with two approvals.
type approvedBroker struct {
	brokerv1connect.UnimplementedBrokerServiceHandler
}

func (approvedBroker) GetGrant(_ context.Context, r *connect.Request[brokerv1.GetGrantRequest]) (*connect.Response[brokerv1.GetGrantResponse], error) {
	return connect.NewResponse(&brokerv1.GetGrantResponse{
		Grant:     &brokerv1.Grant{Id: r.Msg.GetId(), Assets: []string{"data", "weights"}, Terms: []byte("terms")},
		Approvals: []*brokerv1.Approval{{Document: []byte("counted"), Signature: []byte("one")}, {Document: []byte("expired"), Signature: []byte("two")}},
	}), nil
}

func (approvedBroker) GetAsset(_ context.Context, r *connect.Request[brokerv1.GetAssetRequest]) (*connect.Response[brokerv1.GetAssetResponse], error) {
	a := &brokerv1.Asset{Name: r.Msg.GetName(), Policy: &brokerv1.AssetPolicy{}}
	if a.GetName() == "weights" {
		a.Policy.Approvals = []*brokerv1.ApprovalRule{{Group: "approvers", Count: 1}}
	}
	return connect.NewResponse(&brokerv1.GetAssetResponse{Asset: a}), nil
}

// What the broker answers is told in its words, and is still known by its code.
func TestAnswersInWords(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusNotFound)
		_, _ = w.Write([]byte(`{"code":"not_found","message":"asset \"data\": not found"}`))
	}))
	t.Cleanup(s.Close)
	b, err := remote.NewBroker(remote.Service{URL: s.URL, ID: "broker", HTTP: s.Client(), JWKS: verifierKeys(t)})
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.Asset(t.Context(), "data")
	if err == nil || err.Error() != `look up asset data: asset "data": not found` || connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("%v, code %s", err, connect.CodeOf(err))
	}
}

func TestApproved(t *testing.T) {
	mux := http.NewServeMux()
	mux.Handle(brokerv1connect.NewBrokerServiceHandler(approvedBroker{}))
	srv := httptest.NewServer(mux)
	defer srv.Close()
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := receipt.NewSigner("broker.test", key)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := signer.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	b, err := remote.NewBroker(remote.Service{URL: srv.URL, ID: "broker.test", HTTP: srv.Client(), JWKS: keys})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name    string
		counted []plan.Digest
		want    bundle.Approved
	}{
		{"one of two counted", []plan.Digest{plan.Sum([]byte("counted"))}, bundle.Approved{
			Terms: []byte("terms"), Rules: []bundle.ApprovalRule{{Asset: "weights", Group: "approvers", Count: 1}},
			Approvals: []bundle.SignedApproval{{Document: []byte("counted"), Signature: []byte("one")}},
		}},
		{"by consent alone", nil, bundle.Approved{Terms: []byte("terms")}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := b.Approved(t.Context(), "grant-1", c.counted, nil)
			if err != nil {
				t.Fatal(err)
			}
			have, err := plan.Canonical(got)
			if err != nil {
				t.Fatal(err)
			}
			if want, err := plan.Canonical(c.want); err != nil || string(have) != string(want) {
				t.Errorf("%s, %v; want %s", have, err, want)
			}
		})
	}
}
