package serve_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hpke"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/api/broker/v1/brokerv1connect"
	"github.com/coffer-run/coffer/attest/api/refusal"
	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/broker/serve"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

// as is the identity that the test server believes.
const as = "X-Test-As"

// impersonate sets who a client is.
type impersonate string

func (i impersonate) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set(as, string(i))
	return http.DefaultTransport.RoundTrip(r)
}

type stack struct {
	url      string
	verifier *receipt.Signer
	self     *receipt.Signer
	keys     receipt.Keys
	kms      *ownedKeys
	store    *serve.Store
	options  serve.Options
	log      *bytes.Buffer
}

func (s *stack) client(who string) brokerv1connect.BrokerServiceClient {
	return brokerv1connect.NewBrokerServiceClient(&http.Client{Transport: impersonate(who)}, s.url)
}

func signer(t *testing.T, issuer string) (*receipt.Signer, receipt.Keys) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := receipt.NewSigner(issuer, key)
	if err != nil {
		t.Fatal(err)
	}
	jwks, err := s.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	k, err := receipt.ParseKeys(issuer, jwks)
	if err != nil {
		t.Fatal(err)
	}
	return s, k
}

// ownedKeys are keys that their owner can disable.
type ownedKeys struct {
	*broker.LocalKeys
	disabled atomic.Bool
}

func (k *ownedKeys) Unwrap(ctx context.Context, wrapped, associated []byte) (*broker.DataKey, error) {
	if k.disabled.Load() {
		return nil, broker.ErrKeyDisabled
	}
	return k.LocalKeys.Unwrap(ctx, wrapped, associated)
}

func newStack(t *testing.T) *stack {
	t.Helper()
	s := &stack{store: open(t, filepath.Join(t.TempDir(), "broker.db")), log: &bytes.Buffer{}}
	self, keys := signer(t, "broker.test")
	verifier, verifierKeys := signer(t, "verifier.test")
	s.verifier, s.keys, s.self = verifier, keys, self
	owner, err := hpke.MLKEM768X25519().GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	kms, err := broker.NewLocalKeys(make([]byte, broker.KEKSize))
	if err != nil {
		t.Fatal(err)
	}
	s.kms = &ownedKeys{LocalKeys: kms}
	b, err := broker.New(broker.Config{ID: "broker.test", Signer: self, OwnerKey: owner, Keys: s.kms, Store: s.store, Verifiers: []receipt.Keys{verifierKeys}, Simulation: true, Now: time.Now, Access: broker.Roles{}})
	if err != nil {
		t.Fatal(err)
	}
	s.options = serve.Options{Broker: b, Log: slog.New(slog.NewJSONHandler(s.log, nil)), Identify: func(r *http.Request) (broker.Actor, error) {
		role, name, ok := strings.Cut(r.Header.Get(as), "/")
		if !ok {
			return broker.Actor{}, errors.New("nobody")
		}
		return broker.Actor{Role: role, Name: name}, nil
	}}
	h, err := serve.Handler(s.options)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	s.url = srv.URL
	return s
}

func call[Req, Resp any](t *testing.T, f func(context.Context, *connect.Request[Req]) (*connect.Response[Resp], error), m *Req) *Resp {
	t.Helper()
	r, err := f(t.Context(), connect.NewRequest(m))
	if err != nil {
		t.Fatal(err)
	}
	return r.Msg
}

// TestWholeWay goes from a data key in an owner's hands to the same key in a
// job's, over the wire.
func TestWholeWay(t *testing.T) {
	s := newStack(t)
	owner, agent, auditor := s.client("owner/alice"), s.client("agent/node-1"), s.client("auditor/eve")

	info := call(t, owner.Info, &brokerv1.InfoRequest{})
	if info.GetBrokerId() != "broker.test" || !info.GetSimulation() {
		t.Errorf("info %v", info)
	}
	kem, kdf, aead := broker.Suite()
	pub, err := kem.NewPublicKey(info.GetOwnerWrapKey())
	if err != nil {
		t.Fatal(err)
	}
	dataKey := make([]byte, broker.DataKeySize)
	_, _ = rand.Read(dataKey)
	enc, sender, err := hpke.NewSender(pub, kdf, aead, []byte(receipt.OwnerWrapInfo))
	if err != nil {
		t.Fatal(err)
	}
	ct, err := sender.Seal([]byte("weights"), dataKey)
	if err != nil {
		t.Fatal(err)
	}
	digest := plan.Sum([]byte("manifest"))
	a := call(t, owner.CreateAsset, &brokerv1.CreateAssetRequest{Name: "weights", Kind: brokerv1.AssetKind_ASSET_KIND_WEIGHTS, Digest: string(digest), WrappedEnc: enc, WrappedKey: ct}).GetAsset()
	if a.GetOwner() != "alice" || a.GetKind() != brokerv1.AssetKind_ASSET_KIND_WEIGHTS {
		t.Errorf("asset %v", a)
	}
	planDigest := plan.Sum([]byte("plan"))
	g := call(t, owner.CreateGrant, &brokerv1.CreateGrantRequest{Assets: []string{"weights"}, PlanDigest: string(planDigest), NotAfterUnix: time.Now().Add(time.Hour).Unix(), MaxReleases: 1, AllowSimulated: true}).GetGrant()
	if g.GetState() != string(broker.StateActive) {
		t.Errorf("grant %v", g)
	}

	recipient, err := kem.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	session, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&session.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	jwk, err := receipt.SessionJWK(der)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	token, err := s.verifier.Sign(receipt.TypeResult, receipt.Result{
		Profile: receipt.Profile, Issuer: "verifier.test", Audience: "broker.test", ID: "r1", Nonce: "n1", IssuedAt: now.Unix(), Expires: now.Add(time.Minute).Unix(),
		Submods:      map[string]receipt.Appraisal{"cpu0": {Status: receipt.Affirming}},
		Confirmation: receipt.Confirmation{JWK: jwk, Recipient: recipient.PublicKey().Bytes()},
		JobID:        "job-1", PlanDigest: planDigest, SandboxDigest: digest, EvidenceDigest: digest, Simulated: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	request, err := receipt.ReleaseRequest{Version: receipt.RequestVersion, Broker: "broker.test", Grant: g.GetId(), Attempt: 1, ResultID: "r1", Asset: "weights"}.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(request)
	sig, err := ecdsa.SignASN1(rand.Reader, session, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	rel := call(t, agent.Release, &brokerv1.ReleaseRequest{Result: token, Request: request, Signature: sig})
	wrapInfo, err := receipt.WrapInfo(g.GetId(), planDigest, "weights", "r1", s.self.LeaseTerms(60))
	if err != nil {
		t.Fatal(err)
	}
	rcpt, err := hpke.NewRecipient(rel.GetEnc(), recipient, kdf, aead, wrapInfo)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := rcpt.Open([]byte("weights"), rel.GetCiphertext()); err != nil || !bytes.Equal(got, dataKey) {
		t.Errorf("the job does not get the owner's key: %v", err)
	}

	bundle := call(t, agent.LogBundle, &brokerv1.LogBundleRequest{JobId: "job-1", Digest: string(digest)})
	logged, err := translog.OpenReceipt(s.keys, bundle.GetReceipt())
	if err != nil {
		t.Fatal(err)
	}
	var entries []translog.Entry
	for _, e := range call(t, auditor.Entries, &brokerv1.EntriesRequest{JobId: "job-1"}).GetEntries() {
		entries = append(entries, translog.Entry{Index: e.GetIndex(), Body: e.GetBody(), Hash: e.GetChainHash()})
	}
	if _, err := translog.VerifyJob("broker.test", "job-1", entries); err != nil || len(entries) != 2 {
		t.Fatalf("%d entries, %v", len(entries), err)
	}
	if err := logged.Includes(entries[1]); err != nil {
		t.Error(err)
	}

	if got := call(t, owner.RevokeGrant, &brokerv1.RevokeGrantRequest{Id: g.GetId(), Reason: "over"}).GetGrant(); got.GetState() != string(broker.StateRevoked) || got.GetUsed() != 1 {
		t.Errorf("grant %v", got)
	}
	_, err = agent.Release(t.Context(), connect.NewRequest(&brokerv1.ReleaseRequest{Result: token, Request: request, Signature: sig}))
	if r, ok := refusal.Decode(err); !ok || r.Stage != "release" || len(r.Checks) != 1 || r.Checks[0].ID != "grant.revoked" {
		t.Errorf("released after the revocation: %v", err)
	}
	for _, secret := range []string{string(dataKey), token, string(rel.GetCiphertext())} {
		if strings.Contains(s.log.String(), secret) {
			t.Error("the access log holds a message")
		}
	}
	if !strings.Contains(s.log.String(), "agent/node-1") || !strings.Contains(s.log.String(), "grant.revoked") {
		t.Errorf("access log: %s", s.log)
	}
}

// TestRoles calls everything as everyone. An answer other than a refusal by role
// counts as let in.
func TestRoles(t *testing.T) {
	s := newStack(t)
	type in map[string]bool
	let := func(roles ...string) in {
		m := in{}
		for _, r := range roles {
			m[r] = true
		}
		return m
	}
	type client = brokerv1connect.BrokerServiceClient
	everyone := let("owner", "engineer", "agent", "auditor", "approver", "operator", "scheduler")
	calls := map[string]struct {
		call func(client, context.Context) error
		in   in
	}{
		"Info":                     {try(client.Info), everyone},
		"CreateAsset":              {try(client.CreateAsset), let("owner")},
		"GetAsset":                 {try(client.GetAsset), everyone},
		"ListAssets":               {try(client.ListAssets), everyone},
		"UpdateAssetPolicy":        {try(client.UpdateAssetPolicy), let("owner")},
		"CreateGrant":              {try(client.CreateGrant), let("owner")},
		"RequestGrant":             {try(client.RequestGrant), let("owner", "engineer", "scheduler")},
		"ApproveGrant":             {try(client.ApproveGrant), let("owner", "approver")},
		"DenyGrant":                {try(client.DenyGrant), let("owner", "approver")},
		"GetGrant":                 {try(client.GetGrant), everyone},
		"ListGrants of every plan": {try(client.ListGrants), let("owner", "approver", "auditor", "operator")},
		"ListGrants of one plan": {func(c client, ctx context.Context) error {
			_, err := c.ListGrants(ctx, connect.NewRequest(&brokerv1.ListGrantsRequest{PlanDigest: string(plan.Sum([]byte("plan")))}))
			return err
		}, everyone},
		"ListGrants of their own": {func(c client, ctx context.Context) error {
			_, err := c.ListGrants(ctx, connect.NewRequest(&brokerv1.ListGrantsRequest{Mine: true}))
			return err
		}, let("owner", "engineer", "approver", "auditor", "operator", "scheduler")},
		"RevokeGrant":           {try(client.RevokeGrant), let("owner", "operator")},
		"Revoke":                {try(client.Revoke), let("owner", "operator")},
		"ListRevocations":       {try(client.ListRevocations), let("owner", "operator", "auditor")},
		"LiftRevocation":        {try(client.LiftRevocation), let("operator")},
		"RewrapKeys":            {try(client.RewrapKeys), let("operator")},
		"Release":               {try(client.Release), let("agent")},
		"Renew":                 {try(client.Renew), let("agent")},
		"Reattest":              {try(client.Reattest), let("agent")},
		"ReportStopped":         {try(client.ReportStopped), let("agent")},
		"CountersignCheckpoint": {try(client.CountersignCheckpoint), let("agent")},
		"ResumeCheckpoint":      {try(client.ResumeCheckpoint), let("agent")},
		"CommitReseal":          {try(client.CommitReseal), let("agent")},
		"LogBundle":             {try(client.LogBundle), let("agent")},
		"Entries":               {try(client.Entries), let("owner", "agent", "auditor", "operator")},
	}
	for name, c := range calls {
		for _, role := range []string{"owner", "engineer", "agent", "auditor", "approver", "operator", "scheduler", "verifier", "broker", "root"} {
			err := c.call(s.client(role+"/x"), t.Context())
			r, refused := refusal.Decode(err)
			if byRole := refused && r.Stage == "authorize"; byRole == c.in[role] {
				t.Errorf("%s as %s: %v", name, role, err)
			}
		}
		for _, nobody := range []string{"", "/", "agent/", "/x"} {
			if err := c.call(s.client(nobody), t.Context()); connect.CodeOf(err) != connect.CodeUnauthenticated {
				t.Errorf("%s as %q: %v", name, nobody, err)
			}
		}
	}
}

func try[Req, Resp any](f func(brokerv1connect.BrokerServiceClient, context.Context, *connect.Request[Req]) (*connect.Response[Resp], error)) func(brokerv1connect.BrokerServiceClient, context.Context) error {
	return func(c brokerv1connect.BrokerServiceClient, ctx context.Context) error {
		_, err := f(c, ctx, connect.NewRequest(new(Req)))
		return err
	}
}

// begin sends the head of a call and the first byte of its body.
func (s *stack) begin(t *testing.T, url, who, procedure string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if _, err := fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: x\r\n%s: %s\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n{", procedure, as, who); err != nil {
		t.Fatal(err)
	}
	return c
}

// TestRoleIsCheckedBeforeTheBodyIsRead begins calls that it may not make, and
// wants the answer without having sent the rest.
func TestRoleIsCheckedBeforeTheBodyIsRead(t *testing.T) {
	s := newStack(t)
	for who, want := range map[string]int{"engineer/x": http.StatusForbidden, "root/x": http.StatusForbidden, "nobody": http.StatusUnauthorized} {
		c := s.begin(t, s.url, who, brokerv1connect.BrokerServiceReleaseProcedure)
		if err := c.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Errorf("%s: %v", who, err)
			continue
		}
		if resp.StatusCode != want {
			t.Errorf("%s: %s", who, resp.Status)
		}
		_ = resp.Body.Close()
	}
}

// TestSlowBody drips a body into a server that waits for a fraction of a second.
func TestSlowBody(t *testing.T) {
	s := newStack(t)
	h, err := serve.HandlerWithin(s.options, 300*time.Millisecond, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	began, answered := time.Now(), make(chan string, 1)
	c := s.begin(t, srv.URL, "agent/node-1", brokerv1connect.BrokerServiceReleaseProcedure)
	go func() {
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			answered <- err.Error()
			return
		}
		_ = resp.Body.Close()
		answered <- resp.Status
	}()
	drip := time.NewTicker(50 * time.Millisecond)
	defer drip.Stop()
	for time.Since(began) < time.Minute {
		select {
		case status := <-answered:
			if took := time.Since(began); took < 200*time.Millisecond || strings.HasPrefix(status, "2") {
				t.Errorf("answered %s after %s", status, took)
			}
			return
		case <-drip.C:
			_, _ = c.Write([]byte(" "))
		}
	}
	t.Fatal("still read after a minute")
}

func TestErrorsOnTheWire(t *testing.T) {
	s := newStack(t)
	owner := s.client("owner/alice")
	call(t, owner.CreateAsset, &brokerv1.CreateAssetRequest{Name: "ckpt", Kind: brokerv1.AssetKind_ASSET_KIND_CHECKPOINTS})
	code := func(err error) connect.Code { return connect.CodeOf(err) }
	if _, err := owner.CreateAsset(t.Context(), connect.NewRequest(&brokerv1.CreateAssetRequest{Name: "ckpt", Kind: brokerv1.AssetKind_ASSET_KIND_CHECKPOINTS})); code(err) != connect.CodeAlreadyExists {
		t.Error(err)
	}
	if _, err := owner.CreateAsset(t.Context(), connect.NewRequest(&brokerv1.CreateAssetRequest{Name: "x"})); code(err) != connect.CodeInvalidArgument {
		t.Error(err)
	}
	if _, err := owner.GetAsset(t.Context(), connect.NewRequest(&brokerv1.GetAssetRequest{Name: "none"})); code(err) != connect.CodeNotFound {
		t.Error(err)
	}
	if _, err := s.client("agent/n").Release(t.Context(), connect.NewRequest(&brokerv1.ReleaseRequest{Result: strings.Repeat("x", serve.MaxMessage+1)})); code(err) != connect.CodeResourceExhausted {
		t.Error(err)
	}
	if err := s.store.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := owner.ListAssets(t.Context(), connect.NewRequest(&brokerv1.ListAssetsRequest{})); code(err) != connect.CodeUnavailable || strings.Contains(err.Error(), "sql") {
		t.Error(err)
	}
}

func TestHandlerRefusesIncomplete(t *testing.T) {
	if _, err := serve.Handler(serve.Options{Log: slog.New(slog.DiscardHandler)}); err == nil {
		t.Error("made")
	}
}

// TestOneCallerFloods: whoever asks too much is told so at once, and others are
// served meanwhile.
func TestOneCallerFloods(t *testing.T) {
	s := newStack(t)
	o := s.options
	o.Limit = serve.Limit{PerSecond: 0.001, Burst: 5, Waiting: 4}
	h, err := serve.Handler(o)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	s.url = srv.URL
	info := func(who string) error {
		_, err := s.client(who).Info(t.Context(), connect.NewRequest(&brokerv1.InfoRequest{}))
		return err
	}
	for range 5 {
		if err := info("agent/flood"); err != nil {
			t.Fatal(err)
		}
	}
	for range 20 {
		if err := info("agent/flood"); connect.CodeOf(err) != connect.CodeResourceExhausted || !strings.Contains(err.Error(), "rate.calls") {
			t.Fatal(err)
		}
	}
	for _, who := range []string{"agent/other", "owner/flood"} {
		if err := info(who); err != nil {
			t.Errorf("%s: %v", who, err)
		}
	}
}

// TestOneCallerWaits: calls that hang take nothing from other callers.
func TestOneCallerWaits(t *testing.T) {
	s := newStack(t)
	o := s.options
	o.Limit = serve.Limit{PerSecond: 1000, Burst: 1000, Waiting: 2}
	h, err := serve.Handler(o)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	s.url = srv.URL
	var last error
	for range 6000 {
		// One that comes while Info is in work is turned away, and so is not the last.
		s.begin(t, srv.URL, "agent/slow", brokerv1connect.BrokerServiceReleaseProcedure)
		if _, last = s.client("agent/slow").Info(t.Context(), connect.NewRequest(&brokerv1.InfoRequest{})); last != nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if connect.CodeOf(last) != connect.CodeResourceExhausted || !strings.Contains(last.Error(), "rate.waiting") {
		t.Errorf("a third call: %v", last)
	}
	if _, err := s.client("agent/quick").Info(t.Context(), connect.NewRequest(&brokerv1.InfoRequest{})); err != nil {
		t.Errorf("another caller: %v", err)
	}
}

// slowLists is an Authorizer that lets lists take long.
type slowLists struct {
	broker.Roles
	began chan struct{}
	end   chan struct{}
}

func (l slowLists) Authorize(ctx context.Context, a broker.Access) error {
	if a.Action == broker.ActionListGrants {
		l.began <- struct{}{}
		<-l.end
	}
	return l.Roles.Authorize(ctx, a)
}

// TestListsLeaveRoom: however many long lists are asked for, a call that jobs live
// by is answered.
func TestListsLeaveRoom(t *testing.T) {
	s := newStack(t)
	owner, err := hpke.MLKEM768X25519().GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	_, keys := signer(t, "verifier.test")
	slow := slowLists{began: make(chan struct{}, 100), end: make(chan struct{})}
	o := s.options
	if o.Broker, err = broker.New(broker.Config{ID: "broker.test", Signer: s.self, OwnerKey: owner, Keys: s.kms, Store: s.store, Verifiers: []receipt.Keys{keys}, Now: time.Now, Access: slow}); err != nil {
		t.Fatal(err)
	}
	h, err := serve.Handler(o)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	s.url = srv.URL
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(slow.end)
	for range 16 {
		wg.Go(func() {
			_, _ = s.client("auditor/eve").ListGrants(t.Context(), connect.NewRequest(&brokerv1.ListGrantsRequest{}))
		})
	}
	<-slow.began
	<-slow.began
	time.Sleep(50 * time.Millisecond) // for the others to come
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	r, err := s.client("agent/node-1").Renew(ctx, connect.NewRequest(&brokerv1.RenewRequest{Renewals: []*brokerv1.Renewal{{JobId: "job-1", Challenge: make([]byte, receipt.ChallengeSize)}}}))
	if err != nil || len(r.Msg.GetRenewed()) != 1 {
		t.Errorf("renewal: %v", err)
	}
}

// TestDatabaseGone: nothing is answered from memory, and nothing is released.
func TestDatabaseGone(t *testing.T) {
	s := newStack(t)
	if err := s.store.Close(); err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	owner, agent := s.client("owner/alice"), s.client("agent/node-1")
	for name, err := range map[string]error{
		"ListAssets": second(owner.ListAssets(ctx, connect.NewRequest(&brokerv1.ListAssetsRequest{}))),
		"GetGrant":   second(owner.GetGrant(ctx, connect.NewRequest(&brokerv1.GetGrantRequest{Id: "g"}))),
		"Revoke": second(owner.Revoke(ctx, connect.NewRequest(&brokerv1.RevokeRequest{
			Kind: brokerv1.RevocationKind_REVOCATION_KIND_MEASUREMENT, Value: strings.Repeat("ab", 48), Reason: "x",
		}))),
		"Renew":       second(agent.Renew(ctx, connect.NewRequest(&brokerv1.RenewRequest{Renewals: []*brokerv1.Renewal{{JobId: "job-1", Challenge: make([]byte, receipt.ChallengeSize)}}}))),
		"CreateAsset": second(owner.CreateAsset(ctx, connect.NewRequest(&brokerv1.CreateAssetRequest{Name: "c", Kind: brokerv1.AssetKind_ASSET_KIND_CHECKPOINTS}))),
	} {
		if connect.CodeOf(err) != connect.CodeUnavailable {
			t.Errorf("%s: %v", name, err)
		}
		if strings.Contains(fmt.Sprint(err), "sql") {
			t.Errorf("%s tells how the broker works: %v", name, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }
