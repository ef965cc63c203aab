// Package serve answers coffer.broker.v1 over a broker and keeps its state in
// SQLite.
//
// Trusted: who Identify says a caller is, and the database file. Checked: that
// the caller's role may make the call, before anything of it is read, the size of
// what it sends, and how long it takes to send it. Not checked: ownership and
// release rules; attest/broker has them.
package serve

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"slices"
	"time"

	"connectrpc.com/connect"

	"github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/api/broker/v1/brokerv1connect"
	"github.com/coffer-run/coffer/attest/api/refusal"
	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
)

const (
	// MaxMessage bounds a request, in bytes: a result and a little more.
	MaxMessage = receipt.MaxToken + 64<<10
	// readTimeout bounds how long a caller may take to send a request, and
	// writeTimeout how long it may take until it has the answer.
	readTimeout  = 20 * time.Second
	writeTimeout = 60 * time.Second
	// callTimeout bounds one call; a transaction waits less than that for others.
	callTimeout = 20 * time.Second
)

// Roles that may call, besides being authenticated.
const (
	roleOwner    = "owner"
	roleEngineer = "engineer"
	roleAgent    = "agent"
	roleAuditor  = "auditor"
)

// allowed says which roles may make a call. A call that is not listed is refused.
func allowed(procedure string) []string {
	switch procedure {
	case brokerv1connect.BrokerServiceInfoProcedure:
		return []string{roleOwner, roleEngineer, roleAgent, roleAuditor}
	case brokerv1connect.BrokerServiceCreateAssetProcedure,
		brokerv1connect.BrokerServiceCreateGrantProcedure,
		brokerv1connect.BrokerServiceRevokeGrantProcedure:
		return []string{roleOwner}
	case brokerv1connect.BrokerServiceGetAssetProcedure,
		brokerv1connect.BrokerServiceListAssetsProcedure,
		brokerv1connect.BrokerServiceListGrantsProcedure:
		return []string{roleOwner, roleEngineer, roleAgent, roleAuditor}
	case brokerv1connect.BrokerServiceReleaseProcedure,
		brokerv1connect.BrokerServiceLogBundleProcedure:
		return []string{roleAgent}
	case brokerv1connect.BrokerServiceEntriesProcedure:
		return []string{roleOwner, roleAgent, roleAuditor}
	}
	return nil
}

// Options are what Handler needs. All are required.
type Options struct {
	Broker *broker.Broker
	// Identify returns the authenticated caller of a request.
	Identify func(*http.Request) (role, name string, err error)
	Log      *slog.Logger
}

// Handler returns the broker's HTTP handler.
func Handler(o Options) (http.Handler, error) { return handler(o, readTimeout, writeTimeout) }

func handler(o Options, read, write time.Duration) (http.Handler, error) {
	if o.Broker == nil || o.Identify == nil || o.Log == nil {
		return nil, errors.New("broker handler needs a broker, a way to identify callers and a logger")
	}
	mux := http.NewServeMux()
	mux.Handle(brokerv1connect.NewBrokerServiceHandler(&service{b: o.Broker},
		connect.WithReadMaxBytes(MaxMessage),
		connect.WithInterceptors(&gate{log: o.Log}),
	))
	return bounded(read, write, admit(o, mux)), nil
}

// bounded limits every request's size and the time that its caller may take.
func bounded(read, write time.Duration, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		now := time.Now()
		// Not every ResponseWriter has deadlines; the daemon's does.
		_ = rc.SetReadDeadline(now.Add(read))
		_ = rc.SetWriteDeadline(now.Add(write))
		// Larger than MaxMessage by the framing of a compressed message.
		r.Body = http.MaxBytesReader(w, r.Body, MaxMessage+64<<10)
		next.ServeHTTP(w, r)
	})
}

type actorKey struct{}

// admit puts the caller into the context, or answers 401, and refuses calls that
// its role may not make. Either way a caller that may not call is answered before
// its request is read.
func admit(o Options, next http.Handler) http.Handler {
	answer := connect.NewErrorWriter()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		role, name, err := o.Identify(r)
		if err != nil || role == "" || name == "" {
			unread(w, r)
			http.Error(w, "who you are could not be established", http.StatusUnauthorized)
			return
		}
		a := broker.Actor{Role: role, Name: name}
		if !slices.Contains(allowed(r.URL.Path), role) {
			err := unauthorized("one of the roles that may call this", role, "use an identity of another role")
			o.Log.LogAttrs(r.Context(), slog.LevelWarn, "not answered", slog.String("call", r.URL.Path), slog.String("caller", a.String()), slog.String("error", err.Error()))
			unread(w, r)
			_ = answer.Write(w, r, wireError(err))
			return
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), actorKey{}, a)))
	})
}

// unread keeps the server from reading the rest of a request before it answers,
// as it does in HTTP/1.1 to use the connection again.
func unread(w http.ResponseWriter, r *http.Request) {
	if r.ProtoMajor == 1 {
		w.Header().Set("Connection", "close")
	}
}

func unauthorized(expected, found, hint string) error {
	var l check.List
	l.Fail("role", expected, found, hint)
	return check.Refuse("authorize", l)
}

func actor(ctx context.Context) broker.Actor {
	a, _ := ctx.Value(actorKey{}).(broker.Actor)
	return a
}

// gate bounds calls and writes the access log, which holds no message.
type gate struct{ log *slog.Logger }

// WrapUnary implements connect.Interceptor.
func (g *gate) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		a, procedure, start := actor(ctx), req.Spec().Procedure, time.Now()
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		resp, err := next(ctx, req)
		attrs := []slog.Attr{slog.String("call", procedure), slog.String("caller", a.String()), slog.Duration("took", time.Since(start))}
		if err == nil {
			g.log.LogAttrs(ctx, slog.LevelInfo, "answered", attrs...)
			return resp, nil
		}
		g.log.LogAttrs(ctx, slog.LevelWarn, "not answered", append(attrs, slog.String("error", err.Error()))...)
		return nil, wireError(err)
	}
}

// WrapStreamingClient implements connect.Interceptor.
func (g *gate) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

// WrapStreamingHandler refuses: no call of the broker streams.
func (g *gate) WrapStreamingHandler(connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(context.Context, connect.StreamingHandlerConn) error {
		return connect.NewError(connect.CodeUnimplemented, errors.New("no streams here"))
	}
}

// wireError tells the caller a refusal in full, what is wrong with its request,
// and of everything else only whether to try again.
func wireError(err error) *connect.Error {
	var r *check.Refusal
	switch {
	case errors.As(err, &r):
		return refusal.Encode(r)
	case errors.Is(err, broker.ErrInvalid):
		return connect.NewError(connect.CodeInvalidArgument, err)
	case errors.Is(err, broker.ErrNotFound):
		return connect.NewError(connect.CodeNotFound, err)
	case errors.Is(err, broker.ErrExists):
		return connect.NewError(connect.CodeAlreadyExists, err)
	case errors.Is(err, broker.ErrTooMany):
		return connect.NewError(connect.CodeResourceExhausted, err)
	case errors.Is(err, context.DeadlineExceeded):
		return connect.NewError(connect.CodeDeadlineExceeded, broker.ErrUnavailable)
	case errors.Is(err, broker.ErrUnavailable):
		return connect.NewError(connect.CodeUnavailable, broker.ErrUnavailable)
	}
	return connect.NewError(connect.CodeInternal, errors.New("internal error of the broker; its log says which"))
}

type service struct{ b *broker.Broker }

var _ brokerv1connect.BrokerServiceHandler = (*service)(nil)

func (s *service) Info(context.Context, *connect.Request[brokerv1.InfoRequest]) (*connect.Response[brokerv1.InfoResponse], error) {
	i, err := s.b.Info()
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&brokerv1.InfoResponse{BrokerId: i.ID, OwnerWrapKey: i.OwnerWrapKey, Jwks: i.JWKS, Simulation: i.Simulation}), nil
}

func (s *service) CreateAsset(ctx context.Context, req *connect.Request[brokerv1.CreateAssetRequest]) (*connect.Response[brokerv1.CreateAssetResponse], error) {
	m := req.Msg
	a, err := s.b.CreateAsset(ctx, actor(ctx), broker.NewAsset{
		Name: m.GetName(), Kind: kinds()[m.GetKind()], Digest: plan.Digest(m.GetDigest()), Enc: m.GetWrappedEnc(), Ciphertext: m.GetWrappedKey(),
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&brokerv1.CreateAssetResponse{Asset: asset(a)}), nil
}

func (s *service) GetAsset(ctx context.Context, req *connect.Request[brokerv1.GetAssetRequest]) (*connect.Response[brokerv1.GetAssetResponse], error) {
	a, err := s.b.Asset(ctx, req.Msg.GetName())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&brokerv1.GetAssetResponse{Asset: asset(a)}), nil
}

func (s *service) ListAssets(ctx context.Context, _ *connect.Request[brokerv1.ListAssetsRequest]) (*connect.Response[brokerv1.ListAssetsResponse], error) {
	l, err := s.b.Assets(ctx)
	if err != nil {
		return nil, err
	}
	out := &brokerv1.ListAssetsResponse{}
	for _, a := range l {
		out.Assets = append(out.Assets, asset(a))
	}
	return connect.NewResponse(out), nil
}

func (s *service) CreateGrant(ctx context.Context, req *connect.Request[brokerv1.CreateGrantRequest]) (*connect.Response[brokerv1.CreateGrantResponse], error) {
	m := req.Msg
	g, err := s.b.CreateGrant(ctx, actor(ctx), broker.NewGrant{
		Assets: m.GetAssets(), Plan: plan.Digest(m.GetPlanDigest()), NotBefore: unix(m.GetNotBeforeUnix()), NotAfter: unix(m.GetNotAfterUnix()),
		MaxReleases: int(m.GetMaxReleases()), AllowSimulated: m.GetAllowSimulated(),
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&brokerv1.CreateGrantResponse{Grant: s.grant(g)}), nil
}

func (s *service) ListGrants(ctx context.Context, req *connect.Request[brokerv1.ListGrantsRequest]) (*connect.Response[brokerv1.ListGrantsResponse], error) {
	// A plan's digest is known to those who deal with the plan: whoever else
	// lists grants sees what other people's jobs use.
	p := plan.Digest(req.Msg.GetPlanDigest())
	if a := actor(ctx); p == "" && a.Role != roleOwner {
		return nil, unauthorized("a plan, or role "+roleOwner, a.Role+" without a plan", "name the digest of the plan")
	}
	l, err := s.b.Grants(ctx, p)
	if err != nil {
		return nil, err
	}
	out := &brokerv1.ListGrantsResponse{}
	for _, g := range l {
		out.Grants = append(out.Grants, s.grant(g))
	}
	return connect.NewResponse(out), nil
}

func (s *service) RevokeGrant(ctx context.Context, req *connect.Request[brokerv1.RevokeGrantRequest]) (*connect.Response[brokerv1.RevokeGrantResponse], error) {
	g, err := s.b.Revoke(ctx, actor(ctx), req.Msg.GetId(), req.Msg.GetReason())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&brokerv1.RevokeGrantResponse{Grant: s.grant(g)}), nil
}

func (s *service) Release(ctx context.Context, req *connect.Request[brokerv1.ReleaseRequest]) (*connect.Response[brokerv1.ReleaseResponse], error) {
	m := req.Msg
	a, err := s.b.Release(ctx, actor(ctx), m.GetResult(), m.GetRequest(), m.GetSignature())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&brokerv1.ReleaseResponse{Enc: a.Enc, Ciphertext: a.Ciphertext, Receipt: a.Receipt}), nil
}

func (s *service) LogBundle(ctx context.Context, req *connect.Request[brokerv1.LogBundleRequest]) (*connect.Response[brokerv1.LogBundleResponse], error) {
	token, err := s.b.LogBundle(ctx, actor(ctx), req.Msg.GetJobId(), plan.Digest(req.Msg.GetDigest()))
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&brokerv1.LogBundleResponse{Receipt: token}), nil
}

func (s *service) Entries(ctx context.Context, req *connect.Request[brokerv1.EntriesRequest]) (*connect.Response[brokerv1.EntriesResponse], error) {
	l, err := s.b.Entries(ctx, req.Msg.GetJobId())
	if err != nil {
		return nil, err
	}
	out := &brokerv1.EntriesResponse{}
	for _, e := range l {
		out.Entries = append(out.Entries, &brokerv1.Entry{Index: e.Index, Body: e.Body, ChainHash: e.Hash})
	}
	return connect.NewResponse(out), nil
}

func kinds() map[brokerv1.AssetKind]broker.Kind {
	return map[brokerv1.AssetKind]broker.Kind{
		brokerv1.AssetKind_ASSET_KIND_DATASET:     broker.KindDataset,
		brokerv1.AssetKind_ASSET_KIND_WEIGHTS:     broker.KindWeights,
		brokerv1.AssetKind_ASSET_KIND_CHECKPOINTS: broker.KindCheckpoints,
	}
}

func asset(a broker.Asset) *brokerv1.Asset {
	out := &brokerv1.Asset{Name: a.Name, Digest: string(a.Digest), Owner: a.Owner, CreatedUnix: a.Created.Unix()}
	for k, v := range kinds() {
		if v == a.Kind {
			out.Kind = k
		}
	}
	return out
}

func (s *service) grant(g broker.Grant) *brokerv1.Grant {
	return &brokerv1.Grant{
		Id: g.ID, Assets: g.Assets, PlanDigest: string(g.Plan), NotBeforeUnix: g.NotBefore.Unix(), NotAfterUnix: g.NotAfter.Unix(),
		MaxReleases: int32(g.MaxReleases), Used: int32(g.Used), State: g.State(s.b.Now()), Owner: g.Owner, AllowSimulated: g.AllowSimulated,
	}
}

func unix(s int64) time.Time {
	if s == 0 {
		return time.Time{}
	}
	return time.Unix(s, 0)
}
