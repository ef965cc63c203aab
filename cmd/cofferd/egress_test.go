package main

import (
	"path/filepath"
	"testing"
)

func TestDocumentedEgress(t *testing.T) {
	c := documented(t, "egress")
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
