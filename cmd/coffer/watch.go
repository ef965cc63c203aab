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

// jobMark stands before every line that a job prints.
const jobMark = "  | "

// watch shows a job until it has ended.
func (c *cli) watch(ctx context.Context, a agentv1connect.AgentServiceClient, id string) error {
	out, errs := &lines{w: c.stdout, mark: jobMark}, &lines{w: c.stdout, mark: jobMark}
	flush := func() error {
		if err := out.flush(); err != nil {
			return err
		}
		return errs.flush()
	}
	say := func(format string, args ...any) error {
		if err := flush(); err != nil {
			return err
		}
		_, err := fmt.Fprintf(c.stdout, format, args...)
		return err
	}
	err := c.events(ctx, a, id, true, func(e *agentv1.WatchResponse) error {
		switch {
		case e.GetLog() != nil:
			w := out
			if e.GetLog().GetStream() == "stderr" {
				w = errs
			}
			return w.write(e.GetLog().GetData())
		case e.GetStage() != nil:
			s := e.GetStage()
			outcome, detail := "", clean(s.GetDetail())
			switch s.GetPhase() {
			case "done":
				outcome = "ok"
			case "failed":
				// Why comes at the end, in full.
				outcome, detail = "failed", ""
			case "waiting":
				outcome = "waits"
			default:
				// The line comes when the stage has ended, with its time.
				return nil
			}
			line := fmt.Sprintf("  %-10s %-6s %8s  %s", clean(s.GetStage()), outcome, took(time.Duration(s.GetDurationNanos())), detail)
			return say("%s\n", strings.TrimRight(line, " "))
		case e.GetLease() != nil:
			l := e.GetLease()
			return say("  %-10s %-6s %8s  %s: %s\n", "lease", "over", took(time.Duration(l.GetGraceMillis())*time.Millisecond), clean(l.GetCode()), clean(l.GetReason()))
		case e.GetCheckpoint() != nil:
			k := e.GetCheckpoint()
			return say("  %-10s %-6s %8s  #%d %s %s\n", "checkpoint", "sealed", stack.Bytes(k.GetBytes()), k.GetSequence(), clean(k.GetName()), k.GetDigest())
		}
		return nil
	})
	if ferr := flush(); err == nil {
		err = ferr
	}
	if ctx.Err() != nil {
		if _, err := fmt.Fprintf(c.stderr, "\ndetached; job %s goes on. Come back with `coffer logs -f %s` or `coffer status %s`, stop it with `coffer cancel %s`\n", id, id, id, id); err != nil {
			return err
		}
		return &exitError{code: exitUnknown, err: ctx.Err()}
	}
	if err != nil {
		return err
	}
	j, err := c.getJob(ctx, a, id)
	if err != nil {
		return err
	}
	return c.outcome(j)
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
		return &exitError{code: exitRefused}
	case stateFailed, stateCancelled:
		text := fmt.Sprintf("%s at %s", j.GetState(), orDash(j.GetStage()))
		if j.GetReason() != "" {
			text += " (" + j.GetReason() + ")"
		}
		if j.GetMessage() != "" {
			text += ": " + j.GetMessage()
		}
		if _, err := fmt.Fprintln(c.stdout, clean(text)); err != nil {
			return err
		}
		return &exitError{code: exitFailed}
	}
	return &exitError{code: exitUnknown, text: fmt.Sprintf("job %s is still %s: see `coffer status %s`", id, clean(j.GetState()), id)}
}
