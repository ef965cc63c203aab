package jobspec

import (
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
)

func withRetry(t *testing.T, lines string) (Spec, error) {
	t.Helper()
	return Parse([]byte(strings.TrimSpace(`
apiVersion: coffer.run/v1
name: n
image: i
command: [/bin/true]
inputs: []
resources: {cpu: 1, memory: 64Mi, gpus: 0}
attestationPolicy: simulation
` + lines)))
}

func TestRetry(t *testing.T) {
	for name, row := range map[string]struct {
		lines  string
		reason string
		code   int
		again  bool
	}{
		"no retry is asked for":               {"", "holder-lost", 0, false},
		"the machine failed":                  {"retry: {limit: 1}", "holder-lost", 0, true},
		"the job failed":                      {"retry: {limit: 1}", "exit-code", 1, false},
		"it ran too long":                     {"retry: {limit: 1}", "deadline", 0, false},
		"it was refused":                      {"retry: {limit: 1}", "release-refused", 0, false},
		"it was revoked":                      {"retry: {limit: 1}", "revoked", 0, false},
		"it was cancelled":                    {"retry: {limit: 1}", "cancelled", 0, false},
		"a code that is listed":               {"retry: {limit: 1, onExitCodes: [3, 75]}", "exit-code", 75, true},
		"a code that is not listed":           {"retry: {limit: 1, onExitCodes: [3, 75]}", "exit-code", 1, false},
		"with codes alone, events are listed": {"retry: {limit: 1, onExitCodes: [3]}", "holder-lost", 0, false},
		"an event that is listed":             {"retry: {limit: 1, onEvents: [deadline]}", "deadline", 0, true},
		"an event that is not listed":         {"retry: {limit: 1, onEvents: [deadline]}", "holder-lost", 0, false},
	} {
		s, err := withRetry(t, row.lines)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if got := s.Retry.After(row.reason, row.code); got != row.again {
			t.Errorf("%s: %v", name, got)
		}
	}
	for name, row := range map[string]struct{ lines, want string }{
		"no attempts":            {"retry: {limit: 0}", "retry.limit"},
		"too many attempts":      {"retry: {limit: 11}", "retry.limit"},
		"success":                {"retry: {limit: 1, onExitCodes: [0]}", "onExitCodes[0]"},
		"a refusal":              {"retry: {limit: 1, onEvents: [release-refused]}", "onEvents[0]"},
		"a long pause":           {"retry: {limit: 1, backoff: 2h}", "backoff"},
		"too urgent":             {"priority: 101", "priority"},
		"no name of a queue":     {"queue: A b", "queue"},
		"a long stop":            {"stopGrace: 2h", "stopGrace"},
		"parts of a second":      {"stopGrace: 1500ms", "stopGrace"},
		"too much a second":      {"output: {logBytesPerSecond: 1Gi}", "logBytesPerSecond"},
		"lines sealed to nobody": {"output: {logKey: abc}", "logKey"},
	} {
		if _, err := withRetry(t, row.lines); err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestPause(t *testing.T) {
	r := &Retry{Limit: 10, Backoff: Duration(10 * time.Minute)}
	for attempt, want := range map[int]time.Duration{1: 10 * time.Minute, 2: 20 * time.Minute, 3: 40 * time.Minute, 4: time.Hour, 10: time.Hour} {
		if got := r.Pause(attempt); got != want {
			t.Errorf("after attempt %d: %s, want %s", attempt, got, want)
		}
	}
}

// A job that waits is read back from what the journal keeps.
func TestRedactedIsReadBack(t *testing.T) {
	s, err := withRetry(t, "env: {A: \"x: y\", B: \"\"}\npriority: -3\nretry: {limit: 2, onExitCodes: [7], backoff: 90s}\nstopGrace: 30s\nmaxDuration: 90m\noutput: {logBytes: 1Mi}")
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.Redacted()
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(b), "x: y") {
		t.Error("a value is not redacted")
	}
	back, err := Parse(b)
	if err != nil {
		t.Fatalf("%v\n%s", err, b)
	}
	back.Env = s.Env
	r := Resolved{Image: "sha256:" + strings.Repeat("a", 64)}
	r.Policy.Name, r.Policy.Digest = "p", plan.Sum([]byte("p"))
	r.Profile = plan.Sum([]byte("s"))
	p, perr := s.Plan(r)
	q, qerr := back.Plan(r)
	if perr != nil || qerr != nil {
		t.Fatal(perr, qerr)
	}
	pd, _ := p.Digest()
	qd, _ := q.Digest()
	if pd != qd || pd == "" || back.Priority != -3 || back.Retry.OnExitCodes[0] != 7 || p.Retry.Limit != 2 || p.Resources.StopSeconds != 30 {
		t.Errorf("%s, %s: %+v", pd, qd, back)
	}
}
