package serve

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/transparency-dev/tessera/client"
	"golang.org/x/mod/sumdb/note"

	"github.com/coffer-run/coffer/attest/translog"
)

const broker = "broker.test"

// memory is a source that a test fills, and tampers with.
type memory struct {
	mu      sync.Mutex
	head    translog.Head
	entries []translog.Entry
	err     error
}

func newMemory(t testing.TB, n int) *memory {
	t.Helper()
	m := &memory{head: translog.Genesis(broker)}
	m.grow(t, n)
	return m
}

func (m *memory) grow(t testing.TB, n int) {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	for range n {
		e, head, err := translog.Append(m.head, translog.Body{
			TimeMillis: 1_700_000_000_000 + int64(len(m.entries)), Kind: translog.KindAsset, Actor: "owner/alice",
			Asset: &translog.Asset{Name: fmt.Sprintf("asset-%d", len(m.entries)), Kind: "weights"},
		})
		if err != nil {
			t.Fatal(err)
		}
		m.entries, m.head = append(m.entries, e), head
	}
}

func (m *memory) LogEntries(_ context.Context, from uint64, limit int) ([]translog.Entry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return nil, m.err
	}
	if from >= uint64(len(m.entries)) {
		return nil, nil
	}
	return append([]translog.Entry(nil), m.entries[from:min(uint64(len(m.entries)), from+uint64(limit))]...), nil
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newKey(t testing.TB, name string) (private, public string) {
	t.Helper()
	private, public, err := note.GenerateKey(rand.Reader, name)
	check(t, err)
	return private, public
}

func config(t testing.TB, s Source) Config {
	t.Helper()
	private, _ := newKey(t, translog.KeyName(broker))
	return Config{Dir: t.TempDir(), Broker: broker, Key: private, Source: s, Client: &http.Client{}, Log: slog.New(slog.DiscardHandler)}
}

func open(t testing.TB, c Config) *Log {
	t.Helper()
	l, err := New(c)
	check(t, err)
	return l
}

// start runs a log's sequencer until the returned function is called.
func start(t testing.TB, l *Log) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	stop = sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	t.Cleanup(func() { _ = stop() })
	return stop
}

// published waits until a checkpoint covers n entries.
func published(t testing.TB, l *Log, n int) translog.Checkpoint {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, c, err := l.covering(ctx, uint64(n-1))
	check(t, err)
	return c
}

func audit(t testing.TB, l *Log, c translog.Checkpoint, earlier ...translog.Checkpoint) error {
	t.Helper()
	_, err := translog.Audit(t.Context(), client.FileFetcher{Root: l.c.Dir}, broker, c, earlier, nil)
	return err
}

func TestSequencesEverythingInOrderAndProvesIt(t *testing.T) {
	m := newMemory(t, 300)
	l := open(t, config(t, m))
	stop := start(t, l)
	first := published(t, l, 300)
	m.grow(t, 7)
	l.Wake()
	c := published(t, l, 307)
	check(t, audit(t, l, c, first))
	indices := []uint64{0, 3, 255, 256, 306}
	p, err := l.Proofs(t.Context(), indices)
	check(t, err)
	got, err := l.trust.Open(p.Checkpoint)
	check(t, err)
	for k, i := range indices {
		if err := got.Includes(m.entries[i], p.Hashes[k]); err != nil {
			t.Error(err)
		}
		if err := got.Includes(m.entries[(i+1)%307], p.Hashes[k]); err == nil {
			t.Errorf("the proof of entry %d holds for its neighbour", i)
		}
	}
	check(t, stop())
}

func TestALogGoesOnWhereItStood(t *testing.T) {
	m := newMemory(t, 5)
	c := config(t, m)
	for n := 5; n < 20; n += 5 {
		l := open(t, c)
		stop := start(t, l)
		check(t, audit(t, l, published(t, l, n)))
		check(t, stop())
		m.grow(t, 5)
	}
}

func TestThereIsOneSequencer(t *testing.T) {
	c := config(t, newMemory(t, 1))
	l := open(t, c)
	start(t, l)
	published(t, l, 1)
	if err := open(t, c).Run(t.Context()); !errors.Is(err, ErrLocked) {
		t.Errorf("a second sequencer: %v", err)
	}
}

func TestASourceThatFailsIsTriedAgain(t *testing.T) {
	m := newMemory(t, 2)
	l := open(t, config(t, m))
	start(t, l)
	published(t, l, 2)
	m.mu.Lock()
	m.err = errors.New("disk I/O error")
	m.mu.Unlock()
	m.grow(t, 1)
	l.Wake()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := l.Proofs(ctx, []uint64{2}); !errors.Is(err, ErrNotYet) {
		t.Errorf("a proof of an entry that nobody could read: %v", err)
	}
	m.mu.Lock()
	m.err = nil
	m.mu.Unlock()
	published(t, l, 3)
}

// TestADatabaseThatWasChangedStopsTheSequencer has whoever changes the database
// recompute the whole chain, so that the chain alone shows nothing.
func TestADatabaseThatWasChangedStopsTheSequencer(t *testing.T) {
	rewritten := func(t *testing.T, keep func(i int) (int, bool)) []translog.Entry {
		t.Helper()
		head := translog.Genesis(broker)
		var out []translog.Entry
		for i := range 9 {
			k, ok := keep(i)
			if !ok {
				continue
			}
			e, h, err := translog.Append(head, translog.Body{TimeMillis: 1_700_000_000_000 + int64(k), Kind: translog.KindAsset, Actor: "owner/alice",
				Asset: &translog.Asset{Name: fmt.Sprintf("asset-%d", k), Kind: "weights"}})
			check(t, err)
			out, head = append(out, e), h
		}
		_, err := translog.VerifyChain(broker, out)
		check(t, err)
		return out
	}
	for name, keep := range map[string]func(i int) (int, bool){
		"edited":  func(i int) (int, bool) { return map[bool]int{true: 77, false: i}[i == 4], true },
		"dropped": func(i int) (int, bool) { return i, i != 4 },
		"reordered": func(i int) (int, bool) {
			return map[int]int{4: 5, 5: 4}[i] + map[bool]int{true: i}[i != 4 && i != 5], true
		},
		"cut short": func(i int) (int, bool) { return i, i < 5 },
	} {
		t.Run(name, func(t *testing.T) {
			m := newMemory(t, 8)
			c := config(t, m)
			l := open(t, c)
			stop := start(t, l)
			before := published(t, l, 8)
			check(t, stop())
			m.entries = rewritten(t, keep)
			if name == "dropped" {
				m.entries = append(m.entries, m.entries[len(m.entries)-1]) // as long as before
				m.entries[8-1].Index = 7
			}
			l = open(t, c)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if err := l.Run(ctx); !errors.Is(err, ErrOldDatabase) {
				t.Errorf("got %v", err)
			}
			// What was published stays, and can be proven.
			check(t, audit(t, l, published(t, l, 8), before))
		})
	}
}

func TestATreeThatWasChangedStopsTheSequencer(t *testing.T) {
	m := newMemory(t, 300)
	c := config(t, m)
	l := open(t, c)
	stop := start(t, l)
	published(t, l, 300)
	check(t, stop())
	flip(t, filepath.Join(c.Dir, "tile/1/000.p/1"), 4)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := open(t, c).Run(ctx); !errors.Is(err, ErrDiverged) || errors.Is(err, ErrOldDatabase) {
		t.Errorf("got %v", err)
	}
}

// TestAnOldDatabase has one part of the folder alone show that the database is old.
func TestAnOldDatabase(t *testing.T) {
	for name, change := range map[string]func(t *testing.T, dir string, m *memory){
		"the tree has more": func(t *testing.T, dir string, m *memory) {
			check(t, os.Remove(filepath.Join(dir, "checkpoint")))
			m.entries = m.entries[:5]
		},
		"the checkpoint has more": func(t *testing.T, dir string, m *memory) {
			check(t, os.RemoveAll(filepath.Join(dir, ".state")))
			m.entries = m.entries[:5]
		},
		"the checkpoint has others": func(t *testing.T, dir string, m *memory) {
			check(t, os.RemoveAll(filepath.Join(dir, ".state")))
			m.entries = newMemory(t, 0).entries
			for range 8 {
				e, _, err := translog.Append(translog.Genesis(broker), translog.Body{TimeMillis: 1, Kind: translog.KindAsset, Actor: "owner/alice", Asset: &translog.Asset{Name: "other", Kind: "weights"}})
				check(t, err)
				e.Index = uint64(len(m.entries))
				m.entries = append(m.entries, e)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMemory(t, 8)
			c := config(t, m)
			l := open(t, c)
			stop := start(t, l)
			published(t, l, 8)
			check(t, stop())
			change(t, c.Dir, m)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			l = open(t, c)
			if err := l.Run(ctx); !errors.Is(err, ErrOldDatabase) {
				t.Errorf("got %v", err)
			}
			select {
			case <-l.Opened():
				t.Error("opened")
			default:
			}
		})
	}
	t.Run("put in while the log runs", func(t *testing.T) {
		m := newMemory(t, 8)
		l := open(t, config(t, m))
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		done := make(chan error, 1)
		go func() { done <- l.Run(ctx) }()
		published(t, l, 8)
		// As long as before, and its last entry another.
		e, _, err := translog.Append(translog.Head{Size: 7, Hash: m.entries[6].Hash}, translog.Body{TimeMillis: 1, Kind: translog.KindAsset, Actor: "owner/alice", Asset: &translog.Asset{Name: "other", Kind: "weights"}})
		check(t, err)
		m.mu.Lock()
		m.entries[7] = e
		m.mu.Unlock()
		l.Wake()
		if err := <-done; !errors.Is(err, ErrOldDatabase) {
			t.Errorf("got %v", err)
		}
	})
}

// TestAnAuditFindsWhatWasChanged tampers with a copy of a log that is published.
func TestAnAuditFindsWhatWasChanged(t *testing.T) {
	m := newMemory(t, 300)
	l := open(t, config(t, m))
	stop := start(t, l)
	early := published(t, l, 300)
	m.grow(t, 3)
	l.Wake()
	c := published(t, l, 303)
	check(t, stop())
	other := early
	other.Root = append([]byte{1}, early.Root[1:]...)
	for name, try := range map[string]struct {
		change  func(dir string)
		earlier translog.Checkpoint
		want    string
	}{
		"nothing":                          {func(string) {}, early, ""},
		"an entry edited":                  {func(dir string) { flip(t, filepath.Join(dir, "tile/entries/000"), 100) }, early, "log entry 0"},
		"the last entry edited":            {func(dir string) { flip(t, filepath.Join(dir, "tile/entries/001.p/47"), -3) }, early, "entries or tiles were changed"},
		"an entry dropped":                 {func(dir string) { cut(t, filepath.Join(dir, "tile/entries/001.p/47")) }, early, "dropped or added"},
		"two entries exchanged":            {func(dir string) { exchange(t, filepath.Join(dir, "tile/entries/001.p/47")) }, early, "says that it is entry"},
		"a hash tile edited":               {func(dir string) { flip(t, filepath.Join(dir, "tile/0/000"), 40) }, early, "tile 0 of level 0"},
		"a tile at the edge edited":        {func(dir string) { flip(t, filepath.Join(dir, "tile/0/001.p/47"), 40) }, early, "tile 1 of level 0"},
		"a tile higher up edited":          {func(dir string) { flip(t, filepath.Join(dir, "tile/1/000.p/1"), 4) }, early, "tile 0 of level 1"},
		"a tile gone":                      {func(dir string) { check(t, os.Remove(filepath.Join(dir, "tile/0/000"))) }, early, "no such file"},
		"another history at a checkpoint":  {func(string) {}, other, "changed after it was signed"},
		"a log shorter than at checkpoint": {func(string) {}, translog.Checkpoint{Origin: c.Origin, Size: 400, Root: c.Root}, "cut short"},
		"a checkpoint of another log":      {func(string) {}, translog.Checkpoint{Origin: "x", Size: 1, Root: c.Root}, "is another"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			check(t, os.CopyFS(dir, os.DirFS(l.c.Dir)))
			try.change(dir)
			_, err := translog.Audit(t.Context(), client.FileFetcher{Root: dir}, broker, c, []translog.Checkpoint{try.earlier}, nil)
			if try.want == "" {
				check(t, err)
			} else if err == nil || !strings.Contains(err.Error(), try.want) {
				t.Errorf("got %v, want %q", err, try.want)
			}
		})
	}
	if _, err := translog.Audit(t.Context(), client.FileFetcher{Root: l.c.Dir}, "another", c, nil, nil); err == nil {
		t.Error("an audit of another broker's log")
	}
}

// bodies splits an entry bundle: two bytes of length before each body.
func bodies(t testing.TB, path string) [][]byte {
	t.Helper()
	b, err := os.ReadFile(path)
	check(t, err)
	var out [][]byte
	for len(b) > 0 {
		n := 2 + int(b[0])<<8 + int(b[1])
		out, b = append(out, b[:n]), b[n:]
	}
	return out
}

func cut(t testing.TB, path string) {
	t.Helper()
	b := bodies(t, path)
	check(t, os.WriteFile(path, bytes.Join(append(b[:5:5], b[6:]...), nil), 0o600))
}

func exchange(t testing.TB, path string) {
	t.Helper()
	b := bodies(t, path)
	b[5], b[6] = b[6], b[5]
	check(t, os.WriteFile(path, bytes.Join(b, nil), 0o600))
}

func flip(t testing.TB, path string, at int) {
	t.Helper()
	b, err := os.ReadFile(path)
	check(t, err)
	if at < 0 {
		at += len(b)
	}
	b[at] ^= 1
	check(t, os.WriteFile(path, b, 0o600))
}

// TestTheGuardSignsNothingElse has only the signing key between a tree that is not
// the database's and a checkpoint.
func TestTheGuardSignsNothingElse(t *testing.T) {
	private, _ := newKey(t, translog.KeyName(broker))
	s, err := note.NewSigner(private)
	check(t, err)
	g := &guard{Signer: s, roots: map[uint64][]byte{2: []byte(strings.Repeat("r", 32))}}
	text := func(size uint64, root string) []byte {
		return fmt.Appendf(nil, "%s\n%d\n%s\n", translog.KeyName(broker), size, root)
	}
	if _, err := g.Sign(text(2, "cnJycnJycnJycnJycnJycnJycnJycnJycnJycnJycnI=")); err != nil {
		t.Errorf("the database's own: %v", err)
	}
	for name, b := range map[string][]byte{
		"another root":         text(2, "c3JycnJycnJycnJycnJycnJycnJycnJycnJycnJycnI="),
		"a size never checked": text(3, "cnJycnJycnJycnJycnJycnJycnJycnJycnJycnJycnI="),
		"no checkpoint":        []byte("hello"),
	} {
		if _, err := g.Sign(b); err == nil {
			t.Errorf("signed %s", name)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	good := config(t, newMemory(t, 0))
	other, _ := newKey(t, "someone.else/log")
	_, witness := newKey(t, "witness.test")
	for name, change := range map[string]func(*Config){
		"no folder":            func(c *Config) { c.Dir = "" },
		"no broker":            func(c *Config) { c.Broker = "" },
		"no source":            func(c *Config) { c.Source = nil },
		"no key":               func(c *Config) { c.Key = "" },
		"another log's key":    func(c *Config) { c.Key = other },
		"a witness at no host": func(c *Config) { c.Witnesses = []Witness{{Key: witness, URL: "/x"}} },
		"a witness without key": func(c *Config) {
			c.Witnesses = []Witness{{URL: "http://witness.test"}}
		},
		"one witness twice": func(c *Config) {
			c.Witnesses = []Witness{{Key: witness, URL: "http://a.test"}, {Key: witness, URL: "http://b.test"}}
		},
		"itself as witness": func(c *Config) {
			pub, err := translog.PublicKey(c.Key)
			check(t, err)
			c.Witnesses = []Witness{{Key: pub, URL: "http://a.test"}}
		},
	} {
		c := good
		change(&c)
		if _, err := New(c); err == nil {
			t.Errorf("took %s", name)
		}
	}
}
