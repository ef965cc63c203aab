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
// and no other was asked for, there is nothing to wait for; it is said of such assets
// where the job waits for others.
func (a *Agent) lacks(ctx context.Context, j *Job) ([]string, error) {
	known, err := a.Broker.Grants(ctx, j.digest)
	if err != nil {
		return nil, err
	}
	var out, unasked []string
	for _, asset := range j.assets() {
		var best *grantInfo
		usable := false
		for _, g := range known {
			if !slices.Contains(g.GetAssets(), asset) {
				continue
			}
			if g.GetState() == grantActive && a.mayUse(g, j) {
				best, usable = nil, true
				break
			}
			if s := g.GetState(); s == grantRequested || s == grantApproved {
				best = g
			}
		}
		switch {
		case usable:
		case best == nil:
			unasked = append(unasked, "no grant on asset "+asset+" counts, and none waits")
		case best.GetState() == grantApproved:
			out = append(out, fmt.Sprintf("grant %s begins at %s", best.GetId(), time.Unix(best.GetNotBeforeUnix(), 0).UTC().Format(time.RFC3339)))
		default:
			out = append(out, fmt.Sprintf("grant %s lacks %s", best.GetId(), strings.Join(best.GetMissing(), "; ")))
		}
	}
	if len(out) == 0 {
		return nil, nil
	}
	// They hold no job by themselves: who waits anyway has time to ask.
	out = append(out, unasked...)
	slices.Sort(out)
	return slices.Compact(out), nil
}

// grantsFor picks, for each asset of a job, the id of the grant under which its key is asked
// for: one that this job may use, or, for the broker to say why not, any on the asset. A
// refusal names every asset that has none.
func (a *Agent) grantsFor(j *Job, known []*grantInfo) ([]string, error) {
	var out []string
	var l check.List
	for _, asset := range j.assets() {
		i := slices.IndexFunc(known, func(g *grantInfo) bool {
			return slices.Contains(g.GetAssets(), asset) && g.GetState() == grantActive && a.mayUse(g, j)
		})
		if i < 0 {
			i = slices.IndexFunc(known, func(g *grantInfo) bool { return slices.Contains(g.GetAssets(), asset) })
		}
		if i < 0 {
			l.Fail("grant.missing", "a grant on asset "+asset+" for plan "+string(j.digest), "none",
				fmt.Sprintf("its owner may run: coffer grant create --plan %s --asset %s", j.digest, asset))
			continue
		}
		out = append(out, known[i].GetId())
	}
	if len(l) > 0 {
		return nil, check.Refuse("release", l)
	}
	return out, nil
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
