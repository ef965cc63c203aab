package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestLog holds the main job's bundle against the stack's evidence log.
func TestLog(t *testing.T) {
	n := need(t)
	path := filepath.Join(t.TempDir(), "bundle.json")
	if err := os.WriteFile(path, n.honest(t).bundle, 0o600); err != nil {
		t.Fatal(err)
	}
	keys := func(who, file string) string { return filepath.Join(n.dir, who, file) }
	out, err := exec.Command(filepath.Join(n.bin, "coffer-verify"), "--simulation-roots", filepath.Join(n.dir, "simulation"),
		"--verifier-keys", keys("verifier", "jwks.json"), "--broker-keys", keys("broker", "jwks.json"), "--log-key", keys("broker", "log.vkey"), path).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "pass         log.inclusion") {
		t.Errorf("the log does not prove that it has the record: %v\n%s", err, out)
	}
	kept := filepath.Join(t.TempDir(), "checkpoint")
	for range 2 {
		out := n.must(t, "log", "verify", "--bundle", path, "--checkpoint", kept)
		if !strings.Contains(out, "entries of the bundles") || !strings.Contains(out, "not witnessed") {
			t.Errorf("the log does not hold:\n%s", out)
		}
	}
}
