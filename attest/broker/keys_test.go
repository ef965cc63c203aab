package broker_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/check"
)

// failing is a key store that fails as it is told to.
type failing struct {
	broker.KeyStore
	err error
}

func (f *failing) Wrap(ctx context.Context, k *broker.DataKey, ad []byte) ([]byte, error) {
	if f.err != nil {
		return nil, f.err
	}
	return f.KeyStore.Wrap(ctx, k, ad)
}

func (f *failing) Unwrap(ctx context.Context, wrapped, ad []byte) (*broker.DataKey, error) {
	if f.err != nil {
		return nil, f.err
	}
	return f.KeyStore.Unwrap(ctx, wrapped, ad)
}

// TestKeyDisabledByItsOwner disables a key-encryption key under a grant that
// stands: nothing else is in the way of the release.
func TestKeyDisabledByItsOwner(t *testing.T) {
	for name, store := range map[string]string{"the broker's own key store": "", "key store hsm": "hsm"} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, false)
			f := &failing{KeyStore: w.cfg.Keys}
			w.cfg.Keys = f
			w.cfg.KeyStores = map[string]broker.KeyStore{"hsm": f}
			w.Broker = must[*broker.Broker](t)(broker.New(w.cfg))
			create := func(asset string) error {
				_, err := w.CreateAsset(t.Context(), alice, broker.NewAsset{Name: asset, Kind: broker.KindCheckpoints, KeyStore: store})
				return err
			}
			if err := create("run"); err != nil {
				t.Fatal(err)
			}
			g := w.grant(t, func(n *broker.NewGrant) { n.Assets, n.MaxReleases = []string{"run"}, 2 })
			before := newJob(t, w, nil)
			answered := must[broker.Answer](t)(before.release(t, w.Broker, g, "run"))

			// What a store says beside the word is of no concern to an agent.
			f.err = fmt.Errorf("%w: pin 482915", broker.ErrKeyDisabled)
			j := newJob(t, w, nil)
			for range 2 {
				a, err := j.release(t, w.Broker, g, "run")
				if !slices.Equal(failed(err), []string{"asset.key-disabled"}) || a.Ciphertext != nil {
					t.Fatalf("disabled: %v", err)
				}
				var r *check.Refusal
				if errors.As(err, &r); !strings.Contains(r.Error(), "found one in "+name+" that its owner disabled or removed") || strings.Contains(r.Error(), "482915") {
					t.Errorf("it says %q", r)
				}
			}
			if got := must[[]broker.Grant](t)(w.grants(t)); got[0].Used != 1 {
				t.Errorf("a refused release counts: used %d", got[0].Used)
			}
			if again := must[broker.Answer](t)(before.release(t, w.Broker, g, "run")); !bytes.Equal(again.Ciphertext, answered.Ciphertext) {
				t.Error("what was answered before is answered otherwise")
			}
			if err := create("late"); !errors.Is(err, broker.ErrInvalid) || !errors.Is(err, broker.ErrKeyDisabled) || strings.Contains(err.Error(), "482915") {
				t.Errorf("an asset under a disabled key: %v", err)
			}

			// Any other error is a store that did not do its part.
			f.err = errors.New("backend does not answer")
			if _, err := j.release(t, w.Broker, g, "run"); !errors.Is(err, broker.ErrUnavailable) || failed(err) != nil {
				t.Errorf("gone: %v", err)
			}
			if err := create("late"); !errors.Is(err, broker.ErrUnavailable) {
				t.Errorf("an asset without a key store: %v", err)
			}
			f.err = nil
			must[broker.Answer](t)(j.release(t, w.Broker, g, "run"))
		})
	}
}
