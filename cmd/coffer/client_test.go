package main

import (
	"bytes"
	"context"
	"crypto/hpke"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/api/broker/v1/brokerv1connect"
	"github.com/coffer-run/coffer/attest/api/refusal"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/enclave/seal"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/pki"
	"github.com/coffer-run/coffer/internal/loopback"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/api/agent/v1/agentv1connect"
)

// fakeStack is a stack's folder and its two services, played in this process.
type fakeStack struct {
	t      *testing.T
	dir    string
	agent  *fakeAgent
	broker *fakeBroker
	// stopAgent and stopBroker end their listeners.
	stopAgent, stopBroker func()
	// seen is told of everything on standard output.
	seen func(string)
	// answer is what both services answer every call with; nil for their own answers.
	answer atomic.Pointer[connect.Error]
}

// answers stands before a service.
func (s *fakeStack) answers(next http.Handler) http.Handler {
	write := connect.NewErrorWriter()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := s.answer.Load(); err != nil {
			_ = write.Write(w, r, err)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// fakeAgent tells a script of events.
type fakeAgent struct {
	agentv1connect.UnimplementedAgentServiceHandler
	mu     sync.Mutex
	jobs   map[string]*agentv1.Job
	events []*agentv1.WatchResponse
	// hold keeps a stream open after the last event, until closed.
	hold chan struct{}
	// cut ends a stream after that many events, once; abort does it as a killed
	// agent would.
	cut     int
	abort   bool
	refuse  *check.Refusal
	keys    []string
	callers []string
	// submitted are job files; bundle is the bundle of every job.
	submitted [][]byte
	bundle    []byte
	sealed    []byte
	cancelled []string
	onCancel  func()
	// lacks is what the node lacks for every job.
	lacks []string
	// attested is the node's newest result.
	attested *agentv1.Attested
}

func (a *fakeAgent) Plan(_ context.Context, r *connect.Request[agentv1.PlanRequest]) (*connect.Response[agentv1.PlanResponse], error) {
	if bytes.Contains(r.Msg.GetJobFile(), []byte("bogus")) {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("line 3: bogus: unknown field, allowed are name and image"))
	}
	p := []byte(`{"name":"demo"}`)
	if bytes.Contains(r.Msg.GetJobFile(), []byte("inputs:")) {
		p = []byte(`{"name":"demo","inputs":[{"asset":"data"},{"asset":"model"},{"asset":"held"}],"checkpoints":{"asset":"ckpt"}}`)
	}
	return connect.NewResponse(&agentv1.PlanResponse{PlanDigest: string(plan.Sum(p)), Plan: p, Lacks: a.lacks}), nil
}

func (a *fakeAgent) Submit(_ context.Context, r *connect.Request[agentv1.SubmitRequest]) (*connect.Response[agentv1.SubmitResponse], error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.keys = append(a.keys, r.Msg.GetIdempotencyKey())
	a.submitted = append(a.submitted, r.Msg.GetJobFile())
	if a.refuse != nil {
		return nil, refusal.Encode(a.refuse)
	}
	return connect.NewResponse(&agentv1.SubmitResponse{Job: a.jobs["job-1"], Lacks: a.lacks}), nil
}

func (a *fakeAgent) Get(_ context.Context, r *connect.Request[agentv1.GetRequest]) (*connect.Response[agentv1.GetResponse], error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	j := a.jobs[r.Msg.GetId()]
	if j == nil {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("no such job"))
	}
	return connect.NewResponse(&agentv1.GetResponse{Job: j}), nil
}

func (a *fakeAgent) List(_ context.Context, r *connect.Request[agentv1.ListRequest]) (*connect.Response[agentv1.ListResponse], error) {
	if want := r.Msg.GetState(); want != "" {
		var jobs []*agentv1.Job
		for _, j := range a.jobs {
			if j.GetState() == want {
				jobs = append(jobs, j)
			}
		}
		return connect.NewResponse(&agentv1.ListResponse{Jobs: jobs}), nil
	}
	if r.Msg.GetPageToken() == "" {
		return connect.NewResponse(&agentv1.ListResponse{Jobs: []*agentv1.Job{a.jobs["job-1"]}, NextPageToken: "2"}), nil
	}
	return connect.NewResponse(&agentv1.ListResponse{Jobs: []*agentv1.Job{{Id: "job-0", Name: "evil\x1b[2Jname", State: "failed"}}}), nil
}

func (a *fakeAgent) Cancel(_ context.Context, r *connect.Request[agentv1.CancelRequest]) (*connect.Response[agentv1.CancelResponse], error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.cancelled = append(a.cancelled, r.Msg.GetId())
	if a.onCancel != nil {
		a.onCancel()
	}
	return connect.NewResponse(&agentv1.CancelResponse{Job: &agentv1.Job{Id: r.Msg.GetId(), State: "cancelled"}}), nil
}

func (a *fakeAgent) Bundle(_ context.Context, _ *connect.Request[agentv1.BundleRequest]) (*connect.Response[agentv1.BundleResponse], error) {
	if a.bundle != nil {
		return connect.NewResponse(&agentv1.BundleResponse{Bundle: a.bundle}), nil
	}
	return connect.NewResponse(&agentv1.BundleResponse{Bundle: []byte("{}\n")}), nil
}

func (a *fakeAgent) Watch(ctx context.Context, r *connect.Request[agentv1.WatchRequest], s *connect.ServerStream[agentv1.WatchResponse]) error {
	a.mu.Lock()
	cut := a.cut
	a.cut = 0
	a.mu.Unlock()
	sent := 0
	for _, e := range a.events {
		if e.GetSequence() <= r.Msg.GetAfterSequence() {
			continue
		}
		if cut > 0 && sent == cut && a.abort {
			panic(http.ErrAbortHandler)
		}
		if cut > 0 && sent == cut {
			return connect.NewError(connect.CodeUnavailable, errors.New("shutting down"))
		}
		if err := s.Send(e); err != nil {
			return err
		}
		sent++
	}
	if a.hold != nil {
		select {
		case <-a.hold:
		case <-ctx.Done():
		}
	}
	return nil
}

// Logs sends what the events say was printed, as they were printed a second apart.
func (a *fakeAgent) Logs(_ context.Context, r *connect.Request[agentv1.LogsRequest], s *connect.ServerStream[agentv1.LogsResponse]) error {
	a.mu.Lock()
	cut := a.cut
	a.cut = 0
	a.mu.Unlock()
	if a.jobs[r.Msg.GetId()] == nil {
		return connect.NewError(connect.CodeNotFound, errors.New("no such job"))
	}
	after := map[string]int64{"stdout": r.Msg.GetStdoutOffset(), "stderr": r.Msg.GetStderrOffset()}
	sent := 0
	for i, e := range a.events {
		l := e.GetLog()
		if l == nil || l.GetOffset() < after[l.GetStream()] {
			continue
		}
		if cut > 0 && sent == cut && a.abort {
			panic(http.ErrAbortHandler)
		}
		if cut > 0 && sent == cut {
			return connect.NewError(connect.CodeUnavailable, errors.New("shutting down"))
		}
		if err := s.Send(&agentv1.LogsResponse{Log: l, TimeUnixNano: time.Unix(1_800_000_000+int64(i), 0).UnixNano()}); err != nil {
			return err
		}
		sent++
	}
	if len(a.sealed) > 0 {
		return s.Send(&agentv1.LogsResponse{Sealed: a.sealed})
	}
	return nil
}

func (a *fakeAgent) Capacity(context.Context, *connect.Request[agentv1.CapacityRequest]) (*connect.Response[agentv1.CapacityResponse], error) {
	return connect.NewResponse(&agentv1.CapacityResponse{Gpus: 2, FreeGpus: 1, MemoryBytes: 4 << 30, FreeMemoryBytes: 3 << 30, Running: 1, Attested: a.attested}), nil
}

// printed numbers the events and gives what was printed its place in its stream.
func printed(events ...*agentv1.WatchResponse) []*agentv1.WatchResponse {
	at := map[string]int64{}
	for i, e := range events {
		e.Sequence = uint64(i) + 1
		if l := e.GetLog(); l != nil {
			l.Offset = at[l.GetStream()]
			at[l.GetStream()] += int64(len(l.GetData()))
		}
	}
	return events
}

// fakeBroker keeps assets in memory and can open what owners wrap.
type fakeBroker struct {
	brokerv1connect.UnimplementedBrokerServiceHandler
	key    hpke.PrivateKey
	mu     sync.Mutex
	assets []*brokerv1.Asset
	wraps  map[string][2][]byte
	refuse bool
	// grants answers what lists grants; nil for one that waits for people.
	grants func(*brokerv1.ListGrantsRequest) (*connect.Response[brokerv1.ListGrantsResponse], error)
}

func (b *fakeBroker) Info(context.Context, *connect.Request[brokerv1.InfoRequest]) (*connect.Response[brokerv1.InfoResponse], error) {
	return connect.NewResponse(&brokerv1.InfoResponse{BrokerId: "b", OwnerWrapKey: b.key.PublicKey().Bytes(), Simulation: true}), nil
}

func (b *fakeBroker) ListAssets(context.Context, *connect.Request[brokerv1.ListAssetsRequest]) (*connect.Response[brokerv1.ListAssetsResponse], error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return connect.NewResponse(&brokerv1.ListAssetsResponse{Assets: b.assets}), nil
}

func (b *fakeBroker) CreateAsset(_ context.Context, r *connect.Request[brokerv1.CreateAssetRequest]) (*connect.Response[brokerv1.CreateAssetResponse], error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.refuse {
		return nil, connect.NewError(connect.CodeAlreadyExists, errors.New("asset exists"))
	}
	a := &brokerv1.Asset{Name: r.Msg.GetName(), Kind: r.Msg.GetKind(), Digest: r.Msg.GetDigest(), Owner: "owner"}
	b.assets = append(b.assets, a)
	b.wraps[a.GetName()] = [2][]byte{r.Msg.GetWrappedEnc(), r.Msg.GetWrappedKey()}
	return connect.NewResponse(&brokerv1.CreateAssetResponse{Asset: a}), nil
}

func (b *fakeBroker) CreateGrant(_ context.Context, r *connect.Request[brokerv1.CreateGrantRequest]) (*connect.Response[brokerv1.CreateGrantResponse], error) {
	m := r.Msg
	if m.GetNotAfterUnix()-m.GetNotBeforeUnix() != 3600 || !m.GetAllowSimulated() || m.GetMaxReleases() != 2 {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("unexpected grant %v", m))
	}
	return connect.NewResponse(&brokerv1.CreateGrantResponse{Grant: &brokerv1.Grant{Id: "g-1", Assets: m.GetAssets(), PlanDigest: m.GetPlanDigest()}}), nil
}

func (b *fakeBroker) LiftRevocation(_ context.Context, r *connect.Request[brokerv1.LiftRevocationRequest]) (*connect.Response[brokerv1.LiftRevocationResponse], error) {
	if r.Msg.GetKind() != brokerv1.RevocationKind_REVOCATION_KIND_NODE || r.Msg.GetValue() != "node-4" || r.Msg.GetReason() != "inspected" {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("only the revocation of a node or of a chip is lifted"))
	}
	return connect.NewResponse(&brokerv1.LiftRevocationResponse{}), nil
}

func newFakeStack(t *testing.T) *fakeStack {
	t.Helper()
	key, err := hpke.MLKEM768X25519().GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv(sessionsVariable, filepath.Join(t.TempDir(), "sessions"))
	s := &fakeStack{t: t, dir: t.TempDir(), agent: &fakeAgent{jobs: map[string]*agentv1.Job{}}, broker: &fakeBroker{key: key, wraps: map[string][2][]byte{}}}
	dir := filepath.Join(s.dir, "pki")
	if err := pki.Create(dir); err != nil {
		t.Fatal(err)
	}
	for role, name := range map[string]string{"agent": "node-1", "broker": "broker", "owner": "owner", "engineer": "engineer", "auditor": "auditor"} {
		if err := pki.Issue(dir, role, name); err != nil {
			t.Fatal(err)
		}
	}
	serve := func(role, name string, h http.Handler) (int, func()) {
		cfg, err := pki.Files(dir, role, name).Server()
		if err != nil {
			t.Fatal(err)
		}
		port := loopback.Base(t)
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		addr := fmt.Sprintf("127.0.0.1:%d", port)
		go func() { done <- daemon.Serve(ctx, addr, cfg, h, slog.New(slog.DiscardHandler)) }()
		for range 12000 {
			if c, err := net.Dial("tcp", addr); err == nil {
				_ = c.Close()
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
		var once sync.Once
		return port, func() { once.Do(func() { cancel(); <-done }) }
	}
	mux := http.NewServeMux()
	mux.Handle(agentv1connect.NewAgentServiceHandler(s.agent))
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		role, name, err := daemon.Identity(r)
		if err != nil {
			t.Error(err)
		}
		s.agent.mu.Lock()
		s.agent.callers = append(s.agent.callers, role+"/"+name)
		s.agent.mu.Unlock()
		mux.ServeHTTP(w, r)
	})
	agentPort, stop := serve("agent", "node-1", s.answers(handler))
	s.stopAgent = stop
	_, bh := brokerv1connect.NewBrokerServiceHandler(s.broker)
	brokerPort, stopBroker := serve("broker", "broker", s.answers(bh))
	s.stopBroker = stopBroker
	t.Cleanup(func() { s.stopAgent(); stopBroker() })
	info := fmt.Sprintf(`{"version":"coffer.run/stack/v1","ports":{"verifier":1,"broker":%d,"agent":%d},"bin":"","tools":""}`, brokerPort, agentPort)
	if err := os.WriteFile(filepath.Join(s.dir, "stack.json"), []byte(info), 0o600); err != nil {
		t.Fatal(err)
	}
	return s
}

// result is what one run of the command left.
type result struct {
	stdout, stderr string
	code           int
	err            error
}

func (s *fakeStack) coffer(ctx context.Context, args ...string) result {
	s.t.Helper()
	out, errs := tap{seen: s.seen}, bytes.Buffer{}
	err := run(ctx, append(args, "--dir", s.dir), strings.NewReader(""), &out, &errs)
	r := result{stdout: out.String(), stderr: errs.String(), err: err}
	var coded *exitError
	if errors.As(err, &coded) {
		r.code = coded.code
	} else if err != nil {
		s.t.Errorf("%v: error without an exit code: %v", args, err)
	}
	return r
}

func (r result) want(t *testing.T, code int, parts ...string) {
	t.Helper()
	all := r.stdout + "\n" + r.stderr + "\n"
	if r.err != nil {
		all += r.err.Error()
	}
	if r.code != code {
		t.Errorf("exit code %d, want %d\n%s", r.code, code, all)
	}
	for _, p := range parts {
		if !strings.Contains(all, p) {
			t.Errorf("%q is missing in:\n%s", p, all)
		}
	}
}

func jobFile(t *testing.T, text string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "job.yaml")
	if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

func stage(seq uint64, name, phase string, took time.Duration, detail string) *agentv1.WatchResponse {
	return &agentv1.WatchResponse{Sequence: seq, Event: &agentv1.WatchResponse_Stage{Stage: &agentv1.StageEvent{Stage: name, Phase: phase, DurationNanos: int64(took), Detail: detail}}}
}

func logged(seq uint64, stream, text string) *agentv1.WatchResponse {
	return &agentv1.WatchResponse{Sequence: seq, Event: &agentv1.WatchResponse_Log{Log: &agentv1.LogEvent{Stream: stream, Data: []byte(text)}}}
}

func sealedAt(seq uint64, name string) *agentv1.WatchResponse {
	return &agentv1.WatchResponse{Sequence: seq, TimeUnixNano: 1e18, Event: &agentv1.WatchResponse_Checkpoint{Checkpoint: &agentv1.CheckpointEvent{Sequence: 1, Name: name, Digest: "sha384:ab", Bytes: 2048}}}
}

func TestSubmitWatch(t *testing.T) {
	s := newFakeStack(t)
	s.agent.jobs["job-1"] = &agentv1.Job{Id: "job-1", Name: "demo", PlanDigest: "sha384:00", State: stateSucceeded}
	s.agent.events = printed(
		stage(1, "verify", "started", 0, ""),
		stage(2, "verify", "done", 12*time.Millisecond, "affirming (simulated)"),
		logged(3, "stdout", "epoch 1 lo"),
		logged(4, "stdout", "ss 0.5\n  verify     ok          12 ms  affirming\nhalf"),
		sealedAt(5, "epoch-1"),
		logged(6, "stderr", "warn\x1b[31m red\n"),
		stage(7, "evidence", "done", 3*time.Second, ""),
	)
	r := s.coffer(t.Context(), "submit", jobFile(t, "x"), "--watch")
	r.want(t, 0)
	const want = `job job-1  demo
plan sha384:00
  verify     ok        12 ms  affirming (simulated)
  | epoch 1 loss 0.5
  |   verify     ok          12 ms  affirming
  | half
  checkpoint sealed  2.0 KiB  #1 epoch-1 sha384:ab
  | warn\u001b[31m red
  evidence   ok        3.0 s
succeeded. Evidence: ` + "`coffer evidence get job-1 -o job-1.json`\n"
	if r.stdout != want {
		t.Errorf("got:\n%s\nwant:\n%s", r.stdout, want)
	}
	if len(s.agent.keys) != 1 || s.agent.keys[0] == "" {
		t.Errorf("idempotency keys %q: want one, not empty", s.agent.keys)
	}
	for _, c := range s.agent.callers {
		if c != "engineer/engineer" {
			t.Errorf("called as %s", c)
		}
	}
}

func TestSubmitWatchOutcomes(t *testing.T) {
	for name, tc := range map[string]struct {
		job   *agentv1.Job
		code  int
		parts []string
	}{
		"refused with every failed check": {
			&agentv1.Job{State: stateRefused, Stage: "verify", Message: "the verifier refused", Checks: []*agentv1.Check{
				{Id: "gpu0.nonce", Outcome: "fail", Expected: "aa", Found: "bb", Hint: "attest again"},
				{Id: "snp.signature", Outcome: "pass"},
				{Id: "snp.debug", Outcome: "fail", Expected: "off", Found: "on\x1b[2J"},
			}}, exitRefused,
			[]string{"refused at verify: 2 checks failed", "gpu0.nonce\n    expected  aa\n    found     bb\n    hint      attest again", "on\\u001b[2J"},
		},
		"refused without a check": {&agentv1.Job{State: stateRefused, Stage: "admit", Message: "no"}, exitRefused, []string{"refused at admit: no"}},
		"failed":                  {&agentv1.Job{State: stateFailed, Stage: "start", Reason: "exit", Message: "exit code 3"}, exitFailed, []string{"failed at start (exit): exit code 3"}},
		"cancelled":               {&agentv1.Job{State: stateCancelled, Stage: "start"}, exitFailed, []string{"cancelled at start"}},
		"an odd stream":           {&agentv1.Job{State: "running"}, exitUnknown, []string{"still running"}},
		"unknown states":          {&agentv1.Job{State: "\x1b"}, exitUnknown, []string{"still \\u001b"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newFakeStack(t)
			tc.job.Id = "job-1"
			s.agent.jobs["job-1"] = tc.job
			s.coffer(t.Context(), "submit", jobFile(t, "x"), "-w").want(t, tc.code, tc.parts...)
		})
	}
}

func TestSubmitRefusedAtTheDoor(t *testing.T) {
	s := newFakeStack(t)
	var l check.List
	l.Fail("admit.memory", "at most 2 GiB", "9 GiB", "ask for less")
	s.agent.refuse = check.Refuse("admit", l)
	s.coffer(t.Context(), "submit", jobFile(t, "x")).want(t, exitRefused, "refused at admit: 1 check failed", "admit.memory", "at most 2 GiB", "9 GiB", "ask for less")
}

func TestWatchDetaches(t *testing.T) {
	s := newFakeStack(t)
	s.agent.jobs["job-1"] = &agentv1.Job{Id: "job-1", State: "running"}
	s.agent.events = printed(logged(1, "stdout", "working\n"))
	s.agent.hold = make(chan struct{})
	defer close(s.agent.hold)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s.seen = func(out string) {
		if strings.Contains(out, "| working") {
			cancel()
		}
	}
	s.coffer(ctx, "submit", jobFile(t, "x"), "-w").want(t, exitUnknown, "| working", "detached; job job-1 goes on", "coffer logs -f job-1")
}

// Whoever leaves a log or events that go on is told how to come back.
func TestFollowersLeave(t *testing.T) {
	for _, args := range [][]string{{"logs", "-f", "job-1"}, {"events", "-w", "job-1"}} {
		s := newFakeStack(t)
		s.agent.jobs["job-1"] = &agentv1.Job{Id: "job-1", State: "running"}
		s.agent.events = append(printed(logged(1, "stdout", "working\n")), &agentv1.WatchResponse{Sequence: 2, Event: &agentv1.WatchResponse_Stage{Stage: &agentv1.StageEvent{Stage: "run", Phase: "done", Detail: "working"}}})
		s.agent.hold = make(chan struct{})
		ctx, cancel := context.WithCancel(t.Context())
		s.seen = func(out string) {
			if strings.Contains(out, "working") {
				cancel()
			}
		}
		s.coffer(ctx, args...).want(t, exitUnknown, "which goes on; come back with `coffer "+strings.Join(args, " ")+"`")
		cancel()
		close(s.agent.hold)
	}
}

// tap is a buffer that tells of every write.
type tap struct {
	bytes.Buffer
	seen func(string)
}

func (b *tap) Write(p []byte) (int, error) {
	n, err := b.Buffer.Write(p)
	if b.seen != nil {
		b.seen(b.String())
	}
	return n, err
}

func TestWatchSurvivesARestartOfTheAgent(t *testing.T) {
	for name, abort := range map[string]bool{"stopped": false, "killed": true} {
		t.Run(name, func(t *testing.T) {
			s := newFakeStack(t)
			s.agent.jobs["job-1"] = &agentv1.Job{Id: "job-1", State: stateSucceeded}
			s.agent.events = printed(logged(1, "stdout", "a\n"), logged(2, "stdout", "b\n"), logged(3, "stdout", "c\n"))
			s.agent.cut, s.agent.abort = 2, abort
			r := s.coffer(t.Context(), "logs", "-f", "job-1")
			r.want(t, 0, "the node agent is away")
			if r.stdout != "a\nb\nc\n" {
				t.Errorf("got %q", r.stdout)
			}
		})
	}
}

func TestLogsOfARunningJobEnd(t *testing.T) {
	s := newFakeStack(t)
	s.agent.jobs["job-1"] = &agentv1.Job{Id: "job-1", State: "running"}
	s.agent.events = printed(logged(1, "stdout", "out\n"), logged(2, "stderr", "err\n"), sealedAt(3, "ck"))
	s.agent.hold = make(chan struct{})
	defer close(s.agent.hold)
	r := s.coffer(t.Context(), "logs", "job-1")
	r.want(t, 0)
	if r.stdout != "out\n" || r.stderr != "err\n" {
		t.Errorf("got %q and %q", r.stdout, r.stderr)
	}
	s.coffer(t.Context(), "checkpoints", "ls", "job-1").want(t, 0, "SEQUENCE", "ck", "2048")
	s.coffer(t.Context(), "checkpoints", "ls", "job-1", "-o", "json").want(t, 0, `"name": "ck"`)
	s.coffer(t.Context(), "logs", "job-9").want(t, exitFailed, "read the log of job job-9: no such job: `coffer ps` lists jobs")
}

func TestJobCommands(t *testing.T) {
	s := newFakeStack(t)
	s.agent.jobs["job-1"] = &agentv1.Job{Id: "job-1", Name: "demo", State: stateRefused, Stage: "release", PlanDigest: "sha384:00", Checks: []*agentv1.Check{{Id: "grant.plan", Outcome: "fail"}}}
	s.coffer(t.Context(), "plan", jobFile(t, "x")).want(t, 0, string(plan.Sum([]byte(`{"name":"demo"}`))), `"name": "demo"`)
	s.coffer(t.Context(), "plan", jobFile(t, "bogus")).want(t, exitUsage, "line 3: bogus: unknown field")
	s.coffer(t.Context(), "submit", jobFile(t, "x"), "--idempotency-key", "k").want(t, 0, "job-1", "coffer logs -f job-1")
	if got := s.agent.keys; len(got) != 1 || got[0] != "k" {
		t.Errorf("keys %q", got)
	}
	r := s.coffer(t.Context(), "ps")
	r.want(t, 0, "JOB", "job-1", "job-0", "evil\\u001b[2Jname")
	var jobs []jobView
	if err := json.Unmarshal([]byte(s.coffer(t.Context(), "ps", "--output", "json").stdout), &jobs); err != nil || len(jobs) != 2 {
		t.Errorf("ps as JSON: %v, %v", jobs, err)
	}
	s.coffer(t.Context(), "status", "job-1").want(t, 0, "refused at release", "grant.plan")
	s.coffer(t.Context(), "status", "job-1", "-o", "json").want(t, 0, `"failedChecks"`)
	s.coffer(t.Context(), "cancel", "job-1").want(t, 0, "job job-1 is cancelled")
	file := filepath.Join(t.TempDir(), "bundle.json")
	s.agent.callers = nil
	s.coffer(t.Context(), "evidence", "get", "job-1", "-o", file, "--as", "auditor").want(t, 0, "3 bytes")
	if b, err := os.ReadFile(file); err != nil || string(b) != "{}\n" {
		t.Errorf("bundle: %q, %v", b, err)
	}
	if got := s.agent.callers; len(got) != 1 || got[0] != "auditor/auditor" {
		t.Errorf("called as %q", got)
	}
	s.coffer(t.Context(), "evidence", "get", "job-1", "-o", file).want(t, exitUsage, "exists")
	left, err := filepath.Glob(filepath.Join(filepath.Dir(file), ".*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}
	s.stopAgent()
	s.coffer(t.Context(), "ps").want(t, exitUnknown, "no node agent answers at 127.0.0.1:", "is the stack up?")
}

func TestSeal(t *testing.T) {
	s := newFakeStack(t)
	src := t.TempDir()
	secret := []byte(strings.Repeat("secret weights ", 10000))
	if err := os.WriteFile(filepath.Join(src, "w.bin"), secret, 0o600); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "new", "sealed")
	s.coffer(t.Context(), "seal", src, "--asset", "w", "--kind", "weights", "--out", out).want(t, 0, "sealed 1 file", "as w", "digest sha384:")

	a := s.broker.assets[0]
	if a.GetKind() != brokerv1.AssetKind_ASSET_KIND_WEIGHTS {
		t.Errorf("kind %v", a.GetKind())
	}
	w := s.broker.wraps["w"]
	r, err := hpke.NewRecipient(w[0], s.broker.key, hpke.HKDFSHA256(), hpke.AES256GCM(), []byte(receipt.OwnerWrapInfo))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := r.Open([]byte("w"), w[1])
	if err != nil {
		t.Fatalf("the broker cannot open the wrapped key: %v", err)
	}
	key, err := keys.NewDataKey(raw)
	if err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(out)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = root.Close() }()
	f, err := seal.ReadFolder(root, "w", plan.Digest(a.GetDigest()))
	if err != nil {
		t.Fatal(err)
	}
	entries, err := f.Entries(key)
	if err != nil || len(entries) != 1 || entries[0].Name != "w.bin" {
		t.Fatalf("entries %v, %v", entries, err)
	}
	o, err := f.Open(key, entries[0])
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = o.Close() }()
	got, err := io.ReadAll(io.NewSectionReader(o, 0, o.Size()))
	if err != nil || !bytes.Equal(got, secret) {
		t.Errorf("the sealed folder does not open to what was sealed: %v", err)
	}

	s.coffer(t.Context(), "seal", src, "--asset", "w", "--kind", "weights", "--out", out+"2").want(t, exitFailed, "asset w exists already")
	s.coffer(t.Context(), "seal", src, "--asset", "v", "--kind", "weights", "--out", out).want(t, exitUsage, "exists: name a new folder")
	s.coffer(t.Context(), "seal", src+"-none", "--asset", "v", "--kind", "weights", "--out", out+"2").want(t, exitUsage, "no such file")
	s.broker.refuse = true
	s.coffer(t.Context(), "seal", src, "--asset", "v", "--kind", "weights", "--out", out+"2").want(t, exitFailed, "register asset v: asset exists")
	if _, err := os.Stat(out + "2"); err == nil {
		t.Error("a folder that nobody can open was left behind")
	}
}

func TestGrants(t *testing.T) {
	s := newFakeStack(t)
	s.coffer(t.Context(), "grant", "create", "--plan", string(plan.Sum(nil)), "--asset", "a", "--asset", "b", "--for", "1h", "--releases", "2", "--allow-simulated").want(t, 0, "g-1")
	s.coffer(t.Context(), "grants", "ls").want(t, 0, "g-1", "requested", "2 of security")
	s.coffer(t.Context(), "revoke", "--lift", "--node", "node-4", "--reason", "inspected").want(t, 0, "lifted the revocation of node-4")
	s.coffer(t.Context(), "revoke", "--lift", "g-1", "--reason", "inspected").want(t, exitUsage, "only the revocation of a node")
	s.coffer(t.Context(), "revoke", "--lift", "--node", "node-4").want(t, exitUsage, "--reason")
	s.coffer(t.Context(), "assets", "ls").want(t, 0, "ASSET")
}

func TestLinesOfAJob(t *testing.T) {
	var b bytes.Buffer
	l := &lines{w: &b, mark: "> "}
	for _, part := range []string{"10%\r50%\r100%\r\nx", strings.Repeat("y", maxLine), "\n"} {
		if err := l.write([]byte(part)); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.flush(); err != nil {
		t.Fatal(err)
	}
	got := strings.Split(b.String(), "\n")
	if got[0] != "> 100%" || len(got[1]) != maxLine+2 || got[2] != "> y" {
		t.Errorf("lines: %q ... %q", got[0], got[2])
	}
}
