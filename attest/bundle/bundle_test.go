package bundle

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/translog"
)

func outcome() Outcome { return Outcome{State: Succeeded, Stage: StageEvidence} }

func timeline() []Step {
	return []Step{{Stage: StageJobspec, StartUnixNano: 1, Nanos: 1, Outcome: StepDone}}
}

func build(t *testing.T) []byte {
	t.Helper()
	b := NewBuilder()
	if err := b.Add(JobFile, []byte("apiVersion: coffer.run/v1\n")); err != nil {
		t.Fatal(err)
	}
	if err := b.AddJSON(AgentPart, Agent{Node: "node-1"}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Statement("job", plan.Sum([]byte("plan")), outcome(), timeline()); err != nil {
		t.Fatal(err)
	}
	out, err := b.Finish([]byte("signature"), &Log{Receipt: "r", Entries: []translog.Entry{}})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestRoundTrip(t *testing.T) {
	raw := build(t)
	b, err := Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	s, err := ParseStatement(b.Statement)
	if err != nil {
		t.Fatal(err)
	}
	if s.JobID != "job" || len(s.Parts) != 2 || s.Parts[JobFile] != plan.Sum(b.Parts[JobFile]) {
		t.Errorf("statement %+v", s)
	}
}

// The log's word is added to a record that was made without it, and changes nothing else.
func TestWithLog(t *testing.T) {
	logged := build(t)
	b, err := Parse(logged)
	if err != nil {
		t.Fatal(err)
	}
	before := *b
	before.Log = nil
	got, err := before.WithLog(*b.Log)
	if err != nil || !bytes.Equal(got, logged) || before.Log != nil {
		t.Errorf("%s, %v", got, err)
	}
	if _, err := before.WithLog(Log{Checkpoint: make([]byte, MaxSize)}); err == nil {
		t.Error("a record of any size is made")
	}
}

// A bundle must read the same in every reader: whatever a lenient JSON parser
// would let pass is refused.
func TestOneEncoding(t *testing.T) {
	raw := build(t)
	tests := map[string]string{
		"white space":        " " + string(raw),
		"trailing newline":   string(raw) + "\n",
		"trailing value":     string(raw) + "{}",
		"duplicate key":      strings.Replace(string(raw), `"version":`, `"version":"x","version":`, 1),
		"key in other case":  strings.Replace(string(raw), `"version":`, `"Version":`, 1),
		"unknown field":      strings.Replace(string(raw), `"version":`, `"extra":1,"version":`, 1),
		"unknown version":    strings.Replace(string(raw), Version, "coffer.run/bundle/v2", 1),
		"base64 with a line": strings.Replace(string(raw), `"signature":"`, `"signature":"\n`, 1),
		"empty":              "",
		"null":               "null",
	}
	for name, in := range tests {
		t.Run(name, func(t *testing.T) {
			if _, err := Parse([]byte(in)); err == nil {
				t.Error("parsed")
			}
		})
	}
	t.Run("every truncation", func(t *testing.T) {
		for i := range raw {
			if _, err := Parse(raw[:i]); err == nil {
				t.Fatalf("parsed the first %d bytes", i)
			}
		}
	})
}

func TestParseStatementRefuses(t *testing.T) {
	good := Statement{
		Version: StatementVersion, JobID: "job", PlanDigest: plan.Sum(nil), Parts: map[Part]plan.Digest{Plan: plan.Sum(nil)},
		Outcome: outcome(), Timeline: timeline(),
	}
	tests := map[string]func(*Statement){
		"version":        func(s *Statement) { s.Version = "" },
		"job":            func(s *Statement) { s.JobID = "" },
		"plan digest":    func(s *Statement) { s.PlanDigest = "sha384:00" },
		"unknown state":  func(s *Statement) { s.Outcome.State = "fine" },
		"unknown stage":  func(s *Statement) { s.Outcome.Stage = "lunch" },
		"no timeline":    func(s *Statement) { s.Timeline = nil },
		"unknown step":   func(s *Statement) { s.Timeline = []Step{{Stage: "lunch", Outcome: StepDone}} },
		"step outcome":   func(s *Statement) { s.Timeline = []Step{{Stage: StageRun, Outcome: "maybe"}} },
		"unknown part":   func(s *Statement) { s.Parts = map[Part]plan.Digest{"extra": plan.Sum(nil)} },
		"part digest":    func(s *Statement) { s.Parts = map[Part]plan.Digest{Plan: ""} },
		"statement size": func(s *Statement) { s.Outcome.Reason = strings.Repeat("x", MaxStatement) },
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			s := good
			change(&s)
			b, err := json.Marshal(s)
			if err != nil {
				t.Fatal(err)
			}
			c, err := plan.Canonical(json.RawMessage(b))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := ParseStatement(c); err == nil {
				t.Error("parsed")
			}
		})
	}
	c, err := plan.Canonical(good)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseStatement(c); err != nil {
		t.Fatal(err)
	}
	if _, err := ParseStatement(append(bytes.Clone(c), ' ')); err == nil {
		t.Error("parsed a statement that is not canonical")
	}
}

func TestBuilderRefuses(t *testing.T) {
	b := NewBuilder()
	if err := b.Add("extra", nil); err == nil {
		t.Error("added an unknown part")
	}
	if err := b.Add(JobFile, make([]byte, MaxPart+1)); err == nil {
		t.Error("added a part over the limit")
	}
	if err := b.Add(JobFile, nil); err != nil {
		t.Fatal(err)
	}
	if err := b.Add(JobFile, nil); err == nil {
		t.Error("added a part twice")
	}
	if _, err := b.Finish(nil, nil); err == nil {
		t.Error("finished without a statement")
	}
	if _, err := b.Statement("", plan.Sum(nil), outcome(), timeline()); err == nil {
		t.Error("made a statement about no job")
	}
	if _, err := b.Statement("job", plan.Sum(nil), outcome(), timeline()); err != nil {
		t.Fatal(err)
	}
	if err := b.Add(Plan, nil); err == nil {
		t.Error("added a part after the statement")
	}
	if _, err := b.Statement("job", plan.Sum(nil), outcome(), timeline()); err == nil {
		t.Error("made a second statement")
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"parts":{},"statement":"","version":"coffer.run/bundle/v1"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		out, err := Parse(b)
		if err != nil {
			return
		}
		if _, err := ParseStatement(out.Statement); err != nil {
			return
		}
	})
}
