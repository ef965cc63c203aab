package logs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/runner/bootkey"
)

const job = "01JOB"

func store(t testing.TB, key *bootkey.Key, max int64) *Store {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "logs"), key, max)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// write writes n lines to each stream and returns what stdout then has.
func write(t testing.TB, l *Log, n int, line string) string {
	t.Helper()
	var out strings.Builder
	offsets := map[string]int64{}
	for i := range n {
		for _, stream := range []string{Stdout, Stderr} {
			b := fmt.Appendf(nil, "%s %d %s\n", stream, i, line)
			if _, err := l.Append(Entry{Stream: stream, Offset: offsets[stream], At: time.Unix(1, int64(i)), Data: b}); err != nil {
				t.Fatal(err)
			}
			offsets[stream] += int64(len(b))
			if stream == Stdout {
				out.Write(b)
			}
		}
	}
	return out.String()
}

// collect gathers stdout and wants its offsets to follow each other.
func collect(t testing.TB, into *strings.Builder) func(Entry) error {
	return func(e Entry) error {
		if e.Stream != Stdout {
			return nil
		}
		if e.Offset != int64(into.Len()) {
			t.Errorf("an entry at %d, want %d", e.Offset, into.Len())
		}
		into.Write(e.Data)
		return nil
	}
}

func TestLogIsReadAfterARestart(t *testing.T) {
	key := bootkey.New()
	s := store(t, key, DefaultMaxBytes)
	l, err := s.Create(job, 32<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	// Several segments of it.
	want := write(t, l, 300, strings.Repeat("x", 30<<10))
	var live strings.Builder
	if err := l.Follow(t.Context(), false, collect(t, &live)); err != nil || live.String() != want {
		t.Errorf("while it is written: %d of %d bytes, %v", live.Len(), len(want), err)
	}
	if err := l.Forget(); err != nil {
		t.Fatal(err)
	}
	numbers, err := s.Segments(job)
	if err != nil || len(numbers) < 3 {
		t.Fatalf("%v %v", numbers, err)
	}
	again, err := Open(s.dir, key, DefaultMaxBytes)
	if err != nil {
		t.Fatal(err)
	}
	var got strings.Builder
	if err := again.Read(job, collect(t, &got)); err != nil || got.String() != want {
		t.Errorf("after a restart: %d of %d bytes, %v", got.Len(), len(want), err)
	}
	for _, n := range numbers {
		b, err := s.Segment(job, n)
		if err != nil || bytes.Contains(b, []byte("stdout")) || bytes.Contains(b, []byte("xxxx")) {
			t.Errorf("segment %d is readable: %v", n, err)
		}
	}
	other, err := Open(s.dir, bootkey.New(), DefaultMaxBytes)
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Read(job, func(Entry) error { return errors.New("an entry") }); err == nil || strings.Contains(err.Error(), "an entry") {
		t.Errorf("under another boot's key: %v", err)
	}
}

func TestChangesAreFound(t *testing.T) {
	key := bootkey.New()
	s := store(t, key, DefaultMaxBytes)
	l, err := s.Create(job, 32<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	write(t, l, 150, strings.Repeat("x", 30<<10))
	if err := l.Forget(); err != nil {
		t.Fatal(err)
	}
	o, err := s.Create("01OTHER", 1<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	write(t, o, 1, "")
	if err := o.Forget(); err != nil {
		t.Fatal(err)
	}
	segments := func() [][]byte {
		var out [][]byte
		numbers, err := s.Segments(job)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range numbers {
			b, err := s.Segment(job, n)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, b)
		}
		return out
	}
	other, err := s.Segment("01OTHER", 0)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func([][]byte) [][]byte{
		"nothing":                nil,
		"a bit":                  func(b [][]byte) [][]byte { b[0][len(b[0])/2] ^= 1; return b },
		"a bit of the head":      func(b [][]byte) [][]byte { b[0][40] ^= 1; return b },
		"the end":                func(b [][]byte) [][]byte { b[1] = b[1][:len(b[1])-50]; return b },
		"the last segment":       func(b [][]byte) [][]byte { return b[:len(b)-1] },
		"a segment between":      func(b [][]byte) [][]byte { return append(b[:1], b[2:]...) },
		"the order":              func(b [][]byte) [][]byte { b[0], b[1] = b[1], b[0]; return b },
		"a segment of another":   func(b [][]byte) [][]byte { b[1] = other; return b },
		"more after the end":     func(b [][]byte) [][]byte { return append(b, b[0]) },
		"bytes after the end":    func(b [][]byte) [][]byte { n := len(b) - 1; b[n] = append(b[n], 0, 0, 0, 40); return b },
		"everything":             func([][]byte) [][]byte { return nil },
		"a length beyond bounds": func(b [][]byte) [][]byte { i := bytes.IndexByte(b[0], '\n'); b[0][i+1] = 0xff; return b },
	} {
		b := segments()
		if change != nil {
			b = change(b)
		}
		c, err := chain{job: job, from: bootSecrets{key}}, error(nil)
		for _, part := range b {
			if err = c.read(part, func(Entry) error { return nil }); err != nil {
				break
			}
		}
		if err == nil {
			err = c.end()
		}
		if (err == nil) != (change == nil) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSealedToItsOwner(t *testing.T) {
	for _, kind := range []string{"x25519", "mlkem768x25519"} {
		key, err := GenerateKey(kind)
		if err != nil {
			t.Fatal(err)
		}
		to, err := ParsePublicKey(key.Public())
		if err != nil {
			t.Fatal(err)
		}
		s := store(t, bootkey.New(), DefaultMaxBytes)
		l, err := s.Create(job, 1<<20, to)
		if err != nil {
			t.Fatal(err)
		}
		want := write(t, l, 10, "secret")
		if err := l.Forget(); err != nil {
			t.Fatal(err)
		}
		if err := s.Read(job, func(Entry) error { return nil }); !errors.Is(err, ErrSealed) {
			t.Errorf("%s: the agent reads it: %v", kind, err)
		}
		b, err := s.Segment(job, 0)
		if err != nil {
			t.Fatal(err)
		}
		text, err := key.Encode()
		if err != nil {
			t.Fatal(err)
		}
		back, err := ParsePrivateKey(text)
		if err != nil {
			t.Fatal(err)
		}
		var got strings.Builder
		if err := OpenSealed(job, back, [][]byte{b}, collect(t, &got)); err != nil || got.String() != want {
			t.Errorf("%s: %q %v", kind, got.String(), err)
		}
		stranger, err := GenerateKey(kind)
		if err != nil {
			t.Fatal(err)
		}
		if err := OpenSealed(job, stranger, [][]byte{b}, func(Entry) error { return nil }); err == nil {
			t.Errorf("%s: another key opens it", kind)
		}
	}
	for _, s := range []string{"", "x25519", "x25519:AA==", "rsa:AAAA", "mlkem768x25519:AA=="} {
		if _, err := ParsePublicKey(s); err == nil {
			t.Errorf("%q is a key", s)
		}
	}
}

func TestBounds(t *testing.T) {
	key := bootkey.New()
	s := store(t, key, 3<<20)
	l, err := s.Create(job, 1<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	// Far more than the budget, in many pieces: the beginning goes, the end stays.
	block := []byte(strings.Repeat("y", 60<<10))
	for i := range int64(600) {
		if _, err := l.Append(Entry{Stream: Stdout, Offset: i * int64(len(block)), Data: block}); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := folderSize(s.path(job)); err != nil || n > 2<<20+slack+2*SegmentBytes {
		t.Errorf("%d bytes are kept: %v", n, err)
	}
	last := int64(-1)
	if err := l.Follow(t.Context(), false, func(e Entry) error { last = e.Offset; return nil }); err != nil || last != 599*int64(len(block)) {
		t.Errorf("the newest entry is at %d: %v", last, err)
	}
	if _, err := l.Append(Entry{Stream: Stdout, Data: make([]byte, MaxData+1)}); err == nil {
		t.Error("an entry that is too large is taken")
	}
	if err := l.Forget(); err != nil {
		t.Fatal(err)
	}
	// The next job's log makes room.
	for i := range 4 {
		o, err := s.Create(fmt.Sprintf("02JOB%d", i), 1<<20, nil)
		if err != nil {
			t.Fatal(err)
		}
		write(t, o, 40, strings.Repeat("z", 20<<10))
		if err := o.Forget(); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Read(job, func(Entry) error { return nil }); !errors.Is(err, ErrNotKept) {
		t.Errorf("the oldest log is still there: %v", err)
	}
	if err := s.Read("02JOB3", func(Entry) error { return nil }); err != nil {
		t.Errorf("the newest log: %v", err)
	}
	for _, id := range []string{"", "..", "../x", "a/b"} {
		if _, err := s.Create(id, 1, nil); err == nil {
			t.Errorf("%q is a job", id)
		}
	}
}

func TestFollowWaits(t *testing.T) {
	s := store(t, bootkey.New(), DefaultMaxBytes)
	l, err := s.Create(job, 1<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	var got strings.Builder
	done := make(chan error, 1)
	go func() { done <- l.Follow(t.Context(), true, collect(t, &got)) }()
	want := write(t, l, 100, "line")
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil || got.String() != want {
		t.Errorf("%d of %d bytes: %v", got.Len(), len(want), err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	o, err := s.Create("02", 1<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	go func() { done <- o.Follow(ctx, true, func(Entry) error { return nil }) }()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("a follower that left: %v", err)
	}
	if err := errors.Join(o.Forget(), l.Forget()); err != nil {
		t.Error(err)
	}
}

// TestKilledWriter reads a log whose writer ended at any byte.
func TestKilledWriter(t *testing.T) {
	key := bootkey.New()
	s := store(t, key, DefaultMaxBytes)
	l, err := s.Create(job, 1<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := write(t, l, 3, "line")
	path := filepath.Join(s.path(job), segmentName(0))
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Forget(); err != nil {
		t.Fatal(err)
	}
	for n := range b {
		if err := os.WriteFile(path, b[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		var got strings.Builder
		if err := s.Read(job, collect(t, &got)); !errors.Is(err, ErrCut) || !strings.HasPrefix(want, got.String()) {
			t.Fatalf("cut at %d: %q %v", n, got.String(), err)
		}
	}
}

func FuzzOpen(f *testing.F) {
	key := bootkey.New()
	s, err := Open(f.TempDir(), key, DefaultMaxBytes)
	if err != nil {
		f.Fatal(err)
	}
	l, err := s.Create(job, 1<<20, nil)
	if err != nil {
		f.Fatal(err)
	}
	write(f, l, 2, "line")
	if err := l.Forget(); err != nil {
		f.Fatal(err)
	}
	b, err := s.Segment(job, 0)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:len(b)/2])
	f.Fuzz(func(t *testing.T, changed []byte) {
		c := chain{job: job, from: bootSecrets{key}}
		err := c.read(changed, func(Entry) error { return nil })
		if err == nil {
			err = c.end()
		}
		if err == nil && !bytes.Equal(b, changed) {
			t.Error("another segment is read as whole")
		}
	})
}
