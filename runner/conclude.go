package runner

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/journal"
	"github.com/coffer-run/coffer/runner/sandbox"
)

// finishTimeout bounds how long a holder may take to take its leave, besides the
// time that scrubbing takes at scrubRate, bytes a second. cleanTimeout bounds the
// removal of everything else.
const (
	finishTimeout = 60 * time.Second
	scrubRate     = 1 << 30
	cleanTimeout  = 60 * time.Second
)

// conclude is stage 10, for every job however it ended: the container goes, a
// holder that still answers scrubs, every receipt goes into a bundle that the
// session key signs and the evidence log records, and the journal gets its last
// word.
func (a *Agent) conclude(ctx context.Context, j *Job, end journal.Job) {
	// From here on it is decided how the job ended, whoever concludes it.
	if err := a.recordEnd(j, end); err != nil {
		a.log.WarnContext(ctx, "record the outcome", slog.String("job", j.id), slog.Any("error", err))
	}
	a.tell(ctx, j, stageEvent(bundle.StageEvidence, "started", 0, ""))
	began := time.Now()
	body, err := a.gather(ctx, j, end)
	phase, detail := bundle.StepDone, fmt.Sprintf("%d bytes", len(body))
	if err != nil {
		phase, detail = bundle.StepFailed, err.Error()
		a.log.ErrorContext(ctx, "gather evidence", slog.String("job", j.id), slog.Any("error", err))
		// A job whose evidence is not whole is not complete.
		if end.State == journal.Succeeded {
			end.State, end.Stage, end.Reason, end.Message = journal.Failed, string(bundle.StageEvidence), "evidence", err.Error()
		}
	}
	a.tell(ctx, j, stageEvent(bundle.StageEvidence, phase, time.Since(began).Nanoseconds(), detail))

	// Before the holder goes: an agent that comes after this one writes the log anew while
	// there is one, and finds a whole log when there is none.
	if l, _ := j.feed.kept(); l != nil {
		if err := l.Close(); err != nil {
			a.log.WarnContext(ctx, "close a log", slog.String("job", j.id), slog.Any("error", err))
		}
	}
	a.finishGPUs(ctx, j)
	clean, cancel := context.WithTimeout(ctx, cleanTimeout)
	defer cancel()
	if err := a.cleanUp(clean, j); err != nil {
		a.log.ErrorContext(ctx, "clean up", slog.String("job", j.id), slog.Any("error", err))
	}
	if a.Sinks != nil {
		a.Sinks.Leave(j.id)
	}
	end.Ended = time.Now()
	end.KeepUntil = j.keepUntil(end.Ended)
	next := a.end(ctx, j, end, body)
	if row, err := a.Journal.Job(ctx, j.id); err == nil {
		a.tell(ctx, j, &agentv1.WatchResponse{Event: &agentv1.WatchResponse_Job{Job: Describe(row)}})
	}
	a.settleEvents(ctx, j)
	j.feed.close()
	a.giveBack(j)
	if next != nil {
		a.follow(next) //nolint:contextcheck // a job of its own
	}
}

// end gives a job its last word in the journal, together with the attempt that
// follows it, if one does.
func (a *Agent) end(ctx context.Context, j *Job, end journal.Job, body []byte) *Job {
	next := a.next(j, end)
	if next != nil {
		next.before = statementOf(body)
	}
	err := a.insist(ctx, j, func() error {
		if next != nil {
			// A full disk ends neither the job nor its attempts.
			if err := a.handOn(j, next); NoSpace(err) {
				return err
			} else if err != nil {
				a.log.ErrorContext(ctx, "no further attempt", slog.String("job", j.id), slog.Any("error", err))
				next = nil
			}
		}
		if next != nil {
			return a.Journal.Retry(ctx, end, body, next.row("", plan.Sum(next.redacted)))
		}
		return a.Journal.End(ctx, end, body)
	})
	if err != nil {
		a.log.ErrorContext(ctx, "end job", slog.String("job", j.id), slog.Any("error", err))
		// What is kept of the job is for the next agent.
		return nil
	}
	a.countEnd(end)
	if err := a.Values.drop(j.id); err != nil {
		a.log.WarnContext(ctx, "end job", slog.String("job", j.id), slog.Any("error", err))
	}
	return next
}

// Describe is a job as the API shows it.
func Describe(row journal.Job) *agentv1.Job {
	out := &agentv1.Job{
		Id: row.ID, Name: row.Name, PlanDigest: string(row.PlanDigest), State: string(row.State), Stage: row.Stage, Reason: row.Reason, Message: row.Message,
		SubmittedUnix: row.Submitted.Unix(), ExitCode: int32(row.ExitCode), Submitter: row.Submitter, //nolint:gosec // an exit code fits
		Attempt: int32(row.Attempt), RetryOf: row.RetryOf, RetriedAs: row.RetriedAs, Priority: int32(row.Priority), //nolint:gosec // small numbers
	}
	if !row.NotBefore.IsZero() {
		out.NotBeforeUnix = row.NotBefore.Unix()
	}
	if !row.Ended.IsZero() {
		out.EndedUnix = row.Ended.Unix()
	}
	out.Checks = Checks(row.Checks)
	return out
}

// Checks is a list of checks as the API shows it.
func Checks(l check.List) []*agentv1.Check {
	var out []*agentv1.Check
	for _, c := range l {
		out = append(out, &agentv1.Check{Id: c.ID, Outcome: string(c.Outcome), Expected: c.Expected, Found: c.Found, Hint: c.Hint})
	}
	return out
}

// gather ends the container, lets the holder finish, and builds the bundle.
func (a *Agent) gather(ctx context.Context, j *Job, end journal.Job) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, finishTimeout+time.Duration(j.plan.Resources.MemoryBytes/scrubRate)*time.Second+a.sendTime(j))
	defer cancel()
	// The container goes first: while it runs it reads, prints and keeps the
	// holder from finishing.
	gone := a.removeContainer(ctx, j)
	if kept, st := a.keptRecord(ctx, j, end); kept != nil {
		last, err := a.finish(ctx, j)
		if err != nil {
			// It was there when the record was made.
			a.log.InfoContext(ctx, "a job's holder, when its record was there", slog.String("job", j.id), slog.Any("error", err))
		}
		a.reportStopped(ctx, j, end.Reason, st.Outcome.Stop, last.trace)
		out, err := a.logRecord(ctx, j, kept)
		return out, errors.Join(err, gone)
	}
	b := bundle.NewBuilder()
	errs := []error{a.addReceipts(ctx, j, b)}
	last, heldErr := a.finish(ctx, j)
	if heldErr == nil {
		a.settle(ctx, j, last.commits)
		// A part that is too large is missing, and verification says so; the
		// others are not lost with it.
		gone = errors.Join(gone, j.addLastWords(b, last))
	}
	errs = append(errs, a.addEgress(ctx, j, b), j.addAlerts(b, a.Rules), j.addReattest(b), a.addReseal(ctx, j, b))
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	if heldErr == nil && j.checkpoints.StartUnixNano != 0 {
		j.step(j.checkpoints)
	}
	stop := j.stopped(end.Reason, last.trace)
	statement, err := b.Statement(j.id, j.digest, bundle.Outcome{
		State: bundle.State(end.State), ExitCode: end.ExitCode, Stage: bundle.Stage(end.Stage), Reason: end.Reason, Checks: end.Checks, Stop: stop,
	}, j.timeline)
	if err != nil {
		return nil, err
	}
	var signature []byte
	if heldErr == nil && j.holder != nil {
		if signature, err = j.holder.Sign(ctx, statement); err != nil {
			return nil, fmt.Errorf("sign bundle: %w", err)
		}
	}
	unlogged, err := b.Finish(signature, nil)
	if err != nil {
		return nil, err
	}
	a.keepRecord(ctx, j, end, unlogged)
	a.reportStopped(ctx, j, end.Reason, stop, last.trace)
	out, err := a.logRecord(ctx, j, unlogged)
	if j.holder == nil {
		heldErr = nil // it never ran
	}
	return out, errors.Join(err, heldErr, gone)
}

// removeContainer takes the container away, whether this agent made it or one before it.
func (a *Agent) removeContainer(ctx context.Context, j *Job) error {
	var err error
	if j.sandbox != nil {
		err = j.sandbox.Remove(ctx)
	} else {
		err = a.Node.Forget(ctx, j.id, j.runDir)
	}
	if err == nil {
		j.sandbox = nil
		j.goneNow()
		a.finishGPUs(ctx, j)
	}
	return err
}

// addReceipts adds what the stages left behind: a part is missing where its stage was
// not reached, and verification says what that means.
func (a *Agent) addReceipts(ctx context.Context, j *Job, b *bundle.Builder) error {
	runtime, shim := a.Node.Profile().Runtime, sandbox.Shim
	if j.plan.Reseal != nil {
		runtime, shim = "", "" // no container
	}
	errs := []error{
		b.Add(bundle.JobFile, j.redacted), b.Add(bundle.Plan, j.canonical),
		b.Add(bundle.VerifierKeys, a.Verifier.JWKS()), b.Add(bundle.BrokerKeys, a.Broker.JWKS()),
		b.AddJSON(bundle.AgentPart, bundle.Agent{
			Node: a.Name, Agent: a.Version, Containerd: a.Node.ContainerdVersion(), Runtime: runtime, Shim: shim, Submitter: j.submitter, Attempt: j.attemptWord(), Devices: j.devices(),
		}),
	}
	for _, p := range []struct {
		name bundle.Part
		body []byte
	}{
		{bundle.Sandbox, j.record.Sandbox}, {bundle.ImageSignaturePart, j.record.ImageSignature}, {bundle.ImageSBOMPart, j.record.ImageSBOM},
		{bundle.Evidence, j.record.Evidence}, {bundle.Result, []byte(j.record.Result)},
	} {
		if len(p.body) > 0 {
			errs = append(errs, b.Add(p.name, p.body))
		}
	}
	if j.record.Result != "" {
		// Without them the record is as true: they can be exported and given to
		// whoever verifies it.
		if used, err := a.Verifier.Endorsements(ctx, j.record.Result); err != nil {
			a.log.WarnContext(ctx, "the bundle lacks the endorsements that the appraisal used", slog.String("job", j.id), slog.Any("error", err))
		} else if used != nil {
			errs = append(errs, b.Add(bundle.Endorsements, used))
		}
	}
	if len(j.record.Releases) > 0 {
		errs = append(errs, b.AddJSON(bundle.Releases, j.record.Releases))
	}
	if len(j.record.Approved) > 0 {
		errs = append(errs, b.AddJSON(bundle.Approvals, j.record.Approved))
	}
	if j.record.Resume != nil {
		errs = append(errs, b.AddJSON(bundle.ResumePart, j.record.Resume))
	}
	return errors.Join(errs...)
}

// addLastWords adds what the holder says of the job.
func (j *Job) addLastWords(b *bundle.Builder, last lastWords) error {
	return errors.Join(
		b.AddJSON(bundle.HolderStatus, statusOf(last.status)),
		b.AddJSON(bundle.Checkpoints, j.checkpointsOf(last.commits)),
		b.AddJSON(bundle.Trace, last.trace),
		b.AddJSON(bundle.LogsDigest, bundle.Logs{Stdout: j.logs[0].stream(), Stderr: j.logs[1].stream(), Cut: last.status.LogCut}),
	)
}

// approvalsTimeout bounds how long a job that has its keys waits for the broker to
// say who approved.
const approvalsTimeout = 5 * time.Second

// noteApprovals keeps for the bundle on whose word the keys were released. It asks
// right after the release: the grant and the policies may change while the job
// runs. Without an answer the bundle has the digests that the receipts name.
func (a *Agent) noteApprovals(ctx context.Context, j *Job, released []receipt.Grant) {
	ctx, cancel := context.WithTimeout(ctx, approvalsTimeout)
	defer cancel()
	counted, policies := map[string][]plan.Digest{}, map[string][]plan.Digest{}
	var order []string
	for _, g := range released {
		r := g.Release()
		if _, seen := counted[r.Grant]; !seen {
			order = append(order, r.Grant)
		}
		counted[r.Grant] = r.Approvals
		if r.Policy != "" {
			policies[r.Grant] = append(policies[r.Grant], r.Policy)
		}
	}
	var out []bundle.Approved
	for _, id := range order {
		one, err := a.Broker.Approved(ctx, id, counted[id], policies[id])
		if err != nil {
			a.log.WarnContext(ctx, "the bundle lacks the approvals that counted", slog.String("job", j.id), slog.Any("error", err))
			return
		}
		out = append(out, one)
	}
	j.record.Approved = out
}

// lastWords are what a holder says when it has finished.
type lastWords struct {
	status  holdapi.Status
	trace   []bundle.Event
	commits []holdapi.Checkpoint
}

// finish has the holder close and scrub everything, and drains its last lines.
func (a *Agent) finish(ctx context.Context, j *Job) (lastWords, error) {
	over := sync.OnceFunc(func() { close(j.finished) })
	defer over()
	if j.holder == nil {
		return lastWords{}, errors.New("no holder ran")
	}
	if err := j.holder.Renew(ctx); err != nil {
		return lastWords{}, err
	}
	if !j.pumped {
		// The job ran, and no agent or not this one has followed it.
		if st, err := j.holder.Status(ctx); err == nil && st.Started {
			a.pump(j) //nolint:contextcheck // it ends with the holder's last line
		}
	}
	st, err := j.holder.Finish(ctx)
	over() // the event pump ends when it finds nothing more
	if err != nil {
		return lastWords{}, fmt.Errorf("finish holder: %w", err)
	}
	trace, commits, err := history(ctx, j.holder.Client)
	if err != nil {
		return lastWords{}, err
	}
	// The pumps read what is left of the logs and end by themselves.
	drained := make(chan struct{})
	go func() {
		j.pumps.Wait()
		close(drained)
	}()
	select {
	case <-drained:
		return lastWords{st, trace, commits}, nil
	case <-ctx.Done():
		return lastWords{}, fmt.Errorf("drain the logs: %w", ctx.Err())
	}
}

func digestOf(sum []byte) plan.Digest {
	return plan.Digest("sha384:" + hex.EncodeToString(sum))
}
