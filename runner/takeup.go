package runner

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/oklog/ulid/v2"
	"google.golang.org/protobuf/proto"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/holder"
	"github.com/coffer-run/coffer/runner/jobspec"
	"github.com/coffer-run/coffer/runner/journal"
)

// takeUp continues what an earlier agent left. A job that had started goes on if
// its holder and its container are still there and the sandbox is still the one
// that was attested. A job to which no key was released begins again, under the
// plan that was submitted or not at all. Every other job is ended with its stage
// and cleaned up. The journal decides none of this: it only says where to look.
func (a *Agent) takeUp(ctx context.Context) error {
	rows, err := a.Journal.Unfinished(ctx)
	if err != nil {
		return err
	}
	if a.Cache != nil {
		ids := make([]string, 0, len(rows))
		for _, row := range rows {
			ids = append(ids, row.ID)
		}
		if err := a.Cache.Keep(ids); err != nil {
			return err
		}
	}
	unfinished := map[string]bool{}
	for _, row := range rows {
		unfinished[row.ID] = true
	}
	if err := a.Values.only(unfinished); err != nil {
		return err
	}
	if a.Sinks != nil {
		if err := a.Sinks.Keep(unfinished); err != nil {
			return err
		}
	}
	// Those that run have their room before others are given any.
	var launch []func()
	for _, row := range rows {
		j, started, err := a.rebuild(ctx, row)
		if err != nil {
			// One row that cannot be read must not keep the others waiting.
			a.log.ErrorContext(ctx, "read job from journal", slog.String("job", row.ID), slog.Any("error", err))
			row.State, row.Reason, row.Message, row.Ended = journal.Failed, "journal", err.Error(), time.Now()
			if err := a.Journal.End(ctx, row, nil); err != nil {
				return err
			}
			continue
		}
		work, how := a.takeUpOne(ctx, j, started)
		a.log.InfoContext(ctx, "took up job", slog.String("job", row.ID), slog.String("stage", row.Stage), slog.String("how", how))
		launch = append(launch, func() { //nolint:contextcheck // a job outlives the agent's opening
			a.launch(j, work)
			if j.gang.broken != "" {
				j.cancel(fmt.Errorf("%w: job %s", errGang, j.gang.broken))
			}
		})
	}
	for _, f := range launch {
		f()
	}
	return nil
}

// takeUpOne says how a job goes on that an earlier agent left.
func (a *Agent) takeUpOne(ctx context.Context, j *Job, started bool) (work func(context.Context) error, how string) {
	if kept, err := a.Values.get(j.id, j.digest); err == nil && kept.Outcome != nil && kept.Outcome.ID == j.id && kept.Outcome.State.Final() {
		// It had ended: what is left is to conclude it.
		if _, err := a.adopt(ctx, j, started); err != nil {
			a.log.InfoContext(ctx, "of a job that had ended", slog.String("job", j.id), slog.Any("error", err))
		}
		j.watching.adopted = true
		return func(context.Context) error { return &concludedError{*kept.Outcome} }, "is concluded"
	}
	if !started && !j.mayHaveKeys() {
		// Nothing was released to the holder that is left over: it goes, with all that
		// was made for it, and the job begins again.
		return func(ctx context.Context) error {
			err := undisturbed(ctx, cleanTimeout, func(ctx context.Context) error {
				if h, err := holder.Attach(ctx, j.runDir, j.id); err == nil {
					j.holder = h
				}
				return a.cleanUp(ctx, j)
			})
			if err != nil {
				return err
			}
			j.spent += j.used()
			if err := a.keepSpent(j, time.Time{}); err != nil {
				return err
			}
			j.holder, j.sandbox, j.record, j.at = nil, nil, record{}, ""
			j.timeline = slices.DeleteFunc(j.timeline, func(s bundle.Step) bool { return !slices.Contains(beforeSandbox, s.Stage) })
			return a.begin(ctx, j)
		}, "begins again"
	}
	if j.plan.Reseal != nil && len(j.record.Releases) == len(j.assets()) {
		work, err := a.adoptReseal(ctx, j)
		if err != nil {
			return func(context.Context) error { return err }, "ends"
		}
		return func(ctx context.Context) error { return j.spending(ctx, work) }, "goes on"
	}
	r, err := a.adopt(ctx, j, started)
	if err != nil {
		j.watching.adopted = true
		return func(context.Context) error { return err }, "ends"
	}
	return func(ctx context.Context) error {
		return j.spending(ctx, func(ctx context.Context) error { return a.watch(ctx, j, r) })
	}, "goes on"
}

// undisturbed calls f, which takes away what a job has, whether or not the job is told to
// end meanwhile: half of it would be in the way of the rest. Then it says why the job must
// end, if it must.
func undisturbed(ctx context.Context, limit time.Duration, f func(context.Context) error) error {
	whole, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
	defer cancel()
	if err := f(whole); err != nil {
		return err
	}
	return context.Cause(ctx)
}

// beforeSandbox are the stages that nothing of a holder's is bound to.
var beforeSandbox = []bundle.Stage{bundle.StageJobspec, bundle.StageAdmit, bundle.StageApproval}

// mayHaveKeys reports whether the broker may have released keys to the job.
func (j *Job) mayHaveKeys() bool {
	before := []bundle.Stage{bundle.StageJobspec, bundle.StageAdmit, bundle.StageApproval, queueStage, bundle.StageSandbox, bundle.StageCollect, bundle.StageVerify}
	return len(j.record.Releases) > 0 || !slices.Contains(before, j.at)
}

// rebuild makes a Job from its row, and says whether it had started.
func (a *Agent) rebuild(ctx context.Context, row journal.Job) (*Job, bool, error) {
	// The id becomes a path that is removed.
	if _, err := ulid.ParseStrict(row.ID); err != nil {
		return nil, false, fmt.Errorf("job id %.80q: %w", row.ID, err)
	}
	p, err := plan.Parse(row.Plan)
	if err != nil {
		return nil, false, err
	}
	j := newJob(row.ID, row.Submitter)
	j.submitted, j.attempt, j.retryOf, j.notBefore = row.Submitted, row.Attempt, row.RetryOf, row.NotBefore
	if j.spec, err = jobspec.Parse(row.JobFile); err != nil {
		return nil, false, err
	}
	j.plan, j.canonical, j.digest, j.redacted, j.at = p, row.Plan, plan.Sum(row.Plan), row.JobFile, bundle.Stage(row.Stage)
	a.recallSpent(j)
	j.runDir = a.jobDir(row.ID)
	j.feed = newFeed(row.ID, a.Journal)
	started := false
	for _, s := range []bundle.Stage{bundle.StageReseal, bundle.StageStart, bundle.StageRelease, bundle.StageVerify, bundle.StageCollect, bundle.StageSandbox} {
		err := a.Journal.Entry(ctx, row.ID, string(s), &j.record)
		if errors.Is(err, journal.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, false, err
		}
		started = s == bundle.StageStart
		break
	}
	if len(j.record.Releases) > 0 {
		j.lease.hold()
	}
	if err := a.Journal.Entry(ctx, row.ID, reattestEntry, &j.reattest.record); err != nil && !errors.Is(err, journal.ErrNotFound) {
		return nil, false, err
	}
	if err := a.recallGang(ctx, j); err != nil {
		return nil, false, err
	}
	if started {
		j.nowReady()
	}
	if err := a.replay(ctx, j); err != nil {
		return nil, false, err
	}
	// The journal has the job before its first events.
	for i, s := range beforeSandbox[:2] {
		if len(j.timeline) <= i || j.timeline[i].Stage != s {
			j.timeline = slices.Insert(j.timeline, i, bundle.Step{Stage: s, StartUnixNano: j.submitted.UnixNano(), Outcome: bundle.StepDone})
		}
	}
	// The journal's entry is the promise that the job had started; the event that
	// tells of it may have been lost with the agent.
	if last := len(j.timeline) - 1; started && last >= 0 && j.timeline[last].Stage != bundle.StageStart && j.at == bundle.StageStart {
		j.step(bundle.Step{Stage: bundle.StageStart, StartUnixNano: j.timeline[last].StartUnixNano + j.timeline[last].Nanos, Outcome: bundle.StepDone})
	}
	return j, started, nil
}

// maxReplay bounds the events of a job that are read back.
const maxReplay = 100_000

// replay reads a job's events back: its timeline, and which checkpoints its
// watchers know of.
func (a *Agent) replay(ctx context.Context, j *Job) error {
	events, err := a.Journal.Events(ctx, j.id, 0, maxReplay)
	if err != nil {
		return err
	}
	for _, e := range events {
		var w agentv1.WatchResponse
		if err := proto.Unmarshal(e.Body, &w); err != nil {
			return fmt.Errorf("event %d: %w", e.Sequence, err)
		}
		if s := w.GetStage(); s != nil && (s.GetPhase() == bundle.StepDone || s.GetPhase() == bundle.StepFailed) {
			j.step(bundle.Step{
				Stage: bundle.Stage(s.GetStage()), StartUnixNano: w.GetTimeUnixNano() - s.GetDurationNanos(), Nanos: s.GetDurationNanos(), Outcome: s.GetPhase(),
			})
		}
		if c := w.GetCheckpoint(); c != nil {
			j.seen = max(j.seen, c.GetSequence())
			if c.GetAnchored() {
				j.anchors.tell(c.GetSequence())
			}
		}
		if f := w.GetAlert(); f != nil {
			j.restoreFinding(f, w.GetTimeUnixNano())
		}
		j.feed.events = append(j.feed.events, &w)
		j.feed.last = w.GetSequence()
	}
	return nil
}

// attested checks that the verifier accepted the job's evidence, and that plan,
// sandbox and holder are those that the evidence bound: a journal that was edited
// leads nowhere.
func (a *Agent) attested(j *Job) (*evidence.Envelope, error) {
	v, err := a.Verifier.Recheck(j.record.Result, receipt.Expect{Audience: a.Broker.ID(), JobID: j.id, Plan: j.digest, AllowSimulated: true})
	if err != nil {
		return nil, err
	}
	env, err := evidence.Parse(j.record.Evidence)
	if err != nil {
		return nil, err
	}
	var l check.List
	l.Equal("adopt.evidence", string(v.Result().EvidenceDigest), string(plan.Sum(j.record.Evidence)), "the journal's evidence is not the appraised one")
	l.Equal("adopt.plan", string(j.digest), string(plan.Sum(env.Plan)), "the journal's plan is not the attested one")
	l.Equal("adopt.sandbox", string(plan.Sum(j.record.Sandbox)), string(plan.Sum(env.Sandbox)), "the journal's sandbox is not the attested one")
	l.Equal("adopt.holder", string(plan.Sum(env.SessionKey)), string(plan.Sum(j.holder.Hello.SessionKey)), "the holder is not the attested one")
	if len(l.Failed()) > 0 {
		return nil, check.Refuse("adopt", l)
	}
	return env, nil
}

// hadStarted finds out of a job that had come to its start whether its container has
// started: an agent can be killed before it has noted that. The trace knows, and
// nothing of a start comes after it but the note.
func (a *Agent) hadStarted(ctx context.Context, j *Job) (bool, error) {
	if j.at != bundle.StageStart {
		return false, nil
	}
	st, err := j.holder.Status(ctx)
	if err != nil || !st.Started {
		return false, err
	}
	at, err := startOf(ctx, j.runDir)
	if err != nil {
		return false, err
	}
	if err := a.Journal.Leave(ctx, j.id, string(bundle.StageStart), j.record); err != nil {
		return false, err
	}
	j.step(bundle.Step{Stage: bundle.StageStart, StartUnixNano: at, Outcome: bundle.StepDone})
	j.nowReady()
	return true, nil
}

// startOf is when the container started, by the holder's events.
func startOf(ctx context.Context, runDir string) (int64, error) {
	c, err := holdapi.Dial(ctx, runDir)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	for after := uint64(0); ; {
		events, err := c.Events(ctx, holdapi.Events{After: after})
		if err != nil {
			return 0, fmt.Errorf("ask holder when the container started: %w", err)
		}
		if len(events) == 0 {
			return 0, errors.New("the holder has no event of the container's start")
		}
		for _, e := range events {
			if after = e.Sequence; e.Kind == bundle.EventContainerStart {
				return e.UnixNano, nil
			}
		}
	}
}

// adopt attaches to what of a job still runs, and takes a slot and the very GPUs
// whose evidence the job has.
func (a *Agent) adopt(ctx context.Context, j *Job, started bool) (running, error) {
	h, err := holder.Attach(ctx, j.runDir, j.id)
	if err == nil {
		j.holder = h
	}
	if !started && err == nil {
		if started, err = a.hadStarted(ctx, j); err != nil {
			return running{}, err
		}
	}
	if !started {
		return running{}, errRestarted
	}
	if err != nil {
		return running{}, errors.Join(errHolderLost, err)
	}
	env, err := a.attested(j)
	if err != nil {
		return running{}, err
	}
	gpus := make([]string, 0, len(env.GPUs))
	for _, g := range env.GPUs {
		gpus = append(gpus, g.UUID)
	}
	j.place = newPlace(j.id, queueName(j.spec), j.spec.Priority, j.submitted, j.plan.Resources)
	j.place.gang = j.gangPlace()
	if err := a.queue.adopt(j.place, gpus); err != nil {
		return running{}, err
	}
	j.placed = true
	if err := a.resumeGPUs(ctx, j); err != nil {
		return running{}, err
	}
	j.watching.adopted = true
	if err := a.attachEgress(ctx, j); err != nil {
		return running{}, err
	}
	box, err := a.Node.Adopt(ctx, j.id, j.runDir, j.record.Sandbox)
	if errdefs.IsNotFound(err) {
		return running{}, fmt.Errorf("%w: %w", errUnrecorded, err)
	}
	if err != nil {
		return running{}, err
	}
	j.sandbox = box
	if err := box.Recheck(ctx, j.plan); err != nil {
		return running{}, err
	}
	return running{created{sandbox: box, holder: h}}, nil
}
