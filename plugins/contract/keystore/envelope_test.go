package keystore_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/coffer-run/coffer/plugins/contract/keystore"
	keystorev1 "github.com/coffer-run/coffer/plugins/contract/keystore/v1"
)

// open is a store without any protection: it looks at nothing and gives back
// what is in the ciphertext. All that refuses here is the envelope.
type open struct{ name string }

func (o open) Info(context.Context) (*keystore.Info, error) {
	return &keystore.Info{Name: o.name, Kind: "open", Keys: []keystore.Key{{ID: "default", Newest: 1, Oldest: 1}}}, nil
}

func (open) Wrap(_ context.Context, id string, k *keystore.DataKey, _ []byte) (*keystore.Wrapped, error) {
	return &keystore.Wrapped{Key: id, Version: 1, Ciphertext: bytes.Clone(k.Reveal())}, nil
}

func (open) Unwrap(_ context.Context, w *keystore.Wrapped, _ []byte) (*keystore.DataKey, error) {
	return keystore.NewDataKey(bytes.Clone(w.Ciphertext))
}

func (open) Rewrap(_ context.Context, w *keystore.Wrapped, _ []byte) (*keystore.Wrapped, error) {
	return &keystore.Wrapped{Key: w.Key, Version: w.Version + 1, Ciphertext: w.Ciphertext}, nil
}

func (open) Health(context.Context) error { return nil }

func dataKey(t *testing.T) *keystore.DataKey {
	t.Helper()
	k, err := keystore.NewDataKey(bytes.Repeat([]byte{7}, keystore.DataKeySize))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func named(name string) keystore.Named {
	return keystore.Named{Name: name, Store: open{name}}
}

func sealed(t *testing.T) []byte {
	t.Helper()
	e, err := named("main").Wrap(t.Context(), "", dataKey(t), []byte("asset"))
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestEnvelope(t *testing.T) {
	e := sealed(t)
	n := named("main")
	for range 2 {
		k, err := n.Unwrap(t.Context(), e, []byte("asset"))
		if err != nil || k.Reveal()[0] != 7 {
			t.Fatalf("another key, %v", err)
		}
		if e, err = n.Rewrap(t.Context(), e, []byte("asset")); err != nil {
			t.Fatal(err)
		}
	}
	parsed, err := keystore.ParseEnvelope(e)
	if err != nil || parsed.Store != "main" || parsed.Key != "default" || parsed.Version != 3 {
		t.Errorf("got %+v, %v", parsed, err)
	}
	again, err := parsed.Marshal()
	if err != nil || !bytes.Equal(again, e) {
		t.Errorf("it encodes otherwise: %v", err)
	}
}

// TestEnvelopeAlone is every bit of an envelope but those of the version, over a
// store that takes anything.
func TestEnvelopeAlone(t *testing.T) {
	e, n := sealed(t), named("main")
	version := len("CKW1") + 1 + len("main") + 1 + len("default")
	for i := range e {
		for bit := range 8 {
			if i >= version && i < version+4 {
				continue // the store's to refuse: its version is which key it takes
			}
			b := bytes.Clone(e)
			b[i] ^= 1 << bit
			if k, err := n.Unwrap(t.Context(), b, []byte("asset")); err == nil {
				t.Errorf("bit %d of byte %d: %v", bit, i, k)
			}
			if _, err := n.Rewrap(t.Context(), b, []byte("asset")); err == nil {
				t.Errorf("bit %d of byte %d: rewrapped", bit, i)
			}
		}
	}
	for l := range e {
		if _, err := n.Unwrap(t.Context(), e[:l], []byte("asset")); err == nil {
			t.Errorf("opened with %d bytes", l)
		}
	}
	if _, err := n.Unwrap(t.Context(), append(bytes.Clone(e), 0), []byte("asset")); err == nil {
		t.Error("opened with a byte after its end")
	}
	for _, ad := range []string{"", "asse", "asset ", "Asset"} {
		if _, err := n.Unwrap(t.Context(), e, []byte(ad)); !errors.Is(err, keystore.ErrMismatch) {
			t.Errorf("for %q: %v", ad, err)
		}
	}
	if _, err := named("other").Unwrap(t.Context(), e, []byte("asset")); !errors.Is(err, keystore.ErrMismatch) {
		t.Errorf("another store: %v", err)
	}
	// The same store under another name: what it wrapped is of that name.
	if _, err := (keystore.Named{Name: "other", Store: open{"main"}}).Wrap(t.Context(), "", dataKey(t), nil); err == nil {
		t.Error("wrapped in a store of another name")
	}
}

func TestNamesThatRunTogether(t *testing.T) {
	a := keystore.Named{Name: "ab", Store: open{"ab"}}
	e, err := a.Wrap(t.Context(), "c", dataKey(t), []byte("d"))
	if err != nil {
		t.Fatal(err)
	}
	p, err := keystore.ParseEnvelope(e)
	if err != nil {
		t.Fatal(err)
	}
	p.Store, p.Key = "a", "bc"
	moved, err := p.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := named("a").Unwrap(t.Context(), moved, []byte("d")); !errors.Is(err, keystore.ErrMismatch) {
		t.Errorf("got %v", err)
	}
}

func TestWhatIsNotWrapped(t *testing.T) {
	n := named("main")
	gone := dataKey(t)
	gone.Destroy()
	for name, k := range map[string]*keystore.DataKey{"no key": nil, "a destroyed key": gone, "the zero value": {}} {
		if _, err := n.Wrap(t.Context(), "", k, nil); err == nil {
			t.Errorf("%s was wrapped", name)
		}
	}
	if _, err := n.Wrap(t.Context(), "", dataKey(t), make([]byte, keystore.MaxAssociated+1)); err == nil {
		t.Error("took too much associated data")
	}
	if _, err := n.Wrap(t.Context(), "a b", dataKey(t), nil); err == nil {
		t.Error("wrapped under a name with a space")
	}
	if _, err := (keystore.Named{Store: open{}}).Wrap(t.Context(), "k", dataKey(t), nil); err == nil {
		t.Error("wrapped in a store without a name")
	}
}

func TestDataKeyStaysOutOfTexts(t *testing.T) {
	k := dataKey(t)
	var b bytes.Buffer
	slog.New(slog.NewJSONHandler(&b, nil)).Info("x", "key", k)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%q", "%d"} {
		_, _ = fmt.Fprintf(&b, verb, k)
	}
	if s := b.String(); strings.Contains(s, "7 7") || strings.Contains(s, "0707") || strings.Contains(s, "BwcH") {
		t.Errorf("got %s", s)
	}
	if _, err := json.Marshal(k); err == nil {
		t.Error("encoded")
	}
	for _, n := range []int{0, 31, 33} {
		if _, err := keystore.NewDataKey(make([]byte, n)); err == nil {
			t.Errorf("a key of %d bytes", n)
		}
	}
}

// TestPluginSideChecks is a host that does not keep the contract.
func TestPluginSideChecks(t *testing.T) {
	r := &registrar{}
	keystore.Register(r, open{"main"})
	s, ok := r.impl.(keystorev1.KeyStoreServiceServer)
	if !ok {
		t.Fatalf("registered a %T", r.impl)
	}
	w := &keystorev1.Wrapped{KeyId: "default", Version: 1, Ciphertext: make([]byte, 32)}
	long := make([]byte, keystore.MaxAssociated+1)
	for name, call := range map[string]func() error{
		"a key of 31 bytes": func() error {
			_, err := s.Wrap(t.Context(), &keystorev1.WrapRequest{KeyId: "default", Plaintext: make([]byte, 31)})
			return err
		},
		"no key id": func() error {
			_, err := s.Wrap(t.Context(), &keystorev1.WrapRequest{Plaintext: make([]byte, 32)})
			return err
		},
		"too much associated data": func() error {
			_, err := s.Unwrap(t.Context(), &keystorev1.UnwrapRequest{Wrapped: w, Associated: long})
			return err
		},
		"no wrapped key":    func() error { _, err := s.Unwrap(t.Context(), &keystorev1.UnwrapRequest{}); return err },
		"nothing to rewrap": func() error { _, err := s.Rewrap(t.Context(), &keystorev1.RewrapRequest{}); return err },
	} {
		if err := call(); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
}

type registrar struct{ impl any }

func (r *registrar) RegisterService(_ *grpc.ServiceDesc, impl any) { r.impl = impl }

func TestPluginWithoutImplementation(t *testing.T) {
	if err := (&keystore.Plugin{}).GRPCServer(nil, grpc.NewServer()); err == nil {
		t.Error("served nothing")
	}
}

func FuzzParseEnvelope(f *testing.F) {
	e, err := named("main").Wrap(context.Background(), "", mustKey(), []byte("asset"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(e)
	f.Add([]byte("CKW1"))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := keystore.ParseEnvelope(b)
		if err != nil {
			return
		}
		again, err := e.Marshal()
		if err != nil || !bytes.Equal(again, b) {
			t.Errorf("it encodes as %x, %v", again, err)
		}
	})
}

func mustKey() *keystore.DataKey {
	k, err := keystore.NewDataKey(make([]byte, keystore.DataKeySize))
	if err != nil {
		panic(err)
	}
	return k
}
