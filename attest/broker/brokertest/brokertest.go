// Package brokertest is the conformance suite of what a broker stands on: every
// KeyStore and every Store passes it.
package brokertest

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/translog"
)

// TestKeyStore holds a KeyStore to its contract. open returns two stores with
// different keys of their own.
func TestKeyStore(t *testing.T, open func(t *testing.T) (one, other broker.KeyStore)) {
	one, other := open(t)
	ctx := t.Context()
	secret := make([]byte, broker.DataKeySize)
	_, _ = rand.Read(secret)
	key, err := broker.NewDataKey(bytes.Clone(secret))
	if err != nil {
		t.Fatal(err)
	}
	defer key.Destroy()
	wrapped, err := one.Wrap(ctx, key, []byte("asset a"))
	if err != nil {
		t.Fatal(err)
	}
	opens := func(s broker.KeyStore, wrapped []byte, associated string) bool {
		k, err := s.Unwrap(ctx, wrapped, []byte(associated))
		if err != nil {
			if k != nil {
				t.Error("an error came with a key")
			}
			return false
		}
		defer k.Destroy()
		return bytes.Equal(k.Reveal(), secret)
	}

	t.Run("unwraps what it wrapped", func(t *testing.T) {
		if !opens(one, wrapped, "asset a") || !opens(one, wrapped, "asset a") {
			t.Error("does not open")
		}
	})
	t.Run("wrapping twice gives different bytes", func(t *testing.T) {
		again, err := one.Wrap(ctx, key, []byte("asset a"))
		if err != nil || bytes.Equal(again, wrapped) {
			t.Errorf("same bytes, %v", err)
		}
	})
	t.Run("wrapped bytes do not hold the key", func(t *testing.T) {
		if bytes.Contains(wrapped, secret) {
			t.Error("they do")
		}
	})
	t.Run("refuses other associated data", func(t *testing.T) {
		for _, ad := range []string{"asset b", "", "asset a\x00"} {
			if opens(one, wrapped, ad) {
				t.Errorf("opens for %q", ad)
			}
		}
	})
	t.Run("refuses under another key", func(t *testing.T) {
		if opens(other, wrapped, "asset a") {
			t.Error("opens")
		}
	})
	t.Run("refuses every changed byte", func(t *testing.T) {
		for i := range wrapped {
			bad := bytes.Clone(wrapped)
			bad[i] ^= 1
			if opens(one, bad, "asset a") {
				t.Errorf("opens with byte %d changed", i)
			}
		}
	})
	t.Run("refuses every other length", func(t *testing.T) {
		for i := range wrapped {
			if opens(one, wrapped[:i], "asset a") {
				t.Errorf("opens with %d bytes", i)
			}
		}
		if opens(one, append(bytes.Clone(wrapped), 0), "asset a") {
			t.Error("opens with a byte more")
		}
	})
	t.Run("refuses a destroyed key", func(t *testing.T) {
		gone := broker.GenerateDataKey()
		gone.Destroy()
		if _, err := one.Wrap(ctx, gone, nil); err == nil {
			t.Error("wrapped")
		}
		if _, err := one.Wrap(ctx, nil, nil); err == nil {
			t.Error("wrapped nil")
		}
	})
	t.Run("serves many at once", func(t *testing.T) {
		var wg sync.WaitGroup
		for i := range 16 {
			wg.Go(func() {
				ad := fmt.Sprint("asset ", i)
				w, err := one.Wrap(ctx, key, []byte(ad))
				if err != nil || !opens(one, w, ad) {
					t.Errorf("%s: %v", ad, err)
				}
			})
		}
		wg.Wait()
	})
}

// TestStore holds a Store to its contract. open returns an empty store;
// reopen closes that one and opens the same state again.
func TestStore(t *testing.T, open func(t *testing.T) (s broker.Store, reopen func() broker.Store)) {
	for name, f := range map[string]func(*testing.T, broker.Store, func() broker.Store){
		"keeps everything over a restart":         keeps,
		"finds nothing in an empty store":         empty,
		"refuses to insert twice":                 twice,
		"refuses what refers to nothing":          dangling,
		"undoes a failed update":                  undo,
		"undoes a panicking update":               undoPanic,
		"undoes a cancelled update":               undoCancel,
		"runs updates one after another":          serial,
		"shows a reader one state":                snapshot,
		"finds uses by nonce and by result":       uses,
		"returns an update's error as it is":      sameError,
		"lists entries by job, start and limit":   entries,
		"finds a bundle of a job by its digest":   bundles,
		"refuses to use a grant more than it may": overuse,
	} {
		t.Run(name, func(t *testing.T) {
			s, reopen := open(t)
			f(t, s, reopen)
		})
	}
}

var t0 = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func asset(name string) broker.Asset {
	return broker.Asset{Name: name, Kind: broker.KindDataset, Digest: plan.Sum([]byte(name)), Owner: "alice", Created: t0, Wrapped: []byte{1, 2, 0, 3}}
}

func grant(id string, assets ...string) broker.Grant {
	return broker.Grant{ID: id, Assets: assets, Plan: plan.Sum([]byte("plan")), NotBefore: t0, NotAfter: t0.Add(time.Hour), MaxReleases: 3, Owner: "alice", AllowSimulated: true}
}

func entry(i uint64) translog.Entry {
	return translog.Entry{Index: i, Body: fmt.Appendf(nil, `{"index":%d}`, i), Hash: bytes.Repeat([]byte{byte(i)}, 48)}
}

func release(result, asset, grant string, index uint64) broker.Release {
	return broker.Release{
		ReleaseKey: broker.ReleaseKey{Verifier: "v", ResultID: result, Asset: asset}, ID: "release-" + result + asset, Grant: grant, Attempt: 2, JobID: "job", Plan: plan.Sum([]byte("plan")),
		AssetDigest: plan.Sum([]byte(asset)), Request: plan.Sum([]byte("request")), Enc: []byte{9, 0}, Ciphertext: []byte{8, 0}, Time: t0, NotAfter: t0.Add(time.Hour), Simulated: true,
		LogIndex: index, LogHash: entry(index).Hash,
	}
}

func update(t *testing.T, s broker.Store, f func(context.Context, broker.Tx) error) {
	t.Helper()
	if err := s.Update(t.Context(), f); err != nil {
		t.Fatal(err)
	}
}

func view(t *testing.T, s broker.Store, f func(context.Context, broker.Reader) error) {
	t.Helper()
	if err := s.View(t.Context(), f); err != nil {
		t.Fatal(err)
	}
}

// seed puts two assets, a grant and one release into s.
func seed(ctx context.Context, tx broker.Tx) error {
	return errors.Join(
		tx.InsertAsset(ctx, asset("b")), tx.InsertAsset(ctx, asset("a")), tx.InsertGrant(ctx, grant("g", "a", "b")),
		tx.InsertEntry(ctx, entry(0), "job", ""), tx.InsertRelease(ctx, release("r", "a", "g", 0)),
		tx.InsertUse(ctx, broker.Use{Verifier: "v", Nonce: "n", ResultID: "r", Recipient: "k"}), tx.InsertCounted(ctx, "g", "job", "k"),
	)
}

func same[T any](t *testing.T, what string, want T) func(T, error) {
	return func(got T, err error) {
		t.Helper()
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %+v, %v; want %+v", what, got, err, want)
		}
	}
}

func keeps(t *testing.T, s broker.Store, reopen func() broker.Store) {
	update(t, s, seed)
	g := grant("g", "a", "b")
	g.Used, g.Revoked, g.Reason = 2, t0.Add(time.Minute), "why"
	update(t, s, func(ctx context.Context, tx broker.Tx) error { return tx.SetGrant(ctx, g) })
	s = reopen()
	view(t, s, func(ctx context.Context, r broker.Reader) error {
		same(t, "asset", asset("a"))(r.Asset(ctx, "a"))
		same(t, "assets", []broker.Asset{asset("a"), asset("b")})(r.Assets(ctx, 9))
		same(t, "grant", g)(r.Grant(ctx, "g"))
		same(t, "grants", []broker.Grant{g})(r.Grants(ctx, "", 9))
		same(t, "grants of the plan", []broker.Grant{g})(r.Grants(ctx, g.Plan, 9))
		same(t, "grants of another plan", []broker.Grant(nil))(r.Grants(ctx, plan.Sum(nil), 9))
		same(t, "release", release("r", "a", "g", 0))(r.Release(ctx, broker.ReleaseKey{Verifier: "v", ResultID: "r", Asset: "a"}))
		same(t, "counted", true)(r.Counted(ctx, "g", "job", "k"))
		same(t, "head", translog.Head{Size: 1, Hash: entry(0).Hash})(r.Head(ctx))
		same(t, "entries", []translog.Entry{entry(0)})(r.Entries(ctx, "job", 0, 10))
		same(t, "head of the job", translog.Head{Size: 1, Hash: entry(0).Hash})(r.JobHead(ctx, "job"))
		same(t, "counted for another job", false)(r.Counted(ctx, "g", "job 2", "k"))
		same(t, "assets of the owner", 2)(r.OwnedAssets(ctx, "alice"))
		same(t, "assets of another", 0)(r.OwnedAssets(ctx, "bob"))
		same(t, "grants of the owner", 1)(r.OwnedGrants(ctx, "alice", g.Plan))
		same(t, "grants of another", 0)(r.OwnedGrants(ctx, "bob", g.Plan))
		same(t, "grants of the owner for another plan", 0)(r.OwnedGrants(ctx, "alice", plan.Sum(nil)))
		same(t, "one asset", []broker.Asset{asset("a")})(r.Assets(ctx, 1))
		return nil
	})
}

func empty(t *testing.T, s broker.Store, _ func() broker.Store) {
	view(t, s, func(ctx context.Context, r broker.Reader) error {
		for what, err := range map[string]error{
			"asset":   second(r.Asset(ctx, "a")),
			"grant":   second(r.Grant(ctx, "g")),
			"release": second(r.Release(ctx, broker.ReleaseKey{Verifier: "v", ResultID: "r", Asset: "a"})),
		} {
			if !errors.Is(err, broker.ErrNotFound) {
				t.Errorf("%s: %v", what, err)
			}
		}
		same(t, "assets", []broker.Asset(nil))(r.Assets(ctx, 9))
		same(t, "head", translog.Head{})(r.Head(ctx))
		same(t, "counted", false)(r.Counted(ctx, "g", "job", "k"))
		same(t, "head of the job", translog.Head{})(r.JobHead(ctx, "job"))
		return nil
	})
	if err := s.Update(t.Context(), func(ctx context.Context, tx broker.Tx) error { return tx.SetGrant(ctx, grant("g")) }); !errors.Is(err, broker.ErrNotFound) {
		t.Errorf("set a grant that does not exist: %v", err)
	}
}

func second[T any](_ T, err error) error { return err }

func twice(t *testing.T, s broker.Store, _ func() broker.Store) {
	update(t, s, seed)
	update(t, s, func(ctx context.Context, tx broker.Tx) error { return tx.InsertEntry(ctx, entry(1), "", "") })
	for name, f := range map[string]func(context.Context, broker.Tx) error{
		"asset":                 func(ctx context.Context, tx broker.Tx) error { return tx.InsertAsset(ctx, asset("a")) },
		"grant":                 func(ctx context.Context, tx broker.Tx) error { return tx.InsertGrant(ctx, grant("g", "a")) },
		"grant with one twice":  func(ctx context.Context, tx broker.Tx) error { return tx.InsertGrant(ctx, grant("h", "a", "a")) },
		"release":               func(ctx context.Context, tx broker.Tx) error { return tx.InsertRelease(ctx, release("r", "a", "g", 1)) },
		"release for one entry": func(ctx context.Context, tx broker.Tx) error { return tx.InsertRelease(ctx, release("q", "a", "g", 0)) },
		"nonce": func(ctx context.Context, tx broker.Tx) error {
			return tx.InsertUse(ctx, broker.Use{Verifier: "v", Nonce: "n", ResultID: "q"})
		},
		"result": func(ctx context.Context, tx broker.Tx) error {
			return tx.InsertUse(ctx, broker.Use{Verifier: "v", Nonce: "m", ResultID: "r"})
		},
		"counted": func(ctx context.Context, tx broker.Tx) error { return tx.InsertCounted(ctx, "g", "job", "k") },
		"entry":   func(ctx context.Context, tx broker.Tx) error { return tx.InsertEntry(ctx, entry(0), "job", "") },
	} {
		if err := s.Update(t.Context(), f); !errors.Is(err, broker.ErrExists) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func dangling(t *testing.T, s broker.Store, _ func() broker.Store) {
	update(t, s, seed)
	for name, f := range map[string]func(context.Context, broker.Tx) error{
		"grant of no asset": func(ctx context.Context, tx broker.Tx) error { return tx.InsertGrant(ctx, grant("h", "none")) },
		"release of no grant": func(ctx context.Context, tx broker.Tx) error {
			return errors.Join(tx.InsertEntry(ctx, entry(1), "", ""), tx.InsertRelease(ctx, release("q", "a", "none", 1)))
		},
		"release of no asset": func(ctx context.Context, tx broker.Tx) error {
			return errors.Join(tx.InsertEntry(ctx, entry(1), "", ""), tx.InsertRelease(ctx, release("q", "none", "g", 1)))
		},
		"release of no entry": func(ctx context.Context, tx broker.Tx) error { return tx.InsertRelease(ctx, release("q", "a", "g", 1)) },
		"counted for nothing": func(ctx context.Context, tx broker.Tx) error { return tx.InsertCounted(ctx, "none", "job", "k") },
	} {
		if err := s.Update(t.Context(), f); err == nil {
			t.Errorf("%s: committed", name)
		}
	}
}

// unchanged checks that s holds no asset.
func unchanged(t *testing.T, s broker.Store) {
	t.Helper()
	view(t, s, func(ctx context.Context, r broker.Reader) error {
		same(t, "assets", []broker.Asset(nil))(r.Assets(ctx, 9))
		return nil
	})
}

func undo(t *testing.T, s broker.Store, _ func() broker.Store) {
	if err := s.Update(t.Context(), func(ctx context.Context, tx broker.Tx) error {
		return errors.Join(seed(ctx, tx), errors.New("no"))
	}); err == nil {
		t.Error("committed")
	}
	unchanged(t, s)
}

func undoPanic(t *testing.T, s broker.Store, _ func() broker.Store) {
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the panic is gone")
			}
		}()
		_ = s.Update(t.Context(), func(ctx context.Context, tx broker.Tx) error {
			if err := seed(ctx, tx); err != nil {
				t.Error(err)
			}
			panic("no")
		})
	}()
	unchanged(t, s)
	update(t, s, seed)
}

func undoCancel(t *testing.T, s broker.Store, _ func() broker.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	if err := s.Update(ctx, func(ctx context.Context, tx broker.Tx) error {
		err := seed(ctx, tx)
		cancel()
		return err
	}); err == nil {
		t.Error("committed")
	}
	unchanged(t, s)
	update(t, s, seed)
}

func serial(t *testing.T, s broker.Store, _ func() broker.Store) {
	g := grant("g", "a")
	g.MaxReleases = 100
	update(t, s, func(ctx context.Context, tx broker.Tx) error {
		return errors.Join(tx.InsertAsset(ctx, asset("a")), tx.InsertGrant(ctx, g))
	})
	var wg sync.WaitGroup
	for range 40 {
		wg.Go(func() {
			if err := s.Update(t.Context(), func(ctx context.Context, tx broker.Tx) error {
				g, err := tx.Grant(ctx, "g")
				if err != nil {
					return err
				}
				g.Used++
				return tx.SetGrant(ctx, g)
			}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	view(t, s, func(ctx context.Context, r broker.Reader) error {
		g, err := r.Grant(ctx, "g")
		if g.Used != 40 {
			t.Errorf("%d of 40 updates counted", g.Used)
		}
		return err
	})
}

func snapshot(t *testing.T, s broker.Store, _ func() broker.Store) {
	view(t, s, func(ctx context.Context, r broker.Reader) error {
		same(t, "assets before", []broker.Asset(nil))(r.Assets(ctx, 9))
		update(t, s, seed)
		same(t, "assets after another's update", []broker.Asset(nil))(r.Assets(ctx, 9))
		return nil
	})
	view(t, s, func(ctx context.Context, r broker.Reader) error {
		same(t, "assets in a new view", []broker.Asset{asset("a"), asset("b")})(r.Assets(ctx, 9))
		return nil
	})
}

func uses(t *testing.T, s broker.Store, _ func() broker.Store) {
	one := broker.Use{Verifier: "v", Nonce: "n1", ResultID: "r1", Recipient: "k1"}
	two := broker.Use{Verifier: "v", Nonce: "n2", ResultID: "r2", Recipient: "k2"}
	foreign := broker.Use{Verifier: "w", Nonce: "n1", ResultID: "r1", Recipient: "k3"}
	update(t, s, func(ctx context.Context, tx broker.Tx) error {
		return errors.Join(tx.InsertUse(ctx, one), tx.InsertUse(ctx, two), tx.InsertUse(ctx, foreign))
	})
	view(t, s, func(ctx context.Context, r broker.Reader) error {
		for _, tc := range []struct {
			nonce, result string
			want          []broker.Use
		}{
			{"n1", "r1", []broker.Use{one}},
			{"n1", "r9", []broker.Use{one}},
			{"n9", "r1", []broker.Use{one}},
			{"n1", "r2", []broker.Use{one, two}},
			{"n9", "r9", nil},
		} {
			same(t, tc.nonce+tc.result, tc.want)(r.Uses(ctx, "v", tc.nonce, tc.result))
		}
		return nil
	})
}

func sameError(t *testing.T, s broker.Store, _ func() broker.Store) {
	want := errors.New("mine")
	if err := s.Update(t.Context(), func(context.Context, broker.Tx) error { return want }); !errors.Is(err, want) {
		t.Errorf("update: %v", err)
	}
	if err := s.View(t.Context(), func(context.Context, broker.Reader) error { return want }); !errors.Is(err, want) {
		t.Errorf("view: %v", err)
	}
}

func entries(t *testing.T, s broker.Store, _ func() broker.Store) {
	update(t, s, func(ctx context.Context, tx broker.Tx) error {
		var errs []error
		for i := range uint64(6) {
			errs = append(errs, tx.InsertEntry(ctx, entry(i), []string{"", "a", "b"}[i%3], ""))
		}
		return errors.Join(errs...)
	})
	view(t, s, func(ctx context.Context, r broker.Reader) error {
		same(t, "all", []translog.Entry{entry(0), entry(1), entry(2), entry(3), entry(4), entry(5)})(r.Entries(ctx, "", 0, 10))
		same(t, "page", []translog.Entry{entry(2), entry(3)})(r.Entries(ctx, "", 2, 2))
		same(t, "job", []translog.Entry{entry(1), entry(4)})(r.Entries(ctx, "a", 0, 10))
		same(t, "job from", []translog.Entry{entry(4)})(r.Entries(ctx, "a", 2, 10))
		same(t, "job limit", []translog.Entry{entry(2)})(r.Entries(ctx, "b", 0, 1))
		same(t, "head of the job", translog.Head{Size: 2, Hash: entry(5).Hash})(r.JobHead(ctx, "b"))
		same(t, "head", translog.Head{Size: 6, Hash: entry(5).Hash})(r.Head(ctx))
		return nil
	})
}

func bundles(t *testing.T, s broker.Store, _ func() broker.Store) {
	update(t, s, func(ctx context.Context, tx broker.Tx) error {
		return errors.Join(tx.InsertEntry(ctx, entry(0), "a", ""), tx.InsertEntry(ctx, entry(1), "a", "x"), tx.InsertEntry(ctx, entry(2), "a", ""),
			tx.InsertEntry(ctx, entry(3), "b", "x"), tx.InsertEntry(ctx, entry(4), "a", "y"))
	})
	view(t, s, func(ctx context.Context, r broker.Reader) error {
		same(t, "x of a", entry(1))(r.BundleEntry(ctx, "a", "x"))
		same(t, "y of a", entry(4))(r.BundleEntry(ctx, "a", "y"))
		same(t, "x of b", entry(3))(r.BundleEntry(ctx, "b", "x"))
		for _, none := range [][2]string{{"b", "y"}, {"c", "x"}, {"a", ""}} {
			if _, err := r.BundleEntry(ctx, none[0], plan.Digest(none[1])); !errors.Is(err, broker.ErrNotFound) {
				t.Errorf("%q of %s: %v", none[1], none[0], err)
			}
		}
		return nil
	})
	if err := s.Update(t.Context(), func(ctx context.Context, tx broker.Tx) error { return tx.InsertEntry(ctx, entry(5), "a", "x") }); !errors.Is(err, broker.ErrExists) {
		t.Errorf("a bundle recorded twice: %v", err)
	}
}

func overuse(t *testing.T, s broker.Store, _ func() broker.Store) {
	update(t, s, seed)
	for _, used := range []int{4, -1} {
		g := grant("g", "a", "b")
		g.Used = used
		if err := s.Update(t.Context(), func(ctx context.Context, tx broker.Tx) error { return tx.SetGrant(ctx, g) }); err == nil {
			t.Errorf("%d of %d uses committed", used, g.MaxReleases)
		}
	}
}
