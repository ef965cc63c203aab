package sandbox

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
)

// limitOf reads the group's own bound on memory back.
func limitOf(t *testing.T, c *Cgroup) int64 {
	t.Helper()
	at := filepath.Join(cgroupRoot, "memory", c.path, "memory.limit_in_bytes")
	if c.unified {
		at = filepath.Join(cgroupRoot, c.path, "memory.max")
	}
	b, err := os.ReadFile(at)
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// What a process touched before it had a job is charged where it was then, and the
// job's group can be given as much less.
func TestMemoryStaysCharged(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("control groups need root")
	}
	const mb = 1 << 20
	path := "/coffer-test-reserve-" + strconv.Itoa(os.Getpid())
	before, err := CreateReserveCgroup(path, 64*mb)
	if err != nil {
		t.Fatal(err)
	}
	job, err := CreateCgroup(path+"-job", plan.Resources{CPUMillis: 1000, MemoryBytes: 256 * mb, Pids: 10})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, c := range []*Cgroup{before, job} {
			if err := c.Remove(); err != nil {
				t.Error(err)
			}
		}
	})
	if got := limitOf(t, before); got != 64*mb {
		t.Errorf("the bound is %d", got)
	}
	file := filepath.Join("/dev/shm", "coffer-test-"+strconv.Itoa(os.Getpid()))
	t.Cleanup(func() { _ = os.Remove(file) })
	c := exec.Command("sh", "-c", "read go; head -c 20000000 /dev/zero >"+file+"; echo done; read end")
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	if err := before.Add(c.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(in, "go\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	if err := job.Add(c.Process.Pid); err != nil {
		t.Fatal(err)
	}
	used, err := before.MemoryUsage()
	if err != nil || used < 20_000_000 || used > 64*mb {
		t.Errorf("%d bytes are charged, %v", used, err)
	}
	if moved, err := job.MemoryUsage(); err != nil || moved >= 20_000_000 {
		t.Errorf("%d bytes moved with the process, %v", moved, err)
	}
	if err := job.LowerMemory(256*mb - 20*mb); err != nil || limitOf(t, job) != 236*mb {
		t.Errorf("the bound is %d, %v", limitOf(t, job), err)
	}
	for _, n := range []int64{0, -1} {
		if err := job.LowerMemory(n); err == nil {
			t.Errorf("the bound was set to %d", n)
		}
	}
	if err := in.Close(); err != nil {
		t.Fatal(err)
	}
	_ = c.Wait() // the shell ends where there is nothing more to read
	// The group can go while its memory is there.
	if err := before.Remove(); err != nil {
		t.Error(err)
	}
	if _, err := before.MemoryUsage(); err == nil {
		t.Error("a group that is gone has memory")
	}
}
