package runner

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/bootkey"
	"github.com/coffer-run/coffer/runner/jobspec"
	"github.com/coffer-run/coffer/runner/journal"
	"github.com/coffer-run/coffer/runner/logs"
)

func TestValues(t *testing.T) {
	key := bootkey.New()
	dir := filepath.Join(t.TempDir(), "values")
	v, err := OpenValues(dir, key)
	if err != nil {
		t.Fatal(err)
	}
	env := map[string]string{"TOKEN": "a-secret-value"}
	kept := submission{Submitter: "user/ada", Attempt: 2, RetryOf: "first", Env: env}
	p := plan.Sum([]byte("plan"))
	if err := v.keep("job", p, kept); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "job"))
	if err != nil || bytes.Contains(b, []byte("secret")) || bytes.Contains(b, []byte("TOKEN")) || bytes.Contains(b, []byte("ada")) {
		t.Errorf("the file is readable: %v", err)
	}
	again, err := OpenValues(dir, key)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := again.get("job", p); err != nil || !reflect.DeepEqual(got, kept) {
		t.Errorf("after a restart: %v %v", got, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "other"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	booted, err := OpenValues(dir, bootkey.New())
	if err != nil {
		t.Fatal(err)
	}
	changed := bytes.Clone(b)
	changed[len(changed)/2] ^= 1
	if err := os.WriteFile(filepath.Join(dir, "changed"), changed, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, get := range map[string]func() (submission, error){
		"another job's":     func() (submission, error) { return v.get("other", p) },
		"another plan's":    func() (submission, error) { return v.get("job", plan.Sum([]byte("x"))) },
		"after a boot":      func() (submission, error) { return booted.get("job", p) },
		"changed":           func() (submission, error) { return v.get("changed", p) },
		"missing":           func() (submission, error) { return v.get("missing", p) },
		"nothing was kept":  func() (submission, error) { return (*Values)(nil).get("job", p) },
		"the zero value's":  func() (submission, error) { return (&Values{dir: dir}).get("job", p) },
		"too large to read": func() (submission, error) { return v.get("large", p) },
	} {
		if name == "too large to read" {
			if err := os.WriteFile(filepath.Join(dir, "large"), make([]byte, maxValues+1), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := get(); err == nil {
			t.Errorf("%s: %v", name, got)
		}
	}
	end := journal.Job{ID: "job", State: journal.Failed, Reason: "exit-code", ExitCode: 3}
	if err := v.conclude("job", p, end); err != nil {
		t.Fatal(err)
	}
	if got, err := v.get("job", p); err != nil || got.Outcome == nil || got.Outcome.ExitCode != 3 || got.Submitter != kept.Submitter {
		t.Errorf("with an outcome: %+v %v", got, err)
	}
	if err := v.conclude("missing", p, end); err == nil {
		t.Error("an outcome is kept of a job of which nothing is")
	}
	if err := v.only(map[string]bool{"job": true}); err != nil {
		t.Fatal(err)
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) != 1 {
		t.Errorf("left: %v %v", files, err)
	}
	if err := errors.Join(v.drop("job"), v.drop("job")); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "job")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("dropped values are there: %v", err)
	}
}

func TestNextAttempt(t *testing.T) {
	a := &Agent{log: slog.New(slog.DiscardHandler)}
	a.ctx, a.stop = context.WithCancelCause(t.Context())
	job := func(attempt int) *Job {
		j := newJob("first", "user/ada")
		j.attempt = attempt
		if attempt > 1 {
			j.id, j.retryOf = "later", "first"
		}
		j.plan.Retry = &plan.Retry{Limit: 2}
		j.spec.Retry = &jobspec.Retry{Limit: 9, OnExitCodes: []int{75}, OnEvents: []string{"holder-lost"}, Backoff: jobspec.Duration(time.Minute)}
		return j
	}
	failed := func(reason string, code int) journal.Job {
		return journal.Job{State: journal.Failed, Reason: reason, ExitCode: code}
	}
	for name, row := range map[string]struct {
		attempt int
		end     journal.Job
		again   bool
	}{
		"the first fails":                {1, failed("exit-code", 75), true},
		"the second fails":               {2, failed("holder-lost", 0), true},
		"the plan's limit, not the file": {3, failed("exit-code", 75), false},
		"it succeeds":                    {1, journal.Job{State: journal.Succeeded, Reason: "holder-lost"}, false},
		"it is refused":                  {1, journal.Job{State: journal.Refused, Reason: "holder-lost"}, false},
		"it is cancelled":                {1, journal.Job{State: journal.Cancelled, Reason: "holder-lost"}, false},
		"it is revoked":                  {1, failed("revoked", 0), false},
		"another exit code":              {1, failed("exit-code", 1), false},
	} {
		n := a.next(job(row.attempt), row.end)
		if (n != nil) != row.again {
			t.Errorf("%s: %v", name, n)
			continue
		}
		if n == nil {
			continue
		}
		pause := time.Duration(row.attempt) * time.Minute
		if n.attempt != row.attempt+1 || n.retryOf != "first" || n.id == "first" || n.submitter != "user/ada" ||
			n.holder != nil || n.sandbox != nil || n.notBefore.Before(time.Now().Add(pause-time.Second)) || n.notBefore.After(time.Now().Add(pause)) {
			t.Errorf("%s: %+v", name, n)
		}
	}
	a.stop(errShutdown)
	if n := a.next(job(1), failed("holder-lost", 0)); n != nil {
		t.Error("an agent that ends begins another attempt")
	}
}

func TestMayHaveKeys(t *testing.T) {
	for stage, want := range map[bundle.Stage]bool{
		bundle.StageAdmit: false, bundle.StageApproval: false, queueStage: false, bundle.StageSandbox: false, bundle.StageCollect: false, bundle.StageVerify: false,
		bundle.StageRelease: true, bundle.StageDecrypt: true, bundle.StageStart: true, bundle.StageRun: true, "lunch": true, "": true,
	} {
		j := newJob("j", "user/ada")
		j.at = stage
		if got := j.mayHaveKeys(); got != want {
			t.Errorf("at %q: %v", stage, got)
		}
		j.record.Releases = []string{"a release"}
		if !j.mayHaveKeys() {
			t.Errorf("at %q with a release: none", stage)
		}
	}
}

// TestFeedKeepsLinesOnDisk follows a job's events with lines that lie in its log.
func TestFeedKeepsLinesOnDisk(t *testing.T) {
	store, err := logs.Open(t.TempDir(), bootkey.New(), logs.DefaultMaxBytes)
	if err != nil {
		t.Fatal(err)
	}
	l, err := store.Create("job", 1<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	jnl, err := journal.Open(filepath.Join(t.TempDir(), "j"))
	if err != nil {
		t.Fatal(err)
	}
	defer jnl.Close()
	f := newFeed("job", jnl)
	f.keep(l)
	var want strings.Builder
	for i := range 3000 {
		line := strings.Repeat(string(rune('a'+i%26)), 1000) + "\n"
		if err := f.addLog(logs.Entry{Stream: logs.Stdout, Offset: int64(want.Len()), At: time.Now(), Data: []byte(line)}, func(err error, _ func() error) error { return err }); err != nil {
			t.Fatal(err)
		}
		want.WriteString(line)
		if i == 1500 {
			if err := f.add(t.Context(), &agentv1.WatchResponse{Event: &agentv1.WatchResponse_Queue{Queue: &agentv1.QueueEvent{Position: 1}}}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if f.bytes != 0 {
		t.Errorf("%d bytes of lines are in memory", f.bytes)
	}
	var got strings.Builder
	positions := 0
	for seq := uint64(0); ; {
		events, closed, _ := f.after(seq)
		size := 0
		for _, e := range events {
			if e.GetSequence() <= seq {
				t.Fatal("a sequence number does not rise")
			}
			seq = e.GetSequence()
			got.Write(e.GetLog().GetData())
			size += len(e.GetLog().GetData())
			positions += int(e.GetQueue().GetPosition())
		}
		if size > maxAfterBytes+logs.MaxData {
			t.Errorf("%d bytes at once", size)
		}
		if len(events) == 0 {
			if closed {
				t.Error("the feed is closed")
			}
			break
		}
	}
	if got.String() != want.String() || positions != 1 {
		t.Errorf("%d of %d bytes, %d positions", got.Len(), want.Len(), positions)
	}
	if err := f.forget(); err != nil {
		t.Error(err)
	}
	if events, _, _ := f.after(0); len(events) == 0 || len(events[0].GetLog().GetData()) != 0 {
		t.Error("lines of a log that is closed are there")
	}
}
