package client_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/pki"
	"github.com/coffer-run/coffer/runner"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/api/agent/v1/agentv1connect"
	"github.com/coffer-run/coffer/runner/client"
	"github.com/coffer-run/coffer/runner/journal"
	"github.com/coffer-run/coffer/runner/server"
)

const jobID = "01JD3V8QZZZZZZZZZZZZZZZZZZ"

// serve answers over TLS 1.3 with certificates on both sides, and returns how to ask.
func serve(t *testing.T, role string, h http.Handler) client.Options {
	t.Helper()
	dir := t.TempDir()
	if err := pki.Create(dir); err != nil {
		t.Fatal(err)
	}
	for _, r := range []string{role, daemon.RoleScheduler} {
		if err := pki.Issue(dir, r, "one"); err != nil {
			t.Fatal(err)
		}
	}
	cfg, err := pki.Files(dir, role, "one").Server()
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(h)
	s.TLS, s.EnableHTTP2 = cfg, true
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	s.StartTLS()
	t.Cleanup(s.Close)
	own := pki.Files(dir, daemon.RoleScheduler, "one")
	return client.Options{URL: s.URL, CA: own.CA, Cert: own.Cert, Key: own.Key, Patience: 5 * time.Second}
}

func open(t *testing.T, o client.Options) *client.Client {
	t.Helper()
	c, err := client.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// ended is the agent's own server over a journal with a job that has ended, and n events.
func ended(t *testing.T, n int, limits server.Limits) http.Handler {
	t.Helper()
	j, err := journal.Open(filepath.Join(t.TempDir(), "journal.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = j.Close() })
	job := journal.Job{ID: jobID, Name: "a", JobFile: []byte("x"), Plan: []byte("{}"), PlanDigest: plan.Sum([]byte("{}")), Submitter: "scheduler/one", State: journal.Queued, Stage: "admit", Submitted: time.Now()}
	if _, _, err := j.Submit(t.Context(), job); err != nil {
		t.Fatal(err)
	}
	for i := 1; i <= n; i++ {
		b, err := proto.Marshal(&agentv1.WatchResponse{Sequence: uint64(i), Event: &agentv1.WatchResponse_Stage{Stage: &agentv1.StageEvent{Stage: fmt.Sprint("stage-", i)}}}) //nolint:gosec // from 1
		if err != nil {
			t.Fatal(err)
		}
		if err := j.AddEvent(t.Context(), jobID, journal.Event{Sequence: uint64(i), At: time.Now(), Body: b}); err != nil { //nolint:gosec // from 1
			t.Fatal(err)
		}
	}
	job.State, job.Ended = journal.Succeeded, time.Now()
	if err := j.End(t.Context(), job, []byte(`{"a":1}`)); err != nil {
		t.Fatal(err)
	}
	h, err := server.New(&runner.Agent{Deps: runner.Deps{Journal: j}}, server.GPUInfo{}, func(r *http.Request) (server.Caller, error) {
		role, name, err := daemon.Identity(r)
		return server.Caller{Principal: role + "/" + name, Roles: []string{role}}, err
	}, limits, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// broken cuts each answer of a call after so many bytes, for the first times.
func broken(next http.Handler, procedure string, after int, times int32) (http.Handler, *atomic.Int32) {
	var seen atomic.Int32
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == procedure && seen.Add(1) <= times {
			w = &cut{ResponseWriter: w, left: after}
		}
		next.ServeHTTP(w, r)
	}), &seen
}

type cut struct {
	http.ResponseWriter
	left int
}

func (c *cut) Write(b []byte) (int, error) {
	if c.left -= len(b); c.left < 0 {
		panic(http.ErrAbortHandler)
	}
	return c.ResponseWriter.Write(b)
}

func (c *cut) Flush() { c.ResponseWriter.(http.Flusher).Flush() } //nolint:errcheck // net/http's have it

// A stream that breaks again and again still brings every event once and in order.
func TestWatchGoesOn(t *testing.T) {
	const events = 60
	h, seen := broken(ended(t, events, server.DefaultLimits()), agentv1connect.AgentServiceWatchProcedure, 500, 4)
	c := open(t, serve(t, daemon.RoleAgent, h))
	var got []uint64
	for e, err := range c.Watch(t.Context(), jobID, 0) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, e.GetSequence())
	}
	var want []uint64
	for i := uint64(1); i <= events; i++ {
		want = append(want, i)
	}
	if !slices.Equal(got, want) {
		t.Errorf("events %v", got)
	}
	if n := seen.Load(); n != 5 {
		t.Errorf("the stream was opened %d times, want 5: it did not break", n)
	}
	// Who has seen some begins after them.
	for e, err := range c.Watch(t.Context(), jobID, events-1) {
		if err != nil || e.GetSequence() != events {
			t.Errorf("%v, %v", e, err)
		}
	}
	j, err := c.Wait(t.Context(), jobID)
	if err != nil || j.GetState() != "succeeded" {
		t.Errorf("%v, %v", j, err)
	}
	if b, err := c.Bundle(t.Context(), jobID); err != nil || string(b) != `{"a":1}` {
		t.Errorf("bundle %q, %v", b, err)
	}
}

// What the agent has decided is not asked again, and a node that does not answer is
// asked for as long as patience goes.
func TestErrors(t *testing.T) {
	h, seen := broken(ended(t, 0, server.DefaultLimits()), agentv1connect.AgentServiceGetProcedure, 0, 0)
	o := serve(t, daemon.RoleAgent, h)
	c := open(t, o)
	if _, err := c.Get(t.Context(), "01JD3V8QZZZZZZZZZZZZZZZZZY"); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("an unknown job: %v", err)
	}
	if n := seen.Load(); n != 1 {
		t.Errorf("an unknown job was asked for %d times", n)
	}
	for _, err := range c.List(t.Context(), "nonsense") {
		if connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("an unknown state: %v", err)
		}
	}
	if _, err := c.Submit(t.Context(), []byte("x"), ""); err == nil {
		t.Error("a job without a key is submitted")
	}
	o.URL, o.Patience = "https://127.0.0.1:1", 300*time.Millisecond
	began := time.Now()
	if _, err := open(t, o).Get(t.Context(), jobID); connect.CodeOf(err) != connect.CodeUnavailable {
		t.Errorf("nobody there: %v", err)
	}
	if took := time.Since(began); took < 100*time.Millisecond || took > 30*time.Second {
		t.Errorf("patience of 300 ms took %v", took)
	}
}

// A server that has a certificate of the same authority and is no agent gets no request.
func TestOtherServer(t *testing.T) {
	o := serve(t, daemon.RoleBroker, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("a broker was asked") }))
	o.Patience = time.Millisecond
	if _, err := open(t, o).Get(t.Context(), jobID); err == nil || !strings.Contains(err.Error(), "want the role agent") {
		t.Errorf("a broker in an agent's place: %v", err)
	}
}

func TestOptions(t *testing.T) {
	own := serve(t, daemon.RoleAgent, http.NotFoundHandler())
	token := func(context.Context) (string, error) { return "t", nil }
	for name, change := range map[string]func(o *client.Options){
		"nothing":                       func(o *client.Options) { *o = client.Options{} },
		"no authority":                  func(o *client.Options) { o.CA = "" },
		"no address":                    func(o *client.Options) { o.URL = "" },
		"nobody":                        func(o *client.Options) { o.Cert, o.Key = "", "" },
		"a certificate without its key": func(o *client.Options) { o.Key = "" },
		"a certificate and a token":     func(o *client.Options) { o.Token = token },
		"patience below zero":           func(o *client.Options) { o.Patience = -1 },
	} {
		o := own
		change(&o)
		if _, err := client.New(o); err == nil {
			t.Errorf("%s: a client", name)
		}
	}
}

// jobs takes jobs and loses its answers.
type jobs struct {
	agentv1connect.UnimplementedAgentServiceHandler
	calls, made atomic.Int32
	keys        map[string]bool
}

func (f *jobs) Submit(_ context.Context, r *connect.Request[agentv1.SubmitRequest]) (*connect.Response[agentv1.SubmitResponse], error) {
	if !f.keys[r.Msg.GetIdempotencyKey()] {
		f.keys[r.Msg.GetIdempotencyKey()] = true
		f.made.Add(1)
	}
	switch f.calls.Add(1) {
	case 1:
		panic(http.ErrAbortHandler)
	case 2:
		err := connect.NewError(connect.CodeResourceExhausted, errors.New("come back later"))
		err.Meta().Set("Retry-After", "1")
		return nil, err
	}
	return connect.NewResponse(&agentv1.SubmitResponse{Job: &agentv1.Job{Id: jobID}}), nil
}

// An answer that is lost, and a node that has enough for now, make no second job.
func TestSubmitOnce(t *testing.T) {
	f := &jobs{keys: map[string]bool{}}
	_, h := agentv1connect.NewAgentServiceHandler(f)
	began := time.Now()
	j, err := open(t, serve(t, daemon.RoleAgent, h)).Submit(t.Context(), []byte("x"), "key")
	if err != nil || j.GetId() != jobID {
		t.Fatal(j, err)
	}
	if f.calls.Load() != 3 || f.made.Load() != 1 {
		t.Errorf("%d calls made %d jobs", f.calls.Load(), f.made.Load())
	}
	if took := time.Since(began); took < time.Second {
		t.Errorf("the node asked for a second, and was asked again after %v", took)
	}
}

// A caller with a token sends it with each request, over TLS to an agent alone.
func TestToken(t *testing.T) {
	var sent atomic.Value
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		sent.Store(r.Header.Get("Authorization"))
		http.Error(w, "", http.StatusUnauthorized)
	})
	o := serve(t, daemon.RoleAgent, nil)
	s := httptest.NewUnstartedServer(h)
	cfg, err := daemon.TLS{CA: o.CA, Cert: strings.Replace(o.Cert, "scheduler", "agent", 1), Key: strings.Replace(o.Key, "scheduler", "agent", 1)}.ServerForPeople()
	if err != nil {
		t.Fatal(err)
	}
	s.TLS, s.EnableHTTP2 = cfg, true
	s.StartTLS()
	defer s.Close()
	c := open(t, client.Options{URL: s.URL, CA: o.CA, Token: func(context.Context) (string, error) { return "abc", nil }})
	if _, err := c.Get(t.Context(), jobID); connect.CodeOf(err) != connect.CodeUnauthenticated {
		t.Errorf("%v", err)
	}
	if sent.Load() != "Bearer abc" {
		t.Errorf("the request came with %v", sent.Load())
	}
}
