package serve_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hpke"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/broker/serve"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

// initData is what the grants of these tests name.
const initData = `version = "0.1.0"`

// appraiser plays a verifier: it affirms whatever it is shown, changed as a test
// says, and keeps it.
type appraiser struct {
	sign   func(receipt.KBSResult) (string, error)
	change func(*receipt.KBSResult)
	err    error
	mu     sync.Mutex
	seen   []serve.KBSEvidence
}

func (a *appraiser) Appraise(_ context.Context, e serve.KBSEvidence) (string, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.seen = append(a.seen, e)
	if a.err != nil {
		return "", a.err
	}
	var data struct {
		Key jose.JSONWebKey `json:"tee-pubkey"`
	}
	if err := json.Unmarshal(e.RuntimeData, &data); err != nil {
		return "", err
	}
	thumbprint, err := data.Key.Thumbprint(crypto.SHA256)
	if err != nil {
		return "", err
	}
	var init struct {
		Body string `json:"body"`
	}
	if len(e.InitData) > 0 {
		if err := json.Unmarshal(e.InitData, &init); err != nil {
			return "", err
		}
	}
	now := time.Now()
	r := receipt.KBSResult{
		Issuer: "verifier.test", Audience: e.Audience, ID: rand.Text(), IssuedAt: now.Unix(), Expires: now.Add(receipt.ResultLifetime).Unix(),
		Nonce: e.Nonce, Session: e.Session, TEE: e.TEE, Key: thumbprint, InitData: plan.Sum([]byte(init.Body)), Evidence: plan.Sum(e.Evidence),
		Submods: map[string]receipt.Appraisal{"cpu0": {Status: receipt.Affirming}},
	}
	if a.change != nil {
		a.change(&r)
	}
	return a.sign(r)
}

// kbsWorld is a broker with assets and a KBS port.
type kbsWorld struct {
	*stack
	appraiser *appraiser
	srv       *httptest.Server
	keys      map[string][]byte
	mu        sync.Mutex
	skew      time.Duration
}

func (w *kbsWorld) now() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Now().Add(w.skew)
}

var alice = broker.Actor{Role: "owner", Name: "alice"}

func newKBS(t *testing.T) *kbsWorld {
	t.Helper()
	w := &kbsWorld{stack: newStack(t), keys: map[string][]byte{}}
	w.appraiser = &appraiser{sign: func(r receipt.KBSResult) (string, error) { return w.verifier.Sign(receipt.TypeKBS, r) }}
	h, err := serve.KBSHandler(serve.KBSOptions{Broker: w.options.Broker, Verifier: w.appraiser, Log: w.options.Log, Now: w.now})
	if err != nil {
		t.Fatal(err)
	}
	w.srv = httptest.NewTLSServer(h)
	t.Cleanup(w.srv.Close)
	w.asset(t, "served", broker.ProtocolKBS)
	w.asset(t, "both", broker.ProtocolKBS, broker.ProtocolCoffer)
	w.asset(t, "unserved")
	return w
}

func (w *kbsWorld) asset(t *testing.T, name string, protocols ...string) {
	t.Helper()
	info, err := w.options.Broker.Info()
	if err != nil {
		t.Fatal(err)
	}
	kem, kdf, aead := broker.Suite()
	pub, err := kem.NewPublicKey(info.OwnerWrapKey)
	if err != nil {
		t.Fatal(err)
	}
	enc, s, err := hpke.NewSender(pub, kdf, aead, []byte(receipt.OwnerWrapInfo))
	if err != nil {
		t.Fatal(err)
	}
	key := make([]byte, broker.DataKeySize)
	_, _ = rand.Read(key)
	w.keys[name] = key
	ct, err := s.Seal([]byte(name), key)
	if err != nil {
		t.Fatal(err)
	}
	p := broker.DefaultPolicy()
	p.Protocols = protocols
	if _, err := w.options.Broker.CreateAsset(t.Context(), alice, broker.NewAsset{Name: name, Kind: broker.KindWeights, Digest: plan.Sum([]byte(name)), Enc: enc, Ciphertext: ct, Policy: &p}); err != nil {
		t.Fatal(err)
	}
}

func (w *kbsWorld) grant(t *testing.T, releases int, assets ...string) broker.Grant {
	t.Helper()
	g, err := w.options.Broker.CreateGrant(t.Context(), alice, broker.NewGrant{Assets: assets, Plan: plan.Sum([]byte(initData)), NotAfter: time.Now().Add(time.Hour), MaxReleases: releases})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// guest is a client written from the protocol's text.
type guest struct {
	t     *testing.T
	w     *kbsWorld
	http  *http.Client
	key   crypto.Signer
	nonce string
}

func newGuest(t *testing.T, w *kbsWorld, key crypto.Signer) *guest {
	t.Helper()
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	c := w.srv.Client()
	return &guest{t: t, w: w, http: &http.Client{Transport: c.Transport, Jar: jar}, key: key}
}

func ecKey(t *testing.T) crypto.Signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func (g *guest) do(method, path string, body any) (int, map[string]any) {
	g.t.Helper()
	var r io.Reader
	switch b := body.(type) {
	case nil:
	case string:
		r = strings.NewReader(b)
	default:
		enc, err := json.Marshal(body)
		if err != nil {
			g.t.Fatal(err)
		}
		r = bytes.NewReader(enc)
	}
	req, err := http.NewRequestWithContext(g.t.Context(), method, g.w.srv.URL+path, r)
	if err != nil {
		g.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := g.http.Do(req)
	if err != nil {
		g.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	out := map[string]any{}
	if err := json.NewDecoder(resp.Body).Decode(&out); err != nil {
		out = map[string]any{"detail": err.Error()}
	}
	return resp.StatusCode, out
}

func (g *guest) auth() {
	g.t.Helper()
	code, m := g.do("POST", "/kbs/v0/auth", map[string]any{"version": "0.4.0", "tee": "snp", "extra-params": map[string]any{}})
	nonce, _ := m["nonce"].(string)
	if code != http.StatusOK || nonce == "" {
		g.t.Fatalf("auth: %d %v", code, m)
	}
	g.nonce = nonce
}

func (g *guest) jwk() jose.JSONWebKey {
	k := jose.JSONWebKey{Key: g.key.Public(), Algorithm: "RSA-OAEP-256"}
	if _, ok := g.key.(*ecdsa.PrivateKey); ok {
		k.Algorithm = "ECDH-ES+A256KW"
	}
	return k
}

func (g *guest) attestation(nonce string, key any) map[string]any {
	return map[string]any{
		"init-data":    map[string]string{"format": "toml", "body": initData},
		"runtime-data": map[string]any{"nonce": nonce, "tee-pubkey": key},
		"tee-evidence": map[string]any{"primary_evidence": map[string]string{"report": "bytes"}, "additional_evidence": "{}"},
	}
}

func (g *guest) attest() {
	g.t.Helper()
	if code, m := g.do("POST", "/kbs/v0/attest", g.attestation(g.nonce, g.jwk())); code != http.StatusOK || m["token"] == "" {
		g.t.Fatalf("attest: %d %v", code, m)
	}
}

func (g *guest) get(asset string) (int, map[string]any) {
	g.t.Helper()
	return g.do("GET", "/kbs/v0/resource/alice/weights/"+asset, nil)
}

// open opens a flattened JWE.
func (g *guest) open(m map[string]any) []byte {
	g.t.Helper()
	for _, f := range []string{"protected", "encrypted_key", "iv", "ciphertext", "tag"} {
		if s, _ := m[f].(string); s == "" {
			g.t.Fatalf("no %s in %v", f, m)
		}
	}
	b, err := json.Marshal(m)
	if err != nil {
		g.t.Fatal(err)
	}
	jwe, err := jose.ParseEncrypted(string(b), []jose.KeyAlgorithm{jose.RSA_OAEP_256, jose.ECDH_ES_A256KW}, []jose.ContentEncryption{jose.A256GCM})
	if err != nil {
		g.t.Fatal(err)
	}
	key, err := jwe.Decrypt(g.key)
	if err != nil {
		g.t.Fatal(err)
	}
	return key
}

func TestKBSWholeWay(t *testing.T) {
	w := newKBS(t)
	g := w.grant(t, 2, "served", "both")
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for i, key := range []crypto.Signer{ecKey(t), rsaKey} {
		c := newGuest(t, w, key)
		c.auth()
		c.attest()
		for _, asset := range []string{"served", "both"} {
			code, m := c.get(asset)
			if code != http.StatusOK || !bytes.Equal(c.open(m), w.keys[asset]) {
				t.Fatalf("%s: %d %v", asset, code, m)
			}
			// The same session gets the same answer, and is not counted again.
			if code, again := c.get(asset); code != http.StatusOK || again["tag"] != m["tag"] {
				t.Errorf("%s again: %d %v", asset, code, again)
			}
		}
		view, err := w.options.Broker.Grant(t.Context(), alice, g.ID)
		if err != nil || view.Used != i+1 {
			t.Errorf("used %d, %v", view.Used, err)
		}
	}
	// A third session: the grant allows two.
	c := newGuest(t, w, ecKey(t))
	c.auth()
	c.attest()
	if code, m := c.get("served"); code != http.StatusForbidden || !strings.Contains(fmt.Sprint(m["detail"]), "grant.exhausted") {
		t.Errorf("%d %v", code, m)
	}
	// The evidence went to the verifier as it was, and every release is logged.
	e := w.appraiser.seen[0]
	if string(e.Evidence) != `{"additional_evidence":"{}","primary_evidence":{"report":"bytes"}}` || e.Audience != "broker.test" || e.TEE != "snp" {
		t.Errorf("forwarded %+v", e)
	}
	var logged []string
	if err := w.store.View(t.Context(), func(ctx context.Context, r broker.Reader) error {
		l, err := r.Entries(ctx, "", 0, 100)
		for _, e := range l {
			b, err := e.Open()
			if err != nil {
				return err
			}
			if b.Kind == translog.KindRelease {
				logged = append(logged, b.Release.Asset+" by "+b.Actor)
			}
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if want := []string{"served by agent/kbs", "both by agent/kbs", "served by agent/kbs", "both by agent/kbs"}; !slices.Equal(logged, want) {
		t.Errorf("logged %v", logged)
	}
}

func TestKBSServesOnlyWhatNamesIt(t *testing.T) {
	w := newKBS(t)
	w.grant(t, 5, "served", "unserved")
	c := newGuest(t, w, ecKey(t))
	c.auth()
	c.attest()
	for path, want := range map[string]int{
		"alice/weights/served": 200,
		// Neither says whether it exists.
		"alice/weights/unserved": 404, "alice/weights/nothing": 404,
		"bob/weights/served": 404, "alice/dataset/served": 404, "default/key/served": 404,
		// Served, and under no grant.
		"alice/weights/both": 403,
	} {
		if code, m := c.do("GET", "/kbs/v0/resource/"+path, nil); code != want {
			t.Errorf("%s: %d %v, want %d", path, code, m, want)
		}
	}
}

// TestKBSOpenAsset: the key of an asset that waits for a job to seal it is for that
// job, and a guest shows no plan.
func TestKBSOpenAsset(t *testing.T) {
	w := newKBS(t)
	p := broker.DefaultPolicy()
	p.Protocols = []string{broker.ProtocolKBS, broker.ProtocolCoffer}
	if _, err := w.options.Broker.CreateAsset(t.Context(), alice, broker.NewAsset{Name: "open", Kind: broker.KindWeights, Policy: &p}); err != nil {
		t.Fatal(err)
	}
	w.grant(t, 1, "served", "open")
	c := newGuest(t, w, ecKey(t))
	c.auth()
	c.attest()
	if code, m := c.get("open"); code != http.StatusForbidden || m["detail"] != "refused: asset.open" {
		t.Errorf("an asset without a digest: %d %v", code, m)
	}
	if code, m := c.get("served"); code != http.StatusOK {
		t.Errorf("the other asset of the grant: %d %v", code, m)
	}
}

// TestKBSRacing has two sessions take the one release that a grant has left.
func TestKBSRacing(t *testing.T) {
	w := newKBS(t)
	w.grant(t, 1, "served")
	var guests []*guest
	for range 4 {
		c := newGuest(t, w, ecKey(t))
		c.auth()
		c.attest()
		guests = append(guests, c)
	}
	codes := make([]int, len(guests))
	var wg sync.WaitGroup
	for i, c := range guests {
		wg.Go(func() { codes[i], _ = c.get("served") })
	}
	wg.Wait()
	slices.Sort(codes)
	if want := []int{200, 403, 403, 403}; !slices.Equal(codes, want) {
		t.Errorf("answers %v, want %v", codes, want)
	}
}

// TestKBSRevoked has a stored answer that a revocation takes back, and a grant that
// waits for approvals.
func TestKBSRevoked(t *testing.T) {
	w := newKBS(t)
	g := w.grant(t, 1, "served")
	c := newGuest(t, w, ecKey(t))
	c.auth()
	c.attest()
	if code, m := c.get("served"); code != http.StatusOK {
		t.Fatalf("%d %v", code, m)
	}
	if _, err := w.options.Broker.Revoke(t.Context(), alice, g.ID, "enough"); err != nil {
		t.Fatal(err)
	}
	if code, m := c.get("served"); code != http.StatusForbidden || !strings.Contains(fmt.Sprint(m["detail"]), "grant.revoked") {
		t.Errorf("after the revocation: %d %v", code, m)
	}
	w.grant(t, 1, "both")
	a, err := w.options.Broker.ReadAsset(t.Context(), alice, "both")
	if err != nil {
		t.Fatal(err)
	}
	p := a.Policy
	p.Approvals = []broker.Rule{{Group: "safety", Count: 1}}
	if _, err := w.options.Broker.UpdateAssetPolicy(t.Context(), alice, "both", p, broker.Labels{}, a.Revision, nil); err != nil {
		t.Fatal(err)
	}
	if code, m := c.get("both"); code != http.StatusForbidden || !strings.Contains(fmt.Sprint(m["detail"]), "grant.approvals") {
		t.Errorf("without approvals: %d %v", code, m)
	}
}

// TestKBSKeyDisabled has a key-encryption key that its owner disabled, and nothing
// else in the way.
func TestKBSKeyDisabled(t *testing.T) {
	w := newKBS(t)
	w.grant(t, 1, "served")
	c := newGuest(t, w, ecKey(t))
	c.auth()
	c.attest()
	w.kms.disabled.Store(true)
	if code, m := c.get("served"); code != http.StatusForbidden || m["detail"] != "refused: asset.key-disabled" {
		t.Errorf("disabled: %d %v", code, m)
	}
	w.kms.disabled.Store(false)
	if code, m := c.get("served"); code != http.StatusOK {
		t.Errorf("enabled again: %d %v", code, m)
	}
}

// TestKBSResultsAreForThisSession has only one claim of the verifier's signed result
// between an attacker and the key.
func TestKBSResultsAreForThisSession(t *testing.T) {
	for name, try := range map[string]struct {
		change func(*receipt.KBSResult)
		want   string
	}{
		"another broker's":  {func(r *receipt.KBSResult) { r.Audience = "broker.other" }, "kbs.audience"},
		"another nonce's":   {func(r *receipt.KBSResult) { r.Nonce = "x" }, "kbs.nonce"},
		"another session's": {func(r *receipt.KBSResult) { r.Session = "kbs-other" }, "kbs.session"},
		"another tee's":     {func(r *receipt.KBSResult) { r.TEE = "sample" }, "kbs.tee"},
		"another key's":     {func(r *receipt.KBSResult) { r.Key = []byte("other") }, "kbs.tee-key"},
		"expired":           {func(r *receipt.KBSResult) { r.IssuedAt, r.Expires = r.IssuedAt-600, r.IssuedAt-300 }, "kbs.lifetime"},
		"not expiring":      {func(r *receipt.KBSResult) { r.Expires = 0 }, "kbs.lifetime"},
		"living for days":   {func(r *receipt.KBSResult) { r.Expires += 86400 }, "kbs.lifetime"},
		"from the future":   {func(r *receipt.KBSResult) { r.IssuedAt, r.Expires = r.IssuedAt+3600, r.Expires+3600 }, "kbs.lifetime"},
		"without init-data": {func(r *receipt.KBSResult) { r.InitData = "" }, "kbs.complete"},
		"without devices":   {func(r *receipt.KBSResult) { r.Submods = nil }, "kbs.complete"},
		"without id":        {func(r *receipt.KBSResult) { r.ID = "" }, "kbs.complete"},
		"not affirming":     {func(r *receipt.KBSResult) { r.Submods["cpu0"] = receipt.Appraisal{Status: receipt.Warning} }, "kbs.cpu0"},
		"affirming by its word": {func(r *receipt.KBSResult) {
			r.Submods["cpu0"] = receipt.Appraisal{Status: receipt.Affirming, Vector: receipt.TrustVector{Hardware: 97}}
		}, "kbs.cpu0"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newKBS(t)
			w.grant(t, 1, "served")
			w.appraiser.change = try.change
			c := newGuest(t, w, ecKey(t))
			c.auth()
			code, m := c.do("POST", "/kbs/v0/attest", c.attestation(c.nonce, c.jwk()))
			if code != http.StatusForbidden || m["detail"] != "refused: "+try.want {
				t.Errorf("attest: %d %v, want %s", code, m, try.want)
			}
			if code, _ := c.get("served"); code != http.StatusUnauthorized {
				t.Errorf("a session that was refused got an answer: %d", code)
			}
		})
	}
}

// TestKBSTokens has tokens that are signed well, and are something else.
func TestKBSTokens(t *testing.T) {
	w := newKBS(t)
	w.grant(t, 1, "served")
	stranger, _ := signer(t, "verifier.test")
	for name, sign := range map[string]func(receipt.KBSResult) (string, error){
		"by another key":              func(r receipt.KBSResult) (string, error) { return stranger.Sign(receipt.TypeKBS, r) },
		"of another type":             func(r receipt.KBSResult) (string, error) { return w.verifier.Sign(receipt.TypeResult, r) },
		"by a verifier nobody trusts": func(r receipt.KBSResult) (string, error) { r.Issuer = "other"; return w.self.Sign(receipt.TypeKBS, r) },
		"none":                        func(receipt.KBSResult) (string, error) { return "", nil },
	} {
		w.appraiser.sign = sign
		c := newGuest(t, w, ecKey(t))
		c.auth()
		if code, m := c.do("POST", "/kbs/v0/attest", c.attestation(c.nonce, c.jwk())); code != http.StatusForbidden && code != http.StatusInternalServerError {
			t.Errorf("%s: %d %v", name, code, m)
		}
		if code, _ := c.get("served"); code != http.StatusUnauthorized {
			t.Errorf("%s: got an answer: %d", name, code)
		}
	}
	// And a KBS result is no attestation result for the broker's own protocol.
	r := receipt.KBSResult{Issuer: "verifier.test", Audience: "broker.test"}
	token, err := w.verifier.Sign(receipt.TypeKBS, r)
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.options.Broker.Release(t.Context(), broker.Actor{Role: "agent", Name: "node-1"}, broker.Ask{Result: token})
	var refusal *check.Refusal
	if !errors.As(err, &refusal) {
		t.Errorf("a KBS result passed for a job's: %v", err)
	}
}

func TestKBSSessions(t *testing.T) {
	w := newKBS(t)
	w.grant(t, 5, "served")
	c := newGuest(t, w, ecKey(t))
	if code, m := c.get("served"); code != http.StatusUnauthorized || !strings.HasSuffix(fmt.Sprint(m["type"]), "/MissingCookie") {
		t.Errorf("without a session: %d %v", code, m)
	}
	c.auth()
	if code, m := c.get("served"); code != http.StatusUnauthorized || !strings.HasSuffix(fmt.Sprint(m["type"]), "/UnAuthenticatedCookie") {
		t.Errorf("without evidence: %d %v", code, m)
	}
	// Another session's nonce.
	other := newGuest(t, w, ecKey(t))
	other.auth()
	if code, m := c.do("POST", "/kbs/v0/attest", c.attestation(other.nonce, c.jwk())); code != http.StatusUnauthorized || !strings.HasSuffix(fmt.Sprint(m["type"]), "/InvalidNonce") {
		t.Errorf("another nonce: %d %v", code, m)
	}
	c.attest()
	// The evidence again, in the same session and with another key.
	for _, key := range []jose.JSONWebKey{c.jwk(), other.jwk()} {
		if code, m := c.do("POST", "/kbs/v0/attest", c.attestation(c.nonce, key)); code != http.StatusUnauthorized {
			t.Errorf("attested twice: %d %v", code, m)
		}
	}
	// What is answered is for the key that was attested.
	code, m := c.get("served")
	if code != http.StatusOK || !bytes.Equal(c.open(m), w.keys["served"]) {
		t.Fatalf("%d %v", code, m)
	}
	w.mu.Lock()
	w.skew = 6 * time.Minute
	w.mu.Unlock()
	if code, m := c.get("served"); code != http.StatusUnauthorized || !strings.HasSuffix(fmt.Sprint(m["type"]), "/ExpiredCookie") {
		t.Errorf("expired: %d %v", code, m)
	}
}

// TestKBSBearerToken asks with the token of a session, as a client may that keeps
// tokens, and gets told that this is not how.
func TestKBSBearerToken(t *testing.T) {
	w := newKBS(t)
	w.grant(t, 1, "served")
	c := newGuest(t, w, ecKey(t))
	c.auth()
	_, m := c.do("POST", "/kbs/v0/attest", c.attestation(c.nonce, c.jwk()))
	token, _ := m["token"].(string)
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, w.srv.URL+"/kbs/v0/resource/alice/weights/served", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+token)
	resp, err := w.srv.Client().Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if token == "" || resp.StatusCode != http.StatusUnauthorized || !bytes.Contains(b, []byte("bearer token are not supported")) {
		t.Errorf("%d %s", resp.StatusCode, b)
	}
}

func TestKBSBadInput(t *testing.T) {
	w := newKBS(t)
	c := newGuest(t, w, ecKey(t))
	small, err := rsa.GenerateKey(rand.Reader, 1024) // #nosec G403 -- refused below
	if err != nil {
		t.Fatal(err)
	}
	for name, try := range map[string]struct {
		body any
		want int
	}{
		"another version": {map[string]any{"version": "0.1.0", "tee": "snp"}, 401},
		"no tee":          {map[string]any{"version": "0.4.0"}, 400},
		"no JSON":         {"hello", 400},
		"two values":      {`{"version":"0.4.0","tee":"snp"}{}`, 400},
		"too much":        {`{"version":"0.4.0","tee":"snp","extra-params":"` + strings.Repeat("x", 20<<10) + `"}`, 400},
	} {
		if code, m := c.do("POST", "/kbs/v0/auth", try.body); code != try.want || !strings.HasPrefix(fmt.Sprint(m["type"]), "https://github.com/confidential-containers/kbs/errors/") || m["detail"] == "" {
			t.Errorf("auth with %s: %d %v, want %d", name, code, m, try.want)
		}
	}
	private := jose.JSONWebKey{Key: c.key}
	for name, body := range map[string]any{
		"a private key":        c.attestation("", private),
		"a small key":          c.attestation("", jose.JSONWebKey{Key: small.Public()}),
		"a symmetric key":      c.attestation("", jose.JSONWebKey{Key: []byte("0123456789abcdef0123456789abcdef")}),
		"another algorithm":    c.attestation("", jose.JSONWebKey{Key: c.key.Public(), Algorithm: "RSA1_5"}),
		"no key":               c.attestation("", nil),
		"a key that is a list": c.attestation("", []int{1}),
		"no evidence":          map[string]any{"runtime-data": map[string]any{"nonce": "", "tee-pubkey": c.jwk()}},
		"no runtime-data":      map[string]any{"tee-evidence": "x"},
		"too much":             `{"tee-evidence":"` + strings.Repeat("x", 2<<20) + `"}`,
	} {
		g := newGuest(t, w, c.key)
		g.auth()
		if m, ok := body.(map[string]any); ok {
			if rd, ok := m["runtime-data"].(map[string]any); ok {
				rd["nonce"] = g.nonce
			}
		}
		if code, m := g.do("POST", "/kbs/v0/attest", body); code != http.StatusBadRequest {
			t.Errorf("attest with %s: %d %v", name, code, m)
		}
	}
	if n := len(w.appraiser.seen); n != 0 {
		t.Errorf("%d of them came to the verifier", n)
	}
	w.appraiser.err = fmt.Errorf("%w: gone", broker.ErrUnavailable)
	g := newGuest(t, w, c.key)
	g.auth()
	if code, m := g.do("POST", "/kbs/v0/attest", g.attestation(g.nonce, g.jwk())); code != http.StatusServiceUnavailable {
		t.Errorf("a verifier that is away: %d %v", code, m)
	}
}

func TestKBSFlood(t *testing.T) {
	w := newKBS(t)
	c := newGuest(t, w, ecKey(t))
	refused := 0
	for range 70 {
		if code, _ := c.do("POST", "/kbs/v0/auth", map[string]any{"version": "0.4.0", "tee": "snp"}); code == http.StatusTooManyRequests {
			refused++
		}
	}
	if refused != 70-64 {
		t.Errorf("%d of 70 sessions of one address were refused", refused)
	}
	w.mu.Lock()
	w.skew = 6 * time.Minute
	w.mu.Unlock()
	c.auth()
}

func TestKBSClient(t *testing.T) {
	code, body := http.StatusOK, `{"token":"abc"}`
	var got []byte
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got, _ = io.ReadAll(r.Body)
		w.WriteHeader(code)
		_, _ = io.WriteString(w, body)
	}))
	t.Cleanup(srv.Close)
	c := serve.KBSClient{URL: srv.URL, HTTP: srv.Client()}
	evidence := base64.StdEncoding.EncodeToString([]byte("x"))
	token, err := c.Appraise(t.Context(), serve.KBSEvidence{TEE: "snp", Evidence: json.RawMessage(`"` + evidence + `"`), RuntimeData: json.RawMessage(`{}`)})
	if err != nil || token != "abc" || !bytes.Contains(got, []byte(`"tee-evidence":"`+evidence+`"`)) {
		t.Errorf("%q, %v, asked %s", token, err, got)
	}
	for _, try := range []struct {
		code        int
		body        string
		unavailable bool
	}{{503, "", true}, {429, "", true}, {200, "{}", true}, {200, "x", true}, {403, "no", false}} {
		code, body = try.code, try.body
		_, err := c.Appraise(t.Context(), serve.KBSEvidence{RuntimeData: json.RawMessage(`{}`), Evidence: json.RawMessage(`{}`)})
		var refusal *check.Refusal
		if errors.Is(err, broker.ErrUnavailable) != try.unavailable || errors.As(err, &refusal) == try.unavailable {
			t.Errorf("%d %q: %v", try.code, try.body, err)
		}
	}
}

// Whoever reads logs is no client.
func TestKBSLogsNoCookie(t *testing.T) {
	w := newKBS(t)
	w.grant(t, 1, "served")
	c := newGuest(t, w, ecKey(t))
	c.auth()
	c.attest()
	if code, m := c.get("served"); code != http.StatusOK {
		t.Fatalf("%d %v", code, m)
	}
	u, err := url.Parse(w.srv.URL + serve.KBSPrefix)
	if err != nil {
		t.Fatal(err)
	}
	cookies := c.http.Jar.Cookies(u)
	if len(cookies) != 1 {
		t.Fatalf("%v", cookies)
	}
	if err := w.store.View(t.Context(), func(ctx context.Context, r broker.Reader) error {
		l, err := r.Entries(ctx, "", 0, 100)
		for _, e := range l {
			if bytes.Contains(e.Body, []byte(cookies[0].Value)) {
				t.Errorf("the evidence log has the session's cookie: %s", e.Body)
			}
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	for _, e := range w.appraiser.seen {
		if e.Session == cookies[0].Value {
			t.Error("the verifier is told the session's cookie")
		}
	}
}

// Grants that somebody else asked for hide none.
func TestKBSFindsItsGrantBehindOthers(t *testing.T) {
	w := newKBS(t)
	for n := range 1001 {
		err := w.store.Update(t.Context(), func(ctx context.Context, tx broker.Tx) error {
			return tx.InsertGrant(ctx, broker.Grant{
				ID: fmt.Sprintf("grant-%d", n), Assets: []string{"served"}, Plan: plan.Sum([]byte(initData)), MaxReleases: 1, Owner: "alice", Requester: "engineer/eve",
				NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour), Requested: time.Now(),
			})
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	w.grant(t, 1, "served")
	c := newGuest(t, w, ecKey(t))
	c.auth()
	c.attest()
	if code, m := c.get("served"); code != http.StatusOK || !bytes.Equal(c.open(m), w.keys["served"]) {
		t.Fatalf("%d %v", code, m)
	}
}
