package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	verifierv1 "github.com/coffer-run/coffer/attest/api/verifier/v1"
	"github.com/coffer-run/coffer/attest/api/verifier/v1/verifierv1connect"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/verifier"
	"github.com/coffer-run/coffer/attest/vtpm/vtpmtest"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
	"github.com/coffer-run/coffer/internal/daemon/pki"
	"github.com/coffer-run/coffer/internal/loopback"
)

type config map[string]any

// setup makes keys and identities, and a configuration that is complete.
func setup(t *testing.T) (dir string, c config) {
	t.Helper()
	dir = t.TempDir()
	p := filepath.Join(dir, "pki")
	if err := pki.Create(p); err != nil {
		t.Fatal(err)
	}
	for _, r := range []string{daemon.RoleVerifier, daemon.RoleAgent, daemon.RoleEngineer, daemon.RoleRelyingParty, daemon.RoleOperator} {
		if err := pki.Issue(p, r, "x"); err != nil {
			t.Fatal(err)
		}
	}
	if err := keyfile.CreateP384(filepath.Join(dir, "key.pem")); err != nil {
		t.Fatal(err)
	}
	if err := keyfile.CreateSecret(filepath.Join(dir, "nonce.key"), verifier.NonceKeySize); err != nil {
		t.Fatal(err)
	}
	tpm, err := vtpmtest.New(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	roots := filepath.Join(dir, "ek.pem")
	if err := os.WriteFile(roots, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: tpm.Root.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir, config{
		"listen": loopback.Addr(t), "tls": pki.Files(p, daemon.RoleVerifier, "x"), "id": "verifier.test",
		"keyFile": filepath.Join(dir, "key.pem"), "nonceKeyFile": filepath.Join(dir, "nonce.key"),
		"ekRoots": []config{{"class": "discrete", "file": roots}},
	}
}

// buffer is a log that is read while it is written.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func start(t *testing.T, dir string, c config) (*buffer, func() error) {
	t.Helper()
	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "config.json")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	log := &buffer{}
	done := make(chan error, 1)
	go func() { done <- run(ctx, []string{"--config", path}, nil, nil, log) }()
	stop := func() error { cancel(); return <-done }
	t.Cleanup(cancel)
	return log, stop
}

func TestServes(t *testing.T) {
	dir, c := setup(t)
	c["endorsements"] = config{"dir": t.TempDir(), "onOutage": "unexpired"}
	log, stop := start(t, dir, c)
	ask := func(role string) error {
		hc, err := pki.Files(filepath.Join(dir, "pki"), role, "x").HTTPClient(daemon.RoleVerifier)
		if err != nil {
			t.Fatal(err)
		}
		client := verifierv1connect.NewVerifierServiceClient(hc, fmt.Sprintf("https://%s", c["listen"]))
		var last error
		for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
			_, last = client.Challenge(t.Context(), connect.NewRequest(&verifierv1.ChallengeRequest{}))
			if connect.CodeOf(last) != connect.CodeUnavailable {
				break
			}
		}
		return last
	}
	if err := ask(daemon.RoleAgent); err != nil {
		t.Fatal(err)
	}
	if err := ask(daemon.RoleEngineer); connect.CodeOf(err) != connect.CodePermissionDenied {
		t.Errorf("an engineer may ask for a nonce: %v", err)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), `"simulated":false`) || !strings.Contains(log.String(), `"endorsements":true,"fetch":false`) {
		t.Errorf("log %s", log)
	}
}

// file writes a file, and folder the folder that a file is in.
func file(t *testing.T, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func folder(t *testing.T, dir, name, text string) string {
	t.Helper()
	file(t, filepath.Join(dir, "policies"), name, text)
	return filepath.Join(dir, "policies")
}

func newSource(t *testing.T) *receipt.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := receipt.NewSigner("values.test", key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// withSource adds a policy whose reference values a source signs.
func withSource(t *testing.T, dir string, c config, source *receipt.Signer) {
	t.Helper()
	p, err := policy.Named("cpu-only")
	if err != nil {
		t.Fatal(err)
	}
	keys, err := source.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	p.Name, p.Sources = "ours", []policy.Source{{Issuer: source.Issuer(), Keys: keys}}
	b, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	c["policiesDir"] = folder(t, dir, "ours.json", string(b))
}

func values(t *testing.T, source *receipt.Signer, valid time.Duration) string {
	t.Helper()
	until := time.Now().Add(valid)
	token, err := policy.SignValues(source, policy.Values{
		IssuedAt: until.Add(-2 * time.Hour).Unix(), Expires: until.Unix(), SNP: &policy.SNPValues{Measurements: []string{strings.Repeat("ab", 48)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// client speaks to the daemon as a role, which may have to start first.
func client(t *testing.T, dir string, c config, role string) (*http.Client, string) {
	t.Helper()
	hc, err := pki.Files(filepath.Join(dir, "pki"), role, "x").HTTPClient(daemon.RoleVerifier)
	if err != nil {
		t.Fatal(err)
	}
	url := fmt.Sprintf("https://%s", c["listen"])
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		resp, err := hc.Get(url + "/readyz")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return hc, url
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("the verifier is not ready: %v", err)
		}
	}
}

// TestTakesItsConfiguration starts with one of everything that a deployment may
// trust besides the vendors.
func TestTakesItsConfiguration(t *testing.T) {
	dir, c := setup(t)
	source := newSource(t)
	withSource(t, dir, c, source)
	c["referenceValues"] = []string{file(t, dir, "values.jwt", values(t, source, time.Hour)+"\n")}
	p, err := policy.Named("production")
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range p.Rules {
		file(t, dir, filepath.Join("policies", "folder", name), text)
	}
	p.Rules, p.Name = nil, "folder"
	b, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	file(t, dir, "policies/folder/policy.json", strings.Replace(string(b), `"rules":null,`, "", 1))
	file(t, dir, "policies/README", "notes")
	c["attestationKeys"] = []config{{"class": "discrete", "names": []string{"000b" + strings.Repeat("ab", 32)}}}
	c["paravisors"] = []string{strings.Repeat("ab", 48)}
	log, stop := start(t, dir, c)
	client(t, dir, c, daemon.RoleAgent)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"ours@sha384:", "folder@sha384:", `"referenceValues":1`, `"endorsementKeyRoots":1`} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log lacks %s: %s", want, log)
		}
	}
}

// TestHangup changes keys while the daemon serves, in the order of the
// documentation, and out of order.
func TestHangup(t *testing.T) {
	dir, c := setup(t)
	log, stop := start(t, dir, c)
	hc, url := client(t, dir, c, daemon.RoleAgent)
	next := filepath.Join(dir, "next.pem")
	if err := keyfile.CreateP384(next); err != nil {
		t.Fatal(err)
	}
	key, err := keyfile.ReadP384(next)
	if err != nil {
		t.Fatal(err)
	}
	kid, err := receipt.KeyID(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	jwks := func() string {
		t.Helper()
		resp, err := hc.Get(url + "/.well-known/jwks.json")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	hangup := func(says string) {
		t.Helper()
		n := strings.Count(log.String(), says)
		b, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		file(t, dir, "config.json", string(b))
		if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(time.Minute); strings.Count(log.String(), says) == n; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("the log does not say %q: %s", says, log)
			}
		}
	}
	first := c["keyFile"].(string)
	before := jwks()
	c["keyFile"] = next
	hangup("not published before")
	c["keyFile"] = filepath.Join(dir, "none.pem")
	hangup("none.pem")
	if jwks() != before {
		t.Error("a step that was refused changed the keys")
	}
	c["keyFile"], c["publishedKeyFiles"] = first, []string{next}
	hangup(`"published":2`)
	if !strings.Contains(jwks(), kid) {
		t.Error("the next key is not published")
	}
	c["keyFile"], c["publishedKeyFiles"] = next, []string{first}
	listen := c["listen"]
	c["listen"] = "127.0.0.1:1"
	hangup("other changes")
	c["listen"] = listen
	if !strings.HasPrefix(jwks(), `{"keys":[{"use":"sig","kty":"EC","kid":"`+kid) {
		t.Errorf("the next key is not first: %s", jwks())
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
}

func TestRefusesToStart(t *testing.T) {
	simulation := `{"version":"coffer.run/policy/v1","name":"mine","allowSimulated":true,
"snp":{"require":[],"allowDebug":false,"allowMigration":false,"maxVMPL":0,"products":["Genoa"]}}`
	for situation, row := range map[string]struct {
		change func(t *testing.T, dir string, c config)
		says   string
	}{
		"simulation roots":   {func(_ *testing.T, dir string, c config) { c["simulationDir"] = dir }, "unknown field"},
		"software TPM roots": {func(_ *testing.T, _ string, c config) { c["ekRoots"].([]config)[0]["class"] = "software" }, "simulation only"},
		"unknown TPM class":  {func(_ *testing.T, _ string, c config) { c["ekRoots"].([]config)[0]["class"] = "any" }, "unknown trust class"},
		"roots that are no certificates": {func(_ *testing.T, dir string, c config) {
			c["ekRoots"].([]config)[0]["file"] = filepath.Join(dir, "key.pem")
		}, "certificates only"},
		"no file of roots": {func(_ *testing.T, dir string, c config) {
			c["ekRoots"].([]config)[0]["file"] = filepath.Join(dir, "missing.pem")
		}, "missing.pem"},
		"policy that accepts simulation": {func(t *testing.T, dir string, c config) {
			c["policiesDir"] = folder(t, dir, "mine.json", simulation)
		}, "allows simulation"},
		"document that is no policy": {func(t *testing.T, dir string, c config) {
			c["policiesDir"] = folder(t, dir, "bad.json", `{}`)
		}, "bad.json"},
		"policy folder without its rules": {func(t *testing.T, dir string, c config) {
			c["policiesDir"] = folder(t, dir, "mine/policy.json", strings.Replace(simulation, `"allowSimulated":true`, `"allowSimulated":false`, 1))
		}, "no *.rego"},
		"reference values that nobody signed": {func(t *testing.T, dir string, c config) {
			withSource(t, dir, c, newSource(t))
			c["referenceValues"] = []string{file(t, dir, "values.json", `{"version":"coffer.run/reference-values/v1","snp":{}}`)}
		}, "reference values 0"},
		"reference values that another source signed": {func(t *testing.T, dir string, c config) {
			withSource(t, dir, c, newSource(t))
			c["referenceValues"] = []string{file(t, dir, "values.jwt", values(t, newSource(t), time.Hour))}
		}, "signed by a key that is none"},
		"reference values that were changed": {func(t *testing.T, dir string, c config) {
			source := newSource(t)
			withSource(t, dir, c, source)
			token := values(t, source, time.Hour)
			body, signature, _ := strings.Cut(token[strings.IndexByte(token, '.')+1:], ".")
			changed := token[:strings.IndexByte(token, '.')+1] + body[:len(body)-4] + "AAAA." + signature
			c["referenceValues"] = []string{file(t, dir, "values.jwt", changed)}
		}, "signature"},
		"reference values that have expired": {func(t *testing.T, dir string, c config) {
			source := newSource(t)
			withSource(t, dir, c, source)
			c["referenceValues"] = []string{file(t, dir, "values.jwt", values(t, source, -time.Minute))}
		}, "not valid at"},
		"reference values that no policy asks for": {func(t *testing.T, dir string, c config) {
			c["referenceValues"] = []string{file(t, dir, "values.jwt", values(t, newSource(t), time.Hour))}
		}, "names no source"},
		"no file of reference values": {func(_ *testing.T, dir string, c config) {
			c["referenceValues"] = []string{filepath.Join(dir, "none.jwt")}
		}, "none.jwt"},
		"attestation key that is no name": {func(_ *testing.T, _ string, c config) {
			c["attestationKeys"] = []config{{"class": "discrete", "names": []string{"00"}}}
		}, "want a name under SHA-256"},
		"attestation key of a software TPM": {func(_ *testing.T, _ string, c config) {
			c["attestationKeys"] = []config{{"class": "software", "names": []string{"000b" + strings.Repeat("00", 32)}}}
		}, "simulation only"},
		"KBS policy that there is not":  {func(_ *testing.T, _ string, c config) { c["kbsPolicy"] = "guests" }, "no policy of this name"},
		"KBS policy for whole machines": {func(_ *testing.T, _ string, c config) { c["kbsPolicy"] = "production" }, "asks for a TPM"},
		"paravisor of no key":           {func(_ *testing.T, _ string, c config) { c["paravisors"] = []string{strings.Repeat("0", 96)} }, "no key"},
		"paravisor in another form": {func(_ *testing.T, _ string, c config) {
			c["paravisors"] = []string{strings.Repeat("AB", 48)}
		}, "lower-case hex"},
		"published key that signs": {func(_ *testing.T, dir string, c config) {
			c["publishedKeyFiles"] = []string{filepath.Join(dir, "key.pem")}
		}, "twice"},
		"published key that is none": {func(t *testing.T, dir string, c config) {
			c["publishedKeyFiles"] = []string{file(t, dir, "next.pem", "key")}
		}, "next.pem"},
		"no further nonce key": {func(_ *testing.T, dir string, c config) {
			c["otherNonceKeyFiles"] = []string{filepath.Join(dir, "next.key")}
		}, "next.key"},
		"policy folder that is not there": {func(_ *testing.T, dir string, c config) { c["policiesDir"] = filepath.Join(dir, "none") }, "none"},
		"no signing key":                  {func(_ *testing.T, dir string, c config) { c["keyFile"] = filepath.Join(dir, "none.pem") }, "none.pem"},
		"no nonce key":                    {func(_ *testing.T, _ string, c config) { delete(c, "nonceKeyFile") }, "key file"},
		"nonce key that others may read": {func(t *testing.T, dir string, _ config) {
			if err := os.Chmod(filepath.Join(dir, "nonce.key"), 0o644); err != nil { //nolint:gosec // what the test is about
				t.Fatal(err)
			}
		}, "nonce.key"},
		"endorsements without a folder": {func(_ *testing.T, dir string, c config) {
			c["endorsements"] = config{"dir": filepath.Join(dir, "nowhere")}
		}, "nowhere"},
		"endorsements that an outage makes acceptable": {func(_ *testing.T, dir string, c config) {
			c["endorsements"] = config{"dir": dir, "onOutage": "accept"}
		}, "on outage"},
		"endorsements without TLS": {func(_ *testing.T, dir string, c config) {
			c["endorsements"] = config{"dir": dir, "fetch": true, "rim": "http://rim.example/"}
		}, "want https"},
		"no name":     {func(_ *testing.T, _ string, c config) { delete(c, "id") }, "issuer"},
		"no address":  {func(_ *testing.T, _ string, c config) { delete(c, "listen") }, "listen"},
		"no identity": {func(_ *testing.T, _ string, c config) { delete(c, "tls") }, "tls"},
	} {
		t.Run(situation, func(t *testing.T) {
			dir, c := setup(t)
			row.change(t, dir, c)
			b, err := json.Marshal(c)
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(dir, "daemon.conf")
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			err = run(ctx, []string{"--config", path}, nil, nil, &bytes.Buffer{})
			if err == nil || !strings.Contains(err.Error(), row.says) {
				t.Fatalf("got %v, want something about %q", err, row.says)
			}
		})
	}
}
