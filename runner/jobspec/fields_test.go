package jobspec

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write docs/formats/jobfile.schema.json and docs/job-file.md")

const updateCommand = "go test ./runner/jobspec -run TestDocuments -update"

func TestDocuments(t *testing.T) {
	schema, err := Schema()
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string][]byte{
		"../../docs/formats/jobfile.schema.json": schema,
		"../../docs/job-file.md":                 reference(),
	} {
		if *update {
			if err := os.WriteFile(path, want, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is not what the code says (%v): %s writes it", path, err, updateCommand)
		}
	}
}

// reference is docs/job-file.md.
func reference() []byte {
	var b bytes.Buffer
	b.WriteString(`# The job file

Written by ` + "`" + updateCommand + "`" + ` from the table that also makes the
[JSON Schema](formats/jobfile.schema.json), ` + "`coffer init`, `coffer explain`, `coffer validate`" + ` and the node agent's checks.

` + "`coffer init`" + ` writes this file with every field in it, those that are not required as comments:

` + "```yaml\n" + Example() + "```" + `

A field marked *plan* changes the plan digest: people approve its value, and a change needs a new approval.
Unknown fields are errors. Anchors, aliases and tags are not allowed.
`)
	for _, f := range Fields() {
		fmt.Fprintf(&b, "\n## %s\n\n%s\n\n- want: %s\n", f.Path, f.Doc, f.Want)
		switch {
		case f.Required:
			b.WriteString("- required\n")
		case f.Default != "":
			fmt.Fprintf(&b, "- without it: %s\n", f.Default)
		}
		if f.Planned {
			b.WriteString("- *plan*\n")
		}
		if f.Example != "" {
			fmt.Fprintf(&b, "- example: `%s`\n", f.Example)
		}
	}
	return b.Bytes()
}

// Each field of Spec has a row, and each row a field.
func TestFields(t *testing.T) {
	var want []string
	var walk func(reflect.Type, string)
	walk = func(typ reflect.Type, at string) {
		switch typ.Kind() {
		case reflect.Pointer:
			walk(typ.Elem(), at)
		case reflect.Slice:
			walk(typ.Elem(), at+"[]")
		case reflect.Struct:
			for i := range typ.NumField() {
				name, _, _ := strings.Cut(typ.Field(i).Tag.Get("yaml"), ",")
				p := strings.TrimPrefix(at+"."+name, ".")
				want = append(want, p)
				walk(typ.Field(i).Type, p)
			}
		}
	}
	walk(reflect.TypeFor[Spec](), "")
	var have []string
	for _, f := range Fields() {
		if f.Doc == "" || f.Want == "" || f.Required && f.Default != "" {
			t.Errorf("%s: %+v", f.Path, f)
		}
		// Elements of lists of words need a row only for what they may be.
		if f.Path != "env.*" && !strings.HasSuffix(f.Path, "[]") {
			have = append(have, f.Path)
		}
	}
	slices.Sort(want)
	slices.Sort(have)
	if !slices.Equal(want, have) {
		t.Errorf("Spec has %q\nFields has %q", want, have)
	}
}

// The plan changes with exactly the fields that are said to change it.
func TestExample(t *testing.T) {
	text := Example()
	if _, err := Parse([]byte(text)); err != nil {
		t.Errorf("as coffer init writes it: %v\n%s", err, text)
	}
	// With every comment that stands before a field taken away.
	var all strings.Builder
	for l := range strings.Lines(text) {
		trimmed := strings.TrimLeft(l, " ")
		if rest, ok := strings.CutPrefix(trimmed, "#"); ok && !strings.HasPrefix(rest, " ") {
			l = l[:len(l)-len(trimmed)] + rest
		}
		all.WriteString(l)
	}
	s, err := Parse([]byte(all.String()))
	if err != nil {
		t.Fatalf("with every field: %v\n%s", err, all.String())
	}
	if s.Retry == nil || s.Checkpoints.Keep.Best.Count != 2 || s.Egress[0].BytesPerSecond != 64<<10 || s.Output.EgressEvents != 10 || s.StopGrace == 0 {
		t.Errorf("with every field: %+v", s)
	}
}

func TestAllProblems(t *testing.T) {
	const bad = `apiVersion: coffer.run/v2
nmae: x
image: Foo Bar
command: [python3]
env:
  A:
  B: 2
  9x: "a"
inputs:
  - name: data
    asset: UP
    uri: http://x
    mount: /etc/x
  - name: data
    asset: b
    uri: file:///a
    mount: data
    kind: weights
resources:
  cpu: -1
  memory: 9999999999Ti
  gpus: many
maxDuration: 30
retry: {limit: 100, onEvents: [boom], cpu: 4}
stopGrace: 1500ms
`
	_, err := Parse([]byte(bad))
	var got []string
	for _, e := range Problems(err) {
		got = append(got, fmt.Sprintf("%d %s", e.Line, e.Field))
	}
	want := []string{
		"0 attestationPolicy", "1 apiVersion", "2 nmae", "3 image", "4 command[0]", "6 env.A", "8 env.9x",
		"11 inputs[0].asset", "12 inputs[0].uri", "13 inputs[0].mount", "14 inputs[1].name", "17 inputs[1].mount", "18 inputs[1].kind",
		"20 resources.cpu", "21 resources.memory", "22 resources.gpus", "23 maxDuration", "24 retry.onEvents[0]", "24 retry.limit", "24 retry.cpu", "25 stopGrace",
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q\n%v", got, want, err)
	}
	for _, part := range []string{`did you mean "name"?`, `did you mean "resources.cpu"?`, "--set env.NAME=VALUE", `"data" is used twice`, "known fields: asset, mount, name, uri"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q is missing in %v", part, err)
		}
	}
	var one *Error
	if !errors.As(err, &one) {
		t.Error("several problems are no *Error")
	}
	// One at a time: each of these is the only thing wrong with a file that is good.
	for old, text := range map[string]string{
		"name: fashion-mnist": "name:", "  gpus: 1": "  gpus: 17", "command: [/usr/bin/python3, /app/train.py]": "command: {a: b}",
		`  EPOCHS: "2"`: "  EPOCHS:", "cpu: 1500m": "cpu: 1.5", "memory: 4Gi": "memory: [4Gi]", "name: data": "name: !!str data",
		"maxDuration: 30m": "maxDuration: 30m\npriority: 101", "attestationPolicy: simulation": `attestationPolicy: ""`,
	} {
		in := strings.Replace(good, old, text, 1)
		if in == good {
			t.Fatalf("%q changes nothing", text)
		}
		if _, err := Parse([]byte(in)); len(Problems(err)) != 1 {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// What the schema lets pass and the decoder reads otherwise would be a hole: values
// are taken as they are written.
func TestValuesAreWhatIsWritten(t *testing.T) {
	in := strings.Replace(good, `  EPOCHS: "2"`, "  A: 010\n  B: 1.50\n  C: true\n  D: |\n    two\n    lines\n  E: ~x\n  F: \"\"", 1)
	s, err := Parse([]byte(in))
	if err != nil {
		t.Fatal(err)
	}
	for k, want := range map[string]string{"A": "010", "B": "1.50", "C": "true", "D": "two\nlines\n", "E": "~x", "F": ""} {
		if s.Env[k] != want {
			t.Errorf("%s is %q, want %q", k, s.Env[k], want)
		}
	}
}

func TestSet(t *testing.T) {
	out, err := Set([]byte(good), []string{"env.EPOCHS=3", "env.NEW=yes: no # x", "resources.gpus=2", "retry.limit=2", "inputs[0].mount=/in", "priority=7", "command=[/bin/true]"})
	if err != nil {
		t.Fatal(err)
	}
	s, err := Parse(out)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if s.Env["EPOCHS"] != "3" || s.Env["NEW"] != "yes: no # x" || s.Resources.GPUs != 2 || s.Retry.Limit != 2 || s.Inputs[0].Mount != "/in" || s.Priority != 7 || len(s.Command) != 1 {
		t.Errorf("%+v", s)
	}
	if s.Inputs[0].Asset != "fashion-mnist" || s.Resources.CPU != 1500 {
		t.Errorf("what was not named changed: %+v", s)
	}
	for name, text := range map[string]string{
		"no value": "env.A", "no name": "=3", "an unknown field": "resources.gpu=1", "a field that stays unknown": "x.y.z=1",
		"an input that is not there": "inputs[7].mount=/x", "two documents": "priority=1\n---\nname: y", "a second field": "priority=1\nname: other", "an alias": "priority=*a",
	} {
		out, err := Set([]byte(good), []string{text})
		if err == nil {
			_, err = Parse(out)
		}
		if err == nil {
			t.Errorf("%s passes:\n%s", name, out)
		}
	}
}
