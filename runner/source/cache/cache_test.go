package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/seal"
	"github.com/coffer-run/coffer/runner/source"
)

const roomy = 1 << 30

// sizes are an empty file, one of less than a chunk, one of exactly three, and one
// of several requests.
var sizes = []int{0, 10, 3 * testChunk, 7*testChunk + 5}

func TestHold(t *testing.T) {
	s := newStore()
	digest := s.put(t, at, sizes...)
	c := openCache(t, t.TempDir(), s, quick, roomy)
	dir, err := c.Hold(t.Context(), "job", at, digest)
	must(t, err)
	good(t, dir, digest)
	before, _ := s.requests()
	if before != 1+1+1+2+5 {
		t.Errorf("%d requests: %s", before, s.reads)
	}
	if _, err := c.Hold(t.Context(), "other", source.Location{Scheme: source.S3, Bucket: "elsewhere", Prefix: "x"}, digest); err != nil {
		t.Errorf("what is there already: %v", err)
	}
	if after, _ := s.requests(); after != before {
		t.Errorf("%d requests for what is there already", after-before)
	}
}

func TestRefusedSources(t *testing.T) {
	flip := func(object string, off int) func(*store) {
		return func(s *store) { s.objects[at.Object(object)][off] ^= 1 }
	}
	always := func(object string, f func(whole []byte, r io.Reader) (io.Reader, int64, error)) func(*store) {
		return func(s *store) {
			s.fault = func(o string, _ int, whole []byte, r io.Reader) (io.Reader, int64, error) {
				if o != at.Object(object) {
					return r, int64(len(whole)), nil
				}
				return f(whole, r)
			}
		}
	}
	const big, step = "000003.sealed", testChunk + tagSize
	for name, row := range map[string]struct {
		harm func(s *store)
		want string
	}{
		"no manifest":         {func(s *store) { delete(s.objects, at.Object(manifestName)) }, "no object"},
		"another manifest":    {flip(manifestName, 40), "the plan wants sha384:"},
		"a manifest cut off":  {func(s *store) { s.objects[at.Object(manifestName)] = s.objects[at.Object(manifestName)][:99] }, "the plan wants"},
		"a huge manifest":     {func(s *store) { s.objects[at.Object(manifestName)] = make([]byte, maxManifest+1) }, "are allowed"},
		"no file":             {func(s *store) { delete(s.objects, at.Object(big)) }, "no object"},
		"a bit of the magic":  {flip(big, 3), "damaged or lies"},
		"a bit of the salt":   {flip(big, 40), "damaged or lies"},
		"a bit of the zeros":  {flip(big, 4000), "damaged or lies"},
		"the first bit":       {flip(big, headerBlock), "damaged or lies"},
		"a bit in the middle": {flip(big, headerBlock+4*step+100), "damaged or lies"},
		"a bit of a last tag": {func(s *store) { b := s.objects[at.Object(big)]; b[len(b)-1] ^= 0x80 }, "damaged or lies"},
		"an empty file's tag": {flip("000000.sealed", headerBlock), "damaged or lies"},
		"two chunks swapped": {func(s *store) {
			b := s.objects[at.Object(big)]
			a, z := b[headerBlock:headerBlock+step], b[headerBlock+step:headerBlock+2*step]
			c := bytes.Clone(a)
			copy(a, z)
			copy(z, c)
		}, "damaged or lies"},
		"a file cut off": {func(s *store) {
			s.objects[at.Object(big)] = s.objects[at.Object(big)][:len(s.objects[at.Object(big)])-1]
		}, "the manifest says"},
		"a file with more":   {func(s *store) { s.objects[at.Object(big)] = append(s.objects[at.Object(big)], 0) }, "the manifest says"},
		"another file of it": {func(s *store) { s.objects[at.Object(big)] = s.objects[at.Object("000002.sealed")] }, "the manifest says"},
		"a size that is a lie, and less": {always(big, func(whole []byte, r io.Reader) (io.Reader, int64, error) {
			return io.LimitReader(r, 100), int64(len(whole)), nil
		}), "bytes early"},
		"more than was asked for": {always(big, func(whole []byte, r io.Reader) (io.Reader, int64, error) {
			return io.MultiReader(r, strings.NewReader("x")), int64(len(whole)), nil
		}), "more bytes than were asked for"},
		"the whole object for each range": {always(big, func(whole []byte, _ io.Reader) (io.Reader, int64, error) {
			return bytes.NewReader(whole), int64(len(whole)), nil
		}), "more bytes than were asked for"},
		"its beginning for each range": {always(big, func(whole []byte, r io.Reader) (io.Reader, int64, error) {
			n, err := io.Copy(io.Discard, r)
			return bytes.NewReader(whole[:n]), int64(len(whole)), err
		}), "damaged or lies"},
		"a connection that always drops": {always(big, func(whole []byte, r io.Reader) (io.Reader, int64, error) {
			return broken(r, 50), int64(len(whole)), nil
		}), "given up after 3 tries"},
		"a store that is away": {always(big, func([]byte, io.Reader) (io.Reader, int64, error) {
			return nil, 0, errors.New("503 slow down")
		}), "503 slow down"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore()
			old := s.put(t, source.Location{Bucket: "b", Prefix: "old"}, 100)
			digest := s.put(t, at, sizes...)
			c := openCache(t, t.TempDir(), s, quick, roomy)
			dir, err := c.Hold(t.Context(), "first", source.Location{Bucket: "b", Prefix: "old"}, old)
			must(t, err)
			whole := map[string][]byte{}
			for k, v := range s.objects {
				whole[k] = bytes.Clone(v)
			}
			row.harm(s)
			if got, err := c.Hold(t.Context(), "job", at, digest); !says(err, row.want) || !says(err, at.String()) {
				t.Fatalf("%q, %v", got, err)
			}
			if names, err := list(c.path(entriesDir)); err != nil || len(names) != 1 {
				t.Errorf("entries: %s, %v", names, err)
			}
			good(t, dir, old)
			if users, err := c.users(); err != nil || len(users) != 1 {
				t.Errorf("users: %v, %v", users, err)
			}
			s.heal()
			s.objects = whole
			dir, err = c.Hold(t.Context(), "job", at, digest)
			must(t, err)
			good(t, dir, digest)
		})
	}
}

func TestSourcesThatMend(t *testing.T) {
	const step = testChunk + tagSize
	for name, fault := range map[string]func(object string, n int, whole []byte, r io.Reader) (io.Reader, int64, error){
		"every connection drops after a chunk": func(_ string, _ int, whole []byte, r io.Reader) (io.Reader, int64, error) {
			return broken(r, step+headerBlock), int64(len(whole)), nil
		},
		"the first two requests fail": func(_ string, n int, whole []byte, r io.Reader) (io.Reader, int64, error) {
			if n <= 2 {
				return nil, 0, errors.New("500 internal error")
			}
			return r, int64(len(whole)), nil
		},
		"the first content is a lie": func(o string, n int, whole []byte, r io.Reader) (io.Reader, int64, error) {
			if strings.HasSuffix(o, "2.sealed") && n == 1 {
				return io.MultiReader(strings.NewReader("lie"), skip(r, 3)), int64(len(whole)), nil
			}
			return r, int64(len(whole)), nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore()
			digest := s.put(t, at, sizes...)
			manifest := at.Object(manifestName)
			s.fault = func(o string, n int, whole []byte, r io.Reader) (io.Reader, int64, error) {
				if o == manifest {
					return r, int64(len(whole)), nil
				}
				return fault(o, n, whole, r)
			}
			c := openCache(t, t.TempDir(), s, quick, roomy)
			dir, err := c.Hold(t.Context(), "job", at, digest)
			must(t, err)
			good(t, dir, digest)
		})
	}
}

func skip(r io.Reader, n int64) io.Reader {
	_, _ = io.CopyN(io.Discard, r, n)
	return r
}

func TestStalledSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore()
		digest := s.put(t, at, sizes...)
		s.fault = func(_ string, n int, whole []byte, r io.Reader) (io.Reader, int64, error) {
			if n == 1 {
				return waiter{}, int64(len(whole)), nil
			}
			return r, int64(len(whole)), nil
		}
		o := defaults
		o.segment = roomy
		c := openCache(t, t.TempDir(), s, o, roomy)
		began := time.Now()
		dir, err := c.Hold(t.Context(), "job", at, digest)
		must(t, err)
		good(t, dir, digest)
		if took := time.Since(began); took < 2*defaults.stall || took > 3*defaults.stall {
			t.Errorf("manifest and files that stall once each took %s", took)
		}

		s.heal()
		s.fault = func(_ string, _ int, whole []byte, _ io.Reader) (io.Reader, int64, error) {
			return waiter{}, int64(len(whole)), nil
		}
		other := source.Location{Bucket: "b", Prefix: "other"}
		digest = s.put(t, other, 11)
		if _, err := c.Hold(t.Context(), "job", other, digest); !says(err, "sent nothing for too long") || !says(err, "given up after 6 tries") {
			t.Errorf("a source that stalls for ever: %v", err)
		}
		must(t, c.Close())
	})
}

// A source that trickles never stalls and is refused all the same.
func TestSlowSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore()
		digest := s.put(t, at, 10)
		s.fault = func(_ string, _ int, whole []byte, r io.Reader) (io.Reader, int64, error) {
			return trickle{r}, int64(len(whole)), nil
		}
		c := openCache(t, t.TempDir(), s, defaults, roomy)
		if _, err := c.Hold(t.Context(), "job", at, digest); !says(err, "too slow") {
			t.Error(err)
		}
		must(t, c.Close())
	})
}

type trickle struct{ r io.Reader }

func (r trickle) Read(b []byte) (int, error) {
	time.Sleep(20 * time.Second)
	return r.r.Read(b[:1])
}

func TestOneFetchForAll(t *testing.T) {
	s := newStore()
	digest := s.put(t, at, sizes...)
	opened := make(chan struct{})
	s.fault = func(_ string, _ int, whole []byte, r io.Reader) (io.Reader, int64, error) {
		return &held{opened, r}, int64(len(whole)), nil
	}
	c := openCache(t, t.TempDir(), s, quick, roomy)
	gone, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			ctx := t.Context()
			if i == 0 {
				ctx = gone
			}
			dir, err := c.Hold(ctx, fmt.Sprintf("job%d", i), at, digest)
			if i == 0 {
				if !errors.Is(err, context.Canceled) {
					t.Errorf("the one that went away: %v", err)
				}
			} else if err != nil {
				t.Error(err)
			} else {
				good(t, dir, digest)
			}
		})
	}
	waiting(t, c, 8)
	cancel()
	waiting(t, c, 7)
	close(opened)
	wg.Wait()
	if n, _ := s.requests(); n != 10 {
		t.Errorf("%d requests for one folder: %s", n, s.reads)
	}
	if users, err := c.users(); err != nil || users[strings.TrimPrefix(string(digest), "sha384:")] != 7 {
		t.Errorf("users: %v, %v", users, err)
	}
}

// waiting returns when so many calls wait for the one fetch.
func waiting(t *testing.T, c *Cache, want int) {
	t.Helper()
	for range 60000 {
		n := 0
		c.mu.Lock()
		for _, f := range c.flights {
			n += f.waiters
		}
		c.mu.Unlock()
		if n == want {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatalf("there never were %d waiters", want)
}

type held struct {
	open <-chan struct{}
	r    io.Reader
}

func (h *held) Read(b []byte) (int, error) {
	<-h.open
	return h.r.Read(b)
}

func TestFetchThatNobodyWaitsForEnds(t *testing.T) {
	s := newStore()
	digest := s.put(t, at, sizes...)
	s.fault = func(o string, _ int, whole []byte, r io.Reader) (io.Reader, int64, error) {
		if strings.HasSuffix(o, "3.sealed") {
			return waiter{}, int64(len(whole)), nil
		}
		return r, int64(len(whole)), nil
	}
	c := openCache(t, t.TempDir(), s, quick, roomy)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { _, err := c.Hold(ctx, "job", at, digest); done <- err }()
	waiting(t, c, 1)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	waiting(t, c, 0)
	s.heal()
	dir, err := c.Hold(t.Context(), "job", at, digest)
	must(t, err)
	good(t, dir, digest)
}

func TestAnotherLocationMayHaveIt(t *testing.T) {
	s := newStore()
	other := source.Location{Scheme: source.S3, Bucket: "b", Prefix: "other"}
	digest := s.put(t, other, 10)
	opened := make(chan struct{})
	first := true
	s.fault = func(_ string, _ int, whole []byte, r io.Reader) (io.Reader, int64, error) {
		if first {
			first = false
			return &held{opened, failing{}}, int64(len(whole)), nil
		}
		return r, int64(len(whole)), nil
	}
	// The first location has a manifest that never comes whole.
	s.objects[at.Object(manifestName)] = make([]byte, 10)
	c := openCache(t, t.TempDir(), s, quick, roomy)
	errs := make(chan error, 2)
	go func() { _, err := c.Hold(t.Context(), "a", at, digest); errs <- err }()
	waiting(t, c, 1)
	go func() {
		dir, err := c.Hold(t.Context(), "b", other, digest)
		if err == nil {
			good(t, dir, digest)
		}
		errs <- err
	}()
	waiting(t, c, 2)
	close(opened)
	a, b := <-errs, <-errs
	if (a == nil) == (b == nil) || !says(errors.Join(a, b), at.String()) {
		t.Errorf("one location is bad and one is good: %v, %v", a, b)
	}
}

const crashStep = "COFFER_TEST_CRASH_STEP"

// oneFile is fetched by one request, so that steps come in order.
var oneFile = []int{3*testChunk + 5}

// TestCrashHelper is the process that TestKilledAtEachStep kills.
func TestCrashHelper(t *testing.T) {
	if os.Getenv(crashStep) == "" {
		return // there is nothing to do but as the child of TestKilledAtEachStep
	}
	left, err := strconv.Atoi(os.Getenv(crashStep))
	must(t, err)
	s := newStore()
	s.load(t, at, "sealed")
	o := quick
	o.segment = roomy
	o.step = func() {
		if left--; left == 0 {
			must(t, syscall.Kill(os.Getpid(), syscall.SIGKILL))
			select {}
		}
	}
	c := openCache(t, "cache", s, o, roomy)
	_, err = c.Hold(t.Context(), "job", at, plan.Sum(s.objects[at.Object(manifestName)]))
	must(t, err)
}

// TestKilledAtEachStep kills a process between any two changes that a fetch makes
// on disk. The next agent ends with the whole folder, has the lease, fetches no
// chunk that was in the log, and an entry that was there stays good.
func TestKilledAtEachStep(t *testing.T) {
	base := t.TempDir()
	sealed := filepath.Join(base, "sealed")
	digest := sealFolder(t, sealed, oneFile...)
	steps, full, least := 0, int64(0), int64(roomy)
	for step := 1; ; step++ {
		dir := filepath.Join(base, "cache")
		must(t, os.Mkdir(dir, 0o700))
		s := newStore()
		s.load(t, at, sealed)
		older := source.Location{Bucket: "b", Prefix: "old"}
		old := s.put(t, older, 100)
		c, err := open(Config{Dir: dir, MaxBytes: roomy, Open: s.Open, Log: slog.New(slog.DiscardHandler)}, quick)
		must(t, err)
		oldDir, err := c.Hold(t.Context(), "first", older, old)
		must(t, err)
		must(t, c.Close())
		cmd := exec.Command(os.Args[0], "-test.run=^TestCrashHelper$")
		cmd.Env, cmd.Dir = append(os.Environ(), crashStep+"="+strconv.Itoa(step)), base
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		killed := errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
		if err != nil && !killed {
			t.Fatalf("step %d: %v\n%s", step, err, out)
		}
		s.heal()
		c = openCache(t, dir, s, quick, roomy)
		users, err := c.users()
		must(t, err)
		if len(users) != 2 {
			t.Errorf("step %d: leases %v", step, users)
		}
		got, err := c.Hold(t.Context(), "job", at, digest)
		must(t, err)
		good(t, got, digest)
		good(t, oldDir, old)
		_, n := s.requests()
		if step == 1 {
			full = n
		}
		if n > full {
			t.Errorf("step %d: fetched %d bytes, a whole fetch is %d", step, n, full)
		}
		least = min(least, n)
		if names, err := list(c.path(partialDir)); err != nil || (killed && n > 0 && len(names) != 0) {
			t.Errorf("step %d: left %s, %v", step, names, err)
		}
		must(t, c.Close())
		must(t, os.RemoveAll(dir))
		if !killed {
			break
		}
		steps++
	}
	t.Logf("killed at %d steps", steps)
	if steps < 15 || least != 0 {
		t.Errorf("killed at %d steps; the last fetch after a kill took %d bytes, want at least 15, and none", steps, least)
	}
}

// partialOf is a cache in which a fetch ended before the last request, with its
// partial folder.
func partialOf(t *testing.T, s *store, digest plan.Digest) (*Cache, string) {
	t.Helper()
	o := quick
	o.tries = 1
	s.fault = func(obj string, n int, whole []byte, r io.Reader) (io.Reader, int64, error) {
		if strings.HasSuffix(obj, ".sealed") && n == 1 {
			return broken(r, headerBlock+3*(testChunk+tagSize)+7), int64(len(whole)), nil
		}
		if strings.HasSuffix(obj, ".sealed") {
			return nil, 0, errors.New("gone")
		}
		return r, int64(len(whole)), nil
	}
	o.segment = roomy
	c := openCache(t, t.TempDir(), s, o, roomy)
	if _, err := c.Hold(t.Context(), "job", at, digest); err == nil {
		t.Fatal("a store that breaks off is no error")
	}
	s.heal()
	return c, c.path(partialDir, strings.TrimPrefix(string(digest), "sha384:"))
}

// What a partial folder holds is believed only after it is hashed again, and what
// is still good is not fetched again.
func TestDamagedPartial(t *testing.T) {
	const step = testChunk + tagSize
	write := func(file string, off int64, b string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			f, err := os.OpenFile(strings.Replace(file, "DIR", dir, 1), os.O_RDWR, 0)
			must(t, err)
			_, err = f.WriteAt([]byte(b), off)
			must(t, err)
			must(t, f.Close())
		}
	}
	for name, row := range map[string]struct {
		harm func(t *testing.T, dir string)
		want int64 // bytes fetched besides the manifest
	}{
		"nothing":                  {func(*testing.T, string) {}, 2*step + 5 + tagSize},
		"a chunk":                  {write("DIR/000000.sealed", headerBlock+2*step+9, "x"), 3*step + 5 + tagSize},
		"a leaf":                   {write("DIR.leaves/000000", 3*32+5, "x"), 3*step + 5 + tagSize},
		"the header":               {write("DIR/000000.sealed", 0, "x"), headerBlock + 5*step + 5 + tagSize},
		"leaves that are not ours": {write("DIR.leaves/000000", 4*32, strings.Repeat("y", 64)), 2*step + 5 + tagSize},
		"a log that is long":       {write("DIR.leaves/000000", 1<<20, "x"), 2*step + 5 + tagSize},
		"no log":                   {func(t *testing.T, dir string) { must(t, os.RemoveAll(dir+leavesSuffix)) }, headerBlock + 5*step + 5 + tagSize},
		"a file cut off":           {func(t *testing.T, dir string) { must(t, os.Truncate(dir+"/000000.sealed", headerBlock+step)) }, 4*step + 5 + tagSize},
		"a file with more":         {write("DIR/000000.sealed", 1<<20, "x"), 2*step + 5 + tagSize},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore()
			digest := s.put(t, at, 5*testChunk+5)
			c, dir := partialOf(t, s, digest)
			row.harm(t, dir)
			got, err := c.Hold(t.Context(), "job", at, digest)
			must(t, err)
			good(t, got, digest)
			if _, n := s.requests(); n-int64(len(s.objects[at.Object(manifestName)])) != row.want {
				t.Errorf("fetched %d bytes besides the manifest, want %d", n-int64(len(s.objects[at.Object(manifestName)])), row.want)
			}
		})
	}
}

func TestDamagedEntry(t *testing.T) {
	for name, harm := range map[string]func(dir string) error{
		"a file cut off":   func(dir string) error { return os.Truncate(dir+"/000003.sealed", 5000) },
		"a file gone":      func(dir string) error { return os.Remove(dir + "/000001.sealed") },
		"a manifest gone":  func(dir string) error { return os.Remove(dir + "/manifest.json") },
		"another manifest": func(dir string) error { return os.WriteFile(dir+"/manifest.json", []byte("{}"), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore()
			digest := s.put(t, at, sizes...)
			c := openCache(t, t.TempDir(), s, quick, roomy)
			dir, err := c.Hold(t.Context(), "first", at, digest)
			must(t, err)
			must(t, harm(dir))
			if _, err := c.Hold(t.Context(), "second", at, digest); !says(err, "damaged and in use") {
				t.Errorf("while a job uses it: %v", err)
			}
			must(t, c.Release("first"))
			dir, err = c.Hold(t.Context(), "second", at, digest)
			must(t, err)
			good(t, dir, digest)
		})
	}
}

func TestRoom(t *testing.T) {
	s := newStore()
	var digests []plan.Digest
	var places []source.Location
	for i := range 4 {
		places = append(places, source.Location{Scheme: source.S3, Bucket: "b", Prefix: fmt.Sprint(i)})
		digests = append(digests, s.put(t, places[i], 100_000+i))
	}
	dir := t.TempDir()
	// Three folders have room, and four have not.
	one := int64(headerBlock + 100_000 + 2*tagSize + 3 + 2000)
	c := openCache(t, dir, s, quick, 3*one)
	hold := func(job string, i int) (string, error) { return c.Hold(t.Context(), job, places[i], digests[i]) }
	there := func(i int) bool {
		_, err := os.Stat(c.path(entriesDir, strings.TrimPrefix(string(digests[i]), "sha384:")))
		return err == nil
	}
	for i := range 3 {
		d, err := hold(fmt.Sprintf("job%d", i), i)
		must(t, err)
		// Later than the one before, whatever the clock's steps.
		past := time.Now().Add(time.Duration(i-10) * time.Hour)
		must(t, os.Chtimes(d, past, past))
	}
	if _, err := hold("job3", 3); !says(err, "the cache is full") || !errors.Is(err, syscall.EDQUOT) {
		t.Errorf("three folders in use: %v", err)
	}
	if !there(0) || !there(1) || !there(2) {
		t.Error("a folder in use was removed")
	}
	// An agent that comes after does not forget.
	must(t, c.Close())
	c = openCache(t, dir, s, quick, 3*one)
	if _, err := hold("job3", 3); !says(err, "the cache is full") {
		t.Errorf("three folders in use, after a restart: %v", err)
	}
	must(t, c.Release("job0"))
	must(t, c.Release("job1"))
	// Used again, and so not the oldest.
	_, err := hold("job0", 0)
	must(t, err)
	must(t, c.Release("job0"))
	_, err = hold("job3", 3)
	must(t, err)
	if !there(0) || there(1) || !there(2) || !there(3) {
		t.Errorf("of four folders, the one used least lately goes: %t %t %t %t", there(0), there(1), there(2), there(3))
	}
	must(t, c.Keep([]string{"job3"}))
	if users, err := c.users(); err != nil || len(users) != 1 {
		t.Errorf("users %v, %v", users, err)
	}
	if names, err := list(c.path(trashDir)); err != nil || len(names) != 0 {
		t.Errorf("left in the trash: %s, %v", names, err)
	}
	huge := source.Location{Scheme: source.S3, Bucket: "b", Prefix: "huge"}
	if _, err := c.Hold(t.Context(), "job4", huge, s.put(t, huge, int(3*one))); !says(err, "the cache is full") {
		t.Errorf("a folder larger than the cache: %v", err)
	}
}

func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=400k,mode=700"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip("a small disk needs root:", err)
	}
	t.Cleanup(func() { must(t, syscall.Unmount(dir, syscall.MNT_DETACH)) })
	s := newStore()
	small, large := source.Location{Bucket: "b", Prefix: "small"}, source.Location{Bucket: "b", Prefix: "large"}
	smallDigest, largeDigest := s.put(t, small, 100_000), s.put(t, large, 300_000)
	c := openCache(t, dir, s, quick, roomy)
	got, err := c.Hold(t.Context(), "job", small, smallDigest)
	must(t, err)
	s.heal()
	if _, err := c.Hold(t.Context(), "job", large, largeDigest); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("a full disk: %v", err)
	}
	if n, _ := s.requests(); n != 1 {
		t.Errorf("a full disk shows after %d requests, want the manifest's alone", n)
	}
	good(t, got, smallDigest)
	must(t, syscall.Mount("", dir, "", syscall.MS_REMOUNT, "size=2m"))
	got, err = c.Hold(t.Context(), "job", large, largeDigest)
	must(t, err)
	good(t, got, largeDigest)
}

func TestRefusedCalls(t *testing.T) {
	s := newStore()
	digest := s.put(t, at, 1)
	dir := t.TempDir()
	c := openCache(t, dir, s, quick, roomy)
	if _, err := open(c.Config, quick); !says(err, "another agent has it") {
		t.Errorf("two caches in one folder: %v", err)
	}
	for _, job := range []string{"", "..", "a/b", ".", "/x"} {
		if _, err := c.Hold(t.Context(), job, at, digest); err == nil {
			t.Errorf("job %q holds a folder", job)
		}
		if err := c.Release(job); err == nil {
			t.Errorf("job %q is released", job)
		}
	}
	for _, d := range []plan.Digest{"", "sha384:", plan.Digest("sha256:" + strings.Repeat("a", 64)), "sha384:../../../x"} {
		if _, err := c.Hold(t.Context(), "job", at, d); !says(err, "no digest") {
			t.Errorf("digest %q: %v", d, err)
		}
	}
	for name, cfg := range map[string]Config{
		"a folder that others write to": {Dir: open0777(t), MaxBytes: 1, Open: s.Open, Log: c.Log},
		"no folder":                     {MaxBytes: 1, Open: s.Open, Log: c.Log},
		"no bound":                      {Dir: dir, Open: s.Open, Log: c.Log},
		"no opener":                     {Dir: dir, MaxBytes: 1, Log: c.Log},
		"a folder that is not there":    {Dir: dir + "/none", MaxBytes: 1, Open: s.Open, Log: c.Log},
	} {
		if _, err := Open(cfg); err == nil {
			t.Errorf("%s makes a cache", name)
		}
	}
}

func open0777(t *testing.T) string {
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o777))
	return dir
}

// Cached files are the owner's alone.
func TestModes(t *testing.T) {
	s := newStore()
	c := openCache(t, t.TempDir(), s, quick, roomy)
	_, err := c.Hold(t.Context(), "job", at, s.put(t, at, sizes...))
	must(t, err)
	must(t, filepath.WalkDir(c.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == c.Dir {
			return err
		}
		i, err := d.Info()
		if err == nil && i.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %s", path, i.Mode())
		}
		return err
	}))
}

// FuzzManifest holds the reader here against the one in enclave/seal.
func FuzzManifest(f *testing.F) {
	s := newStore()
	s.put(f, at, sizes...)
	b := s.objects[at.Object(manifestName)]
	f.Add(b)
	f.Add(bytes.Replace(b, []byte(`"id":"000001"`), []byte(`"id":"000007"`), 1))
	f.Add(bytes.Replace(b, []byte(`"chunkSize":65536`), []byte(`"chunkSize":65537`), 1))
	f.Add(bytes.Replace(b, []byte(`"chunkSize":65536`), []byte(`"chunkSize":131072`), 1))
	f.Add(bytes.Replace(b, []byte(`"cipherSize":4112`), []byte(`"cipherSize":-1`), 1))
	f.Add(bytes.Replace(b, []byte(`"cipherSize":4112`), []byte(`"cipherSize":4111`), 1))
	f.Add(bytes.Replace(b, []byte(`"cipherSize":4112`), []byte(`"cipherSize":4500000000000000`), 1))
	f.Add(bytes.Replace(b, []byte(`sha256:`), []byte(`sha512:`), 1))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseManifest(b, plan.Sum(b))
		theirs, _, serr := seal.ParseManifest(b)
		if err == nil && serr != nil {
			t.Errorf("taken here, and refused by enclave/seal: %v", serr)
		}
		if err != nil && serr == nil {
			var total int64
			for _, f := range theirs.Files {
				total += min(f.CipherSize, maxCipherSize)
			}
			if total <= maxCipherSize {
				t.Errorf("refused here, and taken by enclave/seal: %v", err)
			}
		}
		if err == nil {
			for _, f := range m.Files {
				n := chunksOf(f.CipherSize, m.ChunkSize)
				if off, l := leafRange(n, f.CipherSize, m.ChunkSize); off+l != f.CipherSize {
					t.Errorf("%d bytes: the last leaf ends at %d", f.CipherSize, off+l)
				}
			}
		}
	})
}

func TestProgress(t *testing.T) {
	s := newStore()
	digest := s.put(t, at, 5*testChunk)
	opened := make(chan struct{})
	s.fault = func(name string, n int, whole []byte, r io.Reader) (io.Reader, int64, error) {
		if strings.HasSuffix(name, ".sealed") && n > 1 {
			r = &held{opened, r} // all but the first range come when they may
		}
		return r, int64(len(whole)), nil
	}
	c := openCache(t, t.TempDir(), s, quick, roomy)
	if _, _, ok := c.Progress(digest); ok {
		t.Error("nothing is being fetched")
	}
	done := make(chan error)
	go func() {
		_, err := c.Hold(t.Context(), "job", at, digest)
		done <- err
	}()
	got, total, ok := int64(0), int64(0), false
	for range 60000 {
		if got, total, ok = c.Progress(digest); got > testChunk {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if !ok || got <= testChunk || got >= 3*testChunk || total < 5*testChunk {
		t.Errorf("%d of %d bytes, %t: want those of the first range", got, total, ok)
	}
	close(opened)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if _, _, ok := c.Progress(digest); ok {
		t.Error("a fetch that is over goes on")
	}
}
