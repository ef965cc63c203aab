package main

import (
	"bytes"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
	"github.com/coffer-run/coffer/internal/keystore"
	"github.com/coffer-run/coffer/plugins/host"
)

// localStore builds the local key store's program, makes a store with it, and
// returns the store's configuration.
func localStore(t *testing.T, name string) keystore.Config {
	t.Helper()
	dir := t.TempDir()
	program, config := filepath.Join(dir, "coffer-keystore-local"), filepath.Join(dir, "config.json")
	run := func(name string, args ...string) {
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s %v: %v: %s", name, args, err, out)
		}
	}
	run("go", "build", "-o", program, "../coffer-keystore-local")
	if err := os.WriteFile(filepath.Join(dir, "passphrase"), []byte("correct horse battery staple\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	text := `{"store": "` + name + `", "file": "` + dir + `/keys.json", "passphraseFile": "` + dir + `/passphrase"}`
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	run(program, "--config", config, "create", "default")
	sum, err := host.Checksum(program)
	if err != nil {
		t.Fatal(err)
	}
	return keystore.Config{Name: name, Plugin: host.Config{Path: program, SHA256: sum, Args: []string{"--config", config}}}
}

func TestKeyStores(t *testing.T) {
	kek := filepath.Join(t.TempDir(), "kek")
	if err := keyfile.CreateSecret(kek, broker.KEKSize); err != nil {
		t.Fatal(err)
	}
	main := localStore(t, "main")
	wrong := main
	wrong.Plugin.SHA256 = strings.Repeat("0", 64)
	renamed := main
	renamed.Name = "other"
	log := slog.New(slog.DiscardHandler)

	for name, c := range map[string]Config{
		"neither":             {KeyStores: []keystore.Config{main}},
		"both":                {KEKFile: kek, DefaultKeyStore: "main", KeyStores: []keystore.Config{main}},
		"a default not there": {DefaultKeyStore: "none", KeyStores: []keystore.Config{main}},
		"twice":               {KEKFile: kek, KeyStores: []keystore.Config{main, main}},
		"a wrong checksum":    {DefaultKeyStore: "main", KeyStores: []keystore.Config{wrong}},
		"another name":        {DefaultKeyStore: "other", KeyStores: []keystore.Config{renamed}},
	} {
		t.Run(name, func(t *testing.T) {
			var cfg broker.Config
			if _, err := keyStores(t.Context(), c, &cfg, log); err == nil {
				t.Error("started")
			}
		})
	}

	for name, c := range map[string]Config{
		"a key-encryption key":        {KEKFile: kek},
		"a plugin":                    {DefaultKeyStore: "main", KeyStores: []keystore.Config{main}},
		"a key, and a plugin besides": {KEKFile: kek, KeyStores: []keystore.Config{main}},
	} {
		t.Run(name, func(t *testing.T) {
			var cfg broker.Config
			stop, err := keyStores(t.Context(), c, &cfg, log)
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := stop(); err != nil {
					t.Error(err)
				}
			}()
			if len(cfg.KeyStores) != len(c.KeyStores) {
				t.Errorf("%d stores", len(cfg.KeyStores))
			}
			all := []broker.KeyStore{cfg.Keys}
			for _, s := range cfg.KeyStores {
				all = append(all, s)
			}
			for _, s := range all {
				key := broker.GenerateDataKey()
				w, err := s.Wrap(t.Context(), key, []byte("asset"))
				if err != nil {
					t.Fatal(err)
				}
				got, err := s.Unwrap(t.Context(), w, []byte("asset"))
				if err != nil || !bytes.Equal(got.Reveal(), key.Reveal()) {
					t.Errorf("another key, %v", err)
				}
			}
		})
	}
}
