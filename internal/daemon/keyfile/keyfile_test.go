package keyfile_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/coffer-run/coffer/internal/daemon/keyfile"
)

func TestRoundTrips(t *testing.T) {
	dir := t.TempDir()
	for name, k := range map[string]struct {
		create func(string) error
		read   func(string) error
	}{
		"p384":   {keyfile.CreateP384, func(p string) error { _, err := keyfile.ReadP384(p); return err }},
		"hpke":   {keyfile.CreateHPKE, func(p string) error { _, err := keyfile.ReadHPKE(p); return err }},
		"note":   {func(p string) error { return keyfile.CreateNote(p, "broker.test/log") }, func(p string) error { _, err := keyfile.ReadNote(p); return err }},
		"secret": {func(p string) error { return keyfile.CreateSecret(p, 32) }, func(p string) error { _, err := keyfile.ReadSecret(p, 32); return err }},
	} {
		t.Run(name, func(t *testing.T) {
			p := filepath.Join(dir, name)
			if err := k.read(p); err == nil {
				t.Error("read a file that does not exist")
			}
			if err := k.create(p); err != nil {
				t.Fatal(err)
			}
			before, err := os.ReadFile(p)
			if err != nil {
				t.Fatal(err)
			}
			if err := k.create(p); err == nil {
				t.Error("created over an existing key")
			}
			if after, _ := os.ReadFile(p); !bytes.Equal(before, after) {
				t.Error("existing key changed")
			}
			if err := k.read(p); err != nil {
				t.Error(err)
			}
			for what, spoil := range map[string]func() error{
				"readable by others": func() error { return os.Chmod(p, 0o640) },
				"cut":                func() error { return os.WriteFile(p, before[:len(before)/2], 0o600) },
				"empty":              func() error { return os.WriteFile(p, nil, 0o600) },
				"longer":             func() error { return os.WriteFile(p, append(bytes.Clone(before), 'x'), 0o600) },
			} {
				if err := spoil(); err != nil {
					t.Fatal(err)
				}
				if err := k.read(p); err == nil {
					t.Errorf("%s: read", what)
				}
				if err := os.WriteFile(p, before, 0o600); err != nil {
					t.Fatal(err)
				}
				if err := os.Chmod(p, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if err := k.read(p); err != nil {
				t.Error(err)
			}
		})
	}
}
