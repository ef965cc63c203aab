package runner

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/oklog/ulid/v2"

	"github.com/coffer-run/coffer/attest/bundle"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/jobspec"
	"github.com/coffer-run/coffer/runner/journal"
	"github.com/coffer-run/coffer/runner/remote"
)

// queueStage is where a job waits for its time or for room. It is no stage of a
// job's way: nothing is obtained there, and no bundle speaks of it.
const queueStage = "queue"

// waits holds a job until it may begin: for a retry's time, for approvals, for room.
func (a *Agent) waits(ctx context.Context, j *Job) error {
	wait := time.Duration(j.spec.MaxWait)
	if wait == 0 {
		wait = time.Duration(jobspec.DefaultMaxWait)
	}
	ctx, cancel := context.WithDeadlineCause(ctx, j.submitted.Add(wait), errWaited)
	defer cancel()
	if pause := time.Until(j.notBefore); pause > 0 {
		if err := a.Journal.Wait(ctx, j.id, queueStage); err != nil {
			return err
		}
		a.tellWaiting(ctx, j, 0, "attempt "+fmt.Sprint(j.attempt)+" begins at "+j.notBefore.UTC().Format(time.RFC3339))
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if !j.admitted {
		if err := a.complete(ctx, j); err != nil {
			return err
		}
	}
	if err := a.approval(ctx, j); err != nil {
		return err
	}
	return a.acquire(ctx, j)
}

// acquire waits for room on the node.
func (a *Agent) acquire(ctx context.Context, j *Job) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if !a.queue.has(queueName(j.spec)) {
		return a.mayQueue(j)
	}
	j.place, j.placed = newPlace(j.id, queueName(j.spec), j.spec.Priority, j.submitted, j.plan.Resources), true
	j.place.gang = j.gangPlace()
	a.queue.enter(j.place)
	select {
	case <-j.place.given:
		return a.joined(ctx, j)
	default:
	}
	if err := a.Journal.Wait(ctx, j.id, queueStage); err != nil {
		return err
	}
	for {
		select {
		case <-j.place.given:
			return a.joined(ctx, j)
		case <-j.place.moved:
			if position, lacks := a.queue.at(j.id); position > 0 {
				a.tellWaiting(ctx, j, position, lacks)
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// tellWaiting tells watchers, and not the journal: where a job waits is true only
// while it waits.
func (a *Agent) tellWaiting(ctx context.Context, j *Job, position int, lacks string) {
	a.tell(ctx, j, &agentv1.WatchResponse{Event: &agentv1.WatchResponse_Queue{Queue: &agentv1.QueueEvent{Position: int32(position), WaitsFor: lacks}}}) //nolint:gosec // bounded by maxLive
}

// Waits says where a job waits for room and what it lacks; position 0 means that
// it waits for something else or for nothing.
func (a *Agent) Waits(id string) (position int, lacks string) { return a.queue.at(id) }

// grace is how long the job may take to end when it is told to.
func (j *Job) grace() time.Duration { return time.Duration(j.plan.Resources.StopGrace()) * time.Second }

// next is the attempt that follows one that ended, or nil. It is a job of its own:
// with a new holder, new keys, new evidence and a release of its own.
func (a *Agent) next(j *Job, end journal.Job) *Job {
	if end.State != journal.Failed || j.attempt >= j.plan.Attempts() || !j.spec.Retry.After(end.Reason, end.ExitCode) || a.ctx.Err() != nil {
		return nil
	}
	if left, bounded := j.budgetLeft(); bounded && left <= 0 {
		return nil
	}
	n := newJob(ulid.Make().String(), j.submitter)
	n.spec, n.plan, n.canonical, n.digest, n.redacted = j.spec, j.plan, j.canonical, j.digest, j.redacted
	n.submitted, n.attempt, n.retryOf = time.Now(), j.attempt+1, j.retryOf
	if n.retryOf == "" {
		n.retryOf = j.id
	}
	n.notBefore = n.submitted.Add(j.spec.Retry.Pause(j.attempt))
	n.spent = j.spent + j.used()
	return n
}

// handOn sees to it that the next attempt has the values of this one.
func (a *Agent) handOn(j, next *Job) error {
	s := submission{Submitter: j.submitter, Attempt: next.attempt, RetryOf: next.retryOf, Spent: next.spent, Before: next.before, Env: map[string]string{}}
	switch {
	case len(j.env) == len(j.plan.Env):
		for i, e := range j.plan.Env {
			s.Env[e.Name] = j.env[i]
		}
	default:
		// The agent was restarted meanwhile.
		kept, err := a.Values.get(j.id, j.digest)
		if err != nil {
			return err
		}
		s.Env = kept.Env
	}
	return a.Values.keep(next.id, next.digest, s)
}

// follow begins an attempt that the journal has.
func (a *Agent) follow(next *Job) {
	next.feed = newFeed(next.id, a.Journal)
	next.timeline = nil
	a.tell(a.ctx, next, stageEvent(bundle.StageJobspec, bundle.StepDone, 0, fmt.Sprintf("attempt %d of job %s", next.attempt, next.retryOf)))
	a.tell(a.ctx, next, stageEvent(bundle.StageAdmit, bundle.StepDone, 0, "plan "+string(next.digest)))
	for _, s := range []bundle.Stage{bundle.StageJobspec, bundle.StageAdmit} {
		next.step(bundle.Step{Stage: s, StartUnixNano: next.submitted.UnixNano(), Outcome: bundle.StepDone})
	}
	a.launch(next, func(ctx context.Context) error { return a.begin(ctx, next) })
}

// errChanged means that a job is another than the one that was submitted: its file
// leads to another plan, because the node has changed, or somebody edited the journal.
var errChanged = errors.New("the journal or the node has changed: this is no longer what was submitted; submit it again")

// readmitEvery is how often a job that waits to be read back asks a broker that
// does not answer.
const readmitEvery = 2 * time.Second

// complete gives a job that came from the journal what the journal does not keep,
// its environment values and its image, by admitting its job file again. It must
// lead to the plan that was submitted, by the same person: what the journal says
// decides nothing.
func (a *Agent) complete(ctx context.Context, j *Job) error {
	kept, err := a.Values.get(j.id, j.digest)
	if err != nil {
		return err
	}
	// Keys are released for who submitted the job, on the agent's word: the journal's
	// is not enough.
	if kept.Submitter != j.submitter || kept.Attempt != j.attempt || kept.RetryOf != j.retryOf {
		return errChanged
	}
	spec := j.spec
	spec.Env = kept.Env
	for {
		again, err := a.admit(ctx, spec)
		var away *remote.Unavailable
		if errors.As(err, &away) || errdefs.IsUnavailable(err) {
			select {
			case <-time.After(readmitEvery):
				continue
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		if err != nil {
			return err
		}
		if again.digest != j.digest {
			return errChanged
		}
		// The journal may name a queue that the submitter may not use.
		if err := a.mayQueue(j); err != nil {
			return err
		}
		j.admitted = true
		j.spec, j.image, j.signature, j.sbom, j.env = again.spec, again.image, again.signature, again.sbom, again.env
		return nil
	}
}
