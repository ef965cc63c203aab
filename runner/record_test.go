package runner

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/bootkey"
	"github.com/coffer-run/coffer/runner/journal"
)

// An agent that takes up a job which had ended finds the record that is or may be in the
// evidence log, byte for byte, and takes none of another job, plan or end.
func TestOneRecordOfAJob(t *testing.T) {
	jnl := journalWithJob(t)
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
			a.keepRecord(t.Context(), j, end, row.kept)
			kept, st := a.keptRecord(t.Context(), j, end)
			if row.used != (kept != nil) || row.used && (!bytes.Equal(kept, row.kept) || st.JobID != "job") {
				t.Errorf("%q, %+v", kept, st)
			}
		})
	}
}

// A record is not logged before the end that it tells of is kept: on a full disk it waits.
func TestARecordWaitsForItsEnd(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("root is needed to mount a small disk")
	}
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(disk, unix.MNT_DETACH) //nolint:errcheck // the test is over
	values, err := OpenValues(filepath.Join(disk, "values"), bootkey.New())
	if err != nil {
		t.Fatal(err)
	}
	jnl := journalWithJob(t)
	a := &Agent{Deps: Deps{Journal: jnl, Values: values}, log: slog.New(slog.DiscardHandler), ctx: t.Context()}
	j := newJob("job", "user/ada")
	j.digest = plan.Sum([]byte("p"))
	if err := values.keep("job", j.digest, submission{Submitter: "user/ada"}); err != nil {
		t.Fatal(err)
	}
	filler := filepath.Join(disk, "filler")
	if err := os.WriteFile(filler, make([]byte, 64<<10), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	end := journal.Job{ID: "job", State: journal.Succeeded, Stage: "run"}
	done := make(chan struct{})
	go func() {
		defer close(done)
		a.keepRecord(t.Context(), j, end, []byte("record"))
	}()
	time.Sleep(50 * time.Millisecond)
	var kept []byte
	if err := jnl.Entry(t.Context(), "job", recordEntry, &kept); !errors.Is(err, journal.ErrNotFound) {
		t.Errorf("while nothing has the end: %q, %v", kept, err)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	<-done
	if err := jnl.Entry(t.Context(), "job", recordEntry, &kept); err != nil || string(kept) != "record" {
		t.Errorf("%q, %v", kept, err)
	}
	if s, err := values.get("job", j.digest); err != nil || s.Outcome == nil || s.Outcome.State != journal.Succeeded {
		t.Errorf("%+v, %v", s, err)
	}
}
