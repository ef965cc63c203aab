package serve

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/translog"
)

const (
	// schemaVersion is the only schema there is; another one is an error.
	schemaVersion = 2
	// busyTimeout is how long a statement waits for another process's lock.
	busyTimeout = 5 * time.Second
	// readers is how many connections serve reads beside the one writer.
	readers = 4
)

// The triggers make history append-only for every statement of this program;
// the hash chain shows what someone with the file in hand changed.
const schema = `
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
	assetColumns   = `name, kind, digest, owner, created, wrapped`
	grantColumns   = `id, plan, not_before, not_after, max_releases, used, owner, allow_simulated, revoked, reason, (SELECT json_group_array(asset) FROM grant_assets WHERE grant_id = id)`
	releaseColumns = `verifier, result_id, asset, id, grant_id, attempt, job, plan, asset_digest, request, enc, ciphertext, time, not_after, simulated, log_index, log_hash`

	qAsset      = `SELECT ` + assetColumns + ` FROM assets WHERE name = ?`
	qAssets     = `SELECT ` + assetColumns + ` FROM assets ORDER BY name LIMIT ?`
	qOwnAssets  = `SELECT count(*) FROM assets WHERE owner = ?`
	qGrant      = `SELECT ` + grantColumns + ` FROM grants WHERE id = ?`
	qGrants     = `SELECT ` + grantColumns + ` FROM grants ORDER BY rowid LIMIT ?`
	qPlanGrants = `SELECT ` + grantColumns + ` FROM grants WHERE plan = ? ORDER BY rowid LIMIT ?`
	qOwnGrants  = `SELECT count(*) FROM grants WHERE plan = ? AND owner = ?`
	qRelease    = `SELECT ` + releaseColumns + ` FROM releases WHERE verifier = ? AND result_id = ? AND asset = ?`
	qUses       = `SELECT verifier, nonce, result_id, recipient FROM uses WHERE verifier = ?1 AND nonce = ?2 UNION SELECT verifier, nonce, result_id, recipient FROM uses WHERE verifier = ?1 AND result_id = ?3`
	qCounted    = `SELECT count(*) FROM counted WHERE grant_id = ? AND job = ? AND recipient = ?`
	qHead       = `SELECT idx, hash FROM log ORDER BY idx DESC LIMIT 1`
	qJobHead    = `SELECT (SELECT count(*) FROM log WHERE job = ?1), hash FROM log WHERE job = ?1 ORDER BY idx DESC LIMIT 1`
	qBundle     = `SELECT idx, body, hash FROM log WHERE job = ? AND bundle = ? AND bundle <> ''`
	qEntries    = `SELECT idx, body, hash FROM log WHERE idx >= ? ORDER BY idx LIMIT ?`
	qJobLog     = `SELECT idx, body, hash FROM log WHERE job = ? AND idx >= ? ORDER BY idx LIMIT ?`

	iAsset      = `INSERT INTO assets (` + assetColumns + `) VALUES (?, ?, ?, ?, ?, ?)`
	iGrant      = `INSERT INTO grants (id, plan, not_before, not_after, max_releases, used, owner, allow_simulated, revoked, reason) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`
	iGrantAsset = `INSERT INTO grant_assets (grant_id, asset) VALUES (?, ?)`
	uGrant      = `UPDATE grants SET used = ?, revoked = ?, reason = ? WHERE id = ?`
	iRelease    = `INSERT INTO releases (` + releaseColumns + `) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`
	iUse        = `INSERT INTO uses (verifier, nonce, result_id, recipient) VALUES (?, ?, ?, ?)`
	iCounted    = `INSERT INTO counted (grant_id, job, recipient) VALUES (?, ?, ?)`
	iEntry      = `INSERT INTO log (idx, job, bundle, body, hash) VALUES (?, ?, ?, ?, ?)`
)

func readQueries() []string {
	return []string{qAsset, qAssets, qOwnAssets, qGrant, qGrants, qPlanGrants, qOwnGrants, qRelease, qUses, qCounted, qHead, qJobHead, qBundle, qEntries, qJobLog}
}

func writeQueries() []string {
	return append(readQueries(), iAsset, iGrant, iGrantAsset, uGrant, iRelease, iUse, iCounted, iEntry)
}

// Store is a broker.Store in one SQLite file: write-ahead log, every commit
// synced (synchronous=FULL), one connection that writes and others that read.
type Store struct {
	writer, reader *pool
}

var _ broker.Store = (*Store)(nil)

// pool is connections with the statements prepared for them.
type pool struct {
	db    *sql.DB
	stmts map[string]*sql.Stmt
}

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
	w, err := openPool(abs, 1, "immediate", "journal_mode(WAL)", "synchronous(FULL)", "foreign_keys(1)")
	if err != nil {
		return err
	}
	s.writer = w
	if err := w.migrate(ctx, origin); err != nil {
		return err
	}
	if err := w.prepare(ctx, writeQueries()); err != nil {
		return err
	}
	r, err := openPool(abs, readers, "deferred", "query_only(1)")
	if err != nil {
		return err
	}
	s.reader = r
	return r.prepare(ctx, readQueries())
}

func openPool(abs string, conns int, lock string, pragmas ...string) (*pool, error) {
	q := url.Values{"_txlock": {lock}, "_pragma": append([]string{fmt.Sprintf("busy_timeout(%d)", busyTimeout.Milliseconds())}, pragmas...)}
	db, err := sql.Open("sqlite", (&url.URL{Scheme: "file", Path: abs, RawQuery: q.Encode()}).String())
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(conns)
	db.SetMaxIdleConns(conns)
	return &pool{db: db, stmts: map[string]*sql.Stmt{}}, nil
}

func (p *pool) prepare(ctx context.Context, queries []string) error {
	for _, q := range queries {
		st, err := p.db.PrepareContext(ctx, q)
		if err != nil {
			return fmt.Errorf("prepare %q: %w", q, err)
		}
		p.stmts[q] = st
	}
	return nil
}

func (p *pool) migrate(ctx context.Context, origin string) (err error) {
	tx, err := p.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, tx.Rollback())
		}
	}()
	var version, tables int
	if err := tx.QueryRowContext(ctx, `PRAGMA user_version`).Scan(&version); err != nil {
		return err
	}
	if err := tx.QueryRowContext(ctx, `SELECT count(*) FROM sqlite_schema`).Scan(&tables); err != nil {
		return err
	}
	switch {
	case version == 0 && tables == 0:
		if _, err := tx.ExecContext(ctx, schema); err != nil {
			return fmt.Errorf("make schema: %w", err)
		}
		if _, err := tx.ExecContext(ctx, `INSERT INTO meta (origin) VALUES (?)`, origin); err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, fmt.Sprintf(`PRAGMA user_version = %d`, schemaVersion)); err != nil {
			return err
		}
	case version != schemaVersion:
		return fmt.Errorf("schema version is %d and this broker reads version %d only: keep the file for its log, and start with a database that does not exist yet", version, schemaVersion)
	default:
		var found string
		if err := tx.QueryRowContext(ctx, `SELECT origin FROM meta`).Scan(&found); err != nil {
			return err
		}
		if found != origin {
			return fmt.Errorf("database belongs to broker %q, not %q", found, origin)
		}
	}
	return tx.Commit()
}

// Close closes the database.
func (s *Store) Close() error {
	var errs []error
	for _, p := range []*pool{s.reader, s.writer} {
		if p != nil {
			errs = append(errs, p.db.Close())
		}
	}
	return errors.Join(errs...)
}

// View implements broker.Store.
func (s *Store) View(ctx context.Context, f func(context.Context, broker.Reader) error) error {
	return s.reader.run(ctx, true, func(ctx context.Context, t *tx) error { return f(ctx, t) })
}

// Update implements broker.Store.
func (s *Store) Update(ctx context.Context, f func(context.Context, broker.Tx) error) error {
	return s.writer.run(ctx, false, func(ctx context.Context, t *tx) error { return f(ctx, t) })
}

func (p *pool) run(ctx context.Context, readOnly bool, f func(context.Context, *tx) error) (err error) {
	t, err := p.db.BeginTx(ctx, &sql.TxOptions{ReadOnly: readOnly})
	if err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	// Also when f panics: the one connection that writes must come free. A
	// transaction that ctx ended or that was committed is done already.
	defer func() {
		if rb := t.Rollback(); rb != nil && !errors.Is(rb, sql.ErrTxDone) {
			err = errors.Join(err, fmt.Errorf("roll back: %w", rb))
		}
	}()
	if err := f(ctx, &tx{t: t, stmts: p.stmts}); err != nil || readOnly {
		return err
	}
	if err := t.Commit(); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	return nil
}

type tx struct {
	t     *sql.Tx
	stmts map[string]*sql.Stmt
}

func (t *tx) row(ctx context.Context, q string, args ...any) *sql.Row {
	return t.t.StmtContext(ctx, t.stmts[q]).QueryRowContext(ctx, args...)
}

func (t *tx) exec(ctx context.Context, q string, args ...any) error {
	res, err := t.t.StmtContext(ctx, t.stmts[q]).ExecContext(ctx, args...)
	if err != nil {
		return mapped(err)
	}
	n, err := res.RowsAffected()
	if err != nil {
		return err
	}
	if n != 1 {
		return fmt.Errorf("%w: %d rows changed", broker.ErrNotFound, n)
	}
	return nil
}

// mapped turns what a broker reacts to into its sentinels.
func mapped(err error) error {
	var e *sqlite.Error
	switch {
	case err == nil:
		return nil
	case errors.Is(err, sql.ErrNoRows):
		return broker.ErrNotFound
	case errors.As(err, &e) && (e.Code() == sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY || e.Code() == sqlite3.SQLITE_CONSTRAINT_UNIQUE || e.Code() == sqlite3.SQLITE_CONSTRAINT_ROWID):
		return broker.ErrExists
	}
	return err
}

type scanner interface{ Scan(dest ...any) error }

func list[T any](ctx context.Context, t *tx, scan func(scanner) (T, error), q string, args ...any) (out []T, err error) {
	rows, err := t.t.StmtContext(ctx, t.stmts[q]).QueryContext(ctx, args...)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		v, err := scan(rows)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, rows.Err()
}

func scanAsset(r scanner) (a broker.Asset, err error) {
	var created int64
	err = mapped(r.Scan(&a.Name, &a.Kind, &a.Digest, &a.Owner, &created, &a.Wrapped))
	a.Created = time.Unix(created, 0).UTC()
	return a, err
}

func scanGrant(r scanner) (g broker.Grant, err error) {
	var before, after int64
	var revoked sql.NullInt64
	var assets []byte
	if err := r.Scan(&g.ID, &g.Plan, &before, &after, &g.MaxReleases, &g.Used, &g.Owner, &g.AllowSimulated, &revoked, &g.Reason, &assets); err != nil {
		return broker.Grant{}, mapped(err)
	}
	g.NotBefore, g.NotAfter = time.Unix(before, 0).UTC(), time.Unix(after, 0).UTC()
	if revoked.Valid {
		g.Revoked = time.Unix(revoked.Int64, 0).UTC()
	}
	if err := json.Unmarshal(assets, &g.Assets); err != nil {
		return broker.Grant{}, fmt.Errorf("assets of grant %s: %w", g.ID, err)
	}
	return g, nil
}

func scanRelease(r scanner) (l broker.Release, err error) {
	var at, after int64
	err = mapped(r.Scan(&l.Verifier, &l.ResultID, &l.Asset, &l.ID, &l.Grant, &l.Attempt, &l.JobID, &l.Plan, &l.AssetDigest, &l.Request,
		&l.Enc, &l.Ciphertext, &at, &after, &l.Simulated, &l.LogIndex, &l.LogHash))
	l.Time, l.NotAfter = time.Unix(at, 0).UTC(), time.Unix(after, 0).UTC()
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

func (t *tx) Grants(ctx context.Context, p plan.Digest, limit int) ([]broker.Grant, error) {
	if p == "" {
		return list(ctx, t, scanGrant, qGrants, limit)
	}
	return list(ctx, t, scanGrant, qPlanGrants, string(p), limit)
}

func (t *tx) OwnedGrants(ctx context.Context, owner string, p plan.Digest) (n int, err error) {
	err = t.row(ctx, qOwnGrants, string(p), owner).Scan(&n)
	return n, err
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
	return n > 0, mapped(err)
}

func (t *tx) Head(ctx context.Context) (translog.Head, error) {
	var idx uint64
	var hash []byte
	switch err := t.row(ctx, qHead).Scan(&idx, &hash); {
	case errors.Is(err, sql.ErrNoRows):
		return translog.Head{}, nil
	case err != nil:
		return translog.Head{}, err
	}
	return translog.Head{Size: idx + 1, Hash: hash}, nil
}

func (t *tx) JobHead(ctx context.Context, job string) (translog.Head, error) {
	var h translog.Head
	switch err := t.row(ctx, qJobHead, job).Scan(&h.Size, &h.Hash); {
	case errors.Is(err, sql.ErrNoRows):
		return translog.Head{}, nil
	case err != nil:
		return translog.Head{}, err
	}
	return h, nil
}

func (t *tx) BundleEntry(ctx context.Context, job string, bundle plan.Digest) (translog.Entry, error) {
	e, err := scanEntry(t.row(ctx, qBundle, job, string(bundle)))
	return e, mapped(err)
}

func (t *tx) Entries(ctx context.Context, job string, from uint64, limit int) ([]translog.Entry, error) {
	if job == "" {
		return list(ctx, t, scanEntry, qEntries, int64(from), limit)
	}
	return list(ctx, t, scanEntry, qJobLog, job, int64(from), limit)
}

func (t *tx) InsertAsset(ctx context.Context, a broker.Asset) error {
	return t.exec(ctx, iAsset, a.Name, string(a.Kind), string(a.Digest), a.Owner, a.Created.Unix(), a.Wrapped)
}

func (t *tx) InsertGrant(ctx context.Context, g broker.Grant) error {
	if err := t.exec(ctx, iGrant, g.ID, string(g.Plan), g.NotBefore.Unix(), g.NotAfter.Unix(), g.MaxReleases, g.Used, g.Owner, g.AllowSimulated, revokedAt(g), g.Reason); err != nil {
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
	return t.exec(ctx, uGrant, g.Used, revokedAt(g), g.Reason, g.ID)
}

func revokedAt(g broker.Grant) sql.NullInt64 {
	return sql.NullInt64{Int64: g.Revoked.Unix(), Valid: !g.Revoked.IsZero()}
}

func (t *tx) InsertRelease(ctx context.Context, r broker.Release) error {
	return t.exec(ctx, iRelease, r.Verifier, r.ResultID, r.Asset, r.ID, r.Grant, r.Attempt, r.JobID, string(r.Plan), string(r.AssetDigest), string(r.Request),
		r.Enc, r.Ciphertext, r.Time.Unix(), r.NotAfter.Unix(), r.Simulated, int64(r.LogIndex), r.LogHash)
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
