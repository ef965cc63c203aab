package e2e

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/runner/rules"
)

// scriptJob is a job without inputs that runs a script of Python.
func scriptJob(t *testing.T, name, script string, more ...string) string {
	t.Helper()
	quoted, err := json.Marshal(script)
	if err != nil {
		t.Fatal(err)
	}
	s := "apiVersion: coffer.run/v1\nname: " + name + "\nimage: coffer.local/numpy:latest\ncommand: [\"/usr/bin/python3\", \"-c\", " + string(quoted) + "]\ninputs: []\n" +
		"resources: {gpus: 0, cpu: 1, memory: 256Mi}\nmaxDuration: 2m\nattestationPolicy: simulation\n" + strings.Join(more, "")
	path := filepath.Join(t.TempDir(), "job.yaml")
	if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func (n *node) bundleOf(t *testing.T, id string) (*bundle.Bundle, []byte) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "bundle.json")
	n.must(t, "evidence", "get", id, "-o", path)
	file, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b, err := bundle.Parse(file)
	if err != nil {
		t.Fatal(err)
	}
	return b, file
}

func (n *node) alertsOf(t *testing.T, id string) (bundle.Alerts, []byte) {
	t.Helper()
	b, file := n.bundleOf(t, id)
	a, err := bundle.Decode[bundle.Alerts](b.Parts[bundle.AlertsPart])
	if err != nil {
		t.Fatal(err)
	}
	return a, file
}

func rulesOf(a bundle.Alerts) []string {
	var out []string
	for _, f := range a.Findings {
		if !slices.Contains(out, f.Rule) {
			out = append(out, f.Rule)
		}
	}
	slices.Sort(out)
	return out
}

// ctr speaks to the stack's containerd, as the node's root can.
func ctr(n *node, args ...string) (string, error) {
	cmd := exec.Command(filepath.Join(os.Getenv("COFFER_TOOLS"), "ctr"), append([]string{
		"--address", filepath.Join(filepath.Dir(n.layout.Jobs()), "containerd.sock"), "--namespace", "coffer",
	}, args...)...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// container names the container of a running job.
func (n *node) container(t *testing.T, job string) string {
	t.Helper()
	out, err := ctr(n, "containers", "ls", "-q")
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// Warnings come on the same stream.
	names := slices.DeleteFunc(strings.Fields(out), func(w string) bool { return !strings.HasPrefix(w, "job-"+strings.ToLower(job)+"-") })
	if len(names) != 1 {
		t.Fatalf("containers of job %s: %v, want one", job, names)
	}
	return names[0]
}

// naughty provokes every shipped rule that a job can provoke without a network, with names
// that are not UTF-8.
const naughty = `
import ctypes, os, socket, sys
def attempt(f):
    try: f()
    except OSError as e: print("refused:", e)
attempt(lambda: open("/etc/shadow").read())
os.chdir("/root" if os.access("/root", os.X_OK) else "/")
attempt(lambda: open("/etc/../root/.ssh/id_ed25519").read())
attempt(lambda: socket.create_connection(("169.254.169.254", 80), timeout=1))
ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0)
for i in range(6): sys.stdout.write("x" * (1 << 20))
sys.stdout.flush()
fd = os.memfd_create(b"\xff/../../usr/bin/python3", 0)
with open("/usr/bin/python3", "rb") as f: os.write(fd, f.read() + b"changed")
pid = os.fork()
if pid == 0: os.execve("/proc/self/fd/%d" % fd, [b"\xff", "-c", "pass"], {b"\xff": b"\xfe"})
os.waitpid(pid, 0)
import time; time.sleep(60)
`

// TestRulesFindWhatAJobDoes runs a job that does what no training job should, on a
// real sandbox, and expects every rule's finding in the job's events, in its bundle
// and with whoever collects alerts, and the job to be stopped.
func TestRulesFindWhatAJobDoes(t *testing.T) {
	n := need(t)
	id := n.submit(t, scriptJob(t, "naughty", naughty, "output: {logBytes: 16Mi, logBytesPerSecond: 16Mi}\n"))
	s := n.wait(t, id, "ended", ended)
	if s.State != "failed" || s.Reason != "rule-program-in-memory" {
		t.Errorf("%+v", s)
	}
	a, file := n.alertsOf(t, id)
	for _, f := range a.Findings {
		t.Logf("%+v", f)
	}
	want := []string{"burst-of-output", "connect-outside", "key-material", "program-in-memory", "program-not-in-image", "ptrace"}
	if got := rulesOf(a); !slices.Equal(got, want) {
		t.Errorf("found %v, want %v", got, want)
	}
	if out, err := n.verify(t, file, true); !strings.Contains(out, "alerts.findings") || strings.Contains(out, "alerts.stop") {
		t.Errorf("%v\n%s", err, out)
	}
	events := n.must(t, "events", id, "--output", "json")
	b, err := os.ReadFile(filepath.Join(n.dir, "agent", "alerts.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	for _, rule := range want {
		if !strings.Contains(events, rule) {
			t.Errorf("no event of rule %s", rule)
		}
	}
	seen := map[string]bool{}
	for line := range bytes.Lines(b) {
		var e struct {
			ClassUID int `json:"class_uid"`
			Finding  struct {
				UID, Title string
			} `json:"finding_info"`
		}
		if err := json.Unmarshal(line, &e); err != nil || e.ClassUID != 2004 {
			t.Fatalf("%v in %s", err, line)
		}
		if strings.HasPrefix(e.Finding.UID, id) {
			seen[e.Finding.Title] = true
		}
	}
	for _, rule := range want {
		if !seen[rule] {
			t.Errorf("no alert of rule %s was written", rule)
		}
	}
}

// TestQuietJobFindsNothing holds the rules against the main job: an alert at every
// honest job is one that nobody reads.
func TestQuietJobFindsNothing(t *testing.T) {
	n := need(t)
	b, err := bundle.Parse(n.honest(t).bundle)
	if err != nil {
		t.Fatal(err)
	}
	a, err := bundle.Decode[bundle.Alerts](b.Parts[bundle.AlertsPart])
	if err != nil {
		t.Fatal(err)
	}
	set, err := rules.Parse(rules.Default)
	if err != nil {
		t.Fatal(err)
	}
	if a.Rules != set.Digest() || len(a.Findings) != 0 || a.Untold != 0 {
		t.Errorf("%+v", a)
	}
}

// TestRuleStopsAnOperatorsProgram puts a program into a running job from outside.
func TestRuleStopsAnOperatorsProgram(t *testing.T) {
	n := need(t)
	id := n.submit(t, scriptJob(t, "waiting", "import time; time.sleep(60)"))
	n.wait(t, id, "running", running)
	if out, err := ctr(n, "tasks", "exec", "--exec-id", "x", n.container(t, id), "/usr/bin/python3", "-c", "print(1)"); err != nil {
		t.Fatalf("exec: %v %s", err, out)
	}
	if s := n.wait(t, id, "ended", ended); s.Reason != "rule-operator-exec" {
		t.Errorf("%+v", s)
	}
	a, _ := n.alertsOf(t, id)
	if got := rulesOf(a); !slices.Contains(got, "operator-exec") {
		t.Errorf("found %v", got)
	}
}

// TestOpensDoNotDrownTheTrace has a job open many files, none of which a rule looks
// for, and then do something that one does.
func TestOpensDoNotDrownTheTrace(t *testing.T) {
	n := need(t)
	id := n.submit(t, scriptJob(t, "opens", `
import ctypes, os, time
began = time.monotonic()
for i in range(20000): os.close(os.open("/etc/passwd", os.O_RDONLY))
print("%.1f microseconds for each file" % ((time.monotonic() - began) * 1e6 / 20000))
ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0)
`))
	if s := n.wait(t, id, "ended", ended); s.State != "succeeded" {
		t.Errorf("%+v", s)
	}
	t.Log(n.must(t, "logs", id))
	a, _ := n.alertsOf(t, id)
	if got := rulesOf(a); !slices.Equal(got, []string{"ptrace"}) {
		t.Errorf("found %v", got)
	}
	b, _ := n.bundleOf(t, id)
	st, err := bundle.Decode[bundle.Status](b.Parts[bundle.HolderStatus])
	if err != nil {
		t.Fatal(err)
	}
	if st.Dropped != 0 {
		t.Errorf("the runtime dropped %d messages", st.Dropped)
	}
}
