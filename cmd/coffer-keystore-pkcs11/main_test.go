package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/plugins/contract/keystore"
	"github.com/coffer-run/coffer/plugins/host"
	"github.com/coffer-run/coffer/plugins/keystore/keystoretest"
	"github.com/coffer-run/coffer/plugins/kit"
)

const (
	// asCommand in the environment makes this test's own binary the command.
	asCommand = "COFFER_TEST_AS_COMMAND"
	module    = "/usr/lib/softhsm/libsofthsm2.so"
)

func TestMain(m *testing.M) {
	if kit.Hosted() || os.Getenv(asCommand) != "" {
		daemon.Main(run)
	}
	os.Exit(m.Run())
}

// token is a SoftHSM token in a folder of its own.
type token struct{ env, config string }

func needSoftHSM(t *testing.T) {
	t.Helper()
	if _, err := os.Stat(module); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip("no SoftHSM")
	}
}

func newToken(t *testing.T, label string) token {
	t.Helper()
	needSoftHSM(t)
	dir := t.TempDir()
	conf, pin, config := filepath.Join(dir, "softhsm2.conf"), filepath.Join(dir, "pin"), filepath.Join(dir, "config.json")
	b, err := json.Marshal(Config{Store: "hsm", Module: module, Token: label, PINFile: pin, Keys: []string{"one", "two"}})
	if err := errors.Join(err,
		os.Mkdir(filepath.Join(dir, "tokens"), 0o700),
		os.WriteFile(conf, []byte("directories.tokendir = "+filepath.Join(dir, "tokens")+"\nlog.level = ERROR\n"), 0o600),
		os.WriteFile(pin, []byte("482915\n"), 0o600),
		os.WriteFile(config, b, 0o600),
	); err != nil {
		t.Fatal(err)
	}
	k := token{env: "SOFTHSM2_CONF=" + conf, config: config}
	cmd := exec.Command("softhsm2-util", "--init-token", "--free", "--label", label, "--so-pin", "so-pin-1", "--pin", "482915")
	cmd.Env = append(os.Environ(), k.env)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	k.must(t, "generate", "one")
	k.must(t, "generate", "two")
	return k
}

func (k token) command(t *testing.T, args ...string) (string, error) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, append([]string{"--config", k.config}, args...)...)
	cmd.Env = append(os.Environ(), asCommand+"=1", k.env)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Run()
	return out.String(), err
}

func (k token) must(t *testing.T, args ...string) string {
	t.Helper()
	out, err := k.command(t, args...)
	if err != nil {
		t.Fatalf("%v: %v: %s", args, err, out)
	}
	return out
}

func (k token) start(t *testing.T) *host.KeyStore {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	sum, err := host.Checksum(exe)
	if err != nil {
		t.Fatal(err)
	}
	s, err := host.StartKeyStore(t.Context(), host.Config{Path: exe, SHA256: sum, Args: []string{"--config", k.config}}, host.Options{Env: []string{k.env}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// TestConformance is the store in a process of its own, and its owner in another:
// what the owner does in the token, the store sees at its next call.
func TestConformance(t *testing.T) {
	k := newToken(t, "coffer")
	keystoretest.Run(t, keystoretest.Fixture{
		Store:   k.start(t),
		Again:   func(t *testing.T) keystore.Store { return k.start(t) },
		Foreign: func(t *testing.T) keystore.Store { return newToken(t, "coffer").start(t) },
		Rotate:  func(t *testing.T, id string) { k.must(t, "generate", id) },
		Disable: func(t *testing.T, id string) { k.must(t, "disable", id) },
	})
	if out := k.must(t, "status"); out != "one  versions 1 to 2  enabled\ntwo  versions 1 to 1  disabled\n" {
		t.Errorf("status says %q", out)
	}
}

func TestRefusals(t *testing.T) {
	k := newToken(t, "coffer")
	for name, args := range map[string][]string{
		"no command by hand":      nil,
		"an unknown command":      {"destroy", "one"},
		"a key too many":          {"generate", "one", "two"},
		"a key not on offer":      {"generate", "three"},
		"a key that is not there": {"disable", "none"},
	} {
		t.Run(name, func(t *testing.T) {
			if out, err := k.command(t, args...); err == nil {
				t.Errorf("done: %s", out)
			}
		})
	}
}
