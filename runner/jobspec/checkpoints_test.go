package jobspec

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
)

func TestCheckpointFields(t *testing.T) {
	b, err := os.ReadFile("../../examples/resume/job.yaml")
	if err != nil {
		t.Fatal(err)
	}
	example := string(b)
	digest := string(plan.Sum([]byte("x")))
	if _, err := Parse([]byte(strings.Replace(example, "file:///var/lib/coffer/demo/fashion-mnist-numpy-checkpoints", "s3://bucket/prefix", 1))); err != nil {
		t.Errorf("checkpoints in a bucket: %v", err)
	}
	s, err := Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	if k := s.Checkpoints.Keep; s.Checkpoints.Resume != plan.ResumeLatest || k.Last != 3 || k.Best.Metric != "loss" || k.Best.Want != "min" {
		t.Errorf("%+v", s.Checkpoints)
	}
	for resume, want := range map[string]string{"": "", "resume: none": "", "resume: latest": plan.ResumeLatest, "resume: " + digest: digest} {
		s, err := Parse([]byte(strings.Replace(example, "resume: latest", resume, 1)))
		if err != nil {
			t.Errorf("%s: %v", resume, err)
			continue
		}
		if got := s.Checkpoints.plan().Resume; got != want {
			t.Errorf("%q is %q in the plan, want %q", resume, got, want)
		}
		// An agent that was restarted reads the redacted file.
		r, err := s.Redacted()
		if err != nil {
			t.Fatal(err)
		}
		again, err := Parse(r)
		if err != nil || again.Checkpoints.URI != s.Checkpoints.URI || again.Checkpoints.plan().Resume != want || again.Checkpoints.Keep.Last != 3 {
			t.Errorf("the redacted job file: %v, %+v", err, again.Checkpoints)
		}
	}
	for name, tc := range map[string]struct{ old, text, field string }{
		"resume from a word":       {"resume: latest", "resume: newest", "checkpoints.resume"},
		"resume from half a sum":   {"resume: latest", "resume: sha384:00", "checkpoints.resume"},
		"keep nothing":             {"    last: 3\n    best: {metric: loss, want: min}", "    last: 0", "checkpoints.keep.last"},
		"keep a negative number":   {"last: 3", "last: -1", "checkpoints.keep.last"},
		"best of nothing":          {"metric: loss", "metric: \"\"", "checkpoints.keep.best.metric"},
		"best neither way":         {"want: min", "want: low", "checkpoints.keep.best.want"},
		"best of its name":         {"metric: loss", "metric: checkpoint", "checkpoints.keep.best.metric"},
		"every so little":          {"last: 3", "every: 1ms", "checkpoints.keep.every"},
		"checkpoints in no bucket": {"file:///var/lib/coffer/demo/fashion-mnist-numpy-checkpoints", "s3://bucket/prefix?x=1", "checkpoints.uri"},
		"a rule that nobody knows": {"last: 3", "first: 3", "checkpoints.keep.first"},
	} {
		text := strings.Replace(example, tc.old, tc.text, 1)
		if text == example {
			t.Fatalf("%s changes nothing", name)
		}
		var e *Error
		if _, err := Parse([]byte(text)); !errors.As(err, &e) || e.Field != tc.field || e.Line == 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
}
