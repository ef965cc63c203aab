package serve_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hpke"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"math/big"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/go-jose/go-jose/v4"

	"github.com/coffer-run/coffer/attest/anchor"
	verifierv1 "github.com/coffer-run/coffer/attest/api/verifier/v1"
	"github.com/coffer-run/coffer/attest/broker"
	brokerserve "github.com/coffer-run/coffer/attest/broker/serve"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/verifier"
	"github.com/coffer-run/coffer/attest/verifier/serve"
	"github.com/coffer-run/coffer/attest/verifier/verifiertest"
)

const guestInit = "algorithm = \"sha256\"\nversion = \"0.1.0\"\n"

// kbsStack is a real verifier behind TLS with certificates on both sides, and a
// real broker with its KBS port that asks it.
type kbsStack struct {
	*fixture
	broker   *broker.Broker
	verifier *httptest.Server
	kbs      *httptest.Server
	key      []byte
	pki      pki
}

// pki is a certificate authority for clients.
type pki struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newPKI(t *testing.T) pki {
	t.Helper()
	k := newKey(t)
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, c, c, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return pki{c, k}
}

// client has a certificate that names a role; without one it has none.
func (p pki) client(t *testing.T, server *httptest.Server, role string) *http.Client {
	t.Helper()
	c := &tls.Config{RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS13}
	c.RootCAs.AddCert(server.Certificate())
	if role != "" {
		k := newKey(t)
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
			SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: role}, NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		}, p.cert, k.Public(), p.key)
		if err != nil {
			t.Fatal(err)
		}
		c.Certificates = []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: k}}
	}
	tr := &http.Transport{TLSClientConfig: c}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func newKBSStack(t *testing.T, kbsPolicy string) *kbsStack {
	t.Helper()
	s := &kbsStack{fixture: newFixture(t), pki: newPKI(t)}
	rules, err := policy.StandardRules()
	if err != nil {
		t.Fatal(err)
	}
	m := simulate.DefaultMeasurement()
	s.options.KBSPolicy = kbsPolicy
	s.options.Policies = append(s.options.Policies, policy.Policy{
		Version: policy.Version, Name: "guests", AllowSimulated: true, Rules: rules,
		SNP: &policy.SNP{Require: []string{}, Products: anchor.Products(), Measurements: []string{hex.EncodeToString(m[:])}},
	})
	s.fixture.verifier = s.replica(t)
	o := s.serving(s.fixture.verifier)
	o.Identify = func(r *http.Request) (role, name string, err error) {
		if len(r.TLS.PeerCertificates) == 0 {
			return "", "", errors.New("no certificate")
		}
		return r.TLS.PeerCertificates[0].Subject.CommonName, "test", nil
	}
	h, err := serve.Handler(o)
	if err != nil {
		t.Fatal(err)
	}
	s.verifier = httptest.NewUnstartedServer(h)
	s.verifier.TLS = &tls.Config{ClientCAs: x509.NewCertPool(), ClientAuth: tls.VerifyClientCertIfGiven, MinVersion: tls.VersionTLS13}
	s.verifier.TLS.ClientCAs.AddCert(s.pki.cert)
	s.verifier.StartTLS()
	t.Cleanup(s.verifier.Close)
	s.newBroker(t)
	client := brokerserve.KBSClient{URL: s.verifier.URL + serve.KBSPath, HTTP: s.pki.client(t, s.verifier, "broker")}
	k, err := brokerserve.KBSHandler(brokerserve.KBSOptions{Broker: s.broker, Verifier: client, Log: o.Log, Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	s.kbs = httptest.NewTLSServer(k)
	t.Cleanup(s.kbs.Close)
	return s
}

func (s *kbsStack) newBroker(t *testing.T) {
	t.Helper()
	store, err := brokerserve.OpenStore(t.Context(), filepath.Join(t.TempDir(), "broker.db"), "broker")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Close() })
	signer, err := receipt.NewSigner("broker", newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	kem, kdf, aead := broker.Suite()
	ownerKey, err := kem.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	keys, err := broker.NewLocalKeys(make([]byte, broker.KEKSize))
	if err != nil {
		t.Fatal(err)
	}
	if s.broker, err = broker.New(broker.Config{
		ID: "broker", Signer: signer, OwnerKey: ownerKey, Keys: keys, Store: store, Verifiers: []receipt.Keys{s.keys(t)}, Simulation: true, Now: time.Now, Access: broker.Roles{},
	}); err != nil {
		t.Fatal(err)
	}
	enc, sender, err := hpke.NewSender(ownerKey.PublicKey(), kdf, aead, []byte(receipt.OwnerWrapInfo))
	if err != nil {
		t.Fatal(err)
	}
	s.key = make([]byte, broker.DataKeySize)
	_, _ = rand.Read(s.key)
	sealed, err := sender.Seal([]byte("weights"), s.key)
	if err != nil {
		t.Fatal(err)
	}
	p := broker.DefaultPolicy()
	p.Protocols = []string{broker.ProtocolKBS}
	alice := broker.Actor{Role: "owner", Name: "alice"}
	if _, err := s.broker.CreateAsset(t.Context(), alice, broker.NewAsset{Name: "weights", Kind: broker.KindWeights, Digest: plan.Sum([]byte("weights")), Enc: enc, Ciphertext: sealed, Policy: &p}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.broker.CreateGrant(t.Context(), alice, broker.NewGrant{
		Assets: []string{"weights"}, Plan: plan.Sum([]byte(guestInit)), NotAfter: time.Now().Add(time.Hour), MaxReleases: 1, AllowSimulated: true,
	}); err != nil {
		t.Fatal(err)
	}
}

var otherVendor = sync.OnceValues(func() (*simulate.Vendor, error) { return simulate.New(simulate.Options{Fast: true}) })

// visitor is a guest that has a session.
type visitor struct {
	*verifiertest.KBSGuest
	s     *kbsStack
	http  *http.Client
	nonce string
}

func (s *kbsStack) visitor(t *testing.T) *visitor {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	v := &visitor{KBSGuest: &verifiertest.KBSGuest{Chip: s.machine.Chip, Key: key, InitData: guestInit}, s: s, http: s.kbs.Client()}
	v.http = &http.Client{Transport: v.http.Transport, Jar: jar}
	code, answer := v.do(t, http.MethodPost, "/kbs/v0/auth", map[string]any{"version": "0.4.0", "tee": "snp", "extra-params": map[string]any{}})
	if v.nonce, _ = answer["nonce"].(string); code != http.StatusOK || v.nonce == "" {
		t.Fatalf("auth: %d %v", code, answer)
	}
	return v
}

func (v *visitor) do(t *testing.T, method, path string, body any) (int, map[string]any) {
	t.Helper()
	b, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	r, err := http.NewRequestWithContext(t.Context(), method, v.s.kbs.URL+path, bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := v.http.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	out := map[string]any{}
	if err := json.NewDecoder(resp.Body).Decode(&out); err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, out
}

func (v *visitor) attestation(t *testing.T, nonce string) map[string]any {
	t.Helper()
	a, err := v.Attestation(nonce)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func (v *visitor) get(t *testing.T) (int, map[string]any) {
	t.Helper()
	return v.do(t, http.MethodGet, "/kbs/v0/resource/alice/weights/weights", nil)
}

// TestKBSWholeWay goes from a challenge to a key, with every part real but the
// processor: guest, broker, verifier, and TLS between them.
func TestKBSWholeWay(t *testing.T) {
	s := newKBSStack(t, "guests")
	v := s.visitor(t)
	a := v.attestation(t, v.nonce)
	code, answer := v.do(t, http.MethodPost, "/kbs/v0/attest", a)
	token, _ := answer["token"].(string)
	if code != http.StatusOK || token == "" {
		t.Fatalf("attest: %d %v", code, answer)
	}
	code, jwe := v.get(t)
	if code != http.StatusOK {
		t.Fatalf("resource: %d %v", code, jwe)
	}
	b, err := json.Marshal(jwe)
	if err != nil {
		t.Fatal(err)
	}
	e, err := jose.ParseEncrypted(string(b), []jose.KeyAlgorithm{jose.ECDH_ES_A256KW}, []jose.ContentEncryption{jose.A256GCM})
	if err != nil {
		t.Fatal(err)
	}
	if key, err := e.Decrypt(v.Key); err != nil || !bytes.Equal(key, s.key) {
		t.Fatalf("key: %v", err)
	}
	if log := s.log.String(); !strings.Contains(log, `"session":"kbs-`) || !strings.Contains(log, `"accepted":true`) {
		t.Error("the appraisal is not in the log")
	}

	// The same evidence again: in its session, and in another.
	if code, answer := v.do(t, http.MethodPost, "/kbs/v0/attest", a); code != http.StatusUnauthorized {
		t.Errorf("replay: %d %v", code, answer)
	}
	thief := s.visitor(t)
	if code, answer := thief.do(t, http.MethodPost, "/kbs/v0/attest", a); code != http.StatusUnauthorized {
		t.Errorf("replay in another session: %d %v", code, answer)
	}

	// The token is for this broker's KBS sessions, and no job's.
	if _, err := s.broker.Release(t.Context(), broker.Actor{Role: "agent", Name: "node-1"}, broker.Ask{Result: token}); err == nil {
		t.Error("a guest's result passed for a job's")
	}
	if relyOn(s.keys(t), token) == nil {
		t.Error("a guest's result passed for a job's")
	}
}

// TestKBSWholeWayRefused has one thing wrong at a time; the guest gets to know which.
func TestKBSWholeWayRefused(t *testing.T) {
	s := newKBSStack(t, "guests")
	other, err := otherVendor()
	if err != nil {
		t.Fatal(err)
	}
	stolen := s.visitor(t)
	for name, try := range map[string]struct {
		guest  func(*visitor)
		change func(v *visitor, a map[string]any)
		want   string
	}{
		"evidence of an earlier nonce": {change: func(v *visitor, a map[string]any) {
			a["tee-evidence"] = v.attestation(t, "earlier")["tee-evidence"]
		}, want: "snp.report-data"},
		"another's evidence, with one's own key": {change: func(v *visitor, a map[string]any) {
			a["tee-evidence"] = stolen.attestation(t, v.nonce)["tee-evidence"]
		}, want: "snp.report-data"},
		"other report data":            {guest: func(v *visitor) { v.SNP.Edit = func(r []byte) { r[0x60] ^= 1 } }, want: "snp.report-data"},
		"a chip under another root":    {guest: func(v *visitor) { v.Chip = other.Chip() }, want: "snp.chain"},
		"a guest that is debugged":     {guest: func(v *visitor) { v.SNP.Debug = true }, want: "policy.snp.debug"},
		"a measurement nobody lists":   {guest: func(v *visitor) { v.SNP.Measurement = &[48]byte{1} }, want: "policy.snp.measurement"},
		"init-data of another machine": {guest: func(v *visitor) { v.SNP.HostData = [32]byte{1} }, want: "kbs.init-data"},
		"a second device":              {guest: func(v *visitor) { v.Additional = `{"nvidia":{}}` }, want: "kbs.additional-evidence"},
		"no evidence at all": {change: func(_ *visitor, a map[string]any) {
			a["tee-evidence"] = map[string]any{"primary_evidence": "", "additional_evidence": ""}
		}, want: "kbs.evidence"},
	} {
		t.Run(name, func(t *testing.T) {
			v := s.visitor(t)
			if try.guest != nil {
				try.guest(v)
			}
			a := v.attestation(t, v.nonce)
			if try.change != nil {
				try.change(v, a)
			}
			code, answer := v.do(t, http.MethodPost, "/kbs/v0/attest", a)
			detail, _ := answer["detail"].(string)
			if code != http.StatusForbidden || !strings.Contains(detail, try.want) {
				t.Errorf("attest: %d %v, want %s", code, answer, try.want)
			}
			if code, answer := v.get(t); code != http.StatusUnauthorized {
				t.Errorf("resource: %d %v", code, answer)
			}
		})
	}
}

func TestKBSWithoutAPolicyRefuses(t *testing.T) {
	s := newKBSStack(t, "")
	v := s.visitor(t)
	code, answer := v.do(t, http.MethodPost, "/kbs/v0/attest", v.attestation(t, v.nonce))
	if detail, _ := answer["detail"].(string); code != http.StatusForbidden || !strings.Contains(detail, "kbs.policy") {
		t.Errorf("%d %v", code, answer)
	}
	if code, answer := v.get(t); code != http.StatusUnauthorized {
		t.Errorf("%d %v", code, answer)
	}
}

// TestKBSIsForBrokers calls as others do, and with what is no request.
func TestKBSIsForBrokers(t *testing.T) {
	s := newKBSStack(t, "guests")
	a, err := (&verifiertest.KBSGuest{Chip: s.machine.Chip, Key: newKey(t), InitData: guestInit}).Attestation("nonce")
	if err != nil {
		t.Fatal(err)
	}
	request, err := verifiertest.KBSRequest("broker", "kbs-1", "snp", "nonce", a)
	if err != nil {
		t.Fatal(err)
	}
	for name, try := range map[string]struct {
		role string
		body []byte
		want int
	}{
		"a broker": {"broker", request, 200}, "nobody": {"", request, 401}, "an agent": {"agent", request, 403}, "an owner": {"owner", request, 403},
		"a relying party": {"relying-party", request, 403}, "an operator": {"operator", request, 403}, "another verifier": {"verifier", request, 403},
		"no JSON": {"broker", []byte("x"), 400}, "too much": {"broker", append(bytes.Clone(request), bytes.Repeat([]byte(" "), verifier.MaxKBSRequest)...), 400},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.verifier.URL+serve.KBSPath, bytes.NewReader(try.body))
			if err != nil {
				t.Fatal(err)
			}
			resp, err := s.pki.client(t, s.verifier, try.role).Do(r)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			if resp.StatusCode != try.want || bytes.Contains(body, []byte(`"token"`)) != (try.want == 200) {
				t.Errorf("%d %s, want %d", resp.StatusCode, body, try.want)
			}
		})
	}
	// And a broker has no job's evidence appraised.
	if _, err := s.as("broker").Appraise(t.Context(), connect.NewRequest(&verifierv1.AppraiseRequest{})); connect.CodeOf(err) != connect.CodePermissionDenied {
		t.Errorf("appraise: %v", err)
	}
}
