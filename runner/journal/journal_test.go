package journal

import (
	"errors"
	"path/filepath"
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
	if err := errors.Join(j.Enter(ctx, "1", "collect"), j.Leave(ctx, "1", "collect", map[string]int{"n": 7})); err != nil {
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
	var data map[string]int
	if err := j.Entry(ctx, "1", "collect", &data); err != nil || data["n"] != 7 {
		t.Errorf("entry: %v %v", data, err)
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
