package serve_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/api/refusal"
	verifierv1 "github.com/coffer-run/coffer/attest/api/verifier/v1"
	"github.com/coffer-run/coffer/attest/api/verifier/v1/verifierv1connect"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/verifier"
	"github.com/coffer-run/coffer/attest/verifier/serve"
	"github.com/coffer-run/coffer/attest/vtpm/vtpmtest"
)

type fixture struct {
	url string
	tpm *vtpmtest.TPM
	log *lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

var vendor = sync.OnceValues(func() (*simulate.Vendor, error) { return simulate.New(simulate.Options{GPUs: -1, Fast: true}) })

func newFixture(t *testing.T) *fixture {
	t.Helper()
	v, err := vendor()
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{log: &lockedBuffer{}}
	if f.tpm, err = vtpmtest.New(time.Now()); err != nil {
		t.Fatal(err)
	}
	anchors, err := v.Anchors().WithEKRoots(anchor.Software, f.tpm.Root)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := receipt.NewSigner("verifier", key)
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Named("simulation")
	if err != nil {
		t.Fatal(err)
	}
	ver, err := verifier.New(verifier.Options{
		ID: "verifier", Anchors: anchors, Policies: []policy.Policy{p}, Signer: signer,
		NonceKeys: [][]byte{make([]byte, verifier.NonceKeySize)}, Clock: time.Now, Build: "test",
	})
	if err != nil {
		t.Fatal(err)
	}
	h, err := serve.Handler(serve.Options{
		Verifier: ver, Log: slog.New(slog.NewJSONHandler(f.log, nil)),
		Identify: func(r *http.Request) (role, name string, err error) {
			role = r.Header.Get("Test-Role")
			if role == "" {
				return "", "", errors.New("no certificate")
			}
			return role, "node-1", nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	f.url = s.URL
	return f
}

// as is a client whose certificate names a role.
func (f *fixture) as(role string) verifierv1connect.VerifierServiceClient {
	return verifierv1connect.NewVerifierServiceClient(http.DefaultClient, f.url, connect.WithInterceptors(connect.UnaryInterceptorFunc(func(next connect.UnaryFunc) connect.UnaryFunc {
		return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
			if role != "" {
				req.Header().Set("Test-Role", role)
			}
			return next(ctx, req)
		}
	})))
}

func TestHandlerNeedsEverything(t *testing.T) {
	if h, err := serve.Handler(serve.Options{}); err == nil || h != nil {
		t.Fatal("made a handler of nothing")
	}
}

func TestEnrolmentOverTheWire(t *testing.T) {
	f := newFixture(t)
	c := f.as("agent")
	begun, err := c.BeginEnrolment(t.Context(), connect.NewRequest(&verifierv1.BeginEnrolmentRequest{EkChain: f.tpm.EKChain, AkPublic: f.tpm.AKPublic}))
	if err != nil {
		t.Fatal(err)
	}
	secret, err := f.tpm.Activate(begun.Msg.GetCredentialBlob(), begun.Msg.GetEncryptedSecret())
	if err != nil {
		t.Fatal(err)
	}
	done, err := c.FinishEnrolment(t.Context(), connect.NewRequest(&verifierv1.FinishEnrolmentRequest{Enrolment: begun.Msg.GetEnrolment(), Secret: secret}))
	if err != nil || done.Msg.GetAkCredential() == "" {
		t.Fatalf("%v", err)
	}

	// A refusal comes through with its checks.
	secret[0] ^= 1
	_, err = c.FinishEnrolment(t.Context(), connect.NewRequest(&verifierv1.FinishEnrolmentRequest{Enrolment: begun.Msg.GetEnrolment(), Secret: secret}))
	r, ok := refusal.Decode(err)
	if !ok || r.Stage != "enrol" || r.Checks[0].ID != "enrolment.secret" {
		t.Fatalf("got %v", err)
	}
	if strings.Contains(f.log.String(), fmt.Sprintf("%x", secret)) {
		t.Error("the log holds a secret")
	}
}

func TestRoles(t *testing.T) {
	f := newFixture(t)
	calls := map[string]func(verifierv1connect.VerifierServiceClient) error{
		"challenge": func(c verifierv1connect.VerifierServiceClient) error {
			_, err := c.Challenge(t.Context(), connect.NewRequest(&verifierv1.ChallengeRequest{}))
			return err
		},
		"begin": func(c verifierv1connect.VerifierServiceClient) error {
			_, err := c.BeginEnrolment(t.Context(), connect.NewRequest(&verifierv1.BeginEnrolmentRequest{}))
			return err
		},
		"finish": func(c verifierv1connect.VerifierServiceClient) error {
			_, err := c.FinishEnrolment(t.Context(), connect.NewRequest(&verifierv1.FinishEnrolmentRequest{}))
			return err
		},
		"appraise": func(c verifierv1connect.VerifierServiceClient) error {
			_, err := c.Appraise(t.Context(), connect.NewRequest(&verifierv1.AppraiseRequest{}))
			return err
		},
	}
	for name, call := range calls {
		for _, role := range []string{"owner", "engineer", "operator", "auditor", "broker", "verifier", "root"} {
			r, ok := refusal.Decode(call(f.as(role)))
			if !ok || r.Checks[0].ID != "role" {
				t.Errorf("%s as %s is not refused by role", name, role)
			}
		}
		if err := call(f.as("")); connect.CodeOf(err) != connect.CodeUnauthenticated {
			t.Errorf("%s without an identity: %v", name, err)
		}
		if r, ok := refusal.Decode(call(f.as("agent"))); ok && r.Checks[0].ID == "role" {
			t.Errorf("%s as agent is refused by role", name)
		}
	}
	for _, role := range []string{"agent", "broker", "auditor"} {
		k, err := f.as(role).Keys(t.Context(), connect.NewRequest(&verifierv1.KeysRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := receipt.ParseKeys("verifier", k.Msg.GetJwks()); err != nil {
			t.Error(err)
		}
	}
}

func TestChallengeOverTheWire(t *testing.T) {
	f := newFixture(t)
	n, err := f.as("agent").Challenge(t.Context(), connect.NewRequest(&verifierv1.ChallengeRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	if n.Msg.GetNonce() == "" || n.Msg.GetVerifierId() != "verifier" || n.Msg.GetExpiresUnix() <= time.Now().Unix() {
		t.Errorf("challenge %+v", n.Msg)
	}
}

func TestMalformedEvidence(t *testing.T) {
	f := newFixture(t)
	marker := "evidence-that-must-not-be-logged"
	_, err := f.as("agent").Appraise(t.Context(), connect.NewRequest(&verifierv1.AppraiseRequest{Evidence: []byte(marker), Audience: "broker"}))
	if connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Fatalf("got %v", err)
	}
	if strings.Contains(f.log.String(), marker) {
		t.Error("the log holds evidence")
	}
	if !strings.Contains(f.log.String(), "agent/node-1") {
		t.Error("the log does not say who called")
	}
}

func TestRequestsAreBounded(t *testing.T) {
	f := newFixture(t)
	c := f.as("agent")
	_, err := c.Appraise(t.Context(), connect.NewRequest(&verifierv1.AppraiseRequest{Evidence: make([]byte, serve.MaxMessage+1), Audience: "broker"}))
	if code := connect.CodeOf(err); code != connect.CodeResourceExhausted && code != connect.CodeUnknown && code != connect.CodeInvalidArgument {
		t.Errorf("an oversized request: %v", err)
	}
	// A small body that decompresses to a large one is bounded by the large one.
	var body bytes.Buffer
	z := gzip.NewWriter(&body)
	_, _ = z.Write([]byte(`{"evidence":"`))
	_, _ = z.Write(bytes.Repeat([]byte("A"), 64<<20))
	_, _ = z.Write([]byte(`"}`))
	_ = z.Close()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, f.url+verifierv1connect.VerifierServiceAppraiseProcedure, &body)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Content-Encoding", "gzip")
	req.Header.Set("Test-Role", "agent")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close() //nolint:errcheck // a test
	if b, _ := io.ReadAll(resp.Body); resp.StatusCode == http.StatusOK || !bytes.Contains(b, []byte("resource_exhausted")) {
		t.Errorf("a decompression bomb: %s %s", resp.Status, b)
	}
}

// Callers that send half a request hold no turn: others are answered.
func TestSlowCallersHoldNoTurn(t *testing.T) {
	f := newFixture(t)
	addr := strings.TrimPrefix(f.url, "http://")
	for range 64 {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		_, _ = fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: x\r\nTest-Role: agent\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n{", verifierv1connect.VerifierServiceAppraiseProcedure)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if _, err := f.as("agent").Challenge(ctx, connect.NewRequest(&verifierv1.ChallengeRequest{})); err != nil {
		t.Fatal(err)
	}
}

func TestPublicPages(t *testing.T) {
	f := newFixture(t)
	get := func(path string) (int, string) {
		resp, err := http.Get(f.url + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close() //nolint:errcheck // a test
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(b)
	}
	if code, body := get(serve.HealthPath); code != http.StatusOK {
		t.Errorf("health: %d %s", code, body)
	}
	code, body := get(serve.JWKSPath)
	if code != http.StatusOK {
		t.Fatalf("keys: %d %s", code, body)
	}
	if _, err := receipt.ParseKeys("verifier", []byte(body)); err != nil {
		t.Error(err)
	}
	if strings.Contains(body, `"d"`) {
		t.Error("the key set holds a private key")
	}
	if code, _ := get("/debug/pprof/"); code != http.StatusNotFound {
		t.Errorf("another path: %d", code)
	}
}
