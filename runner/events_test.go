package runner

import (
	"database/sql"
	"path/filepath"
	"slices"
	"testing"
	"time"

	_ "modernc.org/sqlite" // the journal's driver

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/runner/journal"
)

// TestEventsThatCouldNotBeWritten has a journal that takes no events for a while.
func TestEventsThatCouldNotBeWritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal.db")
	jnl, err := journal.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer jnl.Close()
	if _, _, err := jnl.Submit(t.Context(), journal.Job{ID: "job", Name: "n", JobFile: []byte("f"), Plan: []byte("p"), State: journal.Queued, Submitted: time.Now()}); err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("sqlite", "file:"+path+"?_pragma=busy_timeout(5000)")
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	exec := func(statement string) {
		if _, err := db.Exec(statement); err != nil {
			t.Fatal(err)
		}
	}
	f := newFeed("job", jnl)
	add := func(s bundle.Stage) error { return f.add(t.Context(), stageEvent(s, "done", 0, "")) }
	if err := add(bundle.StageAdmit); err != nil {
		t.Fatal(err)
	}
	exec("ALTER TABLE events RENAME TO away")
	for _, s := range []bundle.Stage{bundle.StageSandbox, bundle.StageCollect} {
		if add(s) == nil {
			t.Fatalf("event %s is said to be written", s)
		}
	}
	if f.settle(t.Context()) == nil {
		t.Fatal("nothing is said to be owed")
	}
	exec("ALTER TABLE away RENAME TO events")
	written := func() []uint64 {
		t.Helper()
		events, err := jnl.Events(t.Context(), "job", 0, 10)
		if err != nil {
			t.Fatal(err)
		}
		var out []uint64
		for _, e := range events {
			out = append(out, e.Sequence)
		}
		return out
	}
	told := func() []uint64 {
		var out []uint64
		events, _, _ := f.after(0)
		for _, e := range events {
			out = append(out, e.GetSequence())
		}
		return out
	}
	if err := f.settle(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, want := written(), told(); len(got) != 3 || !slices.Equal(got, want) {
		t.Errorf("the journal has events %v, watchers were told %v", got, want)
	}
	if err := add(bundle.StageVerify); err != nil {
		t.Fatal(err)
	}
	if got, want := written(), told(); len(got) != 4 || !slices.Equal(got, want) {
		t.Errorf("the journal has events %v, watchers were told %v", got, want)
	}
}
