package runner

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/oklog/ulid/v2"
	"google.golang.org/protobuf/proto"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/holder"
	"github.com/coffer-run/coffer/runner/journal"
)

// takeUp continues what an earlier agent left. A job that had started goes on if
// its holder and its container are still there and the sandbox is still the one
// that was attested; every other job is ended with its stage and cleaned up. The
// journal decides none of this: it only says where to look.
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
		r, err := a.adopt(ctx, j, started)
		a.log.InfoContext(ctx, "took up job", slog.String("job", row.ID), slog.String("stage", row.Stage), slog.Bool("goes on", err == nil))
		a.launch(j, func(ctx context.Context) error { //nolint:contextcheck // a job outlives the agent's opening
			if err != nil {
				return err
			}
			return a.watch(ctx, j, r)
		})
	}
	return nil
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
	j.plan, j.canonical, j.digest, j.redacted, j.at = p, row.Plan, plan.Sum(row.Plan), row.JobFile, bundle.Stage(row.Stage)
	j.runDir = a.jobDir(row.ID)
	j.feed = newFeed(row.ID, a.Journal)
	started := false
	for _, s := range []bundle.Stage{bundle.StageStart, bundle.StageRelease, bundle.StageVerify, bundle.StageCollect, bundle.StageSandbox} {
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
	if err := a.replay(ctx, j); err != nil {
		return nil, false, err
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
		if s := w.GetStage(); s != nil && s.GetPhase() != "started" {
			j.step(bundle.Step{
				Stage: bundle.Stage(s.GetStage()), StartUnixNano: w.GetTimeUnixNano() - s.GetDurationNanos(), Nanos: s.GetDurationNanos(), Outcome: s.GetPhase(),
			})
		}
		if c := w.GetCheckpoint(); c != nil {
			j.seen = max(j.seen, c.GetSequence())
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

// take gives a job the GPUs that it had.
func (a *Agent) take(j *Job, gpus []evidence.GPU) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, g := range gpus {
		i := slices.Index(a.free, g.UUID)
		if i < 0 {
			return fmt.Errorf("GPU %.80s of the job is gone or another job's", g.UUID)
		}
		a.free = slices.Delete(slices.Clone(a.free), i, i+1)
		j.gpus = append(j.gpus, g.UUID)
	}
	return nil
}

// adopt attaches to what of a job still runs, and takes a slot and the very GPUs
// whose evidence the job has.
func (a *Agent) adopt(ctx context.Context, j *Job, started bool) (running, error) {
	h, err := holder.Attach(ctx, j.runDir, j.id)
	if err == nil {
		j.holder = h
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
	select {
	case a.slots <- struct{}{}:
		j.slot = true
	default:
		return running{}, errors.New("more jobs are left over than this agent runs")
	}
	if err := a.take(j, env.GPUs); err != nil {
		return running{}, err
	}
	if err := a.setReady(ctx, j); err != nil {
		return running{}, err
	}
	box, err := a.Node.Adopt(ctx, j.id, j.runDir, j.record.Sandbox)
	if err != nil {
		return running{}, err
	}
	j.sandbox = box
	if err := box.Recheck(ctx, j.plan); err != nil {
		return running{}, err
	}
	return running{&created{sandbox: box, holder: h}}, nil
}
