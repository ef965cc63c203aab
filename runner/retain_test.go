package runner

import (
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/bootkey"
	"github.com/coffer-run/coffer/runner/journal"
	"github.com/coffer-run/coffer/runner/logs"
)

// A record goes when its time is over, with the log, and never before the evidence
// log has it.
func TestSweep(t *testing.T) {
	jnl, err := journal.Open(filepath.Join(t.TempDir(), "j"))
	if err != nil {
		t.Fatal(err)
	}
	defer jnl.Close()
	store, err := logs.Open(t.TempDir(), bootkey.New(), logs.DefaultMaxBytes)
	if err != nil {
		t.Fatal(err)
	}
	ctx, now := t.Context(), time.Now()
	a := &Agent{Deps: Deps{Journal: jnl, Logs: store}, log: slog.New(slog.DiscardHandler)}
	record := func(id string, receipt string) []byte {
		b := bundle.NewBuilder()
		if err := b.Add(bundle.JobFile, []byte("name: x\n")); err != nil {
			t.Fatal(err)
		}
		if _, err := b.Statement(id, plan.Sum(nil), bundle.Outcome{State: bundle.Succeeded, Stage: bundle.StageRun}, []bundle.Step{{Stage: bundle.StageRun, StartUnixNano: 1, Outcome: bundle.StepDone}}); err != nil {
			t.Fatal(err)
		}
		var logged *bundle.Log
		if receipt != "" {
			logged = &bundle.Log{Receipt: receipt}
		}
		out, err := b.Finish(nil, logged)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	for id, c := range map[string]struct {
		until time.Time
		body  []byte
	}{
		"over": {now.Add(-time.Second), record("over", "a.b.c")}, "unlogged": {now.Add(-time.Second), record("unlogged", "")},
		"unreadable": {now.Add(-time.Second), []byte("{")}, "none": {now.Add(-time.Second), nil}, "later": {now.Add(time.Hour), record("later", "a.b.c")}, "kept": {time.Time{}, record("kept", "a.b.c")},
	} {
		row := journal.Job{ID: id, Name: "n", State: journal.Queued, Submitted: now, Plan: []byte("p"), JobFile: []byte("f")}
		if _, _, err := jnl.Submit(ctx, row); err != nil {
			t.Fatal(err)
		}
		row.State, row.Ended, row.KeepUntil = journal.Succeeded, now, c.until
		if err := jnl.End(ctx, row, c.body); err != nil {
			t.Fatal(err)
		}
		l, err := store.Create(id, 1<<20, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Forget(); err != nil {
			t.Fatal(err)
		}
	}
	err = a.sweep(ctx, now)
	for _, part := range []string{"job unlogged: its record stays", "job unreadable", "job none: its log stays"} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%q is not said: %v", part, err)
		}
	}
	for _, id := range []string{"over", "unlogged", "unreadable", "none", "later", "kept"} {
		_, berr := jnl.Bundle(ctx, id)
		_, lerr := store.Segments(id)
		if gone := id == "over"; gone != errors.Is(berr, journal.ErrRemoved) || gone != errors.Is(lerr, logs.ErrNotKept) {
			t.Errorf("%s: bundle: %v, log: %v", id, berr, lerr)
		}
	}
	if err := a.sweep(ctx, now.Add(2*time.Hour)); err == nil || strings.Contains(err.Error(), "later") {
		t.Errorf("a second sweep: %v", err)
	}
	if _, err := jnl.Bundle(ctx, "later"); !errors.Is(err, journal.ErrRemoved) {
		t.Errorf("when its time is over too: %v", err)
	}
	l, err := store.Create("live", 1<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Remove("live"); err == nil {
		t.Error("a log that is written is removed")
	}
	if err := errors.Join(l.Forget(), store.Remove("live"), store.Remove("live")); err != nil {
		t.Error(err)
	}
	if err := store.Remove("../x"); err == nil {
		t.Error("a path is removed")
	}
	ended := time.Unix(1000, 0)
	j := newJob("j", "user/ada")
	if !j.keepUntil(ended).IsZero() {
		t.Error("a job that says nothing has an end to its record")
	}
	j.plan.Evidence = &plan.Retention{RetainSeconds: 60}
	if got := j.keepUntil(ended); !got.Equal(time.Unix(1060, 0)) {
		t.Errorf("until %v", got)
	}
}
