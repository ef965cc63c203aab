package e2e

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/bundle"
)

// TestEvidenceVerbs reads the record of the honest job with every verb there is.
func TestEvidenceVerbs(t *testing.T) {
	n := need(t)
	parsed, err := bundle.Parse(n.honest(t).bundle)
	if err != nil {
		t.Fatal(err)
	}
	st, err := bundle.ParseStatement(parsed.Statement)
	if err != nil {
		t.Fatal(err)
	}
	id := st.JobID
	if out := n.must(t, "evidence", "verify", id); !strings.Contains(out, "VERIFIED") || !strings.Contains(out, "trusting the keys and roots of the stack in "+n.dir) {
		t.Errorf("verify says\n%s", out)
	}
	if out := n.must(t, "evidence", "show", id); !strings.Contains(out, "succeeded") || !strings.Contains(out, "checkpoint 1") {
		t.Errorf("show says\n%s", out)
	}
	if out := n.must(t, "evidence", "diff", id, id); !strings.Contains(out, "no difference") {
		t.Errorf("diff says\n%s", out)
	}
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	n.must(t, "evidence", "report", id, "-o", path("report.html"))
	for name, want := range map[string]string{"vsa": `"PASSED"`, "slsa": "builder/simulated", "training": `"checked"`, "cyclonedx": "coffer:checked:plan"} {
		n.must(t, "evidence", "export", id, "--format", name, "-o", path(name))
		if b, err := os.ReadFile(path(name)); err != nil || !bytes.Contains(b, []byte(want)) {
			t.Errorf("%s does not say %s, %v", name, want, err)
		}
	}
	b, err := os.ReadFile(path("report.html"))
	if err != nil || !bytes.Contains(b, []byte("Verdict: verified")) || !bytes.Contains(b, []byte("Simulated.")) {
		t.Errorf("the page does not say that the record is true and simulated, %v", err)
	}
}
