package runner

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
)

// Waiting for people.
const (
	// approvalEvery is how often a waiting job looks at its grants.
	approvalEvery = time.Second
	// approvalFor bounds how long a job waits for approvals.
	approvalFor = 7 * 24 * time.Hour
)

// States of grants, as the broker names them.
const (
	grantRequested = "requested"
	grantApproved  = "approved"
	grantActive    = "active"
)

// approval holds a job for whose plan a grant was asked and not yet approved.
// Nothing is attested before. A job that nobody asked a grant for goes on: the
// broker refuses it at the release, with every reason. The look is a hint, like
// the journal: the release decides.
func (a *Agent) approval(ctx context.Context, j *Job) error {
	lacks, err := a.lacks(ctx, j)
	if err != nil || len(lacks) == 0 {
		return err
	}
	_, err = stage(ctx, a, j, bundle.StageApproval, func(ctx context.Context, j *Job) (struct{}, string, error) {
		a.tell(ctx, j, stageEvent(bundle.StageApproval, "waiting", 0, strings.Join(lacks, "; ")))
		began := time.Now()
		for {
			select {
			case <-ctx.Done():
				return struct{}{}, "", context.Cause(ctx)
			case <-time.After(approvalEvery):
			}
			if lacks, err = a.lacks(ctx, j); err != nil {
				return struct{}{}, "", err
			}
			switch {
			case len(lacks) == 0:
				return struct{}{}, "", nil
			case time.Since(began) > approvalFor:
				var l check.List
				l.Fail("grant.approvals", "approvals within "+approvalFor.String(), strings.Join(lacks, "; "), "ask the approvers, then submit again")
				return struct{}{}, "", check.Refuse("approval", l)
			}
		}
	})
	return err
}

// lacks says, for each asset that has no usable grant but one that is on its
// way, what that one waits for. Where a grant was denied, revoked or has expired
// and no other was asked for, there is nothing to wait for.
func (a *Agent) lacks(ctx context.Context, j *Job) ([]string, error) {
	known, err := a.Broker.Grants(ctx, j.digest)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, asset := range j.assets() {
		var best *grantInfo
		for _, g := range known {
			if !slices.Contains(g.GetAssets(), asset) {
				continue
			}
			if g.GetState() == grantActive && a.mayUse(g, j) {
				best = nil
				break
			}
			if s := g.GetState(); s == grantRequested || s == grantApproved {
				best = g
			}
		}
		switch {
		case best == nil:
		case best.GetState() == grantApproved:
			out = append(out, fmt.Sprintf("grant %s begins at %s", best.GetId(), time.Unix(best.GetNotBeforeUnix(), 0).UTC().Format(time.RFC3339)))
		default:
			out = append(out, fmt.Sprintf("grant %s lacks %s", best.GetId(), strings.Join(best.GetMissing(), "; ")))
		}
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// mayUse reports whether a grant's principals have this agent and this submitter,
// as far as they name any. The broker decides; this only picks a grant to ask for.
func (a *Agent) mayUse(g *grantInfo, j *Job) bool {
	agents, submitters, here, mine := false, false, false, false
	for _, p := range g.GetPrincipals() {
		if strings.HasPrefix(p, "agent/") {
			agents, here = true, here || p == "agent/"+a.Name
		} else {
			submitters, mine = true, mine || p == j.submitter
		}
	}
	return (!agents || here) && (!submitters || mine)
}
