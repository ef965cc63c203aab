package jobspec

import (
	"errors"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
)

const networked = `apiVersion: coffer.run/v1
name: n
image: coffer.local/numpy:latest
command: [/bin/true]
inputs: []
resources: {cpu: 1, memory: 512Mi, gpus: 0}
attestationPolicy: simulation
`

func TestEgressOfAJobFile(t *testing.T) {
	one := "egress:\n  - host: a.example.com\n    maxBytes: 1Ki\n"
	for name, tt := range map[string]struct {
		text  string
		field string // of the error, or none
	}{
		"one":                         {one, ""},
		"two ports of one host":       {one + "  - host: a.example.com\n    port: 8443\n    maxBytes: 1Ki\n", ""},
		"no maxBytes":                 {"egress:\n  - host: a.example.com\n", "egress[0].maxBytes"},
		"an address":                  {"egress:\n  - host: 44.1.0.2\n    maxBytes: 1Ki\n", "egress[0].host"},
		"a wildcard":                  {"egress:\n  - host: '*.example.com'\n    maxBytes: 1Ki\n", "egress[0].host"},
		"a URL":                       {"egress:\n  - host: https://a.example.com\n    maxBytes: 1Ki\n", "egress[0].host"},
		"a port that is none":         {"egress:\n  - host: a.example.com\n    port: 70000\n    maxBytes: 1Ki\n", "egress[0].port"},
		"the same twice":              {one + "  - host: a.example.com\n    port: 443\n    maxBytes: 1Ki\n", "egress[1].host"},
		"bounds of nothing":           {"output: {egressBytes: 1Ki}\n", "output"},
		"too many refusals by name":   {one + "output: {egressEvents: 100000}\n", "output.egressEvents"},
		"a negative number of names":  {one + "output: {egressEvents: -1}\n", "output.egressEvents"},
		"more than a plan may have":   {"egress:\n" + strings.Repeat("  - host: a.example.com\n    maxBytes: 1Ki\n", plan.MaxEgress+1), "egress"},
		"a field that there is not":   {"egress:\n  - host: a.example.com\n    maxBytes: 1Ki\n    allow: all\n", "egress[0].allow"},
		"the list without an element": {"egress: []\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse([]byte(networked + tt.text))
			var e *Error
			switch {
			case tt.field == "" && err != nil:
				t.Error(err)
			case tt.field != "" && (!errors.As(err, &e) || e.Field != tt.field):
				t.Errorf("got %v, want field %s", err, tt.field)
			}
		})
	}
}

func TestEgressDefaults(t *testing.T) {
	s, err := Parse([]byte(networked + "egress:\n  - host: a.example.com\n    maxBytes: 1Ki\n  - host: b.example.com\n    port: 8443\n    maxBytes: 2Ki\n    bytesPerSecond: 4Mi\n"))
	if err != nil {
		t.Fatal(err)
	}
	p := plan.Plan{}
	s.planEgress(&p)
	want := []plan.Egress{{Host: "a.example.com", Port: 443, MaxBytes: 1024, BytesPerSecond: 1 << 20}, {Host: "b.example.com", Port: 8443, MaxBytes: 2048, BytesPerSecond: 4 << 20}}
	if !slices.Equal(p.Egress, want) {
		t.Errorf("%+v", p.Egress)
	}
	if o := p.Output; o.EgressBytes != 3072 || o.EgressBytesPerSecond != 4<<20 || o.EgressEvents != DefaultEgressEvents {
		t.Errorf("%+v", o)
	}
}

// The example and what docs/egress.md shows are job files.
func TestDocumentedEgress(t *testing.T) {
	b, err := os.ReadFile("../../examples/egress-limited/job.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if s, err := Parse(b); err != nil || len(s.Egress) != 1 {
		t.Errorf("the example: %v", err)
	}
	doc, err := os.ReadFile("../../docs/egress.md")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile("(?ms)^```yaml\n(.*?)^```$").FindSubmatch(doc)
	if m == nil {
		t.Fatal("docs/egress.md shows no job file")
	}
	if s, err := Parse([]byte(networked + string(m[1]))); err != nil || len(s.Egress) != 1 {
		t.Errorf("docs/egress.md: %v", err)
	}
}
