// Package serve answers coffer.broker.v1 and the Confidential Containers KBS
// protocol over a broker, and keeps its state in SQLite.
//
// Trusted: who Identify says a caller is, and the database file. Checked: that
// the caller's role may ever make the call and how many calls it makes, before
// anything of one is read, the size of what it sends, and how long it takes to
// send it. KBS clients have no name: they are bounded by address. Not checked:
// access policies, ownership and release rules, which attest/broker asks and has;
// the evidence of KBS clients, which is passed on to a verifier unread.
package serve

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
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
	// maxLists bounds the calls in work that read many rows, of all callers together:
	// fewer than the store has readers, so that renewals and releases find one free.
	maxLists = 2
	// callTimeout bounds one call; a transaction waits less than that for others.
	callTimeout = 20 * time.Second
)

// action says which action a call is. A call that is not listed is refused.
func action(procedure string) broker.Action {
	switch procedure {
	case brokerv1connect.BrokerServiceInfoProcedure:
		return broker.ActionInfo
	case brokerv1connect.BrokerServiceCreateAssetProcedure:
		return broker.ActionCreateAsset
	case brokerv1connect.BrokerServiceGetAssetProcedure, brokerv1connect.BrokerServiceListAssetsProcedure:
		return broker.ActionReadAsset
	case brokerv1connect.BrokerServiceUpdateAssetPolicyProcedure:
		return broker.ActionUpdateAssetPolicy
	case brokerv1connect.BrokerServiceCreateGrantProcedure:
		return broker.ActionCreateGrant
	case brokerv1connect.BrokerServiceRequestGrantProcedure:
		return broker.ActionRequestGrant
	case brokerv1connect.BrokerServiceApproveGrantProcedure:
		return broker.ActionApproveGrant
	case brokerv1connect.BrokerServiceDenyGrantProcedure:
		return broker.ActionDenyGrant
	case brokerv1connect.BrokerServiceGetGrantProcedure:
		return broker.ActionReadGrant
	case brokerv1connect.BrokerServiceListGrantsProcedure:
		return broker.ActionListGrants
	case brokerv1connect.BrokerServiceRevokeGrantProcedure, brokerv1connect.BrokerServiceRevokeProcedure:
		return broker.ActionRevoke
	case brokerv1connect.BrokerServiceListRevocationsProcedure:
		return broker.ActionListRevocations
	case brokerv1connect.BrokerServiceLiftRevocationProcedure:
		return broker.ActionLiftRevocation
	case brokerv1connect.BrokerServiceRewrapKeysProcedure:
		return broker.ActionRewrapKeys
	case brokerv1connect.BrokerServiceReleaseProcedure:
		return broker.ActionRelease
	case brokerv1connect.BrokerServiceRenewProcedure:
		return broker.ActionRenew
	case brokerv1connect.BrokerServiceReattestProcedure:
		return broker.ActionReattest
	case brokerv1connect.BrokerServiceReportStoppedProcedure:
		return broker.ActionReportStopped
	case brokerv1connect.BrokerServiceCountersignCheckpointProcedure, brokerv1connect.BrokerServiceResumeCheckpointProcedure:
		return broker.ActionCountersign
	case brokerv1connect.BrokerServiceCommitResealProcedure:
		return broker.ActionCommitReseal
	case brokerv1connect.BrokerServiceLogBundleProcedure:
		return broker.ActionLogBundle
	case brokerv1connect.BrokerServiceEntriesProcedure:
		return broker.ActionEntries
	}
	return ""
}

// mayCall says whether a role may make a call at all. Approving is for approvers,
// and for owners, whose consent it is without a signature.
func mayCall(role, procedure string) bool {
	a := action(procedure)
	return a != "" && (broker.MayEver(role, a) || a == broker.ActionApproveGrant && broker.MayEver(role, broker.ActionConsentGrant))
}

// Options are what Handler needs. All are required but Limit.
type Options struct {
	Broker *broker.Broker
	// Identify returns the authenticated caller of a request.
	Identify func(*http.Request) (broker.Actor, error)
	Log      *slog.Logger
	// Limit is what one caller may ask for; DefaultLimit if it is zero.
	Limit Limit
}

// Handler returns the broker's HTTP handler.
func Handler(o Options) (http.Handler, error) { return handler(o, readTimeout, writeTimeout) }

func handler(o Options, read, write time.Duration) (http.Handler, error) {
	if o.Broker == nil || o.Identify == nil || o.Log == nil {
		return nil, errors.New("broker handler needs a broker, a way to identify callers and a logger")
	}
	mux := http.NewServeMux()
	if o.Limit == (Limit{}) {
		o.Limit = DefaultLimit()
	}
	mux.Handle(brokerv1connect.NewBrokerServiceHandler(&service{b: o.Broker, log: o.Log},
		connect.WithReadMaxBytes(MaxMessage),
		connect.WithInterceptors(&gate{log: o.Log, lists: make(chan struct{}, maxLists)}),
	))
	return bounded(read, write, admit(o, newQuota(o.Limit), mux)), nil
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
func admit(o Options, q *quota, next http.Handler) http.Handler {
	answer := connect.NewErrorWriter()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		refuse := func(ctx context.Context, a broker.Actor, err error) {
			o.Log.LogAttrs(ctx, slog.LevelWarn, "not answered", slog.String("call", r.URL.Path), slog.String("caller", a.String()), slog.String("error", err.Error()))
			unread(w, r)
			_ = answer.Write(w, r, wireError(err))
		}
		a, err := o.Identify(r)
		var why *check.Refusal
		if errors.As(err, &why) || errors.Is(err, broker.ErrUnavailable) {
			refuse(r.Context(), broker.Actor{}, err)
			return
		}
		if err != nil || a.Role == "" || a.Name == "" {
			unread(w, r)
			http.Error(w, "who you are could not be established", http.StatusUnauthorized)
			return
		}
		if !mayCall(a.Role, r.URL.Path) {
			refuse(r.Context(), a, broker.Unauthorized("one of the roles that may call this", a.Role))
			return
		}
		done, err := q.take(a.String())
		if err != nil {
			refuse(r.Context(), a, err)
			return
		}
		defer done()
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

func actor(ctx context.Context) broker.Actor {
	a, _ := ctx.Value(actorKey{}).(broker.Actor)
	return a
}

// gate bounds calls and writes the access log, which holds no message.
type gate struct {
	log   *slog.Logger
	lists chan struct{}
}

// WrapUnary implements connect.Interceptor.
func (g *gate) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		a, procedure, start := actor(ctx), req.Spec().Procedure, time.Now()
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		resp, err := g.limited(ctx, procedure, req, next)
		attrs := []slog.Attr{slog.String("call", procedure), slog.String("caller", a.String()), slog.Duration("took", time.Since(start))}
		if err == nil {
			g.log.LogAttrs(ctx, slog.LevelInfo, "answered", attrs...)
			return resp, nil
		}
		g.log.LogAttrs(ctx, slog.LevelWarn, "not answered", append(attrs, slog.String("error", err.Error()))...)
		return nil, wireError(err)
	}
}

// limited makes a call, which waits for its turn first if it reads many rows.
func (g *gate) limited(ctx context.Context, procedure string, req connect.AnyRequest, next connect.UnaryFunc) (connect.AnyResponse, error) {
	switch procedure {
	case brokerv1connect.BrokerServiceListGrantsProcedure, brokerv1connect.BrokerServiceListAssetsProcedure, brokerv1connect.BrokerServiceListRevocationsProcedure,
		brokerv1connect.BrokerServiceEntriesProcedure:
	default:
		return next(ctx, req)
	}
	select {
	case g.lists <- struct{}{}:
		defer func() { <-g.lists }()
		return next(ctx, req)
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: wait for other lists: %w", broker.ErrUnavailable, ctx.Err())
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

type service struct {
	b   *broker.Broker
	log *slog.Logger
}

var _ brokerv1connect.BrokerServiceHandler = (*service)(nil)

func (s *service) Info(context.Context, *connect.Request[brokerv1.InfoRequest]) (*connect.Response[brokerv1.InfoResponse], error) {
	i, err := s.b.Info()
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&brokerv1.InfoResponse{BrokerId: i.ID, OwnerWrapKey: i.OwnerWrapKey, Jwks: i.JWKS, Simulation: i.Simulation}), nil
}

func (s *service) LogBundle(ctx context.Context, req *connect.Request[brokerv1.LogBundleRequest]) (*connect.Response[brokerv1.LogBundleResponse], error) {
	token, err := s.b.LogBundle(ctx, actor(ctx), req.Msg.GetJobId(), plan.Digest(req.Msg.GetDigest()))
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&brokerv1.LogBundleResponse{Receipt: token}), nil
}

func (s *service) Entries(ctx context.Context, req *connect.Request[brokerv1.EntriesRequest]) (*connect.Response[brokerv1.EntriesResponse], error) {
	l, err := s.b.Entries(ctx, actor(ctx), req.Msg.GetJobId())
	if err != nil {
		return nil, err
	}
	out := &brokerv1.EntriesResponse{}
	for _, e := range l {
		out.Entries = append(out.Entries, &brokerv1.Entry{Index: e.Index, Body: e.Body, ChainHash: e.Hash})
	}
	return connect.NewResponse(out), nil
}

func unix(s int64) time.Time {
	if s == 0 {
		return time.Time{}
	}
	return time.Unix(s, 0)
}
