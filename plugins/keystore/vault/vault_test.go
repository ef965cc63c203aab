package vault_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/plugins/contract/keystore"
	"github.com/coffer-run/coffer/plugins/keystore/keystoretest"
	"github.com/coffer-run/coffer/plugins/keystore/vault"
)

func config(t *testing.T, s *transit) vault.Config {
	return vault.Config{
		Store: "owner", Address: s.URL, CAFile: s.ca(t), Mount: "transit", Keys: []string{"one", "two"},
		Token: func() (string, error) { return "s.first", nil }, Log: slog.New(slog.DiscardHandler),
	}
}

func open(t *testing.T, c vault.Config) *vault.Store {
	t.Helper()
	s, err := vault.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func made(t *testing.T, derived bool) (*transit, *vault.Store) {
	t.Helper()
	s := serve(t)
	s.keys = map[string]*transitKey{"one": newKey(derived), "two": newKey(derived)}
	return s, open(t, config(t, s))
}

func TestConformance(t *testing.T) {
	for name, derived := range map[string]bool{"derived keys": true, "keys that are not derived": false} {
		t.Run(name, func(t *testing.T) {
			server, s := made(t, derived)
			keystoretest.Run(t, keystoretest.Fixture{
				Store: keystoretest.Served(t, s),
				Again: func(t *testing.T) keystore.Store { return keystoretest.Served(t, open(t, config(t, server))) },
				Foreign: func(t *testing.T) keystore.Store {
					_, other := made(t, derived)
					return keystoretest.Served(t, other)
				},
				Rotate:  func(_ *testing.T, id string) { server.change(func() { server.keys[id].rotate() }) },
				Disable: func(_ *testing.T, id string) { server.change(func() { delete(server.keys, id) }) },
			})
			rewraps := slices.Contains(server.asked, "transit/rewrap/one")
			if rewraps != derived {
				t.Errorf("the server rewrapped: %v", rewraps)
			}
			if i, err := s.Info(t.Context()); err != nil || i.RewrapsInside && !derived {
				t.Errorf("info says %+v, %v", i, err)
			}
		})
	}
}

// TestDisabledByItsOwner is each way in which an owner takes a key back.
func TestDisabledByItsOwner(t *testing.T) {
	for name, take := range map[string]func(*transit){
		"deleted":                 func(s *transit) { delete(s.keys, "one") },
		"deleted softly":          func(s *transit) { s.keys["one"].softDeleted = true },
		"access taken away":       func(s *transit) { s.denied["one"] = true },
		"its old version retired": func(s *transit) { s.keys["one"].rotate(); s.keys["one"].minDecryption = 2 },
	} {
		t.Run(name, func(t *testing.T) {
			server, s := made(t, true)
			w := keystoretest.Wrap(t, s, "one", keystoretest.Key(t), nil)
			server.change(func() { take(server) })
			k, err := s.Unwrap(t.Context(), w, nil)
			if k != nil || !errors.Is(err, keystore.ErrDisabled) || !strings.Contains(err.Error(), "disabled by its owner") {
				t.Errorf("got %v", err)
			}
			if err := s.Health(t.Context()); err != nil {
				t.Errorf("the server is well: %v", err)
			}
		})
	}
}

// TestWrapMakesNoKey is a key that is gone: the server would make another.
func TestWrapMakesNoKey(t *testing.T) {
	server, s := made(t, true)
	server.change(func() { delete(server.keys, "one") })
	k, err := keystore.NewDataKey(keystoretest.Key(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Wrap(t.Context(), "one", k, nil); !errors.Is(err, keystore.ErrDisabled) {
		t.Errorf("got %v", err)
	}
	if server.keys["one"] != nil {
		t.Error("a key was made")
	}
}

func TestKeysThatAreRefused(t *testing.T) {
	for name, change := range map[string]func(*transitKey){
		"exportable":    func(k *transitKey) { k.exportable = true },
		"convergent":    func(k *transitKey) { k.convergent = true },
		"a signing key": func(k *transitKey) { k.kind = "ecdsa-p256" },
	} {
		t.Run(name, func(t *testing.T) {
			server, s := made(t, false)
			server.change(func() { change(server.keys["one"]) })
			k, err := keystore.NewDataKey(keystoretest.Key(t))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.Wrap(t.Context(), "one", k, nil); err == nil {
				t.Error("wrapped")
			}
		})
	}
}

// TestTheSameBytesSpeltOtherwise are ciphertexts that the server would open.
func TestTheSameBytesSpeltOtherwise(t *testing.T) {
	server, s := made(t, false)
	w := keystoretest.Wrap(t, s, "one", keystoretest.Key(t), nil)
	if !strings.HasPrefix(string(w.Ciphertext), "vault:v1:") {
		t.Fatalf("got %q", w.Ciphertext)
	}
	before := len(server.asked)
	for _, text := range []string{
		strings.Replace(string(w.Ciphertext), "v1", "v01", 1),
		strings.Replace(string(w.Ciphertext), "v1", "v+1", 1),
		string(w.Ciphertext) + "\n",
		string(w.Ciphertext[:20]) + "\r\n" + string(w.Ciphertext[20:]),
		"vault:v1:", "vault:v0:AAAA", "vault:v1:AB==", "",
	} {
		if _, err := s.Unwrap(t.Context(), &keystore.Wrapped{Key: "one", Version: 1, Ciphertext: []byte(text)}, nil); !errors.Is(err, keystore.ErrMismatch) {
			t.Errorf("%q: %v", text, err)
		}
	}
	if len(server.asked) != before {
		t.Error("the server was asked")
	}
}

func TestToken(t *testing.T) {
	t.Run("it is renewed", func(t *testing.T) {
		server := serve(t)
		server.ttl = 1
		open(t, config(t, server))
		eventually(t, "two renewals", func() (enough bool) {
			server.change(func() { enough = server.renewals >= 2 })
			return enough
		})
	})
	t.Run("the next one is taken when the first is over", func(t *testing.T) {
		server, _ := made(t, true)
		c := config(t, server)
		current := "s.first"
		c.Token = func() (string, error) { return current, nil }
		s := open(t, c)
		w := keystoretest.Wrap(t, s, "one", keystoretest.Key(t), nil)
		eventually(t, "a renewal", func() (seen bool) {
			server.change(func() { seen = server.renewals >= 2 })
			return seen
		})
		server.change(func() { server.token, current = "s.second", "s.second" })
		if _, err := s.Unwrap(t.Context(), w, nil); err != nil {
			t.Error(err)
		}
	})
	t.Run("one that is over disables no key", func(t *testing.T) {
		server, s := made(t, true)
		w := keystoretest.Wrap(t, s, "one", keystoretest.Key(t), nil)
		server.change(func() { server.token = "s.other" })
		if _, err := s.Unwrap(t.Context(), w, nil); !errors.Is(err, keystore.ErrBackend) || errors.Is(err, keystore.ErrDisabled) {
			t.Errorf("got %v", err)
		}
	})
}

// TestServersThatMisbehave are answers that are none.
func TestServersThatMisbehave(t *testing.T) {
	sealed := func(w http.ResponseWriter, _ *http.Request) bool {
		fail(w, http.StatusServiceUnavailable, "Vault is sealed")
		return true
	}
	decrypts := func(answer func(http.ResponseWriter)) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/decrypt/") {
				return false
			}
			answer(w)
			return true
		}
	}
	for name, broken := range map[string]func(http.ResponseWriter, *http.Request) bool{
		"sealed":     sealed,
		"no answer":  decrypts(func(w http.ResponseWriter) { data(w, nil) }),
		"not base64": decrypts(func(w http.ResponseWriter) { data(w, map[string]any{"plaintext": "!"}) }),
		"31 bytes":   decrypts(func(w http.ResponseWriter) { data(w, map[string]any{"plaintext": strings.Repeat("AAAA", 10) + "AA=="}) }),
		"not JSON":   decrypts(func(w http.ResponseWriter) { _, _ = io.WriteString(w, "<html>") }),
		"a redirect": decrypts(func(w http.ResponseWriter) { w.Header().Set("Location", "http://127.0.0.1:1/"); w.WriteHeader(307) }),
		"64 MiB": decrypts(func(w http.ResponseWriter) {
			for range 1024 {
				if _, err := w.Write(bytes.Repeat([]byte(" "), 64<<10)); err != nil {
					return
				}
			}
		}),
	} {
		t.Run(name, func(t *testing.T) {
			server, s := made(t, true)
			w := keystoretest.Wrap(t, s, "one", keystoretest.Key(t), nil)
			server.change(func() { server.broken = broken })
			k, err := s.Unwrap(t.Context(), w, nil)
			if k != nil || err == nil || errors.Is(err, keystore.ErrDisabled) || errors.Is(err, keystore.ErrMismatch) {
				t.Errorf("got %v", err)
			}
		})
	}
	t.Run("it is gone", func(t *testing.T) {
		server, s := made(t, true)
		w := keystoretest.Wrap(t, s, "one", keystoretest.Key(t), nil)
		server.Close()
		if _, err := s.Unwrap(t.Context(), w, nil); !errors.Is(err, keystore.ErrBackend) {
			t.Errorf("got %v", err)
		}
		if err := s.Health(t.Context()); !errors.Is(err, keystore.ErrBackend) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("it does not answer", func(t *testing.T) {
		server, s := made(t, true)
		server.change(func() {
			server.broken = func(http.ResponseWriter, *http.Request) bool { time.Sleep(time.Second); return true }
		})
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		if err := s.Health(ctx); err == nil || ctx.Err() == nil {
			t.Errorf("got %v", err)
		}
	})
	t.Run("its certificate is of another authority", func(t *testing.T) {
		server, _ := made(t, true)
		c := config(t, server)
		c.CAFile = ""
		if err := open(t, c).Health(t.Context()); err == nil {
			t.Error("answered")
		}
	})
}

func TestOpen(t *testing.T) {
	server := serve(t)
	for name, change := range map[string]func(*vault.Config){
		"no store":           func(c *vault.Config) { c.Store = "" },
		"no TLS":             func(c *vault.Config) { c.Address = strings.Replace(c.Address, "https", "http", 1) },
		"no address":         func(c *vault.Config) { c.Address = "" },
		"no such CA file":    func(c *vault.Config) { c.CAFile = "/none" },
		"a mount with paths": func(c *vault.Config) { c.Mount = "transit/../sys" },
		"no token":           func(c *vault.Config) { c.Token = nil },
		"a token that fails": func(c *vault.Config) { c.Token = func() (string, error) { return "", errors.New("no file") } },
		"no keys":            func(c *vault.Config) { c.Keys = nil },
		"a key twice":        func(c *vault.Config) { c.Keys = []string{"one", "one"} },
		"a key with a path":  func(c *vault.Config) { c.Keys = []string{"one/../two"} },
	} {
		t.Run(name, func(t *testing.T) {
			c := config(t, server)
			change(&c)
			if s, err := vault.Open(t.Context(), c); err == nil {
				_ = s.Close()
				t.Error("opened")
			}
		})
	}
}
