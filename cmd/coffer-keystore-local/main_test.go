package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/plugins/contract/keystore"
	"github.com/coffer-run/coffer/plugins/host"
	"github.com/coffer-run/coffer/plugins/keystore/keystoretest"
	"github.com/coffer-run/coffer/plugins/kit"
)

// asCommand in the environment makes this test's own binary the command.
const asCommand = "COFFER_TEST_AS_COMMAND"

func TestMain(m *testing.M) {
	if kit.Hosted() || os.Getenv(asCommand) != "" {
		daemon.Main(run)
	}
	os.Exit(m.Run())
}

func command(t *testing.T, args ...string) (string, error) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, args...)
	cmd.Env = append(os.Environ(), asCommand+"=1")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Run()
	return out.String(), err
}

func must(t *testing.T, args ...string) string {
	t.Helper()
	out, err := command(t, args...)
	if err != nil {
		t.Fatalf("%v: %v: %s", args, err, out)
	}
	return out
}

func config(t *testing.T, change func(*Config)) string {
	t.Helper()
	dir := t.TempDir()
	c := Config{Store: "main", File: filepath.Join(dir, "keys.json"), PassphraseFile: filepath.Join(dir, "passphrase")}
	if err := os.WriteFile(c.PassphraseFile, []byte("correct horse battery staple\n"), 0o600); err != nil {
		t.Fatal(err)
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

func start(t *testing.T, config string, env ...string) *host.KeyStore {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	sum, err := host.Checksum(exe)
	if err != nil {
		t.Fatal(err)
	}
	k, err := host.StartKeyStore(t.Context(), host.Config{Path: exe, SHA256: sum, Args: []string{"--config", config}}, host.Options{Env: env})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k.Close() })
	return k
}

func made(t *testing.T) string {
	t.Helper()
	c := config(t, nil)
	must(t, "--config", c, "create", "one")
	must(t, "--config", c, "add", "two")
	return c
}

// TestConformance is the store in a process of its own, and its owner in another.
func TestConformance(t *testing.T) {
	c := made(t)
	keystoretest.Run(t, keystoretest.Fixture{
		Store:   start(t, c),
		Again:   func(t *testing.T) keystore.Store { return start(t, c) },
		Foreign: func(t *testing.T) keystore.Store { return start(t, made(t)) },
		Rotate:  func(t *testing.T, id string) { must(t, "--config", c, "rotate", id) },
		Disable: func(t *testing.T, id string) { must(t, "--config", c, "disable", id) },
	})
	if out := must(t, "--config", c, "status"); out != "one  versions 1 to 2  enabled\ntwo  versions 1 to 1  disabled\n" {
		t.Errorf("status says %q", out)
	}
	must(t, "--config", c, "enable", "two")
	if out := must(t, "--config", c, "status"); strings.Contains(out, "disabled") {
		t.Errorf("status says %q", out)
	}
}

func TestCredential(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "keys"), []byte("correct horse battery staple"), 0o400); err != nil {
		t.Fatal(err)
	}
	c := config(t, func(c *Config) { c.PassphraseFile, c.PassphraseCredential = "", "keys" })
	if out, err := command(t, "--config", c, "create", "one"); err == nil {
		t.Errorf("made without a credential: %s", out)
	}
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	must(t, "--config", c, "create", "one")
	if err := start(t, c, "CREDENTIALS_DIRECTORY="+dir).Health(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestRefusals(t *testing.T) {
	c := made(t)
	for name, args := range map[string][]string{
		"no configuration":   {"status"},
		"no command by hand": {"--config", c},
		"an unknown command": {"--config", c, "destroy", "one"},
		"a key too many":     {"--config", c, "rotate", "one", "two"},
		"no key":             {"--config", c, "rotate"},
		"an unknown key":     {"--config", c, "disable", "none"},
		"made twice":         {"--config", c, "create", "one"},
	} {
		t.Run(name, func(t *testing.T) {
			if out, err := command(t, args...); err == nil {
				t.Errorf("done: %s", out)
			}
		})
	}
	for name, change := range map[string]func(*Config){
		"no lock":                    func(c *Config) { c.PassphraseFile = "" },
		"two locks":                  func(c *Config) { c.TPM = &TPM{Device: "/dev/tpmrm0"} },
		"no file":                    func(c *Config) { c.File = "" },
		"a passphrase for all":       func(c *Config) { _ = os.Chmod(c.PassphraseFile, 0o644) },
		"no TPM":                     func(c *Config) { c.PassphraseFile, c.TPM = "", &TPM{Device: "/none"} },
		"a credential with a folder": func(c *Config) { c.PassphraseFile, c.PassphraseCredential = "", "../x" },
	} {
		t.Run(name, func(t *testing.T) {
			if out, err := command(t, "--config", config(t, change), "create", "one"); err == nil {
				t.Errorf("done: %s", out)
			}
		})
	}
}
