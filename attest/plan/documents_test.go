package plan

import (
	"bytes"
	"reflect"
	"strings"
	"testing"
)

// A sandbox description is bound by its bytes and has no one form: what reads two
// ways is refused.
func TestSandboxReadsOneWay(t *testing.T) {
	digest := string(Sum(nil))
	good := `{"version":"` + SandboxVersion + `","jobId":"job-1","image":"sha256:` + strings.Repeat("0", 64) + `","profile":{"version":"` + SandboxVersion +
		`","shimDigest":"` + digest + `","runtimeDigest":"` + digest + `","trace":"` + digest + `"},"wrapper":[],"trace":{},"spec":{"a":1}}`
	if _, err := ParseSandbox([]byte(good)); err != nil {
		t.Fatal(err)
	}
	for situation, edit := range map[string][2]string{
		"a field twice":                {`"jobId":"job-1"`, `"jobId":"job-1","jobId":"job-2"`},
		"a field in other letters":     {`"jobId"`, `"JobID"`},
		"and again in its own":         {`"jobId":"job-1"`, `"JobID":"job-2","jobId":"job-1"`},
		"a field of the profile twice": {`"profile":{`, `"profile":{"shim":"a","shim":"b",`},
		"a field of the specification": {`"spec":{"a":1}`, `"spec":{"a":1,"a":2}`},
		"a field that is not known":    {`"wrapper"`, `"more":1,"wrapper"`},
		"text that is not UTF-8":       {`"job-1"`, "\"\xff\""},
		"data after it":                {`"spec":{"a":1}}`, `"spec":{"a":1}}{}`},
		"half of it":                   {`"wrapper":[],"trace":{},"spec":{"a":1}}`, ``},
		"another version":              {`{"version":"` + SandboxVersion + `","jobId"`, `{"version":"2","jobId"`},
	} {
		text := strings.Replace(good, edit[0], edit[1], 1)
		if text == good {
			t.Fatalf("%s: nothing was changed", situation)
		}
		if _, err := ParseSandbox([]byte(text)); err == nil {
			t.Errorf("%s: accepted", situation)
		}
	}
	if _, err := ParseSandbox([]byte(strings.Replace(good, `{"a":1}`, `"`+strings.Repeat("a", MaxSandbox)+`"`, 1))); err == nil {
		t.Error("a large one: accepted")
	}
}

// FuzzDocuments reads plans and sandbox descriptions of anybody's making. A plan that
// is read has one form, which is the bytes; a sandbox that is read has one reading.
func FuzzDocuments(f *testing.F) {
	digest := string(Sum(nil))
	f.Add([]byte(`{"command":["a"],"image":"sha256:` + strings.Repeat("0", 64) + `","inputs":[{"asset":"a","digest":"` + digest + `","mount":"/a","name":"a"}],"name":"a",` +
		`"output":{"logBytes":1},"policy":{"digest":"` + digest + `","name":"a"},"resources":{"cpuMillis":1,"gpus":0,"maxSeconds":1,"memoryBytes":1,"pids":1},` +
		`"sandboxProfile":"` + digest + `","version":"` + Version + `"}`))
	f.Add([]byte(`{"version":"` + SandboxVersion + `","jobId":"job-1","image":"sha256:` + strings.Repeat("0", 64) + `","profile":{"version":"` + SandboxVersion +
		`","shimDigest":"` + digest + `","runtimeDigest":"` + digest + `","trace":"` + digest + `"},"wrapper":[],"trace":{},"spec":{"a":1}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, err := Parse(b); err == nil {
			c, err := p.Canonical()
			if err != nil || !bytes.Equal(c, b) {
				t.Fatalf("%q is read, and written as %q, %v", b, c, err)
			}
		}
		if s, err := ParseSandbox(b); err == nil {
			c, err := s.Canonical()
			if err != nil {
				t.Fatalf("%q is read and cannot be written: %v", b, err)
			}
			again, err := ParseSandbox(c)
			if err != nil || again.JobID != s.JobID || again.Image != s.Image || !reflect.DeepEqual(again.Profile, s.Profile) {
				t.Fatalf("%q is read again as %+v, %v", c, again, err)
			}
		}
	})
}
