package main

import (
	"errors"
	"strings"
	"testing"

	"connectrpc.com/connect"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/api/refusal"
	"github.com/coffer-run/coffer/attest/check"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
)

// Where several assets have no grant, each is named, with who can open it and the command
// for it: a grant is for the assets of one owner.
func TestEveryMissingGrant(t *testing.T) {
	s := newFakeStack(t)
	held := &brokerv1.Grant{Id: "g-1", State: "requested", Assets: []string{"held"}, Missing: []string{"2 of security"}}
	list := func(g ...*brokerv1.Grant) func(*brokerv1.ListGrantsRequest) (*connect.Response[brokerv1.ListGrantsResponse], error) {
		return func(*brokerv1.ListGrantsRequest) (*connect.Response[brokerv1.ListGrantsResponse], error) {
			return connect.NewResponse(&brokerv1.ListGrantsResponse{Grants: g}), nil
		}
	}
	of := func(owner, assets string) string {
		return assets + ": the owner is " + owner + "; no grant counts, and none waits"
	}
	ask := func(digest, assets string) string {
		return "coffer grant request --plan " + digest + " --asset " + assets
	}
	s.agent.jobs["job-1"] = &agentv1.Job{Id: "job-1", State: "queued", Stage: "approval", PlanDigest: "sha384:p", Assets: []string{"data", "model", "held", "ckpt"}}
	s.broker.grants = list(held, &brokerv1.Grant{Id: "g-0", State: "denied", Assets: []string{"data"}})
	s.coffer(t.Context(), "why", "job-1").want(t, exitRefused, "gate   approval", "the grant on held waits for people", "2 of security", "coffer grant approve g-1 --reason TEXT",
		of("user/dora", "data, ckpt"), ask("sha384:p", "data --asset ckpt"), of("user/olga", "model"), ask("sha384:p", "model"))

	refused := &agentv1.Job{Id: "job-1", State: stateRefused, Reason: "release-refused", PlanDigest: "sha384:p", Assets: []string{"data", "model"},
		Checks: []*agentv1.Check{{Id: "grant.missing", Outcome: "fail", Expected: "a grant on asset data"}, {Id: "grant.missing", Outcome: "fail", Expected: "a grant on asset model"}}}
	s.agent.jobs["job-1"] = refused
	s.coffer(t.Context(), "why", "job-1").want(t, exitRefused, ask("sha384:p", "data")+" --allow-simulated") // of the broker
	s.agent.attested = &agentv1.Attested{}
	r := s.coffer(t.Context(), "why", "job-1")
	r.want(t, exitRefused, "gate   release-refused", "asset data", "asset model", of("user/dora", "data"), of("user/olga", "model"), ask("sha384:p", "data"), ask("sha384:p", "model"))
	if strings.Contains(r.stdout, "--job FILE") {
		t.Errorf("a general command beside the particular ones:\n%s", r.stdout)
	}
	if strings.Contains(r.stdout, "simulated") || strings.Contains(r.stdout, "the owner of the assets") {
		t.Errorf("nothing is simulated, and the owners have names:\n%s", r.stdout)
	}
	s.agent.attested = &agentv1.Attested{Simulated: true}
	s.coffer(t.Context(), "why", "job-1").want(t, exitRefused, ask("sha384:p", "data")+" --allow-simulated", ask("sha384:p", "model")+" --allow-simulated")
	// What cannot be found out takes nothing away.
	s.broker.grants = func(*brokerv1.ListGrantsRequest) (*connect.Response[brokerv1.ListGrantsResponse], error) {
		return nil, connect.NewError(connect.CodeUnavailable, errors.New("away"))
	}
	s.coffer(t.Context(), "why", "job-1").want(t, exitRefused, "gate   release-refused", "asset data", "--job FILE")
	s.broker.grants, refused.Assets = list(), []string{"gone"}
	s.coffer(t.Context(), "why", "job-1").want(t, exitRefused, "gate   release-refused", "asset data", "--job FILE")

	// A plan says the same before anything is submitted.
	s.broker.grants = list(held)
	file := jobFile(t, smallJob+"inputs: [{name: data, asset: data, uri: file:///d, mount: /d}]\n")
	for _, r := range []result{s.coffer(t.Context(), "plan", file), s.coffer(t.Context(), "plan", file, "-o", "json")} {
		r.want(t, 0, "held: grant g-1 lacks 2 of security", "--asset data --asset ckpt", "--asset model", "no grant")
		if strings.Contains(r.stdout+r.stderr, "--asset ckpt --asset model") || strings.Contains(r.stdout+r.stderr, "--asset data --asset model") {
			t.Errorf("one command for two owners:\n%s%s", r.stdout, r.stderr)
		}
	}
}

// Who may not list everybody's grants gets their own.
func TestOwnGrants(t *testing.T) {
	s := newFakeStack(t)
	var asked []bool
	everybody := false
	s.broker.grants = func(r *brokerv1.ListGrantsRequest) (*connect.Response[brokerv1.ListGrantsResponse], error) {
		asked = append(asked, r.GetMine())
		if !everybody && !r.GetMine() && r.GetPlanDigest() == "" {
			var l check.List
			l.Fail("access.denied", "a policy", "none", "")
			return nil, refusal.Encode(check.Refuse("authorize", l))
		}
		g := &brokerv1.ListGrantsResponse{Grants: []*brokerv1.Grant{{Id: "g-" + orDash(r.GetPageToken()), State: "active"}}}
		if r.GetPageToken() == "" {
			g.NextPageToken = "2"
		}
		return connect.NewResponse(g), nil
	}
	const note = "the grants that you asked for"
	s.coffer(t.Context(), "grants", "ls").want(t, 0, note, "g--", "g-2")
	if len(asked) != 3 || asked[0] || !asked[1] || !asked[2] {
		t.Errorf("asked for their own: %v", asked)
	}
	everybody = true
	for _, args := range [][]string{{}, {"--mine"}, {"--plan", "sha384:" + strings.Repeat("ab", 48)}} {
		r := s.coffer(t.Context(), append([]string{"grants", "ls"}, args...)...)
		r.want(t, 0, "g-2")
		if strings.Contains(r.stderr, note) {
			t.Errorf("%v: %s", args, r.stderr)
		}
	}
	// Who may list neither is told so.
	s.broker.grants = func(*brokerv1.ListGrantsRequest) (*connect.Response[brokerv1.ListGrantsResponse], error) {
		var l check.List
		l.Fail("access.denied", "a policy", "none", "")
		return nil, refusal.Encode(check.Refuse("authorize", l))
	}
	s.coffer(t.Context(), "grants", "ls").want(t, exitRefused, "access.denied")
}

// What the node lacks is said before the job fails for it.
func TestLacks(t *testing.T) {
	s := newFakeStack(t)
	s.agent.jobs["job-1"] = &agentv1.Job{Id: "job-1", Name: "demo", State: "queued"}
	s.agent.lacks = []string{"input data: no folder\x1b[2J"}
	file := jobFile(t, smallJob)
	s.coffer(t.Context(), "plan", file).want(t, 0, "lacks    input data: no folder\\u001b[2J")
	s.coffer(t.Context(), "plan", file, "-o", "json").want(t, 0, `"lacks": [`)
	s.coffer(t.Context(), "submit", file).want(t, 0, "the node lacks what the job needs to begin: input data: no folder\\u001b[2J", "job-1")
	s.agent.lacks = nil
	if r := s.coffer(t.Context(), "submit", file); strings.Contains(r.stderr, "lacks") {
		t.Errorf("lacks nothing: %s", r.stderr)
	}
}

// Who may not grant is told how to ask.
func TestGrantOfAnother(t *testing.T) {
	s := newFakeStack(t)
	var l check.List
	l.Fail("access.denied", "a policy", "none", "")
	var refused *connect.Error
	if !errors.As(refusal.Encode(check.Refuse("authorize", l)), &refused) {
		t.Fatal("a refusal is no answer")
	}
	s.answer.Store(refused)
	s.coffer(t.Context(), "grant", "create", "--plan", "sha384:"+strings.Repeat("ab", 48), "--asset", "a").want(t, exitRefused, "access.denied", "coffer grant request")
}
