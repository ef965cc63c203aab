package e2e

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/seal"
)

// A checkpoint becomes weights that another job reads, and nobody saw it between.
func TestExport(t *testing.T) {
	n := need(t)
	n.honest(t)
	l, err := filepath.Glob(filepath.Join(n.sink, n.main.id, "*", "manifest.json"))
	if err != nil || len(l) == 0 {
		t.Fatalf("the job left no checkpoint: %v", err)
	}
	from := filepath.Dir(slices.Max(l))
	out, job := filepath.Join(n.dir, "exported"), filepath.Join(t.TempDir(), "export.yaml")
	n.must(t, "checkpoints", "export", from, "exported", "--to", "file://"+out, "--attestation-policy", "simulation", "--job", job)
	n.grantReseal(t, job, "ckpt", "exported", "1")
	id := n.submit(t, job)
	if s := n.wait(t, id, "ended", ended); s.State != "succeeded" {
		t.Fatalf("%+v", s)
	}
	n.verified(t, id)
	digest := n.asset(t, "exported")
	root, err := os.OpenRoot(out)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if err := seal.Check(t.Context(), root, "exported", plan.Digest(digest)); err != nil {
		t.Error(err)
	}
	b, _ := n.bundleOf(t, id)
	manifest, err := os.ReadFile(filepath.Join(from, "manifest.json"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(b.Parts["plan"], []byte(plan.Sum(manifest))) || !bytes.Contains(b.Parts["reseal"], []byte("ckpt")) && !bytes.Contains(b.Parts["reseal"], []byte("record")) {
		t.Error("the record does not say what was exported")
	}
	// The agent takes no checkpoints' asset without being told which checkpoint.
	raw, err := os.ReadFile(job)
	if err != nil {
		t.Fatal(err)
	}
	text := slices.DeleteFunc(strings.Split(string(raw), "\n"), func(line string) bool { return strings.HasPrefix(line, "  checkpoint: ") })
	if err := os.WriteFile(job, []byte(strings.Replace(strings.Join(text, "\n"), "exported\n", "exported-2\n", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if said, err := n.coffer("plan", job); exitCode(err) == 0 {
		t.Errorf("planned: %s", said)
	}
	uses := n.jobFile(t, "on-the-export", func(s string) string {
		const lists = `["/usr/bin/python3", "-c", "import os; print(sum(len(open(os.path.join(d, f), 'rb').read()) for d, _, l in os.walk('/inputs/model') for f in l), 'bytes')"]`
		return strings.NewReplacer(trains, lists, "asset: model\n", "asset: exported\n", "file://"+n.model+"\n", "file://"+out+"\n").Replace(s)
	})
	n.must(t, "grant", "create", "--plan", n.planDigest(t, uses), "--asset", "data", "--asset", "exported", "--asset", "ckpt", "--allow-simulated")
	id = n.submit(t, uses)
	if s := n.wait(t, id, "ended", ended); s.State != "succeeded" {
		t.Fatalf("%+v", s)
	}
	if log := n.must(t, "logs", id); !strings.HasSuffix(strings.TrimSpace(log), " bytes") || strings.HasPrefix(log, "0 ") {
		t.Errorf("the job read %q", log)
	}
}
