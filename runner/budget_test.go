package runner

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/bootkey"
)

func withBudget(seconds int64, attempt int) *Job {
	j := newJob("first", "user/ada")
	j.attempt = attempt
	j.plan.Budget = &plan.Budget{Seconds: seconds}
	j.digest = plan.Sum([]byte("plan"))
	return j
}

func TestBudgetEndsAnAttempt(t *testing.T) {
	for name, c := range map[string]struct {
		budget, spent, before int64 // seconds; before is how long ago it got its room
		work, want            time.Duration
		ends                  error
	}{
		"shorter than the budget":   {60, 0, 0, 59 * time.Second, 59 * time.Second, nil},
		"longer than the budget":    {60, 0, 0, time.Hour, time.Minute, errBudget},
		"a later attempt":           {60, 45, 0, time.Hour, 15 * time.Second, errBudget},
		"taken up after a restart":  {60, 0, 50, time.Hour, 10 * time.Second, errBudget},
		"taken up, another attempt": {60, 5, 50, time.Hour, 5 * time.Second, errBudget},
		"spent already":             {60, 60, 0, time.Hour, 0, errBudget},
		"long over":                 {60, 90, 90, time.Hour, 0, errBudget},
	} {
		synctest.Test(t, func(t *testing.T) {
			j := withBudget(c.budget, 1)
			j.spent = time.Duration(c.spent) * time.Second
			if c.before > 0 {
				j.timeline = []bundle.Step{{Stage: bundle.StageSandbox, StartUnixNano: time.Now().Add(-time.Duration(c.before) * time.Second).UnixNano()}}
			}
			began := time.Now()
			err := j.spending(t.Context(), func(ctx context.Context) error {
				select {
				case <-ctx.Done():
					return context.Cause(ctx)
				case <-time.After(c.work):
					return nil
				}
			})
			if !errors.Is(err, c.ends) || time.Since(began) != c.want {
				t.Errorf("%s: %v after %v, want %v after %v", name, err, time.Since(began), c.ends, c.want)
			}
		})
	}
	j := newJob("first", "user/ada")
	if err := j.spending(t.Context(), func(ctx context.Context) error { return ctx.Err() }); err != nil {
		t.Errorf("without a budget: %v", err)
	}
}

// An attempt that begins again after a restart does not get its time anew; what it waits
// for room does not count.
func TestBudgetOutlivesTheAgent(t *testing.T) {
	v, err := OpenValues(filepath.Join(t.TempDir(), "values"), bootkey.New())
	if err != nil {
		t.Fatal(err)
	}
	a := &Agent{Deps: Deps{Values: v}}
	synctest.Test(t, func(t *testing.T) {
		j := withBudget(60, 1)
		if err := v.keep(j.id, j.digest, submission{Submitter: j.submitter, Attempt: 1, Env: map[string]string{"A": "1"}}); err != nil {
			t.Fatal(err)
		}
		must := func(err error) {
			if err != nil {
				t.Fatal(err)
			}
		}
		left := func(j *Job, want time.Duration) {
			t.Helper()
			if got, bounded := j.budgetLeft(); !bounded || got.Round(time.Millisecond) != want {
				t.Fatalf("%v left, want %v", got, want)
			}
		}
		restarted := func() *Job {
			j := withBudget(60, 1)
			a.recallSpent(j)
			return j
		}
		must(a.keepSpent(j, time.Now()))
		time.Sleep(20 * time.Second)
		left(j, 40*time.Second)
		// Another agent finds it, and gives it no room for an hour; then a third does.
		j = restarted()
		left(j, 40*time.Second)
		j.spent += j.used()
		must(a.keepSpent(j, time.Time{}))
		time.Sleep(time.Hour)
		left(j, 40*time.Second)
		j = restarted()
		left(j, 40*time.Second)
		must(a.keepSpent(j, time.Now()))
		time.Sleep(15 * time.Second)
		left(restarted(), 25*time.Second)
		// The record says the same, and what else was kept is still there.
		w := restarted().attemptWord()
		if w == nil || w.Number != 1 || w.SpentNanos != int64(20*time.Second) || time.Duration(w.UsedNanos).Round(time.Millisecond) != 15*time.Second {
			t.Errorf("the record says %+v", w)
		}
		if kept, err := v.get(j.id, j.digest); err != nil || kept.Env["A"] != "1" || kept.Submitter != j.submitter {
			t.Errorf("kept: %+v, %v", kept, err)
		}
		if w := newJob("x", "user/ada").attemptWord(); w != nil {
			t.Errorf("of a plan without attempts: %+v", w)
		}
	})
}

// What earlier attempts used is known after a restart, or counts as all of it.
func TestBudgetIsRecalled(t *testing.T) {
	v, err := OpenValues(filepath.Join(t.TempDir(), "values"), bootkey.New())
	if err != nil {
		t.Fatal(err)
	}
	a := &Agent{Deps: Deps{Values: v}}
	first, second := withBudget(60, 1), withBudget(60, 2)
	second.id = "second"
	if err := v.keep("second", second.digest, submission{Submitter: "user/ada", Attempt: 2, Spent: 42 * time.Second}); err != nil {
		t.Fatal(err)
	}
	lost := withBudget(60, 2)
	lost.id = "lost"
	for name, c := range map[string]struct {
		job  *Job
		want time.Duration
	}{"a first attempt": {first, 0}, "a second attempt": {second, 42 * time.Second}, "a second whose values are lost": {lost, time.Minute}} {
		if a.recallSpent(c.job); c.job.spent != c.want {
			t.Errorf("%s: %v", name, c.job.spent)
		}
	}
}
