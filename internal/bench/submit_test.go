package bench

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/executable"
	"github.com/coffer-run/coffer/internal/loopback"
	"github.com/coffer-run/coffer/internal/stack"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/api/agent/v1/agentv1connect"
)

const (
	// submitRuns is how many jobs are measured, after one that is not.
	submitRuns = 9
	// submitInput is the sealed input's size, in bytes.
	submitInput = 64 << 20
	// sayWhen prints the time at which the job's own code begins.
	sayWhen = "import time; print(time.time_ns())"
)

// submitStack is a stack with a sealed input and a job that may use it.
type submitStack struct {
	dir    string
	agent  agentv1connect.AgentServiceClient
	job    []byte
	layout stack.Layout
}

// submitToStart measures the time from the call that submits a job to the first
// instruction of its program, with emulated devices, and the same of `ctr run` with
// the same image and runtime, which attests and decrypts nothing.
func submitToStart(t *testing.T) []row {
	if os.Geteuid() != 0 {
		t.Skip("root is needed")
	}
	s := newSubmitStack(t)
	var whole, plain []float64
	stages := map[bundle.Stage][]float64{}
	var wrapper []string
	for i := range submitRuns + 1 {
		took, st, argv := s.run(t, i)
		wrapper = argv
		if i == 0 {
			continue
		}
		whole = append(whole, took)
		for _, step := range st.Timeline {
			stages[step.Stage] = append(stages[step.Stage], float64(step.Nanos)/1e6)
		}
	}
	script := filepath.Join(t.TempDir(), "runsc")
	// The flags that the job ran with, without its trace.
	wrapper = slices.DeleteFunc(wrapper, func(a string) bool { return strings.HasPrefix(a, "--pod-init-config") })
	if err := executable.Write(script, []byte("#!/bin/sh\nexec '"+strings.Join(wrapper, "' '")+"' \"$@\"\n")); err != nil {
		t.Fatal(err)
	}
	for i := range submitRuns + 1 {
		took := s.ctrRun(t, script, i)
		if i > 0 {
			plain = append(plain, took)
		}
	}
	rows := []row{
		info("ctr run to first instruction, the floor", middle(plain), "ms"),
		info("submit to first instruction, 64 MiB sealed", middle(whole), "ms"),
		atMost("submit to first instruction, more than ctr run", middle(whole)-middle(plain), "ms", 350),
	}
	known := 0.0
	for _, stage := range bundle.Stages() {
		if v := stages[stage]; len(v) > 0 && stage != bundle.StageRun && stage != bundle.StageEvidence {
			rows = append(rows, info("  of it in stage "+string(stage), middle(v), "ms"))
			known += middle(v)
		}
	}
	return append(rows, info("  of it between the stages and in the program's own start", middle(whole)-known, "ms"))
}

func newSubmitStack(t *testing.T) *submitStack {
	t.Helper()
	s := &submitStack{dir: must[string](t)(os.MkdirTemp("", "coffer-bench-submit-"))}
	s.layout = must[stack.Layout](t)(stack.NewLayout(s.dir))
	s.coffer(t, "up", "--image", filepath.Join(os.Getenv("COFFER_IMAGES"), "numpy.tar"), "--tools", os.Getenv("COFFER_TOOLS"), "--port-base", fmt.Sprint(loopback.Base(t)))
	t.Cleanup(func() {
		s.coffer(t, "down")
		if err := os.RemoveAll(s.dir); err != nil {
			t.Error(err)
		}
	})
	data := filepath.Join(t.TempDir(), "data")
	content := make([]byte, submitInput)
	_, _ = rand.Read(content) // it never fails
	if err := errors.Join(os.Mkdir(data, 0o700), os.WriteFile(filepath.Join(data, "data.bin"), content, 0o600)); err != nil {
		t.Fatal(err)
	}
	s.coffer(t, "seal", data, "--asset", "bench", "--kind", "dataset", "--out", filepath.Join(s.dir, "sealed"))
	file := filepath.Join(t.TempDir(), "job.yaml")
	s.job = fmt.Appendf(nil, `apiVersion: coffer.run/v1
name: submit-to-start
image: coffer.local/numpy:latest
command: [/usr/bin/python3, -S, -c, %q]
inputs:
  - {name: data, asset: bench, uri: "file://%s/sealed", mount: /inputs/data}
resources: {cpu: 2, memory: 512Mi, gpus: 1}
maxDuration: 2m
attestationPolicy: simulation
`, sayWhen, s.dir)
	if err := os.WriteFile(file, s.job, 0o600); err != nil {
		t.Fatal(err)
	}
	digest := regexp.MustCompile(`sha384:[0-9a-f]{96}`).FindString(s.coffer(t, "plan", file))
	s.coffer(t, "grant", "create", "--plan", digest, "--asset", "bench", "--allow-simulated", "--releases", fmt.Sprint(submitRuns+1))
	e := must[stack.Endpoint](t)(stack.OpenEndpoint(s.dir))
	h, err := e.HTTPClient(daemon.RoleEngineer, daemon.RoleAgent)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.CloseIdleConnections)
	s.agent = agentv1connect.NewAgentServiceClient(h, e.Agent())
	return s
}

func (s *submitStack) coffer(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.Command(filepath.Join(os.Getenv("COFFER_BIN"), "coffer"), args...)
	cmd.Env = append(os.Environ(), "COFFER_DIR="+s.dir, "NO_COLOR=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("coffer %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// run submits the job once and returns the milliseconds to its first instruction, its
// statement and the runtime's command line.
func (s *submitStack) run(t *testing.T, i int) (float64, bundle.Statement, []string) {
	t.Helper()
	ctx := t.Context()
	began := time.Now()
	res, err := s.agent.Submit(ctx, connect.NewRequest(&agentv1.SubmitRequest{JobFile: s.job, IdempotencyKey: fmt.Sprintf("bench-%d", i)}))
	if err != nil {
		t.Fatal(err)
	}
	j := res.Msg.GetJob()
	for j.GetEndedUnix() == 0 {
		time.Sleep(20 * time.Millisecond)
		got, err := s.agent.Get(ctx, connect.NewRequest(&agentv1.GetRequest{Id: j.GetId()}))
		if err != nil {
			t.Fatal(err)
		}
		j = got.Msg.GetJob()
	}
	if j.GetState() != "succeeded" {
		t.Fatalf("%s: %s", j.GetState(), j.GetMessage())
	}
	logs, err := s.agent.Logs(ctx, connect.NewRequest(&agentv1.LogsRequest{Id: j.GetId()}))
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	for logs.Receive() {
		out.Write(logs.Msg().GetLog().GetData())
	}
	if err := errors.Join(logs.Err(), logs.Close()); err != nil {
		t.Fatal(err)
	}
	file, err := s.agent.Bundle(ctx, connect.NewRequest(&agentv1.BundleRequest{Id: j.GetId()}))
	if err != nil {
		t.Fatal(err)
	}
	b := must[*bundle.Bundle](t)(bundle.Parse(file.Msg.GetBundle()))
	return since(t, began, out.String()), must[bundle.Statement](t)(bundle.ParseStatement(b.Statement)), must[plan.Sandbox](t)(plan.ParseSandbox(b.Parts[bundle.Sandbox])).Wrapper
}

// ctrRun starts the same image with the same runtime.
func (s *submitStack) ctrRun(t *testing.T, runsc string, i int) float64 {
	t.Helper()
	root := filepath.Join(t.TempDir(), "root")
	args := []string{
		"--address", filepath.Join(filepath.Dir(s.layout.Jobs()), "containerd.sock"), "--namespace", "coffer", "run", "--rm", "--read-only", "--snapshotter", "overlayfs",
		"--runtime", "io.containerd.runc.v2", "--runc-binary", runsc, "--runc-root", root,
		"coffer.local/numpy:latest", fmt.Sprintf("bench-floor-%d", i), "/usr/bin/python3", "-S", "-c", sayWhen,
	}
	began := time.Now()
	out, err := exec.Command(filepath.Join(os.Getenv("COFFER_TOOLS"), "ctr"), args...).Output()
	if err != nil {
		t.Fatalf("ctr: %v\n%s", err, out)
	}
	// With --network=none runsc keeps a network namespace mounted in its root.
	if err := unix.Unmount(filepath.Join(root, "coffer", "null-netns"), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
		t.Error(err)
	}
	return since(t, began, string(out))
}

// since is the milliseconds from a time to the one that a job printed.
func since(t *testing.T, began time.Time, printed string) float64 {
	t.Helper()
	n, err := strconv.ParseInt(strings.TrimSpace(printed), 10, 64)
	if err != nil {
		t.Fatalf("the job printed %q", printed)
	}
	return float64(n-began.UnixNano()) / 1e6
}

func TestSubmitToStart(t *testing.T) {
	if os.Getenv("COFFER_BENCH") == "" {
		t.Skip("COFFER_BENCH is not set; run make bench")
	}
	for _, r := range submitToStart(t) {
		t.Logf("%-62s %8.1f %s %s", r.Name, r.Value, r.Unit, r.Goal)
	}
}
