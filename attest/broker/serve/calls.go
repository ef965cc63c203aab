package serve

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"
	"time"

	"connectrpc.com/connect"

	"github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
)

func (s *service) CreateAsset(ctx context.Context, req *connect.Request[brokerv1.CreateAssetRequest]) (*connect.Response[brokerv1.CreateAssetResponse], error) {
	m := req.Msg
	n := broker.NewAsset{
		Name: m.GetName(), Kind: kinds()[m.GetKind()], Digest: plan.Digest(m.GetDigest()), Enc: m.GetWrappedEnc(), Ciphertext: m.GetWrappedKey(),
		Labels: labels(m.GetLabels()), KeyStore: m.GetKeyStore(),
	}
	if m.Policy != nil {
		p := policy(m.GetPolicy())
		n.Policy = &p
	}
	n.Signed = signed(m.GetStatement(), m.GetStatementSignature())
	a, err := s.b.CreateAsset(ctx, actor(ctx), n)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&brokerv1.CreateAssetResponse{Asset: asset(a)}), nil
}

func (s *service) GetAsset(ctx context.Context, req *connect.Request[brokerv1.GetAssetRequest]) (*connect.Response[brokerv1.GetAssetResponse], error) {
	a, err := s.b.ReadAsset(ctx, actor(ctx), req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&brokerv1.GetAssetResponse{Asset: asset(a)}), nil
}

func (s *service) ListAssets(ctx context.Context, _ *connect.Request[brokerv1.ListAssetsRequest]) (*connect.Response[brokerv1.ListAssetsResponse], error) {
	l, err := s.b.ReadAssets(ctx, actor(ctx))
	if err != nil {
		return nil, err
	}
	out := &brokerv1.ListAssetsResponse{}
	for _, a := range l {
		out.Assets = append(out.Assets, asset(a))
	}
	return connect.NewResponse(out), nil
}

func (s *service) UpdateAssetPolicy(ctx context.Context, req *connect.Request[brokerv1.UpdateAssetPolicyRequest]) (*connect.Response[brokerv1.UpdateAssetPolicyResponse], error) {
	m := req.Msg
	if m.Policy == nil {
		return nil, fmt.Errorf("%w: no policy: send the whole policy as it should be", broker.ErrInvalid)
	}
	a, err := s.b.UpdateAssetPolicy(ctx, actor(ctx), m.GetName(), policy(m.GetPolicy()), labels(m.GetLabels()), m.GetRevision(), signed(m.GetStatement(), m.GetStatementSignature()))
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&brokerv1.UpdateAssetPolicyResponse{Asset: asset(a)}), nil
}

func (s *service) CreateGrant(ctx context.Context, req *connect.Request[brokerv1.CreateGrantRequest]) (*connect.Response[brokerv1.CreateGrantResponse], error) {
	m := req.Msg
	g, err := s.b.CreateGrant(ctx, actor(ctx), broker.NewGrant{
		Assets: m.GetAssets(), Plan: plan.Digest(m.GetPlanDigest()), NotBefore: unix(m.GetNotBeforeUnix()), NotAfter: unix(m.GetNotAfterUnix()),
		MaxReleases: int(m.GetMaxReleases()), AllowSimulated: m.GetAllowSimulated(), Principals: m.GetPrincipals(), Purpose: m.GetPurpose(), Document: m.GetPlan(),
	})
	if err != nil {
		return nil, err
	}
	v, err := s.read(ctx, g.ID)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&brokerv1.CreateGrantResponse{Grant: v}), nil
}

func (s *service) RequestGrant(ctx context.Context, req *connect.Request[brokerv1.RequestGrantRequest]) (*connect.Response[brokerv1.RequestGrantResponse], error) {
	m := req.Msg
	g, err := s.b.RequestGrant(ctx, actor(ctx), broker.NewGrant{
		Assets: m.GetAssets(), Plan: plan.Digest(m.GetPlanDigest()), NotBefore: unix(m.GetNotBeforeUnix()), NotAfter: unix(m.GetNotAfterUnix()),
		MaxReleases: int(m.GetMaxReleases()), AllowSimulated: m.GetAllowSimulated(), Principals: m.GetPrincipals(), Purpose: m.GetPurpose(), Key: m.GetIdempotencyKey(), Document: m.GetPlan(),
	})
	if err != nil {
		return nil, err
	}
	v, err := s.read(ctx, g.ID)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&brokerv1.RequestGrantResponse{Grant: v}), nil
}

// read returns a grant as it stands, to whoever just changed it.
func (s *service) read(ctx context.Context, id string) (*brokerv1.Grant, error) {
	v, err := s.b.GrantAsIs(ctx, id)
	if err != nil {
		return nil, err
	}
	return grant(v), nil
}

func (s *service) ApproveGrant(ctx context.Context, req *connect.Request[brokerv1.ApproveGrantRequest]) (*connect.Response[brokerv1.ApproveGrantResponse], error) {
	m := req.Msg
	var v broker.GrantView
	var err error
	a := m.GetApproval()
	switch d, perr := receipt.ParseApproval(a.GetDocument()); {
	case a == nil:
		v, err = s.b.ConsentGrant(ctx, actor(ctx), m.GetId(), nil)
	case perr == nil && d.Decision == receipt.DecisionConsent:
		v, err = s.b.ConsentGrant(ctx, actor(ctx), m.GetId(), signed(a.GetDocument(), a.GetSignature()))
	default:
		v, err = s.b.ApproveGrant(ctx, actor(ctx), m.GetId(), m.GetApproval().GetDocument(), m.GetApproval().GetSignature())
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&brokerv1.ApproveGrantResponse{Grant: grant(v)}), nil
}

func (s *service) DenyGrant(ctx context.Context, req *connect.Request[brokerv1.DenyGrantRequest]) (*connect.Response[brokerv1.DenyGrantResponse], error) {
	a := req.Msg.GetApproval()
	v, err := s.b.DenyGrant(ctx, actor(ctx), req.Msg.GetId(), req.Msg.GetReason(), signed(a.GetDocument(), a.GetSignature()))
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&brokerv1.DenyGrantResponse{Grant: grant(v)}), nil
}

func (s *service) GetGrant(ctx context.Context, req *connect.Request[brokerv1.GetGrantRequest]) (*connect.Response[brokerv1.GetGrantResponse], error) {
	v, err := s.b.Grant(ctx, actor(ctx), req.Msg.GetId())
	if err != nil {
		return nil, err
	}
	out := &brokerv1.GetGrantResponse{Grant: grant(v)}
	for _, a := range v.Approvals {
		out.Approvals = append(out.Approvals, &brokerv1.Approval{Document: a.Document, Signature: a.Signature})
	}
	return connect.NewResponse(out), nil
}

func (s *service) ListGrants(ctx context.Context, req *connect.Request[brokerv1.ListGrantsRequest]) (*connect.Response[brokerv1.ListGrantsResponse], error) {
	m := req.Msg
	f := broker.Listing{Plan: plan.Digest(m.GetPlanDigest()), State: broker.State(m.GetState()), Principal: m.GetPrincipal(), Mine: m.GetMine(), Size: int(m.GetPageSize())}
	if m.GetPageToken() != "" {
		after, err := strconv.ParseInt(m.GetPageToken(), 10, 64)
		if err != nil || after <= 0 {
			return nil, fmt.Errorf("%w: page token %.40q", broker.ErrInvalid, m.GetPageToken())
		}
		f.After = after
	}
	l, next, err := s.b.ListGrants(ctx, actor(ctx), f)
	if err != nil {
		return nil, err
	}
	out := &brokerv1.ListGrantsResponse{}
	if next > 0 {
		out.NextPageToken = strconv.FormatInt(next, 10)
	}
	for _, v := range l {
		out.Grants = append(out.Grants, grant(v))
	}
	return connect.NewResponse(out), nil
}

func (s *service) RevokeGrant(ctx context.Context, req *connect.Request[brokerv1.RevokeGrantRequest]) (*connect.Response[brokerv1.RevokeGrantResponse], error) {
	g, err := s.b.Revoke(ctx, actor(ctx), req.Msg.GetId(), req.Msg.GetReason())
	if err != nil {
		return nil, err
	}
	v, err := s.read(ctx, g.ID)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&brokerv1.RevokeGrantResponse{Grant: v}), nil
}

func (s *service) Revoke(ctx context.Context, req *connect.Request[brokerv1.RevokeRequest]) (*connect.Response[brokerv1.RevokeResponse], error) {
	m := req.Msg
	r, jobs, err := s.b.RevokeTarget(ctx, actor(ctx), broker.Target{Kind: targets()[m.GetKind()], Value: m.GetValue()}, m.GetReason())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&brokerv1.RevokeResponse{Revocation: revocation(r), Jobs: jobs}), nil
}

func (s *service) ListRevocations(ctx context.Context, _ *connect.Request[brokerv1.ListRevocationsRequest]) (*connect.Response[brokerv1.ListRevocationsResponse], error) {
	l, err := s.b.Revocations(ctx, actor(ctx))
	if err != nil {
		return nil, err
	}
	out := &brokerv1.ListRevocationsResponse{}
	for _, r := range l {
		out.Revocations = append(out.Revocations, revocation(r))
	}
	return connect.NewResponse(out), nil
}

func (s *service) LiftRevocation(ctx context.Context, req *connect.Request[brokerv1.LiftRevocationRequest]) (*connect.Response[brokerv1.LiftRevocationResponse], error) {
	m := req.Msg
	if err := s.b.LiftRevocation(ctx, actor(ctx), broker.Target{Kind: targets()[m.GetKind()], Value: m.GetValue()}, m.GetReason()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&brokerv1.LiftRevocationResponse{}), nil
}

func (s *service) RewrapKeys(ctx context.Context, req *connect.Request[brokerv1.RewrapKeysRequest]) (*connect.Response[brokerv1.RewrapKeysResponse], error) {
	p, err := s.b.RewrapKeys(ctx, actor(ctx), req.Msg.GetAfter())
	if err != nil && len(p.Failed) == 0 {
		return nil, err
	}
	if err != nil {
		s.log.LogAttrs(ctx, slog.LevelError, "some data keys were not rewrapped", slog.Any("error", err))
	}
	return connect.NewResponse(&brokerv1.RewrapKeysResponse{Looked: int64(p.Looked), Changed: int64(p.Changed), Failed: p.Failed, Last: p.Last, Done: p.Done}), nil
}

func (s *service) Release(ctx context.Context, req *connect.Request[brokerv1.ReleaseRequest]) (*connect.Response[brokerv1.ReleaseResponse], error) {
	m := req.Msg
	a, err := s.b.Release(ctx, actor(ctx), broker.Ask{Result: m.GetResult(), Request: m.GetRequest(), Signature: m.GetSignature(), More: m.GetMoreResults(), Plan: m.GetPlan()})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&brokerv1.ReleaseResponse{Enc: a.Enc, Ciphertext: a.Ciphertext, Receipt: a.Receipt}), nil
}

func (s *service) Renew(ctx context.Context, req *connect.Request[brokerv1.RenewRequest]) (*connect.Response[brokerv1.RenewResponse], error) {
	var l []broker.Renewal
	for _, r := range req.Msg.GetRenewals() {
		l = append(l, broker.Renewal{JobID: r.GetJobId(), Challenge: r.GetChallenge()})
	}
	renewed, err := s.b.Renew(ctx, actor(ctx), l)
	if err != nil {
		return nil, err
	}
	out := &brokerv1.RenewResponse{}
	for _, r := range renewed {
		out.Renewed = append(out.Renewed, &brokerv1.Renewed{JobId: r.JobID, Lease: r.Lease, Refused: r.Refused})
	}
	return connect.NewResponse(out), nil
}

func (s *service) Reattest(ctx context.Context, req *connect.Request[brokerv1.ReattestRequest]) (*connect.Response[brokerv1.ReattestResponse], error) {
	if err := s.b.Reattest(ctx, actor(ctx), req.Msg.GetJobId(), req.Msg.GetResult()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&brokerv1.ReattestResponse{}), nil
}

func (s *service) ReportStopped(ctx context.Context, req *connect.Request[brokerv1.ReportStoppedRequest]) (*connect.Response[brokerv1.ReportStoppedResponse], error) {
	m := req.Msg
	if err := s.b.ReportStopped(ctx, actor(ctx), m.GetJobId(), broker.Stopped{
		Told: millis(m.GetToldUnixMillis()), Gone: millis(m.GetGoneUnixMillis()), Scrubbed: millis(m.GetScrubbedUnixMillis()), Reason: m.GetReason(),
	}); err != nil {
		return nil, err
	}
	return connect.NewResponse(&brokerv1.ReportStoppedResponse{}), nil
}

func (s *service) CountersignCheckpoint(ctx context.Context, req *connect.Request[brokerv1.CountersignCheckpointRequest]) (*connect.Response[brokerv1.CountersignCheckpointResponse], error) {
	m := req.Msg
	token, err := s.b.CountersignCheckpoint(ctx, actor(ctx), m.GetJobId(), m.GetRecord(), m.GetSignature())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&brokerv1.CountersignCheckpointResponse{Receipt: token}), nil
}

func (s *service) ResumeCheckpoint(ctx context.Context, req *connect.Request[brokerv1.ResumeCheckpointRequest]) (*connect.Response[brokerv1.ResumeCheckpointResponse], error) {
	m := req.Msg
	token, err := s.b.ResumeCheckpoint(ctx, actor(ctx), m.GetJobId(), m.GetAsset(), m.GetChallenge())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&brokerv1.ResumeCheckpointResponse{Receipt: token}), nil
}

func (s *service) CommitReseal(ctx context.Context, req *connect.Request[brokerv1.CommitResealRequest]) (*connect.Response[brokerv1.CommitResealResponse], error) {
	m := req.Msg
	token, err := s.b.CommitReseal(ctx, actor(ctx), m.GetJobId(), m.GetPlan(), m.GetRecord(), m.GetSignature())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&brokerv1.CommitResealResponse{Receipt: token}), nil
}

// signed is a document with its signature, or none.
func signed(document, signature []byte) *broker.Signed {
	if len(document) == 0 && len(signature) == 0 {
		return nil
	}
	return &broker.Signed{Document: document, Signature: signature}
}

func kinds() map[brokerv1.AssetKind]broker.Kind {
	return map[brokerv1.AssetKind]broker.Kind{
		brokerv1.AssetKind_ASSET_KIND_DATASET:     broker.KindDataset,
		brokerv1.AssetKind_ASSET_KIND_WEIGHTS:     broker.KindWeights,
		brokerv1.AssetKind_ASSET_KIND_SECRET:      broker.KindSecret,
		brokerv1.AssetKind_ASSET_KIND_CHECKPOINTS: broker.KindCheckpoints,
	}
}

func targets() map[brokerv1.RevocationKind]broker.RevocationKind {
	return map[brokerv1.RevocationKind]broker.RevocationKind{
		brokerv1.RevocationKind_REVOCATION_KIND_GRANT:       broker.RevokeGrant,
		brokerv1.RevocationKind_REVOCATION_KIND_ASSET:       broker.RevokeAsset,
		brokerv1.RevocationKind_REVOCATION_KIND_PRINCIPAL:   broker.RevokePrincipal,
		brokerv1.RevocationKind_REVOCATION_KIND_NODE:        broker.RevokeNode,
		brokerv1.RevocationKind_REVOCATION_KIND_CHIP_ID:     broker.RevokeChip,
		brokerv1.RevocationKind_REVOCATION_KIND_IMAGE:       broker.RevokeImage,
		brokerv1.RevocationKind_REVOCATION_KIND_MEASUREMENT: broker.RevokeMeasurement,
	}
}

func asset(a broker.Asset) *brokerv1.Asset {
	out := &brokerv1.Asset{
		Name: a.Name, Digest: string(a.Digest), Owner: a.Owner, CreatedUnix: a.Created.Unix(), Revision: a.Revision, KeyStore: a.KeyStore,
		Statement: a.Statement.Document, StatementSignature: a.Statement.Signature,
		Labels: &brokerv1.Labels{Sensitivity: a.Labels.Sensitivity, Region: a.Labels.Region, Project: a.Labels.Project},
	}
	for k, v := range kinds() {
		if v == a.Kind {
			out.Kind = k
		}
	}
	p := a.Policy
	out.Policy = &brokerv1.AssetPolicy{
		Verifiers: p.Verifiers, VerifierThreshold: int32(p.Threshold), Kems: p.KEMs, Protocols: p.Protocols, LeaseSeconds: p.LeaseSeconds, GraceSeconds: p.GraceSeconds,
		MaxReleases: int32(p.MaxReleases), MaxDurationSeconds: p.MaxDurationSeconds, Affirming: p.Affirming, StopAtExpiry: p.StopAtExpiry, StopAtKeyDisabled: p.StopAtKeyDisabled,
		MaxResultAgeSeconds: p.MaxResultAgeSeconds,
	}
	for _, r := range p.Approvals {
		out.Policy.Approvals = append(out.Policy.Approvals, &brokerv1.ApprovalRule{Group: r.Group, Count: int32(r.Count)})
	}
	return out
}

func labels(l *brokerv1.Labels) broker.Labels {
	return broker.Labels{Sensitivity: l.GetSensitivity(), Region: l.GetRegion(), Project: l.GetProject()}
}

func policy(p *brokerv1.AssetPolicy) broker.Policy {
	out := broker.Policy{
		Verifiers: p.GetVerifiers(), Threshold: int(p.GetVerifierThreshold()), KEMs: p.GetKems(), Protocols: p.GetProtocols(), LeaseSeconds: p.GetLeaseSeconds(),
		GraceSeconds: p.GetGraceSeconds(), MaxReleases: int(p.GetMaxReleases()), MaxDurationSeconds: p.GetMaxDurationSeconds(), Affirming: p.GetAffirming(),
		StopAtExpiry: p.GetStopAtExpiry(), StopAtKeyDisabled: p.GetStopAtKeyDisabled(), MaxResultAgeSeconds: p.GetMaxResultAgeSeconds(),
	}
	for _, r := range p.GetApprovals() {
		out.Approvals = append(out.Approvals, broker.Rule{Group: r.GetGroup(), Count: int(r.GetCount())})
	}
	return out
}

func grant(v broker.GrantView) *brokerv1.Grant {
	out := &brokerv1.Grant{
		Id: v.ID, Assets: v.Assets, PlanDigest: string(v.Plan), NotBeforeUnix: v.NotBefore.Unix(), NotAfterUnix: v.NotAfter.Unix(),
		MaxReleases: int32(v.MaxReleases), Used: int32(v.Used), State: string(v.State), Owner: v.Owner, AllowSimulated: v.AllowSimulated,
		Requester: v.Requester, Principals: v.Principals, Purpose: v.Purpose, RequestedUnix: v.Requested.Unix(), EndedReason: v.Reason, EndedBy: v.EndedBy,
		Missing: v.Missing, Terms: v.Terms,
	}
	for _, t := range []time.Time{v.Revoked, v.Denied} {
		if !t.IsZero() {
			out.EndedUnix = t.Unix()
		}
	}
	return out
}

func revocation(r broker.Revocation) *brokerv1.Revocation {
	out := &brokerv1.Revocation{Value: r.Value, Reason: r.Reason, By: r.By, TimeUnix: r.Time.Unix(), Scope: r.Scope}
	for k, v := range targets() {
		if v == r.Kind {
			out.Kind = k
		}
	}
	return out
}

func millis(ms int64) time.Time {
	if ms == 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms)
}
