package runner

import (
	"context"
	"errors"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
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

// used is for how long this attempt has had its room.
func (j *Job) used() time.Duration {
	if !j.roomAt.IsZero() {
		return time.Since(j.roomAt)
	}
	// Nothing that was kept outlived the agent that began it.
	for _, s := range j.timeline {
		if s.Stage == bundle.StageSandbox {
			return time.Since(time.Unix(0, s.StartUnixNano))
		}
	}
	return 0
}

// keepSpent notes when the job got its room, or with the zero time that it has none,
// where the agent after this one finds it and the node's disk cannot change it: an
// attempt that begins again does not get its time anew.
func (a *Agent) keepSpent(j *Job, began time.Time) error {
	j.roomAt = began
	if _, bounded := j.plan.BudgetSeconds(); !bounded || a.Values == nil {
		return nil
	}
	return a.Values.edit(j.id, j.digest, func(s *submission) { s.Spent, s.Began = j.spent, began })
}

// recallSpent reads back what was used of the budget. Where that is lost it counts as
// all of it.
func (a *Agent) recallSpent(j *Job) {
	kept, err := a.Values.get(j.id, j.digest)
	s, bounded := j.plan.BudgetSeconds()
	switch {
	case err == nil:
		j.spent, j.roomAt, j.before = kept.Spent, kept.Began, kept.Before
	case bounded && j.attempt > 1:
		j.spent = time.Duration(s) * time.Second
	}
}

// attemptWord is what the record says of this attempt.
func (j *Job) attemptWord() *bundle.Attempt {
	_, bounded := j.plan.BudgetSeconds()
	if !bounded && j.plan.Attempts() == 1 {
		return nil
	}
	w := &bundle.Attempt{Number: j.attempt, First: j.retryOf, Before: j.before}
	if bounded {
		w.SpentNanos, w.UsedNanos = j.spent.Nanoseconds(), j.used().Nanoseconds()
	}
	return w
}

// statementOf is the digest of a record's statement, empty if there is none.
func statementOf(body []byte) plan.Digest {
	b, err := bundle.Parse(body)
	if err != nil {
		return ""
	}
	return plan.Sum(b.Statement)
}
