package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/stack"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/api/agent/v1/agentv1connect"
)

// agent is a client of the node agent, as a scheduler of the stack's engineer.
func (n *node) agent(t *testing.T) agentv1connect.AgentServiceClient {
	t.Helper()
	n.once.Do(func() {
		e, err := stack.OpenEndpoint(n.dir)
		if err != nil {
			t.Fatal(err)
		}
		h, err := e.HTTPClient(daemon.RoleEngineer, daemon.RoleAgent)
		if err != nil {
			t.Fatal(err)
		}
		n.engineer = agentv1connect.NewAgentServiceClient(h, e.Agent())
	})
	return n.engineer
}

// small is a job without keys: it needs no grant, no GPU and little room.
func (n *node) small(t *testing.T, name, program, more string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name+".yaml")
	file := fmt.Sprintf(`apiVersion: coffer.run/v1
name: %s
image: coffer.local/numpy:latest
command: [/usr/bin/python3, -c, %q]
inputs: []
resources: {cpu: 500m, memory: 256Mi, gpus: 0}
maxDuration: 2m
attestationPolicy: simulation
%s`, name, program, more)
	if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func (n *node) job(t *testing.T, id string) *agentv1.Job {
	t.Helper()
	res, err := n.agent(t).Get(t.Context(), connect.NewRequest(&agentv1.GetRequest{Id: id}))
	if err != nil {
		t.Fatal(err)
	}
	return res.Msg.GetJob()
}

// log reads what a job printed to stdout, from an offset on.
func (n *node) log(t *testing.T, id string, offset int64, follow bool) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	s, err := n.agent(t).Logs(ctx, connect.NewRequest(&agentv1.LogsRequest{Id: id, StdoutOffset: offset, Follow: follow}))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var out strings.Builder
	for s.Receive() {
		l := s.Msg().GetLog()
		if l.GetStream() != "stdout" {
			continue
		}
		if l.GetOffset() != offset+int64(out.Len()) {
			t.Errorf("a piece of the log at %d, want %d", l.GetOffset(), offset+int64(out.Len()))
		}
		out.Write(l.GetData())
	}
	if err := s.Err(); err != nil {
		t.Errorf("log of job %s: %v", id, err)
	}
	return out.String()
}

// restartAgent kills the agent and starts it again.
func (n *node) restartAgent(t *testing.T) {
	t.Helper()
	kill(t, n.pid(t, "cofferd"))
	n.must(t, "restart")
}

// onGPU asks for the one GPU that there is.
func onGPU(path string, t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(strings.Replace(string(b), "gpus: 0", "gpus: 1", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestQueueSurvivesTheAgent lets a job wait for the GPU that another has, with the
// agent killed meanwhile: both go on, and the one that waits has its environment.
func TestQueueSurvivesTheAgent(t *testing.T) {
	n := need(t)
	first := n.submit(t, onGPU(n.small(t, "has-the-gpu", "import time; time.sleep(60)", ""), t))
	n.wait(t, first, "running", running)
	waits := n.submit(t, onGPU(n.small(t, "waits-for-it", "import os; print(os.environ['WHO'])", "env: {WHO: ada}\n"), t))
	passes := n.submit(t, n.small(t, "passes", "print('passed')", ""))
	if s := n.wait(t, passes, "ended", ended); s.State != "succeeded" {
		t.Errorf("a job that fits does not pass one that does not: %+v", s)
	}
	for range 2 {
		if j := n.job(t, waits); j.GetState() != "queued" || j.GetQueuePosition() != 1 || !strings.Contains(j.GetWaitsFor(), "GPU") {
			t.Errorf("the job that waits: %v", j)
		}
		n.restartAgent(t)
		for deadline := time.Now().Add(time.Minute); n.job(t, waits).GetQueuePosition() == 0 && time.Now().Before(deadline); {
			time.Sleep(20 * time.Millisecond)
		}
	}
	if s := n.status(t, first); s.State != "running" {
		t.Errorf("the job that runs: %+v", s)
	}
	n.must(t, "cancel", first)
	if s := n.wait(t, waits, "ended", ended); s.State != "succeeded" {
		t.Errorf("%+v", s)
	}
	if out := n.log(t, waits, 0, false); out != "ada\n" {
		t.Errorf("its log: %q", out)
	}
	n.verified(t, waits)
	if left, err := os.ReadDir(filepath.Join(n.dir, "agent", "values")); err != nil || len(left) > 0 {
		t.Errorf("environment values are left: %v %v", left, err)
	}
}

// verified checks the bundle of a job that has ended.
func (n *node) verified(t *testing.T, id string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), id+".json")
	n.must(t, "evidence", "get", id, "-o", path)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := n.verify(t, b, true); err != nil {
		t.Errorf("the bundle of job %s does not verify: %v\n%s", id, err, out)
	}
}

// TestRetry lets a job fail until its attempts are used up. Each is a job of its
// own, and the agent is killed before the last begins.
func TestRetry(t *testing.T) {
	n := need(t)
	first := n.submit(t, n.small(t, "fails", "import os, sys; print(os.environ['A']); sys.exit(75)", "env: {A: value}\nretry: {limit: 1, onExitCodes: [75], backoff: 1s}\nbudget: {time: 10m}\n"))
	id := first
	for attempt := int32(1); attempt <= 2; attempt++ {
		if s := n.wait(t, id, "ended", ended); s.State != "failed" || s.Reason != "exit-code" {
			t.Fatalf("attempt %d: %+v", attempt, s)
		}
		j := n.job(t, id)
		if j.GetAttempt() != attempt || attempt > 1 && j.GetRetryOf() != first || (j.GetRetriedAs() == "") != (attempt == 2) {
			t.Errorf("attempt %d: %v", attempt, j)
		}
		if out := n.log(t, id, 0, false); out != "value\n" {
			t.Errorf("attempt %d printed %q", attempt, out)
		}
		if st := n.statement(t, id); st.JobID != id {
			t.Errorf("attempt %d has no evidence of its own", attempt)
		}
		if attempt == 1 {
			n.restartAgent(t)
		}
		if attempt < 2 {
			id = j.GetRetriedAs()
		}
	}
	// The second's record names the first's, and together they are within the budget.
	files := t.TempDir()
	for _, j := range []string{first, id} {
		n.must(t, "evidence", "get", j, "-o", filepath.Join(files, j))
	}
	second, err := os.ReadFile(filepath.Join(files, id))
	if err != nil {
		t.Fatal(err)
	}
	if out, err := n.verify(t, second, true, "--earlier", filepath.Join(files, first)); err != nil || !strings.Contains(out, "budget.attempts") {
		t.Errorf("the attempts together: %v\n%s", err, out)
	}
	once := n.submit(t, n.small(t, "fails-otherwise", "import sys; sys.exit(1)", "retry: {limit: 2, onExitCodes: [75]}\n"))
	n.wait(t, once, "ended", ended)
	if j := n.job(t, once); j.GetRetriedAs() != "" {
		t.Errorf("a code that is not listed: %v", j)
	}
}

// TestContainerdKilled kills containerd while one job runs on and another ends:
// both end as they would have.
func TestContainerdKilled(t *testing.T) {
	n := need(t)
	long := n.submit(t, n.small(t, "outlives-containerd", "import time; time.sleep(12); print('done')", ""))
	short := n.submit(t, n.small(t, "ends-meanwhile", "import time; time.sleep(1.5); print('done')", ""))
	n.wait(t, long, "running", running)
	n.wait(t, short, "running", running)
	kill(t, n.pid(t, "containerd"))
	time.Sleep(2 * time.Second)
	if s := n.status(t, long); s.State != "running" {
		t.Errorf("without containerd: %+v", s)
	}
	n.must(t, "restart")
	// And jobs are started again.
	after := n.submit(t, n.small(t, "after-containerd", "print('done')", ""))
	for _, id := range []string{short, long, after} {
		if s := n.wait(t, id, "ended", ended); s.State != "succeeded" {
			t.Errorf("%+v", s)
		}
		if out := n.log(t, id, 0, false); out != "done\n" {
			t.Errorf("job %s printed %q", id, out)
		}
		n.verified(t, id)
	}
}

// TestStopGrace gives jobs the time that they asked for: two that are cancelled, and one
// that has run for as long as it may, which an agent that was restarted counts from the
// start too.
func TestStopGrace(t *testing.T) {
	n := need(t)
	const program = "import signal, sys, time\ndef end(*_):\n    time.sleep(%s)\n    print('saved', flush=True)\n    sys.exit(0)\nsignal.signal(signal.SIGTERM, end)\nprint('ready', flush=True)\ntime.sleep(60)"
	quick := n.submit(t, n.small(t, "ends-in-time", fmt.Sprintf(program, "0.3"), "stopGrace: 2s\n"))
	slow := n.submit(t, n.small(t, "ends-too-late", fmt.Sprintf(program, "30"), "stopGrace: 2s\n"))
	late, err := os.ReadFile(n.small(t, "runs-too-long", fmt.Sprintf(program, "0.3"), "stopGrace: 2s\n"))
	if err != nil {
		t.Fatal(err)
	}
	const limit = 6
	file := filepath.Join(t.TempDir(), "late.yaml")
	if err := os.WriteFile(file, []byte(strings.Replace(string(late), "maxDuration: 2m", fmt.Sprintf("maxDuration: %ds", limit), 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	long := n.submit(t, file)
	for _, id := range []string{quick, slow, long} {
		n.wait(t, id, "running", running)
		for deadline := time.Now().Add(time.Minute); !strings.Contains(n.log(t, id, 0, false), "ready") && time.Now().Before(deadline); {
			time.Sleep(50 * time.Millisecond)
		}
	}
	n.restartAgent(t)
	n.must(t, "cancel", quick)
	n.must(t, "cancel", slow)
	for id, want := range map[string]string{quick: "ready\nsaved\n", slow: "ready\n"} {
		if s := n.wait(t, id, "ended", ended); s.State != "cancelled" {
			t.Errorf("%+v", s)
		}
		if out := n.log(t, id, 0, false); out != want {
			t.Errorf("it printed %q, want %q", out, want)
		}
	}
	if s := n.wait(t, long, "ended", ended); s.State != "failed" || s.Reason != "deadline" {
		t.Errorf("%+v", s)
	}
	if out := n.log(t, long, 0, false); out != "ready\nsaved\n" {
		t.Errorf("it printed %q", out)
	}
	if j := n.job(t, long); j.GetEndedUnix()-j.GetSubmittedUnix() < limit {
		t.Errorf("it ran for less than %d s: %v", limit, j)
	}
}

// TestLogs follows a log from an offset, and reads it after the agent that saw it
// is gone.
func TestLogs(t *testing.T) {
	n := need(t)
	id := n.submit(t, n.small(t, "prints", "import time\nfor i in range(20):\n    print('line', i, flush=True)\n    time.sleep(.05)", ""))
	followed := n.log(t, id, 7, true)
	var want strings.Builder
	for i := range 20 {
		fmt.Fprintf(&want, "line %d\n", i)
	}
	if followed != want.String()[7:] {
		t.Errorf("followed: %q", followed)
	}
	key := filepath.Join(t.TempDir(), "log.key")
	public := strings.TrimSpace(n.must(t, "logkey", "create", key))
	owned := n.submit(t, n.small(t, "prints-to-its-owner", "print('for my owner')", "output: {logKey: \""+public+"\"}\n"))
	n.wait(t, id, "ended", ended)
	n.wait(t, owned, "ended", ended)
	n.restartAgent(t)
	if out := n.must(t, "logkey", "read", owned, "--key", key); out != "for my owner\n" {
		t.Errorf("sealed to its owner: %q", out)
	}
	if out := n.log(t, owned, 0, false); out != "" {
		t.Errorf("the agent reads what is sealed to its owner: %q", out)
	}
	stranger := filepath.Join(t.TempDir(), "log.key")
	n.must(t, "logkey", "create", stranger)
	if out, err := n.coffer("logkey", "read", owned, "--key", stranger); exitCode(err) == 0 || strings.Contains(out, "for my owner") {
		t.Errorf("another key reads it: %s", out)
	}
	if got := n.log(t, id, 0, false); got != want.String() {
		t.Errorf("after a restart: %q", got)
	}
	if got := n.log(t, id, 14, true); got != want.String()[14:] {
		t.Errorf("from an offset: %q", got)
	}
}

// TestFlood lets a job print as fast as it can: what is beyond its rate is cut and
// counted, and the agent goes on.
func TestFlood(t *testing.T) {
	n := need(t)
	id := n.submit(t, n.small(t, "floods", "import os, time\nb = b'x' * 65535 + b'\\n'\nend = time.time() + 1.5\nk = 0\nwhile time.time() < end:\n    os.write(1, b)\n    k += len(b)\nprint()\nprint('printed', k)", ""))
	n.wait(t, id, "running", running)
	began := time.Now()
	n.status(t, id)
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("the agent answers after %s", took)
	}
	if s := n.wait(t, id, "ended", ended); s.State != "succeeded" {
		t.Fatalf("%+v", s)
	}
	kept := len(n.log(t, id, 0, false))
	if kept < 64<<10 || kept > 1<<20 {
		t.Errorf("%d bytes of it are kept", kept)
	}
	cut := int64(0)
	s, err := n.agent(t).Watch(t.Context(), connect.NewRequest(&agentv1.WatchRequest{Id: id}))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for s.Receive() {
		cut = max(cut, s.Msg().GetLogCut().GetBytes())
	}
	t.Logf("%d bytes kept, %d MB cut", kept, cut>>20)
	if cut < 1<<20 {
		t.Errorf("%d bytes are said to be cut", cut)
	}
	n.verified(t, id)
}

// TestTokensAtTheNode lets people who signed in at the node submit and follow jobs.
func TestTokensAtTheNode(t *testing.T) {
	n := need(t)
	p := people{n, t.TempDir()}
	for _, name := range []string{"engineer", "operator", "alice"} {
		p.must(t, name, "login", "--node", "--password-file", filepath.Join(n.dir, "people", name+".password"))
	}
	id := jobID.FindString(p.must(t, "engineer", "submit", n.small(t, "with-a-token", "print('hello')", "")))
	if s := n.wait(t, id, "ended", ended); s.State != "succeeded" {
		t.Errorf("%+v", s)
	}
	if who := n.job(t, id).GetSubmitter(); who != "user/engineer" {
		t.Errorf("submitted by %s", who)
	}
	if out := p.must(t, "engineer", "logs", id); !strings.Contains(out, "hello") {
		t.Errorf("its log: %q", out)
	}
	// Roles come from groups: alice has none here, an operator reads no output, and
	// the engineer's certificate is not the engineer who signed in.
	p.refused(t, "roles", "alice", "status", id)
	p.refused(t, "roles", "operator", "logs", id)
	p.must(t, "operator", "status", id)
	if out, err := n.coffer("logs", id); exitCode(err) != 3 {
		t.Errorf("another's output: exit code %d: %s", exitCode(err), out)
	}
	// A session at the node is none at the broker, which goes on with certificates.
	if out := p.must(t, "engineer", "whoami"); !strings.Contains(out, "engineer at nodes") {
		t.Errorf("who is signed in: %s", out)
	}
}
