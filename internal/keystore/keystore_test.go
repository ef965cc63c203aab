package keystore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/internal/keystore"
	contract "github.com/coffer-run/coffer/plugins/contract/keystore"
	"github.com/coffer-run/coffer/plugins/host"
	"github.com/coffer-run/coffer/plugins/keystore/local"
	"github.com/coffer-run/coffer/plugins/kit"
)

// known is a lock that takes no time, over a key that everybody knows.
type known struct{}

func (known) Make() (local.Params, []byte, error) { return local.Params{}, make([]byte, 32), nil }
func (known) Open(local.Params) ([]byte, error)   { return make([]byte, 32), nil }

// TestMain makes this test's own binary a plugin when a host starts it: the
// local store of the given name over the given file, or one that asks for the
// broker's attestation.
func TestMain(m *testing.M) {
	if !kit.Hosted() {
		os.Exit(m.Run())
	}
	s, err := local.Open(os.Args[2], os.Args[1], known{})
	if err == nil {
		var store contract.Store = s
		if len(os.Args) > 3 {
			store = attested{s}
		}
		err = kit.ServeKeyStore(store, os.Stderr)
	}
	_, _ = fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

type attested struct{ contract.Store }

func (a attested) Info(ctx context.Context) (*contract.Info, error) {
	i, err := a.Store.Info(ctx)
	if err == nil {
		i.AttestationRequired = true
	}
	return i, err
}

func made(t *testing.T, name string) (string, *local.Store) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "keys.json")
	if err := local.Create(path, name, "default", known{}); err != nil {
		t.Fatal(err)
	}
	s, err := local.Open(path, name, known{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return path, s
}

func config(t *testing.T, name string, args ...string) keystore.Config {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	sum, err := host.Checksum(exe)
	if err != nil {
		t.Fatal(err)
	}
	return keystore.Config{Name: name, Plugin: host.Config{Path: exe, SHA256: sum, Args: args}}
}

func start(t *testing.T, c keystore.Config) *keystore.Store {
	t.Helper()
	s, err := keystore.Start(t.Context(), c, nil, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func TestBrokersKeyStore(t *testing.T) {
	path, owner := made(t, "main")
	s := start(t, config(t, "main", "main", path))
	key := broker.GenerateDataKey()
	plain := bytes.Clone(key.Reveal())
	w, err := s.Wrap(t.Context(), key, []byte("asset"))
	if err != nil {
		t.Fatal(err)
	}
	opens := func(t *testing.T, w []byte) {
		t.Helper()
		k, err := s.Unwrap(t.Context(), w, []byte("asset"))
		if err != nil || !bytes.Equal(k.Reveal(), plain) {
			t.Errorf("another key, %v", err)
		}
	}
	opens(t, w)
	if _, err := s.Unwrap(t.Context(), w, []byte("other")); !errors.Is(err, contract.ErrMismatch) || errors.Is(err, broker.ErrKeyDisabled) {
		t.Errorf("for another asset: %v", err)
	}
	same, changed, err := s.Rewrap(t.Context(), w, []byte("asset"))
	if err != nil || changed || !bytes.Equal(same, w) {
		t.Errorf("rewrapped before there was a new version: %v, %v", changed, err)
	}
	if err := owner.Rotate("default"); err != nil {
		t.Fatal(err)
	}
	newest, changed, err := s.Rewrap(t.Context(), w, []byte("asset"))
	if err != nil || !changed {
		t.Fatalf("not rewrapped: %v, %v", changed, err)
	}
	opens(t, newest)
	opens(t, w)

	// The plugin is another process: what its owner does counts at the next call.
	if err := owner.SetDisabled("default", true); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if k, err := s.Unwrap(t.Context(), newest, []byte("asset")); k != nil || !errors.Is(err, contract.ErrDisabled) || !errors.Is(err, broker.ErrKeyDisabled) {
			t.Errorf("disabled: %v", err)
		}
	}
	again := broker.GenerateDataKey()
	defer again.Destroy()
	if _, err := s.Wrap(t.Context(), again, []byte("asset")); !errors.Is(err, broker.ErrKeyDisabled) {
		t.Errorf("disabled: %v", err)
	}
	if _, _, err := s.Rewrap(t.Context(), w, []byte("asset")); !errors.Is(err, contract.ErrDisabled) {
		t.Errorf("disabled: %v", err)
	}
	if err := owner.SetDisabled("default", false); err != nil {
		t.Fatal(err)
	}
	opens(t, newest)
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := s.Unwrap(t.Context(), newest, []byte("asset")); err == nil {
		t.Error("unwrapped after Close")
	}
}

func TestAnotherStoresKeys(t *testing.T) {
	path, _ := made(t, "main")
	other, _ := made(t, "other")
	s, o := start(t, config(t, "main", "main", path)), start(t, config(t, "other", "other", other))
	w, err := s.Wrap(t.Context(), broker.GenerateDataKey(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := o.Unwrap(t.Context(), w, nil); !errors.Is(err, contract.ErrMismatch) {
		t.Errorf("got %v", err)
	}
}

func TestStart(t *testing.T) {
	path, _ := made(t, "main")
	good := config(t, "main", "main", path)
	for name, c := range map[string]struct {
		change func(*keystore.Config)
		want   string
	}{
		"no checksum":                   {func(c *keystore.Config) { c.Plugin.SHA256 = "" }, "checksum"},
		"another checksum":              {func(c *keystore.Config) { c.Plugin.SHA256 = strings.Repeat("0", 64) }, "checksum"},
		"another name":                  {func(c *keystore.Config) { c.Name = "other" }, "it says that it is main"},
		"no file":                       {func(c *keystore.Config) { c.Plugin.Args = []string{"main", "/none"} }, "no such file"},
		"one that asks for attestation": {func(c *keystore.Config) { c.Plugin.Args = append(c.Plugin.Args, "attested") }, "attestation"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := good
			cfg.Plugin.Args = append([]string{}, good.Plugin.Args...)
			c.change(&cfg)
			s, err := keystore.Start(t.Context(), cfg, nil, slog.New(slog.DiscardHandler))
			if s != nil || err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func BenchmarkUnwrap(b *testing.B) {
	path := filepath.Join(b.TempDir(), "keys.json")
	if err := local.Create(path, "main", "default", known{}); err != nil {
		b.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	sum, err := host.Checksum(exe)
	if err != nil {
		b.Fatal(err)
	}
	s, err := keystore.Start(b.Context(), keystore.Config{Name: "main", Plugin: host.Config{Path: exe, SHA256: sum, Args: []string{"main", path}}}, nil, slog.New(slog.DiscardHandler))
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	w, err := s.Wrap(b.Context(), broker.GenerateDataKey(), []byte("asset"))
	if err != nil {
		b.Fatal(err)
	}
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			k, err := s.Unwrap(b.Context(), w, []byte("asset"))
			if err != nil {
				b.Error(err)
				return
			}
			k.Destroy()
		}
	})
}
