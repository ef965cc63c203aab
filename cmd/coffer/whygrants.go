package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/check"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/api/agent/v1/agentv1connect"
)

// States of a grant, as the broker names them.
const (
	grantRequested = "requested"
	grantApproved  = "approved"
	grantActive    = "active"
)

// planGrants are the grants of a plan.
func (c *cli) planGrants(ctx context.Context, b brokerClient, digest string) ([]*brokerv1.Grant, error) {
	res, err := call(ctx, c, "look up grants of the plan", serverBroker, b.ListGrants, &brokerv1.ListGrantsRequest{PlanDigest: digest})
	if err != nil {
		return nil, err
	}
	return res.GetGrants(), nil
}

// whyApproval says what the grants of a job's plan wait for.
func (c *cli) whyApproval(ctx context.Context, a agentv1connect.AgentServiceClient, j *agentv1.Job, v *whyView) error {
	v.Gate = gateApproval
	b, err := c.broker(ctx)
	if err != nil {
		return err
	}
	grants, err := c.planGrants(ctx, b, j.GetPlanDigest())
	if err != nil {
		return err
	}
	for _, g := range grants {
		if g.GetState() != grantRequested {
			continue
		}
		v.Why = strings.TrimPrefix(v.Why+"; the grant on "+strings.Join(g.GetAssets(), ", ")+" waits for people", "; ")
		for _, m := range g.GetMissing() {
			v.Who = append(v.Who, m)
			if next := approveCommand(g.GetId(), m); !slices.Contains(v.Next, next) {
				v.Next = append(v.Next, next)
			}
		}
	}
	if len(v.Next) > 0 {
		err = c.unasked(ctx, a, b, j, grants, v)
	}
	if v.Why == "" {
		v.Why = "a grant of its plan waits for people" // or did a moment ago
	}
	if want := j.GetExpectedApprovals(); len(want) > 0 {
		v.Who = append(v.Who, "its submitter expects approval by: "+strings.Join(want, ", "))
	}
	return err
}

// lacksGrants reports whether a job was refused because assets had no grant.
func lacksGrants(j *agentv1.Job) bool {
	return slices.ContainsFunc(failedChecks(j), func(k check.Check) bool { return k.ID == "grant.missing" })
}

// whyMissing adds, to why a job has ended, who opens each asset that has no grant, and
// the command for it in the place of a general one. A broker that does not answer, or not
// this caller, takes nothing away from what the job itself says.
func (c *cli) whyMissing(ctx context.Context, a agentv1connect.AgentServiceClient, j *agentv1.Job, v *whyView) error {
	b, err := c.broker(ctx)
	if err != nil {
		return err
	}
	grants, err := c.planGrants(ctx, b, j.GetPlanDigest())
	if err != nil {
		return nil //nolint:nilerr // the checks stand by themselves
	}
	more := whyView{}
	if err := c.unasked(ctx, a, b, j, grants, &more); err != nil {
		return nil //nolint:nilerr // the checks stand by themselves
	}
	if len(more.Next) > 0 {
		// In the place of "the owner of the assets".
		v.Who, v.Next = more.Who, append(more.Next, v.Next...)
		v.Next = slices.DeleteFunc(v.Next, func(s string) bool { return s == "coffer grant request --job FILE" })
	}
	return nil
}

// unasked adds the assets of a job for which no grant counts or waits: their owners, and
// the commands that ask for them, for simulated evidence if that is what the node has.
func (c *cli) unasked(ctx context.Context, a agentv1connect.AgentServiceClient, b brokerClient, j *agentv1.Job, grants []*brokerv1.Grant, v *whyView) error {
	var missing []string
	for _, asset := range j.GetAssets() {
		if grantFor(asset, grants) == "" {
			missing = append(missing, asset)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	// A grant that refuses simulated evidence would be the next refusal.
	flag := ""
	if c.simulated(ctx, a, b) {
		flag = " --allow-simulated"
	}
	by, err := c.byOwner(ctx, b, missing)
	if err != nil {
		return err
	}
	for _, o := range by {
		v.Who = append(v.Who, strings.Join(o.assets, ", ")+": the owner is "+o.owner+"; no grant counts, and none waits")
		v.Next = append(v.Next, o.request(j.GetPlanDigest())+flag)
	}
	return nil
}

// simulated reports whether a node's evidence is: what a verifier said of it last, or, before
// the first, whether the broker takes results of simulations at all.
func (c *cli) simulated(ctx context.Context, a agentv1connect.AgentServiceClient, b brokerClient) bool {
	room, err := a.Capacity(ctx, connectRequest(&agentv1.CapacityRequest{}))
	if err == nil && room.Msg.GetAttested() != nil {
		return room.Msg.GetAttested().GetSimulated()
	}
	info, err := b.Info(ctx, connectRequest(&brokerv1.InfoRequest{}))
	return err == nil && info.Msg.GetSimulation()
}

// owned are assets of one owner.
type owned struct {
	owner  string
	assets []string
}

// byOwner groups assets, since a grant is for those of one owner.
func (c *cli) byOwner(ctx context.Context, b brokerClient, assets []string) (out []owned, err error) {
	for _, a := range assets {
		res, err := call(ctx, c, "look up asset "+a, serverBroker, b.GetAsset, &brokerv1.GetAssetRequest{Name: a})
		if err != nil {
			return nil, err
		}
		owner := res.GetAsset().GetOwner()
		i := slices.IndexFunc(out, func(o owned) bool { return o.owner == owner })
		if i < 0 {
			i, out = len(out), append(out, owned{owner: owner})
		}
		out[i].assets = append(out[i].assets, a)
	}
	return out, nil
}

// request is the command that asks for a grant on the assets.
func (o owned) request(plan string) string {
	command := "coffer grant request --plan " + word(plan)
	for _, a := range o.assets {
		command += " --asset " + word(a)
	}
	return command
}

// previewGrants says, for each asset of a plan, what stands between the plan and
// its key, and how to ask for those that nobody has asked for: one command for each
// owner. It is no part of the plan and may change with every call.
func (c *cli) previewGrants(ctx context.Context, digest string, canonical []byte) (out, requests []string, err error) {
	assets, err := assetsOf(canonical)
	if err != nil || len(assets) == 0 {
		return nil, nil, err
	}
	b, err := c.broker(ctx)
	if err != nil {
		return nil, nil, err
	}
	grants, err := c.planGrants(ctx, b, digest)
	if err != nil {
		return nil, nil, err
	}
	var unasked []string
	for _, a := range assets {
		text := grantFor(a, grants)
		if text == "" {
			text, unasked = "no grant", append(unasked, a)
		}
		out = append(out, a+": "+text)
	}
	by, err := c.byOwner(ctx, b, unasked)
	for _, o := range by {
		requests = append(requests, o.request(digest))
	}
	return out, requests, err
}

// grantFor says how the best grant on an asset stands, and nothing if there is none.
func grantFor(asset string, grants []*brokerv1.Grant) (text string) {
	for _, g := range grants {
		switch {
		case !slices.Contains(g.GetAssets(), asset):
		case g.GetState() == grantActive:
			return "grant " + g.GetId() + " is active"
		case g.GetState() == grantRequested:
			text = fmt.Sprintf("grant %s lacks %s", g.GetId(), strings.Join(g.GetMissing(), "; "))
		case g.GetState() == grantApproved:
			text = fmt.Sprintf("grant %s begins at %s", g.GetId(), clock(g.GetNotBeforeUnix()))
		}
	}
	return text
}
