package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/coffer-run/coffer/internal/docs/pages"
	"github.com/coffer-run/coffer/internal/loopback"
	"github.com/coffer-run/coffer/internal/stack"
	"github.com/coffer-run/coffer/runner/api/agent/v1/agentv1connect"
)

// node is a stack, which one test uses at a time.
type node struct {
	dir    string
	bin    string
	layout stack.Layout
	// data, model and checkpoints are sealed folders and the sink.
	data, model, sink string
	// weights are the initial model's bytes, which nobody else may have.
	weights []byte

	// portBase is the first of its ports, its own until release.
	portBase int
	release  func()

	once     sync.Once
	engineer agentv1connect.AgentServiceClient
	main     mainJob
}

// stacks has a place for each test that may run at once (-parallel). The first test
// that gets a place brings up its stack, which the others find as they left it.
var stacks chan *node

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

// missing says why the tests cannot run, or nothing.
func missing() string {
	for _, v := range []string{"COFFER_BIN", "COFFER_TOOLS", "COFFER_IMAGES"} {
		if os.Getenv(v) == "" {
			return v + " is not set; run make test"
		}
	}
	if os.Geteuid() != 0 {
		return "root is needed"
	}
	return ""
}

func run(m *testing.M) int {
	if why := missing(); why != "" {
		if os.Getenv("CI") == "true" && os.Geteuid() == 0 {
			fmt.Fprintln(os.Stderr, "e2e: as root in CI a skip is a failure:", why)
			return 1
		}
		fmt.Fprintln(os.Stderr, "e2e: skipped:", why)
		return m.Run()
	}
	flag.Parse()
	atOnce := flag.Lookup("test.parallel").Value.(flag.Getter).Get().(int)
	stacks = make(chan *node, atOnce)
	for range atOnce {
		stacks <- &node{bin: os.Getenv("COFFER_BIN")}
	}
	code := m.Run()
	for range atOnce {
		if err := (<-stacks).down(); err != nil {
			fmt.Fprintln(os.Stderr, "e2e: take down the stack:", err)
			code = max(code, 1)
		}
	}
	return code
}

// need lends a stack to a test until it ends, or skips.
func need(t *testing.T) *node {
	t.Helper()
	if testing.Short() {
		t.Skip("integration tests are off (-short)")
	}
	if stacks == nil {
		t.Skip(missing())
	}
	t.Parallel()
	n := <-stacks
	t.Cleanup(func() { stacks <- n })
	if n.dir == "" {
		if err := n.up(); err != nil {
			t.Fatal("bring up a stack: ", err)
		}
	}
	return n
}

func (n *node) up() (err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, n.down())
		}
	}()
	if n.portBase, n.release, err = loopback.Lend(); err != nil {
		return err
	}
	if n.dir, err = os.MkdirTemp("", "coffer-e2e-"); err != nil {
		return err
	}
	if n.layout, err = stack.NewLayout(n.dir); err != nil {
		return err
	}
	script, err := pages.Of("internal/e2e up")
	if err != nil {
		return err
	}
	// Beside what the README says: ports of its own, and damaged evidence for other tests.
	if out, err := n.readme(script, "--port-base", fmt.Sprint(n.portBase), "--faults"); err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	return n.seal()
}

// readme types a command of the README, with more at its end.
func (n *node) readme(script *pages.Script, more ...string) (string, error) {
	c := script.Commands("README.md", "By hand")
	if len(c) != 1 {
		return "", fmt.Errorf("README.md: %d commands where one is expected", len(c))
	}
	line, found := strings.CutPrefix(strings.NewReplacer("build/tools", os.Getenv("COFFER_TOOLS"), "build/images", os.Getenv("COFFER_IMAGES")).Replace(c[0].Text), "sudo build/bin/coffer ")
	if !found {
		return "", fmt.Errorf("README.md: %q is not by the clone's coffer", c[0].Text)
	}
	return n.coffer(append(strings.Fields(line), more...)...)
}

// seal seals the real data set, and weights that exist nowhere else.
func (n *node) seal() error {
	secret, err := os.MkdirTemp("/dev/shm", "coffer-e2e-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(secret)
	file := filepath.Join(secret, "model.safetensors")
	if out, err := exec.Command("go", "run", "../../examples/model", "-arch", "mlp", "-seed", fmt.Sprint(time.Now().UnixNano()), "-out", file).CombinedOutput(); err != nil {
		return fmt.Errorf("make weights: %w: %s", err, out)
	}
	if n.weights, err = os.ReadFile(file); err != nil {
		return err
	}
	n.data, n.model, n.sink = filepath.Join(n.dir, "data"), filepath.Join(n.dir, "model"), filepath.Join(n.dir, "sink")
	if err := os.Mkdir(n.sink, 0o700); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"seal", "/usr/share/datasets/fashion-mnist", "--asset", "data", "--kind", "dataset", "--out", n.data},
		{"seal", file, "--asset", "model", "--kind", "weights", "--out", n.model},
		{"assets", "create", "ckpt", "--kind", "checkpoints"},
	} {
		if out, err := n.coffer(args...); err != nil {
			return fmt.Errorf("%v: %w: %s", args, err, out)
		}
	}
	return nil
}

// down stops the stack, if it is up, and looks for anything that it left behind.
func (n *node) down() error {
	if n.release != nil {
		defer n.release()
	}
	if n.dir == "" {
		return nil
	}
	dir := n.dir
	script, err := pages.Of("internal/e2e down")
	if err != nil {
		return err
	}
	out, err := n.readme(script)
	n.dir = ""
	if err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	traces, err := n.layout.Traces()
	if err != nil {
		return err
	}
	if len(traces) > 0 {
		return fmt.Errorf("left behind: %s", strings.Join(traces, ", "))
	}
	return os.RemoveAll(dir)
}

// coffer runs the CLI as its user would.
func (n *node) coffer(args ...string) (string, error) {
	cmd := exec.Command(filepath.Join(n.bin, "coffer"), args...)
	cmd.Env = append(os.Environ(), "COFFER_DIR="+n.dir, "NO_COLOR=1")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return out.String(), err
}

func (n *node) must(t *testing.T, args ...string) string {
	t.Helper()
	out, err := n.coffer(args...)
	if err != nil {
		t.Fatalf("coffer %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// exitCode is what a command ended with.
func exitCode(err error) int {
	var e *exec.ExitError
	if errors.As(err, &e) {
		return e.ExitCode()
	}
	if err != nil {
		return -1
	}
	return 0
}

// jobFile writes the main job's file, changed as edit says.
func (n *node) jobFile(t *testing.T, name string, edit func(string) string) string {
	t.Helper()
	b, err := os.ReadFile("../../examples/fashion-mnist-numpy/job.yaml")
	if err != nil {
		t.Fatal(err)
	}
	const demo = "file:///var/lib/coffer/demo/"
	s := strings.NewReplacer(
		"asset: fashion-mnist\n", "asset: data\n", demo+"fashion-mnist\n", "file://"+n.data+"\n",
		"asset: fashion-mnist-numpy-model\n", "asset: model\n", demo+"fashion-mnist-numpy-model\n", "file://"+n.model+"\n",
		"asset: fashion-mnist-numpy-checkpoints\n", "asset: ckpt\n", demo+"fashion-mnist-numpy-checkpoints\n", "file://"+n.sink+"\n",
		"name: fashion-mnist-numpy\n", "name: "+name+"\n",
	).Replace(string(b))
	if strings.Contains(s, demo) {
		t.Fatalf("the example's job file has changed its shape:\n%s", s)
	}
	if edit != nil {
		changed := edit(s)
		if changed == s {
			t.Fatal("the edit changes nothing")
		}
		s = changed
	}
	path := filepath.Join(t.TempDir(), "job.yaml")
	if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func (n *node) planDigest(t *testing.T, job string) string {
	t.Helper()
	d := regexp.MustCompile(`sha384:[0-9a-f]{96}`).FindString(n.must(t, "plan", job))
	if d == "" {
		t.Fatal("coffer plan shows no digest")
	}
	return d
}

// grant lets a plan use everything the main job needs.
func (n *node) grant(t *testing.T, plan string, releases int) string {
	t.Helper()
	out := n.must(t, "grant", "create", "--plan", plan, "--asset", "data", "--asset", "model", "--asset", "ckpt", "--allow-simulated", "--releases", fmt.Sprint(releases))
	id := regexp.MustCompile(`grant-[a-z0-9]+`).FindString(out)
	if id == "" {
		t.Fatalf("no grant in %q", out)
	}
	return id
}

// granted writes the main job under a name of its own, with a grant for it.
func (n *node) granted(t *testing.T, name string, epochs int) string {
	t.Helper()
	job := n.jobFile(t, name, func(s string) string {
		return strings.Replace(strings.Replace(s, `EPOCHS: "1"`, fmt.Sprintf("EPOCHS: %q", fmt.Sprint(epochs)), 1), "maxDuration: 30m", "maxDuration: 10m", 1)
	})
	n.grant(t, n.planDigest(t, job), 1)
	return job
}

var jobID = regexp.MustCompile(`\b[0-9A-HJKMNP-TV-Z]{26}\b`)

// submit submits a job and returns its id without waiting for its end.
func (n *node) submit(t *testing.T, job string) string {
	t.Helper()
	out := n.must(t, "submit", job)
	id := jobID.FindString(out)
	if id == "" {
		t.Fatalf("no job in %q", out)
	}
	return id
}

// status is what `coffer status --output json` says.
type status struct {
	ID      string `json:"id"`
	State   string `json:"state"`
	Stage   string `json:"stage"`
	Reason  string `json:"reason"`
	Message string `json:"message"`
	Paused  bool   `json:"paused"`
	// Stopping is why a job that runs was told to stop.
	Stopping string        `json:"stopping"`
	Checks   []failedCheck `json:"failedChecks"`
}

type failedCheck struct {
	ID string `json:"id"`
}

// status asks the agent itself: a CLI asked twenty times a second would take half
// of a core from what is tested.
func (n *node) status(t *testing.T, id string) status {
	t.Helper()
	j := n.job(t, id)
	s := status{ID: j.GetId(), State: j.GetState(), Stage: j.GetStage(), Reason: j.GetReason(), Message: j.GetMessage(), Paused: j.GetPaused(), Stopping: j.GetStopping()}
	for _, c := range j.GetChecks() {
		s.Checks = append(s.Checks, failedCheck{ID: c.GetId()})
	}
	return s
}

// wait waits until a job satisfies f.
func (n *node) wait(t *testing.T, id, what string, f func(status) bool) status {
	t.Helper()
	for deadline := time.Now().Add(90 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		s := n.status(t, id)
		if f(s) {
			return s
		}
		if time.Now().After(deadline) {
			t.Fatalf("job %s is not %s after 90 s: %+v", id, what, s)
		}
	}
}

func ended(s status) bool { return s.State != "queued" && s.State != "running" }

func running(s status) bool { return s.Stage == "run" || ended(s) }

// pid returns the process of one of the stack's daemons.
func (n *node) pid(t *testing.T, name string) int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(n.dir, "run.json"))
	if err != nil {
		t.Fatal(err)
	}
	var rec struct {
		Processes []struct {
			Name string `json:"name"`
			Pid  int    `json:"pid"`
		} `json:"processes"`
	}
	if err := json.Unmarshal(b, &rec); err != nil {
		t.Fatal(err)
	}
	for _, p := range rec.Processes {
		if p.Name == name {
			return p.Pid
		}
	}
	t.Fatalf("no process %s in %s", name, b)
	return 0
}

func kill(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err != nil || strings.Contains(string(b), ") Z ") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %d survives SIGKILL", pid)
		}
	}
}

// withConfig restarts a program of the stack with another configuration, until the test
// ends.
func (n *node) withConfig(t *testing.T, program string, change func(config map[string]any)) {
	t.Helper()
	path := filepath.Join(n.dir, "config", program+".json")
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var config map[string]any
	if err := json.Unmarshal(before, &config); err != nil {
		t.Fatal(err)
	}
	change(config)
	after, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	set := func(b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		n.must(t, "restart", program)
	}
	t.Cleanup(func() { set(before) })
	set(after)
}
