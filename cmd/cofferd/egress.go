package main

import (
	"errors"
	"net/netip"
	"path/filepath"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/egress"
)

// Egress is the way to the network of jobs whose plans allow it.
type Egress struct {
	// Gateway is the program coffer-gateway.
	Gateway string `json:"gateway"`
	// Uplink is the file of a network namespace that gateways connect from; the
	// agent's own if absent.
	Uplink string `json:"uplink,omitempty"`
	// Resolvers are addresses with ports that answer for names; without any, those in
	// /etc/resolv.conf do.
	Resolvers []netip.AddrPort `json:"resolvers,omitempty"`
}

func (e *Egress) validate() error {
	if e != nil && (!filepath.IsAbs(e.Gateway) || e.Uplink != "" && !filepath.IsAbs(e.Uplink)) {
		return errors.New("configuration: egress: want gateway, and uplink if any, as absolute paths")
	}
	return nil
}

// open returns nothing if the node offers no network.
func (e *Egress) open() (*egress.Config, *plan.EgressProfile, error) {
	if e == nil {
		return nil, nil, nil
	}
	c := &egress.Config{Gateway: e.Gateway, Uplink: e.Uplink, Resolvers: e.Resolvers}
	p, err := c.Profile()
	return c, p, err
}
