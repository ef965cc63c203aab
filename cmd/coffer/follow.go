package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/stack"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/api/agent/v1/agentv1connect"
)

func connectRequest[T any](m *T) *connect.Request[T] { return connect.NewRequest(m) }

func size(n int64) string { return stack.Bytes(n) }

// listJobs returns every job that the caller may see, in one state or in all.
func (c *cli) listJobs(ctx context.Context, a agentv1connect.AgentServiceClient, state string) ([]jobView, error) {
	jobs := []jobView{}
	for token := ""; ; {
		res, err := call(ctx, c, "list jobs", serverAgent, a.List, &agentv1.ListRequest{PageSize: 100, PageToken: token, State: state})
		if err != nil {
			return nil, err
		}
		for _, j := range res.GetJobs() {
			jobs = append(jobs, viewJob(j))
		}
		next := res.GetNextPageToken()
		if next == "" {
			return jobs, nil
		}
		if next == token {
			return nil, errors.New("list jobs: the agent repeats a page")
		}
		token = next
	}
}

// listEvery is the pause between two looks of ps --watch.
const listEvery = 2 * time.Second

func (c *cli) psCmd() *cobra.Command {
	var watch bool
	var state string
	cmd := &cobra.Command{
		Use:   "ps",
		Short: "List jobs",
		Long: `ps lists jobs. With --watch it shows the list again whenever it has changed, until
Ctrl-C; in JSON each list is one line.`,
		Example: "  coffer ps\n  coffer ps --watch\n  coffer ps --state queued --output json",
		Args:    exactly(),
	}
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "show the list again when it changes")
	cmd.Flags().StringVar(&state, "state", "", "only jobs in this `state`: queued, running, succeeded, failed, refused or cancelled")
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		a, err := c.agent(daemon.RoleEngineer)
		if err != nil {
			return err
		}
		last := ""
		for {
			jobs, err := c.listJobs(cmd.Context(), a, state)
			if err != nil {
				if watch && cmd.Context().Err() != nil {
					return nil
				}
				return err
			}
			b, err := json.Marshal(jobs)
			if err != nil {
				return err
			}
			if string(b) != last {
				last = string(b)
				if err := c.showJobs(jobs, *out, watch); err != nil {
					return err
				}
			}
			if !watch {
				return nil
			}
			select {
			case <-cmd.Context().Done():
				return nil
			case <-time.After(listEvery):
			}
		}
	}
	return cmd
}

func (c *cli) showJobs(jobs []jobView, out format, again bool) error {
	if out == formatJSON {
		if again {
			return json.NewEncoder(c.stdout).Encode(jobs)
		}
		return writeJSON(c.stdout, jobs)
	}
	if again && terminal(c.stdout) {
		// Home, and clear what is below.
		if _, err := io.WriteString(raw(c.stdout), "\x1b[H\x1b[2J"); err != nil {
			return err
		}
	}
	rows := [][]string{{"JOB", "NAME", "STATE", "STAGE", "ATTEMPT", "SUBMITTED", "REASON"}}
	for _, j := range jobs {
		submitted, why := "-", j.Reason
		if j.Submitted != nil {
			submitted = clock(j.Submitted.Unix())
		}
		if j.QueuePosition > 0 {
			why = fmt.Sprintf("number %d in the queue %s: %s", j.QueuePosition, orDash(j.Queue), j.WaitsFor)
		}
		rows = append(rows, []string{j.ID, j.Name, j.State, orDash(j.Stage), fmt.Sprint(max(j.Attempt, 1)), submitted, orDash(why)})
	}
	return table(c.stdout, rows...)
}

// eventView is an event in JSON output, one line each.
type eventView struct {
	Sequence uint64    `json:"sequence"`
	Time     time.Time `json:"time"`
	// Kind says which of the others there is.
	Kind       string         `json:"kind"`
	Stage      *stageView     `json:"stage,omitempty"`
	Log        *logView       `json:"log,omitempty"`
	Job        *jobView       `json:"job,omitempty"`
	Checkpoint *sealedView    `json:"checkpoint,omitempty"`
	Reattest   map[string]any `json:"reattest,omitempty"`
	Lease      map[string]any `json:"lease,omitempty"`
	Queue      map[string]any `json:"queue,omitempty"`
	Egress     map[string]any `json:"egress,omitempty"`
	Alert      map[string]any `json:"alert,omitempty"`
	Metrics    *metricsView   `json:"metrics,omitempty"`
	// Going is all that takes long of what goes on, of the kind progress: there is none when
	// nothing does any more.
	Going []goingView `json:"going,omitempty"`
	// Dropped is what a job printed beyond its plan so far, in bytes.
	Dropped int64 `json:"dropped,omitempty"`
}

type metricsView struct {
	Values []metricView `json:"values"`
	// Cut is how many more were reported than the plan allows.
	Cut int64 `json:"cut"`
}

type stageView struct {
	Name   string `json:"name"`
	Phase  string `json:"phase"`
	Nanos  int64  `json:"nanos"`
	Detail string `json:"detail,omitempty"`
}

type logView struct {
	Stream string `json:"stream"`
	// Text is what was printed, with U+FFFD for bytes that are no UTF-8.
	Text   string `json:"text"`
	Offset int64  `json:"offset"`
}

type sealedView struct {
	Sequence uint64 `json:"sequence"`
	Name     string `json:"name"`
	Digest   string `json:"digest"`
	Bytes    int64  `json:"bytes"`
	Anchored bool   `json:"anchored"`
}

func viewEvent(e *agentv1.WatchResponse) eventView {
	v := eventView{Sequence: e.GetSequence(), Time: time.Unix(0, e.GetTimeUnixNano()).UTC()}
	switch {
	case e.GetStage() != nil:
		s := e.GetStage()
		v.Kind, v.Stage = "stage", &stageView{s.GetStage(), s.GetPhase(), s.GetDurationNanos(), s.GetDetail()}
	case e.GetLog() != nil:
		l := e.GetLog()
		v.Kind, v.Log = "log", &logView{l.GetStream(), string(l.GetData()), l.GetOffset()}
	case e.GetJob() != nil:
		j := viewJob(e.GetJob())
		v.Kind, v.Job = "job", &j
	case e.GetCheckpoint() != nil:
		k := e.GetCheckpoint()
		v.Kind, v.Checkpoint = "checkpoint", &sealedView{k.GetSequence(), k.GetName(), k.GetDigest(), k.GetBytes(), k.GetAnchored()}
	case e.GetLease() != nil:
		l := e.GetLease()
		v.Kind, v.Lease = "lease", map[string]any{"code": l.GetCode(), "reason": l.GetReason(), "graceMillis": l.GetGraceMillis()}
	case e.GetReattest() != nil:
		a := e.GetReattest()
		v.Kind, v.Reattest = "reattest", map[string]any{
			"number": a.GetNumber(), "cause": a.GetCause(), "verdict": a.GetVerdict(), "then": a.GetThen(), "durationNanos": a.GetDurationNanos(), "failed": a.GetFailed(), "message": a.GetMessage(),
		}
	case e.GetQueue() != nil:
		v.Kind, v.Queue = "queue", map[string]any{"position": e.GetQueue().GetPosition(), "waitsFor": e.GetQueue().GetWaitsFor()}
	case e.GetProgress() != nil:
		v.Kind, v.Going = "progress", viewGoing(e.GetProgress().GetGoing())
	case e.GetMetrics() != nil:
		v.Kind, v.Metrics = "metrics", &metricsView{viewMetrics(e.GetMetrics().GetMetrics()), e.GetMetrics().GetCut()}
	case e.GetLogCut() != nil:
		v.Kind, v.Dropped = "logCut", e.GetLogCut().GetBytes()
	case e.GetAlert() != nil:
		l := e.GetAlert()
		v.Kind, v.Alert = "alert", map[string]any{
			"sequence": l.GetSequence(), "rule": l.GetRule(), "says": l.GetSays(), "action": l.GetAction(), "severity": l.GetSeverity(), "event": l.GetKind(),
			"process": l.GetProcess(), "path": l.GetPath(), "digest": l.GetDigest(), "address": l.GetAddress(), "bytes": l.GetBytes(), "count": l.GetCount(),
		}
	case e.GetEgress() != nil:
		g := e.GetEgress()
		v.Kind, v.Egress = "egress", map[string]any{
			"host": g.GetHost(), "port": g.GetPort(), "rule": g.GetRule(), "count": g.GetCount(), "process": g.GetProcess(),
			"sent": g.GetSent(), "received": g.GetReceived(), "end": g.GetEnd(),
		}
	default:
		v.Kind = "unknown"
	}
	return v
}

// watchJSON writes every event of a job, and of the attempts that follow it, as a line
// of JSON. The exit code says how it ended.
func (c *cli) watchJSON(ctx context.Context, a agentv1connect.AgentServiceClient, id string) error {
	w := json.NewEncoder(c.stdout)
	for {
		if err := c.events(ctx, a, id, true, func(e *agentv1.WatchResponse) error { return w.Encode(viewEvent(e)) }); err != nil {
			return err
		}
		j, err := c.getJob(ctx, a, id)
		if err != nil {
			return err
		}
		if id = j.GetRetriedAs(); id != "" {
			continue
		}
		switch j.GetState() {
		case stateSucceeded:
			return nil
		case stateRefused:
			return &exitError{code: exitRefused}
		case stateFailed, stateCancelled:
			return &exitError{code: exitFailed}
		}
		return &exitError{code: exitUnknown}
	}
}

func (c *cli) eventsCmd() *cobra.Command {
	var watch bool
	cmd := &cobra.Command{
		Use:   "events JOB",
		Short: "List what has happened to a job",
		Long: `events lists the stages, checkpoints, refusals and warnings of a job, without what
it prints. In JSON there is all of it, one event a line.`,
		Example: "  coffer events 01JD3V8Q\n  coffer events -w 01JD3V8Q --output json",
		Args:    exactly("a job id"),
	}
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "wait for more until the job has ended")
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		a, err := c.agent(daemon.RoleEngineer)
		if err != nil {
			return err
		}
		w := json.NewEncoder(c.stdout)
		err = c.events(cmd.Context(), a, args[0], watch, func(e *agentv1.WatchResponse) error {
			if e.GetProgress() != nil {
				return nil // it has not happened, it goes on
			}
			if *out == formatJSON {
				return w.Encode(viewEvent(e))
			}
			line := eventLine(e)
			if j := e.GetJob(); j != nil {
				line = "ended      " + clean(orDash(j.GetState()))
			}
			if line == "" {
				return nil
			}
			_, err := fmt.Fprintf(c.stdout, "%s  %s\n", time.Unix(0, e.GetTimeUnixNano()).UTC().Format("15:04:05.000"), line)
			return err
		})
		if watch && cmd.Context().Err() != nil {
			return c.left("the events of job "+args[0], "coffer events -w "+args[0])
		}
		return err
	}
	return cmd
}

func (c *cli) logsCmd() *cobra.Command {
	var follow bool
	var since, download string
	var attempt int32
	cmd := &cobra.Command{
		Use:   "logs JOB",
		Short: "Print what a job has written to its standard output and error",
		Long: `logs prints what a job has written, up to the output budget of its plan: byte for
byte into a file or a pipe, and on a terminal with what cannot be seen, such as
control characters, as escapes. All of it is the job's word. Each attempt of a job
has a log of its own: without --attempt it is that of the job named.`,
		Example: "  coffer logs 01JD3V8Q\n  coffer logs -f 01JD3V8Q --since 5m\n  coffer logs 01JD3V8Q --attempt 2\n  coffer logs 01JD3V8Q --download train.log",
		Args:    exactly("a job id"),
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "wait for more until the job has ended")
	cmd.Flags().StringVar(&since, "since", "", "only what came after this `time`: 5m for that long ago, or 2026-03-01T12:00:00Z")
	cmd.Flags().Int32Var(&attempt, "attempt", 0, "the log of this `attempt` of the job, from 1")
	cmd.Flags().StringVar(&download, "download", "", "new `file` for both streams, byte for byte")
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		from, err := parseSince(since, time.Now())
		if err != nil {
			return usagef(cmd, "--since: %s", err)
		}
		a, err := c.agent(daemon.RoleEngineer)
		if err != nil {
			return err
		}
		id := args[0]
		if attempt != 0 {
			if id, err = c.attempt(cmd.Context(), a, id, attempt); err != nil {
				return err
			}
		}
		to := map[string]io.Writer{"stdout": logTo(c.stdout), "stderr": logTo(c.stderr)}
		if download != "" {
			f, err := os.OpenFile(download, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
			if err != nil {
				return &exitError{code: exitUsage, text: "--download: " + err.Error(), err: err}
			}
			to = map[string]io.Writer{"stdout": f, "stderr": f}
			defer func() { _ = f.Close() }()
		}
		lines := json.NewEncoder(c.stdout)
		var wrote int64
		err = c.readLog(cmd.Context(), a, id, follow, func(at time.Time, l *agentv1.LogEvent) error {
			if at.Before(from) {
				return nil
			}
			wrote += int64(len(l.GetData()))
			if *out == formatJSON && download == "" {
				return lines.Encode(eventView{Time: at.UTC(), Kind: "log", Log: &logView{l.GetStream(), string(l.GetData()), l.GetOffset()}})
			}
			w := to[l.GetStream()]
			if w == nil {
				return fmt.Errorf("logs of job %s: unknown stream %.20q", id, l.GetStream())
			}
			_, err := w.Write(l.GetData())
			return err
		})
		if follow && cmd.Context().Err() != nil {
			return c.left("the log of job "+id, "coffer logs -f "+id)
		}
		if err != nil || download == "" {
			return err
		}
		if *out == formatJSON {
			return writeJSON(c.stdout, map[string]any{"file": download, "bytes": wrote})
		}
		_, err = fmt.Fprintf(c.stdout, "%s: %d bytes\n", download, wrote)
		return err
	}
	return cmd
}

// parseSince reads a time, or how long ago it was. "" is the beginning.
func parseSince(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		return time.Time{}, fmt.Errorf("%.40q: want a duration such as 5m, or a time such as 2026-03-01T12:00:00Z", s)
	}
	return t, nil
}

// attempt returns the id of an attempt of a job, which may be any of its attempts.
func (c *cli) attempt(ctx context.Context, a agentv1connect.AgentServiceClient, id string, n int32) (string, error) {
	j, err := c.getJob(ctx, a, id)
	if err != nil {
		return "", err
	}
	if first := j.GetRetryOf(); first != "" && n < j.GetAttempt() {
		if j, err = c.getJob(ctx, a, first); err != nil {
			return "", err
		}
	}
	for max(j.GetAttempt(), 1) < n && j.GetRetriedAs() != "" {
		if j, err = c.getJob(ctx, a, j.GetRetriedAs()); err != nil {
			return "", err
		}
	}
	if max(j.GetAttempt(), 1) != n {
		return "", &exitError{code: exitUsage, text: fmt.Sprintf("job %s has no attempt %d", id, n)}
	}
	return j.GetId(), nil
}

// readLog calls do for each piece of a log, and goes on where it was when the agent
// comes back from a restart.
func (c *cli) readLog(ctx context.Context, a agentv1connect.AgentServiceClient, id string, follow bool, do func(time.Time, *agentv1.LogEvent) error) error {
	offsets := map[string]int64{}
	doing := "read the log of job " + id
	return c.whileAway(ctx, doing, func() (progress bool, err error) {
		s, err := a.Logs(ctx, connect.NewRequest(&agentv1.LogsRequest{Id: id, StdoutOffset: offsets["stdout"], StderrOffset: offsets["stderr"], Follow: follow}))
		if err != nil {
			return false, err
		}
		defer func() { _ = s.Close() }()
		for s.Receive() {
			m := s.Msg()
			if len(m.GetSealed()) > 0 {
				return true, &exitError{code: exitFailed, text: fmt.Sprintf("%s: it is sealed to the key that its job file names; read it with `coffer logkey read %s --key FILE`", doing, id)}
			}
			l := m.GetLog()
			if l == nil {
				continue
			}
			if err := do(time.Unix(0, m.GetTimeUnixNano()), l); err != nil {
				return true, err
			}
			offsets[l.GetStream()], progress = l.GetOffset()+int64(len(l.GetData())), true
		}
		return progress, s.Err()
	})
}

func (c *cli) cancelCmd() *cobra.Command {
	var checkpoint bool
	cmd := &cobra.Command{
		Use:   "cancel JOB",
		Short: "Stop a job",
		Long: `cancel tells a job to stop: it gets SIGTERM and as much time as its job file gives
it with stopGrace. With --checkpoint the command waits for its end and fails unless
a checkpoint was sealed after the job was told to stop.`,
		Example: "  coffer cancel 01JD3V8Q\n  coffer cancel --checkpoint 01JD3V8Q",
		Args:    exactly("a job id"),
	}
	cmd.Flags().BoolVar(&checkpoint, "checkpoint", false, "wait for the job's last checkpoint, and fail if there is none")
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		a, err := c.agent(daemon.RoleEngineer)
		if err != nil {
			return err
		}
		id := args[0]
		var before uint64
		sealed := func(after uint64) (last *agentv1.CheckpointEvent, err error) {
			err = c.events(cmd.Context(), a, id, after > 0, func(e *agentv1.WatchResponse) error {
				if k := e.GetCheckpoint(); k != nil && !k.GetAnchored() && k.GetSequence() >= after {
					last = k
				}
				return nil
			})
			return last, err
		}
		if checkpoint {
			last, err := sealed(0)
			if err != nil {
				return err
			}
			before = last.GetSequence()
		}
		res, err := call(cmd.Context(), c, "cancel job "+id, serverAgent, a.Cancel, &agentv1.CancelRequest{Id: id})
		if err != nil {
			return err
		}
		job := res.GetJob()
		var last *agentv1.CheckpointEvent
		if checkpoint {
			if last, err = sealed(before + 1); err != nil {
				return err
			}
			if job, err = c.getJob(cmd.Context(), a, id); err != nil {
				return err
			}
		}
		if *out == formatJSON {
			v := struct {
				jobView
				Checkpoint *sealedView `json:"lastCheckpoint,omitempty"`
			}{jobView: viewJob(job)}
			if last != nil {
				v.Checkpoint = &sealedView{last.GetSequence(), last.GetName(), last.GetDigest(), last.GetBytes(), last.GetAnchored()}
			}
			err = writeJSON(c.stdout, v)
		} else {
			said := "is " + job.GetState()
			if !ended(job.GetState()) {
				said = "is told to stop; `coffer watch " + job.GetId() + "` shows its end"
			}
			_, err = fmt.Fprintf(c.stdout, "job %s %s\n", job.GetId(), clean(said))
			if err == nil && last != nil {
				_, err = fmt.Fprintf(c.stdout, "last checkpoint #%d %s %s\n", last.GetSequence(), clean(last.GetName()), clean(last.GetDigest()))
			}
		}
		if err == nil && checkpoint && last == nil {
			return &exitError{code: exitFailed, text: "job " + id + " sealed no checkpoint after it was told to stop"}
		}
		return err
	}
	return cmd
}
