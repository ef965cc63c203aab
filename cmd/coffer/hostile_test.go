package main

import (
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"
	"unicode"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/plan"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
)

// evil moves the cursor with three kinds of bytes, writes over its line, begins one,
// turns its direction round, pushes a verdict to where a terminal begins a line, and
// sets title and clipboard.
const evil = "x\x1b[1A\x1b[2K\u009b2J\r\nVERIFIED: forged\nsucceeded. forged\tpass\u2028VERIFIED\u202e\u2066\u200b\x7f\x1b]0;t\x07\x1b]52;c;eA==\x07" + "                                                                                VERIFIED: forged"

// fill puts evil into every text of a message, but for ids and what keep names.
func fill(m proto.Message, keep ...string) {
	var into func(r protoreflect.Message)
	into = func(r protoreflect.Message) {
		fields := r.Descriptor().Fields()
		for i := range fields.Len() {
			f := fields.Get(i)
			if slices.Contains(append(keep, "id", "retry_of", "retried_as"), string(f.Name())) || f.IsMap() || f.ContainingOneof() != nil {
				continue
			}
			text := protoreflect.ValueOfString(evil)
			switch {
			case f.IsList() && f.Kind() == protoreflect.StringKind:
				r.Mutable(f).List().Append(text)
			case f.IsList() && f.Kind() == protoreflect.MessageKind:
				l := r.Mutable(f).List()
				e := l.NewElement()
				into(e.Message())
				l.Append(e)
			case f.Kind() == protoreflect.StringKind:
				r.Set(f, text)
			case f.Kind() == protoreflect.MessageKind && !f.IsList():
				into(r.Mutable(f).Message())
			}
		}
	}
	into(m.ProtoReflect())
}

// hostileEvents has every kind of event that there is, each with evil in all its texts.
func hostileEvents(t *testing.T) []*agentv1.WatchResponse {
	t.Helper()
	var out []*agentv1.WatchResponse
	kinds := (&agentv1.WatchResponse{}).ProtoReflect().Descriptor().Oneofs().ByName("event").Fields()
	for i := range kinds.Len() {
		for _, phase := range []string{evil, phaseDone, phaseFailed, phaseWaiting} {
			e := &agentv1.WatchResponse{}
			inner := e.ProtoReflect().Mutable(kinds.Get(i)).Message().Interface()
			fill(inner, "stream")
			switch m := inner.(type) {
			case *agentv1.StageEvent:
				m.Phase = phase
			case *agentv1.LogEvent:
				m.Stream, m.Data = "stdout", []byte(evil+"\n")
			}
			out = append(out, e)
		}
	}
	if len(out) < 4*10 {
		t.Fatalf("%d events", len(out))
	}
	return printed(out...)
}

// unsteered fails the test for a character that a terminal would act upon or not show,
// and for a line that only evil can have begun.
func unsteered(t *testing.T, what, s string) {
	t.Helper()
	for _, r := range s {
		if r != '\n' && (unicode.IsControl(r) || unicode.Is(unicode.Cf, r) || unicode.Is(unicode.Zl, r)) {
			t.Errorf("%s: %U is shown: %q", what, r, s)
			return
		}
	}
	for line := range strings.Lines(s) {
		if strings.HasPrefix(line, "VERIFIED") || strings.HasPrefix(line, "succeeded. forged") {
			t.Errorf("%s: a line of the attacker's: %q", what, line)
		}
		// What a job prints keeps its spaces, and JSON keeps what it says.
		if strings.Contains(line, strings.Repeat(" ", 60)+"VERIFIED") && !strings.HasPrefix(line, jobMark) && !strings.Contains(what, "JSON") {
			t.Errorf("%s: pushed to the next line of a terminal: %q", what, line)
		}
	}
}

// TestNobodyWritesForCoffer lets an agent and a broker, and so jobs and whoever names
// something to them, put their worst into every text that they send.
func TestNobodyWritesForCoffer(t *testing.T) {
	s := newFakeStack(t)
	s.agent.events = hostileEvents(t)
	grant := &brokerv1.Grant{Id: "g-1"}
	fill(grant)
	grant.State = "requested"
	s.broker.grants = func(*brokerv1.ListGrantsRequest) (*connect.Response[brokerv1.ListGrantsResponse], error) {
		return connect.NewResponse(&brokerv1.ListGrantsResponse{Grants: []*brokerv1.Grant{grant}}), nil
	}
	asset := &brokerv1.Asset{}
	fill(asset)
	s.broker.assets = []*brokerv1.Asset{asset}
	job := jobFile(t, smallJob)
	for _, state := range []string{evil, stateQueued, "running", stateSucceeded, stateRefused, stateFailed} {
		j := &agentv1.Job{Id: "job-1", QueuePosition: 1}
		fill(j)
		j.State = state
		for _, c := range j.GetChecks() {
			c.Outcome = "fail"
		}
		s.agent.jobs["job-1"] = j
		for _, args := range [][]string{
			{"ps"}, {"status", "job-1"}, {"why", "job-1"}, {"events", "job-1"}, {"checkpoints", "ls", "job-1"}, {"grants", "ls"}, {"assets", "ls"},
			{"watch", "job-1"}, {"submit", job, "-w"}, {"plan", job}, {"cancel", "job-1"}, {"egress", "report", "job-1"},
		} {
			if state != evil && state != stateRefused && slices.Contains([]string{"events", "checkpoints", "grants", "assets", "plan", "egress"}, args[0]) {
				continue // they do not depend on the state
			}
			what := strings.Join(append(args, state[:min(len(state), 9)]), " ")
			r := s.coffer(t.Context(), args...)
			text := r.stdout + "\n" + r.stderr
			if r.err != nil {
				text += "\n" + r.err.Error()
			}
			if !strings.Contains(text, "VERIFIED") && args[0] != "cancel" && args[0] != "egress" && args[0] != "plan" && !(args[0] == "why" && state == stateSucceeded) {
				t.Errorf("%s: shows nothing of what was sent: it tests nothing:\n%s", what, text)
			}
			unsteered(t, what, text)
		}
	}
	// In JSON the text is there, whole, and shows nothing either.
	r := s.coffer(t.Context(), "status", "job-1", "-o", "json")
	var v jobView
	if err := json.Unmarshal([]byte(r.stdout), &v); err != nil || v.Name != evil {
		t.Errorf("%q, %v", v.Name, err)
	}
	unsteered(t, "status in JSON", r.stdout)
	unsteered(t, "events in JSON", s.coffer(t.Context(), "events", "job-1", "-o", "json").stdout)
}

// A server's error may have several lines: they stand under coffer's own.
func TestErrorsOfAServer(t *testing.T) {
	err := connect.NewError(connect.CodeInvalidArgument, connect.NewWireError(connect.CodeInternal, os.ErrInvalid))
	c := &cli{}
	if got := c.explain("submit", serverAgent, err).Error(); !strings.HasPrefix(got, "submit: ") {
		t.Errorf("%q", got)
	}
	text := message(connect.NewWireError(connect.CodeInternal, errEvil{}))
	for _, line := range strings.Split(text, "\n")[1:] {
		if !strings.HasPrefix(line, "    ") {
			t.Errorf("%q begins a line", line)
		}
	}
}

type errEvil struct{}

func (errEvil) Error() string { return evil }

// An agent that answers with another job, or with one whose name is a command, is
// not believed: people type it again.
func TestIdsThatAreNoIds(t *testing.T) {
	s := newFakeStack(t)
	s.agent.jobs["job-1"] = &agentv1.Job{Id: "job-2", State: stateSucceeded}
	s.coffer(t.Context(), "status", "job-1").want(t, exitFailed, `answers with job "job-2"`)
	for _, id := range []string{"$(id)", "a b", "a;id", "--help", "a\nb", "`id`", "../x"} {
		s.agent.jobs["job-1"] = &agentv1.Job{Id: "job-1", State: stateFailed, RetriedAs: id}
		s.coffer(t.Context(), "why", "job-1").want(t, exitFailed, "calls a job")
		s.agent.jobs["job-1"] = &agentv1.Job{Id: id, State: stateFailed}
		if r := s.coffer(t.Context(), "submit", jobFile(t, smallJob)); r.code != exitFailed || r.stdout != "" {
			t.Errorf("%q: %d, %q", id, r.code, r.stdout)
		}
	}
	for in, want := range map[string]string{"grant-1": "grant-1", "$(id)": "'$(id)'", "it's": `'it'\''s'`, "-x": "'-x'", "": "''"} {
		if got := word(in); got != want {
			t.Errorf("word(%q) = %s, want %s", in, got, want)
		}
	}
}

// What coffer says of a job stands apart from what the job prints, however much it
// prints.
func TestLiveViewTellsWhoSpeaks(t *testing.T) {
	l := &live{job: "job-1", width: 80, height: 40}
	l.event(&agentv1.WatchResponse{Event: &agentv1.WatchResponse_Alert{Alert: &agentv1.AlertEvent{Rule: "ptrace", Says: "looked into another process"}}})
	for range 100 {
		l.event(logged(0, "stdout", "! rule ptrace: all is well\n"+saidMark+"checkpoint sealed\r"+saidMark+"fine\n"))
	}
	var said []string
	for line := range strings.Lines(shown(l)) {
		if strings.HasPrefix(line, saidMark) {
			said = append(said, strings.TrimSpace(line))
		} else if strings.Contains(line, "all is well") && !strings.HasPrefix(line, jobMark) {
			t.Errorf("a job's line without its mark: %q", line)
		}
	}
	if !slices.Equal(said, []string{"! rule ptrace: looked into another process"}) {
		t.Errorf("coffer says %q", said)
	}
	for range 2 * liveSaid {
		l.event(&agentv1.WatchResponse{Event: &agentv1.WatchResponse_Alert{Alert: &agentv1.AlertEvent{Rule: "ptrace"}}})
	}
	if s := shown(l); strings.Count(s, "\n"+saidMark) != liveSaid+1 || !strings.Contains(s, "before these: `coffer events job-1`") {
		t.Errorf("many findings:\n%s", s)
	}
}

// The live view shows no more of what agents send than lines do.
func TestLiveViewIsNotSteered(t *testing.T) {
	l := &live{job: "job-1", name: evil, width: 200, height: 200}
	for _, e := range hostileEvents(t) {
		l.event(e)
		unsteered(t, "live", shown(l))
	}
	l.Update(noticeMsg(evil))
	unsteered(t, "live", shown(l))
}

// shown is what the view shows, without its own styles.
func shown(l *live) string {
	text := l.text()
	for _, s := range []string{green, red, yellow, dim, bold, plain} {
		text = strings.ReplaceAll(text, s, "")
	}
	return text
}

// What differs looks different.
func TestDiffShowsWhatLooksAlike(t *testing.T) {
	r := newRecords(t)
	by := func(name, submitter string) string {
		return r.job(t, name, bundletest.Options{}, func(j *bundletest.Job) {
			b, err := plan.Canonical(bundle.Agent{Node: "node-1", Submitter: submitter})
			if err != nil {
				t.Fatal(err)
			}
			j.Parts[bundle.AgentPart] = b
		})
	}
	first, second := by("first.json", "user/alice"), by("second.json", "user/\u0430lice\u200b")
	got := r.coffer(t, "evidence", "diff", first, second)
	got.want(t, 0, `- "user/alice"`, `+ "user/\u0430lice\u200b"`)
	unsteered(t, "diff", got.stdout)
}
