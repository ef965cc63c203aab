package egress

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/coffer-run/coffer/internal/executable"
	"github.com/coffer-run/coffer/plugins/host"
	"github.com/coffer-run/coffer/runner/egress/egresstest"
)

// Whoever writes the node's disk after the agent measured the gateway has another one
// run between a job and the network.
func TestAnotherProgramIsNotStarted(t *testing.T) {
	needRoot(t)
	w := egresstest.New(t)
	b, err := os.ReadFile(program(t))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "coffer-gateway")
	if err := executable.Write(path, b); err != nil {
		t.Fatal(err)
	}
	cfg := Config{Gateway: path, Uplink: w.Uplink, Resolvers: []netip.AddrPort{w.Resolver}}
	p := testPlan(allow("allowed.example.com", 443, 1000))
	open := func() error {
		dir := t.TempDir()
		g, err := cfg.Open(t.Context(), dir, p, func(pid int) error {
			t.Cleanup(func() {
				if p, err := os.FindProcess(pid); err == nil {
					_ = p.Kill()
				}
			})
			return nil
		})
		t.Cleanup(func() {
			if err := Remove(dir); err != nil {
				t.Error(err)
			}
		})
		if g != nil {
			g.Detach()
		}
		return err
	}
	if err := open(); !errors.Is(err, host.ErrChecksum) {
		t.Errorf("a program that nobody measured: %v", err)
	}
	if _, err := cfg.Profile(); err != nil {
		t.Fatal(err)
	}
	if err := open(); err != nil {
		t.Fatalf("the measured program: %v", err)
	}
	// Bytes after the program's own are not read by the kernel: it runs as before.
	if err := executable.Write(path+".new", append(b, 0)); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	if err := open(); !errors.Is(err, host.ErrChecksum) {
		t.Errorf("another program: %v", err)
	}
}
