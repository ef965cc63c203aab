package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/internal/emulate"
	"github.com/coffer-run/coffer/internal/stack"
)

// attests submits a job that sleeps and attests by a rule, and returns its id.
func (n *node) attests(t *testing.T, name, gpus, seconds, rule string) string {
	t.Helper()
	job := n.jobFile(t, name, func(s string) string {
		return strings.NewReplacer(trains, `[/usr/bin/python3, -c, "import time; time.sleep(`+seconds+`)"]`, "gpus: 1\n", "gpus: "+gpus+"\n").Replace(s) + "reattest: " + rule + "\n"
	})
	n.grant(t, n.planDigest(t, job), 1)
	return n.submit(t, job)
}

// reattested verifies a job's bundle and returns what it says of the job's later
// attestations.
func (n *node) reattested(t *testing.T, id string) (out []string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "bundle.json")
	n.must(t, "evidence", "get", id, "-o", path)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	said, err := n.verify(t, b, true)
	if err != nil {
		t.Errorf("the bundle does not verify: %v\n%s", err, said)
	}
	parsed, err := bundle.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	l, err := bundle.Decode[bundle.Reattestations](parsed.Parts[bundle.ReattestPart])
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range l.List {
		if a.Verdict != bundle.ReattestNone && (a.Result == "" || len(a.Evidence) == 0 || !a.Shown) {
			t.Errorf("number %d lacks something: shown: %t, evidence of %d bytes", a.Number, a.Shown, len(a.Evidence))
		}
		said := a.Verdict + " " + a.Then
		if a.Cause != "timer" {
			said = a.Cause + " " + said
		}
		out = append(out, said)
		if a.Message != "" {
			t.Logf("number %d: %s", a.Number, a.Message)
		}
		if strings.Contains(a.Verdict, bundle.ReattestRefused) && !slices.Contains(a.Failed, "snp.vcek-tcb") {
			t.Errorf("refused for %v", a.Failed)
		}
	}
	t.Logf("%v, bundle of %d bytes, with %d of later attestations", out, len(b), len(parsed.Parts[bundle.ReattestPart]))
	return out
}

// TestReattest runs three jobs. One attests because its GPU had a critical error, and has
// ended when the chip's firmware is rolled back; of the others, which attest every two
// seconds, one is stopped for that, and one is paused until the chip is itself again.
func TestReattest(t *testing.T) {
	n := need(t)
	ep, err := stack.OpenEndpoint(n.dir)
	if err != nil {
		t.Fatal(err)
	}
	roll := func(back bool) {
		t.Helper()
		if _, err := emulate.Dial(ep.Emulator()).Do(t.Context(), emulate.Request{Op: emulate.OpRollback, Rollback: back}); err != nil {
			t.Fatal(err)
		}
	}
	short := n.attests(t, "attests-at-an-error", "1", "8", "{every: 1m}")
	stops := n.attests(t, "attests-and-stops", "0", "600", "{every: 2s}")
	pauses := n.attests(t, "attests-and-pauses", "0", "14", "{every: 2s, within: 5m, onFailure: pause}")
	n.wait(t, short, "running", running)
	gpus, err := emulate.Dial(ep.Emulator()).Do(t.Context(), emulate.Request{Op: emulate.OpGPUs})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := emulate.Dial(ep.Emulator()).Do(t.Context(), emulate.Request{Op: emulate.OpXID, UUID: gpus.GPUs.Devices[0].UUID, XID: 79}); err != nil {
		t.Fatal(err)
	}
	if s := n.wait(t, short, "done", ended); s.State != "succeeded" {
		t.Fatalf("%+v", s)
	}
	defer roll(false)
	roll(true)
	n.wait(t, pauses, "paused", func(s status) bool { return s.Paused || ended(s) })
	n.wait(t, stops, "stopping", func(s status) bool { return s.Stopping != "" || ended(s) })
	// The evidence of a job that ends takes longer than a pause may.
	roll(false)
	if s := n.wait(t, stops, "stopped", ended); s.State != "failed" || s.Reason != bundle.ReasonReattestRefused {
		t.Errorf("%+v", s)
	}
	if s := n.wait(t, pauses, "done", ended); s.State != "succeeded" {
		t.Errorf("%+v", s)
	}
	if got := n.reattested(t, short); len(got) != 1 || !strings.HasPrefix(got[0], "gpu: critical error (XID) 79 of ") || !strings.HasSuffix(got[0], " affirmed goes-on") {
		t.Errorf("%v", got)
	}
	if got := n.reattested(t, stops); len(got) < 2 || got[len(got)-1] != "refused stopped" {
		t.Errorf("%v", got)
	}
	got := n.reattested(t, pauses)
	if i := slices.Index(got, "refused paused"); i < 1 || !slices.Contains(got[i:], "affirmed resumed") {
		t.Errorf("%v", got)
	}
	if out, s := n.stopOf(t, stops); out.Stop == nil || out.Stop.GoneUnixNano == 0 || out.Stop.ScrubbedUnixNano == 0 || time.Duration(out.Stop.GoneUnixNano-out.Stop.ToldUnixNano) > reaction {
		t.Errorf("%+v\n%s", out.Stop, s)
	}
}
