package runner

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"log/slog"
	"time"

	containerd "github.com/containerd/containerd/v2/client"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/runner/logs"
	"github.com/coffer-run/coffer/runner/rules"
	"github.com/coffer-run/coffer/runner/sandbox"
)

const (
	// askTimeout is how long a holder may take to show that it is alive.
	askTimeout = 5 * time.Second
	// pollWait bounds one wait for log lines or events.
	pollWait = time.Second
	// maxTrace bounds the trace in a bundle, in bytes of JSON before escapes.
	maxTrace = 4 << 20
)

// watch is stage 9: the job runs, its lines and checkpoints are passed on, and
// whatever must end it ends it.
func (a *Agent) watch(ctx context.Context, j *Job, r running) error {
	_, err := stage(ctx, a, j, bundle.StageRun, func(ctx context.Context, j *Job) (struct{}, string, error) {
		ctx, cancel := context.WithDeadlineCause(ctx, j.began().Add(time.Duration(j.plan.Resources.MaxSeconds)*time.Second), errDeadline)
		defer cancel()
		a.followCheckpoints(j) //nolint:contextcheck // the last checkpoints come after the run
		a.pump(j)              //nolint:contextcheck // the last lines come after the run
		attested := a.keepAttested(ctx, j, r.holder, r.sandbox)
		code, err := a.wait(ctx, j, r)
		// A job may end by itself in the moment in which its machine is refused.
		if stop := attested(); stop != nil && !errors.Is(err, errShutdown) {
			err = stop
		}
		j.exitCode = code
		return struct{}{}, fmt.Sprintf("exit code %d", code), err
	})
	return err
}

// began is when the container started; a job that was adopted does not get its
// time anew.
func (j *Job) began() time.Time {
	for _, s := range j.timeline {
		if s.Stage == bundle.StageStart {
			return time.Unix(0, s.StartUnixNano)
		}
	}
	return time.Now()
}

// wait waits for the first of the ways in which a job ends.
func (a *Agent) wait(ctx context.Context, j *Job, r running) (int, error) {
	end := func(reason error) (int, error) {
		grace := j.grace()
		if stop := (*stopError)(nil); errors.As(reason, &stop) {
			grace = stop.grace
		}
		j.toldNow()
		a.closeEgress(ctx, j, stopWord(reason))
		if err := r.sandbox.Stop(context.WithoutCancel(ctx), grace); err != nil {
			return 0, errors.Join(reason, err)
		}
		return 0, reason
	}
	kill := func(reason error) (int, error) {
		a.closeEgress(ctx, j, stopWord(reason))
		return 0, errors.Join(reason, r.sandbox.Stop(context.WithoutCancel(ctx), 0))
	}
	// The death of the holder shows in several ways, the job's own failure among
	// them; whichever comes first, it is the reason.
	alive := func() bool {
		ask, cancel := context.WithTimeout(context.WithoutCancel(ctx), askTimeout)
		defer cancel()
		_, err := r.holder.Status(ask)
		return err == nil
	}
	ended := func(st containerd.ExitStatus) (int, error) {
		code, err := exited(st, j.plan.Output)
		if err != nil && !alive() {
			err = errHolderLost
		}
		if rule := j.settled(ctx); rule != nil {
			err = rule
		} else if cause := context.Cause(ctx); errors.Is(cause, errInputs) {
			err = cause
		}
		return code, err
	}
	for lost := j.traceLost; ; {
		select {
		case st := <-r.sandbox.Exited():
			return ended(st)
		case <-r.holder.Lost():
			// A job whose keeper died may be reading half a file; it gets no grace.
			return kill(errHolderLost)
		case <-lost:
			if !alive() {
				return kill(errHolderLost)
			}
			// The runtime closes its trace when it ends, so an end comes first.
			select {
			case st := <-r.sandbox.Exited():
				return ended(st)
			case <-time.After(2 * time.Second):
			}
			if a.Rules.Stops(rules.TraceLost) {
				return kill(errTraceLost)
			}
			lost = nil
		case <-ctx.Done():
			cause := context.Cause(ctx)
			if errors.Is(cause, errShutdown) {
				return 0, cause
			}
			if rule := (*ruleError)(nil); errors.As(cause, &rule) || errors.Is(cause, errInputs) {
				// Whatever it is up to, it gets no time for more.
				return kill(cause)
			}
			return end(cause)
		}
	}
}

func exited(st containerd.ExitStatus, out plan.Output) (int, error) {
	code, err := sandbox.ExitCode(st)
	if err != nil {
		return 0, err
	}
	if code = out.ExitCode(code); code != 0 {
		return code, &exitError{code}
	}
	return 0, nil
}

// pump passes the holder's lines and events on until the holder says that there
// will be no more. The pumps end by themselves; conclude waits for them.
func (a *Agent) pump(j *Job) {
	// The pumps outlive the run: the last lines come after it. Only a shutdown
	// of the agent, or the holder's end, ends them early.
	ctx := a.ctx
	j.pumped = true
	a.beginWatching(ctx, j)
	a.followEgress(j)
	follow := func() {
		for _, stream := range []string{logs.Stdout, logs.Stderr} {
			j.pumps.Go(func() {
				if err := a.pumpLog(ctx, j, stream); err != nil && ctx.Err() == nil {
					a.log.WarnContext(ctx, "follow log", slog.String("job", j.id), slog.String("stream", stream), slog.Any("error", err))
				}
			})
		}
	}
	if err := a.openLog(j); err == nil {
		follow()
	} else {
		j.pumps.Go(func() {
			a.openLogLater(ctx, j, err)
			follow()
		})
	}
	if j.plan.Output.Metrics != nil {
		j.pumps.Go(func() {
			if err := a.pumpReported(ctx, j); err != nil && ctx.Err() == nil {
				a.log.WarnContext(ctx, "follow the metrics", slog.String("job", j.id), slog.Any("error", err))
			}
		})
	}
	j.pumps.Go(func() {
		if err := a.pumpEvents(ctx, j); err != nil && ctx.Err() == nil {
			a.log.WarnContext(ctx, "follow events", slog.String("job", j.id), slog.Any("error", err))
			// An agent that does not see the trace must not let the job go on.
			j.loseTrace()
		}
	})
}

func (a *Agent) pumpEvents(ctx context.Context, j *Job) error {
	c, err := holdapi.Dial(ctx, j.runDir)
	if err != nil {
		return err
	}
	defer c.Close()
	var last uint64
	for {
		events, err := c.Events(ctx, holdapi.Events{After: last, WaitMillis: pollWait.Milliseconds()})
		if err != nil {
			return err
		}
		for _, e := range events {
			last = e.Sequence
			a.event(ctx, j, e)
		}
		// finished is closed once the holder has been told to finish; what was
		// there then has been read when a wait comes back empty.
		select {
		case <-j.finished:
			if len(events) == 0 {
				return nil
			}
		default:
		}
	}
}

func (a *Agent) event(ctx context.Context, j *Job, e holdapi.Event) {
	// Before lookAt says that the event was seen (settled).
	if e.Kind == bundle.EventInputsFailed {
		j.cancel(fmt.Errorf("%w: %s", errInputs, e.Detail))
	}
	a.sawEgress(ctx, j, e)
	a.lookAt(ctx, j, e)
	if c := e.Checkpoint; c != nil {
		j.anchors.note(*c)
		if j.seen < c.Sequence {
			j.seen = c.Sequence
			a.tell(ctx, j, checkpointEvent(*c, false))
			// One row for all commits: when the first was made, and what all took.
			if j.checkpoints.StartUnixNano == 0 {
				j.checkpoints = bundle.Step{Stage: bundle.StageCheckpoint, StartUnixNano: e.UnixNano - c.Nanos, Outcome: bundle.StepDone}
			}
			j.checkpoints.Nanos += c.Nanos
		}
	}
	if e.Kind == bundle.EventTraceLost {
		j.loseTrace()
	}
}

// loseTrace is called by the event pump alone.
func (j *Job) loseTrace() {
	select {
	case <-j.traceLost:
	default:
		close(j.traceLost)
	}
}

// history reads everything the holder saw, for the bundle: what the pump passed
// on may have gaps where an agent was killed or the job had not started. Where it
// is too much, the kinds that a job can cause at will are left out, and the gaps
// in the sequence show it.
func history(ctx context.Context, c *holdapi.Client) (trace []bundle.Event, commits []holdapi.Checkpoint, err error) {
	size := 0
	for after := uint64(0); ; {
		events, err := c.Events(ctx, holdapi.Events{After: after})
		if err != nil {
			return nil, nil, fmt.Errorf("read the holder's events: %w", err)
		}
		if len(events) == 0 {
			return trace, commits, nil
		}
		for _, e := range events {
			after = e.Sequence
			if e.Checkpoint != nil {
				commits = append(commits, *e.Checkpoint)
			}
			e.Detail = recorded(e.Detail)
			size += 160 + len(e.Detail) + len(e.Process) + len(e.Digest)
			rare := e.Kind != "exec" && e.Kind != "open" && e.Kind != "connect" && e.Kind != "ptrace" && e.Kind != bundle.EventInputError
			if size <= maxTrace || rare {
				trace = append(trace, bundle.Event{Sequence: e.Sequence, UnixNano: e.UnixNano, Kind: e.Kind, Detail: e.Detail, Process: e.Process, Digest: e.Digest})
			}
		}
	}
}

// logDigest digests what one stream carried, without keeping it.
type logDigest struct {
	bytes int64
	hash  hash.Hash
}

func (d *logDigest) add(b []byte) {
	d.bytes += int64(len(b))
	_, _ = d.hash.Write(b) // a hash does not fail
}

func (d *logDigest) stream() bundle.Stream {
	return bundle.Stream{Bytes: d.bytes, Digest: digestOf(d.hash.Sum(nil))}
}

func checkpointsOf(commits []holdapi.Checkpoint) []bundle.Checkpoint {
	out := make([]bundle.Checkpoint, 0, len(commits))
	for _, c := range commits {
		out = append(out, bundle.Checkpoint{
			Sequence: c.Sequence, Name: c.Name, Digest: c.Digest, Parent: c.Parent, Bytes: c.Bytes, Nanos: c.Nanos, Record: c.Record, Signature: c.Signature,
		})
	}
	return out
}

func statusOf(st holdapi.Status) bundle.Status {
	return bundle.Status{
		Started: st.Started, TraceLost: st.TraceLost, Execs: st.Execs, Dropped: st.Dropped, RegionBytes: st.RegionBytes, Scrubbed: st.Scrubbed,
		LogBytes: st.LogBytes, LogCut: st.LogCut, Checkpoints: checkpointsOf(st.Checkpoints), Metrics: st.Metrics,
	}
}
