package e2e

import (
	"bytes"
	"encoding/json"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/docs/pages"
	"github.com/coffer-run/coffer/internal/stack"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
)

// scheduler returns the files of the stack's scheduler.
func (n *node) scheduler() (cert, key string) {
	return filepath.Join(n.dir, "pki", "scheduler-scheduler.pem"), filepath.Join(n.dir, "pki", "scheduler-scheduler.key")
}

// nodeToken signs the stack's engineer in at the node and returns the token.
func (n *node) nodeToken(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.Command(filepath.Join(n.bin, "coffer"), "login", "--node", "--user", "engineer", "--password-file", filepath.Join(n.dir, "people", "engineer.password"))
	cmd.Env = append(os.Environ(), "COFFER_DIR="+n.dir, "COFFER_SESSIONS="+dir, "NO_COLOR=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	token := ""
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		var s struct {
			Nodes map[string]struct {
				ID string `json:"idToken"`
			} `json:"nodes"`
		}
		if json.Unmarshal(b, &s) == nil && s.Nodes["engineer"].ID != "" {
			token = s.Nodes["engineer"].ID
		}
		return err
	})
	if err != nil || token == "" {
		t.Fatalf("no token after signing in: %v", err)
	}
	return token
}

// TestSchedulerExample runs the example against the stack, twice: the second time it
// is the same job. A person with a token is another submitter, with a job of its own.
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
	job := n.small(t, "scheduled", "print('done')", "")
	cert, key := n.scheduler()
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte(n.nodeToken(t)), 0o600); err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, who := range [][]string{{"--cert", cert, "--key", key}, {"--cert", cert, "--key", key}, {"--token", token}} {
		bundle := filepath.Join(t.TempDir(), "bundle.json")
		out, err := exec.Command(program, append(who, "--agent", e.Agent(), "--ca", e.CA(), "-o", bundle, job)...).CombinedOutput()
		if err != nil || !strings.Contains(string(out), "\nsucceeded") || !strings.Contains(string(out), "run done") || !fileThere(bundle) {
			t.Fatalf("%v\n%s", err, out)
		}
		ids = append(ids, jobID.FindString(string(out)))
	}
	if ids[0] == "" || ids[0] != ids[1] || ids[0] == ids[2] {
		t.Errorf("the same file became the jobs %v", ids)
	}
}

var pageFence = regexp.MustCompile("(?ms)^```(sh|text)\n(.*?)^```$")

// TestSchedulerPage types docs/scheduler.md, and holds each answer against the OpenAPI document.
func TestSchedulerPage(t *testing.T) {
	n := need(t)
	e, err := stack.OpenEndpoint(n.dir)
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile("../../docs/scheduler.md")
	if err != nil {
		t.Fatal(err)
	}
	dir, typed := t.TempDir(), pages.For(t, "internal/e2e TestSchedulerPage")
	script := "set -euo pipefail\n"
	here := strings.NewReplacer("https://127.0.0.1:7443", e.Agent(), "/var/lib/coffer/pki", filepath.Join(n.dir, "pki"))
	for _, m := range pageFence.FindAllStringSubmatch(string(page), -1) {
		if m[1] == "sh" {
			script += here.Replace(m[2])
			typed.TypedFence("docs/scheduler.md", m[2])
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, "node.curl"), []byte(here.Replace(m[2])), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	job, err := os.ReadFile(n.small(t, "typed", "print('abcdef')", ""))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "job.yaml"), job, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("bash", "-c", script)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "TOKEN="+n.nodeToken(t))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if !strings.Contains(string(out), "\trun\tdone\n") || !strings.Contains(string(out), "\ncdef\n") {
		t.Errorf("the page shows neither stages nor what was printed:\n%s", out)
	}
	for file, message := range map[string]string{
		"capacity.json": "CapacityResponse", "plan.json": "PlanResponse", "submit.json": "SubmitResponse", "get.json": "GetResponse", "list.json": "ListResponse",
		"watch.json": "WatchResponse", "logs.json": "LogsResponse", "cancel.json": "CancelResponse", "bundle-answer.json": "BundleResponse",
	} {
		b, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			t.Fatal(err)
		}
		lines := [][]byte{b}
		if message == "WatchResponse" || message == "LogsResponse" {
			// The last message of a stream is its end: without an error, {}.
			lines = bytes.Split(bytes.TrimSpace(b), []byte("\n"))
			if len(lines) < 2 || string(lines[len(lines)-1]) != "{}" {
				t.Fatalf("%s is no whole stream: %s", file, b)
			}
			lines = lines[:len(lines)-1]
		}
		for _, l := range lines {
			if err := answers(t, message, l); err != nil {
				t.Errorf("%s: %v", file, err)
			}
		}
	}
	if err := answers(t, "Job", []byte(`{"id": 7}`)); err == nil {
		t.Error("the OpenAPI document takes anything for a job")
	}
	room, err := n.agent(t).Capacity(t.Context(), connect.NewRequest(&agentv1.CapacityRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	if at := room.Msg.GetAttested(); at.GetPolicy() != "simulation" || !at.GetSimulated() || at.GetUntilUnix() <= at.GetAtUnix() || at.GetAtUnix() < time.Now().Add(-time.Hour).Unix() {
		t.Errorf("after a job the node is attested by %v", at)
	}
	if code, text := metricsOf(t, e, daemon.RoleOperator); code != http.StatusOK || !strings.Contains(text, `coffer_agent_jobs_ended_total{reason="",state="succeeded"}`) ||
		!strings.Contains(text, `coffer_agent_calls_total{call="Capacity",code="ok"}`) {
		t.Errorf("metrics: %d\n%s", code, text)
	}
	if code, text := metricsOf(t, e, daemon.RoleScheduler); code != http.StatusForbidden {
		t.Errorf("a scheduler reads metrics: %d\n%s", code, text)
	}
}

// metricsOf asks for the agent's metrics.
func metricsOf(t *testing.T, e stack.Endpoint, role string) (int, string) {
	t.Helper()
	h, err := e.HTTPClient(role, daemon.RoleAgent)
	if err != nil {
		t.Fatal(err)
	}
	defer h.CloseIdleConnections()
	res, err := h.Get(e.Agent() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(b)
}

// answers holds JSON against a message of the OpenAPI document.
func answers(t *testing.T, message string, b []byte) error {
	t.Helper()
	f, err := os.Open("../../docs/formats/agent-openapi.json")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	doc, err := jsonschema.UnmarshalJSON(f)
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("agent.json", doc); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile("agent.json#/components/schemas/coffer.agent.v1." + message)
	if err != nil {
		t.Fatal(err)
	}
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
	if err != nil {
		return err
	}
	return s.Validate(v)
}
