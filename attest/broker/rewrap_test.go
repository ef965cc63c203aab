package broker_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/translog"
)

// versioned is a key store whose key has versions: its number is in front of
// what is wrapped.
type versioned struct {
	versions []*broker.LocalKeys
	// before is called before each rewrap, which it may fail.
	before func(n int) error
	calls  int
}

func (v *versioned) rotate(t testing.TB) {
	t.Helper()
	kek := make([]byte, broker.KEKSize)
	_, _ = rand.Read(kek)
	v.versions = append(v.versions, must[*broker.LocalKeys](t)(broker.NewLocalKeys(kek)))
}

func (v *versioned) Wrap(ctx context.Context, k *broker.DataKey, ad []byte) ([]byte, error) {
	n := len(v.versions) - 1
	b, err := v.versions[n].Wrap(ctx, k, ad)
	return append([]byte{byte(n)}, b...), err
}

func (v *versioned) Unwrap(ctx context.Context, b, ad []byte) (*broker.DataKey, error) {
	return v.versions[b[0]].Unwrap(ctx, b[1:], ad)
}

func (v *versioned) Rewrap(ctx context.Context, b, ad []byte) ([]byte, bool, error) {
	if int(b[0]) == len(v.versions)-1 {
		return b, false, nil
	}
	v.calls++
	if v.before != nil {
		if err := v.before(v.calls); err != nil {
			return nil, false, err
		}
	}
	k, err := v.Unwrap(ctx, b, ad)
	if err != nil {
		return nil, false, err
	}
	defer k.Destroy()
	out, err := v.Wrap(ctx, k, ad)
	return out, err == nil, err
}

// rewrapWorld has n assets in a versioned store, and two in one that is not.
func rewrapWorld(t *testing.T, n int) (*world, *versioned) {
	t.Helper()
	w, v := newWorld(t, false), &versioned{}
	v.rotate(t)
	w.cfg.KeyStores = map[string]broker.KeyStore{"hsm": v}
	w.Broker = must[*broker.Broker](t)(broker.New(w.cfg))
	for i := range n {
		must[broker.Asset](t)(w.CreateAsset(t.Context(), alice, broker.NewAsset{Name: fmt.Sprintf("run-%02d", i), Kind: broker.KindCheckpoints, KeyStore: "hsm"}))
	}
	return w, v
}

// wrapped returns every asset's wrapped key.
func (w *world) wrapped(t *testing.T) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	if err := w.store.View(t.Context(), func(ctx context.Context, r broker.Reader) error {
		list, err := r.Assets(ctx, 1000)
		for _, a := range list {
			out[a.Name] = a.Wrapped
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

func (w *world) rewraps(t *testing.T) (n int) {
	t.Helper()
	if err := w.store.View(t.Context(), func(ctx context.Context, r broker.Reader) error {
		list, err := r.Entries(ctx, "", 0, 1000)
		for _, e := range list {
			if strings.Contains(string(e.Body), `"`+string(translog.KindRewrap)+`"`) {
				n++
			}
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestRewrap(t *testing.T) {
	w, v := rewrapWorld(t, 3)
	before := w.wrapped(t)
	if p, err := w.Rewrap(t.Context(), "op", ""); err != nil || p.Looked != 3 || p.Changed != 0 {
		t.Fatalf("before there is a new version: %+v, %v", p, err)
	}
	v.rotate(t)
	p, err := w.Rewrap(t.Context(), "op", "")
	if err != nil || p.Looked != 3 || p.Changed != 3 || p.Last != "run-02" {
		t.Fatalf("got %+v, %v", p, err)
	}
	for name, b := range w.wrapped(t) {
		if same := bytes.Equal(b, before[name]); same == strings.HasPrefix(name, "run-") {
			t.Errorf("%s: the same wrapped key: %v", name, same)
		}
	}
	if n := w.rewraps(t); n != 3 {
		t.Errorf("%d entries in the log", n)
	}
	// Nothing needs the old version any more.
	v.versions[0] = nil
	if _, err := w.Rewrap(t.Context(), "op", ""); err != nil {
		t.Error(err)
	}
	if _, err := w.CheckLog(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestRewrapGoesOnPastAKeyThatDoesNotOpen(t *testing.T) {
	w, v := rewrapWorld(t, 3)
	before := w.wrapped(t)
	v.rotate(t)
	disabled := errors.New("disabled by its owner")
	v.before = func(n int) error {
		if n == 2 {
			return disabled
		}
		return nil
	}
	p, err := w.Rewrap(t.Context(), "op", "")
	if !errors.Is(err, disabled) || !strings.Contains(err.Error(), "run-01") || p.Looked != 3 || p.Changed != 2 {
		t.Fatalf("got %+v, %v", p, err)
	}
	if !bytes.Equal(w.wrapped(t)["run-01"], before["run-01"]) {
		t.Error("the one that failed was changed")
	}
	if p, err := w.Rewrap(t.Context(), "op", ""); err != nil || p.Changed != 1 {
		t.Errorf("the next pass: %+v, %v", p, err)
	}
}

func TestRewrapIsResumed(t *testing.T) {
	w, v := rewrapWorld(t, 4)
	v.rotate(t)
	ctx, cancel := context.WithCancel(t.Context())
	v.before = func(n int) error {
		if n == 2 {
			cancel()
		}
		return ctx.Err()
	}
	p, err := w.Rewrap(ctx, "op", "")
	if !errors.Is(err, context.Canceled) || p.Changed != 1 {
		t.Fatalf("got %+v, %v", p, err)
	}
	v.before = nil
	if rest, err := w.Rewrap(t.Context(), "op", "run-00"); err != nil || rest.Looked != 3 || rest.Changed != 3 {
		t.Errorf("the rest: %+v, %v", rest, err)
	}
}

func TestRewrapKeys(t *testing.T) {
	const n = 70
	w, v := rewrapWorld(t, n)
	v.rotate(t)
	for _, who := range []broker.Actor{alice, node, {}} {
		if p, err := w.RewrapKeys(t.Context(), who, ""); !refusedWith(err, "role") || p.Looked != 0 || v.calls != 0 {
			t.Errorf("%s: %+v, %v", who, p, err)
		}
	}
	disabled := errors.New("disabled by its owner")
	v.before = func(call int) error {
		if call == 2 {
			return disabled
		}
		return nil
	}
	first, err := w.RewrapKeys(t.Context(), oscar, "")
	if !errors.Is(err, disabled) || first.Looked != 64 || first.Changed != 63 || first.Done || first.Last != "run-63" || len(first.Failed) != 1 || first.Failed[0] != "run-01" {
		t.Fatalf("got %+v, %v", first, err)
	}
	rest, err := w.RewrapKeys(t.Context(), oscar, first.Last)
	if err != nil || rest.Looked != n-64 || rest.Changed != n-64 || !rest.Done || rest.Failed != nil {
		t.Fatalf("got %+v, %v", rest, err)
	}
	if again, err := w.RewrapKeys(t.Context(), oscar, ""); err != nil || again.Changed != 1 || again.Done {
		t.Errorf("what had failed: %+v, %v", again, err)
	}
	if got := w.rewraps(t); got != n {
		t.Errorf("%d entries in the log", got)
	}
}

// TestRewrapLosesNoOtherChange is an asset that another pass wrapped meanwhile.
func TestRewrapLosesNoOtherChange(t *testing.T) {
	w, v := rewrapWorld(t, 1)
	v.rotate(t)
	other := []byte("wrapped by another pass")
	v.before = func(int) error {
		return w.store.Update(t.Context(), func(ctx context.Context, tx broker.Tx) error {
			a, err := tx.Asset(ctx, "run-00")
			if err != nil {
				return err
			}
			a.Wrapped = other
			return tx.SetAssetKey(ctx, a)
		})
	}
	if p, err := w.Rewrap(t.Context(), "op", ""); err != nil || p.Changed != 0 {
		t.Errorf("got %+v, %v", p, err)
	}
	if !bytes.Equal(w.wrapped(t)["run-00"], other) || w.rewraps(t) != 0 {
		t.Error("the other pass's key was overwritten")
	}
}
