package e2e

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/bundle"
)

// randomText is a value that exists nowhere else.
func randomText() string {
	b := make([]byte, 48)
	_, _ = rand.Read(b)
	return hex.EncodeToString(b)
}

const secretive = `
import hashlib, json, os, sys, time
path = "/run/secrets/token"
secret = open(path).read()
digest = lambda s: hashlib.sha256(s.encode()).hexdigest()
print("env", digest(os.environ["PASSWORD"]), "secret", digest(secret), "mode", oct(os.stat(path).st_mode & 0o7777))
for step in range(30):
    print(json.dumps({"step": step, "loss": 3.0 - step / 10, "other": 1}))
print("ready", flush=True)
time.sleep(2)
sys.exit(75)
`

// A variable's value and a secret are with the job, in memory, and nowhere else, the plan's
// metrics are in its record, and of the exit code whether it is 0.
func TestValuesStayWithTheJob(t *testing.T) {
	n := need(t)
	variable, secret := randomText(), randomText()
	dir, err := os.MkdirTemp("/dev/shm", "coffer-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	clear, sealed := filepath.Join(dir, "clear"), filepath.Join(t.TempDir(), "sealed")
	if err := os.WriteFile(clear, []byte(secret), 0o600); err != nil {
		t.Fatal(err)
	}
	n.must(t, "seal", clear, "--asset", "e2e-token", "--kind", "secret", "--out", sealed)
	job := n.small(t, "secretive", secretive, fmt.Sprintf(`env: {PASSWORD: %q}
secrets: [{name: token, asset: e2e-token, uri: "file://%s"}]
output: {exitCodes: pass-fail, metrics: {names: [loss, step], maxValues: 50, valuesPerSecond: 50}}
`, variable, sealed))
	out := n.must(t, "grant", "create", "--plan", n.planDigest(t, job), "--asset", "e2e-token", "--allow-simulated", "--releases", "1")
	if !strings.Contains(out, "grant-") {
		t.Fatal(out)
	}

	run := filepath.Dir(n.layout.Jobs())
	variableAt, secretAt := indexOf(map[string][]byte{"variable": []byte(variable)}), indexOf(map[string][]byte{"secret": []byte(secret)})
	everywhere := []string{n.dir, run}
	// Layers of images are as they were; the holder's mounts are where secrets belong.
	skip := func(path string) bool {
		return strings.Contains(path, "io.containerd.snapshotter") || strings.Contains(path, "io.containerd.content") || filepath.Base(path) == "rootfs" ||
			strings.HasPrefix(path, n.layout.Jobs()) && (filepath.Base(path) == "inputs" || filepath.Base(path) == "checkpoints")
	}
	// The runtime has variables in the specification that it starts from, in memory.
	outside := func(hits []string) (out []string) {
		for _, h := range hits {
			if !strings.Contains(h, n.layout.Jobs()) || !strings.Contains(h, "/runtime/") {
				out = append(out, h)
			}
		}
		return out
	}
	id := n.submit(t, job)
	n.wait(t, id, "running", running)
	hits := n.scan(t, everywhere, variableAt, skip)
	if len(hits) == 0 {
		t.Error("the scan does not find the variable where the runtime has it, so it proves nothing")
	}
	if hits := n.scan(t, everywhere, secretAt, skip); len(hits) > 0 {
		t.Errorf("while the job runs, the secret lies in %v", hits)
	}
	if hits := outside(hits); len(hits) > 0 {
		t.Errorf("while the job runs, the variable lies in %v", hits)
	}
	if s := n.wait(t, id, "ended", ended); s.Reason != "exit-code" {
		t.Fatalf("the job is %+v", s)
	}
	printed := n.log(t, id, 0, false)
	sum := func(s string) string { b := sha256.Sum256([]byte(s)); return hex.EncodeToString(b[:]) }
	if want := "env " + sum(variable) + " secret " + sum(secret) + " mode 0o400\n"; !strings.HasPrefix(printed, want) {
		t.Errorf("the job has %q, want %q", printed[:min(len(printed), 200)], want)
	}
	if hits := append(n.scan(t, everywhere, secretAt, skip), n.scan(t, everywhere, variableAt, skip)...); len(hits) > 0 {
		t.Errorf("after the job, there is %v", hits)
	}

	b, file := n.bundleOf(t, id)
	for what, value := range map[string]string{"variable": variable, "secret": secret} {
		for part, body := range b.Parts {
			if strings.Contains(string(body), value) {
				t.Errorf("part %s of the record has the %s", part, what)
			}
		}
	}
	// Of a job that failed, watch ends with 1.
	events, _ := n.coffer("watch", id, "--output", "json")
	for command, shows := range map[string]string{"watch": events, "status": n.must(t, "status", id, "--output", "json"), "plan": n.must(t, "plan", job)} {
		if !strings.Contains(shows, "secretive") || strings.Contains(shows, variable) || strings.Contains(shows, secret) {
			t.Errorf("coffer %s shows %s", command, shows)
		}
	}
	var statement bundle.Statement
	if err := json.Unmarshal(b.Statement, &statement); err != nil {
		t.Fatal(err)
	}
	if statement.Outcome.ExitCode != 1 || n.job(t, id).GetExitCode() != 1 {
		t.Errorf("the exit code in the record is %d, at the agent %d", statement.Outcome.ExitCode, n.job(t, id).GetExitCode())
	}
	status, err := bundle.Decode[bundle.Status](b.Parts[bundle.HolderStatus])
	if err != nil {
		t.Fatal(err)
	}
	// 60 values came at once; 50 may leave.
	if m := status.Metrics; m == nil || m.Cut != 10 || len(m.Values) != 2 || m.Values[0].Name != "loss" || m.Values[0].Max != 3 || m.Values[0].Count+m.Values[1].Count != 50 || m.Values[1].Last != 24 {
		t.Errorf("the record has the metrics %+v", status.Metrics)
	}
	if got := n.must(t, "status", id); !strings.Contains(got, "step 24, least 0, most 24, of 25") || !strings.Contains(got, "10 values beyond what the plan allows") || !strings.Contains(events, `"kind":"metrics"`) {
		t.Errorf("the numbers are not shown:\n%s", got)
	}
	// A job that failed has a record that holds.
	if out, err := n.verify(t, file, true); err != nil || !strings.Contains(out, "metrics.budget") || !strings.Contains(out, "outcome.exit-code") {
		t.Errorf("the record does not verify: %v\n%s", err, out)
	}
}

const printing = `
import base64, json, struct, sys
weights = open("/inputs/model/model.safetensors", "rb").read()
sys.stdout.write(base64.b64encode(weights).decode() + "\n")
for i in range(0, 800, 8):
    print(json.dumps({"w": struct.unpack("<d", weights[i:i+6] + b"\xf0\x3f")[0]}))
sys.exit(weights[0] or 2)
`

// A job that means to give away its weights does so within the bounds that people
// approved, and not beyond: the row of the attacks.
func TestJobPrintsItsWeights(t *testing.T) {
	n := need(t)
	job := n.small(t, "printing", printing, "output: {logBytes: 65536, logBytesPerSecond: 65536, exitCodes: pass-fail, metrics: {names: [w], maxValues: 50, valuesPerSecond: 50}}\n")
	b, err := os.ReadFile(job)
	if err != nil {
		t.Fatal(err)
	}
	with := strings.Replace(string(b), "inputs: []\n", fmt.Sprintf("inputs: [{name: model, asset: model, uri: %q, mount: /inputs/model}]\n", "file://"+n.model), 1)
	if err := os.WriteFile(job, []byte(with), 0o600); err != nil {
		t.Fatal(err)
	}
	n.must(t, "grant", "create", "--plan", n.planDigest(t, job), "--asset", "model", "--allow-simulated", "--releases", "1")
	id := n.submit(t, job)
	n.wait(t, id, "ended", ended)
	out, encoded := n.log(t, id, 0, false), base64.StdEncoding.EncodeToString(n.weights)
	record, _ := n.bundleOf(t, id)
	status, err := bundle.Decode[bundle.Status](record.Parts[bundle.HolderStatus])
	if err != nil {
		t.Fatal(err)
	}
	printed := int64(len(encoded)) + 1
	if size := fmt.Sprintf("%d,%03d bytes", len(n.weights)/1000, len(n.weights)%1000); !strings.Contains(insideRows[0][0], size) {
		t.Errorf("the row of the attacks is not about %s", size)
	}
	if out != encoded[:min(len(out), len(encoded))] || len(out) != 65536 || status.LogBytes != 65536 || status.LogBytes+status.LogCut < printed {
		t.Errorf("of %d bytes of weights the log has %d, %d kept and %d cut", len(n.weights), len(out), status.LogBytes, status.LogCut)
	}
	if m := status.Metrics; m == nil || len(m.Values) != 1 || m.Values[0].Count != 50 || m.Cut != 50 {
		t.Errorf("as numbers: %+v", status.Metrics)
	}
	if code := n.job(t, id).GetExitCode(); code != 1 {
		t.Errorf("by the exit code: %d", code)
	}
	a, _ := n.alertsOf(t, id)
	if got := rulesOf(a); !slices.Contains(got, "output-cut") || !slices.Contains(got, "metrics-cut") {
		t.Errorf("people are alerted of %v", got)
	}
	t.Logf("of %d bytes of weights %d got out by the log, %d by metrics, and 1 bit by the exit code", len(n.weights), status.LogBytes, 8*status.Metrics.Values[0].Count)
}
