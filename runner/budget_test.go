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
