package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/internal/emulate"
	"github.com/coffer-run/coffer/internal/stack"
)

// withPolicies gives the stack's verifier a folder of policies until the test ends.
func (n *node) withPolicies(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	n.withConfig(t, "coffer-verifier", func(config map[string]any) { config["policiesDir"] = dir })
	return dir
}

// TestPolicyChangesAtTheVerifier has the verifier take a further policy while a job runs
// that would attest again only after ten minutes. It attests at once, and since its
// machine is not what it was, it is stopped.
func TestPolicyChangesAtTheVerifier(t *testing.T) {
	n := need(t)
	dir := n.withPolicies(t)
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
	id := n.attests(t, "attests-at-a-policy", "0", "600", "{every: 10m}")
	if s := n.wait(t, id, "running", running); s.State != "running" {
		t.Fatalf("%+v", s)
	}
	// The agent has looked once, and the machine's fall alone is no event.
	defer roll(false)
	roll(true)
	p, err := policy.Named("production")
	if err != nil {
		t.Fatal(err)
	}
	p.Name = "production-2"
	b, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(6 * time.Second)
	if s := n.status(t, id); s.State != "running" {
		t.Fatalf("before the policy came: %+v", s)
	}
	if err := os.WriteFile(filepath.Join(dir, "production-2.json"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(n.pid(t, "coffer-verifier"), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	s := n.wait(t, id, "stopped", ended)
	roll(false)
	if s.State != "failed" || s.Reason != bundle.ReasonReattestRefused {
		t.Errorf("%+v", s)
	}
	if got := n.reattested(t, id); len(got) != 1 || !strings.HasPrefix(got[0], "policy: ") || !strings.HasSuffix(got[0], " refused stopped") {
		t.Errorf("%v", got)
	}
}
