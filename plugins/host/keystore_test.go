package host_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/coffer-run/coffer/plugins/contract/keystore"
	"github.com/coffer-run/coffer/plugins/host"
	"github.com/coffer-run/coffer/plugins/kit"
)

// hostile is a key store that keeps nothing secret and misbehaves in one way.
type hostile string

func (h hostile) Info(context.Context) (*keystore.Info, error) {
	i := &keystore.Info{Name: "main", Kind: "hostile", Keys: []keystore.Key{{ID: fmt.Sprint(os.Getpid()), Newest: 1, Oldest: 1}, {ID: "key", Newest: 1, Oldest: 1}}}
	switch h {
	case "other-name":
		i.Name = "other"
	case "no-keys":
		i.Keys = nil
	case "key-twice":
		i.Keys = append(i.Keys, i.Keys[0])
	case "too-many-keys":
		for n := range keystore.MaxKeys {
			i.Keys = append(i.Keys, keystore.Key{ID: fmt.Sprint("k", n), Newest: 1})
		}
	case "control-characters":
		i.Keys[1].ID = "key\x1b[2J"
	case "disabled":
		return nil, keystore.ErrDisabled
	}
	return i, nil
}

func (h hostile) Wrap(_ context.Context, keyID string, key *keystore.DataKey, _ []byte) (*keystore.Wrapped, error) {
	w := &keystore.Wrapped{Key: keyID, Version: 1, Ciphertext: bytes.Clone(key.Reveal())}
	switch h {
	case "wraps-under-another-key":
		w.Key = "other"
	case "wraps-under-no-version":
		w.Version = 0
	case "wraps-into-nothing":
		w.Ciphertext = nil
	case "wraps-into-too-much":
		w.Ciphertext = make([]byte, keystore.MaxCiphertext+1)
	case "wraps-into-64-mebibytes":
		w.Ciphertext = make([]byte, 64<<20)
	case "answers-nothing":
		return nil, nil
	}
	return w, nil
}

func (h hostile) Unwrap(ctx context.Context, w *keystore.Wrapped, _ []byte) (*keystore.DataKey, error) {
	switch h {
	case "hangs":
		<-ctx.Done()
		time.Sleep(time.Hour)
	case "crashes":
		os.Exit(3)
	case "panics":
		panic("at an unwrap")
	case "late":
		time.Sleep(3 * time.Second)
	case "another-key":
		return keystore.NewDataKey(bytes.Repeat([]byte{1}, keystore.DataKeySize))
	case "disabled":
		return nil, fmt.Errorf("%w: key 5", keystore.ErrDisabled)
	case "answers-nothing":
		return nil, nil
	}
	return keystore.NewDataKey(bytes.Clone(w.Ciphertext))
}

func (h hostile) Rewrap(_ context.Context, w *keystore.Wrapped, _ []byte) (*keystore.Wrapped, error) {
	n := &keystore.Wrapped{Key: w.Key, Version: w.Version + 1, Ciphertext: w.Ciphertext}
	switch h {
	case "rewraps-under-another-key":
		n.Key = "other"
	case "rewraps-under-an-older-version":
		n.Version = w.Version - 1
	case "rewraps-another-key":
		n.Ciphertext = bytes.Repeat([]byte{1}, keystore.DataKeySize)
	}
	return n, nil
}

func (h hostile) Health(context.Context) error {
	if h == "backend" {
		return keystore.ErrBackend
	}
	return nil
}

func store(t *testing.T, behaviour string, o host.Options) *host.KeyStore {
	t.Helper()
	k, err := host.StartKeyStore(t.Context(), own(t, "keystore-"+behaviour), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k.Close() })
	return k
}

func secret(t *testing.T) *keystore.DataKey {
	t.Helper()
	k, err := keystore.NewDataKey(bytes.Repeat([]byte{7}, keystore.DataKeySize))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func wrapped() *keystore.Wrapped {
	return &keystore.Wrapped{Key: "key", Version: 2, Ciphertext: bytes.Repeat([]byte{7}, keystore.DataKeySize)}
}

// process returns the id of the plugin's process, by the name of its first key.
func process(t *testing.T, k *host.KeyStore) string {
	t.Helper()
	i, err := k.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return i.Keys[0].ID
}

func TestKeyStoreAnswers(t *testing.T) {
	k := store(t, "well", host.Options{})
	n := keystore.Named{Name: "main", Store: k}
	e, err := n.Wrap(t.Context(), "key", secret(t), []byte("asset"))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		got, err := n.Unwrap(t.Context(), e, []byte("asset"))
		if err != nil || got.Reveal()[31] != 7 {
			t.Fatalf("another key, %v", err)
		}
		if e, err = n.Rewrap(t.Context(), e, []byte("asset")); err != nil {
			t.Fatal(err)
		}
	}
	// This store binds nothing: the envelope does.
	if _, err := n.Unwrap(t.Context(), e, []byte("other asset")); !errors.Is(err, keystore.ErrMismatch) {
		t.Errorf("for another asset: %v", err)
	}
	if err := k.Health(t.Context()); err != nil {
		t.Error(err)
	}
	if err := k.Close(); err != nil {
		t.Error(err)
	}
	if _, err := k.Info(t.Context()); !errors.Is(err, host.ErrDied) {
		t.Errorf("after Close: %v", err)
	}
}

func TestKeyStoreChecksum(t *testing.T) {
	good := own(t, "keystore-well")
	for name, cfg := range map[string]host.Config{
		"none":            {Path: good.Path, Args: good.Args},
		"of another file": {Path: good.Path, Args: good.Args, SHA256: strings.Repeat("0", 64)},
	} {
		t.Run(name, func(t *testing.T) {
			if k, err := host.StartKeyStore(t.Context(), cfg, host.Options{}); k != nil || !errors.Is(err, host.ErrChecksum) {
				t.Errorf("got %v, %v", k, err)
			}
		})
	}
	t.Run("at the restart", func(t *testing.T) {
		cfg := own(t, "keystore-crashes")
		b, err := os.ReadFile(cfg.Path)
		if err != nil {
			t.Fatal(err)
		}
		cfg.Path = filepath.Join(t.TempDir(), "plugin")
		if err := os.WriteFile(cfg.Path, b, 0o700); err != nil {
			t.Fatal(err)
		}
		k, err := host.StartKeyStore(t.Context(), cfg, host.Options{BackOff: time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		defer k.Close()
		b[len(b)-1] ^= 1
		if err := os.WriteFile(cfg.Path, b, 0o700); err != nil {
			t.Fatal(err)
		}
		_, _ = k.Unwrap(t.Context(), wrapped(), nil)
		time.Sleep(5 * time.Millisecond)
		if err := k.Health(t.Context()); !errors.Is(err, host.ErrChecksum) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a GPU plugin in its place", func(t *testing.T) {
		if k, err := host.StartKeyStore(t.Context(), own(t, "well"), host.Options{}); err == nil {
			_, err = k.Info(t.Context())
			_ = k.Close()
			if err == nil {
				t.Error("answered")
			}
		}
	})
}

// TestKeyStoreLies holds one lie each against the one check that is for it.
func TestKeyStoreLies(t *testing.T) {
	for behaviour, ask := range map[string]func(context.Context, keystore.Named) error{
		"other-name":         info,
		"no-keys":            info,
		"key-twice":          info,
		"too-many-keys":      info,
		"control-characters": info,
		"wraps-under-another-key": func(ctx context.Context, n keystore.Named) error {
			_, err := n.Store.Wrap(ctx, "key", secret(t), nil)
			return err
		},
		"wraps-under-no-version":         wrap,
		"wraps-into-nothing":             wrap,
		"wraps-into-too-much":            wrap,
		"answers-nothing":                wrap,
		"another-key":                    wrap,
		"rewraps-under-another-key":      rewrap,
		"rewraps-under-an-older-version": rewrap,
		"rewraps-another-key": func(ctx context.Context, n keystore.Named) error {
			e, err := n.Wrap(ctx, "key", secret(t), nil)
			if err != nil {
				t.Fatal(err)
			}
			_, err = n.Rewrap(ctx, e, nil)
			return err
		},
	} {
		t.Run(behaviour, func(t *testing.T) {
			n := keystore.Named{Name: "main", Store: store(t, behaviour, host.Options{})}
			err := ask(t.Context(), n)
			if err == nil || errors.Is(err, host.ErrDied) || errors.Is(err, host.ErrTimeout) {
				t.Errorf("got %v", err)
			}
		})
	}
	t.Run("a key of 31 bytes", func(t *testing.T) {
		w := wrapped()
		for _, n := range []int{0, 31, 33, 64} {
			w.Ciphertext = append([]byte{}, make([]byte, n)...)
			if k, err := store(t, "well", host.Options{}).Unwrap(t.Context(), w, nil); err == nil {
				t.Errorf("%d bytes: %v", n, k)
			}
		}
	})
	t.Run("no key", func(t *testing.T) {
		if k, err := store(t, "answers-nothing", host.Options{}).Unwrap(t.Context(), wrapped(), nil); err == nil {
			t.Errorf("got %v", k)
		}
	})
}

func info(ctx context.Context, n keystore.Named) error {
	_, err := n.Info(ctx)
	return err
}

func wrap(ctx context.Context, n keystore.Named) error {
	k, err := keystore.NewDataKey(bytes.Repeat([]byte{7}, keystore.DataKeySize))
	if err != nil {
		return err
	}
	_, err = n.Wrap(ctx, "key", k, nil)
	return err
}

func rewrap(ctx context.Context, n keystore.Named) error {
	_, err := n.Store.Rewrap(ctx, wrapped(), nil)
	return err
}

func TestKeyStoreErrorsKeepTheirKind(t *testing.T) {
	k := store(t, "disabled", host.Options{})
	if _, err := k.Unwrap(t.Context(), wrapped(), nil); !errors.Is(err, keystore.ErrDisabled) || !strings.Contains(err.Error(), "key 5") {
		t.Errorf("got %v", err)
	}
	if err := store(t, "backend", host.Options{}).Health(t.Context()); !errors.Is(err, keystore.ErrBackend) || errors.Is(err, host.ErrDied) {
		t.Errorf("got %v", err)
	}
}

func TestKeyStoreDiesAndComesBack(t *testing.T) {
	for behaviour, want := range map[string]error{"crashes": host.ErrDied, "panics": host.ErrDied, "hangs": host.ErrTimeout, "late": host.ErrTimeout} {
		t.Run(behaviour, func(t *testing.T) {
			t.Parallel()
			const backOff = 2 * time.Second
			k := store(t, behaviour, host.Options{Call: time.Second, BackOff: backOff})
			first := process(t, k)
			key, err := k.Unwrap(t.Context(), wrapped(), nil)
			if key != nil || !errors.Is(err, want) {
				t.Fatalf("got %v", err)
			}
			// It stays down for its back-off, and says why.
			if _, err := k.Info(t.Context()); !errors.Is(err, host.ErrDied) || !strings.Contains(err.Error(), "started again in") {
				t.Errorf("during its back-off: %v", err)
			}
			time.Sleep(backOff)
			if second := process(t, k); second == first {
				t.Error("the same process answers")
			}
			var pid int
			if _, err := fmt.Sscan(first, &pid); err != nil || !gone(pid) {
				t.Errorf("the process before is still there, %v", err)
			}
		})
	}
}

func TestKeyStoreKilledUnderLoad(t *testing.T) {
	k := store(t, "well", host.Options{BackOff: time.Millisecond})
	var pid int
	if _, err := fmt.Sscan(process(t, k), &pid); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for n := range 50 {
				if i == 0 && n == 10 {
					_ = syscall.Kill(pid, syscall.SIGKILL)
				}
				key, err := k.Unwrap(t.Context(), wrapped(), nil)
				if err != nil && !errors.Is(err, host.ErrDied) {
					t.Error(err)
				}
				if err == nil && key.Reveal()[0] != 7 {
					t.Error("another key")
				}
			}
		})
	}
	wg.Wait()
	for range 3000 {
		if err := k.Health(t.Context()); err == nil {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Error("it did not come back")
}

func TestKeyStoreCallerGivesUp(t *testing.T) {
	k := store(t, "hangs", host.Options{})
	first := process(t, k)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := k.Unwrap(ctx, wrapped(), nil); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, host.ErrTimeout) {
		t.Errorf("got %v", err)
	}
	if process(t, k) != first {
		t.Error("an impatient caller ended the plugin for all others")
	}
}

// TestKeyStoreStopped is a plugin that hangs while every caller gives up early.
func TestKeyStoreStopped(t *testing.T) {
	k := store(t, "well", host.Options{Call: time.Second, BackOff: time.Millisecond})
	first := process(t, k)
	var pid int
	if _, err := fmt.Sscan(first, &pid); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for range 3000 {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		i, err := k.Info(ctx)
		cancel()
		if err == nil && i.Keys[0].ID != first {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Error("it was not started again")
}

// TestKeyStoreAnswersTooMuch is an answer of a thousand times the bound, which is
// refused by the length in front of it, before it is read.
func TestKeyStoreAnswersTooMuch(t *testing.T) {
	_, err := store(t, "wraps-into-64-mebibytes", host.Options{}).Wrap(t.Context(), "key", secret(t), nil)
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("got %v", err)
	}
}

func TestKeyStoreStartedByHand(t *testing.T) {
	if err := kit.ServeKeyStore(hostile("well"), io.Discard); err == nil || !strings.Contains(err.Error(), "coffer-broker") {
		t.Errorf("got %v", err)
	}
	if err := kit.ServeKeyStore(nil, io.Discard); err == nil {
		t.Error("served nothing")
	}
}
