package alerts

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/coffer-run/coffer/runner/rules"
)

func alert(n int64) Alert {
	return Alert{
		Finding: rules.Finding{
			Rule:  rules.Rule{ID: "program-not-in-image", Says: "The job started a program.", When: rules.Exec, Action: rules.Alert, Severity: "high"},
			Event: rules.Event{Kind: rules.Exec, At: time.UnixMilli(1_800_000_000_123), Process: "sh", Path: "/tmp/x", Digest: "sha256:ab"},
			Count: n,
		},
		Node: "node-1", Job: "job-1", Plan: "sha384:00", Image: "sha256:11", Sequence: n,
	}
}

// TestOCSF checks what OCSF 1.3 requires of a Detection Finding.
func TestOCSF(t *testing.T) {
	a := alert(7)
	a.Stopped = true
	b, err := a.OCSF()
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	for field, want := range map[string]any{
		"class_uid": 2004.0, "category_uid": 2.0, "activity_id": 1.0, "type_uid": 200401.0, "time": 1_800_000_000_123.0,
		"severity_id": 4.0, "is_alert": true, "action_id": 2.0, "disposition_id": 2.0, "count": 7.0,
	} {
		if got[field] != want {
			t.Errorf("%s is %v, want %v", field, got[field], want)
		}
	}
	for _, text := range []string{`"version":"1.3.0"`, `"uid":"job-1/alert/7"`, `"path":"/tmp/x"`, `"value":"ab"`, `"name":"sh"`} {
		if !bytes.Contains(b, []byte(text)) {
			t.Errorf("%s has no %s", b, text)
		}
	}
	if severityID("unheard of") != 0 {
		t.Error("an unknown severity is not unknown")
	}
}

func TestTextOfTheJobIsBounded(t *testing.T) {
	a := alert(1)
	a.Finding.Event.Path = "/" + strings.Repeat("é", 10_000)
	a.Finding.Event.Process = strings.Repeat("\n{", 10_000)
	b, err := a.OCSF()
	if err != nil {
		t.Fatal(err)
	}
	if len(b) > 16<<10 || bytes.ContainsRune(b, '\n') || !utf8.Valid(b) {
		t.Errorf("%d bytes, newline %v, valid UTF-8 %v", len(b), bytes.ContainsRune(b, '\n'), utf8.Valid(b))
	}
}

// collector is a writer that a test opens and shuts.
type collector struct {
	mu    sync.Mutex
	shut  bool
	lines int
	last  int64
	order bool
}

func (c *collector) Write(ctx context.Context, lines []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.shut {
		return errors.New("shut")
	}
	if len(lines) > batchBytes {
		return errors.New("a batch without end")
	}
	for s := bufio.NewScanner(bytes.NewReader(lines)); s.Scan(); {
		var e event
		if err := json.Unmarshal(s.Bytes(), &e); err != nil {
			return err
		}
		c.order = c.order && e.Metadata.Sequence > c.last
		c.last = e.Metadata.Sequence
		c.lines++
	}
	return nil
}

func (c *collector) setShut(v bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.shut = v
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// TestNobodyWaits adds more than the queue holds while the collector is away.
func TestNobodyWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &collector{shut: true, order: true}
		s := NewSink(c, quiet())
		const total = 3 * queueLength
		begin := time.Now()
		for n := range int64(total) {
			if err := s.Add(alert(n + 1)); err != nil {
				t.Fatal(err)
			}
		}
		if time.Since(begin) != 0 {
			t.Errorf("adding waited %s", time.Since(begin))
		}
		time.Sleep(time.Minute)
		c.setShut(false)
		time.Sleep(time.Minute)
		s.Close(t.Context())
		written, dropped := s.Counts()
		if written+dropped != total || dropped == 0 || int64(c.lines) != written || !c.order {
			t.Errorf("%d written, %d dropped, %d arrived, in order %v: want all %d accounted for", written, dropped, c.lines, c.order, total)
		}
	})
}

func TestCloseGivesUpInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewSink(&collector{shut: true}, quiet())
		for n := range int64(10) {
			if err := s.Add(alert(n + 1)); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		begin := time.Now()
		s.Close(ctx)
		if d := time.Since(begin); d > 4*time.Second {
			t.Errorf("closing took %s", d)
		}
		if written, dropped := s.Counts(); written != 0 || dropped != 10 {
			t.Errorf("%d written, %d dropped: want 0 and 10", written, dropped)
		}
	})
}

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "alerts.jsonl")
	f := File{Path: path, MaxBytes: 100}
	for _, line := range []string{strings.Repeat("a", 60) + "\n", strings.Repeat("b", 60) + "\n", strings.Repeat("c", 30) + "\n"} {
		if err := f.Write(t.Context(), []byte(line)); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]string{path: "b", path + ".1": "a"} {
		b, err := os.ReadFile(name)
		if err != nil || !strings.HasPrefix(string(b), want) {
			t.Errorf("%s: %q, %v: want %s…", filepath.Base(name), b, err, want)
		}
		st, err := os.Stat(name)
		if err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, %v", filepath.Base(name), st.Mode(), err)
		}
	}
	if err := (File{Path: filepath.Join(path, "x")}).Write(t.Context(), []byte("x")); err == nil {
		t.Error("a file below a file: written")
	}
}

// TestFullDisk writes to a device that is full.
func TestFullDisk(t *testing.T) {
	if err := (File{Path: "/dev/full"}).Write(t.Context(), []byte("x\n")); err == nil {
		t.Error("a full disk: written")
	}
}

func TestHTTP(t *testing.T) {
	var got []byte
	status := http.StatusServiceUnavailable
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer secret" || r.Header.Get("Content-Type") != "application/x-ndjson" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		got, _ = io.ReadAll(r.Body)
		w.WriteHeader(status)
	}))
	defer server.Close()
	h := NewHTTP(server.URL, "secret", http.DefaultTransport)
	if err := h.Write(t.Context(), []byte("x\n")); err == nil || !strings.Contains(err.Error(), "503") {
		t.Errorf("a collector that is busy: %v", err)
	}
	status = http.StatusOK
	if err := h.Write(t.Context(), []byte("y\n")); err != nil || string(got) != "y\n" {
		t.Errorf("got %q, %v", got, err)
	}
	if err := NewHTTP(server.URL, "other", http.DefaultTransport).Write(t.Context(), []byte("y\n")); err == nil {
		t.Error("a collector that refuses: delivered")
	}
	if err := (HTTP{}).Write(t.Context(), []byte("y\n")); err == nil {
		t.Error("no collector: delivered")
	}
}

// A collector that sends elsewhere has neither the alerts nor the token follow, with any
// of the codes, and what goes wrong names no key that stands in its URL.
func TestHostileCollector(t *testing.T) {
	var asked atomic.Int64
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
	defer elsewhere.Close()
	code := 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, elsewhere.URL+"/?"+r.Header.Get("Authorization"), code)
	}))
	for _, code = range []int{301, 302, 303, 307, 308} {
		err := NewHTTP(server.URL+"/?key=secret", "secret", http.DefaultTransport).Write(t.Context(), []byte("x\n"))
		if err == nil || strings.Contains(err.Error(), "secret") || asked.Load() > 0 {
			t.Errorf("%d: %v, and the other place was asked %d times", code, err, asked.Load())
		}
	}
	server.Close()
	if err := NewHTTP(server.URL+"/?key=secret", "", http.DefaultTransport).Write(t.Context(), []byte("x\n")); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("nobody listens: %v", err)
	}
	// An answer without end is read so far and no further.
	endless := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		for line := bytes.Repeat([]byte("x"), 1<<16); ; {
			if _, err := w.Write(line); err != nil {
				return
			}
		}
	}))
	defer endless.Close()
	if err := NewHTTP(endless.URL, "", http.DefaultTransport).Write(t.Context(), []byte("x\n")); err != nil {
		t.Error(err)
	}
}

// What a job chose begins no line of the collector's and adds no field, and it shows.
func TestLinesAreOneEach(t *testing.T) {
	a := alert(1)
	a.Finding.Event.Process, a.Finding.Event.Path, a.Finding.Event.Address = "x\n{\"class_uid\":2004}", "/a\",\"severity\":\"low\u2028\u202e\x1b[2J\u009b", "1.2.3.4\r\n"
	b, err := a.OCSF()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range string(b) {
		if unicode.IsControl(r) || unicode.Is(unicode.Cf, r) || unicode.Is(unicode.Zl, r) {
			t.Errorf("%U in %q", r, b)
		}
	}
	var e struct {
		Severity  string
		Evidences []struct {
			Process struct{ Name string }
			File    struct{ Path string }
		}
	}
	if err := json.Unmarshal(b, &e); err != nil || e.Severity != string(a.Finding.Rule.Severity) || e.Evidences[0].Process.Name != a.Finding.Event.Process || e.Evidences[0].File.Path != a.Finding.Event.Path {
		t.Errorf("%+v, %v", e, err)
	}
}
