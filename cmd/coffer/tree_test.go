package main

import (
	"io"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/check"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
)

func TestEveryCommandSpeaksJSON(t *testing.T) {
	c := &cli{stdout: io.Discard, stderr: io.Discard}
	for _, cmd := range leaves(c.root()) {
		f := cmd.Flag("output")
		switch isFormat := f != nil && f.Value.Type() == "format"; {
		case ownOutput[cmd.CommandPath()]:
			if isFormat {
				t.Errorf("%s has --output: take it from the list", cmd.CommandPath())
			}
		case !isFormat:
			t.Errorf("%s has no --output json", cmd.CommandPath())
		}
	}
}

// Exit codes are part of the interface.
func TestExitCodes(t *testing.T) {
	s := newFakeStack(t)
	s.agent.jobs["job-1"] = &agentv1.Job{Id: "job-1", Name: "demo", State: "queued", QueuePosition: 1, WaitsFor: "a GPU"}
	job := jobFile(t, smallJob)
	want := func(code int, args ...string) {
		t.Helper()
		if r := s.coffer(t.Context(), args...); r.code != code {
			t.Errorf("%v: exit code %d, want %d\n%s%s%v", args, r.code, code, r.stdout, r.stderr, r.err)
		}
	}
	want(0, "status", "job-1")
	want(exitFailed, "status", "job-9")
	want(exitUsage, "status")
	want(exitUsage, "submit", job, "--no-such-flag")
	want(exitUsage, "frobnicate")
	want(exitUsage, "ps", "--output", "xml")
	want(exitRefused, "why", "job-1") // waits
	var l check.List
	l.Fail("admit.memory", "at most 2 GiB", "9 GiB", "ask for less")
	s.agent.refuse = check.Refuse("admit", l)
	want(exitRefused, "submit", job)
	s.agent.refuse = nil
	for state, code := range map[string]int{stateSucceeded: 0, stateFailed: exitFailed, stateCancelled: exitFailed, stateRefused: exitRefused, "running": exitUnknown, "": exitUnknown} {
		s.agent.jobs["job-1"].State = state
		want(code, "submit", job, "--watch")
		want(code, "submit", job, "--watch", "--output", "json")
		want(code, "watch", "job-1")
	}
	s.stopAgent()
	want(exitUnknown, "submit", job)
	want(exitUnknown, "status", "job-1")
}

// What keeps a job is told with who can do something and what to run.
func TestWhyNamesOneGate(t *testing.T) {
	s := newFakeStack(t)
	soon := time.Now().Add(time.Hour).Unix()
	for name, tt := range map[string]struct {
		job   *agentv1.Job
		code  int
		parts []string
	}{
		"queue":              {&agentv1.Job{State: "queued", QueuePosition: 2, WaitsFor: "2 GPUs"}, exitRefused, []string{"gate   queue", "number 2", "2 GPUs", "coffer ps --state running"}},
		"retry":              {&agentv1.Job{State: "queued", Attempt: 2, NotBeforeUnix: soon}, exitRefused, []string{"gate   retry", "attempt 2", "begins by itself"}},
		"running":            {&agentv1.Job{State: "running", Stage: "verify"}, 0, []string{"nothing holds it: it is at stage verify"}},
		"verifier refusal":   {&agentv1.Job{State: stateRefused, Reason: "verify-refused", Checks: []*agentv1.Check{{Id: "snp.debug", Outcome: "fail", Expected: "off", Found: "on", Hint: "turn debugging off"}}}, exitRefused, []string{"gate   verify-refused", "snp.debug: expected off, found on", "who operates the node", "hint   turn debugging off"}},
		"release refusal":    {&agentv1.Job{State: stateRefused, Reason: "release-refused", Checks: []*agentv1.Check{{Id: "grant.missing", Outcome: "fail", Hint: "its owner may run: coffer grant create"}}}, exitRefused, []string{"gate   release-refused", "grant.missing", "the owner of the assets", "hint   its owner may run", "next   coffer grant request"}},
		"lease lost":         {&agentv1.Job{State: stateFailed, Reason: "lease-lapsed", Message: "no answer"}, 0, []string{"gate   lease-lapsed", "heard nothing from the broker", "no answer", "coffer retry job-1"}},
		"being stopped":      {&agentv1.Job{State: "running", Stopping: "revoked: key disabled at its store"}, 0, []string{"gate   stopping", "taken back", "key disabled at its store", "the owner of the assets"}},
		"failure":            {&agentv1.Job{State: stateFailed, Reason: "exit-code", Message: "exit code 3"}, 0, []string{"gate   exit-code", "coffer logs job-1"}},
		"tried again":        {&agentv1.Job{State: stateFailed, Reason: "exit-code", RetriedAs: "job-2"}, 0, []string{"coffer watch job-2"}},
		"an input elsewhere": {&agentv1.Job{State: stateFailed, Reason: "inputs-missing", Message: "input data: find source"}, 0, []string{"gate   inputs-missing", "not on the node where its job file says", "input data"}},
		"an unknown code":    {&agentv1.Job{State: stateFailed, Reason: "zzz", Message: "m"}, 0, []string{"gate   zzz", "coffer events job-1"}},
	} {
		t.Run(name, func(t *testing.T) {
			tt.job.Id = "job-1"
			s.agent.jobs["job-1"] = tt.job
			s.coffer(t.Context(), "why", "job-1").want(t, tt.code, tt.parts...)
		})
	}
}
