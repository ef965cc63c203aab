package pkcs11_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	raw "github.com/miekg/pkcs11"

	"github.com/coffer-run/coffer/plugins/contract/keystore"
	"github.com/coffer-run/coffer/plugins/keystore/keystoretest"
	"github.com/coffer-run/coffer/plugins/keystore/pkcs11"
)

const (
	module = "/usr/lib/softhsm/libsofthsm2.so"
	pin    = "482915"
)

// TestMain gives SoftHSM, which reads its configuration once, a folder for the
// tokens of all tests.
func TestMain(m *testing.M) {
	if _, err := os.Stat(module); err != nil && os.Getenv("CI") != "true" {
		_, _ = os.Stderr.WriteString("no SoftHSM: its tests are skipped\n")
		os.Exit(0)
	}
	os.Exit(within(m))
}

func within(m *testing.M) int {
	dir, err := os.MkdirTemp("", "coffer-softhsm")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	conf := filepath.Join(dir, "softhsm2.conf")
	if err := errors.Join(
		os.Mkdir(filepath.Join(dir, "tokens"), 0o700),
		os.WriteFile(conf, []byte("directories.tokendir = "+filepath.Join(dir, "tokens")+"\nlog.level = ERROR\n"), 0o600),
		os.Setenv("SOFTHSM2_CONF", conf),
	); err != nil {
		panic(err)
	}
	return m.Run()
}

// owner is the token owner's own hand on SoftHSM, past this package.
var owner = sync.OnceValue(func() *raw.Ctx {
	m := raw.New(module)
	if m == nil {
		panic("SoftHSM does not load")
	}
	if err := m.Initialize(); err != nil {
		panic(err)
	}
	return m
})

// token makes a token and returns its slot.
func token(t *testing.T, label string) uint {
	t.Helper()
	m := owner()
	slots, err := m.GetSlotList(false)
	if err != nil {
		t.Fatal(err)
	}
	free := slots[len(slots)-1] // SoftHSM keeps one slot free for the next token
	if err := m.InitToken(free, "so-pin-1", label); err != nil {
		t.Fatal(err)
	}
	slots, err = m.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	for _, slot := range slots {
		info, err := m.GetTokenInfo(slot)
		if err != nil || info.Label != label {
			continue
		}
		h := session(t, slot)
		if err := errors.Join(m.Login(h, raw.CKU_SO, "so-pin-1"), m.InitPIN(h, pin), m.Logout(h), m.CloseSession(h)); err != nil {
			t.Fatal(err)
		}
		return slot
	}
	t.Fatal("the token is gone")
	return 0
}

func session(t *testing.T, slot uint) raw.SessionHandle {
	t.Helper()
	h, err := owner().OpenSession(slot, raw.CKF_SERIAL_SESSION|raw.CKF_RW_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func config(label string) pkcs11.Config {
	return pkcs11.Config{Store: "hsm", Module: module, Token: label, PIN: pin, Keys: []string{"one", "two"}}
}

func open(t *testing.T, c pkcs11.Config) *pkcs11.Store {
	t.Helper()
	s, err := pkcs11.Open(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func made(t *testing.T, label string) (*pkcs11.Store, uint) {
	t.Helper()
	slot := token(t, label)
	s := open(t, config(label))
	for _, k := range []string{"one", "two"} {
		if err := s.Generate(t.Context(), k); err != nil {
			t.Fatal(err)
		}
	}
	return s, slot
}

func TestConformance(t *testing.T) {
	s, _ := made(t, "conformance")
	foreign, _ := made(t, "conformance-foreign")
	keystoretest.Run(t, keystoretest.Fixture{
		Store:   keystoretest.Served(t, s),
		Again:   func(t *testing.T) keystore.Store { return keystoretest.Served(t, open(t, config("conformance"))) },
		Foreign: func(t *testing.T) keystore.Store { return keystoretest.Served(t, foreign) },
		Rotate: func(t *testing.T, id string) {
			if err := s.Generate(t.Context(), id); err != nil {
				t.Fatal(err)
			}
		},
		Disable: func(t *testing.T, id string) {
			if err := s.SetDisabled(t.Context(), id, true); err != nil {
				t.Fatal(err)
			}
		},
	})
}

// objects are the handles of a key, as its owner sees them.
func objects(t *testing.T, h raw.SessionHandle, label string) []raw.ObjectHandle {
	t.Helper()
	m := owner()
	if err := m.FindObjectsInit(h, []*raw.Attribute{raw.NewAttribute(raw.CKA_LABEL, label)}); err != nil {
		t.Fatal(err)
	}
	list, _, err := m.FindObjects(h, 100)
	if err := errors.Join(err, m.FindObjectsFinal(h)); err != nil {
		t.Fatal(err)
	}
	return list
}

func TestKeyThatItsOwnerRemoved(t *testing.T) {
	s, slot := made(t, "removed")
	w := keystoretest.Wrap(t, s, "one", keystoretest.Key(t), nil)
	h := session(t, slot)
	for _, o := range objects(t, h, "one") {
		if err := owner().DestroyObject(h, o); err != nil {
			t.Fatal(err)
		}
	}
	if k, err := s.Unwrap(t.Context(), w, nil); k != nil || !errors.Is(err, keystore.ErrDisabled) {
		t.Errorf("got %v", err)
	}
}

func TestKeyThatItsOwnerEnabledAgain(t *testing.T) {
	s, _ := made(t, "again")
	w := keystoretest.Wrap(t, s, "one", keystoretest.Key(t), nil)
	for _, disabled := range []bool{true, false} {
		if err := s.SetDisabled(t.Context(), "one", disabled); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Unwrap(t.Context(), w, nil); errors.Is(err, keystore.ErrDisabled) != disabled {
			t.Errorf("disabled %v: got %v", disabled, err)
		}
	}
}

// TestKeysThatAreRefused are keys that an owner made in another way.
func TestKeysThatAreRefused(t *testing.T) {
	for name, change := range map[string]struct {
		attr *raw.Attribute
		want string
	}{
		"one that can be extracted": {raw.NewAttribute(raw.CKA_EXTRACTABLE, true), "can leave the token"},
		"one that is not sensitive": {raw.NewAttribute(raw.CKA_SENSITIVE, false), "can leave the token"},
		"one without a version":     {raw.NewAttribute(raw.CKA_ID, []byte{}), "CKA_ID"},
		"one with version 0":        {raw.NewAttribute(raw.CKA_ID, []byte{0}), "version 0"},
		"one with a long version":   {raw.NewAttribute(raw.CKA_ID, []byte("12345")), "CKA_ID"},
		"one that is there already": {raw.NewAttribute(raw.CKA_ID, []byte{1}), "twice"},
	} {
		t.Run(name, func(t *testing.T) {
			s, slot := made(t, strings.ReplaceAll(name, " ", "-"))
			w := keystoretest.Wrap(t, s, "one", keystoretest.Key(t), nil)
			h := session(t, slot)
			attrs := map[uint]*raw.Attribute{}
			for _, a := range []*raw.Attribute{
				raw.NewAttribute(raw.CKA_CLASS, raw.CKO_SECRET_KEY), raw.NewAttribute(raw.CKA_KEY_TYPE, raw.CKK_AES), raw.NewAttribute(raw.CKA_VALUE_LEN, 32),
				raw.NewAttribute(raw.CKA_LABEL, "one"), raw.NewAttribute(raw.CKA_ID, []byte{2}), raw.NewAttribute(raw.CKA_TOKEN, true),
				raw.NewAttribute(raw.CKA_SENSITIVE, true), raw.NewAttribute(raw.CKA_EXTRACTABLE, false),
				raw.NewAttribute(raw.CKA_ENCRYPT, true), raw.NewAttribute(raw.CKA_DECRYPT, true), change.attr,
			} {
				attrs[a.Type] = a
			}
			var template []*raw.Attribute
			for _, a := range attrs {
				template = append(template, a)
			}
			if _, err := owner().GenerateKey(h, []*raw.Mechanism{raw.NewMechanism(raw.CKM_AES_KEY_GEN, nil)}, template); err != nil {
				t.Fatal(err)
			}
			k, err := keystore.NewDataKey(keystoretest.Key(t))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.Wrap(t.Context(), "one", k, nil); err == nil || !strings.Contains(err.Error(), change.want) {
				t.Errorf("wrapped: %v", err)
			}
			if k, err := s.Unwrap(t.Context(), w, nil); k != nil || err == nil {
				t.Errorf("unwrapped: %v", err)
			}
		})
	}
}

// TestSessionsThatAreGone is a token that was taken out and put back, in another slot.
func TestSessionsThatAreGone(t *testing.T) {
	s, slot := made(t, "gone")
	plain := keystoretest.Key(t)
	w := keystoretest.Wrap(t, s, "one", plain, nil)
	back := func(t *testing.T) {
		t.Helper()
		k, err := s.Unwrap(t.Context(), w, nil)
		if err != nil || !bytes.Equal(k.Reveal(), plain) {
			t.Errorf("another key, %v", err)
		}
	}
	if err := owner().CloseAllSessions(slot); err != nil {
		t.Fatal(err)
	}
	back(t)
	// SoftHSM numbers its slots anew when it starts with another token more.
	token(t, "gone-neighbour")
	if err := errors.Join(owner().Finalize(), owner().Initialize()); err != nil {
		t.Fatal(err)
	}
	back(t)
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			_ = owner().CloseAllSessions(slot)
			if k, err := s.Unwrap(t.Context(), w, nil); err == nil && !bytes.Equal(k.Reveal(), plain) {
				t.Error("another key")
			}
		})
	}
	wg.Wait()
	back(t)
}

func TestOpen(t *testing.T) {
	token(t, "open")
	for name, change := range map[string]func(*pkcs11.Config){
		"no store":          func(c *pkcs11.Config) { c.Store = "" },
		"no such module":    func(c *pkcs11.Config) { c.Module = "/none.so" },
		"no such token":     func(c *pkcs11.Config) { c.Token = "none" },
		"no PIN":            func(c *pkcs11.Config) { c.PIN = "" },
		"a wrong PIN":       func(c *pkcs11.Config) { c.PIN = "000000" },
		"no keys":           func(c *pkcs11.Config) { c.Keys = nil },
		"a key twice":       func(c *pkcs11.Config) { c.Keys = []string{"one", "one"} },
		"a key with spaces": func(c *pkcs11.Config) { c.Keys = []string{"a b"} },
	} {
		t.Run(name, func(t *testing.T) {
			c := config("open")
			change(&c)
			if _, err := pkcs11.Open(c); err == nil {
				t.Error("opened")
			}
		})
	}
	t.Run("two tokens of one label", func(t *testing.T) {
		token(t, "twin")
		// A token's label says nothing of whose it is.
		out, err := exec.Command("softhsm2-util", "--init-token", "--free", "--label", "twin", "--so-pin", "so-pin-1", "--pin", pin).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if err := errors.Join(owner().Finalize(), owner().Initialize()); err != nil {
			t.Fatal(err)
		}
		if _, err := pkcs11.Open(config("twin")); err == nil || !strings.Contains(err.Error(), "2 tokens") {
			t.Errorf("got %v", err)
		}
	})
}
