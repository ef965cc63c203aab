package e2e

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/runner/sandbox"
)

// warmSize is more than the file of training images, the largest input of the
// tests' job.
const warmSize = 27 << 20

func groupMembers(t *testing.T, c *sandbox.Cgroup) (pids []int) {
	t.Helper()
	f, err := c.Procs()
	if err != nil {
		return nil
	}
	defer f.Close()
	b, err := os.ReadFile(f.Name())
	if err != nil {
		return nil
	}
	for _, s := range strings.Fields(string(b)) {
		pid, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	return pids
}

// waitingHolder is the process that waits for a job, once its memory is there.
func (n *node) waitingHolder(t *testing.T) int {
	t.Helper()
	group := sandbox.OpenCgroup(n.layout.Cgroup() + "/warm")
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if used, err := group.MemoryUsage(); err == nil && used >= warmSize {
			if pids := groupMembers(t, group); len(pids) == 1 {
				return pids[0]
			}
		}
	}
	t.Fatal("no holder waits with its memory ready")
	return 0
}

// there says whether a process runs; one that has ended and that nobody has waited
// for has no program.
func there(pid int) bool {
	_, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	return err == nil
}

// TestJobWithMemoryThatWasReady runs a job in a holder that was there before it,
// over a restart of the agent.
func TestJobWithMemoryThatWasReady(t *testing.T) {
	n := need(t)
	warm := sandbox.OpenCgroup(n.layout.Cgroup() + "/warm")
	t.Cleanup(func() {
		// The configuration is what it was: nothing waits.
		if pids := groupMembers(t, warm); len(pids) > 0 {
			t.Errorf("processes %v wait for jobs", pids)
		}
	})
	n.withConfig(t, "cofferd", func(config map[string]any) { config["warmRegions"] = []int64{warmSize} })
	pid := n.waitingHolder(t)

	const program = `[/usr/bin/python3, -c, "import hashlib, time\nprint(hashlib.sha256(open('/inputs/data/train-images-idx3-ubyte.gz', 'rb').read()).hexdigest(), flush=True)\ntime.sleep(10)"]`
	job := n.jobFile(t, "warm", func(s string) string { return strings.Replace(s, trains, program, 1) })
	n.grant(t, n.planDigest(t, job), 1)
	id := n.submit(t, job)
	n.wait(t, id, "running", running)
	group := sandbox.OpenCgroup(sandbox.JobCgroup(n.layout.Cgroup(), id))
	if members := groupMembers(t, group); !slices.Contains(members, pid) {
		t.Errorf("process %d waited, and of the job are %v", pid, members)
	}
	// The job has what its plan says, with what was charged before.
	if used, err := warm.MemoryUsage(); err == nil {
		t.Errorf("%d bytes are charged to a group that is to be gone", used)
	}
	want, err := os.ReadFile("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")
	if err != nil {
		t.Fatal(err)
	}
	if less := 2<<30 - memoryLimit(t, sandbox.JobCgroup(n.layout.Cgroup(), id)); less < int64(len(want)) || less > int64(len(want))+128<<20 {
		t.Errorf("the job's group may have %d bytes less than its plan says", less)
	}
	n.restartAgent(t)
	if s := n.status(t, id); s.State != "running" {
		t.Fatalf("after a restart: %+v", s)
	}
	if !there(pid) || len(groupMembers(t, warm)) > 0 {
		t.Error("the job's holder was taken for one that waits, or another waits while a job runs")
	}
	if s := n.wait(t, id, "ended", ended); s.State != "succeeded" {
		t.Fatalf("%+v\n%s", s, n.must(t, "logs", id))
	}
	if got := strings.TrimSpace(n.must(t, "logs", id)); got != fmt.Sprintf("%x", sha256.Sum256(want)) {
		t.Errorf("the job read %s", got)
	}
	n.verified(t, id)
	next := n.waitingHolder(t)
	if next == pid || there(pid) {
		t.Errorf("process %d is not gone, or waits again as %d", pid, next)
	}
	// One that waits ends with its agent, whoever cleans up.
	kill(t, n.pid(t, "cofferd"))
	for deadline := time.Now().Add(time.Minute); there(next); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("process %d outlives the agent that started it", next)
		}
	}
}

func memoryLimit(t *testing.T, group string) int64 {
	t.Helper()
	for _, f := range []string{"/sys/fs/cgroup/memory" + group + "/memory.limit_in_bytes", filepath.Join("/sys/fs/cgroup", group, "memory.max")} {
		if b, err := os.ReadFile(f); err == nil {
			v, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return v
		}
	}
	t.Fatalf("group %s has no bound on memory", group)
	return 0
}
