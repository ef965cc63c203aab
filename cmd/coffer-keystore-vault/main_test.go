package main

import (
	"encoding/json"
	"encoding/pem"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/plugins/host"
	"github.com/coffer-run/coffer/plugins/kit"
)

func TestMain(m *testing.M) {
	if kit.Hosted() {
		daemon.Main(run)
	}
	os.Exit(m.Run())
}

// simulated answers what is asked of one key, as a transit engine does.
func simulated(t *testing.T) *httptest.Server {
	t.Helper()
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Vault-Token") != "s.token" || r.URL.Path != "/v1/transit/keys/weights" {
			w.WriteHeader(http.StatusForbidden)
			_, _ = io.WriteString(w, `{"errors":["permission denied"]}`)
			return
		}
		_, _ = io.WriteString(w, `{"data":{"type":"aes256-gcm96","derived":true,"latest_version":3,"min_decryption_version":2}}`)
	}))
	t.Cleanup(s.Close)
	return s
}

func config(t *testing.T, change func(*Config)) string {
	t.Helper()
	server, dir := simulated(t), t.TempDir()
	c := Config{Store: "owner", Address: server.URL, CAFile: filepath.Join(dir, "ca.pem"), Mount: "transit", TokenFile: filepath.Join(dir, "token"), Keys: []string{"weights"}}
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	for path, b := range map[string][]byte{c.CAFile: ca, c.TokenFile: []byte("s.token\n")} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if change != nil {
		change(&c)
	}
	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "config.json")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestStatus(t *testing.T) {
	var out strings.Builder
	if err := run(t.Context(), []string{"--config", config(t, nil), "status"}, nil, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	if out.String() != "weights  versions 2 to 3  enabled\n" {
		t.Errorf("got %q", out.String())
	}
}

func TestServes(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	sum, err := host.Checksum(exe)
	if err != nil {
		t.Fatal(err)
	}
	k, err := host.StartKeyStore(t.Context(), host.Config{Path: exe, SHA256: sum, Args: []string{"--config", config(t, nil)}}, host.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	i, err := k.Info(t.Context())
	if err != nil || i.Name != "owner" || i.Keys[0].Newest != 3 || !i.RewrapsInside {
		t.Errorf("got %+v, %v", i, err)
	}
}

func TestRefusals(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"no token file":         func(c *Config) { c.TokenFile = "/none" },
		"a token for all":       func(c *Config) { _ = os.Chmod(c.TokenFile, 0o644) },
		"another token":         func(c *Config) { _ = os.WriteFile(c.TokenFile, []byte("s.other"), 0o600) },
		"no TLS":                func(c *Config) { c.Address = strings.Replace(c.Address, "https", "http", 1) },
		"another authority":     func(c *Config) { c.CAFile = "" },
		"a key it may not read": func(c *Config) { c.Keys = []string{"data"} },
	} {
		t.Run(name, func(t *testing.T) {
			if err := run(t.Context(), []string{"--config", config(t, change), "status"}, nil, io.Discard, io.Discard); err == nil {
				t.Error("done")
			}
		})
	}
	for name, args := range map[string][]string{"no configuration": {"status"}, "by hand": {"--config", config(t, nil)}, "an unknown command": {"--config", config(t, nil), "rotate"}} {
		t.Run(name, func(t *testing.T) {
			if err := run(t.Context(), args, nil, io.Discard, io.Discard); err == nil {
				t.Error("done")
			}
		})
	}
}
