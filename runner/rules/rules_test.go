package rules

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

func defaults(t *testing.T) *Set {
	t.Helper()
	s, err := Parse(Default)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func ids(findings []Finding) string {
	var out []string
	for _, f := range findings {
		out = append(out, f.Rule.ID)
	}
	return strings.Join(out, " ")
}

func TestShippedRules(t *testing.T) {
	const known, unknown = "sha256:aa", "sha256:bb"
	job := Job{InImage: func(d string) bool { return d == known }, Gateway: netip.MustParseAddr("169.254.7.1"), Granted: []string{"/run/secrets/token"}}
	at := time.Unix(1_800_000_000, 0)
	tests := []struct {
		name   string
		event  Event
		want   string
		action Action
	}{
		{"a program of the image", Event{Kind: Exec, Path: "/usr/bin/python3", Digest: known}, "", ""},
		{"a program the job wrote", Event{Kind: Exec, Path: "/tmp/x", Digest: unknown}, "program-not-in-image", Alert},
		{"a program without a digest", Event{Kind: Exec, Path: "/usr/bin/python3"}, "program-not-in-image", Alert},
		{"a program in memory", Event{Kind: Exec, Path: "/memfd:x", Digest: unknown}, "program-not-in-image program-in-memory", Stop},
		{"a program in memory whose name has slashes", Event{Kind: Exec, Path: "/memfd:a/b/c (deleted)", Digest: known}, "program-in-memory", Stop},
		{"a program in memory whose name is not UTF-8", Event{Kind: Exec, Path: "/memfd:" + strings.Repeat("\uFFFDff", 249) + " (deleted)", Digest: known}, "program-in-memory", Stop},
		{"a program below an open folder", Event{Kind: Exec, Path: "/dev/fd/4/7", Digest: known}, "program-in-memory", Stop},
		{"a program that is not in the image and whose name is not UTF-8", Event{Kind: Exec, Path: "/tmp/\uFFFDff", Digest: unknown}, "program-not-in-image", Alert},
		{"a key in a folder whose name is not UTF-8", Event{Kind: Open, Path: "/home/" + strings.Repeat("\uFFFDff", 255) + "/.ssh/id"}, "key-material", Alert},
		{"the memory of a thread", Event{Kind: Open, Path: "/proc/7/task/8/mem"}, "key-material", Alert},
		{"a program by its descriptor", Event{Kind: Exec, Path: "/proc/self/fd/7", Digest: known}, "program-in-memory", Stop},
		{"the same, with dots", Event{Kind: Exec, Path: "/usr/../proc/self/./fd/7", Digest: known}, "program-in-memory", Stop},
		{"a program in shared memory", Event{Kind: Exec, Path: "/dev/shm/a/b", Digest: known}, "program-in-memory", Stop},
		{"an operator's program", Event{Kind: OperatorExec, Path: "/bin/sh", Digest: known}, "operator-exec", Stop},
		{"another process's memory", Event{Kind: Ptrace}, "ptrace", Alert},
		{"a file of the job", Event{Kind: Open, Path: "/data/train.idx"}, "", ""},
		{"somebody's keys", Event{Kind: Open, Path: "/root/.ssh/id_ed25519"}, "key-material", Alert},
		{"the folder of keys", Event{Kind: Open, Path: "/root/.ssh"}, "key-material", Alert},
		{"a name that begins like it", Event{Kind: Open, Path: "/root/.sshfs"}, "", ""},
		{"a path around it", Event{Kind: Open, Path: "/root/x/../.ssh/config"}, "key-material", Alert},
		{"the TPM", Event{Kind: Open, Path: "/dev/tpmrm0"}, "key-material", Alert},
		{"its own secret", Event{Kind: Open, Path: "/run/secrets/./token"}, "", ""},
		{"a secret that it was not given", Event{Kind: Open, Path: "/run/secrets/other"}, "key-material", Alert},
		{"a path through its secret", Event{Kind: Open, Path: "/run/secrets/token/../other"}, "key-material", Alert},
		{"a program where its secret is", Event{Kind: Exec, Path: "/run/secrets/token", Digest: unknown}, "program-not-in-image", Alert},
		{"its own socket", Event{Kind: Connect, Address: `unix:"/run/coffer/regions.sock"`}, "", ""},
		{"loopback", Event{Kind: Connect, Address: "127.0.0.1:29500"}, "", ""},
		{"loopback, IPv6", Event{Kind: Connect, Address: "[::1]:29500"}, "", ""},
		{"the gateway", Event{Kind: Connect, Address: "169.254.7.1:3128"}, "", ""},
		{"the gateway, mapped into IPv6", Event{Kind: Connect, Address: "[::ffff:169.254.7.1]:3128"}, "", ""},
		{"the metadata service", Event{Kind: Connect, Address: "169.254.169.254:80"}, "connect-outside", Alert},
		{"an address that cannot be read", Event{Kind: Connect, Address: "address family 40"}, "connect-outside", Alert},
		{"a lost trace", Event{Kind: TraceLost}, "trace-lost", Stop},
		{"a large upload", Event{Kind: Sent, Bytes: 300 << 20, At: at}, "burst-to-network", Alert},
		{"a small upload", Event{Kind: Sent, Bytes: 200 << 20, At: at}, "", ""},
		{"much output", Event{Kind: Output, Bytes: 5 << 20, At: at}, "burst-of-output", Alert},
		{"output beyond the plan", Event{Kind: OutputCut, Bytes: 1, At: at}, "output-cut", Alert},
		{"sending beyond the plan", Event{Kind: EgressCut, Address: "a.example.com:443", At: at}, "egress-cut", Alert},
		{"numbers beyond the plan", Event{Kind: MetricsCut, Bytes: 1, At: at}, "metrics-cut", Alert},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := defaults(t).Watch(job).Look(tt.event)
			if ids(got) != tt.want || strongest(got) != tt.action {
				t.Errorf("found %q, action %q; want %q, %q", ids(got), strongest(got), tt.want, tt.action)
			}
		})
	}
}

func TestNothingIsAllowedToAJobOfWhichNothingIsKnown(t *testing.T) {
	w := defaults(t).Watch(Job{})
	if got := ids(w.Look(Event{Kind: Exec, Path: "/usr/bin/python3", Digest: "sha256:aa"})); got != "program-not-in-image" {
		t.Errorf("a program of an unknown image: %q", got)
	}
	if got := ids(w.Look(Event{Kind: Connect, Address: "0.0.0.0:0"})); got != "connect-outside" {
		t.Errorf("the zero address without a gateway: %q", got)
	}
}

func TestWindow(t *testing.T) {
	start := time.Unix(1_800_000_000, 0)
	sent := func(w *Watch, after time.Duration, mib int64) bool {
		return ids(w.Look(Event{Kind: Sent, At: start.Add(after), Bytes: mib << 20})) != ""
	}
	tests := []struct {
		name string
		run  func(w *Watch) bool
		want bool
	}{
		{"slowly, for an hour", func(w *Watch) bool {
			found := false
			for i := range 60 {
				found = sent(w, time.Duration(i)*time.Minute, 200) || found
			}
			return found
		}, false},
		{"in pieces within a minute", func(w *Watch) bool {
			found := false
			for i := range 30 {
				found = sent(w, time.Duration(i)*time.Second, 10) || found
			}
			return found
		}, true},
		{"two bursts with a long time between", func(w *Watch) bool {
			return sent(w, 0, 200) || sent(w, 24*time.Hour, 200)
		}, false},
		{"an event out of order", func(w *Watch) bool {
			return sent(w, time.Minute, 200) || sent(w, 59*time.Second, 100)
		}, true},
		{"bytes below zero, which take nothing back", func(w *Watch) bool {
			return sent(w, 0, 200) || sent(w, time.Second, -200) || sent(w, 2*time.Second, 100)
		}, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.run(defaults(t).Watch(Job{})); got != tt.want {
				t.Errorf("found %v, want %v", got, tt.want)
			}
		})
	}
	w := defaults(t).Watch(Job{})
	var bursts int
	for range 100 {
		for _, f := range w.Look(Event{Kind: Sent, At: start, Bytes: 64 << 20}) {
			bursts++
			if f.Count != int64(bursts) {
				t.Errorf("finding %d says it is the %dth", bursts, f.Count)
			}
		}
	}
	if bursts != 20 {
		t.Errorf("100 times 64 MiB at a limit of 256 are %d bursts, want 20: one for each five", bursts)
	}
}

func TestParseRefuses(t *testing.T) {
	const good = "id: a\n    says: b\n    when: %s\n    action: %s\n    severity: %s\n%s"
	with := func(when, action, severity, more string) string {
		return "version: coffer.run/rules/v1\nrules:\n  - " + fmt.Sprintf(good, when, action, severity, more)
	}
	if _, err := Parse([]byte(with("exec", "alert", "low", ""))); err != nil {
		t.Fatal(err)
	}
	tests := map[string]string{
		"nothing":                     "",
		"another version":             strings.Replace(with("exec", "alert", "low", ""), "/v1", "/v2", 1),
		"no rules":                    "version: coffer.run/rules/v1\nrules: []\n",
		"an unknown field":            with("exec", "alert", "low", "    unless: x\n"),
		"an unknown kind":             with("mount", "alert", "low", ""),
		"an unknown action":           with("exec", "page", "low", ""),
		"an unknown severity":         with("exec", "alert", "bad", ""),
		"the same id twice":           with("exec", "alert", "low", "") + "  - " + fmt.Sprintf(good, "open", "alert", "low", ""),
		"an id with a space":          strings.Replace(with("exec", "alert", "low", ""), "id: a", "id: a b", 1),
		"no sentence":                 strings.Replace(with("exec", "alert", "low", ""), "says: b", `says: " "`, 1),
		"a path that is relative":     with("open", "alert", "low", "    match:\n      paths: [etc/shadow]\n"),
		"a pattern in the middle":     with("open", "alert", "low", "    match:\n      paths: [/a/**/b]\n"),
		"a path with dots":            with("open", "alert", "low", "    match:\n      paths: [/a/../b]\n"),
		"exceptions from nothing":     with("open", "alert", "low", "    match:\n      notPaths: [/a]\n"),
		"paths of a connection":       with("connect", "alert", "low", "    match:\n      paths: [/a]\n"),
		"an image for an open":        with("open", "alert", "low", "    match:\n      notInImage: true\n"),
		"addresses of a program":      with("exec", "alert", "low", "    match:\n      notAllowed: true\n"),
		"bytes of a program":          with("exec", "alert", "low", "    match:\n      bytesOver: 1\n      window: 1s\n"),
		"bytes without a window":      with("sent", "alert", "low", "    match:\n      bytesOver: 1\n"),
		"a window without bytes":      with("sent", "alert", "low", "    match:\n      window: 1s\n"),
		"bytes below zero":            with("sent", "alert", "low", "    match:\n      bytesOver: -1\n      window: 1s\n"),
		"a window that is no time":    with("sent", "alert", "low", "    match:\n      bytesOver: 1\n      window: soon\n"),
		"more bytes than are allowed": strings.Repeat("#", MaxSize+1),
	}
	for name, in := range tests {
		if _, err := Parse([]byte(in)); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

func TestExceptions(t *testing.T) {
	s, err := Parse([]byte(`version: coffer.run/rules/v1
rules:
  - id: tools
    says: x
    when: exec
    match: {paths: [/opt/**], notPaths: [/opt/app/*]}
    action: record
    severity: low
`))
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{"/opt/x": "tools", "/opt/app/train": "", "/opt/app/deep/x": "tools", "/usr/bin/x": ""} {
		if got := ids(s.Watch(Job{}).Look(Event{Kind: Exec, Path: path})); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
	if !s.Needs(Exec) || s.Needs(Open) {
		t.Error("Needs: want exec and nothing else")
	}
	other, err := Parse([]byte(strings.Replace(string(Default), "60s", "61s", 1)))
	if err != nil {
		t.Fatal(err)
	}
	if other.Digest() == defaults(t).Digest() {
		t.Error("another rule, the same digest")
	}
}

func FuzzParse(f *testing.F) {
	f.Add(Default)
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := Parse(b)
		if err != nil {
			return
		}
		s.Watch(Job{}).Look(Event{Kind: Exec, Path: string(b)})
	})
}

// strongest is the strongest action that findings ask for; "" if there are none.
func strongest(findings []Finding) Action {
	best := -1
	for _, f := range findings {
		best = max(best, slices.Index(actions, f.Rule.Action))
	}
	if best < 0 {
		return ""
	}
	return actions[best]
}
