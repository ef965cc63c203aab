package runner

import (
	"context"
	"slices"

	"github.com/coffer-run/coffer/attest/plan"
)

// Owns reports whether who calls owns one of the assets that a plan names.
func (a *Agent) Owns(ctx context.Context, principal string, p plan.Plan) (bool, error) {
	var names []string
	for _, in := range p.Inputs {
		names = append(names, in.Asset)
	}
	if p.Checkpoints != nil {
		names = append(names, p.Checkpoints.Asset)
	}
	slices.Sort(names)
	for _, n := range slices.Compact(names) {
		asset, err := a.Broker.Asset(ctx, n)
		if err != nil {
			return false, err
		}
		if principal != "" && asset.GetOwner() == principal {
			return true, nil
		}
	}
	return false, nil
}
