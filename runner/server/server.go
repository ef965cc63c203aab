// Package server answers the agent's API for those who run, follow and audit jobs.
//
// Trusted: the identity that Identify reads from a verified client certificate or token.
// Checked: the role for each call, that an engineer's or scheduler's job is its own
// where its end is concerned, that a log is for who reads it, sizes, and how much one caller
// asks for. Not trusted: job files.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/oklog/ulid/v2"
	"google.golang.org/protobuf/proto"

	"github.com/coffer-run/coffer/attest/api/refusal"
	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/runner"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/api/agent/v1/agentv1connect"
	"github.com/coffer-run/coffer/runner/jobspec"
	"github.com/coffer-run/coffer/runner/journal"
	"github.com/coffer-run/coffer/runner/remote"
)

const (
	maxRequest  = jobspec.MaxSize + 4<<10
	defaultPage = 50
	maxPage     = 500
	eventPage   = 1000

	// What the header Retry-After says, in seconds: for a caller that asks for too much, and where too
	// many jobs wait.
	retrySoon = "1"
	retryFull = "30"
)

// Identify says who sent a request. A *check.Refusal is answered with its checks.
type Identify func(*http.Request) (Caller, error)

// ErrUnavailable is what Identify's errors wrap when nobody could tell: ask again.
var ErrUnavailable = errors.New("who calls cannot be established at this moment")

// GPUInfo is what Capacity says of the GPUs.
type GPUInfo struct {
	Driver string
	CCMode string
}

// New returns the API's handler. Nobody may call where limits are zero.
func New(agent *runner.Agent, gpu GPUInfo, identify Identify, limits Limits, log *slog.Logger) (http.Handler, error) {
	if agent == nil || identify == nil || log == nil {
		return nil, errors.New("agent server: a part is missing")
	}
	s, m, q := &server{agent: agent, gpu: gpu}, newMetrics(agent), newQuota(limits)
	path, h := agentv1connect.NewAgentServiceHandler(s, connect.WithReadMaxBytes(maxRequest), connect.WithInterceptors(&guard{log, m}))
	mux := http.NewServeMux()
	answer := connect.NewErrorWriter()
	// known finds out who calls, and answers those who may not or who ask for too much.
	known := func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			c, err := identify(r)
			var refused *check.Refusal
			switch {
			case errors.As(err, &refused):
				log.WarnContext(r.Context(), "not answered", slog.String("call", r.URL.Path), slog.Any("error", err))
				_ = answer.Write(w, r, refusal.Encode(refused))
				return
			case errors.Is(err, ErrUnavailable):
				_ = answer.Write(w, r, connect.NewError(connect.CodeUnavailable, err))
				return
			case err != nil || c.Principal == "":
				http.Error(w, "who you are could not be established", http.StatusUnauthorized)
				return
			}
			done, over := q.take(c.Principal, streams(r.URL.Path))
			if over != "" {
				err := later(fmt.Errorf("%s of %s: come back later", over, c.Principal), retrySoon)
				m.call(r.URL.Path, err, 0)
				_ = answer.Write(w, r, err)
				return
			}
			defer done()
			next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), callerKey{}, c)))
		})
	}
	mux.Handle(path, known(h))
	mux.Handle("GET "+metricsPath, known(operators(m.handler())))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) })
	return mux, nil
}

// allowed lists which roles may make which call. A call that is not listed is
// nobody's.
var allowed = map[string][]string{
	agentv1connect.AgentServicePlanProcedure:     {roleEngineer, roleOwner, roleAuditor, roleScheduler},
	agentv1connect.AgentServiceSubmitProcedure:   {roleEngineer, roleScheduler},
	agentv1connect.AgentServiceGetProcedure:      {roleEngineer, roleOwner, roleOperator, roleAuditor, roleScheduler},
	agentv1connect.AgentServiceListProcedure:     {roleEngineer, roleOwner, roleOperator, roleAuditor, roleScheduler},
	agentv1connect.AgentServiceWatchProcedure:    {roleEngineer, roleScheduler},
	agentv1connect.AgentServiceCancelProcedure:   {roleEngineer, roleOperator, roleScheduler},
	agentv1connect.AgentServiceLogsProcedure:     {roleEngineer, roleScheduler, roleOwner},
	agentv1connect.AgentServiceBundleProcedure:   {roleEngineer, roleOwner, roleAuditor, roleScheduler},
	agentv1connect.AgentServiceCapacityProcedure: {roleEngineer, roleOwner, roleOperator, roleAuditor, roleScheduler},
}

// operators lets operators alone through.
func operators(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if c := callerOf(r.Context()); c.Principal == "" || !slices.Contains(c.Roles, roleOperator) {
			http.Error(w, "this is for operators", http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// later is the answer to who may ask again after some seconds.
func later(err error, seconds string) *connect.Error {
	out := connect.NewError(connect.CodeResourceExhausted, err)
	out.Meta().Set("Retry-After", seconds)
	return out
}

// guard refuses calls by role, counts them, and turns errors into codes.
type guard struct {
	log     *slog.Logger
	metrics *metrics
}

func (g *guard) check(ctx context.Context, procedure string) error {
	c := callerOf(ctx)
	if c.Principal == "" {
		return connect.NewError(connect.CodeUnauthenticated, errors.New("no identity"))
	}
	if len(c.may(procedure)) == 0 {
		return connect.NewError(connect.CodePermissionDenied, fmt.Errorf("%s has none of the roles that may do this: %s", c.Principal, strings.Join(allowed[procedure], ", ")))
	}
	return nil
}

func (g *guard) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (res connect.AnyResponse, err error) {
		err = g.counted(ctx, req.Spec().Procedure, func(ctx context.Context) error {
			if err := g.check(ctx, req.Spec().Procedure); err != nil {
				return err
			}
			if res, err = next(ctx, req); err != nil {
				g.log.WarnContext(ctx, "call failed", slog.String("call", req.Spec().Procedure), slog.Any("error", err))
				return coded(err)
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
		return res, nil
	}
}

func (g *guard) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

func (g *guard) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		return g.counted(ctx, conn.Spec().Procedure, func(ctx context.Context) error {
			if err := g.check(ctx, conn.Spec().Procedure); err != nil {
				return err
			}
			if err := next(ctx, conn); err != nil {
				return coded(err)
			}
			return nil
		})
	}
}

func coded(err error) error {
	var already *connect.Error
	var refused *check.Refusal
	var away *remote.Unavailable
	var file *jobspec.Error
	if own, ok := err.(*connect.Error); ok { //nolint:errorlint // this very error: around another is text that would be lost
		return own
	}
	switch {
	case errors.As(err, &refused):
		return refusal.Encode(refused)
	case errors.As(err, &file):
		return connect.NewError(connect.CodeInvalidArgument, err)
	case errors.Is(err, journal.ErrNotFound):
		return connect.NewError(connect.CodeNotFound, err)
	case errors.Is(err, journal.ErrConflict):
		return connect.NewError(connect.CodeAlreadyExists, err)
	case errors.Is(err, runner.ErrFull), runner.NoSpace(err):
		return later(err, retryFull)
	case errors.As(err, &away), errors.Is(err, context.Canceled):
		// A stream is cancelled where its caller has gone, and where the agent ends: who
		// watches then asks the next agent.
		return connect.NewError(connect.CodeUnavailable, err)
	case errors.Is(err, context.DeadlineExceeded):
		return connect.NewError(connect.CodeDeadlineExceeded, err)
	case errors.As(err, &already) && already.Code() != connect.CodeUnknown:
		return connect.NewError(already.Code(), err)
	default:
		return connect.NewError(connect.CodeFailedPrecondition, err)
	}
}

type server struct {
	agent *runner.Agent
	gpu   GPUInfo
}

func (s *server) Plan(ctx context.Context, r *connect.Request[agentv1.PlanRequest]) (*connect.Response[agentv1.PlanResponse], error) {
	if !r.Msg.GetPredict() {
		d, p, err := s.agent.Plan(ctx, r.Msg.GetJobFile())
		if err != nil {
			return nil, err
		}
		return connect.NewResponse(&agentv1.PlanResponse{PlanDigest: string(d), Plan: p}), nil
	}
	d, p, said, err := s.agent.Predict(ctx, r.Msg.GetJobFile())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&agentv1.PlanResponse{PlanDigest: string(d), Plan: p, Prediction: prediction(said), Lacks: s.agent.Lacking(r.Msg.GetJobFile(), p)}), nil
}

func prediction(p runner.Prediction) *agentv1.Prediction {
	switch {
	case p.Unknown != "":
		return &agentv1.Prediction{Verdict: "unknown", Unknown: p.Unknown}
	case p.Accepted:
		return &agentv1.Prediction{Verdict: "accepted", Simulated: p.Simulated}
	}
	return &agentv1.Prediction{Verdict: "refused", Simulated: p.Simulated, Failed: runner.Checks(p.Failed)}
}

var keyForm = regexp.MustCompile(`^[!-~]{0,128}$`)

func (s *server) Submit(ctx context.Context, r *connect.Request[agentv1.SubmitRequest]) (*connect.Response[agentv1.SubmitResponse], error) {
	if !keyForm.MatchString(r.Msg.GetIdempotencyKey()) {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("idempotency key: want at most 128 printable ASCII characters without spaces"))
	}
	row, err := s.agent.Submit(ctx, callerOf(ctx).Principal, r.Msg.GetJobFile(), r.Msg.GetIdempotencyKey())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&agentv1.SubmitResponse{Job: s.describe(row), Lacks: s.agent.Lacking(r.Msg.GetJobFile(), row.Plan)}), nil
}

func (s *server) Get(ctx context.Context, r *connect.Request[agentv1.GetRequest]) (*connect.Response[agentv1.GetResponse], error) {
	row, err := s.agent.Journal.Job(ctx, r.Msg.GetId())
	if err != nil {
		return nil, err
	}
	j := s.describe(row)
	// What a job reports is its output.
	if c := callerOf(ctx); !c.ofOwnOnly(agentv1connect.AgentServiceWatchProcedure) || c.Principal == row.Submitter {
		m, err := s.agent.Reported(ctx, row.ID)
		if err != nil {
			return nil, err
		}
		j.Metrics, j.MetricsCut = runner.Metrics(m), m.Cut
		j.Going, j.Assets = s.agent.Progress(ctx, row.ID), runner.AssetsOf(row.Plan)
	}
	return connect.NewResponse(&agentv1.GetResponse{Job: j}), nil
}

func (s *server) List(ctx context.Context, r *connect.Request[agentv1.ListRequest]) (*connect.Response[agentv1.ListResponse], error) {
	n := int(r.Msg.GetPageSize())
	switch {
	case n < 0:
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("page size: want 0 or more"))
	case n == 0:
		n = defaultPage
	}
	n = min(n, maxPage)
	if token := r.Msg.GetPageToken(); token != "" {
		if _, err := ulid.ParseStrict(token); err != nil {
			return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("page token: want the one that came with the page before"))
		}
	}
	var rows []journal.Job
	var err error
	state := journal.State(r.Msg.GetState())
	if state != "" && !state.Known() {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("state %.20q: want %s, %s, %s, %s, %s or %s", state, journal.Queued, journal.Running, journal.Succeeded, journal.Failed, journal.Refused, journal.Cancelled))
	}
	if state == "" {
		rows, err = s.agent.Journal.Jobs(ctx, r.Msg.GetPageToken(), n+1)
	} else {
		rows, err = s.agent.Journal.JobsIn(ctx, state, r.Msg.GetPageToken(), n+1)
	}
	if err != nil {
		return nil, err
	}
	out := &agentv1.ListResponse{}
	if len(rows) > n {
		rows = rows[:n]
		out.NextPageToken = rows[n-1].ID
	}
	for _, row := range rows {
		out.Jobs = append(out.Jobs, s.describe(row))
	}
	return connect.NewResponse(out), nil
}

// own finds a job whose output or end the caller may have: an engineer has those
// of the jobs that the same engineer submitted.
func (s *server) own(ctx context.Context, id, procedure string) (journal.Job, error) {
	row, err := s.agent.Journal.Job(ctx, id)
	if err != nil {
		return journal.Job{}, err
	}
	if c := callerOf(ctx); c.ofOwnOnly(procedure) && c.Principal != row.Submitter {
		return journal.Job{}, connect.NewError(connect.CodePermissionDenied, fmt.Errorf("job %s is not %s's", id, c.Principal))
	}
	return row, nil
}

// Watch sends what is in memory, or, for a job that an earlier agent ended, what
// is in the journal, and ends when nothing more can come.
func (s *server) Watch(ctx context.Context, r *connect.Request[agentv1.WatchRequest], out *connect.ServerStream[agentv1.WatchResponse]) error {
	id, after := r.Msg.GetId(), r.Msg.GetAfterSequence()
	if _, err := s.own(ctx, id, agentv1connect.AgentServiceWatchProcedure); err != nil {
		return err
	}
	feed := s.agent.Feed(id)
	if feed == nil {
		return s.watchJournal(ctx, id, after, out)
	}
	told := progress{of: func(ctx context.Context) []*agentv1.Progress { return s.agent.Progress(ctx, id) }}
	if r.Msg.GetProgress() {
		ticker := time.NewTicker(progressEvery)
		defer ticker.Stop()
		told.tick = ticker.C
	}
	for {
		events, closed, more := feed.After(after)
		for _, e := range events {
			if err := out.Send(e); err != nil {
				return err
			}
			after = e.GetSequence()
		}
		if closed && len(events) == 0 {
			return nil
		}
		if closed {
			continue
		}
		select {
		case <-more:
		case <-told.tick:
			if e := told.next(ctx); e != nil {
				w := &agentv1.WatchResponse{Sequence: after, TimeUnixNano: time.Now().UnixNano(), Event: &agentv1.WatchResponse_Progress{Progress: e}}
				if err := out.Send(w); err != nil {
					return err
				}
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (s *server) watchJournal(ctx context.Context, id string, after uint64, out *connect.ServerStream[agentv1.WatchResponse]) error {
	for {
		events, err := s.agent.Journal.Events(ctx, id, after, eventPage)
		if err != nil || len(events) == 0 {
			return err
		}
		for _, e := range events {
			var w agentv1.WatchResponse
			if err := proto.Unmarshal(e.Body, &w); err != nil {
				return fmt.Errorf("event %d of job %s: %w", e.Sequence, id, err)
			}
			if err := out.Send(&w); err != nil {
				return err
			}
			after = e.Sequence
		}
	}
}

func (s *server) Cancel(ctx context.Context, r *connect.Request[agentv1.CancelRequest]) (*connect.Response[agentv1.CancelResponse], error) {
	if _, err := s.own(ctx, r.Msg.GetId(), agentv1connect.AgentServiceCancelProcedure); err != nil {
		return nil, err
	}
	row, err := s.agent.Cancel(ctx, r.Msg.GetId())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&agentv1.CancelResponse{Job: s.describe(row)}), nil
}

// describe is a job with what the agent knows of its lease while it runs.
func (s *server) describe(row journal.Job) *agentv1.Job {
	j := runner.Describe(row)
	if row.State.Final() {
		return j
	}
	until, stopping := s.agent.Lease(row.ID)
	if !until.IsZero() {
		j.LeaseUntilUnix = until.Unix()
	}
	j.Stopping = stopping
	if row.Stage == string(bundle.StageApproval) {
		if spec, err := jobspec.Parse(row.JobFile); err == nil {
			j.ExpectedApprovals = spec.Approvals
		}
	}
	if newest, next, paused := s.agent.Attested(row.ID); !next.IsZero() {
		j.AttestedUnix, j.AttestsUnix, j.Paused = newest.Unix(), next.Unix(), paused
	}
	j.Queue = s.agent.QueueOf(row.ID)
	j.Gang, j.GangJobs = s.agent.Gang(row.ID)
	if position, lacks := s.agent.Waits(row.ID); position > 0 {
		j.QueuePosition, j.WaitsFor = int32(position), lacks //nolint:gosec // a small number
	}
	return j
}

func (s *server) Bundle(ctx context.Context, r *connect.Request[agentv1.BundleRequest]) (*connect.Response[agentv1.BundleResponse], error) {
	row, err := s.own(ctx, r.Msg.GetId(), agentv1connect.AgentServiceBundleProcedure)
	if err != nil {
		return nil, err
	}
	if !row.State.Final() {
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("job %s is %s: its bundle is there when it has ended", row.ID, row.State))
	}
	b, err := s.agent.Journal.Bundle(ctx, row.ID)
	if err != nil {
		return nil, fmt.Errorf("bundle of job %s: %w", row.ID, err)
	}
	if len(b) > bundle.MaxSize {
		return nil, fmt.Errorf("bundle of job %s has %d bytes", row.ID, len(b))
	}
	return connect.NewResponse(&agentv1.BundleResponse{Bundle: b}), nil
}

func (s *server) Capacity(ctx context.Context, r *connect.Request[agentv1.CapacityRequest]) (*connect.Response[agentv1.CapacityResponse], error) {
	l := s.agent.Load()
	out := &agentv1.CapacityResponse{
		Node: s.agent.Name, Version: s.agent.Version, Image: s.agent.Fetching(r.Msg.GetImage()),
		CpuMillis: int32(l.Total.CPUMillis), MemoryBytes: l.Total.MemoryBytes, Gpus: int32(l.GPUs), GpuDriver: s.gpu.Driver, GpuCcMode: s.gpu.CCMode, //nolint:gosec // small counts
		Running: int32(l.Running), Queued: int32(l.Waiting), MaxRunning: int32(l.Total.Jobs), //nolint:gosec // small counts
		FreeCpuMillis: int32(l.Free.CPUMillis), FreeMemoryBytes: l.Free.MemoryBytes, FreeGpus: int32(l.FreeGPUs), //nolint:gosec // small counts
	}
	for _, q := range s.agent.Queues() {
		out.Queues = append(out.Queues, &agentv1.Queue{
			Name: q.Name, Weight: int32(q.Weight), Yours: q.Admits(callerOf(ctx).Principal), Running: int32(q.Used.Jobs), Waiting: int32(q.Waiting), //nolint:gosec // small counts
			MaxRunning: int32(q.Limit.Jobs), MaxGpus: int32(q.Limit.GPUs), MaxCpuMillis: int32(q.Limit.CPUMillis), MaxMemoryBytes: q.Limit.MemoryBytes, //nolint:gosec // checked when they were read
		})
	}
	if at := l.Attested; !at.Until.IsZero() {
		out.Attested = &agentv1.Attested{AtUnix: at.At.Unix(), UntilUnix: at.Until.Unix(), Policy: at.Policy.Name, PolicyDigest: string(at.Policy.Digest), Simulated: at.Simulated}
	}
	return connect.NewResponse(out), nil
}
