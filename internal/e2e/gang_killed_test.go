package e2e

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
)

// halt pauses a process, or lets it go on.
func halt(t *testing.T, pid int, on bool) {
	t.Helper()
	sig := syscall.SIGCONT
	if on {
		sig = syscall.SIGSTOP
	}
	if err := syscall.Kill(pid, sig); err != nil {
		t.Fatal(err)
	}
}

// told waits until a job has an event of which f holds.
func (n *node) told(t *testing.T, id, what string, f func(*agentv1.WatchResponse) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	st, err := n.agent(t).Watch(ctx, connect.NewRequest(&agentv1.WatchRequest{Id: id}))
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	for st.Receive() {
		if f(st.Msg()) {
			return
		}
	}
	t.Fatalf("job %s has no event of %s: %v", id, what, st.Err())
}

// TestAgentKilledBetweenTheStartsOfAGang kills the agent when one job of a gang runs and
// the start of the other one, which has its keys, is not noted. The agent that comes back
// cannot let that one start: either its trace says that it has started, and both go on, or
// none does. Nothing of either is left.
func TestAgentKilledBetweenTheStartsOfAGang(t *testing.T) {
	n := need(t)
	job := n.jobFile(t, "gang-with-keys", func(s string) string {
		return strings.NewReplacer(trains, `[/usr/bin/python3, -c, "import time; time.sleep(30)"]`, "gpus: 1", "gpus: 0", "cpu: 2", "cpu: 300m", "memory: 2Gi", "memory: 512Mi").Replace(s) + "gang: {name: torn, size: 2}\n"
	})
	n.grant(t, n.planDigest(t, job), 2)
	one := n.submit(t, job)
	two := n.submit(t, job)
	// Whichever has a holder first is kept back, so that the other one is ready before it.
	late, ready, lateHolder := one, two, 0
	for deadline := time.Now().Add(time.Minute); lateHolder == 0; time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("no job of the gang has a holder")
		}
		if lateHolder = findHolder(t, late); lateHolder == 0 {
			late, ready = ready, late
		}
	}
	halt(t, lateHolder, true)
	n.told(t, ready, "its gang, which starts together", func(e *agentv1.WatchResponse) bool {
		return strings.Contains(e.GetQueue().GetWaitsFor(), "starts together")
	})
	readyHolder := n.holderPid(t, ready)
	halt(t, readyHolder, true)
	halt(t, lateHolder, false)
	n.wait(t, late, "running", running)
	if s := n.status(t, ready); s.Stage != "start" {
		t.Errorf("the job that was ready is at %+v", s)
	}
	kill(t, n.pid(t, "cofferd"))
	halt(t, readyHolder, false)
	n.must(t, "restart")
	ofReady, ofLate := n.wait(t, ready, "ended", ended), n.wait(t, late, "ended", ended)
	switch goesOn := ofReady.State == "succeeded"; {
	case goesOn && ofLate.State != "succeeded":
		t.Errorf("the job that had started goes on, and the job that ran: %+v", ofLate)
	case goesOn:
		n.verified(t, ready)
		n.verified(t, late)
	case ofReady.State != "failed" || ofReady.Reason != "agent-restarted" || ofReady.Stage != "start":
		t.Errorf("the job that had not started: %+v", ofReady)
	case ofLate.State != "failed" || ofLate.Reason != "gang-failed" || !strings.Contains(ofLate.Message, ready):
		t.Errorf("the job that ran: %+v", ofLate)
	}
	for _, id := range []string{one, two} {
		if _, err := os.Stat(filepath.Join(n.layout.Jobs(), id)); !os.IsNotExist(err) {
			t.Errorf("the run directory of job %s is still there", id)
		}
		if findHolder(t, id) != 0 {
			t.Errorf("job %s has a holder still", id)
		}
	}
}
