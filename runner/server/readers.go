package server

import (
	"context"
	"fmt"
	"slices"

	"connectrpc.com/connect"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/journal"
)

// readable finds a job whose log the caller may read.
func (s *server) readable(ctx context.Context, id string) error {
	row, err := s.agent.Journal.Job(ctx, id)
	if err != nil {
		return err
	}
	c := callerOf(ctx)
	ok, err := mayRead(c, row, func(p plan.Plan) (bool, error) { return s.agent.Owns(ctx, c.Principal, p) })
	if err == nil && !ok {
		err = connect.NewError(connect.CodePermissionDenied, fmt.Errorf("the log of job %s is not for %s: its job file's output.logReaders says for whom", id, c.Principal))
	}
	return err
}

// mayRead reports whether the caller may read a job's log: its submitter may, and
// whom the plan names besides.
func mayRead(c Caller, row journal.Job, owns func(plan.Plan) (bool, error)) (bool, error) {
	works := slices.Contains(c.Roles, roleEngineer) || slices.Contains(c.Roles, roleScheduler)
	if c.Principal == "" {
		return false, nil
	}
	if works && c.Principal == row.Submitter {
		return true, nil
	}
	p, err := plan.Parse(row.Plan)
	if err != nil {
		return false, err
	}
	switch p.Output.LogReaders {
	case plan.ReadersEngineers:
		return slices.Contains(c.Roles, roleEngineer), nil
	case plan.ReadersOwners:
		if slices.Contains(c.Roles, roleOwner) {
			return owns(p)
		}
	}
	return false, nil
}
