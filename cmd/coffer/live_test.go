//go:build !race

// The terminal library closes what its reader still reads when a program ends at
// once: the race detector stops on that, in code that is not ours.

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/creack/pty"

	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
)

func TestLiveView(t *testing.T) {
	l := &live{job: "job-1", name: "demo\x1b[2J", width: 80, height: 40}
	var m tea.Model = l
	tell := func(events ...*agentv1.WatchResponse) {
		for _, e := range events {
			m, _ = m.Update(eventMsg{e})
		}
	}
	began := stage(2, "decrypt", "started", 0, "")
	began.TimeUnixNano = time.Unix(100, 0).UnixNano()
	tell(
		stage(1, "verify", "done", 12*time.Millisecond, "affirming (simulated)\x1b[31m"),
		began,
		&agentv1.WatchResponse{Event: &agentv1.WatchResponse_Queue{Queue: &agentv1.QueueEvent{Position: 2, WaitsFor: "a GPU"}}},
	)
	m, _ = m.Update(tickMsg(time.Unix(103, 0)))
	if s := shown(l); !strings.Contains(s, "✓ verify        12 ms  affirming (simulated)\\u001b[31m") || !strings.Contains(s, "… decrypt          3s") || !strings.Contains(s, "number 2 in the queue: a GPU") {
		t.Errorf("shown:\n%s", s)
	}
	tell(stage(3, "decrypt", "done", 3*time.Second, "1.0 GiB"))
	for i := range 50 {
		tell(logged(0, "stdout", fmt.Sprintf("{\"step\": %d, \"loss\": %d, \"lr\": 0.1}\n", i, 50-i)))
	}
	tell(logged(0, "stderr", "warn\x1b[31m\n"), sealedAt(0, "epoch-1"))
	s := shown(l)
	for _, want := range []string{"loss                  1  █", "▁\n", "lr                  0.1  ▅▅", "| warn\\u001b[31m", "checkpoints 1 sealed, 2.0 KiB, last #1 epoch-1", "Ctrl-C detaches"} {
		if !strings.Contains(s, want) {
			t.Errorf("%q is missing:\n%s", want, s)
		}
	}
	if strings.Contains(s, "queue") || strings.Contains(s, "step ") && strings.Contains(s, "step        ") || strings.Contains(l.text(), "\x1b[2J") {
		t.Errorf("shown:\n%s", s)
	}
	// It fits whatever the terminal is.
	m, _ = m.Update(tea.WindowSizeMsg{Width: 30, Height: 10})
	s = shown(l)
	if n := strings.Count(s, "\n") + 1; n > 10 {
		t.Errorf("%d lines on a terminal of 10:\n%s", n, s)
	}
	for line := range strings.Lines(s) {
		if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > 30 {
			t.Errorf("%d characters on a terminal of 30: %s", n, line)
		}
	}
	if _, cmd := m.Update(tea.KeyPressMsg{Code: 'c', Mod: tea.ModCtrl}); cmd == nil || !l.detached {
		t.Error("Ctrl-C does not detach")
	}
}

// A job may print what it likes: the view neither grows nor takes a number for
// something else.
func TestLiveViewIsBounded(t *testing.T) {
	l := &live{}
	for i := range 1000 {
		l.event(logged(0, "stdout", fmt.Sprintf("{\"m%d\": 1, \"loss\": 1e308, \"bad\": \"x\", \"nested\": {\"a\": 1}}\n{\"loss\": NaN}\n[1]\n{", i)))
	}
	if len(l.metrics) > maxMetrics || len(l.tail) > liveLines {
		t.Errorf("%d metrics, %d lines", len(l.metrics), len(l.tail))
	}
	for _, m := range l.metrics {
		if len(m.values) > maxSamples || m.name == "bad" || m.name == "nested" || m.name == "a" {
			t.Errorf("%s has %d values", m.name, len(m.values))
		}
	}
	for _, tt := range []struct {
		values []float64
		width  int
		want   string
	}{
		{nil, 10, ""}, {[]float64{1}, 10, "▅"}, {[]float64{1, 2, 3}, 10, "▁▄█"}, {[]float64{3, 3, 1, 1}, 2, "█▁"}, {[]float64{1, 2}, 0, ""}, {[]float64{-1e308, 1e308}, 4, ""},
	} {
		if got := plot(tt.values, tt.width); tt.want != "" && got != tt.want {
			t.Errorf("plot(%v, %d) = %q, want %q", tt.values, tt.width, got, tt.want)
		}
	}
}

// screen collects what is written to a terminal.
type screen struct {
	mu   sync.Mutex
	text strings.Builder
}

func (s *screen) has(part string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Contains(s.text.String(), part)
}

func (s *screen) string() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

// onTerminal runs coffer on a terminal and returns what it shows, the terminal's
// other side, and the result.
func (s *fakeStack) onTerminal(t *testing.T, args ...string) (*screen, *os.File, <-chan error) {
	t.Helper()
	near, far, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = near.Close(); _ = far.Close() })
	if err := pty.Setsize(near, &pty.Winsize{Rows: 30, Cols: 90}); err != nil {
		t.Fatal(err)
	}
	out := &screen{}
	go func() {
		b := make([]byte, 4096)
		for {
			n, err := near.Read(b)
			out.mu.Lock()
			out.text.Write(b[:n])
			out.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	done := make(chan error, 1)
	go func() { done <- run(t.Context(), append(args, "--dir", s.dir), far, far, far) }()
	return out, near, done
}

func TestLiveOnATerminal(t *testing.T) {
	t.Setenv("TERM", "xterm-256color")
	for name, noColor := range map[string]string{"colour": "", "no colour": "1"} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("NO_COLOR", noColor)
			s := newFakeStack(t)
			s.agent.jobs["job-1"] = &agentv1.Job{Id: "job-1", Name: "demo", State: "running"}
			s.agent.events = printed(stage(1, "verify", "done", 12*time.Millisecond, "affirming"), logged(2, "stdout", "{\"loss\": 0.5}\n"))
			s.agent.hold = make(chan struct{})
			out, keys, done := s.onTerminal(t, "watch", "job-1")
			await(t, out, "verify", "affirming", "loss", "Ctrl-C detaches")
			if has := out.has("\x1b[32m"); has == (noColor != "") {
				t.Errorf("NO_COLOR=%q, colour: %v", noColor, has)
			}
			if _, err := keys.Write([]byte{3}); err != nil {
				t.Fatal(err)
			}
			err := <-done
			var coded *exitError
			if !errors.As(err, &coded) || coded.code != exitUnknown {
				t.Errorf("detached with %v", err)
			}
			await(t, out, "detached; job job-1 goes on", "coffer watch job-1")
			close(s.agent.hold)
		})
	}
}

func TestLiveToTheEnd(t *testing.T) {
	t.Setenv("TERM", "xterm")
	s := newFakeStack(t)
	s.agent.jobs["job-1"] = &agentv1.Job{Id: "job-1", Name: "demo", State: stateRefused, Stage: "verify", Checks: []*agentv1.Check{{Id: "gpu0.nonce", Outcome: "fail", Expected: "aa", Found: "bb"}}}
	s.agent.events = printed(stage(1, "verify", "failed", 12*time.Millisecond, ""))
	job := filepath.Join(t.TempDir(), "job.yaml")
	if err := os.WriteFile(job, []byte(smallJob), 0o600); err != nil {
		t.Fatal(err)
	}
	out, _, done := s.onTerminal(t, "submit", job, "--watch")
	err := <-done
	var coded *exitError
	if !errors.As(err, &coded) || coded.code != exitRefused {
		t.Errorf("ended with %v", err)
	}
	await(t, out, "verify", "refused at verify: 1 check failed", "gpu0.nonce")
	// Where the cursor cannot be moved there are lines.
	t.Setenv("TERM", "dumb")
	out, _, done = s.onTerminal(t, "watch", "job-1")
	<-done
	await(t, out, "verify     failed")
}

func await(t *testing.T, out *screen, parts ...string) {
	t.Helper()
	for _, p := range parts {
		for i := 0; !out.has(p); i++ {
			if i == 500 {
				t.Fatalf("%q is missing on the screen:\n%q", p, out.string())
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
}
