package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/translog"
	logserve "github.com/coffer-run/coffer/attest/translog/serve"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
)

// entries is a log's source.
type entries struct {
	mu   sync.Mutex
	head translog.Head
	list []translog.Entry
}

func (s *entries) LogEntries(_ context.Context, from uint64, limit int) ([]translog.Entry, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	from = min(from, uint64(len(s.list)))
	return append([]translog.Entry(nil), s.list[from:min(uint64(len(s.list)), from+uint64(limit))]...), nil
}

func (s *entries) add(t *testing.T, b translog.Body) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	b.TimeMillis, b.Actor = 1_700_000_000_000, "owner/alice"
	e, h, err := translog.Append(s.head, b)
	if err != nil {
		t.Fatal(err)
	}
	s.list, s.head = append(s.list, e), h
}

// keeper runs a log until the test ends, in dir.
func keeper(t *testing.T, dir, key string, s *entries, witnesses ...logserve.Witness) *logserve.Log {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	private, err := keyfile.ReadNote(key)
	if err != nil {
		t.Fatal(err)
	}
	l, err := logserve.New(logserve.Config{Dir: dir, Broker: "broker.test", Key: private, Source: s, Witnesses: witnesses, Client: &http.Client{}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return l
}

// wait waits until the log has published n entries.
func wait(t *testing.T, l *logserve.Log, n int) {
	t.Helper()
	l.Wake()
	if _, err := l.Proofs(t.Context(), []uint64{uint64(n - 1)}); err != nil {
		t.Fatal(err)
	}
}

func TestLogVerify(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	if err := keyfile.CreateNote(in("log.key"), translog.KeyName("broker.test")); err != nil {
		t.Fatal(err)
	}
	s := &entries{head: translog.Genesis("broker.test")}
	asset := func(name string) {
		s.add(t, translog.Body{Kind: translog.KindAsset, Asset: &translog.Asset{Name: name, Kind: "weights"}})
	}
	for i := range 5 {
		asset(fmt.Sprint("a", i))
	}
	s.add(t, translog.Body{Kind: translog.KindBundle, Job: "job-1", JobSequence: 1, Bundle: &translog.Bundle{Digest: "sha384:" + translogDigest}})

	exec := func(want int, args ...string) string {
		t.Helper()
		var out bytes.Buffer
		err := run(t.Context(), append([]string{"log"}, args...), nil, &out, &out)
		got := 0
		if err != nil {
			got = exitFailed
			var e *exitError
			if errors.As(err, &e) {
				got = e.code
			}
			out.WriteString(err.Error())
		}
		if got != want {
			t.Fatalf("coffer log %v: exit code %d, want %d\n%s", args, got, want, out.String())
		}
		return out.String()
	}
	// A witness run by somebody else.
	w1 := strings.TrimSpace(exec(0, "keygen", "w1.test", in("w1.key")))
	w2 := strings.TrimSpace(exec(0, "keygen", "w2.test", in("w2.key")))
	exec(exitFailed, "keygen", "w1.test", in("w1.key"))
	public, err := keyfile.ReadNote(in("log.key"))
	if err != nil {
		t.Fatal(err)
	}
	if public, err = translog.PublicKey(public); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"log.vkey": public, "w1.vkey": w1, "w1w2.vkey": w1 + "\n" + w2} {
		if err := os.WriteFile(in(name), []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r, pipe := io.Pipe()
	served := make(chan error, 1)
	go func() {
		served <- run(ctx, []string{"log", "witness", "--key", in("w1.key"), "--log-key", in("log.vkey"), "--folder", in("seen"), "--listen", "127.0.0.1:0"}, nil, pipe, io.Discard)
	}()
	line := make([]byte, 200)
	n, err := r.Read(line)
	if err != nil {
		t.Fatal(err)
	}
	at := strings.TrimSpace(strings.TrimPrefix(string(line[:n]), "witness at "))

	l := keeper(t, in("log"), in("log.key"), s, logserve.Witness{Key: w1, URL: at})
	wait(t, l, 6)
	base := []string{"--from", in("log"), "--log-key", in("log.vkey")}
	with := func(args ...string) []string { return append(append([]string(nil), base...), args...) }
	if out := exec(0, append([]string{"verify"}, with("--checkpoint", in("kept"))...)...); !strings.Contains(out, "6 entries, chained") || !strings.Contains(out, "not witnessed") {
		t.Error(out)
	}
	if out := exec(0, append([]string{"verify"}, with("--witness-keys", in("w1.vkey"))...)...); !strings.Contains(out, "cosigned by w1.test") || strings.Contains(out, "not witnessed") {
		t.Error(out)
	}
	if out := exec(0, append([]string{"verify"}, with("--witness-keys", in("w1w2.vkey"), "--witnesses", "1")...)...); !strings.Contains(out, "cosigned by w1.test") {
		t.Error(out)
	}
	if out := exec(exitUnknown, append([]string{"verify"}, with("--witness-keys", in("w1w2.vkey"))...)...); !strings.Contains(out, "not witnessed: 1 of 2 named cosigned, 2 wanted") {
		t.Error(out)
	}
	asset("late")
	wait(t, l, 7)
	if out := exec(0, append([]string{"verify"}, with("--checkpoint", in("kept"))...)...); !strings.Contains(out, "begins with the 6 entries of the checkpoint") {
		t.Error(out)
	}
	if out := exec(0, append([]string{"show"}, with("--job", "job-1")...)...); strings.Count(out, "\n") != 2 || !strings.Contains(out, "bundle") {
		t.Error(out)
	}
	if out := exec(0, append([]string{"show"}, with("--output", "json")...)...); strings.Count(out, `"index"`) != 7 {
		t.Error(out)
	}

	// Somebody who has the key and another history.
	other := &entries{head: translog.Genesis("broker.test")}
	for i := range 9 {
		other.add(t, translog.Body{Kind: translog.KindAsset, Asset: &translog.Asset{Name: fmt.Sprint("b", i), Kind: "weights"}})
	}
	forked := keeper(t, in("forked"), in("log.key"), other, logserve.Witness{Key: w1, URL: at})
	wait(t, forked, 9)
	base[1] = in("forked")
	exec(0, append([]string{"verify"}, with()...)...)
	if out := exec(exitFailed, append([]string{"verify"}, with("--checkpoint", in("kept"))...)...); !strings.Contains(out, "changed after it was signed") {
		t.Error(out)
	}
	if out := exec(exitUnknown, append([]string{"verify"}, with("--witness-keys", in("w1.vkey"))...)...); !strings.Contains(out, "not witnessed") {
		t.Error("a witness cosigned two histories: " + out)
	}
	cancel()
	select {
	case err := <-served:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Error("the witness does not stop")
	}
	exec(exitUsage, "verify", "--from", in("nowhere"), "--log-key", in("log.vkey"))
	exec(exitFailed, "verify", "--from", in("log"), "--log-key", in("nowhere"))
	exec(exitFailed, "verify", "--from", in("log"), "--log-key", in("w1.vkey"))
	exec(exitUsage, "witness")
	exec(exitUsage, "prove", "x")
}

const translogDigest = "38b060a751ac96384cd9327eb1b1e36a21fdb71114be07434c0cc7bf63f6e1da274edebfe76f65fbd51ad2f14898b95b"
