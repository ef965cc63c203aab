package plan

import (
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
