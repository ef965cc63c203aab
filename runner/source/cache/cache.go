// Package cache keeps sealed folders of object stores on the node, as
// ciphertext, under the digest by which a plan names them.
//
// Not trusted: the store, the network, and what an earlier agent left behind.
// Checked: the manifest against the plan's digest, and every byte of every file
// against the Merkle root in it, before a folder becomes an entry; a partial file
// is read and hashed again before it is continued. Not checked: an entry once it
// is whole, but for its manifest and sizes; the holder authenticates what it
// decrypts. No key is here, and nothing that could use one.
package cache

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/source"
)

// Config is what a Cache needs. All of it is required.
type Config struct {
	// Dir is a folder of the cache's own, which must exist and which nobody else can
	// write to.
	Dir string
	// MaxBytes bounds what lies there, in bytes.
	MaxBytes int64
	// Open opens the bucket that a location is in, under the node's credentials.
	Open func(ctx context.Context, at source.Location) (Bucket, error)
	Log  *slog.Logger
}

// The folders of a cache.
const (
	entriesDir = "entries" // DIGEST/: whole sealed folders
	partialDir = "partial" // DIGEST/: what was fetched of one; DIGEST.leaves/: the digests of its chunks
	jobsDir    = "jobs"    // JOB/DIGEST: a job uses an entry, or waits for it
	trashDir   = "trash"   // what is being removed

	leavesSuffix = ".leaves"
)

// Cache is a node's store of sealed folders. Its methods may be called
// concurrently.
type Cache struct {
	Config
	o    options
	lock *os.File
	ctx  context.Context //nolint:containedctx // the life of fetches, which several calls share
	stop context.CancelFunc
	wait sync.WaitGroup

	mu      sync.Mutex // guards flights, and which folders there are
	flights map[string]*flight
}

// flight is a fetch under way.
type flight struct {
	at   source.Location
	stop context.CancelFunc
	done chan struct{}
	got  atomic.Int64 // bytes of the files that are there

	// Cache.mu guards what follows. bytes are what the folder will have when it is
	// whole. abandoned: the last waiter went away before it was done.
	waiters   int
	abandoned bool
	bytes     int64
	err       error
}

// Open returns the cache in a folder. One folder has one cache at a time.
func Open(c Config) (*Cache, error) { return open(c, defaults) }

func open(cfg Config, o options) (*Cache, error) {
	if cfg.Dir == "" || cfg.MaxBytes <= 0 || cfg.Open == nil || cfg.Log == nil {
		return nil, errors.New("open cache: a part is missing")
	}
	if st, err := os.Stat(cfg.Dir); err != nil {
		return nil, fmt.Errorf("open cache: %w", err)
	} else if st.Mode().Perm()&0o022 != 0 {
		return nil, fmt.Errorf("open cache %s: others can write there: want mode 0700", cfg.Dir)
	}
	lock, err := os.OpenFile(filepath.Join(cfg.Dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open cache: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("open cache %s: another agent has it: %w", cfg.Dir, err), lock.Close())
	}
	c := &Cache{Config: cfg, o: o, lock: lock, flights: map[string]*flight{}}
	c.ctx, c.stop = context.WithCancel(context.Background())
	if err := c.prepare(); err != nil {
		return nil, errors.Join(fmt.Errorf("open cache: %w", err), c.Close())
	}
	return c, nil
}

// prepare makes the cache's folders and finishes what was begun.
func (c *Cache) prepare() error {
	if err := os.RemoveAll(c.path(trashDir)); err != nil {
		return err
	}
	for _, d := range []string{entriesDir, partialDir, jobsDir, trashDir} {
		if err := os.MkdirAll(c.path(d), 0o700); err != nil {
			return err
		}
	}
	names, err := list(c.path(partialDir))
	if err != nil {
		return err
	}
	for _, n := range names {
		data, isLeaves := strings.CutSuffix(n, leavesSuffix)
		if !isLeaves {
			continue
		}
		if _, err := os.Lstat(c.path(partialDir, data)); errors.Is(err, fs.ErrNotExist) {
			if err := os.RemoveAll(c.path(partialDir, n)); err != nil {
				return err
			}
		}
	}
	return nil
}

// Close gives up fetches under way and the folder. What was fetched stays.
func (c *Cache) Close() error {
	c.stop()
	c.wait.Wait()
	return c.lock.Close()
}

func (c *Cache) path(names ...string) string {
	return filepath.Join(append([]string{c.Dir}, names...)...)
}

// Hold returns the folder that has the sealed folder with a digest, and fetches
// it from a location if it is not there. The folder stays at least until Release
// of the job. Calls for the same digest share one fetch.
func (c *Cache) Hold(ctx context.Context, job string, at source.Location, digest plan.Digest) (string, error) {
	if digest.Bytes() == nil {
		return "", fmt.Errorf("hold %s: no digest to hold it against", at)
	}
	if !plain(job) {
		return "", fmt.Errorf("hold %s: %q is not the name of a job", at, job)
	}
	name := strings.TrimPrefix(string(digest), "sha384:")
	if err := c.lease(job, name); err != nil {
		return "", fmt.Errorf("hold %s: %w", at, err)
	}
	dir, err := c.hold(ctx, at, name, digest)
	if err != nil {
		return "", errors.Join(fmt.Errorf("fetch %s: %w", at, err), c.unlease(job, name))
	}
	return dir, nil
}

func (c *Cache) hold(ctx context.Context, at source.Location, name string, digest plan.Digest) (string, error) {
	for {
		f, dir, err := c.join(at, name, digest) //nolint:contextcheck // a fetch is not of the call that began it
		if err != nil || dir != "" {
			return dir, err
		}
		select {
		case <-f.done:
		case <-ctx.Done():
		}
		c.mu.Lock()
		if f.waiters--; f.waiters == 0 && ctx.Err() != nil {
			f.abandoned = true
			f.stop()
		}
		err, abandoned := f.err, f.abandoned
		c.mu.Unlock()
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		// What another location could not give, this one may; and a fetch that its
		// last waiter gave up is no answer to one who came after.
		if err != nil && f.at == at && !abandoned {
			return "", err
		}
		if c.ctx.Err() != nil {
			return "", errors.New("the agent is shutting down")
		}
	}
}

// join returns the folder if it is there, and else the fetch that will bring it.
func (c *Cache) join(at source.Location, name string, digest plan.Digest) (*flight, string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	dir := c.path(entriesDir, name)
	f := c.flights[name]
	if f == nil {
		whole, err := c.whole(dir, digest)
		if err != nil {
			return nil, "", err
		}
		if whole {
			now := time.Now()
			return nil, dir, os.Chtimes(dir, now, now)
		}
		ctx, stop := context.WithCancel(c.ctx)
		f = &flight{at: at, stop: stop, done: make(chan struct{})}
		c.flights[name] = f
		c.wait.Go(func() {
			err := c.fetch(ctx, f, name, digest)
			stop()
			c.mu.Lock()
			f.err = err
			delete(c.flights, name)
			c.mu.Unlock()
			close(f.done)
		})
	}
	f.waiters++
	return f, "", nil
}

// whole says whether a folder is there with its manifest and files of the right
// sizes. One that is there and is not whole goes, unless a job uses it besides
// the one that asks.
func (c *Cache) whole(dir string, digest plan.Digest) (bool, error) {
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	err := checkEntry(dir, digest)
	if err == nil {
		return true, nil
	}
	users, lerr := c.users()
	if lerr != nil {
		return false, lerr
	}
	if users[filepath.Base(dir)] > 1 {
		return false, fmt.Errorf("the copy on this node is damaged and in use: %w", err)
	}
	c.Log.Warn("removing damaged copy of sealed folder", slog.String("digest", string(digest)), slog.Any("error", err)) //nolint:sloglint // of no call alone
	return false, c.remove(dir)
}

func checkEntry(dir string, digest plan.Digest) error {
	b, err := readFile(filepath.Join(dir, manifestName))
	if err != nil {
		return err
	}
	m, err := parseManifest(b, digest)
	if err != nil {
		return err
	}
	for _, f := range m.Files {
		st, err := os.Lstat(filepath.Join(dir, f.name()))
		if err != nil {
			return err
		}
		if !st.Mode().IsRegular() || st.Size() != f.CipherSize {
			return fmt.Errorf("%s has %d bytes, the manifest says %d", f.name(), st.Size(), f.CipherSize)
		}
	}
	return nil
}

// Release says that a job uses none of its folders any more. They stay until
// room is needed.
func (c *Cache) Release(job string) error {
	if !plain(job) {
		return fmt.Errorf("release: %q is not the name of a job", job)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := os.RemoveAll(c.path(jobsDir, job)); err != nil {
		return fmt.Errorf("release sealed folders: %w", err)
	}
	return nil
}

// plain says whether a name is that of a file in its folder.
func plain(name string) bool {
	return filepath.IsLocal(name) && filepath.Base(name) == name && name != "."
}

// Keep releases the folders of all jobs but these.
func (c *Cache) Keep(jobs []string) error {
	keep := map[string]bool{}
	for _, j := range jobs {
		keep[j] = true
	}
	names, err := list(c.path(jobsDir))
	if err != nil {
		return fmt.Errorf("list jobs in cache: %w", err)
	}
	for _, n := range names {
		if !keep[n] {
			if err := c.Release(n); err != nil {
				return err
			}
		}
	}
	return nil
}

// lease is a file, so that an agent which was killed does not forget who uses
// what.
func (c *Cache) lease(job, name string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := os.MkdirAll(c.path(jobsDir, job), 0o700); err != nil {
		return err
	}
	return os.WriteFile(c.path(jobsDir, job, name), nil, 0o600)
}

func (c *Cache) unlease(job, name string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return os.Remove(c.path(jobsDir, job, name))
}

// users counts the jobs that use or wait for each entry.
func (c *Cache) users() (map[string]int, error) {
	jobs, err := list(c.path(jobsDir))
	if err != nil {
		return nil, err
	}
	out := map[string]int{}
	for _, j := range jobs {
		names, err := list(c.path(jobsDir, j))
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			out[n]++
		}
	}
	return out, nil
}

// reserve makes room for a folder of some bytes: what was used least lately goes,
// but nothing that a job uses.
func (c *Cache) reserve(ctx context.Context, f *flight, name string, bytes int64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	users, err := c.users()
	if err != nil {
		return err
	}
	type victim struct {
		dir   string
		bytes int64
		used  time.Time
	}
	var idle []victim
	used := bytes
	for n, flying := range c.flights {
		if n != name {
			used += flying.bytes
		}
	}
	for _, d := range []string{entriesDir, partialDir} {
		names, err := list(c.path(d))
		if err != nil {
			return err
		}
		for _, n := range names {
			if c.flights[n] != nil || strings.HasSuffix(n, leavesSuffix) {
				continue
			}
			v := victim{dir: c.path(d, n)}
			if v.bytes, v.used, err = usage(v.dir); err != nil {
				return err
			}
			used += v.bytes
			if d == partialDir || users[n] == 0 {
				idle = append(idle, v)
			}
		}
	}
	for used > c.MaxBytes {
		oldest := -1
		for i, v := range idle {
			if oldest < 0 || v.used.Before(idle[oldest].used) {
				oldest = i
			}
		}
		if oldest < 0 {
			return fmt.Errorf("the cache is full: the folder has %d bytes, running jobs use %d of %d: %w", bytes, used-bytes, c.MaxBytes, unix.EDQUOT)
		}
		v := idle[oldest]
		idle = append(idle[:oldest], idle[oldest+1:]...)
		c.Log.InfoContext(ctx, "removing sealed folder from cache", slog.String("folder", filepath.Base(v.dir)), slog.Int64("bytes", v.bytes))
		if err := c.remove(v.dir); err != nil {
			return err
		}
		used -= v.bytes
	}
	f.bytes = bytes
	return nil
}

// remove takes a folder away. An interrupted removal is finished by the next
// Open and never leaves part of an entry.
func (c *Cache) remove(dir string) error {
	tmp, err := os.MkdirTemp(c.path(trashDir), "")
	if err != nil {
		return err
	}
	if err := os.Rename(dir, filepath.Join(tmp, "folder")); err != nil {
		return err
	}
	return errors.Join(os.RemoveAll(tmp), os.RemoveAll(dir+leavesSuffix))
}

// usage is the size of the files in a folder, and when it was used.
func usage(dir string) (int64, time.Time, error) {
	st, err := os.Lstat(dir)
	if err != nil {
		return 0, time.Time{}, err
	}
	es, err := os.ReadDir(dir)
	if err != nil {
		return 0, time.Time{}, err
	}
	var n int64
	for _, e := range es {
		i, err := e.Info()
		if err != nil {
			return 0, time.Time{}, err
		}
		n += min(i.Size(), math.MaxInt64-n)
	}
	return n, st.ModTime(), nil
}

func list(dir string) ([]string, error) {
	es, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range es {
		out = append(out, e.Name())
	}
	return out, nil
}
