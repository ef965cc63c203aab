package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
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
	// LeaseUntil is when a running job ends unless the broker renews its lease.
	LeaseUntil *time.Time `json:"leaseUntil,omitempty"`
	// Stopping is why a running job was told to stop.
	Stopping string     `json:"stopping,omitempty"`
	Failed   check.List `json:"failedChecks,omitempty"`
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
		ExitCode: j.GetExitCode(), Submitter: j.GetSubmitter(), LeaseUntil: stamp(j.GetLeaseUntilUnix()), Stopping: j.GetStopping(), Failed: failedChecks(j),
	}
}

func failedChecks(j *agentv1.Job) check.List {
	var l check.List
	for _, k := range j.GetChecks() {
		l = append(l, check.Check{ID: k.GetId(), Outcome: check.Outcome(k.GetOutcome()), Expected: k.GetExpected(), Found: k.GetFound(), Hint: k.GetHint()})
	}
	return l.Failed()
}

// States of a job that has ended.
const (
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

func (c *cli) planCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "plan JOB.yaml",
		Short:   "Resolve a job file to its plan digest, which grants name, without running it",
		Example: "  coffer plan examples/fashion-mnist/job.yaml\n  coffer plan - < job.yaml",
		Args:    exactly("a job file"),
	}
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		file, err := c.readJobFile(args[0])
		if err != nil {
			return err
		}
		a, err := c.agent(daemon.RoleEngineer)
		if err != nil {
			return err
		}
		res, err := call(cmd.Context(), c, "plan "+args[0], serverAgent, a.Plan, &agentv1.PlanRequest{JobFile: file})
		if err != nil {
			return err
		}
		preview, err := c.previewGrants(cmd.Context(), res.GetPlanDigest(), res.GetPlan())
		if err != nil {
			return err
		}
		if *out == formatJSON {
			return writeJSON(c.stdout, struct {
				Digest string          `json:"planDigest"`
				Plan   json.RawMessage `json:"plan"`
				// Preview is how the grants stand; it is no part of the plan.
				Preview []string `json:"preview"`
			}{res.GetPlanDigest(), res.GetPlan(), preview})
		}
		var pretty bytes.Buffer
		if err := json.Indent(&pretty, res.GetPlan(), "", "  "); err != nil {
			return fmt.Errorf("plan %s: the agent's answer is not JSON: %w", args[0], err)
		}
		if _, err := fmt.Fprintf(c.stdout, "%s\n%s\n", res.GetPlanDigest(), pretty.Bytes()); err != nil {
			return err
		}
		for _, line := range preview {
			if _, err := fmt.Fprintln(c.stderr, clean(line)); err != nil {
				return err
			}
		}
		return nil
	}
	return cmd
}

func (c *cli) submitCmd() *cobra.Command {
	var watch bool
	var key string
	cmd := &cobra.Command{
		Use:   "submit JOB.yaml",
		Short: "Submit a job",
		Long: `submit hands a job to the node agent and prints its id. With --watch it shows
every stage with its time, what the job prints and the checkpoints as they are
sealed, until the job has ended. Ctrl-C detaches; the job goes on.`,
		Example: "  coffer submit job.yaml --watch\n  coffer submit job.yaml --idempotency-key nightly-2026-03-01",
		Args:    exactly("a job file"),
	}
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "follow the job until it has ended")
	cmd.Flags().StringVar(&key, "idempotency-key", "", "the same `key` with the same file answers with the same job")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		file, err := c.readJobFile(args[0])
		if err != nil {
			return err
		}
		if key == "" {
			// Makes a repeated delivery of this one call harmless.
			key = rand.Text()
		}
		a, err := c.agent(daemon.RoleEngineer)
		if err != nil {
			return err
		}
		res, err := call(cmd.Context(), c, "submit "+args[0], serverAgent, a.Submit, &agentv1.SubmitRequest{JobFile: file, IdempotencyKey: key})
		if err != nil {
			return err
		}
		job := res.GetJob()
		if !watch {
			if _, err := fmt.Fprintln(c.stdout, job.GetId()); err != nil {
				return err
			}
			_, err := fmt.Fprintf(c.stderr, "submitted %s; follow it with `coffer logs -f %s`\n", clean(job.GetName()), job.GetId())
			return err
		}
		if _, err := fmt.Fprintf(c.stdout, "job %s  %s\nplan %s\n", job.GetId(), clean(job.GetName()), job.GetPlanDigest()); err != nil {
			return err
		}
		return c.watch(cmd.Context(), a, job.GetId())
	}
	return cmd
}

func (c *cli) psCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "ps",
		Short:   "List jobs",
		Example: "  coffer ps\n  coffer ps --output json",
		Args:    exactly(),
	}
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		a, err := c.agent(daemon.RoleEngineer)
		if err != nil {
			return err
		}
		jobs := []jobView{}
		for token := ""; ; {
			res, err := call(cmd.Context(), c, "list jobs", serverAgent, a.List, &agentv1.ListRequest{PageSize: 100, PageToken: token})
			if err != nil {
				return err
			}
			for _, j := range res.GetJobs() {
				jobs = append(jobs, viewJob(j))
			}
			next := res.GetNextPageToken()
			if next == "" {
				break
			}
			if next == token {
				return errors.New("list jobs: the agent repeats a page")
			}
			token = next
		}
		if *out == formatJSON {
			return writeJSON(c.stdout, jobs)
		}
		rows := [][]string{{"JOB", "NAME", "STATE", "STAGE", "SUBMITTED", "REASON"}}
		for _, j := range jobs {
			submitted := "-"
			if j.Submitted != nil {
				submitted = clock(j.Submitted.Unix())
			}
			rows = append(rows, []string{j.ID, j.Name, j.State, orDash(j.Stage), submitted, orDash(j.Reason)})
		}
		return table(c.stdout, rows...)
	}
	return cmd
}

func (c *cli) getJob(ctx context.Context, a agentv1connect.AgentServiceClient, id string) (*agentv1.Job, error) {
	res, err := call(ctx, c, "look up job "+id, serverAgent, a.Get, &agentv1.GetRequest{Id: id})
	if err != nil {
		return nil, err
	}
	return res.GetJob(), nil
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
			rows = append(rows, []string{"reason", orDash(j.GetReason())}, []string{"message", orDash(j.GetMessage())})
		}
		if j.GetLeaseUntilUnix() != 0 {
			rows = append(rows, []string{"lease until", clock(j.GetLeaseUntilUnix())})
		}
		if j.GetStopping() != "" {
			rows = append(rows, []string{"stopping", j.GetStopping()})
		}
		rows = append(rows, []string{"submitter", orDash(j.GetSubmitter())}, []string{"submitted", clock(j.GetSubmittedUnix())}, []string{"ended", clock(j.GetEndedUnix())})
		if s := j.GetState(); s == stateSucceeded || s == stateFailed {
			rows = append(rows, []string{"exit code", strconv.Itoa(int(j.GetExitCode()))})
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

func (c *cli) logsCmd() *cobra.Command {
	var follow bool
	cmd := &cobra.Command{
		Use:   "logs JOB",
		Short: "Print what a job has written to its standard output and error",
		Long: `logs prints what a job has written, up to the output budget of its plan. On a
terminal, control characters are replaced.`,
		Example: "  coffer logs 01JD3V8Q\n  coffer logs -f 01JD3V8Q",
		Args:    exactly("a job id"),
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "wait for more until the job has ended")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		a, err := c.agent(daemon.RoleEngineer)
		if err != nil {
			return err
		}
		to := map[string]io.Writer{"stdout": c.stdout, "stderr": c.stderr}
		for k, w := range to {
			if terminal(w) {
				to[k] = &printable{w: w}
			}
		}
		return c.events(cmd.Context(), a, args[0], follow, func(e *agentv1.WatchResponse) error {
			l := e.GetLog()
			if l == nil {
				return nil
			}
			w := to[l.GetStream()]
			if w == nil {
				return fmt.Errorf("logs of job %s: unknown stream %.20q", args[0], l.GetStream())
			}
			_, err := w.Write(l.GetData())
			return err
		})
	}
	return cmd
}

func (c *cli) cancelCmd() *cobra.Command {
	return &cobra.Command{
		Use:     "cancel JOB",
		Short:   "Stop a job",
		Example: "  coffer cancel 01JD3V8Q",
		Args:    exactly("a job id"),
		RunE: func(cmd *cobra.Command, args []string) error {
			a, err := c.agent(daemon.RoleEngineer)
			if err != nil {
				return err
			}
			res, err := call(cmd.Context(), c, "cancel job "+args[0], serverAgent, a.Cancel, &agentv1.CancelRequest{Id: args[0]})
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(c.stdout, "job %s is %s\n", res.GetJob().GetId(), clean(res.GetJob().GetState()))
			return err
		},
	}
}

// checkpointView is a sealed checkpoint in JSON output.
type checkpointView struct {
	Sequence uint64    `json:"sequence"`
	Name     string    `json:"name"`
	Digest   string    `json:"digest"`
	Bytes    int64     `json:"bytes"`
	Sealed   time.Time `json:"sealed"`
}

func (c *cli) checkpointsCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "checkpoints JOB",
		Short:   "List the checkpoints that a job has sealed",
		Example: "  coffer checkpoints 01JD3V8Q --output json",
		Args:    exactly("a job id"),
	}
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		a, err := c.agent(daemon.RoleEngineer)
		if err != nil {
			return err
		}
		list := []checkpointView{}
		err = c.events(cmd.Context(), a, args[0], false, func(e *agentv1.WatchResponse) error {
			if k := e.GetCheckpoint(); k != nil {
				list = append(list, checkpointView{k.GetSequence(), k.GetName(), k.GetDigest(), k.GetBytes(), time.Unix(0, e.GetTimeUnixNano()).UTC()})
			}
			return nil
		})
		if err != nil {
			return err
		}
		if *out == formatJSON {
			return writeJSON(c.stdout, list)
		}
		rows := [][]string{{"SEQUENCE", "NAME", "BYTES", "SEALED", "DIGEST"}}
		for _, k := range list {
			rows = append(rows, []string{strconv.FormatUint(k.Sequence, 10), k.Name, strconv.FormatInt(k.Bytes, 10), clock(k.Sealed.Unix()), k.Digest})
		}
		return table(c.stdout, rows...)
	}
	return cmd
}

func (c *cli) evidenceCmd() *cobra.Command {
	var file, as string
	get := &cobra.Command{
		Use:   "get JOB --file FILE",
		Short: "Fetch the evidence bundle of a job that has ended",
		Long: `get fetches the evidence bundle of a job, which coffer-verify checks on any
machine, without a network.`,
		Example: "  coffer evidence get 01JD3V8Q -o bundle.json\n  coffer-verify --verifier-keys verifier.jwks --broker-keys broker.jwks bundle.json",
		Args:    exactly("a job id"),
	}
	get.Flags().StringVarP(&file, "file", "o", "", "`FILE` to write; must not exist")
	get.Flags().StringVar(&as, "as", daemon.RoleEngineer, "`role` that asks: engineer or auditor")
	get.RunE = func(cmd *cobra.Command, args []string) error {
		if file == "" {
			return usagef(cmd, "say where to write the bundle with -o FILE")
		}
		if as != daemon.RoleEngineer && as != daemon.RoleAuditor {
			return usagef(cmd, "--as %q: want engineer or auditor", as)
		}
		if _, err := os.Lstat(file); err == nil {
			return &exitError{code: exitUsage, text: file + " exists: name another file"}
		}
		a, err := c.agent(as)
		if err != nil {
			return err
		}
		res, err := call(cmd.Context(), c, "get the evidence of job "+args[0], serverAgent, a.Bundle, &agentv1.BundleRequest{Id: args[0]})
		if err != nil {
			return err
		}
		if err := create(file, res.GetBundle()); err != nil {
			return err
		}
		_, err = fmt.Fprintf(c.stdout, "%s: %d bytes\n", file, len(res.GetBundle()))
		return err
	}
	return group("evidence", "Fetch evidence bundles", get)
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
// event on.
func (c *cli) events(ctx context.Context, a agentv1connect.AgentServiceClient, id string, follow bool, do func(*agentv1.WatchResponse) error) error {
	j, err := c.getJob(ctx, a, id)
	if err != nil {
		return err
	}
	follow = follow || ended(j.GetState())
	var last uint64
	var lost time.Time
	for {
		seen := last
		err := c.stream(ctx, a, id, &last, follow, do)
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil || !away(err):
			return c.explain("follow job "+id, serverAgent, err)
		case last != seen:
			lost = time.Time{}
		}
		if lost.IsZero() {
			lost = time.Now()
			if _, err := fmt.Fprintln(c.stderr, "the node agent is away; waiting for it to come back"); err != nil {
				return err
			}
		}
		if time.Since(lost) > retryFor {
			return c.explain("follow job "+id, serverAgent, err)
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
	s, err := a.Watch(sctx, connect.NewRequest(&agentv1.WatchRequest{Id: id, AfterSequence: *last}))
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
