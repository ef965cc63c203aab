package main

import (
	"context"
	"errors"
	"strings"
	"testing"

	"connectrpc.com/connect"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
)

func (b *fakeBroker) ListGrants(_ context.Context, r *connect.Request[brokerv1.ListGrantsRequest]) (*connect.Response[brokerv1.ListGrantsResponse], error) {
	switch {
	case r.Msg.GetPlanDigest() == "sha384:granted":
		return connect.NewResponse(&brokerv1.ListGrantsResponse{}), nil
	case b.grants != nil:
		return b.grants(r.Msg)
	}
	return connect.NewResponse(&brokerv1.ListGrantsResponse{Grants: []*brokerv1.Grant{{
		Id: "g-1", State: "requested", PlanDigest: r.Msg.GetPlanDigest(), Missing: []string{"2 of security"},
	}}}), nil
}

func (b *fakeBroker) GetAsset(_ context.Context, r *connect.Request[brokerv1.GetAssetRequest]) (*connect.Response[brokerv1.GetAssetResponse], error) {
	owner := map[string]string{"data": "user/dora", "model": "user/olga", "held": "user/olga", "ckpt": "user/dora"}[r.Msg.GetName()]
	if owner == "" {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("no such asset"))
	}
	return connect.NewResponse(&brokerv1.GetAssetResponse{Asset: &brokerv1.Asset{Name: r.Msg.GetName(), Owner: owner}}), nil
}

// What the submitter expects is shown beside what the owner's rules ask for, and takes
// the place of none of it.
func TestExpectedApprovals(t *testing.T) {
	s := newFakeStack(t)
	s.agent.jobs["job-1"] = &agentv1.Job{Id: "job-1", State: "queued", Stage: "approval", ExpectedApprovals: []string{"model-owners", "legal"}}
	s.coffer(t.Context(), "why", "job-1").want(t, exitRefused, "gate   approval", "2 of security", "its submitter expects approval by: model-owners, legal", "coffer grant approve g-1")
	file := jobFile(t, smallJob+"approvals: [model-owners]\n")
	s.coffer(t.Context(), "plan", file).want(t, 0, "expects  approval by model-owners")
	s.coffer(t.Context(), "plan", file, "-o", "json").want(t, 0, `"expectedApprovals": [`)
	s.agent.jobs["job-1"].ExpectedApprovals = nil
	for _, r := range []result{s.coffer(t.Context(), "why", "job-1"), s.coffer(t.Context(), "plan", jobFile(t, smallJob))} {
		if strings.Contains(r.stdout+r.stderr, "expects") {
			t.Errorf("nobody is expected to approve:\n%s%s", r.stdout, r.stderr)
		}
	}
}

// A job that was taken a moment ago waits for people if a grant of its plan does, and
// not for room.
func TestWhyOfAJobJustTaken(t *testing.T) {
	s := newFakeStack(t)
	s.agent.jobs["job-1"] = &agentv1.Job{Id: "job-1", State: "queued", Stage: "admit"}
	s.coffer(t.Context(), "why", "job-1").want(t, exitRefused, "gate   approval", "2 of security")
	s.agent.jobs["job-1"].PlanDigest = "sha384:granted"
	if r := s.coffer(t.Context(), "why", "job-1"); r.code != 0 || strings.Contains(r.stdout, "gate") || !strings.Contains(r.stdout, "it was taken a moment ago") {
		t.Errorf("%d: %s", r.code, r.stdout)
	}
	s.agent.jobs["job-1"].Stage = "queue"
	s.coffer(t.Context(), "why", "job-1").want(t, exitRefused, "gate   queue")
}
