package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/internal/daemon"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/api/agent/v1/agentv1connect"
)

// serverAgent is what messages call the node agent.
const serverAgent = "node agent"

// maxJobFile bounds a job file, in bytes.
const maxJobFile = 1 << 20

// readJobFile reads a job file, or standard input for "-".
func (c *cli) readJobFile(path string) ([]byte, error) {
	var r io.Reader = c.stdin
	if path != "-" {
		f, err := os.Open(path) // #nosec G304 -- the user names the file
		if err != nil {
			return nil, &exitError{code: exitUsage, text: "job file: " + err.Error(), err: err}
		}
		defer func() { _ = f.Close() }()
		r = f
	}
	b, err := io.ReadAll(io.LimitReader(r, maxJobFile+1))
	if err != nil {
		return nil, &exitError{code: exitUsage, text: "job file: " + err.Error(), err: err}
	}
	if len(b) > maxJobFile {
		return nil, &exitError{code: exitUsage, text: fmt.Sprintf("job file %s is larger than %d bytes", path, maxJobFile)}
	}
	return b, nil
}

// jobView is a job in JSON output.
type jobView struct {
	ID         string     `json:"id"`
	Name       string     `json:"name"`
	PlanDigest string     `json:"planDigest"`
	State      string     `json:"state"`
	Stage      string     `json:"stage,omitempty"`
	Reason     string     `json:"reason,omitempty"`
	Message    string     `json:"message,omitempty"`
	Submitted  *time.Time `json:"submitted,omitempty"`
	Ended      *time.Time `json:"ended,omitempty"`
	ExitCode   int32      `json:"exitCode"`
	Submitter  string     `json:"submitter,omitempty"`
	// Attempt is 1 for a job as it was submitted; RetryOf is that job, and RetriedAs
	// the next attempt, each a job of its own.
	Attempt   int32  `json:"attempt,omitempty"`
	RetryOf   string `json:"retryOf,omitempty"`
	RetriedAs string `json:"retriedAs,omitempty"`
	Priority  int32  `json:"priority"`
	// Queue is that of a job that has not ended, Gang with whom it begins, and GangJobs
	// who that is, once they have room.
	Queue    string   `json:"queue,omitempty"`
	Gang     string   `json:"gang,omitempty"`
	GangJobs []string `json:"gangJobs,omitempty"`
	// QueuePosition is the place of a job that waits for room, from 1.
	QueuePosition int32      `json:"queuePosition,omitempty"`
	WaitsFor      string     `json:"waitsFor,omitempty"`
	NotBefore     *time.Time `json:"notBefore,omitempty"`
	// LeaseUntil is when a running job ends unless the broker renews its lease.
	LeaseUntil *time.Time `json:"leaseUntil,omitempty"`
	// Going is what takes long of what goes on at this moment, of status alone.
	Going []goingView `json:"going,omitempty"`
	// Attested is when a running job that attests again did so last, Attests when it
	// will, and Paused that it is frozen until its machine is affirmed.
	Attested *time.Time `json:"attested,omitempty"`
	Attests  *time.Time `json:"attests,omitempty"`
	Paused   bool       `json:"paused,omitempty"`
	// Stopping is why a running job was told to stop.
	Stopping string     `json:"stopping,omitempty"`
	Failed   check.List `json:"failedChecks,omitempty"`
	// Metrics are the numbers that the job reported, in the plan's order; MetricsCut is
	// how many more it reported than the plan allows.
	Metrics    []metricView `json:"metrics,omitempty"`
	MetricsCut int64        `json:"metricsCut,omitempty"`
}

type metricView struct {
	Name  string  `json:"name"`
	Count int64   `json:"count"`
	Last  float64 `json:"last"`
	Min   float64 `json:"min"`
	Max   float64 `json:"max"`
}

func viewMetrics(ms []*agentv1.Metric) []metricView {
	var out []metricView
	for _, m := range ms {
		out = append(out, metricView{m.GetName(), m.GetCount(), m.GetLast(), m.GetMin(), m.GetMax()})
	}
	return out
}

func stamp(unix int64) *time.Time {
	if unix == 0 {
		return nil
	}
	t := time.Unix(unix, 0).UTC()
	return &t
}

func viewJob(j *agentv1.Job) jobView {
	return jobView{
		ID: j.GetId(), Name: j.GetName(), PlanDigest: j.GetPlanDigest(), State: j.GetState(), Stage: j.GetStage(),
		Reason: j.GetReason(), Message: j.GetMessage(), Submitted: stamp(j.GetSubmittedUnix()), Ended: stamp(j.GetEndedUnix()),
		ExitCode: j.GetExitCode(), Submitter: j.GetSubmitter(), LeaseUntil: stamp(j.GetLeaseUntilUnix()), Going: viewGoing(j.GetGoing()), Attested: stamp(j.GetAttestedUnix()), Attests: stamp(j.GetAttestsUnix()), Paused: j.GetPaused(), Stopping: j.GetStopping(), Failed: failedChecks(j),
		Attempt: j.GetAttempt(), RetryOf: j.GetRetryOf(), RetriedAs: j.GetRetriedAs(), Priority: j.GetPriority(),
		Queue: j.GetQueue(), Gang: j.GetGang(), GangJobs: j.GetGangJobs(), QueuePosition: j.GetQueuePosition(), WaitsFor: j.GetWaitsFor(), NotBefore: stamp(j.GetNotBeforeUnix()),
		Metrics: viewMetrics(j.GetMetrics()), MetricsCut: j.GetMetricsCut(),
	}
}

func failedChecks(j *agentv1.Job) check.List {
	return checksOf(j.GetChecks()).Failed()
}

func checksOf(all []*agentv1.Check) check.List {
	var l check.List
	for _, k := range all {
		l = append(l, check.Check{ID: k.GetId(), Outcome: check.Outcome(k.GetOutcome()), Expected: k.GetExpected(), Found: k.GetFound(), Hint: k.GetHint()})
	}
	return l
}

// States of a job.
const (
	stateQueued    = "queued" // has not ended
	stateSucceeded = "succeeded"
	stateFailed    = "failed"
	stateRefused   = "refused"
	stateCancelled = "cancelled"
)

func ended(state string) bool {
	switch state {
	case stateSucceeded, stateFailed, stateRefused, stateCancelled:
		return true
	}
	return false
}

func (c *cli) getJob(ctx context.Context, a agentv1connect.AgentServiceClient, id string) (*agentv1.Job, error) {
	res, err := call(ctx, c, "look up job "+id, serverAgent, a.Get, &agentv1.GetRequest{Id: id})
	if err != nil {
		return nil, err
	}
	return res.GetJob(), knownJob(res.GetJob(), id)
}

// idForm is the form of what a server names and people type again, in a shell.
var idForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

// wordForm is what a shell takes for a word, and nothing for a flag.
var wordForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._:/@-]*$`)

// word is s as one word of a shell's command line.
func word(s string) string {
	if wordForm.MatchString(s) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// knownJob refuses an answer about another job than the one that was asked for, and one
// whose ids are not fit for a command line.
func knownJob(j *agentv1.Job, id string) error {
	if j.GetId() != id {
		return fmt.Errorf("the node agent answers with job %.80q in the place of %.80q", j.GetId(), id)
	}
	for _, name := range []string{id, j.GetRetriedAs(), j.GetRetryOf()} {
		if name != "" && !idForm.MatchString(name) {
			return fmt.Errorf("the node agent calls a job %.80q: want letters, digits, '.', '_' and '-'", name)
		}
	}
	return nil
}

func (c *cli) statusCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "status JOB",
		Short:   "Say how a job is, and why it was refused",
		Example: "  coffer status 01JD3V8Q",
		Args:    exactly("a job id"),
	}
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		a, err := c.agent(daemon.RoleEngineer)
		if err != nil {
			return err
		}
		j, err := c.getJob(cmd.Context(), a, args[0])
		if err != nil {
			return err
		}
		if *out == formatJSON {
			return writeJSON(c.stdout, viewJob(j))
		}
		rows := [][]string{{"job", j.GetId()}, {"name", j.GetName()}, {"plan", j.GetPlanDigest()}, {"state", j.GetState()}, {"stage", orDash(j.GetStage())}}
		if j.GetReason() != "" || j.GetMessage() != "" {
			rows = append(rows, []string{"reason", orDash(j.GetReason())})
			if len(failedChecks(j)) == 0 { // what follows says it in full
				rows = append(rows, []string{"message", orDash(j.GetMessage())})
			}
		}
		var now transfers
		now.take(j.GetGoing(), time.Now())
		for _, g := range now {
			rows = append(rows, []string{"going", g.line()})
		}
		if j.GetQueuePosition() > 0 {
			rows = append(rows, []string{"queue", fmt.Sprintf("number %d of %s: %s", j.GetQueuePosition(), orDash(j.GetQueue()), orDash(j.GetWaitsFor()))})
		} else if j.GetQueue() != "" {
			rows = append(rows, []string{"queue", j.GetQueue()})
		}
		if j.GetRetryOf() != "" || j.GetRetriedAs() != "" {
			rows = append(rows, []string{"attempt", fmt.Sprintf("%d, next %s", j.GetAttempt(), orDash(j.GetRetriedAs()))})
		}
		if j.GetLeaseUntilUnix() != 0 {
			rows = append(rows, []string{"lease until", clock(j.GetLeaseUntilUnix())})
		}
		if j.GetAttestsUnix() != 0 {
			text := clock(j.GetAttestedUnix()) + ", next " + clock(j.GetAttestsUnix())
			if j.GetPaused() {
				text += "; paused until the machine is affirmed"
			}
			rows = append(rows, []string{"attested", text})
		}
		if j.GetStopping() != "" {
			rows = append(rows, []string{"stopping", j.GetStopping()})
		}
		rows = append(rows, []string{"submitter", orDash(j.GetSubmitter())}, []string{"submitted", clock(j.GetSubmittedUnix())}, []string{"ended", clock(j.GetEndedUnix())})
		if s := j.GetState(); s == stateSucceeded || s == stateFailed {
			rows = append(rows, []string{"exit code", strconv.Itoa(int(j.GetExitCode()))})
		}
		for _, m := range j.GetMetrics() {
			rows = append(rows, []string{"metric", fmt.Sprintf("%s %.6g, least %.6g, most %.6g, of %d", clean(m.GetName()), m.GetLast(), m.GetMin(), m.GetMax(), m.GetCount())})
		}
		if n := j.GetMetricsCut(); n > 0 {
			rows = append(rows, []string{"metrics cut", fmt.Sprintf("%d values beyond what the plan allows", n)})
		}
		if err := table(c.stdout, rows...); err != nil {
			return err
		}
		if failed := failedChecks(j); len(failed) > 0 {
			return printRefusal(c.stdout, j.GetStage(), failed)
		}
		return nil
	}
	return cmd
}

// create writes a file that must not exist, whole or not at all.
func create(path string, b []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(f.Name())) }()
	if _, err := f.Write(b); err != nil {
		return errors.Join(err, f.Close())
	}
	// A bundle is for others to read.
	if err := errors.Join(f.Chmod(0o644), f.Sync(), f.Close()); err != nil {
		return err
	}
	// Unlike a rename, a link does not replace what is there.
	return os.Link(f.Name(), path)
}

// quiet is how long a running job's events may pause before a command that does
// not follow takes it that it has seen those there are: the agent streams what
// it has at once, and marks no end while the job runs.
const quiet = 500 * time.Millisecond

// Waiting for an agent that went away while a job was followed.
const (
	retryEvery = 500 * time.Millisecond
	retryFor   = 2 * time.Minute
)

// events calls do for every event of a job so far, and with follow for every
// one to come. It survives a restart of the agent: it asks again from the last
// event on, and drops what it has seen of the job's output.
func (c *cli) events(ctx context.Context, a agentv1connect.AgentServiceClient, id string, follow bool, do func(*agentv1.WatchResponse) error) error {
	j, err := c.getJob(ctx, a, id)
	if err != nil {
		return err
	}
	follow = follow || ended(j.GetState())
	var last uint64
	printed := map[string]int64{}
	once := func(e *agentv1.WatchResponse) error {
		if l := e.GetLog(); l != nil {
			seen := printed[l.GetStream()] - l.GetOffset()
			if seen >= int64(len(l.GetData())) && seen > 0 {
				return nil
			}
			printed[l.GetStream()] = l.GetOffset() + int64(len(l.GetData()))
			if seen > 0 {
				l.Data, l.Offset = l.GetData()[seen:], l.GetOffset()+seen
			}
		}
		return do(e)
	}
	return c.whileAway(ctx, "follow job "+id, func() (bool, error) {
		before := last
		err := c.stream(ctx, a, id, &last, follow, once)
		return last != before, err
	})
}

// whileAway calls stream until it ends, and again when the agent goes away and comes
// back. stream reports whether it got anything.
func (c *cli) whileAway(ctx context.Context, doing string, stream func() (progress bool, err error)) error {
	var lost time.Time
	for {
		progress, err := stream()
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil || !away(err):
			return c.explain(doing, serverAgent, err)
		case progress:
			lost = time.Time{}
		}
		if lost.IsZero() {
			lost = time.Now()
			if _, err := fmt.Fprintln(c.stderr, "the node agent is away; waiting for it to come back"); err != nil {
				return err
			}
		}
		if time.Since(lost) > retryFor {
			return c.explain(doing, serverAgent, err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(retryEvery):
		}
	}
}

// away reports whether a stream broke because the agent ended: it said that it
// is about to, or the connection broke, which is an error that no server sent.
func away(err error) bool {
	var ce *connect.Error
	return errors.As(err, &ce) && (ce.Code() == connect.CodeUnavailable || !connect.IsWireError(err))
}

// stream reads one stream of events until it ends.
func (c *cli) stream(ctx context.Context, a agentv1connect.AgentServiceClient, id string, last *uint64, follow bool, do func(*agentv1.WatchResponse) error) error {
	sctx, cancel := context.WithCancel(ctx)
	defer cancel()
	idle := time.AfterFunc(time.Hour, cancel)
	idle.Stop()
	if !follow {
		idle.Reset(quiet)
	}
	s, err := a.Watch(sctx, connect.NewRequest(&agentv1.WatchRequest{Id: id, AfterSequence: *last, Progress: follow}))
	if err != nil {
		return err
	}
	defer func() { _ = s.Close() }()
	for s.Receive() {
		if !follow {
			idle.Reset(quiet)
		}
		e := s.Msg()
		if err := do(e); err != nil {
			return err
		}
		*last = e.GetSequence()
	}
	if !follow && ctx.Err() == nil && sctx.Err() != nil {
		return nil
	}
	return s.Err()
}
