package main

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// assetsOf are the assets that a job of a plan asks for, once each, in the plan's order:
// its inputs and secrets, its checkpoints, and what it seals anew.
func assetsOf(canonical []byte) ([]string, error) {
	type asset struct {
		Asset string `json:"asset"`
		To    string `json:"to"`
	}
	var p struct {
		Inputs      []asset `json:"inputs"`
		Checkpoints asset   `json:"checkpoints"`
		Reseal      asset   `json:"reseal"`
	}
	if err := json.Unmarshal(canonical, &p); err != nil {
		return nil, fmt.Errorf("read plan: %w", err)
	}
	var out []string
	for _, a := range append(p.Inputs, p.Checkpoints, p.Reseal, asset{Asset: p.Reseal.To}) {
		if a.Asset != "" && !slices.Contains(out, a.Asset) {
			out = append(out, a.Asset)
		}
	}
	return out, nil
}

// approveCommand is what somebody runs to give a grant what it lacks: the owner of its
// assets consents, others approve.
func approveCommand(grant, missing string) string {
	grant = word(grant)
	if strings.HasPrefix(missing, "the consent of ") {
		return "coffer grant approve " + grant + " --consent"
	}
	return "coffer grant approve " + grant + " --reason TEXT"
}
