package main

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/jobspec"
)

const smallJob = `apiVersion: coffer.run/v1
name: demo
image: i
command: [/bin/true]
resources: {cpu: 1, memory: 64Mi}
attestationPolicy: simulation
`

// bundled is a bundle with a job file and a plan.
func bundled(t *testing.T, file, canonical string) []byte {
	t.Helper()
	b := bundle.NewBuilder()
	for name, body := range map[bundle.Part]string{bundle.JobFile: file, bundle.Plan: canonical} {
		if err := b.Add(name, []byte(body)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := b.Statement("job-1", plan.Sum([]byte(canonical)), bundle.Outcome{State: bundle.Succeeded, Stage: bundle.StageEvidence}, []bundle.Step{{Stage: bundle.StageJobspec, StartUnixNano: 1, Outcome: bundle.StepDone}}); err != nil {
		t.Fatal(err)
	}
	out, err := b.Finish(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestPlanIsComparedWithTheLastRun(t *testing.T) {
	s := newFakeStack(t)
	is := string(plan.Sum([]byte(`{"name":"demo"}`)))
	s.agent.jobs["job-1"] = &agentv1.Job{Id: "job-1", Name: "demo", State: stateSucceeded, PlanDigest: "sha384:old"}
	s.agent.bundle = bundled(t, smallJob, `{"egress":[{"host":"a"}],"name":"demo2"}`)
	r := s.coffer(t.Context(), "plan", jobFile(t, "x"))
	r.want(t, 0, "since job job-1", `- egress[0].host: "a"`, `~ name: "demo2" -> "demo"`, "1 of 2 GPUs and 3.0 GiB of 4.0 GiB memory free")
	if strings.Contains(r.stdout, "job-1") {
		t.Errorf("the comparison is no part of the plan: %s", r.stdout)
	}
	s.coffer(t.Context(), "plan", jobFile(t, "x"), "-o", "json").want(t, 0, `"comparedWith": "job-1"`, `"field": "egress[0].host"`)
	s.agent.jobs["job-1"].PlanDigest = is
	s.coffer(t.Context(), "plan", jobFile(t, "x")).want(t, 0, "changes  none: job job-1 had the same plan")
	// Failed runs, and those of other jobs, are nothing to compare with.
	s.agent.jobs["job-1"].State = stateFailed
	if r := s.coffer(t.Context(), "plan", jobFile(t, "x")); strings.Contains(r.stderr, "changes") {
		t.Errorf("compared with a job that failed: %s", r.stderr)
	}
	s.agent.jobs["job-1"].State, s.agent.jobs["job-1"].PlanDigest, s.agent.bundle = stateSucceeded, "sha384:old", nil
	s.coffer(t.Context(), "plan", jobFile(t, "x")).want(t, 0, "changes  cannot be told: read the bundle of job job-1")
}

func TestSubmitOnlyAPlan(t *testing.T) {
	s := newFakeStack(t)
	is, other := string(plan.Sum([]byte(`{"name":"demo"}`))), string(plan.Sum([]byte("other")))
	s.agent.jobs["job-1"] = &agentv1.Job{Id: "job-1", Name: "demo", PlanDigest: is, State: "queued"}
	s.coffer(t.Context(), "submit", jobFile(t, "x"), "--plan", "sha384:12").want(t, exitUsage, "96 lower-case hex digits")
	s.coffer(t.Context(), "submit", jobFile(t, "x"), "--plan", other).want(t, exitRefused, "resolves to another plan, "+is, "nothing was submitted")
	s.coffer(t.Context(), "submit", jobFile(t, "x"), "--plan", other, "--dry-run").want(t, exitRefused, "resolves to another plan")
	s.coffer(t.Context(), "submit", jobFile(t, "x"), "--dry-run").want(t, 0, is, "dry run: nothing was submitted")
	if len(s.agent.submitted) > 0 {
		t.Fatalf("submitted %q", s.agent.submitted)
	}
	s.coffer(t.Context(), "submit", jobFile(t, smallJob), "--plan", is, "--set", "env.EPOCHS=3", "--set", "resources.gpus=1").want(t, 0, "job-1")
	spec, err := jobspec.Parse(s.agent.submitted[0])
	if err != nil || spec.Env["EPOCHS"] != "3" || spec.Resources.GPUs != 1 {
		t.Errorf("submitted %s: %v", s.agent.submitted[0], err)
	}
	s.coffer(t.Context(), "submit", jobFile(t, smallJob), "--set", "EPOCHS").want(t, exitUsage, "want FIELD=VALUE")
	s.coffer(t.Context(), "submit", jobFile(t, smallJob), "-o", "json").want(t, 0, `"planDigest": "`+is+`"`)
	// What the name of an image stands for changed between the two calls.
	s.agent.jobs["job-1"].PlanDigest = other
	s.coffer(t.Context(), "submit", jobFile(t, smallJob), "--plan", is).want(t, exitRefused, "has another plan, "+other, "was cancelled")
	if !slices.Contains(s.agent.cancelled, "job-1") {
		t.Error("a job with another plan runs on")
	}
}

func TestRetry(t *testing.T) {
	s := newFakeStack(t)
	is := string(plan.Sum([]byte(`{"name":"demo"}`)))
	s.agent.jobs["job-1"] = &agentv1.Job{Id: "job-1", Name: "demo", PlanDigest: is, State: "running"}
	s.agent.bundle = bundled(t, smallJob, `{"name":"demo"}`)
	s.coffer(t.Context(), "retry", "job-1").want(t, exitFailed, "job job-1 is running")
	s.agent.jobs["job-1"].State = stateFailed
	s.coffer(t.Context(), "retry", "job-1").want(t, 0, "job-1")
	if len(s.agent.submitted) != 1 || string(s.agent.submitted[0]) != smallJob {
		t.Errorf("submitted %q", s.agent.submitted)
	}
	s.agent.bundle = bundled(t, smallJob+"env: {A: sha384:00}\n", `{"name":"demo"}`)
	s.coffer(t.Context(), "retry", "job-1").want(t, exitUsage, "whose values the node does not keep")
	s.coffer(t.Context(), "retry", "job-1", "--file", jobFile(t, smallJob+"env: {A: b}\n")).want(t, 0, "job-1")
	s.agent.jobs["job-1"].PlanDigest = "sha384:other"
	s.coffer(t.Context(), "retry", "job-1", "--file", jobFile(t, smallJob)).want(t, exitRefused, "another plan")
	if len(s.agent.submitted) != 2 {
		t.Errorf("submitted %q", s.agent.submitted)
	}
}

func TestWatchFollowsAttempts(t *testing.T) {
	s := newFakeStack(t)
	s.agent.jobs["job-1"] = &agentv1.Job{Id: "job-1", State: stateFailed, Stage: "run", Reason: "exit-code", Message: "exit code 75", Attempt: 1, RetriedAs: "job-2"}
	s.agent.jobs["job-2"] = &agentv1.Job{Id: "job-2", State: stateSucceeded, Attempt: 2, RetryOf: "job-1"}
	s.agent.events = printed(logged(1, "stdout", "x\n"))
	s.coffer(t.Context(), "watch", "job-1").want(t, 0, "failed at run (exit-code): exit code 75\nattempt 2 follows: job job-2", "coffer evidence get job-2")
	s.coffer(t.Context(), "watch", "job-1", "-o", "json").want(t, 0, `"kind":"log"`)
	s.coffer(t.Context(), "logs", "job-1", "--attempt", "2").want(t, 0, "x")
	s.coffer(t.Context(), "logs", "job-2", "--attempt", "1").want(t, 0, "x")
	s.coffer(t.Context(), "logs", "job-1", "--attempt", "3").want(t, exitUsage, "job job-1 has no attempt 3")
	s.agent.jobs["job-2"].State = stateRefused
	s.coffer(t.Context(), "watch", "job-1", "-o", "json").want(t, exitRefused)
}

func TestLogsFlags(t *testing.T) {
	s := newFakeStack(t)
	s.agent.jobs["job-1"] = &agentv1.Job{Id: "job-1", State: stateSucceeded}
	s.agent.events = printed(logged(1, "stdout", "one\n"), logged(2, "stderr", "\x1b[31mtwo\n"), logged(3, "stdout", "three\n"))
	if r := s.coffer(t.Context(), "logs", "job-1", "--since", "2027-01-15T08:00:02Z"); r.stdout != "three\n" || r.code != 0 {
		t.Errorf("since: %+v", r)
	}
	s.coffer(t.Context(), "logs", "job-1", "--since", "yesterday").want(t, exitUsage, "want a duration such as 5m")
	file := filepath.Join(t.TempDir(), "log")
	s.coffer(t.Context(), "logs", "job-1", "--download", file).want(t, 0, "19 bytes")
	if b, err := os.ReadFile(file); err != nil || string(b) != "one\n\x1b[31mtwo\nthree\n" {
		t.Errorf("%q, %v", b, err)
	}
	s.coffer(t.Context(), "logs", "job-1", "--download", file).want(t, exitUsage, "exists")
	s.coffer(t.Context(), "logs", "job-1", "-o", "json").want(t, 0, `"stream":"stderr","text":"\u001b[31mtwo\n"`)
	s.agent.events, s.agent.sealed = nil, []byte("sealed")
	s.coffer(t.Context(), "logs", "job-1").want(t, exitFailed, "coffer logkey read job-1")
}

func TestEvents(t *testing.T) {
	s := newFakeStack(t)
	s.agent.jobs["job-1"] = &agentv1.Job{Id: "job-1", State: stateSucceeded}
	s.agent.events = printed(
		stage(1, "verify", "done", 12*time.Millisecond, "affirming\x1b[2J"),
		&agentv1.WatchResponse{Event: &agentv1.WatchResponse_Queue{Queue: &agentv1.QueueEvent{Position: 2, WaitsFor: "a GPU"}}},
		logged(3, "stdout", "out\n"),
		&agentv1.WatchResponse{Event: &agentv1.WatchResponse_LogCut{LogCut: &agentv1.LogCutEvent{Bytes: 2048}}},
		&agentv1.WatchResponse{Event: &agentv1.WatchResponse_Egress{Egress: &agentv1.EgressEvent{Host: "evil.example.com", Port: 443, Rule: "not-in-plan"}}},
		&agentv1.WatchResponse{Event: &agentv1.WatchResponse_Job{Job: &agentv1.Job{State: stateSucceeded}}},
	)
	r := s.coffer(t.Context(), "events", "job-1")
	r.want(t, 0, "verify     ok        12 ms  affirming\\u001b[2J", "number 2 in the queue: a GPU", "log        cut     2.0 KiB", "evil.example.com:443", "ended      succeeded")
	if strings.Contains(r.stdout, "out") {
		t.Errorf("what the job prints is no event: %s", r.stdout)
	}
	kinds := []string{}
	for l := range strings.Lines(s.coffer(t.Context(), "events", "job-1", "-o", "json").stdout) {
		var v eventView
		if err := json.Unmarshal([]byte(l), &v); err != nil {
			t.Fatalf("%q: %v", l, err)
		}
		kinds = append(kinds, v.Kind)
	}
	if want := []string{"stage", "queue", "log", "logCut", "egress", "job"}; !slices.Equal(kinds, want) {
		t.Errorf("kinds %q, want %q", kinds, want)
	}
}

func TestCancelWithACheckpoint(t *testing.T) {
	s := newFakeStack(t)
	s.agent.jobs["job-1"] = &agentv1.Job{Id: "job-1", State: stateCancelled}
	first, last := sealedAt(1, "epoch-1"), sealedAt(2, "last")
	last.GetCheckpoint().Sequence = 2
	s.agent.events = printed(first)
	s.coffer(t.Context(), "cancel", "--checkpoint", "job-1").want(t, exitFailed, "sealed no checkpoint after it was told to stop")
	s.agent.onCancel = func() { s.agent.events = printed(first, last) }
	s.coffer(t.Context(), "cancel", "--checkpoint", "job-1").want(t, 0, "job job-1 is cancelled", "last checkpoint #2 last sha384:ab")
	s.agent.events = printed(first)
	s.coffer(t.Context(), "cancel", "--checkpoint", "job-1", "-o", "json").want(t, 0, `"lastCheckpoint"`, `"state": "cancelled"`)
}

func TestPsWatch(t *testing.T) {
	s := newFakeStack(t)
	s.agent.jobs["job-1"] = &agentv1.Job{Id: "job-1", Name: "demo", State: "queued", Queue: "nightly", QueuePosition: 3, WaitsFor: "2 GPUs"}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s.seen = func(string) { cancel() }
	s.coffer(ctx, "ps", "--watch", "--state", "queued").want(t, 0, "number 3 in the queue nightly: 2 GPUs")
	s.seen = nil
	s.coffer(t.Context(), "ps", "--state", "failed", "-o", "json").want(t, 0, "[]")
}

func TestJobFileCommands(t *testing.T) {
	s := newFakeStack(t)
	s.stopAgent() // none of these asks it
	file := filepath.Join(t.TempDir(), "job.yaml")
	s.coffer(t.Context(), "init", file).want(t, 0, "wrote "+file)
	s.coffer(t.Context(), "init", file).want(t, exitUsage, "exists")
	s.coffer(t.Context(), "validate", file).want(t, 0, "is a job file")
	s.coffer(t.Context(), "validate", file, "--set", "resources.gpu=1", "--set", "name=A B").want(t, exitUsage, `resources.gpu: unknown field; did you mean "gpus"?`, `name: "A B": want`, "2 problems")
	s.coffer(t.Context(), "validate", jobFile(t, smallJob+"retries: 2\n"), "-o", "json").want(t, exitUsage, `"line": 7`, `"field": "retries"`, `did you mean \"retry\"`)
	s.coffer(t.Context(), "explain", "checkpoints.resume").want(t, 0, "goes on from", "without it   none", "in the plan  yes")
	s.coffer(t.Context(), "explain", "egress").want(t, 0, "egress[].maxBytes")
	s.coffer(t.Context(), "explain", "env.EPOCH").want(t, exitUsage, "unknown field")
	s.coffer(t.Context(), "explain", "input.uri").want(t, exitUsage, `did you mean "inputs"?`)
	s.coffer(t.Context(), "explain", "resorces").want(t, exitUsage, `did you mean "resources"`)
	s.coffer(t.Context(), "explain", "-o", "json").want(t, 0, `"field": "stopGrace"`)
	s.coffer(t.Context(), "completion", "bash").want(t, 0, "__start_coffer")
	s.coffer(t.Context(), "completion", "tcsh").want(t, exitUsage, "want bash, zsh or fish")
}
