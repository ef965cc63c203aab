package jobspec

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
)

const good = `apiVersion: coffer.run/v1
name: fashion-mnist
image: coffer.local/numpy
command: [/usr/bin/python3, /app/train.py]
env:
  EPOCHS: "2"
inputs:
  - name: data
    asset: fashion-mnist
    uri: file:///srv/sealed/data
    mount: /inputs/data
checkpoints:
  asset: fm-ckpt
  uri: file:///srv/sealed/ckpt
  mount: /checkpoints
resources:
  cpu: 1500m
  memory: 4Gi
  gpus: 1
maxDuration: 30m
attestationPolicy: simulation
`

func TestParseReadsEveryField(t *testing.T) {
	s, err := Parse([]byte(good))
	if err != nil {
		t.Fatal(err)
	}
	if s.Resources.CPU != 1500 || s.Resources.Memory != 4<<30 || s.Resources.GPUs != 1 || s.Resources.Pids != DefaultPids {
		t.Errorf("resources: %+v", s.Resources)
	}
	if time.Duration(s.MaxDuration) != 30*time.Minute || s.Env["EPOCHS"] != "2" || s.Inputs[0].Mount != "/inputs/data" || s.Checkpoints.Asset != "fm-ckpt" {
		t.Errorf("spec: %+v", s)
	}
}

func TestParseNamesLineAndField(t *testing.T) {
	for _, tt := range []struct {
		name, old, new string
		line           int
		want           string
	}{
		{"unknown field", "maxDuration: 30m", "maxDurations: 30m", 20, `did you mean "maxDuration"`},
		{"unknown nested field", "  memory: 4Gi", "  memori: 4Gi", 18, `did you mean "memory"`},
		{"field like no other", "maxDuration: 30m", "zzzzzzzzzzzz: 1", 20, "known fields: apiVersion"},
		{"duplicate key", "maxDuration: 30m", "maxDuration: 30m\nmaxDuration: 31m", 21, "already defined"},
		{"other version", "coffer.run/v1", "coffer.run/v2", 1, "want coffer.run/v1"},
		{"bad name", "name: fashion-mnist", "name: Fashion MNIST", 2, "lower-case"},
		{"relative program", "[/usr/bin/python3,", "[python3,", 4, "absolute path"},
		{"no command", "command: [/usr/bin/python3, /app/train.py]", "command: []", 4, "the program"},
		{"size without number", "4Gi", "Gi", 18, "is not a size"},
		{"size too small", "4Gi", "4Ki", 18, "at least 64Mi"},
		{"overflowing size", "4Gi", "9999999999Ti", 18, "is not a size"},
		{"negative cores", "1500m", "-1", 17, "number of cores"},
		{"mount escapes", "mount: /inputs/data", "mount: /inputs/../etc", 11, "absolute path"},
		{"mount over system", "mount: /inputs/data", "mount: /etc/data", 11, "belongs to the sandbox"},
		{"mounts overlap", "mount: /checkpoints", "mount: /inputs/data/x", 15, "overlaps"},
		{"uri of another scheme", "file:///srv/sealed/data", "http://example/data", 10, "want file:///"},
		{"uri with dots", "file:///srv/sealed/data", "file:///srv/../sealed", 10, "want file:///"},
		{"bucket with a query", "file:///srv/sealed/data", "s3://b-1/data?endpoint=x", 10, "s3://bucket/prefix"},
		{"a log for ever", "maxDuration: 30m", "output: {logBytes: 100Ti}", 20, "at most 256Mi"},
		{"several nodes", "  gpus: 1", "  gpus: 1\n  nodes: 2", 20, "2: want 1: a job of several nodes is not supported"},
		{"a mode that is none", "  gpus: 1", "  gpus: 1\n  cc: devtools", 20, "want off, on or required"},
		{"confidential GPUs of none", "  gpus: 1", "  cc: required", 19, "asks for no GPUs"},
		{"an empty budget", "maxDuration: 30m", "budget: {}", 20, "want time, gpuTime or both"},
		{"a budget of no time", "maxDuration: 30m", "budget: {time: 0s}", 20, "at least a second"},
		{"GPU time without GPUs", "  gpus: 1", "budget: {gpuTime: 1h}", 19, "asks for no GPUs"},
		{"a second for two GPUs", "  gpus: 1", "  gpus: 2\nbudget: {gpuTime: 1s}", 20, "a second for each GPU"},
		{"half a second", "maxDuration: 30m", "budget: {time: 1500ms}", 20, "whole seconds"},
		{"a budget beyond bounds", "maxDuration: 30m", "budget: {time: 90000h}", 20, "at most ten years"},
		{"evidence for an hour", "maxDuration: 30m", "evidence: {retain: 1h}", 20, "at least 24h"},
		{"evidence without a time", "maxDuration: 30m", "evidence: {}", 20, "it is missing"},
		{"readers that are nobody", "maxDuration: 30m", "output: {logReaders: all}", 20, "want submitter, owners or engineers"},
		{"a group that is no name", "maxDuration: 30m", "approvals: [Model Owners]", 20, "lower-case"},
		{"too many groups", "maxDuration: 30m", "approvals: [a, b, c, d, e, f, g, h, i]", 20, "at most 8"},
		{"no policy", "attestationPolicy: simulation", "", 0, "attestation policy"},
		{"not yaml", "inputs:", "inputs: [", 0, ""},
		{"anchors", "name: fashion-mnist", "name: &n fashion-mnist", 2, "anchors"},
		{"two documents", "attestationPolicy: simulation", "attestationPolicy: simulation\n---\na: b", 0, "exactly one"},
		{"a number where a list is wanted", "command: [/usr/bin/python3, /app/train.py]", "command: 7", 4, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := strings.Replace(good, tt.old, tt.new, 1)
			if in == good {
				t.Fatal("the case changes nothing")
			}
			_, err := Parse([]byte(in))
			var e *Error
			if !errors.As(err, &e) {
				t.Fatalf("got %v, want an *Error", err)
			}
			if tt.line != 0 && e.Line != tt.line {
				t.Errorf("line %d, want %d: %v", e.Line, tt.line, err)
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%q does not say %q", err, tt.want)
			}
		})
	}
}

func TestPlanChangesWithEveryField(t *testing.T) {
	r := Resolved{
		Image: "sha256:" + strings.Repeat("a", 64), Digests: map[string]plan.Digest{"fashion-mnist": plan.Sum([]byte("m"))},
		Policy: plan.Policy{Name: "simulation", Digest: plan.Sum([]byte("p"))}, Profile: plan.Sum([]byte("s")),
	}
	digest := func(in string, r Resolved) plan.Digest {
		t.Helper()
		s, err := Parse([]byte(in))
		if err != nil {
			t.Fatal(err)
		}
		p, err := s.Plan(r)
		if err != nil {
			t.Fatal(err)
		}
		d, err := p.Digest()
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	base := digest(good, r)
	if base != digest(good+"\n# a comment\n", r) {
		t.Error("a comment changes the plan")
	}
	seen := map[plan.Digest]string{base: "base"}
	add := func(name string, d plan.Digest) {
		if other, ok := seen[d]; ok {
			t.Errorf("%s has the plan digest of %s", name, other)
		}
		seen[d] = name
	}
	for _, c := range [][2]string{
		{"name: fashion-mnist", "name: other"}, {"/app/train.py", "/app/other.py"}, {`EPOCHS: "2"`, `EPOCHS: "3"`}, {"EPOCHS", "EPOCH"},
		{"name: data", "name: date"}, {"mount: /inputs/data", "mount: /inputs/d"}, {"asset: fm-ckpt", "asset: fm-other"}, {"mount: /checkpoints", "mount: /ck"},
		{"1500m", "1501m"}, {"4Gi", "5Gi"}, {"gpus: 1", "gpus: 2"}, {"30m", "31m"}, {"gpus: 1", "gpus: 1\n  pids: 9"}, {"maxDuration: 30m", "maxDuration: 30m\noutput: {logBytes: 1Mi}"},
	} {
		add(c[1], digest(strings.Replace(good, c[0], c[1], 1), r))
	}
	for _, line := range []string{
		"resources: {cpu: 1500m, memory: 4Gi, gpus: 1, cc: on}", "resources: {cpu: 1500m, memory: 4Gi, gpus: 1, cc: required}",
		"budget: {time: 1h}", "budget: {gpuTime: 1h}", "budget: {time: 1h, gpuTime: 1h}", "evidence: {retain: 24h}", "evidence: {retain: 25h}",
		"output: {logReaders: owners}", "output: {logReaders: engineers}",
	} {
		in := good + line + "\n"
		if rest, ok := strings.CutPrefix(line, "resources:"); ok {
			in = strings.Replace(good, "resources:\n  cpu: 1500m\n  memory: 4Gi\n  gpus: 1\n", "resources:"+rest+"\n", 1)
		}
		add(line, digest(in, r))
	}
	// What is said and holds anyhow is the same plan, and who is expected to approve
	// is no part of it.
	for _, line := range []string{"output: {logReaders: submitter}", "approvals: [model-owners]"} {
		if base != digest(good+line+"\n", r) {
			t.Errorf("%s changes the plan", line)
		}
	}
	if base != digest(strings.Replace(good, "  gpus: 1", "  gpus: 1\n  cc: off\n  nodes: 1", 1), r) {
		t.Error("cc: off and nodes: 1 change the plan")
	}
	r2 := r
	r2.Image = "sha256:" + strings.Repeat("b", 64)
	add("image", digest(good, r2))
	r2 = r
	r2.Digests = map[string]plan.Digest{"fashion-mnist": plan.Sum([]byte("n"))}
	add("input digest", digest(good, r2))
	r2 = r
	r2.Policy.Digest = plan.Sum([]byte("q"))
	add("policy", digest(good, r2))
	r2 = r
	r2.Profile = plan.Sum([]byte("t"))
	add("profile", digest(good, r2))
}

func TestRedactedHidesValues(t *testing.T) {
	s, err := Parse([]byte(strings.Replace(good, `EPOCHS: "2"`, "TOKEN: hunter2-very-secret", 1)))
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.Redacted()
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(b), "hunter2") {
		t.Errorf("the redacted job file shows a value:\n%s", b)
	}
	again, err := Parse(b)
	if err != nil {
		t.Fatalf("the redacted job file does not parse: %v\n%s", err, b)
	}
	if again.Name != s.Name || again.Resources != s.Resources {
		t.Error("redaction changed more than the values")
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(good))
	f.Add([]byte("a: &a [*a, *a]"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := Parse(b); err == nil && s.APIVersion != APIVersion {
			t.Errorf("accepted version %q", s.APIVersion)
		}
	})
}
