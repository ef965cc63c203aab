package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/coffer-run/coffer/internal/stack"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/api/agent/v1/agentv1connect"
)

// jobMark stands before every line that a job prints, and saidMark, in the live view,
// before one that coffer says of it.
const (
	jobMark  = "  | "
	saidMark = "  ! "
)

// Phases of a stage in events.
const (
	phaseStarted = "started"
	phaseDone    = "done"
	phaseFailed  = "failed"
	phaseWaiting = "waiting"
)

// watch shows a job until it has ended, and the attempts that follow it.
func (c *cli) watch(ctx context.Context, a agentv1connect.AgentServiceClient, id, name string) error {
	for {
		var detached bool
		var err error
		if c.canLive() {
			detached, err = c.watchLive(ctx, a, id, name)
		} else {
			err = c.watchLines(ctx, a, id)
		}
		if detached || ctx.Err() != nil {
			if _, err := fmt.Fprintf(c.stderr, "\ndetached; job %s goes on. Come back with `coffer watch %s`, `coffer logs -f %s` or `coffer status %s`, stop it with `coffer cancel %s`\n", id, id, id, id, id); err != nil {
				return err
			}
			return &exitError{code: exitUnknown, err: context.Canceled}
		}
		if err != nil {
			return err
		}
		j, err := c.getJob(ctx, a, id)
		if err != nil {
			return err
		}
		if j.GetRetriedAs() == "" {
			return c.outcome(j)
		}
		if _, err := fmt.Fprintf(c.stdout, "%s\nattempt %d follows: job %s\n", clean(endedLine(j)), j.GetAttempt()+1, j.GetRetriedAs()); err != nil {
			return err
		}
		id = j.GetRetriedAs()
	}
}

// watchLines shows a job as lines, for files and pipes.
func (c *cli) watchLines(ctx context.Context, a agentv1connect.AgentServiceClient, id string) error {
	out, errs := &lines{w: c.stdout, mark: jobMark}, &lines{w: c.stdout, mark: jobMark}
	flush := func() error {
		if err := out.flush(); err != nil {
			return err
		}
		return errs.flush()
	}
	var now transfers
	err := c.events(ctx, a, id, true, func(e *agentv1.WatchResponse) error {
		if p := e.GetProgress(); p != nil {
			at := time.Unix(0, e.GetTimeUnixNano())
			now.take(p.GetGoing(), at)
			for _, line := range now.due(at) {
				if _, err := fmt.Fprintf(c.stdout, "  %s\n", line); err != nil {
					return err
				}
			}
			return nil
		}
		if l := e.GetLog(); l != nil {
			w := out
			if l.GetStream() == "stderr" {
				w = errs
			}
			return w.write(l.GetData())
		}
		line := eventLine(e)
		if line == "" {
			return nil
		}
		if err := flush(); err != nil {
			return err
		}
		_, err := fmt.Fprintf(c.stdout, "  %s\n", line)
		return err
	})
	if ferr := flush(); err == nil {
		err = ferr
	}
	return err
}

// eventLine is an event on one line, or "" for one that says nothing to people, or
// what the job prints.
func eventLine(e *agentv1.WatchResponse) string {
	row := func(what, outcome, amount, detail string) string {
		return strings.TrimRight(clean(fmt.Sprintf("%-10s %-6s %8s  %s", what, outcome, amount, detail)), " ")
	}
	switch {
	case e.GetStage() != nil:
		s := e.GetStage()
		spent := took(time.Duration(s.GetDurationNanos()))
		switch s.GetPhase() {
		case phaseDone:
			return row(s.GetStage(), "ok", spent, s.GetDetail())
		case phaseFailed:
			// Why comes at the end, in full.
			return row(s.GetStage(), "failed", spent, "")
		case phaseWaiting:
			return row(s.GetStage(), "waits", spent, s.GetDetail())
		}
		// The line of a stage that has started comes when it has ended, with its time.
	case e.GetQueue() != nil:
		return row("queue", "waits", "", queueLine(e.GetQueue()))
	case e.GetLease() != nil:
		l := e.GetLease()
		return row("lease", "over", took(time.Duration(l.GetGraceMillis())*time.Millisecond), l.GetCode()+": "+l.GetReason())
	case e.GetReattest() != nil:
		a := e.GetReattest()
		said := a.GetCause() + ", the job " + strings.ReplaceAll(a.GetThen(), "-", " ")
		if len(a.GetFailed()) > 0 {
			said += ": " + strings.Join(a.GetFailed(), ", ")
		}
		return row("attest", a.GetVerdict(), took(time.Duration(a.GetDurationNanos())), said)
	case e.GetLogCut() != nil:
		return row("log", "cut", stack.Bytes(e.GetLogCut().GetBytes()), "the job printed more than its plan allows")
	case e.GetAlert() != nil:
		l := e.GetAlert()
		return row("rule", l.GetAction(), l.GetSeverity(), l.GetRule()+": "+l.GetSays())
	case e.GetEgress().GetRule() != "":
		g := e.GetEgress()
		return row("egress", "refused", "", destination(g.GetHost(), int(g.GetPort()))+" by "+orDash(g.GetProcess())+": "+g.GetRule())
	case e.GetCheckpoint() != nil && !e.GetCheckpoint().GetAnchored():
		k := e.GetCheckpoint()
		return row("checkpoint", "sealed", stack.Bytes(k.GetBytes()), fmt.Sprintf("#%d %s %s", k.GetSequence(), k.GetName(), k.GetDigest()))
	}
	return ""
}

func queueLine(q *agentv1.QueueEvent) string {
	if q.GetPosition() == 0 {
		return clean(orDash(q.GetWaitsFor()))
	}
	return fmt.Sprintf("number %d in the queue: %s", q.GetPosition(), clean(orDash(q.GetWaitsFor())))
}

func logCutLine(l *agentv1.LogCutEvent) string {
	return fmt.Sprintf("the job printed more than its plan allows: %s are dropped", stack.Bytes(l.GetBytes()))
}

// endedLine says how a job ended, where it did not end well.
func endedLine(j *agentv1.Job) string {
	text := fmt.Sprintf("%s at %s", j.GetState(), orDash(j.GetStage()))
	if j.GetReason() != "" {
		text += " (" + j.GetReason() + ")"
	}
	if j.GetMessage() != "" {
		text += ": " + j.GetMessage()
	}
	return text
}

// outcome says how a job ended and turns it into an exit code.
func (c *cli) outcome(j *agentv1.Job) error {
	id := j.GetId()
	switch j.GetState() {
	case stateSucceeded:
		_, err := fmt.Fprintf(c.stdout, "succeeded. Evidence: `coffer evidence get %s -o %s.json`\n", id, id)
		return err
	case stateRefused:
		if failed := failedChecks(j); len(failed) > 0 {
			if err := printRefusal(c.stdout, j.GetStage(), failed); err != nil {
				return err
			}
		} else if _, err := fmt.Fprintf(c.stdout, "refused at %s: %s\n", clean(orDash(j.GetStage())), clean(orDash(j.GetMessage()))); err != nil {
			return err
		}
		if _, err := fmt.Fprintf(c.stdout, "Next: `coffer why %s`\n", id); err != nil {
			return err
		}
		return &exitError{code: exitRefused}
	case stateFailed, stateCancelled:
		if _, err := fmt.Fprintf(c.stdout, "%s\nNext: `coffer why %s`\n", clean(endedLine(j)), id); err != nil {
			return err
		}
		return &exitError{code: exitFailed}
	}
	return &exitError{code: exitUnknown, text: fmt.Sprintf("job %s is still %s: see `coffer status %s`", id, clean(j.GetState()), id)}
}

// left says, to whoever left what goes on without them, how to come back.
func (c *cli) left(what, again string) error {
	if _, err := fmt.Fprintf(c.stderr, "\nleft %s, which goes on; come back with `%s`\n", what, again); err != nil {
		return err
	}
	return &exitError{code: exitUnknown}
}
