// Package keystoretest is what every key store must pass, in memory and out of
// process alike.
package keystoretest

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/coffer-run/coffer/plugins/contract/keystore"
)

// Served returns impl as a host sees it: through the contract's wire form, in
// memory.
func Served(t *testing.T, impl keystore.Store) keystore.Store {
	t.Helper()
	l := bufconn.Listen(1 << 16)
	s := grpc.NewServer(grpc.MaxRecvMsgSize(keystore.MaxMessage))
	keystore.Register(s, impl)
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	conn, err := grpc.NewClient("passthrough:///bufconn",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return keystore.New(conn)
}

// Fixture is a store under test with its owner's hand on it. The store offers
// two keys, both enabled.
type Fixture struct {
	Store keystore.Store
	// Again opens a second store over the same backend.
	Again func(t *testing.T) keystore.Store
	// Foreign opens a store with keys of the same names that are others.
	Foreign func(t *testing.T) keystore.Store
	// Rotate gives a key a new version. Disable disables or removes a key.
	Rotate, Disable func(t *testing.T, keyID string)
	// Stride is the distance between the bytes that are flipped, 1 if it is zero:
	// a store behind a slow backend may leave some to other runs.
	Stride int
}

// Run holds a store against the contract. It leaves the second key disabled and
// the first one rotated.
func Run(t *testing.T, f Fixture) {
	s, ctx := f.Store, t.Context()
	info, err := s.Info(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(info.Keys) != 2 || info.Keys[0].Disabled || info.Keys[1].Disabled {
		t.Fatalf("want two keys, enabled: %+v", info)
	}
	first, second := info.Keys[0].ID, info.Keys[1].ID
	ad := []byte("asset one")

	t.Run("a key comes back, in another store over the same backend too", func(t *testing.T) {
		for _, associated := range [][]byte{ad, {}, bytes.Repeat([]byte("x"), keystore.MaxAssociated)} {
			plain := Key(t)
			w := Wrap(t, s, first, plain, associated)
			if w.Version != info.Keys[0].Newest {
				t.Errorf("wrapped under version %d of %+v", w.Version, info.Keys[0])
			}
			if bytes.Contains(w.Ciphertext, plain) {
				t.Fatal("the ciphertext holds the key")
			}
			for name, store := range map[string]keystore.Store{"same": s, "again": f.Again(t)} {
				if got := unwrap(t, store, w, associated); !bytes.Equal(got, plain) {
					t.Errorf("%s: another key came back", name)
				}
			}
		}
	})
	t.Run("two wraps of one key differ", func(t *testing.T) {
		plain := Key(t)
		if bytes.Equal(Wrap(t, s, first, plain, ad).Ciphertext, Wrap(t, s, first, plain, ad).Ciphertext) {
			t.Error("the same ciphertext twice")
		}
	})
	t.Run("other associated data", func(t *testing.T) {
		w := Wrap(t, s, first, Key(t), ad)
		for _, other := range [][]byte{nil, []byte("asset two"), ad[:len(ad)-1], append(bytes.Clone(ad), 0)} {
			mismatch(t, s, w, other)
			if _, err := s.Rewrap(ctx, w, other); !errors.Is(err, keystore.ErrMismatch) {
				t.Errorf("rewrapped for %q: %v", other, err)
			}
		}
		none := Wrap(t, s, first, Key(t), nil)
		mismatch(t, s, none, ad)
	})
	t.Run("another key or version", func(t *testing.T) {
		w := Wrap(t, s, first, Key(t), ad)
		mismatch(t, s, &keystore.Wrapped{Key: second, Version: info.Keys[1].Newest, Ciphertext: w.Ciphertext}, ad)
		mismatch(t, s, &keystore.Wrapped{Key: first, Version: w.Version + 1, Ciphertext: w.Ciphertext}, ad)
		mismatch(t, s, &keystore.Wrapped{Key: first, Version: 1 << 31, Ciphertext: w.Ciphertext}, ad)
		if _, err := s.Unwrap(ctx, &keystore.Wrapped{Key: first, Ciphertext: w.Ciphertext}, ad); err == nil {
			t.Error("unwrapped under version 0")
		}
	})
	t.Run("a key that is not there", func(t *testing.T) {
		w := Wrap(t, s, first, Key(t), ad)
		w.Key = "nobody"
		if _, err := s.Unwrap(ctx, w, ad); err == nil {
			t.Error("unwrapped")
		}
		k := dataKey(t, Key(t))
		if _, err := s.Wrap(ctx, "nobody", k, ad); err == nil {
			t.Error("wrapped")
		}
		for _, bad := range []string{"", "../" + first + "?x", "a b", string(make([]byte, keystore.MaxName+1))} {
			if _, err := s.Wrap(ctx, bad, k, ad); err == nil {
				t.Errorf("wrapped under %q", bad)
			}
		}
	})
	t.Run("a bit flipped in any byte", func(t *testing.T) {
		w := Wrap(t, s, first, Key(t), ad)
		for i := 0; i < len(w.Ciphertext); i += max(f.Stride, 1) {
			c := bytes.Clone(w.Ciphertext)
			c[i] ^= 1
			mismatch(t, s, &keystore.Wrapped{Key: w.Key, Version: w.Version, Ciphertext: c}, ad)
		}
	})
	t.Run("truncated, lengthened, empty and too long", func(t *testing.T) {
		w := Wrap(t, s, first, Key(t), ad)
		for n := 1; n < len(w.Ciphertext); n += max(f.Stride, 1) {
			mismatch(t, s, &keystore.Wrapped{Key: w.Key, Version: w.Version, Ciphertext: w.Ciphertext[:n]}, ad)
		}
		mismatch(t, s, &keystore.Wrapped{Key: w.Key, Version: w.Version, Ciphertext: append(bytes.Clone(w.Ciphertext), 0)}, ad)
		mismatch(t, s, &keystore.Wrapped{Key: w.Key, Version: w.Version, Ciphertext: bytes.Repeat([]byte("A"), keystore.MaxCiphertext)}, ad)
		for _, n := range []int{0, keystore.MaxCiphertext + 1} {
			if _, err := s.Unwrap(ctx, &keystore.Wrapped{Key: w.Key, Version: w.Version, Ciphertext: make([]byte, n)}, ad); err == nil {
				t.Errorf("unwrapped %d bytes", n)
			}
		}
		if _, err := s.Unwrap(ctx, w, make([]byte, keystore.MaxAssociated+1)); err == nil {
			t.Error("took too much associated data")
		}
	})
	t.Run("another store with keys of the same names", func(t *testing.T) {
		other := f.Foreign(t)
		mismatch(t, other, Wrap(t, s, first, Key(t), ad), ad)
		mismatch(t, s, Wrap(t, other, first, Key(t), ad), ad)
	})
	t.Run("a deadline that is over", func(t *testing.T) {
		w := Wrap(t, s, first, Key(t), ad)
		over, cancel := context.WithDeadline(ctx, time.Now().Add(-time.Second))
		defer cancel()
		if _, err := s.Unwrap(over, w, ad); err == nil {
			t.Error("answered")
		}
	})
	t.Run("concurrent calls keep their keys apart", func(t *testing.T) {
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				for range 4 {
					plain := Key(t)
					w, err := s.Wrap(ctx, first, dataKey(t, plain), plain[:8])
					if err != nil {
						t.Error(err)
						return
					}
					k, err := s.Unwrap(ctx, w, plain[:8])
					if err != nil || !bytes.Equal(k.Reveal(), plain) {
						t.Errorf("another key came back, %v", err)
						return
					}
				}
			})
		}
		wg.Wait()
	})
	t.Run("health", func(t *testing.T) {
		if err := s.Health(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Run("a new version of a key", func(t *testing.T) {
		plain := Key(t)
		old := Wrap(t, s, first, plain, ad)
		same, err := s.Rewrap(ctx, old, ad)
		if err != nil || same.Version != old.Version {
			t.Fatalf("rewrapped before there was a new version: %+v, %v", same, err)
		}
		f.Rotate(t, first)
		if got := unwrap(t, s, old, ad); !bytes.Equal(got, plain) {
			t.Error("the old version does not open any more")
		}
		fresh, err := s.Rewrap(ctx, old, ad)
		if err != nil {
			t.Fatal(err)
		}
		if fresh.Version <= old.Version || fresh.Key != old.Key {
			t.Errorf("rewrapped %s version %d to %s version %d", old.Key, old.Version, fresh.Key, fresh.Version)
		}
		if got := unwrap(t, f.Again(t), fresh, ad); !bytes.Equal(got, plain) {
			t.Error("another key came back from the new version")
		}
		if w := Wrap(t, s, first, plain, ad); w.Version != fresh.Version {
			t.Errorf("wraps under version %d, rewraps under %d", w.Version, fresh.Version)
		}
		mismatch(t, s, &keystore.Wrapped{Key: fresh.Key, Version: old.Version, Ciphertext: fresh.Ciphertext}, ad)
		mismatch(t, s, &keystore.Wrapped{Key: old.Key, Version: fresh.Version, Ciphertext: old.Ciphertext}, ad)
		bad := bytes.Clone(old.Ciphertext)
		bad[len(bad)-1] ^= 1
		if _, err := s.Rewrap(ctx, &keystore.Wrapped{Key: old.Key, Version: old.Version, Ciphertext: bad}, ad); !errors.Is(err, keystore.ErrMismatch) {
			t.Errorf("rewrapped what was changed: %v", err)
		}
	})
	t.Run("a key that its owner disabled, at the next call", func(t *testing.T) {
		w := Wrap(t, s, second, Key(t), ad)
		unwrap(t, s, w, ad)
		f.Disable(t, second)
		if k, err := s.Unwrap(ctx, w, ad); k != nil || !errors.Is(err, keystore.ErrDisabled) {
			t.Errorf("unwrapped: %v", err)
		}
		if _, err := s.Rewrap(ctx, w, ad); !errors.Is(err, keystore.ErrDisabled) {
			t.Errorf("rewrapped: %v", err)
		}
		if _, err := s.Wrap(ctx, second, dataKey(t, Key(t)), ad); !errors.Is(err, keystore.ErrDisabled) {
			t.Errorf("wrapped: %v", err)
		}
		Wrap(t, s, first, Key(t), ad) // the other key works on
		info, err := s.Info(ctx)
		if err != nil || len(info.Keys) != 2 || info.Keys[0].Disabled || !info.Keys[1].Disabled {
			t.Errorf("info says %+v, %v", info, err)
		}
	})
}

// Key returns the bytes of a random data key.
func Key(t *testing.T) []byte {
	t.Helper()
	b := make([]byte, keystore.DataKeySize)
	_, _ = rand.Read(b)
	return b
}

func dataKey(t *testing.T, plain []byte) *keystore.DataKey {
	t.Helper()
	k, err := keystore.NewDataKey(bytes.Clone(plain))
	if err != nil {
		t.Error(err)
	}
	return k
}

// Wrap wraps plain, which must work.
func Wrap(t *testing.T, s keystore.Store, keyID string, plain, associated []byte) *keystore.Wrapped {
	t.Helper()
	w, err := s.Wrap(t.Context(), keyID, dataKey(t, plain), associated)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func unwrap(t *testing.T, s keystore.Store, w *keystore.Wrapped, associated []byte) []byte {
	t.Helper()
	k, err := s.Unwrap(t.Context(), w, associated)
	if err != nil {
		t.Fatal(err)
	}
	return k.Reveal()
}

func mismatch(t *testing.T, s keystore.Store, w *keystore.Wrapped, associated []byte) {
	t.Helper()
	if k, err := s.Unwrap(t.Context(), w, associated); k != nil || !errors.Is(err, keystore.ErrMismatch) {
		t.Errorf("unwrapped, or failed otherwise: %v", err)
	}
}
