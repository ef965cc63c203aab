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
	"slices"
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
	"github.com/coffer-run/coffer/attest/verifier/verifiertest"
	"github.com/coffer-run/coffer/attest/vtpm/vtpmtest"
)

type fixture struct {
	url      string
	tpm      *vtpmtest.TPM
	log      *lockedBuffer
	machine  *verifiertest.Machine
	options  verifier.Options
	verifier *verifier.Verifier
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

var vendor = sync.OnceValues(func() (*simulate.Vendor, error) {
	return simulate.New(simulate.Options{GPUs: 1, Plain: true, Fast: true})
})

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
	f.options = verifier.Options{
		ID: "verifier", Anchors: anchors, Signer: newSigner(t), NonceKeys: [][]byte{bytes.Repeat([]byte{1}, verifier.NonceKeySize)}, Clock: time.Now, Build: "test",
	}
	p, err := policy.Named("simulation")
	if err != nil {
		t.Fatal(err)
	}
	f.options.Policies = []policy.Policy{p}
	f.machine = &verifiertest.Machine{Chip: v.Chip(), GPU: v.GPUs()[0], TPM: f.tpm, Policy: p}
	f.verifier = f.replica(t)
	f.machine.Credential = f.enrol(t)
	s := httptest.NewServer(f.handler(t, f.verifier))
	t.Cleanup(s.Close)
	f.url = s.URL
	return f
}

func newSigner(t *testing.T) *receipt.Signer {
	t.Helper()
	return signerOf(t, newKey(t))
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func signerOf(t *testing.T, key *ecdsa.PrivateKey) *receipt.Signer {
	t.Helper()
	s, err := receipt.NewSigner("verifier", key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// replica is another verifier with the same keys.
func (f *fixture) replica(t *testing.T) *verifier.Verifier {
	t.Helper()
	v, err := verifier.New(f.options)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func (f *fixture) serving(v *verifier.Verifier) serve.Options {
	return serve.Options{
		Verifier: v, Log: slog.New(slog.NewJSONHandler(f.log, nil)),
		Identify: func(r *http.Request) (role, name string, err error) {
			role, name = r.Header.Get("Test-Role"), r.Header.Get("Test-Name")
			if role == "" {
				return "", "", errors.New("no certificate")
			}
			if name == "" {
				name = "node-1"
			}
			return role, name, nil
		},
	}
}

func (f *fixture) handler(t *testing.T, v *verifier.Verifier) http.Handler {
	t.Helper()
	h, err := serve.Handler(f.serving(v))
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func (f *fixture) enrol(t *testing.T) string {
	t.Helper()
	blob, enc, token, err := f.verifier.BeginEnrolment(f.tpm.EKChain, f.tpm.AKPublic)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := f.tpm.Activate(blob, enc)
	if err != nil {
		t.Fatal(err)
	}
	credential, err := f.verifier.FinishEnrolment(token, secret)
	if err != nil {
		t.Fatal(err)
	}
	return credential
}

// attest is evidence that answers a nonce.
func (f *fixture) attest(t *testing.T, nonce string) []byte {
	t.Helper()
	e, err := f.machine.Attest("verifier", nonce, "job-1")
	if err != nil {
		t.Fatal(err)
	}
	b, err := e.JSON()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func challenge(t *testing.T, c verifierv1connect.VerifierServiceClient) string {
	t.Helper()
	n, err := c.Challenge(t.Context(), connect.NewRequest(&verifierv1.ChallengeRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	return n.Msg.GetNonce()
}

// keys are those that a relying party fetches.
func (f *fixture) keys(t *testing.T) receipt.Keys {
	t.Helper()
	k, err := receipt.ParseKeys("verifier", f.verifier.JWKS())
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// relyOn verifies a result as a broker does.
func relyOn(keys receipt.Keys, token string) error {
	_, err := receipt.VerifyResult(keys, token, receipt.Expect{Audience: "broker", AnyJob: true, AllowSimulated: true}, time.Now())
	return err
}

// as is a client whose certificate names a role.
func (f *fixture) as(role string) verifierv1connect.VerifierServiceClient {
	return client(http.DefaultClient, f.url, role, "node-1")
}

func client(hc *http.Client, url, role, name string) verifierv1connect.VerifierServiceClient {
	return verifierv1connect.NewVerifierServiceClient(hc, url, connect.WithInterceptors(connect.UnaryInterceptorFunc(func(next connect.UnaryFunc) connect.UnaryFunc {
		return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
			if role != "" {
				req.Header().Set("Test-Role", role)
				req.Header().Set("Test-Name", name)
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

// TestRoles calls everything as everyone.
func TestRoles(t *testing.T) {
	f := newFixture(t)
	type call = func(verifierv1connect.VerifierServiceClient) error
	const agent, relyingParty = "agent", "relying-party"
	for name, row := range map[string]struct {
		call call
		let  []string
	}{
		"challenge": {func(c verifierv1connect.VerifierServiceClient) error {
			_, err := c.Challenge(t.Context(), connect.NewRequest(&verifierv1.ChallengeRequest{}))
			return err
		}, []string{agent, relyingParty}},
		"begin": {func(c verifierv1connect.VerifierServiceClient) error {
			_, err := c.BeginEnrolment(t.Context(), connect.NewRequest(&verifierv1.BeginEnrolmentRequest{}))
			return err
		}, []string{agent, relyingParty}},
		"finish": {func(c verifierv1connect.VerifierServiceClient) error {
			_, err := c.FinishEnrolment(t.Context(), connect.NewRequest(&verifierv1.FinishEnrolmentRequest{}))
			return err
		}, []string{agent, relyingParty}},
		"appraise": {func(c verifierv1connect.VerifierServiceClient) error {
			_, err := c.Appraise(t.Context(), connect.NewRequest(&verifierv1.AppraiseRequest{}))
			return err
		}, []string{agent}},
		"check": {func(c verifierv1connect.VerifierServiceClient) error {
			_, err := c.Check(t.Context(), connect.NewRequest(&verifierv1.CheckRequest{}))
			return err
		}, []string{agent, relyingParty}},
	} {
		for _, role := range []string{agent, relyingParty, "owner", "engineer", "operator", "auditor", "broker", "verifier", "root"} {
			r, ok := refusal.Decode(row.call(f.as(role)))
			if refused := ok && r.Checks[0].ID == "role"; refused == slices.Contains(row.let, role) {
				t.Errorf("%s as %s: refused by role: %v", name, role, refused)
			}
		}
		if err := row.call(f.as("")); connect.CodeOf(err) != connect.CodeUnauthenticated {
			t.Errorf("%s without an identity: %v", name, err)
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
	if n.Msg.GetNonce() == "" || n.Msg.GetVerifierId() != "verifier" || n.Msg.GetExpiresUnix() <= time.Now().Unix() || n.Msg.GetRulesDigest() == "" || n.Msg.GetRulesDigest() != string(f.verifier.Rules()) {
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
	for i := range 64 {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		_, _ = fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: x\r\nTest-Role: agent\r\nTest-Name: slow-%d\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n{", verifierv1connect.VerifierServiceAppraiseProcedure, i)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
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
	for _, path := range []string{serve.LivePath, serve.ReadyPath} {
		if code, body := get(path); code != http.StatusOK {
			t.Errorf("%s: %d %s", path, code, body)
		}
	}
	if code, _ := get(serve.MetricsPath); code != http.StatusUnauthorized {
		t.Errorf("metrics for nobody: %d", code)
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
