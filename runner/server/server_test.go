package server

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/oklog/ulid/v2"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/api/agent/v1/agentv1connect"
	"github.com/coffer-run/coffer/runner/journal"
)

// serve answers over a journal with n jobs of scheduler/one that have ended, the oldest
// first. A request says who it is from: "role/name".
func serve(t *testing.T, n int, limits Limits) (*httptest.Server, []string) {
	t.Helper()
	j, err := journal.Open(filepath.Join(t.TempDir(), "journal.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = j.Close() })
	var ids []string
	for range n {
		ids = append(ids, addJob(t, j))
	}
	h, err := New(&runner.Agent{Deps: runner.Deps{Journal: j}}, GPUInfo{}, func(r *http.Request) (Caller, error) {
		who := r.Header.Get("Who")
		role, _, _ := strings.Cut(who, "/")
		return Caller{Principal: who, Roles: []string{role}}, nil
	}, limits, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s, ids
}

func addJob(t *testing.T, j *journal.Journal) string {
	t.Helper()
	job := journal.Job{ID: ulid.Make().String(), Name: "a", JobFile: []byte("x"), Plan: []byte("{}"), PlanDigest: plan.Sum([]byte("{}")), Submitter: "scheduler/one", State: journal.Queued, Stage: "admit", Submitted: time.Now()}
	if _, _, err := j.Submit(t.Context(), job); err != nil {
		t.Fatal(err)
	}
	job.State, job.Ended = journal.Succeeded, time.Now()
	if err := j.End(t.Context(), job, []byte("{}")); err != nil {
		t.Fatal(err)
	}
	return job.ID
}

func as[T any](who string, m *T) *connect.Request[T] {
	r := connect.NewRequest(m)
	r.Header().Set("Who", who)
	return r
}

// A refusal of the server's own is told without the protocol's words.
func TestErrorsInWords(t *testing.T) {
	s, _ := serve(t, 1, DefaultLimits())
	c := agentv1connect.NewAgentServiceClient(http.DefaultClient, s.URL)
	_, err := c.List(t.Context(), as("scheduler/one", &agentv1.ListRequest{State: "foo"}))
	var told *connect.Error
	if !errors.As(err, &told) || told.Code() != connect.CodeInvalidArgument || !strings.HasPrefix(told.Message(), `state "foo": want queued, running`) {
		t.Errorf("%v", err)
	}
}

func TestPages(t *testing.T) {
	s, ids := serve(t, 7, DefaultLimits())
	c := agentv1connect.NewAgentServiceClient(http.DefaultClient, s.URL)
	slices.Reverse(ids)
	var got []string
	for token, pages := "", 0; ; pages++ {
		res, err := c.List(t.Context(), as("scheduler/one", &agentv1.ListRequest{PageSize: 3, PageToken: token}))
		if err != nil {
			t.Fatal(err)
		}
		for _, j := range res.Msg.GetJobs() {
			got = append(got, j.GetId())
		}
		if token = res.Msg.GetNextPageToken(); token == "" {
			if pages != 2 {
				t.Errorf("7 jobs in %d pages of 3", pages+1)
			}
			break
		}
	}
	if !slices.Equal(got, ids) {
		t.Errorf("jobs %v, want %v", got, ids)
	}
	for name, r := range map[string]*agentv1.ListRequest{
		"a page below zero": {PageSize: -1}, "no such state": {State: "done"}, "another's token": {PageToken: "' OR 1=1"},
	} {
		if _, err := c.List(t.Context(), as("scheduler/one", r)); connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestBundlesOfOwnJobs(t *testing.T) {
	s, ids := serve(t, 1, DefaultLimits())
	c := agentv1connect.NewAgentServiceClient(http.DefaultClient, s.URL)
	for who, want := range map[string]connect.Code{
		"scheduler/one": 0, "auditor/eve": 0, "scheduler/two": connect.CodePermissionDenied, "engineer/one": connect.CodePermissionDenied, "operator/o": connect.CodePermissionDenied,
	} {
		_, err := c.Bundle(t.Context(), as(who, &agentv1.BundleRequest{Id: ids[0]}))
		if got := connect.CodeOf(err); err == nil && want != 0 || err != nil && got != want {
			t.Errorf("%s: %v, want %v", who, err, want)
		}
	}
}

// One caller that asks for too much is told when to come back, and takes nothing from
// another one.
func TestLimits(t *testing.T) {
	s, ids := serve(t, 1, Limits{PerSecond: 0.001, Burst: 3, Streams: 1})
	c := agentv1connect.NewAgentServiceClient(http.DefaultClient, s.URL)
	get := func(who string) error {
		_, err := c.Get(t.Context(), as(who, &agentv1.GetRequest{Id: ids[0]}))
		return err
	}
	for i := range 3 {
		if err := get("scheduler/one"); err != nil {
			t.Fatalf("call %d: %v", i+1, err)
		}
	}
	err := get("scheduler/one")
	var ce *connect.Error
	if ce, _ = err.(*connect.Error); connect.CodeOf(err) != connect.CodeResourceExhausted || ce.Meta().Get("Retry-After") != retrySoon { //nolint:errorlint // a client's error
		t.Errorf("one call too many: %v", err)
	}
	if err := get("scheduler/two"); err != nil {
		t.Errorf("another caller: %v", err)
	}
	if err := get(""); connect.CodeOf(err) != connect.CodeUnauthenticated {
		t.Errorf("nobody: %v", err)
	}
	res, err := http.Post(s.URL+agentv1connect.AgentServiceSubmitProcedure, "application/json", strings.NewReader(`{"jobFile":"`+strings.Repeat("A", 2*maxRequest)+`"}`))
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	if res.StatusCode != http.StatusUnauthorized {
		t.Errorf("a large request of nobody: %s", res.Status)
	}
	if _, err := c.Submit(t.Context(), as("scheduler/three", &agentv1.SubmitRequest{JobFile: make([]byte, maxRequest+1)})); connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("a request that is too large: %v", err)
	}
}

func TestQuota(t *testing.T) {
	q := newQuota(Limits{PerSecond: 1, Burst: 10, Streams: 1})
	done, over := q.take("a", true)
	if over != "" {
		t.Fatal(over)
	}
	if _, over := q.take("a", true); over == "" {
		t.Error("a second stream")
	}
	if _, over := q.take("a", false); over != "" {
		t.Errorf("a call beside a stream: %s", over)
	}
	if _, over := q.take("b", true); over != "" {
		t.Errorf("another's stream: %s", over)
	}
	done()
	if _, over := q.take("a", true); over != "" {
		t.Errorf("a stream after the first has ended: %s", over)
	}
	if _, over := newQuota(Limits{}).take("a", false); over == "" {
		t.Error("limits of zero let a call through")
	}
	for i := range maxCallers {
		q.callers[strings.Repeat("x", i%7)+string(rune(i))] = &asked{last: time.Now()}
	}
	if _, over := q.take("one more", false); over == "" {
		t.Error("more callers than are counted")
	}
	for _, c := range q.callers {
		c.last = time.Now().Add(-2 * idleAfter)
	}
	if _, over := q.take("one more", false); over != "" {
		t.Errorf("after the others have gone: %s", over)
	}
	if q.callers["a"] == nil {
		t.Error("a caller with an open stream was forgotten")
	}
}

func encode(t *testing.T, m proto.Message) string {
	t.Helper()
	b, err := protojson.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// The OpenAPI document is that of the linked messages: make generate.
func TestOpenAPI(t *testing.T) {
	b, err := os.ReadFile("../../docs/formats/agent-openapi.json")
	if err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Paths      map[string]any
		Components struct{ Schemas map[string]json.RawMessage }
	}
	if err := json.Unmarshal(b, &doc); err != nil {
		t.Fatal(err)
	}
	seen := map[protoreflect.FullName]bool{}
	var check func(m protoreflect.MessageDescriptor)
	check = func(m protoreflect.MessageDescriptor) {
		if seen[m.FullName()] {
			return
		}
		seen[m.FullName()] = true
		schema := string(doc.Components.Schemas[string(m.FullName())])
		for i := range m.Fields().Len() {
			f := m.Fields().Get(i)
			if !strings.Contains(schema, `"`+f.JSONName()+`": {`) {
				t.Errorf("the document has no %s: run make generate", f.FullName())
			}
			if f.Message() != nil {
				check(f.Message())
			}
		}
		if schema == "" {
			t.Errorf("the document has no %s: run make generate", m.FullName())
		}
	}
	service := agentv1.File_runner_api_agent_v1_agent_proto.Services().Get(0)
	for i := range service.Methods().Len() {
		m := service.Methods().Get(i)
		if doc.Paths["/"+string(service.FullName())+"/"+string(m.Name())] == nil {
			t.Errorf("the document has no call %s: run make generate", m.Name())
		}
		check(m.Input())
		check(m.Output())
	}
	c := jsonschema.NewCompiler()
	whole, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.AddResource("agent.json", whole); err != nil {
		t.Fatal(err)
	}
	for name, row := range map[string]struct {
		message, json string
		holds         bool
	}{
		"an event":                {"WatchResponse", encode(t, &agentv1.WatchResponse{Sequence: 1 << 60, Event: &agentv1.WatchResponse_Stage{Stage: &agentv1.StageEvent{Stage: "run"}}}), true},
		"a line":                  {"WatchResponse", encode(t, &agentv1.WatchResponse{Event: &agentv1.WatchResponse_Log{Log: &agentv1.LogEvent{Data: []byte{0, 255}}}}), true},
		"a job":                   {"Job", encode(t, runner.Describe(journal.Job{ID: "a", Submitted: time.Now()})), true},
		"capacity":                {"CapacityResponse", encode(t, &agentv1.CapacityResponse{MemoryBytes: 1 << 60, Attested: &agentv1.Attested{Simulated: true}}), true},
		"an event of two kinds":   {"WatchResponse", `{"stage": {}, "job": {}}`, false},
		"an event of no kind":     {"WatchResponse", `{"sequence": "1"}`, false},
		"an event with more":      {"WatchResponse", `{"stage": {}, "other": 1}`, false},
		"a job with other fields": {"Job", `{"state": "queued", "colour": "red"}`, false},
		"a number for a name":     {"Job", `{"id": 7}`, false},
	} {
		s, err := c.Compile("agent.json#/components/schemas/coffer.agent.v1." + row.message)
		if err != nil {
			t.Fatal(err)
		}
		v, err := jsonschema.UnmarshalJSON(strings.NewReader(row.json))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Validate(v); (err == nil) != row.holds {
			t.Errorf("%s: %v", name, err)
		}
	}
	if len(doc.Paths) != service.Methods().Len() {
		t.Errorf("the document has %d calls, the service %d", len(doc.Paths), service.Methods().Len())
	}
}
