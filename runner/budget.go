package runner

import (
	"context"
	"errors"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
)

var errBudget = errors.New("the budget of its plan is spent")

// spending does work, which is what an attempt does once it has room, for as long as
// the job's budget lasts. The end of the budget ends it as a cancellation does.
func (j *Job) spending(ctx context.Context, work func(context.Context) error) error {
	left, bounded := j.budgetLeft()
	if !bounded {
		return work(ctx)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	t := time.AfterFunc(left, func() { cancel(errBudget) })
	defer t.Stop()
	return work(ctx)
}

// budgetLeft is what is left of the job's budget, and false if it has none.
func (j *Job) budgetLeft() (time.Duration, bool) {
	s, bounded := j.plan.BudgetSeconds()
	if !bounded {
		return 0, false
	}
	return time.Duration(s)*time.Second - j.spent - j.used(), true
}

// used is for how long this attempt has had its room. An attempt that an earlier
// agent began does not get its time anew.
func (j *Job) used() time.Duration {
	for _, s := range j.timeline {
		if s.Stage == bundle.StageSandbox {
			return time.Since(time.Unix(0, s.StartUnixNano))
		}
	}
	return 0
}

// recallSpent reads back what the attempts before this one used. Where that is lost
// it counts as all of it.
func (a *Agent) recallSpent(j *Job) {
	s, bounded := j.plan.BudgetSeconds()
	if !bounded {
		return
	}
	switch kept, err := a.Values.get(j.id, j.digest); {
	case err == nil:
		j.spent = kept.Spent
	case j.attempt > 1:
		j.spent = time.Duration(s) * time.Second
	}
}
