package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/api/broker/v1/brokerv1connect"
	"github.com/coffer-run/coffer/attest/api/refusal"
	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
	"github.com/coffer-run/coffer/internal/daemon/pki"
	"github.com/coffer-run/coffer/internal/loopback"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// state makes everything that a broker needs, in a folder.
func state(t *testing.T) (dir string, c Config) {
	t.Helper()
	dir = t.TempDir()
	check(t, pki.Create(dir))
	for _, id := range [][2]string{{"broker", "broker"}, {"owner", "alice"}, {"agent", "node-1"}, {"auditor", "vera"}} {
		check(t, pki.Issue(dir, id[0], id[1]))
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	check(t, keyfile.CreateP384(in("broker-sign.key")))
	check(t, keyfile.CreateP384(in("verifier-sign.key")))
	check(t, keyfile.CreateSecret(in("kek"), broker.KEKSize))
	check(t, keyfile.CreateHPKE(in("owner-wrap.key")))
	check(t, keyfile.CreateNote(in("log.key"), translog.KeyName("broker.test")))
	vk, err := keyfile.ReadP384(in("verifier-sign.key"))
	check(t, err)
	vs, err := receipt.NewSigner("verifier.test", vk)
	check(t, err)
	jwks, err := vs.JWKS()
	check(t, err)
	check(t, os.WriteFile(in("verifier.jwks"), jwks, 0o600))
	return dir, Config{
		Listen: loopback.Addr(t), TLS: pki.Files(dir, "broker", "broker"), ID: "broker.test", KeyFile: in("broker-sign.key"), KEKFile: in("kek"),
		OwnerWrapKeyFile: in("owner-wrap.key"), DB: in("broker.db"), Log: Log{Dir: in("log"), KeyFile: in("log.key")}, Verifiers: []Verifier{{ID: "verifier.test", JWKSFile: in("verifier.jwks")}},
	}
}

func write(t *testing.T, dir string, c Config) string {
	t.Helper()
	b, err := json.Marshal(c)
	check(t, err)
	path := filepath.Join(dir, "config.json")
	check(t, os.WriteFile(path, b, 0o600))
	return path
}

func TestServesAndKeepsStateOverARestart(t *testing.T) {
	dir, c := state(t)
	path := write(t, dir, c)
	client := func(role, name string) brokerv1connect.BrokerServiceClient {
		h, err := pki.Files(dir, role, name).HTTPClient(daemon.RoleBroker)
		check(t, err)
		return brokerv1connect.NewBrokerServiceClient(h, "https://"+c.Listen)
	}
	for start := range 2 {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		var stderr bytes.Buffer
		go func() { done <- run(ctx, []string{"--config", path}, nil, nil, &stderr) }()
		h, err := pki.Files(dir, "owner", "alice").HTTPClient(daemon.RoleBroker)
		check(t, err)
		ready := false
		for range 6000 {
			if resp, err := h.Get("https://" + c.Listen + daemon.Health); err == nil {
				ready = resp.StatusCode == http.StatusOK
				check(t, resp.Body.Close())
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		if !ready {
			cancel()
			t.Fatalf("not ready: %v\n%s", <-done, stderr.String())
		}
		if start == 0 {
			_, err = client("owner", "alice").CreateAsset(ctx, connect.NewRequest(&brokerv1.CreateAssetRequest{Name: "ckpt", Kind: brokerv1.AssetKind_ASSET_KIND_CHECKPOINTS}))
			check(t, err)
		}
		got, err := client("agent", "node-1").GetAsset(ctx, connect.NewRequest(&brokerv1.GetAssetRequest{Name: "ckpt"}))
		check(t, err)
		if got.Msg.GetAsset().GetOwner() != "alice" {
			t.Errorf("asset %v", got.Msg)
		}
		_, err = client("agent", "node-1").CreateAsset(ctx, connect.NewRequest(&brokerv1.CreateAssetRequest{Name: "x", Kind: brokerv1.AssetKind_ASSET_KIND_CHECKPOINTS}))
		if r, ok := refusal.Decode(err); !ok || r.Stage != "authorize" {
			t.Errorf("an agent made an asset: %v", err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestRefusesToStart(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(t *testing.T, dir string, c *Config)
		want   string
	}{
		"no address":           {func(_ *testing.T, _ string, c *Config) { c.Listen = "" }, "listen and db are required"},
		"no database":          {func(_ *testing.T, _ string, c *Config) { c.DB = "" }, "listen and db are required"},
		"no tls":               {func(_ *testing.T, _ string, c *Config) { c.TLS = daemon.TLS{} }, "tls needs"},
		"no id":                {func(_ *testing.T, _ string, c *Config) { c.ID = "" }, "issuer"},
		"no verifier":          {func(_ *testing.T, _ string, c *Config) { c.Verifiers = nil }, "at least one verifier"},
		"verifier without key": {func(_ *testing.T, dir string, c *Config) { c.Verifiers[0].JWKSFile = filepath.Join(dir, "none") }, "keys of verifier"},
		"no signing key":       {func(_ *testing.T, dir string, c *Config) { c.KeyFile = filepath.Join(dir, "none") }, "no such file"},
		"key for all to read":  {func(t *testing.T, _ string, c *Config) { check(t, os.Chmod(c.KEKFile, 0o644)) }, "chmod 600"},
		"owner key is the kek": {func(_ *testing.T, _ string, c *Config) {
			c.KEKFile = c.OwnerWrapKeyFile
			c.OwnerWrapKeyFile = c.KeyFile
		}, "not an ML-KEM"},
		"kek of another size": {func(t *testing.T, dir string, c *Config) {
			c.KEKFile = filepath.Join(dir, "short")
			check(t, keyfile.CreateSecret(c.KEKFile, 16))
		}, "has 16 bytes"},
		"port in use": {func(t *testing.T, _ string, c *Config) {
			l, err := net.Listen("tcp", c.Listen)
			check(t, err)
			t.Cleanup(func() { _ = l.Close() })
		}, "is another stack up?"},
	} {
		t.Run(name, func(t *testing.T) {
			dir, c := state(t)
			tc.change(t, dir, &c)
			var stderr bytes.Buffer
			err := run(t.Context(), []string{"--config", write(t, dir, c)}, nil, nil, &stderr)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}
