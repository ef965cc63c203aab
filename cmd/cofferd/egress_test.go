package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/coffer-run/coffer/internal/daemon"
)

func TestDocumentedEgress(t *testing.T) {
	b, err := os.ReadFile("../../docs/egress.md")
	if err != nil {
		t.Fatal(err)
	}
	m := fence.FindSubmatch(b)
	if m == nil {
		t.Fatal("docs/egress.md has no configuration")
	}
	path := filepath.Join(t.TempDir(), "cofferd.json")
	if err := os.WriteFile(path, m[1], 0o600); err != nil {
		t.Fatal(err)
	}
	var c Config
	if err := daemon.ReadConfig(path, &c); err != nil {
		t.Fatal(err)
	}
	if err := c.Egress.validate(); err != nil || len(c.Egress.Resolvers) != 1 {
		t.Errorf("%+v: %v", c.Egress, err)
	}
	// A gateway that is not there keeps the agent from starting.
	c.Egress.Gateway = filepath.Join(t.TempDir(), "none")
	if _, _, err := c.Egress.open(); err == nil {
		t.Error("a node without the program offers a network")
	}
	for name, e := range map[string]*Egress{"no gateway": {}, "a relative one": {Gateway: "coffer-gateway"}, "a relative uplink": {Gateway: "/x", Uplink: "netns"}} {
		if e.validate() == nil {
			t.Errorf("%s is taken", name)
		}
	}
	var none *Egress
	if cfg, p, err := none.open(); cfg != nil || p != nil || err != nil {
		t.Errorf("without a configuration: %v, %v, %v", cfg, p, err)
	}
}
