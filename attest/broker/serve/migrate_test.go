package serve_test

import (
	"context"
	"database/sql"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/broker/serve"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/translog"
)

// version2 is the schema of version 2 as its brokers made it, without triggers
// but one.
const version2 = `
CREATE TABLE meta (origin TEXT NOT NULL) STRICT;
CREATE TABLE assets (
	name TEXT PRIMARY KEY, kind TEXT NOT NULL, digest TEXT NOT NULL, owner TEXT NOT NULL,
	created INTEGER NOT NULL, wrapped BLOB NOT NULL
) STRICT;
CREATE TABLE grants (
	id TEXT PRIMARY KEY, plan TEXT NOT NULL, not_before INTEGER NOT NULL, not_after INTEGER NOT NULL,
	max_releases INTEGER NOT NULL, used INTEGER NOT NULL CHECK (used BETWEEN 0 AND max_releases),
	owner TEXT NOT NULL, allow_simulated INTEGER NOT NULL CHECK (allow_simulated IN (0, 1)),
	revoked INTEGER, reason TEXT NOT NULL
) STRICT;
CREATE INDEX assets_owner ON assets (owner);
CREATE INDEX grants_plan ON grants (plan, owner);
CREATE TABLE grant_assets (
	grant_id TEXT NOT NULL REFERENCES grants (id), asset TEXT NOT NULL REFERENCES assets (name),
	PRIMARY KEY (grant_id, asset)
) STRICT, WITHOUT ROWID;
CREATE TABLE uses (
	verifier TEXT NOT NULL, nonce TEXT NOT NULL, result_id TEXT NOT NULL, recipient TEXT NOT NULL,
	PRIMARY KEY (verifier, nonce), UNIQUE (verifier, result_id)
) STRICT, WITHOUT ROWID;
CREATE TABLE counted (
	grant_id TEXT NOT NULL REFERENCES grants (id), job TEXT NOT NULL, recipient TEXT NOT NULL,
	PRIMARY KEY (grant_id, job, recipient)
) STRICT, WITHOUT ROWID;
CREATE TABLE log (
	idx INTEGER PRIMARY KEY, job TEXT NOT NULL, bundle TEXT NOT NULL, body BLOB NOT NULL, hash BLOB NOT NULL
) STRICT;
CREATE INDEX log_job ON log (job, idx);
CREATE UNIQUE INDEX log_bundle ON log (job, bundle) WHERE bundle <> '';
CREATE TABLE releases (
	verifier TEXT NOT NULL, result_id TEXT NOT NULL, asset TEXT NOT NULL REFERENCES assets (name),
	id TEXT NOT NULL UNIQUE, grant_id TEXT NOT NULL REFERENCES grants (id), attempt INTEGER NOT NULL,
	job TEXT NOT NULL, plan TEXT NOT NULL, asset_digest TEXT NOT NULL, request TEXT NOT NULL,
	enc BLOB NOT NULL, ciphertext BLOB NOT NULL, time INTEGER NOT NULL, not_after INTEGER NOT NULL,
	simulated INTEGER NOT NULL CHECK (simulated IN (0, 1)),
	log_index INTEGER NOT NULL UNIQUE REFERENCES log (idx), log_hash BLOB NOT NULL,
	PRIMARY KEY (verifier, result_id, asset)
) STRICT;
CREATE TRIGGER log_update BEFORE UPDATE ON log BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
PRAGMA user_version = 2;
INSERT INTO meta VALUES ('broker.test');
INSERT INTO assets VALUES ('data', 'dataset', 'd', 'alice', 1000, x'0102');
INSERT INTO grants VALUES ('g1', 'p', 1000, 2000, 3, 1, 'alice', 1, NULL, '');
INSERT INTO grants VALUES ('g2', 'p', 1000, 2000, 3, 0, 'alice', 0, 1500, 'leak');
INSERT INTO grant_assets VALUES ('g1', 'data'), ('g2', 'data');
INSERT INTO uses VALUES ('v', 'n', 'r', 'k');
INSERT INTO counted VALUES ('g1', 'job', 'k');
`

func serveOpen(t *testing.T, path, origin string) (*serve.Store, error) {
	t.Helper()
	return serve.OpenStore(t.Context(), path, origin)
}

func TestVersion2IsBroughtTo3(t *testing.T) {
	path := filepath.Join(t.TempDir(), "broker.db")
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.ExecContext(t.Context(), version2); err != nil {
		t.Fatal(err)
	}
	// An entry as brokers of version 2 wrote it.
	old, _, err := translog.Append(translog.Genesis("broker.test"), translog.Body{
		TimeMillis: 1, Kind: translog.KindRelease, Actor: "agent/n", Job: "job", JobSequence: 1,
		Release: &translog.Release{Grant: "g1", Attempt: 1, Plan: plan.Sum(nil), Asset: "data", Verifier: "v", ResultID: "r", Recipient: plan.Sum(nil), Request: plan.Sum(nil), Wrapped: plan.Sum(nil), Evidence: plan.Sum(nil), Used: 1},
	})
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(old.Body), "approvals") || strings.Contains(string(old.Body), "more") {
		t.Fatalf("an entry without approvals is not written as before: %s", old.Body)
	}
	if _, err := db.ExecContext(t.Context(), `INSERT INTO log VALUES (0, 'job', '', ?, ?)`, old.Body, old.Hash); err != nil {
		t.Fatal(err)
	}
	if _, err := db.ExecContext(t.Context(), `INSERT INTO releases VALUES ('v', 'r', 'data', 'release-1', 'g1', 1, 'job', 'p', 'd', 'q', x'01', x'02', 1100, 2000, 1, 0, x'03')`); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := serveOpen(t, path, "other.test"); err == nil {
		t.Fatal("opened as another broker")
	}
	// Twice: the second time there is nothing to do.
	for range 2 {
		s, err := serveOpen(t, path, "broker.test")
		if err != nil {
			t.Fatal(err)
		}
		at := func(s int64) time.Time { return time.Unix(s, 0).UTC() }
		if err := s.View(t.Context(), func(ctx context.Context, r broker.Reader) error {
			a, err := r.Asset(ctx, "data")
			if want := (broker.Asset{Name: "data", Kind: broker.KindDataset, Digest: "d", Owner: "alice", Created: at(1000), Wrapped: []byte{1, 2}, Policy: broker.DefaultPolicy(), Revision: 1}); err != nil || !reflect.DeepEqual(a, want) {
				t.Errorf("asset %+v, %v", a, err)
			}
			g, err := r.Grant(ctx, "g1")
			want := broker.Grant{
				Seq: 1, ID: "g1", Assets: []string{"data"}, Plan: "p", NotBefore: at(1000), NotAfter: at(2000), MaxReleases: 3, Used: 1, Owner: "alice", AllowSimulated: true,
				Requester: "owner/alice", Requested: at(1000), Principals: []string{}, Consented: true,
			}
			if err != nil || !reflect.DeepEqual(g, want) {
				t.Errorf("grant %+v, %v", g, err)
			}
			if g, err := r.Grant(ctx, "g2"); err != nil || !g.Revoked.Equal(at(1500)) || g.Reason != "leak" || g.EndedBy != "owner/alice" {
				t.Errorf("revoked grant %+v, %v", g, err)
			}
			rel, err := r.Release(ctx, broker.ReleaseKey{Verifier: "v", ResultID: "r", Asset: "data"})
			if err != nil || rel.LeaseSeconds != 60 || rel.LeaseKey != "" || rel.Approvals != nil || string(rel.Enc) != "\x01" {
				t.Errorf("release %+v, %v", rel, err)
			}
			if _, err := r.Lease(ctx, "job"); err == nil {
				t.Error("a job of version 2 has a lease")
			}
			l, err := r.Entries(ctx, "", 0, 9)
			if err != nil {
				return err
			}
			_, err = translog.VerifyChain("broker.test", l)
			return err
		}); err != nil {
			t.Error(err)
		}
		if err := s.Update(t.Context(), func(ctx context.Context, tx broker.Tx) error {
			return tx.SetGrant(ctx, broker.Grant{ID: "g1", Used: 2, Consented: true})
		}); err != nil {
			t.Error(err)
		}
		if err := s.Update(t.Context(), func(ctx context.Context, tx broker.Tx) error {
			return tx.SetGrant(ctx, broker.Grant{ID: "g1", Used: 1, Consented: true})
		}); err != nil {
			t.Error(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestVersion2StaysWhenItCannotBeBrought: all of the change or none.
func TestVersion2StaysWhenItCannotBeBrought(t *testing.T) {
	path := filepath.Join(t.TempDir(), "broker.db")
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.ExecContext(t.Context(), version2+`CREATE TABLE leases (x TEXT) STRICT;`); err != nil {
		t.Fatal(err)
	}
	if _, err := serveOpen(t, path, "broker.test"); err == nil {
		t.Fatal("opened")
	}
	var version, columns int
	if err := db.QueryRowContext(t.Context(), `PRAGMA user_version`).Scan(&version); err != nil {
		t.Fatal(err)
	}
	if err := db.QueryRowContext(t.Context(), `SELECT count(*) FROM pragma_table_info('assets')`).Scan(&columns); err != nil {
		t.Fatal(err)
	}
	if version != 2 || columns != 6 {
		t.Errorf("version %d, %d columns: half of it was done", version, columns)
	}
	if err := db.Close(); err != nil {
		t.Error(err)
	}
}
