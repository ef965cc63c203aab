package journal

import (
	"database/sql"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

func open(t *testing.T, path string) *Journal {
	t.Helper()
	j, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	return j
}

func job(id, key, file string) Job {
	return Job{
		ID: id, Name: "n", IdempotencyKey: key, FileDigest: plan.Sum([]byte(file)), JobFile: []byte("f"), Plan: []byte("p"), PlanDigest: plan.Sum([]byte("p")),
		Submitter: "engineer/a", State: Queued, Stage: "admit", Submitted: time.Now(),
	}
}

func TestKeepTakesThePlaceOfWhatWasKept(t *testing.T) {
	j, ctx := open(t, filepath.Join(t.TempDir(), "j")), t.Context()
	if _, _, err := j.Submit(ctx, job("1", "", "f")); err != nil {
		t.Fatal(err)
	}
	var got int
	if err := j.Entry(ctx, "1", "x", &got); !errors.Is(err, ErrNotFound) {
		t.Errorf("before: %v", err)
	}
	for want := range 3 {
		if err := j.Keep(ctx, "1", "x", want); err != nil {
			t.Fatal(err)
		}
		if err := j.Entry(ctx, "1", "x", &got); err != nil || got != want {
			t.Errorf("kept %d, got %d, %v", want, got, err)
		}
	}
	if err := j.Keep(ctx, "9", "x", 1); !errors.Is(err, ErrConflict) {
		t.Errorf("of an unknown job: %v", err)
	}
}

func TestSubmitIsIdempotentPerSubmitter(t *testing.T) {
	j, ctx := open(t, filepath.Join(t.TempDir(), "j")), t.Context()
	if _, created, err := j.Submit(ctx, job("1", "k", "f")); err != nil || !created {
		t.Fatalf("first: %v %v", created, err)
	}
	if got, created, err := j.Submit(ctx, job("2", "k", "f")); err != nil || created || got.ID != "1" {
		t.Errorf("same key and file: %v %v %v", got.ID, created, err)
	}
	if _, _, err := j.Submit(ctx, job("3", "k", "other")); !errors.Is(err, ErrConflict) {
		t.Errorf("same key, other file: %v", err)
	}
	other := job("4", "k", "other")
	other.Submitter = "engineer/b"
	if _, created, err := j.Submit(ctx, other); err != nil || !created {
		t.Errorf("another submitter's key: %v %v", created, err)
	}
	for _, id := range []string{"5", "6"} {
		if _, created, err := j.Submit(ctx, job(id, "", "f")); err != nil || !created {
			t.Errorf("without a key: %v %v", created, err)
		}
	}
}

func TestJobsEndOnceAndSurviveReopening(t *testing.T) {
	path, ctx := filepath.Join(t.TempDir(), "j"), t.Context()
	j := open(t, path)
	for _, id := range []string{"1", "2"} {
		if _, _, err := j.Submit(ctx, job(id, "", "f")); err != nil {
			t.Fatal(err)
		}
	}
	n := map[string]int{"n": 7}
	if err := errors.Join(j.Enter(ctx, "1", "collect"), j.Leave(ctx, "1", "collect", n), j.Keep(ctx, "1", MetricsEntry, n), j.Leave(ctx, "2", "collect", n)); err != nil {
		t.Fatal(err)
	}
	end := job("1", "", "f")
	end.State, end.Stage, end.Reason, end.Ended = Refused, "verify", "evidence-refused", time.Now()
	end.Checks.Fail("gpu0.nonce", "a", "b", "c")
	if err := j.End(ctx, end, []byte("bundle")); err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"end twice":        j.End(ctx, end, nil),
		"enter after end":  j.Enter(ctx, "1", "start"),
		"leave after end":  j.Leave(ctx, "1", "start", 1),
		"enter an unknown": j.Enter(ctx, "9", "start"),
	} {
		if !errors.Is(err, ErrConflict) {
			t.Errorf("%s: %v, want ErrConflict", name, err)
		}
	}
	end.State = Running
	if err := j.End(ctx, end, nil); err == nil {
		t.Error("a job ended in a state that is not final")
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	j = open(t, path)
	got, err := j.Job(ctx, "1")
	if err != nil || got.State != Refused || len(got.Checks) != 1 || got.Checks[0].Outcome != check.Fail {
		t.Errorf("after reopening: %+v %v", got, err)
	}
	// Of a job that has ended, the bundle has what the stages left.
	for name, want := range map[string]int{"collect": 0, MetricsEntry: 7} {
		var data map[string]int
		if err := j.Entry(ctx, "1", name, &data); err != nil || data["n"] != want {
			t.Errorf("entry %s: %v %v", name, data, err)
		}
	}
	var data map[string]int
	if err := j.Entry(ctx, "2", "collect", &data); err != nil || data["n"] != 7 {
		t.Errorf("entry of a job that goes on: %v %v", data, err)
	}
	if b, err := j.Bundle(ctx, "1"); err != nil || string(b) != "bundle" {
		t.Errorf("bundle: %q %v", b, err)
	}
	if _, err := j.Bundle(ctx, "2"); !errors.Is(err, ErrNotFound) {
		t.Errorf("bundle of a job without one: %v", err)
	}
	left, err := j.Unfinished(ctx)
	if err != nil || len(left) != 1 || left[0].ID != "2" {
		t.Errorf("unfinished: %v %v", left, err)
	}
	page, err := j.Jobs(ctx, "2", 10)
	if err != nil || len(page) != 1 || page[0].ID != "1" {
		t.Errorf("page: %v %v", page, err)
	}
}

func TestOpenRefusesAnotherSchema(t *testing.T) {
	path := filepath.Join(t.TempDir(), "j")
	j := open(t, path)
	if _, err := j.db.Exec("PRAGMA user_version = 99"); err != nil {
		t.Fatal(err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path); err == nil {
		t.Error("opened a journal of another version")
	}
}

func TestEventsResume(t *testing.T) {
	j, ctx := open(t, filepath.Join(t.TempDir(), "j")), t.Context()
	if _, _, err := j.Submit(ctx, job("1", "", "f")); err != nil {
		t.Fatal(err)
	}
	for i := range uint64(5) {
		if err := j.AddEvent(ctx, "1", Event{Sequence: i + 1, At: time.Now(), Body: []byte{byte(i)}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.AddEvent(ctx, "1", Event{Sequence: 5}); err == nil {
		t.Error("an event was doubled")
	}
	got, err := j.Events(ctx, "1", 2, 2)
	if err != nil || len(got) != 2 || got[0].Sequence != 3 || got[1].Sequence != 4 {
		t.Errorf("events: %v %v", got, err)
	}
}

func TestRetryIsBothOrNeither(t *testing.T) {
	path, ctx := filepath.Join(t.TempDir(), "j"), t.Context()
	j := open(t, path)
	first := job("1", "k", "f")
	if _, _, err := j.Submit(ctx, first); err != nil {
		t.Fatal(err)
	}
	first.State, first.Reason, first.Ended = Failed, "holder-lost", time.Now()
	next := job("2", "", "f")
	next.Attempt, next.RetryOf, next.NotBefore, next.Priority = 2, "1", time.Now().Add(time.Minute), 7
	// Another job has the id: nothing of it happens.
	taken := job("3", "", "f")
	if _, _, err := j.Submit(ctx, taken); err != nil {
		t.Fatal(err)
	}
	clash := next
	clash.ID = "3"
	if err := j.Retry(ctx, first, []byte("bundle"), clash); err == nil {
		t.Fatal("an attempt takes another job's place")
	}
	if got, err := j.Job(ctx, "1"); err != nil || got.State != Queued || got.RetriedAs != "" || !got.Ended.IsZero() {
		t.Errorf("after a retry that failed: %+v %v", got, err)
	}
	if err := j.Retry(ctx, first, []byte("bundle"), next); err != nil {
		t.Fatal(err)
	}
	if err := j.Retry(ctx, first, nil, next); !errors.Is(err, ErrConflict) {
		t.Errorf("a job is retried twice: %v", err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	j = open(t, path)
	if got, err := j.Job(ctx, "1"); err != nil || got.State != Failed || got.RetriedAs != "2" || got.Attempt != 1 {
		t.Errorf("the first attempt: %+v %v", got, err)
	}
	if got, err := j.Job(ctx, "2"); err != nil || got.Attempt != 2 || got.RetryOf != "1" || !got.NotBefore.Equal(next.NotBefore) || got.Priority != 7 {
		t.Errorf("the second attempt: %+v %v", got, err)
	}
	if b, err := j.Bundle(ctx, "1"); err != nil || string(b) != "bundle" {
		t.Errorf("the first attempt's bundle: %q %v", b, err)
	}
	// The key answers with the job that was submitted, also after a restart.
	if got, isNew, err := j.Submit(ctx, job("9", "k", "f")); err != nil || isNew || got.ID != "1" {
		t.Errorf("the same key again: %v %v %v", got.ID, isNew, err)
	}
	if _, _, err := j.Submit(ctx, job("9", "k", "other")); !errors.Is(err, ErrConflict) {
		t.Errorf("the same key with another file: %v", err)
	}
	failed, err := j.JobsIn(ctx, Failed, "", 10)
	if err != nil || len(failed) != 1 || failed[0].ID != "1" {
		t.Errorf("failed jobs: %v %v", failed, err)
	}
	queued, err := j.JobsIn(ctx, Queued, "3", 10)
	if err != nil || len(queued) != 1 || queued[0].ID != "2" {
		t.Errorf("queued jobs before 3: %v %v", queued, err)
	}
}

// TestRacingSubmissions has one of many with the same key win.
func TestRacingSubmissions(t *testing.T) {
	j, ctx := open(t, filepath.Join(t.TempDir(), "j")), t.Context()
	var wg sync.WaitGroup
	var won atomic.Int64
	ids := make([]string, 16)
	for i := range ids {
		wg.Go(func() {
			got, isNew, err := j.Submit(ctx, job(fmt.Sprint(i), "k", "f"))
			if err != nil {
				t.Error(err)
			}
			if isNew {
				won.Add(1)
			}
			ids[i] = got.ID
		})
	}
	wg.Wait()
	if won.Load() != 1 || len(slices.Compact(ids)) != 1 {
		t.Errorf("%d won: %v", won.Load(), ids)
	}
}

// TestFirstSchema reads a journal that an agent of the first schema wrote.
func TestFirstSchema(t *testing.T) {
	path, ctx := filepath.Join(t.TempDir(), "j"), t.Context()
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range []string{
		`CREATE TABLE jobs (id TEXT PRIMARY KEY, name TEXT NOT NULL, idempotency_key TEXT, file_digest TEXT NOT NULL, job_file BLOB NOT NULL, plan BLOB NOT NULL,
			plan_digest TEXT NOT NULL, submitter TEXT NOT NULL, state TEXT NOT NULL, stage TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', message TEXT NOT NULL DEFAULT '',
			checks TEXT NOT NULL DEFAULT 'null', submitted INTEGER NOT NULL, ended INTEGER NOT NULL DEFAULT 0, exit_code INTEGER NOT NULL DEFAULT 0, bundle BLOB) STRICT`,
		`INSERT INTO jobs VALUES ('1', 'n', '', '', x'', x'', '', 'engineer/a', 'succeeded', 'run', '', '', 'null', 1, 2, 0, x'4142')`,
		"PRAGMA user_version = 1",
	} {
		if _, err := db.ExecContext(ctx, q); err != nil {
			t.Fatal(err)
		}
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	j := open(t, path)
	if got, err := j.Job(ctx, "1"); err != nil || got.Attempt != 1 || got.State != Succeeded {
		t.Errorf("%+v %v", got, err)
	}
	if b, err := j.Bundle(ctx, "1"); err != nil || string(b) != "AB" {
		t.Errorf("its bundle: %q %v", b, err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	if db, err = sql.Open("sqlite", path); err != nil {
		t.Fatal(err)
	}
	if _, err := db.ExecContext(ctx, "PRAGMA user_version = 3"); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if j, err := Open(path); err == nil {
		t.Error("a journal of a later schema is opened", j.Close())
	}
}
