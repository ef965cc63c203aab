package broker_test

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"testing"
	"time"

	_ "modernc.org/sqlite" // database/sql's driver

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/receipt"
)

var errInjected = errors.New("injected")

// faulty is a store that fails, or lets something happen, around updates.
type faulty struct {
	broker.Store
	before                func() // runs before each update
	failBefore, failAfter bool
}

func (f *faulty) Update(ctx context.Context, fn func(context.Context, broker.Tx) error) error {
	if f.before != nil {
		f.before()
	}
	if f.failBefore {
		return errInjected
	}
	if err := f.Store.Update(ctx, fn); err != nil {
		return err
	}
	if f.failAfter {
		return errInjected
	}
	return nil
}

// with returns a broker like w's with a store that fails.
func (w *world) with(t *testing.T, f *faulty) *broker.Broker {
	t.Helper()
	f.Store = w.store
	cfg := w.cfg
	cfg.Store = f
	return must[*broker.Broker](t)(broker.New(cfg))
}

func TestKilledBetweenCommitAndAnswer(t *testing.T) {
	w := newWorld(t, false)
	g := w.grant(t, nil)
	j := newJob(t, w, nil)
	f := &faulty{failAfter: true}
	b := w.with(t, f)
	req, sig := sign(t, j.session, j.request(g, "weights"))
	lost, err := b.Release(t.Context(), node, broker.Ask{Result: j.token, Request: req, Signature: sig})
	if !errors.Is(err, broker.ErrUnavailable) || lost.Ciphertext != nil {
		t.Fatalf("%v, %v", lost, err)
	}
	first := must[broker.Answer](t)(w.Release(t.Context(), node, broker.Ask{Result: j.token, Request: req, Signature: sig}))
	second := must[broker.Answer](t)(w.Release(t.Context(), node, broker.Ask{Result: j.token, Request: req, Signature: sig}))
	if !bytes.Equal(first.Enc, second.Enc) || !bytes.Equal(first.Ciphertext, second.Ciphertext) {
		t.Error("two retries got different ciphertexts")
	}
	if key, err := j.open(first, g, "weights"); err != nil || !bytes.Equal(key, w.keys["weights"]) {
		t.Error(err)
	}
	if used := must[[]broker.Grant](t)(w.grants(t))[0].Used; used != 1 {
		t.Errorf("counted %d times", used)
	}
	if l, err := w.Entries(t.Context(), alice, "job-1"); err != nil || len(l) != 1 {
		t.Errorf("%d log entries, %v", len(l), err)
	}
}

func TestKilledBeforeTheCommit(t *testing.T) {
	w := newWorld(t, false)
	g := w.grant(t, nil)
	j := newJob(t, w, nil)
	a, err := j.release(t, w.with(t, &faulty{failBefore: true}), g, "weights")
	if !errors.Is(err, broker.ErrUnavailable) || a.Ciphertext != nil {
		t.Fatal(err)
	}
	if used := must[[]broker.Grant](t)(w.grants(t))[0].Used; used != 0 {
		t.Errorf("counted %d times", used)
	}
	must[broker.Answer](t)(j.release(t, w.Broker, g, "weights"))
}

// TestDecidedInTheTransaction changes the world between the first look and the
// transaction: only the second look stands between the attacker and the key.
func TestDecidedInTheTransaction(t *testing.T) {
	for name, tc := range map[string]struct {
		meanwhile func(t *testing.T, w *world, g broker.Grant)
		want      string
	}{
		"revoked": {func(t *testing.T, w *world, g broker.Grant) {
			must[broker.Grant](t)(w.Revoke(t.Context(), alice, g.ID, "now"))
		}, "grant.revoked"},
		"expired": {func(_ *testing.T, w *world, _ broker.Grant) { w.advance(time.Hour) }, "grant.expiry"},
		"the policy asks for approvals": {func(t *testing.T, w *world, _ broker.Grant) {
			w.policy(t, "weights", func(p *broker.Policy) { p.Approvals = []broker.Rule{{Group: "g", Count: 1}} })
		}, "grant.approvals"},
		"the chip's kind was revoked": {func(t *testing.T, w *world, _ broker.Grant) {
			if _, _, err := w.RevokeTarget(t.Context(), oscar, broker.Target{Kind: broker.RevokeChip, Value: chipID}, "x"); err != nil {
				t.Error(err)
			}
		}, "revoked.chip-id"},
		"spent": {func(t *testing.T, w *world, g broker.Grant) {
			must[broker.Answer](t)(newJob(t, w, nil).release(t, w.Broker, g, "data"))
		}, "grant.exhausted"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, false)
			g := w.grant(t, nil)
			j := newJob(t, w, nil)
			a, err := j.release(t, w.with(t, &faulty{before: func() { tc.meanwhile(t, w, g) }}), g, "weights")
			wantRefused(t, a, err, tc.want)
		})
	}
}

// brokenKeys is a key store that does not answer.
type brokenKeys struct{}

func (brokenKeys) Wrap(context.Context, *broker.DataKey, []byte) ([]byte, error) {
	return nil, errInjected
}

func (brokenKeys) Unwrap(context.Context, []byte, []byte) (*broker.DataKey, error) {
	return nil, errInjected
}

func TestKeyStoreDown(t *testing.T) {
	w := newWorld(t, false)
	g := w.grant(t, nil)
	cfg := w.cfg
	cfg.Keys = brokenKeys{}
	b := must[*broker.Broker](t)(broker.New(cfg))
	a, err := newJob(t, w, nil).release(t, b, g, "weights")
	if !errors.Is(err, broker.ErrUnavailable) || a.Ciphertext != nil {
		t.Error(err)
	}
	if _, err := b.CreateAsset(t.Context(), alice, broker.NewAsset{Name: "ckpt", Kind: broker.KindCheckpoints}); !errors.Is(err, broker.ErrUnavailable) {
		t.Error(err)
	}
	if used := must[[]broker.Grant](t)(w.grants(t))[0].Used; used != 0 {
		t.Errorf("counted %d times", used)
	}
}

// TestDatabaseEdited is someone with the database file and no key.
func TestDatabaseEdited(t *testing.T) {
	for name, tc := range map[string]struct {
		sql   string
		found func(t *testing.T, w *world, g broker.Grant, j *job)
	}{
		"key moved to another asset": {`UPDATE assets SET wrapped = (SELECT wrapped FROM assets WHERE name = 'weights') WHERE name = 'data'`, noKey},
		"key moved to another asset of the same kind": {`UPDATE assets SET wrapped = (SELECT wrapped FROM assets WHERE name = 'ckpt-a') WHERE name = 'ckpt-b'`, func(t *testing.T, w *world, _ broker.Grant, j *job) {
			a, err := j.release(t, w.Broker, w.grant(t, func(n *broker.NewGrant) { n.Assets = []string{"ckpt-b"} }), "ckpt-b")
			if err == nil || a.Ciphertext != nil {
				t.Error("the key was released")
			}
		}},
		"asset given to another owner with a grant of his": {`DROP TRIGGER grants_terms; UPDATE assets SET owner = 'bob' WHERE name = 'data'; UPDATE grants SET owner = 'bob'`, noKey},
		"asset of another owner put into a grant": {`DROP TRIGGER grants_terms; UPDATE grants SET owner = 'bob'`, func(t *testing.T, w *world, g broker.Grant, j *job) {
			a, err := j.release(t, w.Broker, g, "data")
			wantRefused(t, a, err, "grant.owner")
		}},
		"log entry edited":    {`DROP TRIGGER log_update; UPDATE log SET body = CAST(replace(CAST(body AS TEXT), 'alice', 'carol') AS BLOB) WHERE idx = 1`, logBroken},
		"log entry dropped":   {`DROP TRIGGER log_delete; DELETE FROM log WHERE idx = 1`, logBroken},
		"log entry reordered": {`DROP TRIGGER log_update; UPDATE log SET idx = 99 WHERE idx = 1; UPDATE log SET idx = 1 WHERE idx = 2; UPDATE log SET idx = 2 WHERE idx = 99`, logBroken},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, false)
			w.asset(t, alice, "ckpt-a", broker.KindCheckpoints)
			w.asset(t, alice, "ckpt-b", broker.KindCheckpoints)
			g := w.grant(t, nil)
			db := must[*sql.DB](t)(sql.Open("sqlite", w.path))
			defer db.Close()
			if _, err := db.ExecContext(t.Context(), tc.sql); err != nil {
				t.Fatal(err)
			}
			tc.found(t, w, g, newJob(t, w, nil))
		})
	}
}

// TestAKnownJobIsLookedAtAgain: what stops a running job is not always in the log.
func TestAKnownJobIsLookedAtAgain(t *testing.T) {
	w := newWorld(t, false)
	store := &watched{KeyStore: w.cfg.Keys}
	w.cfg.Keys = store
	w.Broker = must[*broker.Broker](t)(broker.New(w.cfg))
	w.policy(t, "data", func(p *broker.Policy) { p.StopAtKeyDisabled = true })
	g := w.grant(t, nil)
	j := newJob(t, w, nil)
	must[broker.Answer](t)(j.release(t, w.Broker, g, "data"))
	store.disabled = true
	b := w.with(t, &faulty{before: func() {
		if jobs, err := w.StopDisabled(t.Context()); len(jobs) != 1 || err != nil {
			t.Errorf("%v, %v", jobs, err)
		}
	}})
	a, err := j.release(t, b, g, "weights")
	wantRefused(t, a, err, "job.stopped")
	store.disabled = false
	if l, _ := w.renew(t, j); l.State != receipt.LeaseStop {
		t.Errorf("the job was to stop: %+v", l)
	}
}

func noKey(t *testing.T, w *world, g broker.Grant, j *job) {
	if a, err := j.release(t, w.Broker, g, "data"); err == nil || a.Ciphertext != nil {
		t.Error("the key was released")
	}
}

func logBroken(t *testing.T, w *world, _ broker.Grant, _ *job) {
	if _, err := w.CheckLog(t.Context()); err == nil {
		t.Error("the log verifies")
	}
}

func TestDatabaseIsAppendOnly(t *testing.T) {
	w := newWorld(t, false)
	g := w.grant(t, nil)
	must[broker.Answer](t)(newJob(t, w, nil).release(t, w.Broker, g, "weights"))
	db := must[*sql.DB](t)(sql.Open("sqlite", w.path))
	defer db.Close()
	for _, q := range []string{
		`UPDATE log SET job = ''`, `DELETE FROM log`, `UPDATE releases SET attempt = 2`, `DELETE FROM releases`,
		`UPDATE uses SET nonce = ''`, `DELETE FROM uses`, `UPDATE counted SET recipient = ''`, `DELETE FROM counted`, `UPDATE grants SET used = max_releases + 1`,
		`UPDATE grants SET plan = ''`, `UPDATE grants SET max_releases = 1000`, `UPDATE grants SET not_after = not_after + 1`, `UPDATE grants SET principals = '[]'`,
	} {
		if _, err := db.ExecContext(t.Context(), q); err == nil {
			t.Errorf("%s: done", q)
		}
	}
}
