package jobspec

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
)

const resealFile = `apiVersion: coffer.run/v1
name: reseal
reseal:
  asset: weights
  uri: file:///srv/weights
  to: weights-2
  out: file:///srv/weights-2
inputs: []
resources: {cpu: 1, memory: 256Mi, gpus: 0}
attestationPolicy: production
`

func TestReseal(t *testing.T) {
	s, err := Parse([]byte(resealFile))
	if err != nil {
		t.Fatal(err)
	}
	none, err := plan.NoContainer().Digest()
	if err != nil {
		t.Fatal(err)
	}
	d := plan.Sum([]byte("weights"))
	p, err := s.Plan(Resolved{Digests: map[string]plan.Digest{"weights": d}, Policy: plan.Policy{Name: "production", Digest: d}, Profile: none})
	if err != nil {
		t.Fatal(err)
	}
	if *p.Reseal != (plan.Reseal{Asset: "weights", Digest: d, To: "weights-2"}) {
		t.Errorf("%+v", p.Reseal)
	}
	if _, err := s.Plan(Resolved{Policy: plan.Policy{Name: "production", Digest: d}, Profile: none}); err == nil {
		t.Error("a plan without the source's digest")
	}
	export, err := Parse([]byte(strings.Replace(resealFile, "  to:", "  checkpoint: "+string(d)+"\n  to:", 1)))
	if err != nil {
		t.Fatal(err)
	}
	if p, err := export.Plan(Resolved{Policy: plan.Policy{Name: "production", Digest: d}, Profile: none}); err != nil || *p.Reseal != (plan.Reseal{Asset: "weights", Digest: d, Checkpoint: true, To: "weights-2"}) {
		t.Errorf("%+v %v", p.Reseal, err)
	}
	if parent, name, err := s.Reseal.Folder(); parent != "file:///srv" || name != "weights-2" || err != nil {
		t.Errorf("%s %s %v", parent, name, err)
	}
	redacted, err := s.Redacted()
	if err != nil {
		t.Fatal(err)
	}
	if again, err := Parse(redacted); err != nil || *again.Reseal != *s.Reseal {
		t.Errorf("%v in\n%s", err, redacted)
	}
}

func TestResealFields(t *testing.T) {
	for name, tc := range map[string]struct{ old, with, field string }{
		"an image":                {"inputs: []", "image: coffer.local/x:latest\ninputs: []", "image"},
		"a command":               {"inputs: []", "command: [/bin/true]\ninputs: []", "command"},
		"a variable":              {"inputs: []", "env: {A: b}\ninputs: []", "env"},
		"an input":                {"inputs: []", "inputs: [{name: a, asset: a, uri: 'file:///a', mount: /a}]", "inputs"},
		"checkpoints":             {"inputs: []", "checkpoints: {asset: a, uri: 'file:///a', mount: /a}", "checkpoints"},
		"a GPU":                   {"gpus: 0", "gpus: 1", "resources.gpus"},
		"itself as its target":    {"to: weights-2", "to: weights", "reseal.to"},
		"a relative source":       {"uri: file:///srv/weights\n", "uri: weights\n", "reseal.uri"},
		"a bucket to write to":    {"out: file:///srv/weights-2", "out: s3://bucket/x", "reseal.out"},
		"the root to write to":    {"out: file:///srv/weights-2", "out: file:///", "reseal.out"},
		"a folder in the root":    {"out: file:///srv/weights-2", "out: file:///weights", "reseal.out"},
		"a name that is half way": {"out: file:///srv/weights-2", "out: file:///srv/w.tmp", "reseal.out"},
		"no target":               {"  to: weights-2\n", "", "reseal.to"},
		"nothing at all":          {resealFile[strings.Index(resealFile, "reseal:\n"):strings.Index(resealFile, "inputs")], "", "command"},
	} {
		b := bytes.Replace([]byte(resealFile), []byte(tc.old), []byte(tc.with), 1)
		if bytes.Equal(b, []byte(resealFile)) {
			t.Fatalf("%s changes nothing", name)
		}
		_, err := Parse(b)
		if !slices.ContainsFunc(Problems(err), func(e *Error) bool { return e.Field == tc.field }) {
			t.Errorf("%s: %v, want a problem of %s", name, err, tc.field)
		}
	}
}
