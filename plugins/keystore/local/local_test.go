package local_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/coffer-run/coffer/plugins/contract/keystore"
	"github.com/coffer-run/coffer/plugins/keystore/keystoretest"
	"github.com/coffer-run/coffer/plugins/keystore/local"
)

var passphrase = local.Passphrase("correct horse battery staple")

func made(t *testing.T, lock local.Lock) (string, *local.Store) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "keys.json")
	if err := local.Create(path, "main", "one", lock); err != nil {
		t.Fatal(err)
	}
	s := open(t, path, lock)
	if err := s.AddKey("two"); err != nil {
		t.Fatal(err)
	}
	return path, s
}

func open(t *testing.T, path string, lock local.Lock) *local.Store {
	t.Helper()
	s, err := local.Open(path, "main", lock)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func TestConformance(t *testing.T) {
	path, s := made(t, passphrase)
	owner := open(t, path, passphrase)
	keystoretest.Run(t, keystoretest.Fixture{
		Store: keystoretest.Served(t, s),
		Again: func(t *testing.T) keystore.Store { return keystoretest.Served(t, open(t, path, passphrase)) },
		Foreign: func(t *testing.T) keystore.Store {
			_, other := made(t, passphrase)
			return keystoretest.Served(t, other)
		},
		Rotate: func(t *testing.T, id string) {
			if err := owner.Rotate(id); err != nil {
				t.Fatal(err)
			}
		},
		Disable: func(t *testing.T, id string) {
			if err := owner.SetDisabled(id, true); err != nil {
				t.Fatal(err)
			}
		},
	})
}

func TestDisabledAndEnabledAgain(t *testing.T) {
	_, s := made(t, passphrase)
	w := keystoretest.Wrap(t, s, "two", keystoretest.Key(t), nil)
	if err := s.SetDisabled("two", true); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Unwrap(t.Context(), w, nil); !errors.Is(err, keystore.ErrDisabled) {
		t.Errorf("got %v", err)
	}
	if err := s.SetDisabled("two", false); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Unwrap(t.Context(), w, nil); err != nil {
		t.Error(err)
	}
}

func TestFile(t *testing.T) {
	path, s := made(t, passphrase)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	t.Run("a wrong passphrase", func(t *testing.T) {
		if _, err := local.Open(path, "main", local.Passphrase("incorrect horse battery")); err == nil {
			t.Error("opened")
		}
	})
	t.Run("a passphrase too short", func(t *testing.T) {
		if err := local.Create(filepath.Join(t.TempDir(), "k"), "main", "one", local.Passphrase("short")); err == nil {
			t.Error("created")
		}
	})
	t.Run("another store's name", func(t *testing.T) {
		if _, err := local.Open(path, "other", passphrase); err == nil {
			t.Error("opened")
		}
	})
	t.Run("it exists", func(t *testing.T) {
		if err := local.Create(path, "main", "one", passphrase); err == nil {
			t.Error("overwritten")
		}
	})
	t.Run("no lock", func(t *testing.T) {
		if _, err := local.Open(path, "main", local.TPM{}); err == nil {
			t.Error("opened")
		}
	})
	t.Run("a key twice, or none", func(t *testing.T) {
		for _, err := range []error{s.AddKey("one"), s.AddKey(""), s.Rotate("none"), s.SetDisabled("none", true)} {
			if err == nil {
				t.Error("changed")
			}
		}
	})
	t.Run("gone while it serves", func(t *testing.T) {
		if err := os.Rename(path, path+".away"); err != nil {
			t.Fatal(err)
		}
		if err := s.Health(t.Context()); !errors.Is(err, keystore.ErrBackend) {
			t.Errorf("got %v", err)
		}
		if err := os.Rename(path+".away", path); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("changed while it serves", func(t *testing.T) {
		// The file is JSON: what is flipped is a bit of what it holds.
		var f struct {
			Header json.RawMessage `json:"header"`
			Sealed []byte          `json:"sealed"`
		}
		if err := json.Unmarshal(good, &f); err != nil {
			t.Fatal(err)
		}
		for i := range f.Sealed {
			f.Sealed[i] ^= 1
			b, err := json.Marshal(f)
			if err != nil {
				t.Fatal(err)
			}
			f.Sealed[i] ^= 1
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := s.Health(t.Context()); err == nil {
				t.Fatalf("served with byte %d changed", i)
			}
		}
		weaker := bytes.Replace(good, []byte(`"passes":3`), []byte(`"passes":1`), 1)
		if bytes.Equal(weaker, good) {
			t.Fatal("the file names no passes")
		}
		if err := os.WriteFile(path, weaker, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := s.Health(t.Context()); err == nil {
			t.Error("served with another header")
		}
		if _, err := local.Open(path, "main", passphrase); err == nil {
			t.Error("opened with another header")
		}
		if err := os.WriteFile(path, good, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := s.Health(t.Context()); err != nil {
			t.Error(err)
		}
	})
	t.Run("closed", func(t *testing.T) {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if err := s.Health(t.Context()); err == nil {
			t.Error("served")
		}
	})
}

// TestParametersBound is a file that asks for more memory or time than a machine has.
func TestParametersBound(t *testing.T) {
	salt := make([]byte, 16)
	for name, a := range map[string]*local.Argon2id{
		"none":            nil,
		"no salt":         {Passes: 3, Memory: 64 << 10, Threads: 4},
		"no pass":         {Salt: salt, Memory: 64 << 10, Threads: 4},
		"too many passes": {Salt: salt, Passes: 1 << 20, Memory: 64 << 10, Threads: 4},
		"too much memory": {Salt: salt, Passes: 3, Memory: 1 << 31, Threads: 4},
		"no memory":       {Salt: salt, Passes: 3, Threads: 4},
		"no thread":       {Salt: salt, Passes: 3, Memory: 64 << 10},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := passphrase.Open(local.Params{Argon2id: a}); err == nil {
				t.Error("derived a key")
			}
		})
	}
}

func TestConcurrentChangesLoseNothing(t *testing.T) {
	path, s := made(t, passphrase)
	other := open(t, path, passphrase)
	done := make(chan error, 16)
	for i := range cap(done) {
		go func() { done <- []*local.Store{s, other}[i%2].Rotate("one") }()
	}
	for range cap(done) {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	info, err := s.Info(t.Context())
	if err != nil || info.Keys[0].Newest != uint32(1+cap(done)) {
		t.Errorf("got %+v, %v", info, err)
	}
}

func FuzzOpen(f *testing.F) {
	path := filepath.Join(f.TempDir(), "keys.json")
	if err := local.Create(path, "main", "one", passphrase); err != nil {
		f.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"header":{"version":1,"lock":{}},"sealed":""}`))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) {
		p := filepath.Join(dir, "k")
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
		// A lock of no passphrase opens nothing: what is left is the parser.
		if _, err := local.Open(p, "main", local.Passphrase("")); err == nil {
			t.Error("opened")
		}
	})
}

// software starts a software TPM and returns how to reach it.
func software(t *testing.T) func() (transport.TPMCloser, error) {
	t.Helper()
	if _, err := exec.LookPath("swtpm"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip("no swtpm")
	}
	state, sockets := t.TempDir(), short(t)
	socket := filepath.Join(sockets, "tpm")
	cmd := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+state, "--server", "type=unixio,path="+socket, "--flags", "not-need-init,startup-clear")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for range 6000 {
		if _, err := os.Stat(socket); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return func() (transport.TPMCloser, error) { return linuxudstpm.Open(socket) }
}

// short is a folder whose path a unix socket's address holds.
func short(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "coffer")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func TestTPM(t *testing.T) {
	dial, other := software(t), software(t)
	for name, pcrs := range map[string][]uint{"without PCRs": nil, "with PCRs": {7, 11}} {
		t.Run(name, func(t *testing.T) {
			lock := local.TPM{Dial: dial, PCRs: pcrs}
			path, s := made(t, lock)
			plain := keystoretest.Key(t)
			w := keystoretest.Wrap(t, s, "one", plain, []byte("ad"))
			k, err := open(t, path, local.TPM{Dial: dial}).Unwrap(context.Background(), w, []byte("ad"))
			if err != nil || !bytes.Equal(k.Reveal(), plain) {
				t.Fatalf("another key, %v", err)
			}
			if _, err := local.Open(path, "main", local.TPM{Dial: other}); err == nil || !strings.Contains(err.Error(), "is not the one") {
				t.Errorf("another TPM: %v", err)
			}
			if _, err := local.Open(path, "main", passphrase); err == nil {
				t.Error("opened with a passphrase")
			}
			extend(t, dial, 11)
			_, err = local.Open(path, "main", lock)
			if opens := err == nil; opens != (pcrs == nil) {
				t.Errorf("after PCR 11 was extended: %v", err)
			}
		})
	}
	t.Run("PCRs that are none", func(t *testing.T) {
		for _, pcrs := range [][]uint{{24}, {7, 7}} {
			if err := local.Create(filepath.Join(t.TempDir(), "k"), "main", "one", local.TPM{Dial: dial, PCRs: pcrs}); err == nil {
				t.Errorf("sealed to %v", pcrs)
			}
		}
	})
}

func extend(t *testing.T, dial func() (transport.TPMCloser, error), pcr uint) {
	t.Helper()
	tpm, err := dial()
	if err != nil {
		t.Fatal(err)
	}
	defer tpm.Close()
	if _, err := (tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: make([]byte, 32)}}},
	}).Execute(tpm); err != nil {
		t.Fatal(err)
	}
}
