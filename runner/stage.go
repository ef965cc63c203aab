package runner

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/containerd/errdefs"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/journal"
	"github.com/coffer-run/coffer/runner/remote"
	"github.com/coffer-run/coffer/runner/source"
)

// stage runs one stage between two journal entries and tells the watchers. f
// returns what the next stage takes, and a few words for people.
func stage[T any](ctx context.Context, a *Agent, j *Job, name bundle.Stage, f func(context.Context, *Job) (T, string, error)) (T, error) {
	var zero T
	if err := context.Cause(ctx); err != nil {
		return zero, err
	}
	j.at = name
	enter := a.Journal.Enter
	if name == bundle.StageApproval {
		enter = a.Journal.Wait
	}
	if err := enter(ctx, j.id, string(name)); err != nil {
		return zero, cause(ctx, err)
	}
	a.tell(ctx, j, stageEvent(name, "started", 0, ""))
	began := time.Now()
	v, detail, err := f(ctx, j)
	step := bundle.Step{Stage: name, StartUnixNano: began.UnixNano(), Nanos: time.Since(began).Nanoseconds(), Outcome: bundle.StepDone}
	if err != nil {
		err = cause(ctx, err)
		step.Outcome, detail = bundle.StepFailed, err.Error()
	}
	j.step(step)
	a.tell(ctx, j, stageEvent(name, step.Outcome, step.Nanos, detail))
	a.log.InfoContext(ctx, "stage", slog.String("job", j.id), slog.String("stage", string(name)), slog.String("outcome", step.Outcome), slog.Duration("took", time.Duration(step.Nanos)))
	if err != nil {
		return zero, fmt.Errorf("%s: %w", name, err)
	}
	return v, nil
}

// with is a stage that takes in, what the stage before it returned.
func with[In, Out any](in In, f func(context.Context, *Job, In) (Out, string, error)) func(context.Context, *Job) (Out, string, error) {
	return func(ctx context.Context, j *Job) (Out, string, error) { return f(ctx, j, in) }
}

// cause is the reason of an error. A cancelled context is how a job is told to end.
func cause(ctx context.Context, err error) error {
	if c := context.Cause(ctx); c != nil && errors.Is(err, context.Canceled) {
		return c
	}
	return err
}

// step records how a stage went. Where a stage is repeated, the way begins anew
// there: what came after it the first time led nowhere.
func (j *Job) step(s bundle.Step) {
	for i := range j.timeline {
		if j.timeline[i].Stage == s.Stage {
			j.timeline = append(j.timeline[:i], s)
			return
		}
	}
	j.timeline = append(j.timeline, s)
}

// tell passes an event on. A watcher that misses one still finds the truth in
// the journal, so a failure here fails no job.
func (a *Agent) tell(ctx context.Context, j *Job, e *agentv1.WatchResponse) {
	if err := j.feed.add(context.WithoutCancel(ctx), e); err != nil {
		a.log.ErrorContext(ctx, "record event", slog.String("job", j.id), slog.Any("error", err))
	}
}

func stageEvent(name bundle.Stage, phase string, nanos int64, detail string) *agentv1.WatchResponse {
	return &agentv1.WatchResponse{Event: &agentv1.WatchResponse_Stage{Stage: &agentv1.StageEvent{Stage: string(name), Phase: phase, DurationNanos: nanos, Detail: detail}}}
}

// Ways in which a job ends that no stage reports as a refusal.
var (
	errHolderLost = errors.New("its holder process died, and with it the keys and the memory they opened")
	errTraceLost  = errors.New("the runtime's trace went silent")
	errInputs     = errors.New("an input could not be opened")
	// Its agent was killed when it had removed the container and could not yet write why.
	errUnrecorded = errors.New("its container had gone when the agent came back, and how it ended is not recorded")
	errRestarted  = errors.New("the agent was restarted while the job's keys were released, before it had started; submit it again")
)

// exitError is a job that ended by itself, not well.
type exitError struct{ code int }

func (e *exitError) Error() string { return fmt.Sprintf("it exited with code %d", e.code) }

// concludedError is a job that an earlier agent had begun to conclude: how it ended
// was decided then.
type concludedError struct{ end journal.Job }

func (e *concludedError) Error() string { return "it had ended: " + e.end.Message }

// outcome turns the way a job ended into its state, reason code and sentence.
func (a *Agent) outcome(ctx context.Context, j *Job, err error) journal.Job {
	out := journal.Job{ID: j.id, Stage: string(j.at), ExitCode: j.exitCode, State: journal.Failed}
	if j.at == "" {
		out.Stage = string(bundle.StageAdmit)
	}
	var refused *check.Refusal
	var away *remote.Unavailable
	var exit *exitError
	var stop *stopError
	var rule *ruleError
	var before *concludedError
	switch {
	case errors.As(err, &before):
		return before.end
	case err == nil:
		out.State = journal.Succeeded
		return out
	case errors.Is(err, errCancelled):
		out.State, out.Reason = journal.Cancelled, "cancelled"
	case errors.Is(err, errGang):
		out.Reason = "gang-failed"
	case errors.As(err, &rule):
		out.Reason = bundle.ReasonRule + rule.id
	case errors.As(err, &stop):
		out.Reason, out.Checks = stop.code, stop.checks
	case errors.As(err, &refused):
		out.State, out.Reason, out.Checks = journal.Refused, refused.Stage+"-refused", refused.Checks
	case errors.Is(err, errBudget):
		out.Reason = "budget"
	case errors.Is(err, errDeadline):
		out.Reason = "deadline"
	case errors.As(err, &exit):
		out.Reason = "exit-code"
	case errors.Is(err, errHolderLost):
		out.Reason = "holder-lost"
	case errors.Is(err, errInputs):
		out.Reason = "inputs-failed"
	case errors.Is(err, source.ErrNotThere):
		out.Reason = "inputs-missing"
	case errors.Is(err, errTraceLost):
		out.Reason = "trace-lost"
	case errors.Is(err, errRestarted), errors.Is(err, errUnrecorded):
		out.Reason = "agent-restarted"
	case errors.Is(err, errWaited):
		out.Reason = "waited-too-long"
	case errors.Is(err, errValues):
		out.Reason = "submission-lost"
	case errors.Is(err, errChanged):
		out.Reason = "plan-changed"
	case NoSpace(err):
		out.Reason = "no-space"
	case errdefs.IsUnavailable(err):
		out.Reason = "containerd-unavailable"
	case errors.As(err, &away):
		out.Reason = away.Service + "-unavailable"
	default:
		out.Reason = "internal"
	}
	out.Message = err.Error()
	a.log.WarnContext(ctx, "job did not succeed", slog.String("job", j.id), slog.String("stage", out.Stage), slog.String("reason", out.Reason), slog.Any("error", err))
	return out
}
