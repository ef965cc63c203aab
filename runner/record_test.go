package runner

import (
	"bytes"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/journal"
)

// An agent that takes up a job which had ended finds the record that is or may be in the
// evidence log, byte for byte, and takes none of another job, plan or end.
func TestOneRecordOfAJob(t *testing.T) {
	jnl, err := journal.Open(filepath.Join(t.TempDir(), "journal.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer jnl.Close()
	if _, _, err := jnl.Submit(t.Context(), journal.Job{ID: "job", Name: "n", JobFile: []byte("f"), Plan: []byte("p"), State: journal.Queued, Submitted: time.Now()}); err != nil {
		t.Fatal(err)
	}
	a := &Agent{Deps: Deps{Journal: jnl}, log: slog.New(slog.DiscardHandler), ctx: t.Context()}
	j := newJob("job", "user/ada")
	j.digest = plan.Sum([]byte("p"))
	end := journal.Job{ID: "job", State: journal.Failed, Stage: "run", Reason: "exit-code", ExitCode: 3}
	if kept, _ := a.keptRecord(t.Context(), j, end); kept != nil {
		t.Errorf("before there is one: %s", kept)
	}
	record := func(job string, p plan.Digest, o bundle.Outcome) []byte {
		t.Helper()
		b := bundle.NewBuilder()
		if err := b.Add(bundle.JobFile, []byte("<a & b>")); err != nil {
			t.Fatal(err)
		}
		if _, err := b.Statement(job, p, o, []bundle.Step{{Stage: bundle.StageRun, StartUnixNano: 1, Outcome: bundle.StepDone}}); err != nil {
			t.Fatal(err)
		}
		out, err := b.Finish([]byte("signature"), nil)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	failed := bundle.Outcome{State: bundle.Failed, Stage: bundle.StageRun, Reason: "exit-code", ExitCode: 3}
	for name, row := range map[string]struct {
		kept []byte
		used bool
	}{
		"of this end":      {record("job", j.digest, failed), true},
		"of another job":   {record("other", j.digest, failed), false},
		"of another plan":  {record("job", plan.Sum([]byte("q")), failed), false},
		"of a success":     {record("job", j.digest, bundle.Outcome{State: bundle.Succeeded, Stage: bundle.StageRun, Reason: "exit-code", ExitCode: 3}), false},
		"of another code":  {record("job", j.digest, bundle.Outcome{State: bundle.Failed, Stage: bundle.StageRun, Reason: "exit-code", ExitCode: 4}), false},
		"of another cause": {record("job", j.digest, bundle.Outcome{State: bundle.Failed, Stage: bundle.StageRun, Reason: "deadline", ExitCode: 3}), false},
		"of another stage": {record("job", j.digest, bundle.Outcome{State: bundle.Failed, Stage: bundle.StageStart, Reason: "exit-code", ExitCode: 3}), false},
		"that is none":     {[]byte("{}"), false},
	} {
		t.Run(name, func(t *testing.T) {
			a.keepRecord(t.Context(), j, row.kept)
			kept, st := a.keptRecord(t.Context(), j, end)
			if row.used != (kept != nil) || row.used && (!bytes.Equal(kept, row.kept) || st.JobID != "job") {
				t.Errorf("%q, %+v", kept, st)
			}
		})
	}
}
