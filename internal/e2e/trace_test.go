package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
)

// cutTrace shuts the connection by which a job's sandbox sends its trace. Nothing else of
// the job, its holder included, is touched.
func (n *node) cutTrace(t *testing.T, job string) {
	t.Helper()
	pid := n.holderPid(t, job)
	// What the holder accepts is in the namespace of who connects.
	list, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		t.Fatal(err)
	}
	cut := 0
	for line := range strings.Lines(string(list)) {
		// Num RefCount Protocol Flags Type St Inode Path; state 03 is connected.
		f := strings.Fields(line)
		if len(f) != 8 || f[5] != "03" || f[7] != filepath.Join(n.layout.Jobs(), job, holdapi.TraceName) {
			continue
		}
		for _, fd := range names(fmt.Sprintf("/proc/%d/fd", pid)) {
			if to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, fd)); err == nil && to == "socket:["+f[6]+"]" {
				shut(t, pid, fd)
				cut++
			}
		}
	}
	if cut != 1 {
		t.Fatalf("%d traces of job %s were cut, want 1", cut, job)
	}
}

// shut shuts a socket that another process has open.
func shut(t *testing.T, pid int, fd string) {
	t.Helper()
	number, err := strconv.Atoi(fd)
	if err != nil {
		t.Fatal(err)
	}
	process, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(process)
	own, err := unix.PidfdGetfd(process, number, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(own)
	if err := unix.Shutdown(own, unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
}

// TestTraceAloneDies cuts the trace of a job whose sandbox and holder live on: a job that
// nobody watches is stopped, and its record says why.
func TestTraceAloneDies(t *testing.T) {
	n := need(t)
	id := n.submit(t, n.small(t, "trace-cut", "import time; time.sleep(90)", ""))
	if s := n.wait(t, id, "running", running); s.State != "running" {
		t.Fatalf("%+v", s)
	}
	began := time.Now()
	n.cutTrace(t, id)
	n.holderPid(t, id)
	s := n.wait(t, id, "ended", ended)
	t.Logf("stopped after %s", time.Since(began).Round(time.Millisecond))
	if s.State != "failed" || s.Reason != "trace-lost" || s.Stage != "run" {
		t.Errorf("%+v", s)
	}
	b, file := n.bundleOf(t, id)
	st, err := bundle.Decode[bundle.Status](b.Parts[bundle.HolderStatus])
	if err != nil || !st.Started || !st.TraceLost {
		t.Errorf("%v, the holder says %+v", err, st)
	}
	if a, _ := n.alertsOf(t, id); len(a.Findings) != 1 || a.Findings[0].Rule != "trace-lost" || a.Findings[0].Action != "stop" {
		t.Errorf("%+v", a.Findings)
	}
	// A true record of a job that failed, and of why nobody can say what it did at its end.
	if out, err := n.verify(t, file, true); err != nil || !strings.Contains(out, "holder.trace     lost while the job ran") {
		t.Errorf("%v; the verification does not name the lost trace:\n%s", err, out)
	}
}
