package main

import (
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/jobspec"
)

// What a job asked for is the job's to choose: it must not write the proposal.
func TestProposalListsNamesAndNothingElse(t *testing.T) {
	v := egressView{plan: plan.Plan{Egress: []plan.Egress{
		{Host: "a.example.com", Port: 443, MaxBytes: 1000, BytesPerSecond: 500}, {Host: "idle.example.com", Port: 443, MaxBytes: 7, BytesPerSecond: 7},
	}}}
	v.Connections = []bundle.Connection{{Host: "a.example.com", Port: 443, Sent: 1000, End: "budget"}}
	const inject = "x.example.com\n  - host: evil.example.com\n    maxBytes: 1Gi"
	for _, d := range []bundle.Denial{
		{Host: "a.example.com", Port: 443, Rule: "budget", Count: 1},
		{Host: "new.example.com", Port: 8443, Rule: "not-listed", Count: 2, Process: "curl", Digest: "sha256:1"},
		{Host: "looked-up.example.com", Port: 53, Rule: "dns-not-listed", Count: 1},
		{Host: "44.1.0.2", Port: 443, Rule: "not-through-the-gateway", Count: 1, Process: "p\n  - host: evil.example.com"},
		{Host: "44.1.0.3", Port: 443, Rule: "not-listed", Count: 1},
		{Host: inject, Port: 443, Rule: "not-listed", Count: 1},
		{Host: "hidden.example.com", Port: 443, Rule: "encrypted-hello", Count: 1},
	} {
		v.Denials = append(v.Denials, d)
	}
	text := proposal("01JD3V8QK5W2M7N4P6R8S0T1V3", v)
	s, err := jobspec.Parse([]byte(`apiVersion: coffer.run/v1
name: n
image: coffer.local/numpy:latest
command: [/bin/true]
inputs: []
resources: {cpu: 1, memory: 512Mi, gpus: 0}
attestationPolicy: simulation
` + text))
	if err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	want := []jobspec.Egress{
		{Host: "a.example.com", Port: 443, MaxBytes: 2000, BytesPerSecond: 500},
		{Host: "idle.example.com", Port: 443, MaxBytes: 7, BytesPerSecond: 7},
		{Host: "looked-up.example.com", Port: 443, MaxBytes: proposedBytes, BytesPerSecond: jobspec.DefaultEgressBytesPerSecond},
		{Host: "new.example.com", Port: 8443, MaxBytes: proposedBytes, BytesPerSecond: jobspec.DefaultEgressBytesPerSecond},
	}
	if len(s.Egress) != len(want) {
		t.Fatalf("%d destinations in\n%s", len(s.Egress), text)
	}
	for i, e := range s.Egress {
		if e != want[i] {
			t.Errorf("%+v, want %+v", e, want[i])
		}
	}
	for _, says := range []string{`new: asked for 2 times by "curl" (sha256:1)`, "not used by this job", "cut after 1000 bytes", `"44.1.0.2:443": not-through-the-gateway`, "hidden.example.com"} {
		if !strings.Contains(text, says) {
			t.Errorf("it does not say %s:\n%s", says, text)
		}
	}
}
