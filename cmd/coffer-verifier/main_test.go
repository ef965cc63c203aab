package main

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	verifierv1 "github.com/coffer-run/coffer/attest/api/verifier/v1"
	"github.com/coffer-run/coffer/attest/api/verifier/v1/verifierv1connect"
	"github.com/coffer-run/coffer/attest/verifier"
	"github.com/coffer-run/coffer/attest/vtpm/vtpmtest"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
	"github.com/coffer-run/coffer/internal/daemon/pki"
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
	for _, r := range []string{daemon.RoleVerifier, daemon.RoleAgent, daemon.RoleEngineer} {
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
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return dir, config{
		"listen": addr, "tls": pki.Files(p, daemon.RoleVerifier, "x"), "id": "verifier.test",
		"keyFile": filepath.Join(dir, "key.pem"), "nonceKeyFile": filepath.Join(dir, "nonce.key"),
		"ekRoots": []config{{"class": "discrete", "file": roots}},
	}
}

func start(t *testing.T, dir string, c config) (*bytes.Buffer, func() error) {
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
	var log bytes.Buffer
	done := make(chan error, 1)
	go func() { done <- run(ctx, []string{"--config", path}, nil, nil, &log) }()
	stop := func() error { cancel(); return <-done }
	t.Cleanup(cancel)
	return &log, stop
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
		for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
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
			if err := os.WriteFile(filepath.Join(dir, "mine.json"), []byte(simulation), 0o600); err != nil {
				t.Fatal(err)
			}
			c["policiesDir"] = dir
		}, "allows simulation"},
		"document that is no policy": {func(t *testing.T, dir string, c config) {
			if err := os.WriteFile(filepath.Join(dir, "bad.json"), []byte(`{}`), 0o600); err != nil {
				t.Fatal(err)
			}
			c["policiesDir"] = dir
		}, "bad.json"},
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
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			err = run(ctx, []string{"--config", path}, nil, nil, &bytes.Buffer{})
			if err == nil || !strings.Contains(err.Error(), row.says) {
				t.Fatalf("got %v, want something about %q", err, row.says)
			}
		})
	}
}
