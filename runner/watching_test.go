package runner

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/runner/alerts"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/egress"
	"github.com/coffer-run/coffer/runner/egress/gate"
	"github.com/coffer-run/coffer/runner/journal"
	"github.com/coffer-run/coffer/runner/rules"
)

// collected takes alerts.
type collected struct {
	mu    sync.Mutex
	lines int
}

func (c *collected) Write(_ context.Context, b []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, x := range b {
		if x == '\n' {
			c.lines++
		}
	}
	return nil
}

// watched is a job under the shipped rules, whose events go to a real journal.
func watched(t *testing.T) (*Agent, *Job, context.Context) {
	t.Helper()
	set, err := rules.Parse(rules.Default)
	if err != nil {
		t.Fatal(err)
	}
	jnl, err := journal.Open(filepath.Join(t.TempDir(), "journal.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := jnl.Close(); err != nil {
			t.Error(err)
		}
	})
	log := slog.New(slog.DiscardHandler)
	a := &Agent{Deps: Deps{Rules: set, Journal: jnl, Log: log}, log: log}
	j := newJob("01JD3V8QK5W2M7N4P6R8S0T1V3", "user/ada")
	j.feed = newFeed(j.id, jnl)
	ctx, cancel := context.WithCancelCause(t.Context())
	j.cancel = cancel
	a.beginWatching(t.Context(), j)
	return a, j, ctx
}

func openOf(sequence uint64, path string) holdapi.Event {
	return holdapi.Event{Sequence: sequence, UnixNano: 1, Kind: "open", Detail: path, Process: "p"}
}

func TestFindingsAreToldAndRecorded(t *testing.T) {
	a, j, ctx := watched(t)
	sink := &collected{}
	a.Alerts = alerts.NewSink(sink, a.log)
	for i := range uint64(1000) {
		a.lookAt(t.Context(), j, openOf(i+1, "/etc/shadow"))
	}
	a.Alerts.Close(t.Context())
	a.Alerts = nil
	// 32 one by one, and then at 64, 128, 256 and 512.
	if n := len(j.watching.found.Findings); n != 36 || j.watching.found.Untold != 1000-36 || sink.lines != 36 {
		t.Errorf("%d findings, %d untold, %d alerts", n, j.watching.found.Untold, sink.lines)
	}
	if events, _, _ := j.feed.after(0); len(events) != 36 || events[0].GetAlert().GetTraceSequence() != 1 || events[35].GetAlert().GetCount() != 512 {
		t.Errorf("%d events", len(events))
	}
	if ctx.Err() != nil {
		t.Errorf("an alert ends the job: %v", context.Cause(ctx))
	}
	a.lookAt(t.Context(), j, holdapi.Event{Sequence: 1001, Kind: "operator-exec", Detail: "/bin/sh"})
	var stop *ruleError
	if !errors.As(context.Cause(ctx), &stop) || stop.id != "operator-exec" {
		t.Errorf("the job goes on: %v", context.Cause(ctx))
	}
	if out := a.outcome(t.Context(), j, context.Cause(ctx)); out.Reason != bundle.ReasonRule+"operator-exec" || out.State != journal.Failed {
		t.Errorf("%+v", out)
	}
}

// A job that may have read less than it was given does not count, whatever it says.
func TestInputsThatCouldNotBeOpenedEndTheJob(t *testing.T) {
	a, j, ctx := watched(t)
	a.event(t.Context(), j, holdapi.Event{Sequence: 1, Kind: bundle.EventInputsFailed, Detail: "input model: file 000001: damaged"})
	out := a.outcome(t.Context(), j, context.Cause(ctx))
	if out.Reason != "inputs-failed" || out.State != journal.Failed || out.Message != "an input could not be opened: input model: file 000001: damaged" {
		t.Errorf("%+v", out)
	}
}

// An input that is not where the job file says is no defect of the node's.
func TestInputsElsewhere(t *testing.T) {
	a, j, _ := watched(t)
	err := a.handInput(t.Context(), j.id, nil, "file://"+t.TempDir()+"/none", plan.Input{Name: "data"})
	if out := a.outcome(t.Context(), j, err); err == nil || out.Reason != "inputs-missing" || out.State != journal.Failed || !strings.Contains(out.Message, "input data: ") {
		t.Errorf("%+v: %v", out, err)
	}
}

// The end of the trace is found, and ends the job by a way of its own.
func TestTraceLostIsFound(t *testing.T) {
	a, j, ctx := watched(t)
	a.lookAt(t.Context(), j, holdapi.Event{Sequence: 1, Kind: bundle.EventTraceLost})
	if len(j.watching.found.Findings) != 1 || ctx.Err() != nil {
		t.Errorf("%+v, %v", j.watching.found, ctx.Err())
	}
}

// Whoever takes a job up reads the trace from its beginning: nothing is told twice,
// and what an earlier agent had not told is told.
func TestTakenUpJobIsNotToldTwice(t *testing.T) {
	a, before, _ := watched(t)
	a.lookAt(t.Context(), before, openOf(1, "/etc/shadow"))
	a.lookAtOutput(t.Context(), before, 5<<20, 0)
	told, _, _ := before.feed.after(0)
	if len(told) != 2 {
		t.Fatalf("%d events", len(told))
	}
	a, j, ctx := watched(t)
	j.watching = watching{adopted: true}
	for _, e := range told {
		b, err := proto.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		var w agentv1.WatchResponse
		if err := proto.Unmarshal(b, &w); err != nil {
			t.Fatal(err)
		}
		j.restoreFinding(w.GetAlert(), w.GetTimeUnixNano())
	}
	a.beginWatching(t.Context(), j)
	j.watching.skip = 5 << 20
	for i := range uint64(3) {
		a.lookAt(t.Context(), j, openOf(i+1, []string{"/etc/shadow", "/etc/hostname", "/root/.ssh/id"}[i]))
	}
	a.lookAtOutput(t.Context(), j, 5<<20, 0)
	events, _, _ := j.feed.after(0)
	if len(events) != 1 || events[0].GetAlert().GetPath() != "/root/.ssh/id" || events[0].GetAlert().GetSequence() != 3 || events[0].GetAlert().GetCount() != 2 {
		t.Errorf("%v", events)
	}
	if ctx.Err() != nil {
		t.Error(context.Cause(ctx))
	}
	// An agent that was killed between a finding and the end of the job.
	_, j, ctx = watched(t)
	j.watching = watching{adopted: true}
	j.restoreFinding(&agentv1.AlertEvent{Sequence: 1, Rule: "operator-exec", Action: "stop", Kind: "operator-exec", TraceSequence: 9}, 1)
	a.beginWatching(t.Context(), j)
	if ctx.Err() == nil {
		t.Error("a job that a rule had ended goes on")
	}
}

func TestOutputThatWasCutCounts(t *testing.T) {
	a, j, _ := watched(t)
	a.lookAtOutput(t.Context(), j, 1000, 4<<20)
	a.lookAtOutput(t.Context(), j, 1000, 4<<20)
	if got := foundBy(j); got != "burst-of-output 4195304, output-cut 4194304" {
		t.Errorf("%s", got)
	}
	// Again when it has doubled, by whichever agent.
	j.watching.cut = 5 << 20
	a.lookAtOutput(t.Context(), j, 0, 5<<20)
	_, k, _ := watched(t)
	k.watching = watching{adopted: true}
	told, _, _ := j.feed.after(0)
	for _, e := range told {
		k.restoreFinding(e.GetAlert(), e.GetTimeUnixNano())
	}
	a.beginWatching(t.Context(), k)
	k.watching.cut = 5 << 20
	a.lookAtOutput(t.Context(), k, 0, 5<<20)
	if got := foundBy(k); got != foundBy(j) || got != "burst-of-output 4195304, output-cut 4194304" {
		t.Errorf("told anew: %s", got)
	}
	k.watching.cut = 8 << 20
	a.lookAtOutput(t.Context(), k, 0, 8<<20)
	if got := foundBy(k); got != foundBy(j)+", output-cut 8388608" {
		t.Errorf("%s", got)
	}
}

func foundBy(j *Job) string {
	var out []string
	for _, f := range j.watching.found.Findings {
		out = append(out, fmt.Sprintf("%s %d", f.Rule, f.Bytes))
	}
	return strings.Join(out, ", ")
}

func TestSpentEgressIsFound(t *testing.T) {
	a, j, _ := watched(t)
	j.egress = &jobEgress{programs: map[string]string{}}
	denials := []gate.Denial{{Number: 0, Host: "a.example.com", Port: 443, Rule: gate.RuleBudget, Count: 1}, {Number: 1, Host: "b.example.com", Port: 443, Rule: gate.RuleNotListed, Count: 1}}
	for _, e := range j.egress.note(gate.Report{Sequence: 1, Denials: denials}) {
		a.tellEgress(t.Context(), j, e)
	}
	if f := j.watching.found.Findings; len(f) != 1 || f[0].Rule != "egress-cut" || f[0].Address != "a.example.com:443" {
		t.Errorf("%+v", f)
	}
}

func TestNumbersAreToldWhileTheJobRuns(t *testing.T) {
	a, j, ctx := watched(t)
	loss := bundle.Metric{Name: "loss", Count: 2, Last: 1, Min: 1, Max: 2}
	for range 2 {
		a.sawReported(t.Context(), j, bundle.Metrics{Values: []bundle.Metric{loss}})
	}
	events, _, _ := j.feed.after(0)
	if len(events) != 1 || len(events[0].GetMetrics().GetMetrics()) != 1 || events[0].GetMetrics().GetMetrics()[0].GetLast() != 1 {
		t.Fatalf("%v", events)
	}
	for _, cut := range []int64{3, 3, 5, 6} {
		a.sawReported(t.Context(), j, bundle.Metrics{Values: []bundle.Metric{loss}, Cut: cut})
	}
	if got := foundBy(j); got != "metrics-cut 3, metrics-cut 6" || ctx.Err() != nil {
		t.Errorf("%s, %v", got, context.Cause(ctx))
	}
	a.live = map[string]*Job{j.id: j}
	if m, err := a.Reported(t.Context(), j.id); err != nil || m.Cut != 6 || len(m.Values) != 1 {
		t.Errorf("%+v, %v", m, err)
	}
	// Numbers pass: the journal has the two alerts. It knows no such job, so they are owed.
	if n := len(j.feed.owed); n != 2 {
		t.Errorf("%d events are for the journal", n)
	}
	a.live = nil
	if m, err := a.Reported(t.Context(), j.id); err != nil || len(m.Values) != 0 {
		t.Errorf("%+v, %v", m, err)
	}
}

// What passes gives way to what is kept.
func TestNumbersAreTrimmed(t *testing.T) {
	_, j, _ := watched(t)
	for range maxFeed + 10 {
		j.feed.mu.Lock()
		j.feed.put(&agentv1.WatchResponse{Event: &agentv1.WatchResponse_Metrics{Metrics: &agentv1.MetricsEvent{}}}, time.Unix(1, 0))
		j.feed.mu.Unlock()
	}
	if n := len(j.feed.events); n > maxFeed {
		t.Errorf("%d events are kept in memory", n)
	}
}

func TestWhatLeavesByTheGatewayIsAddedUp(t *testing.T) {
	a, j, _ := watched(t)
	j.egress = &jobEgress{connections: []bundle.Connection{{Host: "a.example.com", Port: 443, Sent: 200 << 20}}}
	a.lookAtSent(t.Context(), j)
	a.lookAtSent(t.Context(), j)
	if n := len(j.watching.found.Findings); n != 0 {
		t.Errorf("200 MiB are a burst: %d", n)
	}
	j.egress.connections = append(j.egress.connections, bundle.Connection{Host: "b.example.com", Port: 443, Sent: 100 << 20})
	a.lookAtSent(t.Context(), j)
	if f := j.watching.found.Findings; len(f) != 1 || f[0].Rule != "burst-to-network" || f[0].Address != "b.example.com:443" {
		t.Errorf("%+v", f)
	}
	// What an earlier agent saw does not count again.
	_, k, _ := watched(t)
	k.watching.sent, k.egress = nil, j.egress
	a.lookAtSent(t.Context(), k)
	if len(k.watching.found.Findings) != 0 || len(k.watching.sent) != 2 {
		t.Errorf("%+v", k.watching.found.Findings)
	}
}

// A full disk does not make a job that has ended one that runs.
func TestTheEndOfAJobInsists(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithCancelCause(t.Context())
		a := &Agent{log: slog.New(slog.DiscardHandler), ctx: ctx}
		j := newJob("job", "user/ada")
		full := errors.New("disk is full")
		tries := 0
		began := time.Now()
		if err := a.insist(t.Context(), j, func() error {
			if tries++; tries < 10 {
				return full
			}
			return nil
		}); err != nil || tries != 10 || time.Since(began) > time.Minute {
			t.Errorf("%v after %d tries and %s", err, tries, time.Since(began))
		}
		for _, final := range []error{journal.ErrConflict, journal.ErrNotFound} {
			if err := a.insist(t.Context(), j, func() error { return final }); !errors.Is(err, final) {
				t.Errorf("%v: %v", final, err)
			}
		}
		stop(errShutdown)
		if err := a.insist(t.Context(), j, func() error { return full }); !errors.Is(err, full) {
			t.Errorf("an agent that ends: %v", err)
		}
	})
}

// What a job sends through its gateway is what its plan allows, also where the job was taken
// up only to be concluded and nobody has asked the gateway.
func TestGatewayOfAJobThatIsConcluded(t *testing.T) {
	to := func(address string) holdapi.Event {
		return holdapi.Event{Sequence: 1, UnixNano: 1, Kind: string(rules.Connect), Detail: address}
	}
	for name, tt := range map[string]struct {
		egress []plan.Egress
		to     string
		found  int
	}{
		"its gateway":                  {[]plan.Egress{{Host: "a.example.com", Port: 443}}, egress.Addr().String() + ":3128", 0},
		"elsewhere":                    {[]plan.Egress{{Host: "a.example.com", Port: 443}}, "192.0.2.1:443", 1},
		"there, and its plan has none": {nil, egress.Addr().String() + ":3128", 1},
	} {
		t.Run(name, func(t *testing.T) {
			a, j, _ := watched(t)
			j.plan.Egress = tt.egress
			a.beginWatching(t.Context(), j)
			a.lookAt(t.Context(), j, to(tt.to))
			if got := len(j.watching.found.Findings); got != tt.found {
				t.Errorf("%d findings: %+v", got, j.watching.found.Findings)
			}
		})
	}
}
