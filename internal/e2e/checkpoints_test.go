package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coffer-run/coffer/runner/source/sink"
)

// resumeJob writes the example that resumes, with a grant for it.
func (n *node) resumeJob(t *testing.T, name string, edit func(string) string) string {
	t.Helper()
	b, err := os.ReadFile("../../examples/resume/job.yaml")
	if err != nil {
		t.Fatal(err)
	}
	const demo = "file:///var/lib/coffer/demo/"
	s := strings.NewReplacer(
		"asset: fashion-mnist\n", "asset: data\n", demo+"fashion-mnist\n", "file://"+n.data+"\n",
		"asset: fashion-mnist-numpy-model\n", "asset: model\n", demo+"fashion-mnist-numpy-model\n", "file://"+n.model+"\n",
		"asset: fashion-mnist-numpy-checkpoints\n", "asset: ckpt\n", demo+"fashion-mnist-numpy-checkpoints\n", "file://"+n.sink+"\n",
		"name: resume\n", "name: "+name+"\n", "gpus: 1", "gpus: 0", "maxDuration: 30m", "maxDuration: 5m",
	).Replace(string(b))
	if edit != nil {
		s = edit(s)
	}
	path := filepath.Join(t.TempDir(), "job.yaml")
	if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
		t.Fatal(err)
	}
	n.grant(t, n.planDigest(t, path), 9)
	return path
}

var (
	weightsLine = regexp.MustCompile(`"weights": "([0-9a-f]{64})"`)
	beginsLine  = regexp.MustCompile(`"begins after step": ([0-9]+)`)
)

// output is what a job has printed.
func (n *node) output(t *testing.T, id string) string {
	t.Helper()
	out, _ := n.coffer("logs", id)
	return out
}

// anchored waits until the broker has countersigned a job's checkpoint of a number
// or a later one.
func (n *node) anchored(t *testing.T, id string, sequence uint64) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		dirs, err := filepath.Glob(filepath.Join(n.sink, id, "*", "anchor.jwt"))
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range dirs {
			if at, ok := sink.Sequence(filepath.Base(filepath.Dir(d))); ok && at >= sequence {
				return
			}
		}
		if s := n.status(t, id); ended(s) || time.Now().After(deadline) {
			t.Fatalf("checkpoint %d of job %s was not countersigned: %+v\n%s", sequence, id, s, n.output(t, id))
		}
	}
}

// unanchored waits until a job has a checkpoint that nobody countersigned for a
// while.
func (n *node) unanchored(t *testing.T, id string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		records, err := filepath.Glob(filepath.Join(n.sink, id, "*", "record.json"))
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range records {
			st, err := os.Stat(r)
			_, aerr := os.Stat(filepath.Join(filepath.Dir(r), "anchor.jwt"))
			if _, ok := sink.Sequence(filepath.Base(filepath.Dir(r))); ok && err == nil && os.IsNotExist(aerr) && time.Since(st.ModTime()) > 500*time.Millisecond {
				return
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("every checkpoint of job %s is countersigned though the broker is away", id)
		}
	}
}

// sandboxPids are the processes of a job's container: the sandbox and its files.
func sandboxPids(t *testing.T, job string) []int {
	t.Helper()
	var out []int
	dirs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range dirs {
		b, err := os.ReadFile(d)
		if err != nil {
			continue
		}
		if line := string(b); strings.Contains(line, "runsc") && strings.Contains(line, "job-"+strings.ToLower(job)) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(d)))
			out = append(out, pid)
		}
	}
	if len(out) == 0 {
		t.Fatalf("job %s has no sandbox", job)
	}
	return out
}

// TestResumed kills a training job again and again, each time something else of
// it, and submits it again. It goes on from the newest checkpoint that was
// countersigned, and ends with the very weights of a run that nobody killed.
func TestResumed(t *testing.T) {
	n := need(t)
	steps := func(s string) string { return strings.Replace(s, `STEPS: "60"`, `STEPS: "120"`, 1) }
	// Slow enough to be killed in the middle, each time.
	slow := func(s string) string {
		return strings.Replace(steps(s), `EVERY: "10"`, "EVERY: \"10\"\n  PAUSE: \"0.08\"", 1)
	}
	whole := n.submit(t, n.resumeJob(t, "never-killed", steps))
	job := n.resumeJob(t, "killed", slow)
	if s := n.wait(t, whole, "ended", ended); s.State != "succeeded" {
		t.Fatalf("%+v\n%s", s, n.output(t, whole))
	}
	want := weightsLine.FindStringSubmatch(n.output(t, whole))
	if want == nil {
		t.Fatalf("no weights in %q", n.output(t, whole))
	}
	last := uint64(0)
	for _, tt := range []struct {
		what string
		kill func(id string)
	}{
		{"the holder", func(id string) { kill(t, n.holderPid(t, id)) }},
		{"the container", func(id string) {
			for _, pid := range sandboxPids(t, id) {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}},
		{"everything", func(id string) {
			holder, agent, broker := n.holderPid(t, id), n.pid(t, "cofferd"), n.pid(t, "coffer-broker")
			for _, pid := range append(sandboxPids(t, id), holder, agent, broker) {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
			time.Sleep(200 * time.Millisecond)
			n.must(t, "restart")
		}},
	} {
		id := n.submit(t, job)
		n.anchored(t, id, last+1)
		at := n.resumedFrom(t, id)
		tt.kill(id)
		s := n.wait(t, id, "ended", ended)
		if s.State == "succeeded" {
			t.Fatalf("killing %s came too late: %+v", tt.what, s)
		}
		t.Logf("%s killed: %s, %s; that run began after step %d", tt.what, s.State, s.Reason, at)
		if at != int(last)*10 {
			t.Errorf("the run before %s was killed began after step %d, want %d", tt.what, at, last*10)
		}
		last = n.newestAnchor(t, id)
	}
	// The agent's death is no job's: it goes on.
	id := n.submit(t, job)
	n.anchored(t, id, last+1)
	// While the broker is away checkpoints are sealed, and unanchored.
	kill(t, n.pid(t, "coffer-broker"))
	n.unanchored(t, id)
	kill(t, n.pid(t, "cofferd"))
	n.must(t, "restart")
	if s := n.wait(t, id, "ended", ended); s.State != "succeeded" {
		t.Fatalf("%+v\n%s", s, n.output(t, id))
	}
	out := n.output(t, id)
	if got := weightsLine.FindStringSubmatch(out); got == nil || got[1] != want[1] {
		t.Errorf("the resumed run ended with %v, want %s\n%s", got, want[1], out)
	}
	if at := n.resumedFrom(t, id); at != int(last)*10 {
		t.Errorf("the last run began after step %d, want %d", at, last*10)
	}
	n.resumedBundle(t, id)
	n.keptFolders(t, id)
	n.offlineCheckpoints(t, id)
}

// resumedFrom is the step after which a run began, as it printed.
func (n *node) resumedFrom(t *testing.T, id string) int {
	t.Helper()
	m := beginsLine.FindStringSubmatch(n.output(t, id))
	if m == nil {
		t.Fatalf("job %s does not say where it begins:\n%s", id, n.output(t, id))
	}
	at, err := strconv.Atoi(m[1])
	if err != nil {
		t.Fatal(err)
	}
	return at
}

func (n *node) newestAnchor(t *testing.T, id string) (newest uint64) {
	t.Helper()
	dirs, err := filepath.Glob(filepath.Join(n.sink, id, "*", "anchor.jwt"))
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range dirs {
		if at, ok := sink.Sequence(filepath.Base(filepath.Dir(d))); ok {
			newest = max(newest, at)
		}
	}
	return newest
}

// resumedBundle verifies the last run's record, and that it tells of what it went
// on from.
func (n *node) resumedBundle(t *testing.T, id string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "bundle.json")
	n.must(t, "evidence", "get", id, "-o", path)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	out, err := n.verify(t, b, true, "--output", "json")
	if err != nil {
		t.Fatalf("the bundle does not verify: %v\n%s", err, out)
	}
	var r struct {
		Groups []struct {
			Checks []struct{ ID, Outcome string }
		}
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatal(err)
	}
	passed := map[string]bool{}
	for _, g := range r.Groups {
		for _, c := range g.Checks {
			passed[c.ID] = passed[c.ID] || c.Outcome == "pass"
		}
	}
	for _, id := range []string{"resume.signature", "resume.record", "resume.from", "resume.seen", "log.resume", "checkpoint.anchor", "log.checkpoints", "checkpoint.sequence"} {
		if !passed[id] {
			t.Errorf("the record of the resumed run does not pass %s", id)
		}
	}
}

// keptFolders: the example keeps the last three and the best, and the record of
// every one.
func (n *node) keptFolders(t *testing.T, id string) {
	t.Helper()
	records, err := filepath.Glob(filepath.Join(n.sink, id, "*", "record.json"))
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := filepath.Glob(filepath.Join(n.sink, id, "*", "manifest.json"))
	if err != nil {
		t.Fatal(err)
	}
	if len(sealed) > 4 || len(sealed) == 0 || len(sealed) > len(records) {
		t.Errorf("%d of %d checkpoints are kept, want the last three and the best", len(sealed), len(records))
	}
	slices.Sort(records)
	for i, r := range records {
		if at, ok := sink.Sequence(filepath.Base(filepath.Dir(r))); !ok || i > 0 && at == 0 {
			t.Errorf("folder %s", r)
		}
	}
}

// offlineCheckpoints checks the sealed folders as their owner would, and sees that
// what is taken away is missed.
func (n *node) offlineCheckpoints(t *testing.T, id string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "line")
	copyTree(t, filepath.Join(n.sink, id), dir)
	out := n.must(t, "checkpoints", "verify", dir)
	if !strings.Contains(out, "whole") || strings.Contains(out, "  no  ") {
		t.Errorf("%s", out)
	}
	if ls := n.must(t, "checkpoints", "ls", id); !strings.Contains(ls, "yes") || strings.Contains(ls, " no ") {
		t.Errorf("%s", ls)
	}
	l, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(l)
	anchor := filepath.Join(l[0], "anchor.jwt")
	b, err := os.ReadFile(filepath.Join(l[1], "anchor.jwt"))
	if err != nil {
		t.Fatal(err)
	}
	for what, f := range map[string]func() error{
		"the countersignature of another": func() error { return os.WriteFile(anchor, b, 0o600) },
		"no countersignature":             func() error { return os.Remove(anchor) },
	} {
		if err := f(); err != nil {
			t.Fatal(err)
		}
		if out, err := n.coffer("checkpoints", "verify", dir); exitCode(err) != 1 {
			t.Errorf("with %s the line holds:\n%s", what, out)
		}
	}
	if err := os.RemoveAll(l[1]); err != nil {
		t.Fatal(err)
	}
	if out, err := n.coffer("checkpoints", "verify", dir); exitCode(err) != 1 || !strings.Contains(out, "follows number") {
		t.Errorf("with one taken away the line holds:\n%s", out)
	}
}
