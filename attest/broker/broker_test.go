package broker_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/broker/brokertest"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

func TestNewRefusesIncomplete(t *testing.T) {
	w := newWorld(t, false)
	for name, change := range map[string]func(*broker.Config){
		"no id":         func(c *broker.Config) { c.ID = "" },
		"id of another": func(c *broker.Config) { c.ID = "other" },
		"no signer":     func(c *broker.Config) { c.Signer = nil },
		"no owner key":  func(c *broker.Config) { c.OwnerKey = nil },
		"no key store":  func(c *broker.Config) { c.Keys = nil },
		"no store":      func(c *broker.Config) { c.Store = nil },
		"no clock":      func(c *broker.Config) { c.Now = nil },
		"no verifier":   func(c *broker.Config) { c.Verifiers = nil },
		"zero verifier": func(c *broker.Config) {
			c.Verifiers = append(c.Verifiers[:0:0], c.Verifiers[0])
			c.Verifiers[0] = receipt.Keys{}
		},
		"verifier named twice":  func(c *broker.Config) { c.Verifiers = append(c.Verifiers, c.Verifiers[0]) },
		"everything is missing": func(c *broker.Config) { *c = broker.Config{} },
	} {
		t.Run(name, func(t *testing.T) {
			c := w.cfg
			change(&c)
			if _, err := broker.New(c); err == nil {
				t.Error("made")
			}
		})
	}
}

func TestCreateAssetRefuses(t *testing.T) {
	w := newWorld(t, false)
	key := make([]byte, broker.DataKeySize)
	good := func() broker.NewAsset {
		n := broker.NewAsset{Name: "new", Kind: broker.KindDataset, Digest: plan.Sum([]byte("x"))}
		n.Enc, n.Ciphertext = w.wrap(t, "new", key)
		return n
	}
	for name, tc := range map[string]struct {
		change func(*broker.NewAsset)
		want   error
	}{
		"name taken":                   {func(n *broker.NewAsset) { n.Name = "data"; n.Enc, n.Ciphertext = w.wrap(t, "data", key) }, broker.ErrExists},
		"no name":                      {func(n *broker.NewAsset) { n.Name = "" }, broker.ErrInvalid},
		"name with a path":             {func(n *broker.NewAsset) { n.Name = "../x" }, broker.ErrInvalid},
		"name too long":                {func(n *broker.NewAsset) { n.Name = strings.Repeat("a", 64) }, broker.ErrInvalid},
		"no kind":                      {func(n *broker.NewAsset) { n.Kind = "" }, broker.ErrInvalid},
		"no digest":                    {func(n *broker.NewAsset) { n.Digest = "" }, broker.ErrInvalid},
		"digest of another kind":       {func(n *broker.NewAsset) { n.Digest = "sha256:00" }, broker.ErrInvalid},
		"key wrapped for another name": {func(n *broker.NewAsset) { n.Enc, n.Ciphertext = w.wrap(t, "other", key) }, broker.ErrInvalid},
		"key of another size":          {func(n *broker.NewAsset) { n.Enc, n.Ciphertext = w.wrap(t, "new", key[:16]) }, broker.ErrInvalid},
		"key changed":                  {func(n *broker.NewAsset) { n.Ciphertext[0] ^= 1 }, broker.ErrInvalid},
		"no key":                       {func(n *broker.NewAsset) { n.Enc, n.Ciphertext = nil, nil }, broker.ErrInvalid},
		"checkpoints with a key":       {func(n *broker.NewAsset) { n.Kind, n.Digest = broker.KindCheckpoints, "" }, broker.ErrInvalid},
		"checkpoints with a digest":    {func(n *broker.NewAsset) { n.Kind, n.Enc, n.Ciphertext = broker.KindCheckpoints, nil, nil }, broker.ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			n := good()
			tc.change(&n)
			if _, err := w.CreateAsset(t.Context(), bob, n); !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
		})
	}
	if l := must[[]broker.Asset](t)(w.ReadAssets(t.Context(), alice)); len(l) != 2 {
		t.Errorf("%d assets", len(l))
	}
	if a := must[broker.Asset](t)(w.ReadAsset(t.Context(), alice, "data")); a.Owner != "alice" {
		t.Errorf("owner %s", a.Owner)
	}
	for _, kind := range []broker.Kind{broker.KindDataset, broker.KindWeights, broker.KindSecret} {
		n := good()
		n.Name, n.Kind = "new-"+string(kind), kind
		n.Enc, n.Ciphertext = w.wrap(t, n.Name, key)
		if a, err := w.CreateAsset(t.Context(), bob, n); err != nil || a.Kind != kind {
			t.Errorf("%s: %s, %v", kind, a.Kind, err)
		}
	}
	if _, err := w.ReadAsset(t.Context(), alice, "none"); !errors.Is(err, broker.ErrNotFound) {
		t.Error(err)
	}
}

func TestCreateGrantRefuses(t *testing.T) {
	w := newWorld(t, false)
	w.asset(t, bob, "bobs", broker.KindDataset)
	for name, tc := range map[string]struct {
		change func(*broker.NewGrant)
		want   string // check id, or "" for ErrInvalid
	}{
		"asset of another owner":               {func(n *broker.NewGrant) { n.Assets = []string{"bobs"} }, "grant.owner"},
		"one asset of another":                 {func(n *broker.NewGrant) { n.Assets = append(n.Assets, "bobs") }, "grant.owner"},
		"no assets":                            {func(n *broker.NewGrant) { n.Assets = nil }, ""},
		"asset twice":                          {func(n *broker.NewGrant) { n.Assets = []string{"data", "data"} }, ""},
		"too many assets":                      {func(n *broker.NewGrant) { n.Assets = make([]string, broker.MaxGrantAssets+1) }, ""},
		"no plan":                              {func(n *broker.NewGrant) { n.Plan = "" }, ""},
		"no end":                               {func(n *broker.NewGrant) { n.NotAfter = time.Time{} }, ""},
		"end in the past":                      {func(n *broker.NewGrant) { n.NotAfter = w.clock() }, ""},
		"end before its beginning":             {func(n *broker.NewGrant) { n.NotBefore = n.NotAfter }, ""},
		"too long":                             {func(n *broker.NewGrant) { n.NotAfter = w.clock().Add(broker.MaxGrantDuration + time.Hour) }, ""},
		"too long from far back":               {func(n *broker.NewGrant) { n.NotBefore = w.clock().Add(-broker.MaxGrantDuration) }, ""},
		"a plan that is none":                  {func(n *broker.NewGrant) { n.Document = []byte("{}") }, ""},
		"negative releases":                    {func(n *broker.NewGrant) { n.MaxReleases = -1 }, ""},
		"too many releases":                    {func(n *broker.NewGrant) { n.MaxReleases = broker.MaxGrantReleases + 1 }, ""},
		"simulation where the broker has none": {func(n *broker.NewGrant) { n.AllowSimulated = true }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			n := broker.NewGrant{Assets: []string{"data"}, Plan: w.plan, NotAfter: w.clock().Add(time.Hour), MaxReleases: 1}
			tc.change(&n)
			_, err := w.CreateGrant(t.Context(), alice, n)
			var r *check.Refusal
			switch {
			case tc.want == "" && !errors.Is(err, broker.ErrInvalid):
				t.Errorf("got %v, want invalid", err)
			case tc.want != "" && (!errors.As(err, &r) || len(r.Checks) != 1 || r.Checks[0].ID != tc.want):
				t.Errorf("got %v, want %s", err, tc.want)
			}
		})
	}
	if _, err := w.CreateGrant(t.Context(), alice, broker.NewGrant{Assets: []string{"none"}, Plan: w.plan, NotAfter: w.clock().Add(time.Hour), MaxReleases: 1}); !errors.Is(err, broker.ErrNotFound) {
		t.Error(err)
	}
	if l := must[[]broker.Grant](t)(w.grants(t)); len(l) != 0 {
		t.Errorf("%d grants", len(l))
	}
}

func TestRevoke(t *testing.T) {
	w := newWorld(t, false)
	g := w.grant(t, nil)
	var r *check.Refusal
	if _, err := w.Revoke(t.Context(), bob, g.ID, "spite"); !errors.As(err, &r) || r.Checks[0].ID != "grant.owner" {
		t.Errorf("bob revoked alice's grant: %v", err)
	}
	if _, err := w.Revoke(t.Context(), alice, g.ID, ""); !errors.Is(err, broker.ErrInvalid) {
		t.Error(err)
	}
	if _, err := w.Revoke(t.Context(), alice, "grant-none", "x"); !errors.Is(err, broker.ErrNotFound) {
		t.Error(err)
	}
	first := must[broker.Grant](t)(w.Revoke(t.Context(), alice, g.ID, "leak"))
	w.advance(time.Minute)
	second := must[broker.Grant](t)(w.Revoke(t.Context(), alice, g.ID, "again"))
	if first.State(w.clock(), false) != broker.StateRevoked || !second.Revoked.Equal(first.Revoked) || second.Reason != "leak" {
		t.Errorf("%+v, then %+v", first, second)
	}
}

func TestGrantState(t *testing.T) {
	now := time.Unix(1000, 0)
	good := broker.Grant{NotBefore: now, NotAfter: now.Add(time.Minute), MaxReleases: 2, Used: 1}
	for name, tc := range map[string]struct {
		change  func(*broker.Grant)
		want    broker.State
		lacking bool
	}{
		"active":                    {change: func(*broker.Grant) {}, want: broker.StateActive},
		"lacks approvals":           {func(*broker.Grant) {}, broker.StateRequested, true},
		"lacks approvals, and over": {func(g *broker.Grant) { g.NotAfter = now }, broker.StateExpired, true},
		"turned down":               {func(g *broker.Grant) { g.Denied = now }, broker.StateDenied, true},
		"turned down, all there":    {change: func(g *broker.Grant) { g.Denied = now }, want: broker.StateDenied},
		"not yet":                   {change: func(g *broker.Grant) { g.NotBefore = now.Add(time.Second) }, want: broker.StateApproved},
		"over":                      {change: func(g *broker.Grant) { g.NotAfter = now }, want: broker.StateExpired},
		"spent":                     {change: func(g *broker.Grant) { g.Used = 2 }, want: broker.StateExhausted},
		"taken back":                {change: func(g *broker.Grant) { g.Revoked = now; g.Used = 2; g.NotAfter = now }, want: broker.StateRevoked},
		"zero":                      {change: func(g *broker.Grant) { *g = broker.Grant{} }, want: broker.StateExpired},
	} {
		g := good
		tc.change(&g)
		if got := g.State(now, tc.lacking); got != tc.want {
			t.Errorf("%s: %s", name, got)
		}
	}
}

func TestLogOfAJob(t *testing.T) {
	w := newWorld(t, false)
	g := w.grant(t, func(n *broker.NewGrant) { n.MaxReleases = 2 })
	j := newJob(t, w, nil)
	other := newJob(t, w, func(r *receipt.Result) { r.JobID = "job-2" })
	a := must[broker.Answer](t)(j.release(t, w.Broker, g, "weights"))
	must[broker.Answer](t)(other.release(t, w.Broker, g, "weights"))
	must[broker.Answer](t)(j.release(t, w.Broker, g, "data"))
	digest := plan.Sum([]byte("bundle"))
	token := must[string](t)(w.LogBundle(t.Context(), node, "job-1", digest))
	again := must[string](t)(w.LogBundle(t.Context(), node, "job-1", digest))

	entries := must[[]translog.Entry](t)(w.Entries(t.Context(), alice, "job-1"))
	bodies, err := translog.VerifyJob(brokerID, "job-1", entries)
	if err != nil {
		t.Fatal(err)
	}
	var kinds []translog.Kind
	for _, b := range bodies {
		kinds = append(kinds, b.Kind)
	}
	if !slices.Equal(kinds, []translog.Kind{translog.KindRelease, translog.KindRelease, translog.KindBundle}) {
		t.Errorf("kinds %v", kinds)
	}
	if r := bodies[0].Release; r.Grant != g.ID || r.Asset != "weights" || r.Verifier != verifierID || r.ResultID != j.result.ID || r.Used != 1 ||
		r.Recipient != plan.Sum(j.result.Confirmation.Recipient) || r.Wrapped != plan.Sum(slices.Concat(a.Enc, a.Ciphertext)) {
		t.Errorf("release entry %+v", r)
	}
	for _, tok := range []string{token, again} {
		r, err := translog.OpenReceipt(w.brokerKeys, tok)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Includes(entries[2]); err != nil {
			t.Error(err)
		}
	}
	head := must[translog.Head](t)(w.CheckLog(t.Context()))
	if head.Size != 2+1+3+1 {
		t.Errorf("log of %d entries", head.Size)
	}
	if _, err := w.LogBundle(t.Context(), node, "a/b", digest); !errors.Is(err, broker.ErrInvalid) {
		t.Error(err)
	}
	if _, err := w.LogBundle(t.Context(), node, "job-1", "sha384:x"); !errors.Is(err, broker.ErrInvalid) {
		t.Error(err)
	}
}

// TestLogOfAnothersJob is an agent that would fill up or contradict the record
// of a job that is not its own.
func TestLogOfAnothersJob(t *testing.T) {
	w := newWorld(t, false)
	g := w.grant(t, nil)
	must[broker.Answer](t)(newJob(t, w, nil).release(t, w.Broker, g, "weights"))
	mine := plan.Sum([]byte("bundle"))
	must[string](t)(w.LogBundle(t.Context(), node, "job-1", mine))
	for name, tc := range map[string]struct {
		actor  broker.Actor
		digest plan.Digest
		want   string
	}{
		"another digest":                 {stranger, plan.Sum([]byte("other")), "job.agent"},
		"the same digest":                {stranger, mine, "job.agent"},
		"the same name, in another role": {broker.Actor{Role: "operator", Name: node.Name}, plan.Sum([]byte("other")), "role"},
		"nobody":                         {broker.Actor{}, plan.Sum([]byte("other")), "role"},
	} {
		t.Run(name, func(t *testing.T) {
			token, err := w.LogBundle(t.Context(), tc.actor, "job-1", tc.digest)
			var r *check.Refusal
			if !errors.As(err, &r) || len(r.Checks) != 1 || r.Checks[0].ID != tc.want || token != "" {
				t.Errorf("got %q, %v", token, err)
			}
			if strings.Contains(fmt.Sprint(err), node.Name) && tc.actor.Name != node.Name {
				t.Errorf("the refusal tells whose job it is: %v", err)
			}
		})
	}
	if l := must[[]translog.Entry](t)(w.Entries(t.Context(), alice, "job-1")); len(l) != 2 {
		t.Errorf("%d entries", len(l))
	}
}

// TestLogOfAJobIsBounded: what a job may log fits into one answer, and releases
// leave room for its bundle.
func TestLogOfAJobIsBounded(t *testing.T) {
	w := newWorld(t, false)
	w.fill(t, "job-1", broker.MaxJobEntries-1)
	last := plan.Sum([]byte("last"))
	must[string](t)(w.LogBundle(t.Context(), node, "job-1", last))
	if _, err := w.LogBundle(t.Context(), node, "job-1", plan.Sum([]byte("one more"))); !errors.Is(err, broker.ErrTooMany) {
		t.Error(err)
	}
	token := must[string](t)(w.LogBundle(t.Context(), node, "job-1", last))
	r, err := translog.OpenReceipt(w.brokerKeys, token)
	if err != nil {
		t.Fatal(err)
	}
	entries := must[[]translog.Entry](t)(w.Entries(t.Context(), alice, "job-1"))
	if _, err := translog.VerifyJob(brokerID, "job-1", entries); err != nil || len(entries) != broker.MaxJobEntries {
		t.Fatalf("%d entries, %v", len(entries), err)
	}
	if err := r.Includes(entries[len(entries)-1]); err != nil {
		t.Error(err)
	}
	must[translog.Head](t)(w.CheckLog(t.Context()))
	must[string](t)(w.LogBundle(t.Context(), node, "job-2", last))
}

func TestOwnersAreBounded(t *testing.T) {
	w := newWorld(t, false)
	other := plan.Sum([]byte("plan B"))
	put := func(f func(context.Context, broker.Tx) error) {
		t.Helper()
		if err := w.store.Update(t.Context(), f); err != nil {
			t.Fatal(err)
		}
	}
	put(func(ctx context.Context, tx broker.Tx) error {
		for i := 2; i < broker.MaxOwnerAssets; i++ {
			if err := tx.InsertAsset(ctx, broker.Asset{Name: fmt.Sprint("a", i), Owner: "alice", Wrapped: []byte{1}}); err != nil {
				return err
			}
		}
		for i := range broker.MaxPlanGrants {
			g := broker.Grant{ID: fmt.Sprint("g", i), Plan: w.plan, Owner: "alice", Requester: "owner/alice", NotBefore: w.clock(), NotAfter: w.clock(), MaxReleases: 1}
			if err := tx.InsertGrant(ctx, g); err != nil {
				return err
			}
		}
		return nil
	})
	n := broker.NewAsset{Name: "more", Kind: broker.KindCheckpoints}
	if _, err := w.CreateAsset(t.Context(), alice, n); !errors.Is(err, broker.ErrTooMany) {
		t.Error(err)
	}
	must[broker.Asset](t)(w.CreateAsset(t.Context(), bob, n))
	ng := broker.NewGrant{Assets: []string{"data"}, Plan: w.plan, NotAfter: w.clock().Add(time.Hour), MaxReleases: 1}
	if _, err := w.CreateGrant(t.Context(), alice, ng); !errors.Is(err, broker.ErrTooMany) {
		t.Error(err)
	}
	ng.Plan = other
	must[broker.Grant](t)(w.CreateGrant(t.Context(), alice, ng))
	ng.Plan, ng.Assets = w.plan, []string{"more"}
	must[broker.Grant](t)(w.CreateGrant(t.Context(), bob, ng))

	if l := must[[]broker.Asset](t)(w.ReadAssets(t.Context(), alice)); len(l) != broker.MaxOwnerAssets+1 {
		t.Errorf("%d assets", len(l))
	}
	put(func(ctx context.Context, tx broker.Tx) error {
		for i := range broker.MaxList {
			if err := tx.InsertAsset(ctx, broker.Asset{Name: fmt.Sprint("b", i), Owner: fmt.Sprint("owner", i), Wrapped: []byte{1}}); err != nil {
				return err
			}
			g := broker.Grant{ID: fmt.Sprint("h", i), Plan: other, Owner: fmt.Sprint("owner", i), NotBefore: w.clock(), NotAfter: w.clock(), MaxReleases: 1}
			if err := tx.InsertGrant(ctx, g); err != nil {
				return err
			}
		}
		return nil
	})
	if l, err := w.ReadAssets(t.Context(), alice); !errors.Is(err, broker.ErrTooMany) || l != nil {
		t.Errorf("%d assets, %v", len(l), err)
	}
	for _, p := range []plan.Digest{"", other} {
		if l, _, err := w.ListGrants(t.Context(), alice, broker.Listing{Plan: p}); !errors.Is(err, broker.ErrTooMany) || l != nil {
			t.Errorf("%d grants, %v", len(l), err)
		}
	}
	l, _, err := w.ListGrants(t.Context(), alice, broker.Listing{Plan: w.plan})
	if err != nil || len(l) != broker.MaxPlanGrants+1 {
		t.Errorf("%d grants, %v", len(l), err)
	}
}

func TestDataKeyStaysOutOfTexts(t *testing.T) {
	secret := []byte("0123456789abcdef0123456789abcdef")
	k := must[*broker.DataKey](t)(broker.NewDataKey(slices.Clone(secret)))
	var log strings.Builder
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "key", k, "in", struct{ K *broker.DataKey }{k})
	for _, s := range []string{fmt.Sprint(k), fmt.Sprintf("%v %+v %#v %s %x %q %d", k, k, k, k, k, k, k), fmt.Sprintf("%v", []*broker.DataKey{k}), log.String()} {
		if strings.Contains(s, "0123") || strings.Contains(s, "30313233") || strings.Contains(s, "48 49 50") {
			t.Errorf("leaked: %s", s)
		}
	}
	if b, err := json.Marshal(struct{ K *broker.DataKey }{k}); err == nil {
		t.Errorf("encoded: %s", b)
	}
	inner := k.Reveal()
	k.Destroy()
	k.Destroy()
	if !slices.Equal(inner, make([]byte, len(inner))) || k.Reveal() != nil {
		t.Error("not destroyed")
	}
	if _, err := broker.NewDataKey(secret[:31]); err == nil {
		t.Error("short key")
	}
}

func TestLocalKeys(t *testing.T) {
	kek := func(b byte) []byte { return slices.Repeat([]byte{b}, broker.KEKSize) }
	brokertest.TestKeyStore(t, func(t *testing.T) (broker.KeyStore, broker.KeyStore) {
		return must[*broker.LocalKeys](t)(broker.NewLocalKeys(kek(1))), must[*broker.LocalKeys](t)(broker.NewLocalKeys(kek(2)))
	})
	if _, err := broker.NewLocalKeys(kek(1)[:16]); err == nil {
		t.Error("short key-encryption key")
	}
}

func TestCancelledRelease(t *testing.T) {
	w := newWorld(t, false)
	g := w.grant(t, nil)
	j := newJob(t, w, nil)
	req, sig := sign(t, j.session, j.request(g, "weights"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if a, err := w.Release(ctx, node, broker.Ask{Result: j.token, Request: req, Signature: sig}); !errors.Is(err, broker.ErrUnavailable) || a.Ciphertext != nil {
		t.Error(err)
	}
	must[broker.Answer](t)(j.release(t, w.Broker, g, "weights"))
}
