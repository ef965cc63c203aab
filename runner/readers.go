package runner

import (
	"context"
	"slices"
	"strings"

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
		if owns(principal, asset.GetOwner()) {
			return true, nil
		}
	}
	return false, nil
}

// owns reports whether a caller is the owner of that name, by a certificate of that role
// or by a token. The broker names owners without either.
func owns(principal, owner string) bool {
	as, name, ok := strings.Cut(principal, "/")
	return ok && (as == "owner" || as == "user") && owner != "" && name == owner
}
