package remote_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"testing"

	"connectrpc.com/connect"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/api/broker/v1/brokerv1connect"
	"github.com/coffer-run/coffer/runner/remote"
)

// TestAnswersThatAreTooLarge: of an answer no more is kept than one may be large. The
// rest is read by for as long as a call may take.
func TestAnswersThatAreTooLarge(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/proto")
		block := make([]byte, 1<<20)
		for range 65 {
			if _, err := w.Write(block); err != nil {
				return
			}
		}
	}))
	defer s.Close()
	service := remote.Service{URL: s.URL, ID: "test", HTTP: s.Client(), JWKS: verifierKeys(t)}
	b, err := remote.NewBroker(service)
	if err != nil {
		t.Fatal(err)
	}
	v, err := remote.NewVerifier(service)
	if err != nil {
		t.Fatal(err)
	}
	_, brokerErr := b.Renew(t.Context(), []remote.Renewal{{JobID: "job-1"}})
	_, verifierErr := v.Check(t.Context(), nil, "", "", "")
	for who, err := range map[string]error{"broker": brokerErr, "verifier": verifierErr} {
		if connect.CodeOf(err) != connect.CodeResourceExhausted {
			t.Errorf("%s: %v", who, err)
		}
	}
}

// renewing answers renewals with its own words.
type renewing struct {
	brokerv1connect.UnimplementedBrokerServiceHandler
	words []*brokerv1.Renewed
}

func (r renewing) Renew(context.Context, *connect.Request[brokerv1.RenewRequest]) (*connect.Response[brokerv1.RenewResponse], error) {
	return connect.NewResponse(&brokerv1.RenewResponse{Renewed: r.words}), nil
}

// TestRenewalsOfOthers: what a broker answers for jobs that nobody asked for is not
// heard, and a job that it says nothing of has no lease.
func TestRenewalsOfOthers(t *testing.T) {
	mux := http.NewServeMux()
	mux.Handle(brokerv1connect.NewBrokerServiceHandler(renewing{words: []*brokerv1.Renewed{
		{JobId: "job-2", Lease: "b"}, {JobId: "job-9", Lease: "i"}, {JobId: "", Lease: "none"}, {JobId: "job-3"}, {JobId: "job-4", Lease: "d", Refused: "no"},
	}}))
	s := httptest.NewServer(mux)
	defer s.Close()
	b, err := remote.NewBroker(remote.Service{URL: s.URL, ID: "test", HTTP: s.Client(), JWKS: verifierKeys(t)})
	if err != nil {
		t.Fatal(err)
	}
	got, err := b.Renew(t.Context(), []remote.Renewal{{JobID: "job-1"}, {JobID: "job-2"}, {JobID: "job-3"}, {JobID: "job-4"}})
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 4 || got["job-2"].Token != "b" || got["job-2"].Err != nil {
		t.Errorf("%+v", got)
	}
	for _, job := range []string{"job-1", "job-3", "job-4"} {
		if l := got[job]; l.Token != "" || l.Err == nil {
			t.Errorf("%s: %+v", job, l)
		}
	}
}
