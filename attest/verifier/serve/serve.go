// Package serve answers coffer.verifier.v1 over a verifier.
//
// Trusted: who Identify says a caller is. Checked: that the caller's role may
// make the call, the size of what it sends, and how long it takes to send it.
// Not checked: evidence; attest/verifier does that.
package serve

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"runtime"
	"slices"
	"time"

	"connectrpc.com/connect"

	"github.com/coffer-run/coffer/attest/api/refusal"
	verifierv1 "github.com/coffer-run/coffer/attest/api/verifier/v1"
	"github.com/coffer-run/coffer/attest/api/verifier/v1/verifierv1connect"
	"github.com/coffer-run/coffer/attest/check"
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
)

// JWKSPath is where the verifier's keys are published.
const JWKSPath = "/.well-known/jwks.json"

// HealthPath answers 200 while the verifier serves.
const HealthPath = "/healthz"

// roles that may exist; those that may attest are fewer.
const roleAgent = "agent"

// allowed says whether a role may make a call. A call that is not listed is
// refused.
func allowed(procedure, role string) bool {
	switch procedure {
	case verifierv1connect.VerifierServiceChallengeProcedure,
		verifierv1connect.VerifierServiceBeginEnrolmentProcedure,
		verifierv1connect.VerifierServiceFinishEnrolmentProcedure,
		verifierv1connect.VerifierServiceAppraiseProcedure:
		return role == roleAgent
	case verifierv1connect.VerifierServiceKeysProcedure:
		// Public keys, for whoever has an identity at all.
		return true
	}
	return false
}

// Options are what Handler needs. All are required.
type Options struct {
	Verifier *verifier.Verifier
	// Identify returns the authenticated caller of a request.
	Identify func(*http.Request) (role, name string, err error)
	Log      *slog.Logger
}

// Handler returns the verifier's HTTP handler.
func Handler(o Options) (http.Handler, error) {
	if o.Verifier == nil || o.Identify == nil || o.Log == nil {
		return nil, errors.New("verifier handler needs a verifier, a way to identify callers and a logger")
	}
	// Appraisal is arithmetic: more at a time than there are processors only
	// makes each take longer.
	g := &gate{log: o.Log, turns: make(chan struct{}, max(2, runtime.NumCPU()))}
	mux := http.NewServeMux()
	path, rpc := verifierv1connect.NewVerifierServiceHandler(&service{v: o.Verifier, log: o.Log},
		connect.WithReadMaxBytes(MaxMessage), connect.WithInterceptors(g))
	mux.Handle(path, identify(o.Identify, rpc))
	mux.HandleFunc("GET "+JWKSPath, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/jwk-set+json")
		w.Header().Set("Cache-Control", "max-age=300")
		_, _ = w.Write(o.Verifier.JWKS())
	})
	mux.HandleFunc("GET "+HealthPath, func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte("ok\n"))
	})
	return bounded(mux), nil
}

// bounded limits every request's size and the time that its caller may take.
func bounded(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		now := time.Now()
		// Not every ResponseWriter has deadlines; the daemon's does.
		_ = rc.SetReadDeadline(now.Add(readTimeout))
		_ = rc.SetWriteDeadline(now.Add(writeTimeout))
		// Larger than MaxMessage by the framing of a compressed message.
		r.Body = http.MaxBytesReader(w, r.Body, MaxMessage+64<<10)
		next.ServeHTTP(w, r)
	})
}

type caller struct{ role, name string }

type callerKey struct{}

// identify puts the caller into the context, or answers 401.
func identify(who func(*http.Request) (role, name string, err error), next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		role, name, err := who(r)
		if err != nil || role == "" || name == "" {
			http.Error(w, "who you are could not be established", http.StatusUnauthorized)
			return
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), callerKey{}, caller{role, name})))
	})
}

// gate checks roles, bounds calls, and writes the access log, which holds no
// evidence and no secret.
type gate struct {
	log *slog.Logger
	// turns has a place for every call that is being worked on.
	turns chan struct{}
}

// WrapUnary implements connect.Interceptor. The request was read in full before
// it is called: a caller that sends slowly holds no turn.
func (g *gate) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		c, _ := ctx.Value(callerKey{}).(caller)
		procedure, start := req.Spec().Procedure, time.Now()
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		resp, err := g.call(ctx, c, req, next)
		attrs := []slog.Attr{slog.String("call", procedure), slog.String("caller", c.role+"/"+c.name), slog.Duration("took", time.Since(start))}
		if err == nil {
			g.log.LogAttrs(ctx, slog.LevelInfo, "answered", attrs...)
			return resp, nil
		}
		g.log.LogAttrs(ctx, slog.LevelWarn, "not answered", append(attrs, slog.String("error", err.Error()))...)
		return nil, wireError(err)
	}
}

func (g *gate) call(ctx context.Context, c caller, req connect.AnyRequest, next connect.UnaryFunc) (connect.AnyResponse, error) {
	if !allowed(req.Spec().Procedure, c.role) {
		var l check.List
		l.Fail("role", roleAgent, c.role, "use an identity of a role that may call this")
		return nil, check.Refuse("authorize", l)
	}
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

// wireError tells the caller a refusal in full, what is wrong with its request,
// and of everything else only whether to try again.
func wireError(err error) *connect.Error {
	var r *check.Refusal
	switch {
	case errors.As(err, &r):
		return refusal.Encode(r)
	case errors.Is(err, verifier.ErrMalformed):
		return connect.NewError(connect.CodeInvalidArgument, err)
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
	v   *verifier.Verifier
	log *slog.Logger
}

var _ verifierv1connect.VerifierServiceHandler = (*service)(nil)

func (s *service) Challenge(context.Context, *connect.Request[verifierv1.ChallengeRequest]) (*connect.Response[verifierv1.ChallengeResponse], error) {
	nonce, expires, err := s.v.Challenge()
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&verifierv1.ChallengeResponse{Nonce: nonce, VerifierId: s.v.ID(), ExpiresUnix: expires.Unix()}), nil
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
	s.logResult(ctx, r)
	return connect.NewResponse(&verifierv1.AppraiseResponse{Result: token}), nil
}

// logResult says how an appraisal came out: which job, and which checks failed.
func (s *service) logResult(ctx context.Context, r receipt.Result) {
	failed := []string{}
	for _, c := range r.AllChecks().Failed() {
		if !slices.Contains(failed, c.ID) {
			failed = append(failed, c.ID)
		}
	}
	s.log.LogAttrs(ctx, slog.LevelInfo, "appraised", slog.String("job", r.JobID), slog.String("plan", string(r.PlanDigest)), slog.String("result", r.ID),
		slog.String("audience", r.Audience), slog.Bool("simulated", r.Simulated), slog.Bool("accepted", len(failed) == 0), slog.Any("failed", failed))
}

func (s *service) Keys(context.Context, *connect.Request[verifierv1.KeysRequest]) (*connect.Response[verifierv1.KeysResponse], error) {
	return connect.NewResponse(&verifierv1.KeysResponse{Jwks: s.v.JWKS()}), nil
}
