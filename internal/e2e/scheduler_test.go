package e2e

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/internal/stack"
)

// TestSchedulerExample runs the example against the stack, twice: the second time it
// is the same job.
func TestSchedulerExample(t *testing.T) {
	n := need(t)
	e, err := stack.OpenEndpoint(n.dir)
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(t.TempDir(), "scheduler")
	if out, err := exec.Command("go", "build", "-o", program, "../../examples/scheduler").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	pki := filepath.Join(n.dir, "pki")
	job := n.small(t, "scheduled", "print('done')", "")
	var ids []string
	for range 2 {
		bundle := filepath.Join(t.TempDir(), "bundle.json")
		out, err := exec.Command(program, "--agent", e.Agent(), "--cert", filepath.Join(pki, "engineer-engineer.pem"), "--key", filepath.Join(pki, "engineer-engineer.key"),
			"--ca", e.CA(), "-o", bundle, job).CombinedOutput()
		if err != nil || !strings.Contains(string(out), "\nsucceeded") || !strings.Contains(string(out), "run done") || !fileThere(bundle) {
			t.Fatalf("%v\n%s", err, out)
		}
		ids = append(ids, jobID.FindString(string(out)))
	}
	if ids[0] == "" || ids[0] != ids[1] {
		t.Errorf("the same file became the jobs %v", ids)
	}
}
