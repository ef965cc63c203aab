package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/internal/docs/pages"
	"github.com/coffer-run/coffer/runner/egress/egresstest"
)

// withUplink has the node's jobs connect from a world of the test's own.
func (n *node) withUplink(t *testing.T) *egresstest.World {
	t.Helper()
	w := egresstest.New(t)
	n.withConfig(t, "cofferd", func(config map[string]any) {
		e := config["egress"].(map[string]any)
		e["uplink"], e["resolvers"] = w.Uplink, []string{w.Resolver.String()}
	})
	return w
}

// egressJob writes the example's job file, changed as pairs of strings say.
func egressJob(t *testing.T, w *egresstest.World, pairs ...string) string {
	t.Helper()
	b, err := os.ReadFile("../../examples/egress-limited/job.yaml")
	if err != nil {
		t.Fatal(err)
	}
	pairs = append(pairs, "inputs: []\n", "env:\n  METRICS_CA: "+strconv.Quote(string(w.CA))+"\ninputs: []\n")
	s := strings.NewReplacer(pairs...).Replace(string(b))
	path := filepath.Join(t.TempDir(), "job.yaml")
	if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func (n *node) egressOf(t *testing.T, id string) (e bundle.Egress, file []byte) {
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
	if e, err = bundle.Decode[bundle.Egress](b.Parts[bundle.EgressPart]); err != nil {
		t.Fatal(err)
	}
	return e, file
}

func TestEgressLimitedJob(t *testing.T) {
	n := need(t)
	w := n.withUplink(t)
	out := n.must(t, "submit", egressJob(t, w), "--watch")
	id := jobID.FindString(out)
	for _, want := range []string{"step 2 loss", "sent: 200", "Tunnel connection failed: 403 Egress refused by coffer: not-listed"} {
		if !strings.Contains(out, want) {
			t.Errorf("the job did not say %q:\n%s", want, out)
		}
	}
	if got := w.Reached(); !slices.Equal(got, []string{"tcp 44.1.0.2:443", "tcp 44.1.0.2:443", "tcp 44.1.0.2:443"}) {
		t.Errorf("the world was reached at %v", got)
	}
	if got := w.Asked(); slices.Contains(got, "downloads.example.com") || len(w.Strange()) > 0 {
		t.Errorf("the world was asked for %v and saw packets from %v", got, w.Strange())
	}
	page := pages.For(t, "internal/e2e TestEgressLimitedJob")
	sh := n.shell(t, page)
	sh.Vars["JOB"] = id
	typed := page.Commands("docs/egress.md", "")
	report := sh.Must(typed[0], 0, "")
	t.Log(report)
	for _, want := range []string{"metrics.example.com:443", "downloads.example.com:443", "not-listed", "python3"} {
		if !strings.Contains(report, want) {
			t.Errorf("the report has no %s", want)
		}
	}
	proposed := sh.Must(typed[1], 0, "")
	t.Log(proposed)
	if !strings.Contains(proposed, "  - host: downloads.example.com\n    port: 443\n    maxBytes: 65536\n") {
		t.Errorf("the proposal lacks the name that was refused")
	}
	// What is proposed is a job file, and another plan.
	i := strings.Index(proposed, "egress:\n")
	other := egressJob(t, w, "egress:\n  - host: metrics.example.com\n    port: 443\n    maxBytes: 16Ki\n    bytesPerSecond: 64Ki\n", proposed[i:])
	if n.planDigest(t, other) == n.planDigest(t, egressJob(t, w)) {
		t.Error("the proposal makes the same plan")
	}
	e, file := n.egressOf(t, id)
	if len(e.Connections) != 3 || len(e.Denials) != 1 || e.Denials[0].Process != "python3" {
		t.Errorf("%+v", e)
	}
	verdict, err := n.verify(t, file, true)
	if err != nil || !strings.Contains(verdict, "VERIFIED") {
		t.Errorf("the bundle does not verify: %v\n%s", err, verdict)
	}
}

// The agent is killed, and the job's connections go on; the gateway is killed, and
// there are none any more.
func TestEgressOutlivesTheAgentAndNotTheGateway(t *testing.T) {
	n := need(t)
	w := n.withUplink(t)
	id := n.submit(t, egressJob(t, w,
		"for step in range(3):", "import time\n    for step in range(200):",
		`print("step", step, "loss", round(loss, 3), "sent:", post("https://metrics.example.com/loss", {"step": step, "loss": loss}))`,
		`time.sleep(0.1)
        try:
            post("https://metrics.example.com/loss", {"step": step})
        except OSError as e:
            print("ended:", e)
            break`,
		"maxBytes: 16Ki", "maxBytes: 16Mi"))
	reached := func(more int) {
		t.Helper()
		base := len(w.Reached())
		n.wait(t, id, "connecting", func(s status) bool { return len(w.Reached()) >= base+more || ended(s) })
		if len(w.Reached()) < base+more {
			t.Fatalf("no connections: %+v\n%s", n.status(t, id), n.must(t, "logs", id))
		}
	}
	reached(2)
	kill(t, n.pid(t, "cofferd"))
	n.must(t, "restart")
	reached(2)
	pids, err := os.ReadFile(gatewayProcs(t, n, id))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.Fields(string(pids))[0])
	if err != nil {
		t.Fatal(err)
	}
	kill(t, pid)
	n.wait(t, id, "ended", ended)
	if out := n.must(t, "logs", id); !strings.Contains(out, "ended: ") {
		t.Errorf("the job's connections did not end:\n%s", out)
	}
	e, file := n.egressOf(t, id)
	if !e.Lost || e.Closed != "gateway-lost" || len(e.Connections) < 4 {
		t.Errorf("lost %t, closed %q, %d connections", e.Lost, e.Closed, len(e.Connections))
	}
	verdict, err := n.verify(t, file, true)
	if err == nil || !strings.Contains(verdict, "its gateway died") {
		t.Errorf("a record with a gap verifies: %v\n%s", err, verdict)
	}
}

// gatewayProcs is the list of a gateway's processes.
func gatewayProcs(t *testing.T, n *node, id string) string {
	t.Helper()
	for _, pattern := range []string{"/sys/fs/cgroup/pids%s/%s-gateway/cgroup.procs", "/sys/fs/cgroup%s/%s-gateway/cgroup.procs"} {
		if path := fmt.Sprintf(pattern, n.layout.Cgroup(), strings.ToLower(id)); fileThere(path) {
			return path
		}
	}
	t.Fatal("the job's gateway has no control group")
	return ""
}

func fileThere(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
