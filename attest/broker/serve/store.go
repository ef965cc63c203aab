package serve

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"zombiezen.com/go/sqlite/sqlitex"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/translog"
)

const (
	// schemaVersion is the schema that a store has once it is open. A database of
	// version 2 or 3 is brought to it; every other one is an error.
	schemaVersion = 5
	// busyTimeout is how long a statement waits for another process's lock.
	busyTimeout = 5 * time.Second
	// walPages is how long the write-ahead log gets before its pages move to the
	// database, 16 MiB: a page that many commits changed moves once.
	walPages = 4096
	// readers is how many connections serve reads beside the one writer.
	readers = 4
)

// The triggers make history append-only for every statement of this program;
// the hash chain shows what someone with the file in hand changed.
const schema2 = `
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
CREATE TRIGGER log_delete BEFORE DELETE ON log BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
CREATE TRIGGER releases_update BEFORE UPDATE ON releases BEGIN SELECT RAISE(ABORT, 'releases are append-only'); END;
CREATE TRIGGER releases_delete BEFORE DELETE ON releases BEGIN SELECT RAISE(ABORT, 'releases are append-only'); END;
CREATE TRIGGER uses_update BEFORE UPDATE ON uses BEGIN SELECT RAISE(ABORT, 'uses are append-only'); END;
CREATE TRIGGER uses_delete BEFORE DELETE ON uses BEGIN SELECT RAISE(ABORT, 'uses are append-only'); END;
CREATE TRIGGER counted_update BEFORE UPDATE ON counted BEGIN SELECT RAISE(ABORT, 'counted is append-only'); END;
CREATE TRIGGER counted_delete BEFORE DELETE ON counted BEGIN SELECT RAISE(ABORT, 'counted is append-only'); END;
`

const (
	assetColumns   = `name, kind, digest, owner, created, wrapped, key_store, labels, policy, revision, statement, statement_sig`
	grantFields    = `id, plan, not_before, not_after, max_releases, used, owner, allow_simulated, revoked, reason, requester, idem_key, requested, principals, purpose, consented, denied, ended_by`
	grantColumns   = grantFields + `, rowid, (SELECT json_group_array(asset) FROM grant_assets WHERE grant_id = id)`
	releaseColumns = `verifier, result_id, asset, id, grant_id, attempt, job, plan, asset_digest, request, enc, ciphertext, time, not_after, simulated, lease_seconds, lease_key, approvals, policy, held, result_seconds, log_index, log_hash`
	leaseColumns   = `job, agent, submitter, plan, session, seconds, grace, stop_at, image, chips, measurements, uses, opened, stop, told, attested, ended`
	revokeColumns  = `kind, value, scope, reason, by_whom, time`
	lineColumns    = `plan, asset, job, from_job, sequence, digest, record, log_index, log_hash`
	headColumns    = `job, asset, plan, sequence, digest, record, time, log_index, log_hash`

	qAsset      = `SELECT ` + assetColumns + ` FROM assets WHERE name = ?`
	qAssets     = `SELECT ` + assetColumns + ` FROM assets ORDER BY name LIMIT ?`
	qOwnAssets  = `SELECT count(*) FROM assets WHERE owner = ?`
	qGrant      = `SELECT ` + grantColumns + ` FROM grants WHERE id = ?`
	qGrants     = `SELECT ` + grantColumns + ` FROM grants WHERE rowid > ?1 AND (?2 = '' OR EXISTS (SELECT 1 FROM json_each(principals) WHERE value = ?2)) AND (?4 = '' OR requester = ?4) ORDER BY rowid LIMIT ?3`
	qPlanGrants = `SELECT ` + grantColumns + ` FROM grants WHERE plan = ?5 AND rowid > ?1 AND (?2 = '' OR EXISTS (SELECT 1 FROM json_each(principals) WHERE value = ?2)) AND (?4 = '' OR requester = ?4) ORDER BY rowid LIMIT ?3`
	qKeyGrant   = `SELECT ` + grantColumns + ` FROM grants WHERE requester = ? AND idem_key = ? AND idem_key <> ''`
	qOwnGrants  = `SELECT count(*) FROM grants WHERE requester = ?1 AND plan = ?2`
	qAllGrants  = `SELECT count(*) FROM grants WHERE requester = ?1`
	qApprovals  = `SELECT grant_id, approver, document, signature, digest FROM approvals WHERE grant_id = ? ORDER BY rowid`
	qLease      = `SELECT ` + leaseColumns + ` FROM leases WHERE job = ?`
	qLeases     = `SELECT ` + leaseColumns + ` FROM leases WHERE ended IS NULL AND job > ? ORDER BY job LIMIT ?`
	qRevoked    = `SELECT ` + revokeColumns + ` FROM revocations WHERE kind || ' ' || value IN (SELECT value FROM json_each(?1))
		UNION SELECT DISTINCT kind, '', scope, '', '', 0 FROM revocations WHERE kind || ' ' IN (SELECT value FROM json_each(?1)) ORDER BY kind, value, scope`
	qAnyRevoked = `SELECT EXISTS (SELECT 1 FROM revocations)`
	qRevokeAll  = `SELECT ` + revokeColumns + ` FROM revocations ORDER BY kind, value, scope LIMIT ?`
	qOwnRevoked = `SELECT count(*) FROM revocations WHERE scope = ?`
	qCkptHead   = `SELECT ` + headColumns + ` FROM heads WHERE job = ? AND asset = ?`
	qLine       = `SELECT ` + lineColumns + ` FROM lines WHERE plan = ? AND asset = ?`
	qPolicySet  = `SELECT serial, digest FROM policy_set`
	qRelease    = `SELECT ` + releaseColumns + ` FROM releases WHERE verifier = ? AND result_id = ? AND asset = ?`
	qUses       = `SELECT verifier, nonce, result_id, recipient FROM uses WHERE verifier = ?1 AND nonce = ?2 UNION SELECT verifier, nonce, result_id, recipient FROM uses WHERE verifier = ?1 AND result_id = ?3`
	qCounted    = `SELECT count(*) FROM counted WHERE grant_id = ? AND job = ? AND recipient = ?`
	qHead       = `SELECT idx, hash FROM log ORDER BY idx DESC LIMIT 1`
	qJobHead    = `SELECT (SELECT count(*) FROM log WHERE job = ?1), hash FROM log WHERE job = ?1 ORDER BY idx DESC LIMIT 1`
	qBundle     = `SELECT idx, body, hash FROM log WHERE job = ? AND bundle = ? AND bundle <> ''`
	qEntries    = `SELECT idx, body, hash FROM log WHERE idx >= ? ORDER BY idx LIMIT ?`
	qJobLog     = `SELECT idx, body, hash FROM log WHERE job = ? AND idx >= ? ORDER BY idx LIMIT ?`

	iAsset      = `INSERT INTO assets (` + assetColumns + `) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`
	uAsset      = `UPDATE assets SET labels = ?, policy = ?, revision = ?, statement = ?, statement_sig = ? WHERE name = ?`
	uAssetKey   = `UPDATE assets SET wrapped = ?, key_store = ? WHERE name = ?`
	uAssetSum   = `UPDATE assets SET digest = ?, wrapped = ? WHERE name = ? AND digest = ''`
	iGrant      = `INSERT INTO grants (` + grantFields + `) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`
	iGrantAsset = `INSERT INTO grant_assets (grant_id, asset) VALUES (?, ?)`
	uGrant      = `UPDATE grants SET used = ?, consented = ?, revoked = ?, denied = ?, reason = ?, ended_by = ? WHERE id = ?`
	iApproval   = `INSERT INTO approvals (grant_id, approver, document, signature, digest) VALUES (?, ?, ?, ?, ?)`
	iLease      = `INSERT OR REPLACE INTO leases (` + leaseColumns + `) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`
	iRevoke     = `INSERT INTO revocations (` + revokeColumns + `) VALUES (?, ?, ?, ?, ?, ?)`
	dRevoke     = `DELETE FROM revocations WHERE kind = ? AND value = ? AND scope = ?`
	iCkptHead   = `INSERT OR REPLACE INTO heads (` + headColumns + `) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)`
	iLine       = `INSERT OR REPLACE INTO lines (` + lineColumns + `) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)`
	iPolicySet  = `INSERT OR REPLACE INTO policy_set (one, serial, digest) VALUES (1, ?, ?)`
	iRelease    = `INSERT INTO releases (` + releaseColumns + `) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`
	iUse        = `INSERT INTO uses (verifier, nonce, result_id, recipient) VALUES (?, ?, ?, ?)`
	iCounted    = `INSERT INTO counted (grant_id, job, recipient) VALUES (?, ?, ?)`
	iEntry      = `INSERT INTO log (idx, job, bundle, body, hash) VALUES (?, ?, ?, ?, ?)`
)

// schema3 adds what version 3 has. The defaults are what version 2 meant: assets
// without a policy, and grants that their owners made.
const schema3 = `
ALTER TABLE assets ADD COLUMN key_store TEXT NOT NULL DEFAULT '';
ALTER TABLE assets ADD COLUMN labels TEXT NOT NULL DEFAULT '{}';
ALTER TABLE assets ADD COLUMN policy TEXT NOT NULL DEFAULT '{"leaseSeconds":60,"graceSeconds":10}';
ALTER TABLE assets ADD COLUMN revision INTEGER NOT NULL DEFAULT 1;
ALTER TABLE grants ADD COLUMN requester TEXT NOT NULL DEFAULT '';
ALTER TABLE grants ADD COLUMN idem_key TEXT NOT NULL DEFAULT '';
ALTER TABLE grants ADD COLUMN requested INTEGER NOT NULL DEFAULT 0;
ALTER TABLE grants ADD COLUMN principals TEXT NOT NULL DEFAULT '[]';
ALTER TABLE grants ADD COLUMN purpose TEXT NOT NULL DEFAULT '';
ALTER TABLE grants ADD COLUMN consented INTEGER NOT NULL DEFAULT 1 CHECK (consented IN (0, 1));
ALTER TABLE grants ADD COLUMN denied INTEGER;
ALTER TABLE grants ADD COLUMN ended_by TEXT NOT NULL DEFAULT '';
UPDATE grants SET requester = 'owner/' || owner, requested = not_before, ended_by = CASE WHEN revoked IS NULL THEN '' ELSE 'owner/' || owner END;
CREATE INDEX grants_requester ON grants (requester, plan);
CREATE UNIQUE INDEX grants_key ON grants (requester, idem_key) WHERE idem_key <> '';
ALTER TABLE releases ADD COLUMN lease_seconds INTEGER NOT NULL DEFAULT 60;
ALTER TABLE releases ADD COLUMN lease_key TEXT NOT NULL DEFAULT '';
ALTER TABLE releases ADD COLUMN approvals TEXT NOT NULL DEFAULT 'null';
CREATE TABLE approvals (
	grant_id TEXT NOT NULL REFERENCES grants (id), approver TEXT NOT NULL, document BLOB NOT NULL, signature BLOB NOT NULL, digest TEXT NOT NULL,
	UNIQUE (grant_id, digest)
) STRICT;
CREATE TABLE leases (
	job TEXT PRIMARY KEY, agent TEXT NOT NULL, submitter TEXT NOT NULL, plan TEXT NOT NULL, session BLOB NOT NULL,
	seconds INTEGER NOT NULL, grace INTEGER NOT NULL, stop_at INTEGER, image TEXT NOT NULL, chips TEXT NOT NULL, measurements TEXT NOT NULL,
	uses TEXT NOT NULL, opened INTEGER NOT NULL, stop TEXT NOT NULL, told INTEGER, ended INTEGER
) STRICT, WITHOUT ROWID;
CREATE INDEX leases_open ON leases (job) WHERE ended IS NULL;
CREATE TABLE revocations (
	kind TEXT NOT NULL, value TEXT NOT NULL, scope TEXT NOT NULL, reason TEXT NOT NULL, by_whom TEXT NOT NULL, time INTEGER NOT NULL,
	PRIMARY KEY (kind, value, scope)
) STRICT, WITHOUT ROWID;
CREATE INDEX revocations_target ON revocations (kind || ' ' || value);
CREATE TABLE heads (
	job TEXT NOT NULL, asset TEXT NOT NULL REFERENCES assets (name), plan TEXT NOT NULL, sequence INTEGER NOT NULL, digest TEXT NOT NULL, record TEXT NOT NULL,
	time INTEGER NOT NULL, log_index INTEGER NOT NULL REFERENCES log (idx), log_hash BLOB NOT NULL,
	PRIMARY KEY (job, asset)
) STRICT, WITHOUT ROWID;
CREATE TABLE policy_set (one INTEGER PRIMARY KEY CHECK (one = 1), serial INTEGER NOT NULL, digest TEXT NOT NULL) STRICT;
CREATE TRIGGER approvals_update BEFORE UPDATE ON approvals BEGIN SELECT RAISE(ABORT, 'approvals are append-only'); END;
CREATE TRIGGER approvals_delete BEFORE DELETE ON approvals BEGIN SELECT RAISE(ABORT, 'approvals are append-only'); END;
CREATE TRIGGER grants_terms BEFORE UPDATE OF id, plan, not_before, not_after, max_releases, owner, allow_simulated, requester, idem_key, requested, principals, purpose ON grants
	BEGIN SELECT RAISE(ABORT, 'the terms of a grant never change'); END;
`

// schema4 adds what version 4 has.
const schema4 = `
ALTER TABLE assets ADD COLUMN statement BLOB NOT NULL DEFAULT x'';
ALTER TABLE assets ADD COLUMN statement_sig BLOB NOT NULL DEFAULT x'';
ALTER TABLE releases ADD COLUMN policy TEXT NOT NULL DEFAULT '';
ALTER TABLE releases ADD COLUMN held TEXT NOT NULL DEFAULT 'null';
CREATE TABLE lines (
	plan TEXT NOT NULL, asset TEXT NOT NULL REFERENCES assets (name), job TEXT NOT NULL, from_job TEXT NOT NULL, sequence INTEGER NOT NULL, digest TEXT NOT NULL, record TEXT NOT NULL,
	log_index INTEGER NOT NULL REFERENCES log (idx), log_hash BLOB NOT NULL,
	PRIMARY KEY (plan, asset)
) STRICT, WITHOUT ROWID;
`

// schema5 adds what version 5 has. Jobs of before have shown no result, so that none
// of theirs is taken.
const schema5 = `
ALTER TABLE leases ADD COLUMN attested TEXT NOT NULL DEFAULT '{}';
ALTER TABLE releases ADD COLUMN result_seconds INTEGER NOT NULL DEFAULT 0;
`

// writerPragmas are the settings of the connections that write.
func writerPragmas() []string {
	return []string{"journal_mode = WAL", "synchronous = FULL", "foreign_keys = 1", fmt.Sprintf("wal_autocheckpoint = %d", walPages)}
}

func readQueries() []string {
	return []string{
		qRead, qRollback,
		qAsset, qAssets, qOwnAssets, qGrant, qGrants, qPlanGrants, qKeyGrant, qOwnGrants, qAllGrants, qApprovals, qLease, qLeases, qAnyRevoked, qRevoked, qRevokeAll, qOwnRevoked,
		qCkptHead, qLine, qPolicySet, qRelease, qUses, qCounted, qHead, qJobHead, qBundle, qEntries, qJobLog,
	}
}

func writeQueries() []string {
	return append(readQueries(), qWrite, qCommit, qSavepoint, qKeep, qUndo, iAsset, uAsset, uAssetKey, uAssetSum, iGrant, iGrantAsset, uGrant, iApproval, iLease, iRevoke, dRevoke, iCkptHead, iLine, iPolicySet, iRelease, iUse, iCounted, iEntry)
}

// Store is a broker.Store in one SQLite file: write-ahead log, every commit
// synced (synchronous=FULL), one connection that writes and others that read.
// Updates that wait for each other share a commit.
type Store struct {
	writer writer
	reader *pool
}

var (
	_ broker.Store  = (*Store)(nil)
	_ broker.Peeker = (*Store)(nil)
)

// OpenStore opens the database of the broker named origin, and makes it if the
// file does not exist. A database of another broker or another schema version is
// an error.
func OpenStore(ctx context.Context, path, origin string) (*Store, error) {
	if origin == "" {
		return nil, errors.New("open store: no broker id")
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	// SQLite gives its -wal and -shm files the mode of the database.
	f, err := os.OpenFile(abs, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	switch {
	case err == nil:
		err = f.Close()
	case errors.Is(err, fs.ErrExist):
		err = nil
	}
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	s := &Store{}
	if err := s.open(ctx, abs, origin); err != nil {
		return nil, errors.Join(fmt.Errorf("open store %s: %w", path, err), s.Close())
	}
	return s, nil
}

func (s *Store) open(ctx context.Context, abs, origin string) error {
	if err := migrate(ctx, abs, origin); err != nil {
		return err
	}
	s.writer.pool = newPool(abs, 1, writeQueries(), writerPragmas())
	if err := s.writer.pool.check(ctx, qWrite); err != nil {
		return err
	}
	s.reader = newPool(abs, readers, readQueries(), []string{"query_only = 1"})
	return s.reader.check(ctx, qRead)
}

// migrate makes the database at path one of schemaVersion that belongs to origin.
func migrate(ctx context.Context, path, origin string) (err error) {
	var s session
	if err := s.open(path, writerPragmas(), nil); err != nil {
		return err
	}
	defer s.discard()
	end, err := sqlitex.ImmediateTransaction(s.conn)
	if err != nil {
		return err
	}
	defer end(&err)
	read := func(q string, dest any) (err error) {
		if s.stmts[q], err = s.conn.Prepare(q); err != nil {
			return err
		}
		return (&tx{&s}).row(ctx, q).Scan(dest)
	}
	var version, tables int
	if err := read(`PRAGMA user_version`, &version); err != nil {
		return err
	}
	if err := read(`SELECT count(*) FROM sqlite_schema`, &tables); err != nil {
		return err
	}
	switch {
	case version == 0 && tables == 0:
		if err := sqlitex.ExecScript(s.conn, schema2); err != nil {
			return fmt.Errorf("make schema: %w", err)
		}
		if err := sqlitex.Execute(s.conn, `INSERT INTO meta (origin) VALUES (?)`, &sqlitex.ExecOptions{Args: []any{origin}}); err != nil {
			return err
		}
		version = 2
	case version < 2 || version > schemaVersion:
		return fmt.Errorf("schema version is %d and this broker reads versions 2 to %d only: keep the file for its log, and start with a database that does not exist yet", version, schemaVersion)
	}
	// Whose it is comes first: nothing is changed in another broker's database.
	var found string
	if err := read(`SELECT origin FROM meta`, &found); err != nil {
		return err
	}
	if found != origin {
		return fmt.Errorf("database belongs to broker %q, not %q", found, origin)
	}
	for ; version < schemaVersion; version++ {
		next := map[int]string{2: schema3, 3: schema4, 4: schema5}[version]
		if err := sqlitex.ExecScript(s.conn, next); err != nil {
			return fmt.Errorf("bring schema %d to %d: %w", version, version+1, err)
		}
	}
	return run(s.conn, fmt.Sprintf(`PRAGMA user_version = %d`, schemaVersion))
}

// Close closes the database, once nobody uses it.
func (s *Store) Close() error {
	var errs []error
	for _, p := range []*pool{s.reader, s.writer.pool} {
		if p != nil {
			errs = append(errs, p.close())
		}
	}
	return errors.Join(errs...)
}

// View implements broker.Store.
func (s *Store) View(ctx context.Context, f func(context.Context, broker.Reader) error) error {
	return s.reader.view(ctx, func(ctx context.Context, t *tx) error { return f(ctx, t) })
}

// Peek implements broker.Peeker.
func (s *Store) Peek(ctx context.Context, f func(context.Context, broker.Reader) error) error {
	if done, err := s.writer.peek(ctx, func(ctx context.Context, t *tx) error { return f(ctx, t) }); done {
		return err
	}
	return s.View(ctx, f)
}

// Update implements broker.Store.
func (s *Store) Update(ctx context.Context, f func(context.Context, broker.Tx) error) error {
	return s.writer.update(ctx, func(ctx context.Context, t *tx) error { return f(ctx, t) })
}

func scanAsset(r scanner) (a broker.Asset, err error) {
	var created int64
	if err := r.Scan(&a.Name, &a.Kind, &a.Digest, &a.Owner, &created, &a.Wrapped, &a.KeyStore, jsonText{&a.Labels}, jsonText{&a.Policy}, &a.Revision, &a.Statement.Document, &a.Statement.Signature); err != nil {
		return broker.Asset{}, err
	}
	// SQLite tells an empty blob from none, and a Statement does not.
	if len(a.Statement.Document) == 0 {
		a.Statement = broker.Signed{}
	}
	a.Created = time.Unix(created, 0).UTC()
	return a, nil
}

func scanGrant(r scanner) (g broker.Grant, err error) {
	if err := r.Scan(&g.ID, &g.Plan, instant{&g.NotBefore}, instant{&g.NotAfter}, &g.MaxReleases, &g.Used, &g.Owner, &g.AllowSimulated, instant{&g.Revoked}, &g.Reason,
		&g.Requester, &g.Key, instant{&g.Requested}, jsonText{&g.Principals}, &g.Purpose, &g.Consented, instant{&g.Denied}, &g.EndedBy, &g.Seq, jsonText{&g.Assets}); err != nil {
		return broker.Grant{}, err
	}
	return g, nil
}

func scanRelease(r scanner) (l broker.Release, err error) {
	err = r.Scan(&l.Verifier, &l.ResultID, &l.Asset, &l.ID, &l.Grant, &l.Attempt, &l.JobID, &l.Plan, &l.AssetDigest, &l.Request,
		&l.Enc, &l.Ciphertext, instant{&l.Time}, instant{&l.NotAfter}, &l.Simulated, &l.LeaseSeconds, &l.LeaseKey, jsonText{&l.Approvals}, &l.Policy, jsonText{&l.Held}, &l.ResultSeconds, &l.LogIndex, &l.LogHash)
	return l, err
}

func scanApproval(r scanner) (a broker.StoredApproval, err error) {
	err = r.Scan(&a.Grant, &a.Approver, &a.Document, &a.Signature, &a.Digest)
	return a, err
}

func scanLease(r scanner) (l broker.Lease, err error) {
	err = r.Scan(&l.JobID, &l.Agent, &l.Submitter, &l.Plan, &l.Session, &l.Seconds, &l.Grace, instant{&l.StopAt}, &l.Image, jsonText{&l.Chips},
		jsonText{&l.Measurements}, jsonText{&l.Uses}, instant{&l.Opened}, &l.Stop, instant{&l.Told}, jsonText{&l.Attested}, instant{&l.Ended})
	return l, err
}

func scanRevocation(r scanner) (v broker.Revocation, err error) {
	err = r.Scan(&v.Kind, &v.Value, &v.Scope, &v.Reason, &v.By, instant{&v.Time})
	return v, err
}

func scanHead(r scanner) (h broker.Head, err error) {
	err = r.Scan(&h.JobID, &h.Asset, &h.Plan, &h.Sequence, &h.Digest, &h.Record, instant{&h.Time}, &h.LogIndex, &h.LogHash)
	return h, err
}

func scanLine(r scanner) (l broker.Line, err error) {
	err = r.Scan(&l.Plan, &l.Asset, &l.Job, &l.From, &l.Sequence, &l.Digest, &l.Record, &l.LogIndex, &l.LogHash)
	return l, err
}

func scanUse(r scanner) (u broker.Use, err error) {
	err = r.Scan(&u.Verifier, &u.Nonce, &u.ResultID, &u.Recipient)
	return u, err
}

func scanEntry(r scanner) (e translog.Entry, err error) {
	err = r.Scan(&e.Index, &e.Body, &e.Hash)
	return e, err
}

func (t *tx) Asset(ctx context.Context, name string) (broker.Asset, error) {
	return scanAsset(t.row(ctx, qAsset, name))
}

func (t *tx) Assets(ctx context.Context, limit int) ([]broker.Asset, error) {
	return list(ctx, t, scanAsset, qAssets, limit)
}

func (t *tx) OwnedAssets(ctx context.Context, owner string) (n int, err error) {
	err = t.row(ctx, qOwnAssets, owner).Scan(&n)
	return n, err
}

func (t *tx) Grant(ctx context.Context, id string) (broker.Grant, error) {
	return scanGrant(t.row(ctx, qGrant, id))
}

func (t *tx) Grants(ctx context.Context, f broker.GrantFilter) ([]broker.Grant, error) {
	if f.Plan == "" {
		return list(ctx, t, scanGrant, qGrants, f.After, f.Principal, f.Limit, f.Requester)
	}
	return list(ctx, t, scanGrant, qPlanGrants, f.After, f.Principal, f.Limit, f.Requester, string(f.Plan))
}

func (t *tx) GrantByKey(ctx context.Context, requester, key string) (broker.Grant, error) {
	return scanGrant(t.row(ctx, qKeyGrant, requester, key))
}

func (t *tx) RequestedGrants(ctx context.Context, requester string, p plan.Digest) (n int, err error) {
	if p == "" {
		err = t.row(ctx, qAllGrants, requester).Scan(&n)
		return n, err
	}
	err = t.row(ctx, qOwnGrants, requester, string(p)).Scan(&n)
	return n, err
}

func (t *tx) Approvals(ctx context.Context, grant string) ([]broker.StoredApproval, error) {
	return list(ctx, t, scanApproval, qApprovals, grant)
}

func (t *tx) Lease(ctx context.Context, job string) (broker.Lease, error) {
	return scanLease(t.row(ctx, qLease, job))
}

func (t *tx) OpenLeases(ctx context.Context, after string, limit int) ([]broker.Lease, error) {
	return list(ctx, t, scanLease, qLeases, after, limit)
}

func (t *tx) Revoked(ctx context.Context, of []broker.Target) ([]broker.Revocation, error) {
	// Most brokers have none most of the time.
	some := false
	if err := t.row(ctx, qAnyRevoked).Scan(&some); err != nil || !some {
		return nil, err
	}
	names := make([]string, len(of))
	for i, o := range of {
		names[i] = o.String()
	}
	return list(ctx, t, scanRevocation, qRevoked, jsonText{names})
}

func (t *tx) Revocations(ctx context.Context, limit int) ([]broker.Revocation, error) {
	return list(ctx, t, scanRevocation, qRevokeAll, limit)
}

func (t *tx) OwnRevocations(ctx context.Context, owner string) (n int, err error) {
	err = t.row(ctx, qOwnRevoked, owner).Scan(&n)
	return n, err
}

func (t *tx) CheckpointHead(ctx context.Context, job, asset string) (broker.Head, error) {
	return scanHead(t.row(ctx, qCkptHead, job, asset))
}

func (t *tx) Line(ctx context.Context, p plan.Digest, asset string) (broker.Line, error) {
	return scanLine(t.row(ctx, qLine, string(p), asset))
}

func (t *tx) PolicySet(ctx context.Context) (p translog.Policy, err error) {
	err = t.row(ctx, qPolicySet).Scan(&p.Serial, &p.Digest)
	return p, err
}

func (t *tx) Release(ctx context.Context, k broker.ReleaseKey) (broker.Release, error) {
	return scanRelease(t.row(ctx, qRelease, k.Verifier, k.ResultID, k.Asset))
}

func (t *tx) Uses(ctx context.Context, verifier, nonce, resultID string) ([]broker.Use, error) {
	return list(ctx, t, scanUse, qUses, verifier, nonce, resultID)
}

func (t *tx) Counted(ctx context.Context, grant, job string, recipient plan.Digest) (bool, error) {
	var n int
	err := t.row(ctx, qCounted, grant, job, string(recipient)).Scan(&n)
	return n > 0, err
}

func (t *tx) Head(ctx context.Context) (translog.Head, error) {
	var idx uint64
	var hash []byte
	switch err := t.row(ctx, qHead).Scan(&idx, &hash); {
	case errors.Is(err, broker.ErrNotFound):
		return translog.Head{}, nil
	case err != nil:
		return translog.Head{}, err
	}
	return translog.Head{Size: idx + 1, Hash: hash}, nil
}

func (t *tx) JobHead(ctx context.Context, job string) (translog.Head, error) {
	var h translog.Head
	switch err := t.row(ctx, qJobHead, job).Scan(&h.Size, &h.Hash); {
	case errors.Is(err, broker.ErrNotFound):
		return translog.Head{}, nil
	case err != nil:
		return translog.Head{}, err
	}
	return h, nil
}

func (t *tx) BundleEntry(ctx context.Context, job string, bundle plan.Digest) (translog.Entry, error) {
	return scanEntry(t.row(ctx, qBundle, job, string(bundle)))
}

func (t *tx) Entries(ctx context.Context, job string, from uint64, limit int) ([]translog.Entry, error) {
	if job == "" {
		return list(ctx, t, scanEntry, qEntries, int64(from), limit)
	}
	return list(ctx, t, scanEntry, qJobLog, job, int64(from), limit)
}

func (t *tx) InsertAsset(ctx context.Context, a broker.Asset) error {
	return t.exec(ctx, iAsset, a.Name, string(a.Kind), string(a.Digest), a.Owner, a.Created.Unix(), a.Wrapped, a.KeyStore, jsonText{a.Labels}, jsonText{a.Policy}, a.Revision, blob(a.Statement.Document), blob(a.Statement.Signature))
}

func (t *tx) SetAssetPolicy(ctx context.Context, a broker.Asset) error {
	return t.exec(ctx, uAsset, jsonText{a.Labels}, jsonText{a.Policy}, a.Revision, blob(a.Statement.Document), blob(a.Statement.Signature), a.Name)
}

func (t *tx) SetAssetKey(ctx context.Context, a broker.Asset) error {
	return t.exec(ctx, uAssetKey, a.Wrapped, a.KeyStore, a.Name)
}

func (t *tx) SetAssetDigest(ctx context.Context, a broker.Asset) error {
	return t.exec(ctx, uAssetSum, string(a.Digest), a.Wrapped, a.Name)
}

func (t *tx) InsertGrant(ctx context.Context, g broker.Grant) error {
	if err := t.exec(ctx, iGrant, g.ID, string(g.Plan), g.NotBefore.Unix(), g.NotAfter.Unix(), g.MaxReleases, g.Used, g.Owner, g.AllowSimulated, instant{&g.Revoked}, g.Reason,
		g.Requester, g.Key, g.Requested.Unix(), jsonText{g.Principals}, g.Purpose, g.Consented, instant{&g.Denied}, g.EndedBy); err != nil {
		return err
	}
	for _, a := range g.Assets {
		if err := t.exec(ctx, iGrantAsset, g.ID, a); err != nil {
			return err
		}
	}
	return nil
}

func (t *tx) SetGrant(ctx context.Context, g broker.Grant) error {
	return t.exec(ctx, uGrant, g.Used, g.Consented, instant{&g.Revoked}, instant{&g.Denied}, g.Reason, g.EndedBy, g.ID)
}

func (t *tx) InsertApproval(ctx context.Context, a broker.StoredApproval) error {
	return t.exec(ctx, iApproval, a.Grant, a.Approver, a.Document, a.Signature, string(a.Digest))
}

func (t *tx) PutLease(ctx context.Context, l broker.Lease) error {
	return t.exec(ctx, iLease, l.JobID, l.Agent, l.Submitter, string(l.Plan), l.Session, l.Seconds, l.Grace, instant{&l.StopAt}, l.Image, jsonText{l.Chips},
		jsonText{l.Measurements}, jsonText{l.Uses}, l.Opened.Unix(), l.Stop, instant{&l.Told}, jsonText{l.Attested}, instant{&l.Ended})
}

func (t *tx) InsertRevocation(ctx context.Context, r broker.Revocation) error {
	return t.exec(ctx, iRevoke, string(r.Kind), r.Value, r.Scope, r.Reason, r.By, r.Time.Unix())
}

func (t *tx) DeleteRevocation(ctx context.Context, of broker.Target, scope string) error {
	return t.exec(ctx, dRevoke, string(of.Kind), of.Value, scope)
}

func (t *tx) PutCheckpointHead(ctx context.Context, h broker.Head) error {
	return t.exec(ctx, iCkptHead, h.JobID, h.Asset, string(h.Plan), int64(h.Sequence), string(h.Digest), string(h.Record), h.Time.Unix(), int64(h.LogIndex), h.LogHash)
}

func (t *tx) PutLine(ctx context.Context, l broker.Line) error {
	return t.exec(ctx, iLine, string(l.Plan), l.Asset, l.Job, l.From, int64(l.Sequence), string(l.Digest), string(l.Record), int64(l.LogIndex), l.LogHash)
}

func (t *tx) PutPolicySet(ctx context.Context, p translog.Policy) error {
	return t.exec(ctx, iPolicySet, int64(p.Serial), string(p.Digest))
}

func (t *tx) InsertRelease(ctx context.Context, r broker.Release) error {
	return t.exec(ctx, iRelease, r.Verifier, r.ResultID, r.Asset, r.ID, r.Grant, r.Attempt, r.JobID, string(r.Plan), string(r.AssetDigest), string(r.Request),
		r.Enc, r.Ciphertext, r.Time.Unix(), r.NotAfter.Unix(), r.Simulated, r.LeaseSeconds, r.LeaseKey, jsonText{r.Approvals}, string(r.Policy), jsonText{r.Held}, r.ResultSeconds, int64(r.LogIndex), r.LogHash)
}

func (t *tx) InsertUse(ctx context.Context, u broker.Use) error {
	return t.exec(ctx, iUse, u.Verifier, u.Nonce, u.ResultID, string(u.Recipient))
}

func (t *tx) InsertCounted(ctx context.Context, grant, job string, recipient plan.Digest) error {
	return t.exec(ctx, iCounted, grant, job, string(recipient))
}

func (t *tx) InsertEntry(ctx context.Context, e translog.Entry, job string, bundle plan.Digest) error {
	return t.exec(ctx, iEntry, int64(e.Index), job, string(bundle), e.Body, e.Hash)
}
