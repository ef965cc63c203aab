package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/enclave/seal"
	"github.com/coffer-run/coffer/runner/source"
)

const testChunk = minChunk

var at = source.Location{Scheme: source.S3, Bucket: "weights", Prefix: "llama/v1"}

// store is an object store in memory that fails as it is told to.
type store struct {
	mu      sync.Mutex
	objects map[string][]byte
	reads   []string // "object off length" of each request
	bytes   int64    // sent
	// fault may replace the answer to request n of an object, counted from 1.
	fault func(object string, n int, whole []byte, r io.Reader) (io.Reader, int64, error)
	asked map[string]int
}

func newStore() *store { return &store{objects: map[string][]byte{}, asked: map[string]int{}} }

func (s *store) Open(context.Context, source.Location) (Bucket, error) { return s, nil }
func (s *store) Close() error                                          { return nil }

func (s *store) Read(ctx context.Context, object string, off, length int64) (io.ReadCloser, int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked[object]++
	s.reads = append(s.reads, fmt.Sprintf("%s %d %d", object, off, length))
	b, ok := s.objects[object]
	if !ok {
		return nil, 0, fmt.Errorf("no object %s: %w", object, ErrPermanent)
	}
	if off > int64(len(b)) {
		return nil, 0, errors.New("no such range")
	}
	end := int64(len(b))
	if length >= 0 {
		end = min(end, off+length)
	}
	var r io.Reader = bytes.NewReader(b[off:end])
	size := int64(len(b))
	if s.fault != nil {
		var err error
		if r, size, err = s.fault(object, s.asked[object], b, r); err != nil {
			return nil, 0, err
		}
	}
	return io.NopCloser(&counted{s, ctx, r}), size, nil
}

func (s *store) requests() (n int, bytes int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.reads), s.bytes
}

// heal ends all faults and forgets what was asked.
func (s *store) heal() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault, s.reads, s.bytes, s.asked = nil, nil, 0, map[string]int{}
}

type counted struct {
	s   *store
	ctx context.Context
	r   io.Reader
}

func (c *counted) Read(b []byte) (int, error) {
	if w, ok := c.r.(waiter); ok {
		return w.wait(c.ctx)
	}
	if c.ctx.Err() != nil {
		return 0, c.ctx.Err()
	}
	n, err := c.r.Read(b)
	c.s.mu.Lock()
	c.s.bytes += int64(n)
	c.s.mu.Unlock()
	return n, err
}

// waiter is a body that never comes.
type waiter struct{}

func (waiter) Read([]byte) (int, error) { panic("read through counted") }
func (waiter) wait(ctx context.Context) (int, error) {
	<-ctx.Done()
	return 0, ctx.Err()
}

// broken sends n bytes and then an error.
func broken(r io.Reader, n int64) io.Reader {
	return io.MultiReader(io.LimitReader(r, n), failing{})
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errors.New("connection reset by peer") }

// put seals a folder of files with the given sizes under a location.
func (s *store) put(t testing.TB, at source.Location, sizes ...int) plan.Digest {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "sealed")
	digest := sealFolder(t, dir, sizes...)
	s.load(t, at, dir)
	return digest
}

func (s *store) load(t testing.TB, at source.Location, dir string) {
	t.Helper()
	names, err := list(dir)
	must(t, err)
	for _, n := range names {
		b, err := os.ReadFile(filepath.Join(dir, n))
		must(t, err)
		s.objects[at.Object(n)] = b
	}
}

func sealFolder(t testing.TB, dir string, sizes ...int) plan.Digest {
	t.Helper()
	key, err := keys.NewDataKey(bytes.Repeat([]byte{7}, keys.DataKeySize))
	must(t, err)
	var files []seal.Source
	for i, n := range sizes {
		b := make([]byte, n)
		_, _ = rand.NewChaCha8([32]byte{byte(i)}).Read(b)
		files = append(files, seal.Source{Name: fmt.Sprintf("f%03d", i), Size: int64(n), Open: func() (seal.Reader, error) { return reader{bytes.NewReader(b)}, nil }})
	}
	sealed, err := seal.Seal(context.Background(), key, "llama", files, dir, seal.Options{ChunkSize: testChunk})
	must(t, err)
	return sealed.Digest
}

type reader struct{ *bytes.Reader }

func (reader) Close() error { return nil }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// quick are limits for tests: two chunks a request, and pauses that are short.
var quick = options{segment: 2 * (testChunk + tagSize), stall: time.Second, slow: 10 * time.Second, tries: 3, first: time.Millisecond, longest: 2 * time.Millisecond}

func openCache(t testing.TB, dir string, s *store, o options, limit int64) *Cache {
	t.Helper()
	c, err := open(Config{Dir: dir, MaxBytes: limit, Open: s.Open, Log: slog.New(slog.DiscardHandler)}, o)
	must(t, err)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// good fails unless a folder is the whole sealed folder, as enclave/seal sees it.
func good(t testing.TB, dir string, digest plan.Digest) {
	t.Helper()
	root, err := os.OpenRoot(dir)
	must(t, err)
	defer root.Close()
	must(t, seal.Check(context.Background(), root, "llama", digest))
}

func says(err error, text string) bool { return err != nil && strings.Contains(err.Error(), text) }
