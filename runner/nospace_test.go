package runner

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/runner/bootkey"
	"github.com/coffer-run/coffer/runner/jobspec"
	"github.com/coffer-run/coffer/runner/journal"
)

// smallDisk mounts a disk of some bytes, and returns what fills it and what makes room.
func smallDisk(t *testing.T, size int) (dir string, fill, free func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("root is needed to mount a small disk")
	}
	dir = t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	filler := filepath.Join(dir, "filler")
	fill = func() {
		f, err := os.OpenFile(filler, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for err == nil {
			_, err = f.Write(make([]byte, 4096))
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
	}
	free = func() {
		if err := os.Remove(filler); err != nil {
			t.Fatal(err)
		}
	}
	return dir, fill, free
}

// Wherever a stage meets a disk that has no room, the job ends for that reason and no
// other, is tried again where its file asks for that, and the journal is whole.
func TestAFullDiskIsAReason(t *testing.T) {
	dir, fill, free := smallDisk(t, 1<<20)
	jnl, err := journal.Open(filepath.Join(dir, "journal"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { jnl.Close() }()
	values, err := OpenValues(filepath.Join(dir, "values"), bootkey.New())
	if err != nil {
		t.Fatal(err)
	}
	row := journal.Job{ID: "job", FileDigest: plan.Sum(nil), JobFile: []byte("f"), Plan: []byte("p"), PlanDigest: plan.Sum(nil), Submitter: "user/ada", State: journal.Queued, Stage: "admit"}
	if _, _, err := jnl.Submit(t.Context(), row); err != nil {
		t.Fatal(err)
	}
	if err := values.keep("job", plan.Sum(nil), submission{Submitter: "user/ada"}); err != nil {
		t.Fatal(err)
	}
	fill()
	// As often as it takes: SQLite has a page or two left.
	until := func(f func() error) error {
		for range 1000 {
			if err := f(); err != nil {
				return err
			}
		}
		return nil
	}
	a := &Agent{log: slog.New(slog.DiscardHandler)}
	retry := &jobspec.Retry{Limit: 1}
	for name, err := range map[string]error{
		"a stage begins":            until(func() error { return jnl.Enter(t.Context(), "job", "sandbox") }),
		"a stage leaves its record": until(func() error { return jnl.Leave(t.Context(), "job", "sandbox", make([]byte, 1<<16)) }),
		"a record takes another's":  until(func() error { return jnl.Keep(t.Context(), "job", "release", make([]byte, 1<<16)) }),
		"the next attempt is journaled": until(func() error {
			next := row
			next.ID = "next"
			return jnl.Retry(t.Context(), journal.Job{ID: "job", State: journal.Failed}, make([]byte, 1<<16), next)
		}),
		"its time is noted": until(func() error {
			return values.edit("job", plan.Sum(nil), func(s *submission) { s.Env = map[string]string{"A": strings.Repeat("x", 1<<16)} })
		}),
		"its run folder is full":             room(dir),
		"its holder has no room":             &holdapi.Error{Op: "reseal", Code: holdapi.CodeNoSpace},
		"its cache or quota is used up":      fmt.Errorf("hold s3://b/x: %w", unix.EDQUOT),
		"containerd went away meanwhile too": errors.Join(io.EOF, unix.ENOSPC),
	} {
		end := a.outcome(t.Context(), newJob("job", "user/ada"), fmt.Errorf("sandbox: %w", err))
		if end.State != journal.Failed || end.Reason != "no-space" || !retry.After(end.Reason, 0) {
			t.Errorf("%s: %s, %s: %s", name, end.State, end.Reason, end.Message)
		}
	}
	if _, _, err := jnl.Submit(t.Context(), journal.Job{ID: "other", Plan: make([]byte, 1<<16), JobFile: []byte("f"), State: journal.Queued}); !NoSpace(err) {
		t.Errorf("a job is submitted: %v", err)
	}
	got, err := jnl.Job(t.Context(), "job")
	if err != nil || got.State.Final() || got.Submitter != "user/ada" {
		t.Errorf("what the journal has while the disk is full: %+v, %v", got, err)
	}
	free()
	if s, err := values.get("job", plan.Sum(nil)); err != nil || s.Submitter != "user/ada" {
		t.Errorf("what is kept of the job: %+v, %v", s, err)
	}
	if err := errors.Join(jnl.Close(), os.RemoveAll(filepath.Join(dir, "values"))); err != nil {
		t.Fatal(err)
	}
	if jnl, err = journal.Open(filepath.Join(dir, "journal")); err != nil {
		t.Fatal(err)
	}
	if err := jnl.End(t.Context(), journal.Job{ID: "job", State: journal.Failed, Reason: "no-space"}, []byte("bundle")); err != nil {
		t.Errorf("there is room again: %v", err)
	}
}

// What says how a job ended otherwise is not hidden by a disk that is full as well.
func TestAFullDiskHidesNoOtherReason(t *testing.T) {
	a := &Agent{log: slog.New(slog.DiscardHandler)}
	var l check.List
	l.Fail("x", "a", "b", "")
	for want, err := range map[string]error{
		"cancelled":      errCancelled,
		"verify-refused": check.Refuse("verify", l),
		"exit-code":      &exitError{3},
		"holder-lost":    errHolderLost,
		"budget":         errBudget,
		"internal":       &holdapi.Error{Code: holdapi.CodeIO, Message: "no space left on device"},
	} {
		if want != "internal" {
			err = errors.Join(err, unix.ENOSPC)
		}
		if end := a.outcome(t.Context(), newJob("job", "user/ada"), err); end.Reason != want {
			t.Errorf("%v: %s, want %s", err, end.Reason, want)
		}
	}
	if err := room(t.TempDir()); err != nil {
		t.Error(err)
	}
	if err := room("/no/such/folder"); err != nil {
		t.Errorf("a folder that is not there says of its room: %v", err)
	}
}

// signals has a value once something was written to it.
type signals chan struct{}

func (s signals) Write(b []byte) (int, error) {
	select {
	case s <- struct{}{}:
	default:
	}
	return len(b), nil
}

// A job that is to be tried again on a full disk waits for room, and keeps its attempt.
func TestAFullDiskKeepsTheNextAttempt(t *testing.T) {
	dir, fill, free := smallDisk(t, 256<<10)
	values, err := OpenValues(filepath.Join(dir, "values"), bootkey.New())
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancelCause(t.Context())
	defer stop(nil)
	waits := make(signals, 1)
	a := &Agent{Deps: Deps{Journal: journalWithJob(t), Values: values}, log: slog.New(slog.NewTextHandler(waits, nil)), ctx: ctx, endings: map[Ending]uint64{}}
	j := newJob("job", "user/ada")
	j.digest = plan.Sum([]byte("p"))
	j.plan.Retry, j.spec.Retry = &plan.Retry{Limit: 1}, &jobspec.Retry{Limit: 1}
	j.canonical, j.redacted = []byte("p"), []byte("f")
	fill()
	next := make(chan *Job, 1)
	go func() {
		next <- a.end(t.Context(), j, journal.Job{ID: "job", State: journal.Failed, Reason: "no-space", Ended: time.Now()}, nil)
	}()
	<-waits
	free()
	n := <-next
	if n == nil {
		t.Fatal("no further attempt")
	}
	if s, err := values.get(n.id, n.digest); err != nil || s.Attempt != 2 || s.RetryOf != "job" {
		t.Errorf("what is kept of the next attempt: %+v, %v", s, err)
	}
	if got, err := a.Journal.Job(t.Context(), n.id); err != nil || got.State != journal.Queued {
		t.Errorf("the next attempt in the journal: %+v, %v", got, err)
	}
}
