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
	"github.com/coffer-run/coffer/attest/receipt"
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

// TestStore holds a Store to its contract: whoever writes another one, over
// another database, passes it. open returns an empty store; reopen closes that
// one and opens the same state again.
func TestStore(t *testing.T, open func(t *testing.T) (s broker.Store, reopen func() broker.Store)) {
	for name, f := range map[string]func(*testing.T, broker.Store, func() broker.Store){
		"keeps everything over a restart":           keeps,
		"finds nothing in an empty store":           empty,
		"refuses to insert twice":                   twice,
		"refuses what refers to nothing":            dangling,
		"undoes a failed update":                    undo,
		"undoes a panicking update":                 undoPanic,
		"undoes a cancelled update":                 undoCancel,
		"runs updates one after another":            serial,
		"shows a reader one state":                  snapshot,
		"finds uses by nonce and by result":         uses,
		"returns an update's error as it is":        sameError,
		"lists entries by job, start and limit":     entries,
		"finds a bundle of a job by its digest":     bundles,
		"refuses to use a grant more than it may":   overuse,
		"lists grants by plan, principal and place": grantLists,
		"finds a grant by its idempotency key":      grantKeys,
		"changes of a grant only what it says":      grantChanges,
		"changes an asset's policy and key":         assetChanges,
		"sets an open asset's digest once":          assetDigest,
		"keeps approvals in order":                  approvals,
		"replaces leases and lists the open ones":   leases,
		"finds revocations by their targets":        revocations,
		"replaces checkpoint heads":                 heads,
		"keeps the last policy set":                 policySets,
	} {
		t.Run(name, func(t *testing.T) {
			s, reopen := open(t)
			f(t, s, reopen)
		})
	}
}

var t0 = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func asset(name string) broker.Asset {
	return broker.Asset{Name: name, Kind: broker.KindDataset, Digest: plan.Sum([]byte(name)), Owner: "alice", Created: t0, Wrapped: []byte{1, 2, 0, 3},
		KeyStore: "hsm", Labels: broker.Labels{Sensitivity: "high", Region: "eu"}, Revision: 1, Statement: broker.Signed{Document: []byte("policy of " + name), Signature: []byte("alice's")},
		Policy: broker.Policy{Approvals: []broker.Rule{{Group: "approvers", Count: 2}}, Verifiers: []string{"v"}, Threshold: 1, LeaseSeconds: 30, GraceSeconds: 5, Affirming: []string{"hardware"}, StopAtExpiry: true}}
}

func grant(id string, assets ...string) broker.Grant {
	return broker.Grant{
		ID: id, Assets: assets, Plan: plan.Sum([]byte("plan")), NotBefore: t0, NotAfter: t0.Add(time.Hour), MaxReleases: 3, Owner: "alice", AllowSimulated: true,
		Requester: "owner/alice", Key: "key of " + id, Requested: t0, Principals: []string{"agent/node-1", "engineer/erin"}, Purpose: "why not",
	}
}

func entry(i uint64) translog.Entry {
	return translog.Entry{Index: i, Body: fmt.Appendf(nil, `{"index":%d}`, i), Hash: bytes.Repeat([]byte{byte(i)}, 48)}
}

func release(result, asset, grant string, index uint64) broker.Release {
	return broker.Release{
		ReleaseKey: broker.ReleaseKey{Verifier: "v", ResultID: result, Asset: asset}, ID: "release-" + result + asset, Grant: grant, Attempt: 2, JobID: "job", Plan: plan.Sum([]byte("plan")),
		LeaseSeconds: 30, LeaseKey: "kid", Approvals: []plan.Digest{plan.Sum([]byte("approval"))}, Policy: plan.Sum([]byte("policy")),
		Held:        &receipt.Held{Store: "hsm", Key: "weights", Version: 3, Attested: plan.Sum([]byte("result"))},
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
	g.Used, g.Revoked, g.Reason, g.EndedBy, g.Consented, g.Seq = 2, t0.Add(time.Minute), "why", "owner/alice", true, 1
	update(t, s, func(ctx context.Context, tx broker.Tx) error { return tx.SetGrant(ctx, g) })
	s = reopen()
	view(t, s, func(ctx context.Context, r broker.Reader) error {
		same(t, "asset", asset("a"))(r.Asset(ctx, "a"))
		same(t, "assets", []broker.Asset{asset("a"), asset("b")})(r.Assets(ctx, 9))
		same(t, "grant", g)(r.Grant(ctx, "g"))
		same(t, "grants", []broker.Grant{g})(r.Grants(ctx, broker.GrantFilter{Limit: 9}))
		same(t, "grants of the plan", []broker.Grant{g})(r.Grants(ctx, broker.GrantFilter{Plan: g.Plan, Limit: 9}))
		same(t, "grants of another plan", []broker.Grant(nil))(r.Grants(ctx, broker.GrantFilter{Plan: plan.Sum(nil), Limit: 9}))
		same(t, "release", release("r", "a", "g", 0))(r.Release(ctx, broker.ReleaseKey{Verifier: "v", ResultID: "r", Asset: "a"}))
		same(t, "counted", true)(r.Counted(ctx, "g", "job", "k"))
		same(t, "head", translog.Head{Size: 1, Hash: entry(0).Hash})(r.Head(ctx))
		same(t, "entries", []translog.Entry{entry(0)})(r.Entries(ctx, "job", 0, 10))
		same(t, "head of the job", translog.Head{Size: 1, Hash: entry(0).Hash})(r.JobHead(ctx, "job"))
		same(t, "counted for another job", false)(r.Counted(ctx, "g", "job 2", "k"))
		same(t, "assets of the owner", 2)(r.OwnedAssets(ctx, "alice"))
		same(t, "assets of another", 0)(r.OwnedAssets(ctx, "bob"))
		same(t, "grants of the owner", 1)(r.RequestedGrants(ctx, "owner/alice", g.Plan))
		same(t, "grants of another", 0)(r.RequestedGrants(ctx, "owner/bob", g.Plan))
		same(t, "grants of the owner for another plan", 0)(r.RequestedGrants(ctx, "owner/alice", plan.Sum(nil)))
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

func grantLists(t *testing.T, s broker.Store, _ func() broker.Store) {
	other := plan.Sum([]byte("plan B"))
	update(t, s, func(ctx context.Context, tx broker.Tx) error {
		errs := []error{tx.InsertAsset(ctx, asset("a"))}
		for i := range 5 {
			g := grant(fmt.Sprint("g", i), "a")
			if i%2 == 1 {
				g.Plan, g.Principals, g.Requester = other, []string{"agent/node-2"}, "user/ada"
			}
			errs = append(errs, tx.InsertGrant(ctx, g))
		}
		return errors.Join(errs...)
	})
	view(t, s, func(ctx context.Context, r broker.Reader) error {
		all, err := r.Grants(ctx, broker.GrantFilter{Limit: 9})
		if err != nil || len(all) != 5 {
			return fmt.Errorf("%d grants, %w", len(all), err)
		}
		for name, tc := range map[string]struct {
			f    broker.GrantFilter
			want []string
		}{
			"first two":                 {broker.GrantFilter{Limit: 2}, []string{"g0", "g1"}},
			"after the second":          {broker.GrantFilter{After: all[1].Seq, Limit: 2}, []string{"g2", "g3"}},
			"after the last":            {broker.GrantFilter{After: all[4].Seq, Limit: 2}, nil},
			"of a plan":                 {broker.GrantFilter{Plan: other, Limit: 9}, []string{"g1", "g3"}},
			"of a plan, after one":      {broker.GrantFilter{Plan: other, After: all[1].Seq, Limit: 9}, []string{"g3"}},
			"of a principal":            {broker.GrantFilter{Principal: "engineer/erin", Limit: 9}, []string{"g0", "g2", "g4"}},
			"of a principal and a plan": {broker.GrantFilter{Plan: other, Principal: "agent/node-2", Limit: 1}, []string{"g1"}},
			"that somebody asked for":   {broker.GrantFilter{Requester: "user/ada", Limit: 9}, []string{"g1", "g3"}},
			"of a plan, asked for":      {broker.GrantFilter{Plan: other, Requester: "user/ada", After: all[1].Seq, Limit: 9}, []string{"g3"}},
			"that nobody asked for":     {broker.GrantFilter{Requester: "user/a", Limit: 9}, nil},
			"of nobody":                 {broker.GrantFilter{Principal: "agent", Limit: 9}, nil},
		} {
			l, err := r.Grants(ctx, tc.f)
			var got []string
			for i, g := range l {
				got = append(got, g.ID)
				if i > 0 && g.Seq <= l[i-1].Seq {
					t.Errorf("%s: out of order", name)
				}
			}
			same(t, name, tc.want)(got, err)
		}
		return nil
	})
}

func grantKeys(t *testing.T, s broker.Store, _ func() broker.Store) {
	update(t, s, func(ctx context.Context, tx broker.Tx) error {
		keyless, twin := grant("h", "a"), grant("i", "a")
		keyless.Key, twin.Key = "", ""
		return errors.Join(tx.InsertAsset(ctx, asset("a")), tx.InsertGrant(ctx, grant("g", "a")), tx.InsertGrant(ctx, keyless), tx.InsertGrant(ctx, twin))
	})
	view(t, s, func(ctx context.Context, r broker.Reader) error {
		g, err := r.GrantByKey(ctx, "owner/alice", "key of g")
		same(t, "by its key", "g")(g.ID, err)
		for _, none := range [][2]string{{"owner/bob", "key of g"}, {"owner/alice", "key of h"}, {"owner/alice", ""}} {
			if _, err := r.GrantByKey(ctx, none[0], none[1]); !errors.Is(err, broker.ErrNotFound) {
				t.Errorf("%q: %v", none, err)
			}
		}
		same(t, "asked for", 3)(r.RequestedGrants(ctx, "owner/alice", ""))
		return nil
	})
	again := grant("j", "a")
	again.Key = "key of g"
	if err := s.Update(t.Context(), func(ctx context.Context, tx broker.Tx) error { return tx.InsertGrant(ctx, again) }); !errors.Is(err, broker.ErrExists) {
		t.Errorf("a key twice: %v", err)
	}
}

func grantChanges(t *testing.T, s broker.Store, _ func() broker.Store) {
	update(t, s, seed)
	want := grant("g", "a", "b")
	want.Used, want.Consented, want.Denied, want.Reason, want.EndedBy, want.Seq = 1, true, t0.Add(time.Minute), "no", "approver/ann", 1
	changed := want
	changed.Plan, changed.MaxReleases, changed.NotAfter, changed.Principals, changed.Requester = plan.Sum(nil), 1000, t0.Add(9*time.Hour), nil, "owner/eve"
	update(t, s, func(ctx context.Context, tx broker.Tx) error { return tx.SetGrant(ctx, changed) })
	view(t, s, func(ctx context.Context, r broker.Reader) error {
		same(t, "grant", want)(r.Grant(ctx, "g"))
		return nil
	})
}

func assetChanges(t *testing.T, s broker.Store, reopen func() broker.Store) {
	update(t, s, seed)
	want := asset("a")
	want.Policy, want.Labels, want.Revision = broker.DefaultPolicy(), broker.Labels{Project: "x"}, 2
	want.Statement = broker.Signed{Document: []byte("another policy"), Signature: []byte("alice's again")}
	policy := want
	policy.Owner, policy.Wrapped = "eve", []byte{6}
	want.Wrapped, want.KeyStore = []byte{7}, "other"
	key := want
	key.Owner, key.Revision, key.Statement = "eve", 9, broker.Signed{}
	update(t, s, func(ctx context.Context, tx broker.Tx) error {
		return errors.Join(tx.SetAssetPolicy(ctx, policy), tx.SetAssetKey(ctx, key))
	})
	view(t, reopen(), func(ctx context.Context, r broker.Reader) error {
		same(t, "changed", want)(r.Asset(ctx, "a"))
		same(t, "the other", asset("b"))(r.Asset(ctx, "b"))
		return nil
	})
}

func assetDigest(t *testing.T, s broker.Store, reopen func() broker.Store) {
	bare := asset("open")
	bare.Digest = ""
	update(t, s, func(ctx context.Context, tx broker.Tx) error { return tx.InsertAsset(ctx, bare) })
	want := bare
	want.Digest, want.Wrapped = plan.Sum([]byte("sealed")), []byte{8}
	other := want
	other.Owner, other.KeyStore, other.Revision = "eve", "other", 9
	update(t, s, func(ctx context.Context, tx broker.Tx) error { return tx.SetAssetDigest(ctx, other) })
	again := want
	again.Digest, again.Wrapped = plan.Sum([]byte("another")), []byte{9}
	if err := s.Update(t.Context(), func(ctx context.Context, tx broker.Tx) error { return tx.SetAssetDigest(ctx, again) }); !errors.Is(err, broker.ErrNotFound) {
		t.Errorf("a digest was set twice: %v", err)
	}
	view(t, reopen(), func(ctx context.Context, r broker.Reader) error {
		same(t, "sealed", want)(r.Asset(ctx, "open"))
		return nil
	})
}

func approvals(t *testing.T, s broker.Store, reopen func() broker.Store) {
	approval := func(i int) broker.StoredApproval {
		doc := fmt.Appendf(nil, "document %d", i)
		return broker.StoredApproval{Grant: "g", Approver: fmt.Sprint("approver ", 9-i), Document: doc, Signature: []byte{byte(i), 0}, Digest: plan.Sum(doc)}
	}
	update(t, s, seed)
	update(t, s, func(ctx context.Context, tx broker.Tx) error {
		return errors.Join(tx.InsertApproval(ctx, approval(0)), tx.InsertApproval(ctx, approval(1)), tx.InsertApproval(ctx, approval(2)))
	})
	if err := s.Update(t.Context(), func(ctx context.Context, tx broker.Tx) error { return tx.InsertApproval(ctx, approval(1)) }); !errors.Is(err, broker.ErrExists) {
		t.Errorf("an approval twice: %v", err)
	}
	stray := approval(3)
	stray.Grant = "none"
	if err := s.Update(t.Context(), func(ctx context.Context, tx broker.Tx) error { return tx.InsertApproval(ctx, stray) }); err == nil {
		t.Error("an approval of no grant")
	}
	view(t, reopen(), func(ctx context.Context, r broker.Reader) error {
		same(t, "approvals", []broker.StoredApproval{approval(0), approval(1), approval(2)})(r.Approvals(ctx, "g"))
		same(t, "approvals of another", []broker.StoredApproval(nil))(r.Approvals(ctx, "h"))
		return nil
	})
}

func leases(t *testing.T, s broker.Store, reopen func() broker.Store) {
	lease := func(job string) broker.Lease {
		return broker.Lease{
			JobID: job, Agent: "agent/n", Submitter: "engineer/erin", Plan: plan.Sum(nil), Session: []byte{1, 0}, Seconds: 60, Grace: 10, StopAt: t0, Image: "sha256:x",
			Chips: []string{"c"}, Measurements: []string{"m", "n"}, Uses: []broker.LeaseUse{{Grant: "g", Requester: "owner/alice", Asset: "a", Owner: "alice"}}, Opened: t0, Stop: "why", Told: t0,
		}
	}
	bare := broker.Lease{JobID: "b", Agent: "agent/n", Plan: plan.Sum(nil), Session: []byte{1}, Seconds: 5, Opened: t0}
	over := lease("c")
	over.Ended = t0.Add(time.Hour)
	update(t, s, func(ctx context.Context, tx broker.Tx) error {
		first := lease("c")
		return errors.Join(tx.PutLease(ctx, lease("d")), tx.PutLease(ctx, first), tx.PutLease(ctx, bare), tx.PutLease(ctx, lease("a")), tx.PutLease(ctx, over))
	})
	view(t, reopen(), func(ctx context.Context, r broker.Reader) error {
		same(t, "lease", lease("a"))(r.Lease(ctx, "a"))
		same(t, "lease of little", bare)(r.Lease(ctx, "b"))
		same(t, "lease that is over", over)(r.Lease(ctx, "c"))
		same(t, "open leases", []broker.Lease{lease("a"), bare, lease("d")})(r.OpenLeases(ctx, "", 9))
		same(t, "one open lease", []broker.Lease{bare})(r.OpenLeases(ctx, "a", 1))
		if _, err := r.Lease(ctx, "e"); !errors.Is(err, broker.ErrNotFound) {
			t.Error(err)
		}
		return nil
	})
}

func revocations(t *testing.T, s broker.Store, reopen func() broker.Store) {
	rev := func(kind broker.RevocationKind, value, scope string) broker.Revocation {
		return broker.Revocation{Target: broker.Target{Kind: kind, Value: value}, Scope: scope, Reason: "why", By: "operator/o", Time: t0}
	}
	all := []broker.Revocation{rev(broker.RevokeChip, "c", ""), rev(broker.RevokeNode, "n", ""), rev(broker.RevokeNode, "n", "alice"), rev(broker.RevokeNode, "o", "")}
	update(t, s, func(ctx context.Context, tx broker.Tx) error {
		var errs []error
		for _, r := range all {
			errs = append(errs, tx.InsertRevocation(ctx, r))
		}
		return errors.Join(errs...)
	})
	if err := s.Update(t.Context(), func(ctx context.Context, tx broker.Tx) error { return tx.InsertRevocation(ctx, all[1]) }); !errors.Is(err, broker.ErrExists) {
		t.Errorf("revoked twice: %v", err)
	}
	s = reopen()
	view(t, s, func(ctx context.Context, r broker.Reader) error {
		same(t, "of one target", all[1:3])(r.Revoked(ctx, []broker.Target{all[1].Target}))
		same(t, "of two", []broker.Revocation{all[0], all[3]})(r.Revoked(ctx, []broker.Target{all[3].Target, all[0].Target, {Kind: broker.RevokeAsset, Value: "n"}}))
		same(t, "of a target with quotes", []broker.Revocation(nil))(r.Revoked(ctx, []broker.Target{{Kind: broker.RevokeNode, Value: `n" OR '1`}}))
		same(t, "of none", []broker.Revocation(nil))(r.Revoked(ctx, nil))
		any, err := r.Revoked(ctx, []broker.Target{{Kind: broker.RevokeNode}, {Kind: broker.RevokeImage}, all[0].Target})
		if err != nil || len(any) != 3 || !reflect.DeepEqual(any[0], all[0]) || any[1].Target != (broker.Target{Kind: broker.RevokeNode}) || any[1].Scope != "" ||
			any[2].Target != any[1].Target || any[2].Scope != "alice" {
			t.Errorf("any of a kind: %+v, %v", any, err)
		}
		same(t, "of an owner", 1)(r.OwnRevocations(ctx, "alice"))
		same(t, "of another", 0)(r.OwnRevocations(ctx, "bob"))
		same(t, "all", all)(r.Revocations(ctx, 9))
		same(t, "some", all[:1])(r.Revocations(ctx, 1))
		return nil
	})
	update(t, s, func(ctx context.Context, tx broker.Tx) error { return tx.DeleteRevocation(ctx, all[1].Target, "") })
	if err := s.Update(t.Context(), func(ctx context.Context, tx broker.Tx) error { return tx.DeleteRevocation(ctx, all[1].Target, "") }); !errors.Is(err, broker.ErrNotFound) {
		t.Errorf("deleted twice: %v", err)
	}
	view(t, s, func(ctx context.Context, r broker.Reader) error {
		same(t, "the other scope's stands", all[2:3])(r.Revoked(ctx, []broker.Target{all[1].Target}))
		return nil
	})
}

func heads(t *testing.T, s broker.Store, reopen func() broker.Store) {
	head := func(job string, seq uint64) broker.Head {
		return broker.Head{JobID: job, Asset: "a", Plan: plan.Sum(nil), Sequence: seq, Digest: plan.Sum([]byte{1}), Record: plan.Sum([]byte{2}), Time: t0, LogIndex: 0, LogHash: []byte{3}}
	}
	update(t, s, seed)
	update(t, s, func(ctx context.Context, tx broker.Tx) error {
		return errors.Join(tx.PutCheckpointHead(ctx, head("j", 1)), tx.PutCheckpointHead(ctx, head("k", 1)), tx.PutCheckpointHead(ctx, head("j", 2)))
	})
	view(t, reopen(), func(ctx context.Context, r broker.Reader) error {
		same(t, "head", head("j", 2))(r.CheckpointHead(ctx, "j", "a"))
		same(t, "head of another job", head("k", 1))(r.CheckpointHead(ctx, "k", "a"))
		if _, err := r.CheckpointHead(ctx, "j", "b"); !errors.Is(err, broker.ErrNotFound) {
			t.Error(err)
		}
		return nil
	})
}

func policySets(t *testing.T, s broker.Store, reopen func() broker.Store) {
	view(t, s, func(ctx context.Context, r broker.Reader) error {
		if _, err := r.PolicySet(ctx); !errors.Is(err, broker.ErrNotFound) {
			t.Error(err)
		}
		return nil
	})
	update(t, s, func(ctx context.Context, tx broker.Tx) error {
		return errors.Join(tx.PutPolicySet(ctx, translog.Policy{Serial: 1, Digest: "a"}), tx.PutPolicySet(ctx, translog.Policy{Serial: 2, Digest: "b"}))
	})
	view(t, reopen(), func(ctx context.Context, r broker.Reader) error {
		same(t, "policy set", translog.Policy{Serial: 2, Digest: "b"})(r.PolicySet(ctx))
		return nil
	})
}
