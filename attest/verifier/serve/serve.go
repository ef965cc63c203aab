// Package serve answers coffer.verifier.v1 over a verifier, and brokers that ask
// for guests of the Confidential Containers KBS protocol.
//
// Trusted: who Identify says a caller is. Checked: that the caller's role may
// make the call and that the caller does not make too many at a time, before
// anything of it is read; the size of what it sends, decompressed, and how long
// it takes to send it. Not checked: evidence; attest/verifier does that.
package serve

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/coffer-run/coffer/attest/api/refusal"
	verifierv1 "github.com/coffer-run/coffer/attest/api/verifier/v1"
	"github.com/coffer-run/coffer/attest/api/verifier/v1/verifierv1connect"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/verifier"
)

const (
	// MaxMessage bounds a request, in bytes and after decompression: an
	// envelope in base64, and a little more.
	MaxMessage = evidence.MaxSize/3*4 + 64<<10
	// readTimeout bounds how long a caller may take to send a request, and
	// writeTimeout how long it may take to read the answer.
	readTimeout  = 20 * time.Second
	writeTimeout = 40 * time.Second
	// callTimeout bounds one call, its wait for a turn included.
	callTimeout = 15 * time.Second
	// maxCalls bounds the calls that one caller makes at a time, and with them
	// the memory that its requests take: an agent makes one for each of its jobs.
	maxCalls = 32
)

// What is answered besides calls, to GET.
const (
	// JWKSPath has the verifier's keys.
	JWKSPath = "/.well-known/jwks.json"
	// LivePath answers 200 while the program answers at all.
	LivePath = "/livez"
	// ReadyPath answers 200 while the verifier can accept evidence, and else 503
	// with the reason.
	ReadyPath = "/readyz"
	// MetricsPath has Prometheus metrics, for operators.
	MetricsPath = "/metrics"
)

// Roles that may call, besides being authenticated.
const (
	roleAgent        = "agent"
	roleRelyingParty = "relying-party"
	roleOperator     = "operator"
	roleBroker       = "broker"
)

// anyone stands for every caller with an identity.
const anyone = "*"

// allowed says which roles may make a call. A call that is not listed is refused.
func allowed(procedure string) []string {
	switch procedure {
	case verifierv1connect.VerifierServiceChallengeProcedure,
		verifierv1connect.VerifierServiceBeginEnrolmentProcedure,
		verifierv1connect.VerifierServiceFinishEnrolmentProcedure:
		return []string{roleAgent, roleRelyingParty}
	case verifierv1connect.VerifierServiceAppraiseProcedure:
		return []string{roleAgent}
	case verifierv1connect.VerifierServiceCheckProcedure:
		return []string{roleAgent, roleRelyingParty}
	case verifierv1connect.VerifierServiceCheckDevicesProcedure:
		return []string{roleRelyingParty}
	case verifierv1connect.VerifierServiceKeysProcedure:
		return []string{anyone}
	case EndorsementsPath:
		return []string{roleAgent}
	case KBSPath:
		return []string{roleBroker}
	case MetricsPath:
		return []string{roleOperator}
	}
	return nil
}

// Options are what Handler needs. The first three are required.
type Options struct {
	Verifier *verifier.Verifier
	// Identify returns the authenticated caller of a request.
	Identify func(*http.Request) (role, name string, err error)
	Log      *slog.Logger
	// FetchFailures counts the endorsements of a kind that could not be fetched.
	FetchFailures func(endorse.Kind) uint64
	// Reloads counts the changes of the configuration that were taken, and those
	// that were refused.
	Reloads func() (taken, refused uint64)
}

// Handler returns the verifier's HTTP handler.
func Handler(o Options) (http.Handler, error) { return handler(o, readTimeout, writeTimeout) }

func handler(o Options, read, write time.Duration) (http.Handler, error) {
	if o.Verifier == nil || o.Identify == nil || o.Log == nil {
		return nil, errors.New("verifier handler needs a verifier, a way to identify callers and a logger")
	}
	m := newMetrics(o)
	// Appraisal is arithmetic: more at a time than there are processors only
	// makes each take longer.
	g := &gate{log: o.Log, metrics: m, turns: make(chan struct{}, max(2, runtime.NumCPU()))}
	path, rpc := verifierv1connect.NewVerifierServiceHandler(&service{v: o.Verifier, log: o.Log, metrics: m},
		connect.WithReadMaxBytes(MaxMessage), connect.WithInterceptors(g))
	d := &door{o: o, metrics: m, calls: map[caller]int{}}
	mux := http.NewServeMux()
	mux.Handle(path, d.admit(rpc))
	mux.Handle("GET "+MetricsPath, d.admit(m.handler()))
	mux.Handle("POST "+EndorsementsPath, d.admit(endorsements(o.Verifier)))
	mux.Handle("POST "+KBSPath, d.admit(g.kbs(o.Verifier)))
	mux.HandleFunc("GET "+JWKSPath, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/jwk-set+json")
		w.Header().Set("Cache-Control", "max-age=300")
		_, _ = w.Write(o.Verifier.JWKS())
	})
	mux.HandleFunc("GET "+LivePath, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) })
	mux.Handle("GET "+ReadyPath, ready(o))
	return bounded(read, write, mux), nil
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

type caller struct{ role, name string }

func (c caller) String() string { return c.role + "/" + c.name }

type callerKey struct{}

func callerOf(ctx context.Context) caller {
	c, _ := ctx.Value(callerKey{}).(caller)
	return c
}

// door lets callers in before anything of their requests is read.
type door struct {
	o       Options
	metrics *metrics

	mu    sync.Mutex
	calls map[caller]int // guarded by mu; under way, none is 0
}

// admit puts the caller into the context, or answers 401. It refuses calls that
// the caller's role may not make, and more of them at a time than it may.
func (d *door) admit(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		role, name, err := d.o.Identify(r)
		if err != nil || role == "" || name == "" {
			unread(w, r)
			http.Error(w, "who you are could not be established", http.StatusUnauthorized)
			return
		}
		c := caller{role, name}
		if may := allowed(r.URL.Path); !slices.Contains(may, role) && !slices.Contains(may, anyone) {
			var l check.List
			l.Fail("role", "a role that may call this", role, "use an identity of another role")
			d.refuse(w, r, c, check.Refuse("authorize", l))
			return
		}
		if !d.enter(c) {
			d.refuse(w, r, c, errTooMany)
			return
		}
		defer d.leave(c)
		ctx := context.WithValue(r.Context(), callerKey{}, c)
		next.ServeHTTP(w, r.WithContext(endorse.WithCaller(ctx, c.String())))
	})
}

// refuse answers a call of which nothing but the head was read.
func (d *door) refuse(w http.ResponseWriter, r *http.Request, c caller, err error) {
	wire := wireError(err)
	d.metrics.call(r.URL.Path, c.role, wire, 0)
	d.o.Log.LogAttrs(r.Context(), slog.LevelWarn, "not answered", slog.String("call", r.URL.Path), slog.String("caller", c.String()), slog.String("error", err.Error()))
	unread(w, r)
	_ = connect.NewErrorWriter().Write(w, r, wire)
}

func (d *door) enter(c caller) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.calls[c] >= maxCalls {
		return false
	}
	d.calls[c]++
	return true
}

func (d *door) leave(c caller) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.calls[c]--; d.calls[c] == 0 {
		delete(d.calls, c)
	}
}

// unread keeps the server from reading the rest of a request before it answers,
// as it does in HTTP/1.1 to use the connection again.
func unread(w http.ResponseWriter, r *http.Request) {
	if r.ProtoMajor == 1 {
		w.Header().Set("Connection", "close")
	}
}

// gate bounds calls, and writes the access log, which holds no evidence and no
// secret.
type gate struct {
	log     *slog.Logger
	metrics *metrics
	// turns has a place for every call that is being worked on.
	turns chan struct{}
}

// WrapUnary implements connect.Interceptor. The request was read in full before
// it is called: a caller that sends slowly holds no turn.
func (g *gate) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		c, procedure, start := callerOf(ctx), req.Spec().Procedure, time.Now()
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		g.metrics.working.Inc()
		resp, err := g.call(ctx, req, next)
		g.metrics.working.Dec()
		attrs := []slog.Attr{slog.String("call", procedure), slog.String("caller", c.String()), slog.Duration("took", time.Since(start))}
		if err == nil {
			g.metrics.call(procedure, c.role, nil, time.Since(start))
			g.log.LogAttrs(ctx, slog.LevelInfo, "answered", attrs...)
			return resp, nil
		}
		wire := wireError(err)
		g.metrics.call(procedure, c.role, wire, time.Since(start))
		g.log.LogAttrs(ctx, slog.LevelWarn, "not answered", append(attrs, slog.String("error", err.Error()))...)
		return nil, wire
	}
}

func (g *gate) call(ctx context.Context, req connect.AnyRequest, next connect.UnaryFunc) (connect.AnyResponse, error) {
	select {
	case g.turns <- struct{}{}:
		defer func() { <-g.turns }()
	case <-ctx.Done():
		return nil, errors.Join(verifier.ErrBusy, ctx.Err())
	}
	return next(ctx, req)
}

// WrapStreamingClient implements connect.Interceptor.
func (g *gate) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

// WrapStreamingHandler refuses: no call of the verifier streams.
func (g *gate) WrapStreamingHandler(connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(context.Context, connect.StreamingHandlerConn) error {
		return connect.NewError(connect.CodeUnimplemented, errors.New("no streams here"))
	}
}

var errTooMany = fmt.Errorf("more than %d calls at a time by one caller", maxCalls)

// wireError tells the caller a refusal in full, what is wrong with its request,
// and of everything else only whether to try again.
func wireError(err error) *connect.Error {
	var r *check.Refusal
	switch {
	case errors.As(err, &r):
		return refusal.Encode(r)
	case errors.Is(err, verifier.ErrMalformed):
		return connect.NewError(connect.CodeInvalidArgument, err)
	case errors.Is(err, errTooMany):
		return connect.NewError(connect.CodeResourceExhausted, err)
	case errors.Is(err, verifier.ErrBusy):
		return connect.NewError(connect.CodeUnavailable, verifier.ErrBusy)
	case errors.Is(err, context.DeadlineExceeded):
		return connect.NewError(connect.CodeDeadlineExceeded, errors.New("the call took too long"))
	case errors.Is(err, context.Canceled):
		return connect.NewError(connect.CodeCanceled, errors.New("the call was cancelled"))
	}
	return connect.NewError(connect.CodeInternal, errors.New("internal error of the verifier; its log says which"))
}

type service struct {
	v       *verifier.Verifier
	log     *slog.Logger
	metrics *metrics
}

var _ verifierv1connect.VerifierServiceHandler = (*service)(nil)

func (s *service) Challenge(context.Context, *connect.Request[verifierv1.ChallengeRequest]) (*connect.Response[verifierv1.ChallengeResponse], error) {
	nonce, expires, err := s.v.Challenge()
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&verifierv1.ChallengeResponse{Nonce: nonce, VerifierId: s.v.ID(), ExpiresUnix: expires.Unix(), RulesDigest: string(s.v.Rules())}), nil
}

func (s *service) BeginEnrolment(_ context.Context, req *connect.Request[verifierv1.BeginEnrolmentRequest]) (*connect.Response[verifierv1.BeginEnrolmentResponse], error) {
	blob, secret, token, err := s.v.BeginEnrolment(req.Msg.GetEkChain(), req.Msg.GetAkPublic())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&verifierv1.BeginEnrolmentResponse{CredentialBlob: blob, EncryptedSecret: secret, Enrolment: token}), nil
}

func (s *service) FinishEnrolment(_ context.Context, req *connect.Request[verifierv1.FinishEnrolmentRequest]) (*connect.Response[verifierv1.FinishEnrolmentResponse], error) {
	credential, err := s.v.FinishEnrolment(req.Msg.GetEnrolment(), req.Msg.GetSecret())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&verifierv1.FinishEnrolmentResponse{AkCredential: credential}), nil
}

func (s *service) Appraise(ctx context.Context, req *connect.Request[verifierv1.AppraiseRequest]) (*connect.Response[verifierv1.AppraiseResponse], error) {
	token, r, err := s.v.Appraise(ctx, req.Msg.GetEvidence(), req.Msg.GetAudience())
	if err != nil {
		return nil, err
	}
	s.tell(ctx, req.Spec().Procedure, r)
	return connect.NewResponse(&verifierv1.AppraiseResponse{Result: token}), nil
}

func (s *service) Check(ctx context.Context, req *connect.Request[verifierv1.CheckRequest]) (*connect.Response[verifierv1.CheckResponse], error) {
	token, r, err := s.v.Check(ctx, req.Msg.GetEvidence(), req.Msg.GetAudience(), req.Msg.GetNonce())
	if err != nil {
		return nil, err
	}
	s.tell(ctx, req.Spec().Procedure, r)
	return connect.NewResponse(&verifierv1.CheckResponse{Result: token}), nil
}

// tell says how an appraisal came out: which job, and which checks failed.
func (s *service) tell(ctx context.Context, procedure string, r receipt.Result) {
	s.metrics.result(procedure, callerOf(ctx).role, r)
	failed := failedIDs(r)
	s.log.LogAttrs(ctx, slog.LevelInfo, "appraised", slog.String("job", r.JobID), slog.String("plan", string(r.PlanDigest)), slog.String("result", r.ID), slog.String("call", procedure),
		slog.String("audience", r.Audience), slog.Bool("simulated", r.Simulated), slog.Bool("accepted", len(failed) == 0), slog.Any("failed", failed))
}

// failedIDs are the checks that failed, each once.
func failedIDs(r receipt.Result) []string {
	failed := []string{}
	for _, c := range r.AllChecks().Failed() {
		if !slices.Contains(failed, c.ID) {
			failed = append(failed, c.ID)
		}
	}
	return failed
}

func (s *service) Keys(context.Context, *connect.Request[verifierv1.KeysRequest]) (*connect.Response[verifierv1.KeysResponse], error) {
	return connect.NewResponse(&verifierv1.KeysResponse{Jwks: s.v.JWKS()}), nil
}
