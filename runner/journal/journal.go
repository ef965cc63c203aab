// Package journal records how far each job has come, so that an agent that was
// killed finds its jobs again. It is a hint and never authority: whoever reads
// an entry rechecks it against containerd, the holder and the verifier's signed
// result, and an old copy put back in its place opens nothing.
//
// It holds no key, no environment value and no line that a job printed.
package journal

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	_ "modernc.org/sqlite" // the driver

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

// State is where a job stands.
type State string

// States. The last four are final.
const (
	Queued    State = "queued"
	Running   State = "running"
	Succeeded State = "succeeded"
	Failed    State = "failed"
	Refused   State = "refused"
	Cancelled State = "cancelled"
)

// Final reports whether a job in state s will not change any more.
func (s State) Final() bool {
	return s == Succeeded || s == Failed || s == Refused || s == Cancelled
}

// Known reports whether s is one of the states.
func (s State) Known() bool { return s == Queued || s == Running || s.Final() }

// Job is one row.
type Job struct {
	ID             string
	Name           string
	IdempotencyKey string
	// FileDigest is that of the job file as submitted; JobFile has its
	// environment values replaced by digests.
	FileDigest plan.Digest
	JobFile    []byte
	Plan       []byte
	PlanDigest plan.Digest
	Submitter  string
	State      State
	Stage      string
	Reason     string
	Message    string
	Checks     check.List
	Submitted  time.Time
	Ended      time.Time
	ExitCode   int

	// Attempt counts from 1. RetryOf is the job that was submitted, for every later
	// attempt; RetriedAs the attempt that follows this one.
	Attempt   int
	RetryOf   string
	RetriedAs string
	// NotBefore is when a later attempt may begin.
	NotBefore time.Time
	Priority  int
	// KeepUntil, which End and Retry take down, is when the job's record may be
	// removed; zero is never.
	KeepUntil time.Time
}

// Entry is what a stage left behind: values that the next stages and the bundle
// need, all of them public or signed.
type Entry struct {
	Stage string
	At    time.Time
	Data  []byte
}

// ErrNotFound means that the journal knows no such job.
var ErrNotFound = errors.New("no such job")

// ErrConflict means that an idempotency key was used before with another job
// file, or that a job was not in the stage from which it should move.
var ErrConflict = errors.New("conflict")

// Journal is an open journal. Its methods may be called concurrently; SQLite
// sees one writer, for whom readers do not wait.
type Journal struct {
	db   *sql.DB
	read *sql.DB
}

const schema = `
CREATE TABLE IF NOT EXISTS jobs (
	id TEXT PRIMARY KEY, name TEXT NOT NULL, idempotency_key TEXT, file_digest TEXT NOT NULL,
	job_file BLOB NOT NULL, plan BLOB NOT NULL, plan_digest TEXT NOT NULL, submitter TEXT NOT NULL,
	state TEXT NOT NULL, stage TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', message TEXT NOT NULL DEFAULT '',
	checks TEXT NOT NULL DEFAULT 'null', submitted INTEGER NOT NULL, ended INTEGER NOT NULL DEFAULT 0, exit_code INTEGER NOT NULL DEFAULT 0,
	bundle BLOB
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS jobs_key ON jobs (submitter, idempotency_key) WHERE idempotency_key <> '';
CREATE INDEX IF NOT EXISTS jobs_state ON jobs (state, id);
CREATE INDEX IF NOT EXISTS jobs_unfinished ON jobs (id) WHERE ended = 0;
CREATE TABLE IF NOT EXISTS attempts (
	job TEXT PRIMARY KEY REFERENCES jobs (id), attempt INTEGER NOT NULL, retry_of TEXT NOT NULL, retried_as TEXT NOT NULL DEFAULT '',
	not_before INTEGER NOT NULL DEFAULT 0, priority INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE IF NOT EXISTS retention (job TEXT PRIMARY KEY REFERENCES jobs (id), until INTEGER NOT NULL, removed INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE TABLE IF NOT EXISTS bundles (job TEXT PRIMARY KEY REFERENCES jobs (id), bundle BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS entries (
	job TEXT NOT NULL REFERENCES jobs (id), seq INTEGER NOT NULL, stage TEXT NOT NULL, at INTEGER NOT NULL, data BLOB NOT NULL,
	PRIMARY KEY (job, seq)
) STRICT;
CREATE TABLE IF NOT EXISTS events (
	job TEXT NOT NULL REFERENCES jobs (id), seq INTEGER NOT NULL, at INTEGER NOT NULL, body BLOB NOT NULL,
	PRIMARY KEY (job, seq)
) STRICT;`

// version is that of the schema. Version 1 has no attempts, and keeps bundles in the
// jobs' own rows, where they are read on; what is missing is made.
const version = 2

// Open opens the journal at path and creates it if there is none.
func Open(path string) (*Journal, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open journal: %w", err)
	}
	if err := f.Close(); err != nil {
		return nil, fmt.Errorf("open journal: %w", err)
	}
	db, err := sql.Open("sqlite", "file:"+path+"?_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)&_pragma=foreign_keys(1)&_pragma=busy_timeout(5000)&_txlock=immediate")
	if err != nil {
		return nil, fmt.Errorf("open journal: %w", err)
	}
	db.SetMaxOpenConns(1)
	j := &Journal{db: db}
	if err := j.migrate(); err != nil {
		return nil, errors.Join(fmt.Errorf("open journal %s: %w", path, err), db.Close())
	}
	if j.read, err = sql.Open("sqlite", "file:"+path+"?_pragma=query_only(1)&_pragma=busy_timeout(5000)"); err != nil {
		return nil, errors.Join(fmt.Errorf("open journal: %w", err), db.Close())
	}
	j.read.SetMaxOpenConns(readers)
	return j, nil
}

// readers bounds the connections that read.
const readers = 4

func (j *Journal) migrate() error {
	var v int
	if err := j.db.QueryRow("PRAGMA user_version").Scan(&v); err != nil {
		return err
	}
	if v > version {
		return fmt.Errorf("it has schema version %d, this agent reads %d", v, version)
	}
	if _, err := j.db.Exec(schema); err != nil {
		return err
	}
	_, err := j.db.Exec(fmt.Sprintf("PRAGMA user_version = %d", version))
	return err
}

// Close closes the journal.
func (j *Journal) Close() error { return errors.Join(j.read.Close(), j.db.Close()) }

// Submit records a new job, or finds the one that the same submitter submitted
// under the same idempotency key.
func (j *Journal) Submit(ctx context.Context, job Job) (Job, bool, error) {
	tx, err := j.db.BeginTx(ctx, nil)
	if err != nil {
		return Job{}, false, fmt.Errorf("submit job: %w", err)
	}
	defer tx.Rollback() //nolint:errcheck // no effect after a commit
	if job.IdempotencyKey != "" {
		old, err := scan(tx.QueryRowContext(ctx, selectJob+" WHERE submitter = ? AND idempotency_key = ?", job.Submitter, job.IdempotencyKey))
		switch {
		case err == nil && old.FileDigest == job.FileDigest:
			return old, false, nil
		case err == nil:
			return Job{}, false, fmt.Errorf("submit job: idempotency key %q was used with another job file: %w", job.IdempotencyKey, ErrConflict)
		case !errors.Is(err, ErrNotFound):
			return Job{}, false, err
		}
	}
	if err := insert(ctx, tx, job); err != nil {
		return Job{}, false, err
	}
	if err := tx.Commit(); err != nil {
		return Job{}, false, fmt.Errorf("submit job: %w", err)
	}
	return job, true, nil
}

func insert(ctx context.Context, tx *sql.Tx, job Job) error {
	if _, err := tx.ExecContext(ctx, `INSERT INTO jobs (id, name, idempotency_key, file_digest, job_file, plan, plan_digest, submitter, state, stage, submitted)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`, job.ID, job.Name, job.IdempotencyKey, job.FileDigest, job.JobFile, job.Plan, job.PlanDigest, job.Submitter,
		job.State, job.Stage, job.Submitted.UnixNano()); err != nil {
		return fmt.Errorf("submit job: %w", err)
	}
	notBefore := int64(0)
	if !job.NotBefore.IsZero() {
		notBefore = job.NotBefore.UnixNano()
	}
	if _, err := tx.ExecContext(ctx, "INSERT INTO attempts (job, attempt, retry_of, not_before, priority) VALUES (?, ?, ?, ?, ?)",
		job.ID, max(job.Attempt, 1), job.RetryOf, notBefore, job.Priority); err != nil {
		return fmt.Errorf("submit job: %w", err)
	}
	return nil
}

// Wait moves a job that is not in a final state to a stage in which it waits.
func (j *Journal) Wait(ctx context.Context, id, stage string) error {
	return j.update(ctx, j.db, id, "UPDATE jobs SET state = ?, stage = ? WHERE id = ? AND ended = 0", Queued, stage, id)
}

// Enter moves a job that is not in a final state to a stage.
func (j *Journal) Enter(ctx context.Context, id, stage string) error {
	return j.update(ctx, j.db, id, "UPDATE jobs SET state = ?, stage = ? WHERE id = ? AND ended = 0", Running, stage, id)
}

// Leave records what a stage produced. data is encoded as JSON.
func (j *Journal) Leave(ctx context.Context, id, stage string, data any) error {
	b, err := json.Marshal(data)
	if err != nil {
		return fmt.Errorf("journal %s: %w", stage, err)
	}
	return j.update(ctx, j.db, id, `INSERT INTO entries (job, seq, stage, at, data)
		SELECT id, (SELECT count(*) + 1 FROM entries WHERE job = jobs.id), ?, ?, ? FROM jobs WHERE id = ? AND ended = 0`, stage, time.Now().UnixNano(), b, id)
}

// Keep records data under a name as Leave does, in the place of what was kept under
// it before.
func (j *Journal) Keep(ctx context.Context, id, name string, data any) error {
	b, err := json.Marshal(data)
	if err != nil {
		return fmt.Errorf("journal %s: %w", name, err)
	}
	err = j.update(ctx, j.db, id, `UPDATE entries SET at = ?, data = ? WHERE stage = ? AND job = ?`, time.Now().UnixNano(), b, name, id)
	if errors.Is(err, ErrConflict) {
		return j.Leave(ctx, id, name, data)
	}
	return err
}

// MetricsEntry is the name under which what was kept stays when the job has ended.
const MetricsEntry = "metrics"

// End gives a job its final state. A job ends once. With a bundle, the journal lets go
// of what the stages have left, but for MetricsEntry: of the rest it knows that it was
// there.
func (j *Journal) End(ctx context.Context, job Job, bundle []byte) error {
	tx, err := j.db.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("end job %s: %w", job.ID, err)
	}
	defer tx.Rollback() //nolint:errcheck // no effect after a commit
	if err := j.end(ctx, tx, job, bundle); err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("end job %s: %w", job.ID, err)
	}
	return nil
}

// Retry gives a job its final state and submits the next attempt, both or neither.
func (j *Journal) Retry(ctx context.Context, job Job, bundle []byte, next Job) error {
	tx, err := j.db.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("retry job: %w", err)
	}
	defer tx.Rollback() //nolint:errcheck // no effect after a commit
	if err := j.end(ctx, tx, job, bundle); err != nil {
		return err
	}
	if err := insert(ctx, tx, next); err != nil {
		return err
	}
	// A job of the first schema has no row yet.
	if _, err := tx.ExecContext(ctx, `INSERT INTO attempts (job, attempt, retry_of, retried_as) VALUES (?, 1, '', ?)
		ON CONFLICT (job) DO UPDATE SET retried_as = excluded.retried_as`, job.ID, next.ID); err != nil {
		return fmt.Errorf("retry job: %w", err)
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("retry job: %w", err)
	}
	return nil
}

// execer is the database or a transaction.
type execer interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
}

func (j *Journal) end(ctx context.Context, db execer, job Job, bundle []byte) error {
	if !job.State.Final() {
		return fmt.Errorf("end job %s: %q is not a final state", job.ID, job.State)
	}
	checks, err := json.Marshal(job.Checks)
	if err != nil {
		return fmt.Errorf("end job %s: %w", job.ID, err)
	}
	if err := j.update(ctx, db, job.ID, `UPDATE jobs SET state = ?, stage = ?, reason = ?, message = ?, checks = ?, ended = ?, exit_code = ?
		WHERE id = ? AND ended = 0`, job.State, job.Stage, job.Reason, job.Message, string(checks), job.Ended.UnixNano(), job.ExitCode, job.ID); err != nil {
		return err
	}
	if !job.KeepUntil.IsZero() {
		if _, err := db.ExecContext(ctx, "INSERT INTO retention (job, until) VALUES (?, ?)", job.ID, job.KeepUntil.UnixNano()); err != nil {
			return fmt.Errorf("end job %s: %w", job.ID, err)
		}
	}
	if len(bundle) == 0 {
		return nil
	}
	if _, err := db.ExecContext(ctx, "INSERT INTO bundles (job, bundle) VALUES (?, ?)", job.ID, bundle); err != nil {
		return fmt.Errorf("end job %s: %w", job.ID, err)
	}
	// The bundle has what the stages produced, which is several times as much here.
	if _, err := db.ExecContext(ctx, "UPDATE entries SET data = ? WHERE job = ? AND stage <> ?", []byte("null"), job.ID, MetricsEntry); err != nil {
		return fmt.Errorf("end job %s: %w", job.ID, err)
	}
	return nil
}

func (j *Journal) update(ctx context.Context, db execer, id, query string, args ...any) error {
	r, err := db.ExecContext(ctx, query, args...)
	if err != nil {
		return fmt.Errorf("journal job %s: %w", id, err)
	}
	n, err := r.RowsAffected()
	if err != nil {
		return fmt.Errorf("journal job %s: %w", id, err)
	}
	if n != 1 {
		return fmt.Errorf("journal job %s: it is unknown or has ended: %w", id, ErrConflict)
	}
	return nil
}

// Lists leave out the job file and the plan, which nobody asks for there.
const (
	selectJob  = `SELECT id, name, coalesce(idempotency_key, ''), file_digest, job_file, plan, ` + selectRest
	selectList = `SELECT id, name, coalesce(idempotency_key, ''), file_digest, x'', x'', ` + selectRest
)

const selectRest = `plan_digest, submitter, state, stage, reason, message, checks, submitted, ended, exit_code,
	coalesce(attempt, 1), coalesce(retry_of, ''), coalesce(retried_as, ''), coalesce(not_before, 0), coalesce(priority, 0) FROM jobs LEFT JOIN attempts ON attempts.job = jobs.id`

func scan(row interface{ Scan(...any) error }) (Job, error) {
	var job Job
	var checks string
	var submitted, ended, notBefore int64
	err := row.Scan(&job.ID, &job.Name, &job.IdempotencyKey, &job.FileDigest, &job.JobFile, &job.Plan, &job.PlanDigest, &job.Submitter,
		&job.State, &job.Stage, &job.Reason, &job.Message, &checks, &submitted, &ended, &job.ExitCode,
		&job.Attempt, &job.RetryOf, &job.RetriedAs, &notBefore, &job.Priority)
	if errors.Is(err, sql.ErrNoRows) {
		return Job{}, ErrNotFound
	}
	if err != nil {
		return Job{}, fmt.Errorf("read journal: %w", err)
	}
	if err := json.Unmarshal([]byte(checks), &job.Checks); err != nil {
		return Job{}, fmt.Errorf("read journal: job %s: %w", job.ID, err)
	}
	job.Submitted = time.Unix(0, submitted)
	if ended != 0 {
		job.Ended = time.Unix(0, ended)
	}
	if notBefore != 0 {
		job.NotBefore = time.Unix(0, notBefore)
	}
	return job, nil
}

// Job returns one job.
func (j *Journal) Job(ctx context.Context, id string) (Job, error) {
	return scan(j.read.QueryRowContext(ctx, selectJob+" WHERE id = ?", id))
}

// Jobs returns up to limit jobs older than the job named before, newest first,
// without job files and plans. Job ids sort by time; an empty before starts at the
// newest.
func (j *Journal) Jobs(ctx context.Context, before string, limit int) ([]Job, error) {
	return j.query(ctx, selectList+" WHERE ? = '' OR id < ? ORDER BY id DESC LIMIT ?", before, before, limit)
}

// JobsIn is Jobs of those in one state.
func (j *Journal) JobsIn(ctx context.Context, state State, before string, limit int) ([]Job, error) {
	return j.query(ctx, selectList+" WHERE state = ? AND (? = '' OR id < ?) ORDER BY id DESC LIMIT ?", state, before, before, limit)
}

// Unfinished returns every job that has not ended, oldest first.
func (j *Journal) Unfinished(ctx context.Context) ([]Job, error) {
	return j.query(ctx, selectJob+" WHERE ended = 0 ORDER BY id")
}

func (j *Journal) query(ctx context.Context, query string, args ...any) ([]Job, error) {
	rows, err := j.read.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, fmt.Errorf("read journal: %w", err)
	}
	defer rows.Close()
	var out []Job
	for rows.Next() {
		job, err := scan(rows)
		if err != nil {
			return nil, err
		}
		out = append(out, job)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read journal: %w", err)
	}
	return out, nil
}

// Entry decodes what stage left behind for a job into v.
func (j *Journal) Entry(ctx context.Context, id, stage string, v any) error {
	var b []byte
	err := j.read.QueryRowContext(ctx, "SELECT data FROM entries WHERE job = ? AND stage = ? ORDER BY seq DESC LIMIT 1", id, stage).Scan(&b)
	if errors.Is(err, sql.ErrNoRows) {
		return fmt.Errorf("job %s left nothing in stage %s: %w", id, stage, ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("read journal: %w", err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("read journal: job %s, stage %s: %w", id, stage, err)
	}
	return nil
}

// Bundle returns a job's evidence bundle, or ErrNotFound if it has none, which is
// ErrRemoved if it had one.
func (j *Journal) Bundle(ctx context.Context, id string) ([]byte, error) {
	var b []byte
	err := j.read.QueryRowContext(ctx, "SELECT coalesce(bundles.bundle, jobs.bundle) FROM jobs LEFT JOIN bundles ON bundles.job = jobs.id WHERE id = ? AND (bundles.bundle IS NOT NULL OR jobs.bundle IS NOT NULL)", id).Scan(&b)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, j.noBundle(ctx, id)
	}
	if err != nil {
		return nil, fmt.Errorf("read journal: %w", err)
	}
	return b, nil
}

// Event is one thing that happened to a job, kept so that a watcher can resume.
type Event struct {
	Sequence uint64
	At       time.Time
	Body     []byte
}

// AddEvent appends an event under the given sequence number, which must be new.
func (j *Journal) AddEvent(ctx context.Context, id string, e Event) error {
	_, err := j.db.ExecContext(ctx, "INSERT INTO events (job, seq, at, body) VALUES (?, ?, ?, ?)", id, e.Sequence, e.At.UnixNano(), e.Body)
	if err != nil {
		return fmt.Errorf("journal event %d of job %s: %w", e.Sequence, id, err)
	}
	return nil
}

// Events returns up to limit events of a job after a sequence number.
func (j *Journal) Events(ctx context.Context, id string, after uint64, limit int) ([]Event, error) {
	rows, err := j.read.QueryContext(ctx, "SELECT seq, at, body FROM events WHERE job = ? AND seq > ? ORDER BY seq LIMIT ?", id, after, limit)
	if err != nil {
		return nil, fmt.Errorf("read journal: %w", err)
	}
	defer rows.Close()
	var out []Event
	for rows.Next() {
		var e Event
		var at int64
		if err := rows.Scan(&e.Sequence, &at, &e.Body); err != nil {
			return nil, fmt.Errorf("read journal: %w", err)
		}
		e.At = time.Unix(0, at)
		out = append(out, e)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read journal: %w", err)
	}
	return out, nil
}
