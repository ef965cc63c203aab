package serve

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/plan"
)

// A folder is taken to be as it was read for so long: an import beside a running
// verifier is seen after that, and sooner by whoever finds nothing.
const (
	rescanAfter   = 30 * time.Second
	rescanMissing = time.Second
)

// Folder is a library that is kept in a folder, in the form of endorse.Path. It
// may be used by many at once, and by several processes: files appear whole, and
// are never changed.
type Folder struct {
	dir string
	lib *endorse.Library

	mu     sync.Mutex
	known  map[string]bool // guarded by mu; files that were looked at
	last   time.Time       // guarded by mu; of the last scan
	report func(endorse.Problem)
}

// OpenFolder opens a folder, which must exist. Files in it that are not used are
// told to report, each once; it may be nil.
func OpenFolder(dir string, report func(endorse.Problem)) (*Folder, error) {
	info, err := os.Stat(dir)
	if err != nil {
		return nil, fmt.Errorf("open endorsements: %w", err)
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("open endorsements: %s is not a folder", dir)
	}
	if report == nil {
		report = func(endorse.Problem) {}
	}
	f := &Folder{dir: dir, lib: endorse.NewLibrary(), known: map[string]bool{}, report: report}
	if err := f.scan(0); err != nil {
		return nil, err
	}
	return f, nil
}

// Library returns what the folder holds.
func (f *Folder) Library() *endorse.Library { return f.lib }

// scan reads the files that were not there before, if the last time was longer
// ago than given.
func (f *Folder) scan(after time.Duration) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	if now.Sub(f.last) < after {
		return nil
	}
	f.last = now
	problems, err := f.lib.Load(os.DirFS(f.dir), func(file string) bool {
		was := f.known[file]
		f.known[file] = true
		return was
	})
	for _, p := range problems {
		f.report(p)
	}
	return err
}

// Get implements endorse.Store.
func (f *Folder) Get(k endorse.Key, at time.Time) (endorse.Held, bool) {
	f.rescan(rescanAfter)
	h, ok := f.lib.Get(k, at)
	if ok && h.ValidAt(at) {
		return h, true
	}
	f.rescan(rescanMissing)
	return f.lib.Get(k, at)
}

func (f *Folder) rescan(after time.Duration) {
	if err := f.scan(after); err != nil {
		f.report(endorse.Problem{File: f.dir, Err: err})
	}
}

// Newest implements endorse.Store.
func (f *Folder) Newest(k endorse.Key) (endorse.Held, bool) { return f.lib.Newest(k) }

// ByDigest implements endorse.Store.
func (f *Folder) ByDigest(k endorse.Key, d plan.Digest) (endorse.Held, bool) {
	return f.lib.ByDigest(k, d)
}

// Put implements endorse.Store. The file is on disk when it returns.
func (f *Folder) Put(i endorse.Item, checked time.Time) error {
	dropped, err := f.lib.Add(i, checked)
	if err != nil {
		return err
	}
	name := endorse.Path(i)
	f.mu.Lock()
	f.known[name] = true
	f.mu.Unlock()
	if err := write(f.dir, name, i.Bytes, checked); err != nil {
		return err
	}
	for _, d := range dropped {
		if err := os.Remove(filepath.Join(f.dir, endorse.Path(d))); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("drop an old version: %w", err)
		}
	}
	return nil
}

// write puts a file in place whole, under a time that says when it was got. One
// that is there already has the same content, as its name says.
func write(dir, name string, b []byte, at time.Time) error {
	path := filepath.Join(dir, filepath.FromSlash(name))
	if err := os.Chtimes(path, at, at); err == nil {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil { // #nosec G301 -- endorsements are public
		return fmt.Errorf("keep endorsement: %w", err)
	}
	t, err := os.CreateTemp(filepath.Dir(path), ".new-")
	if err != nil {
		return fmt.Errorf("keep endorsement: %w", err)
	}
	_, err = t.Write(b)
	err = errors.Join(err, t.Chmod(0o644), t.Sync(), t.Close(), os.Chtimes(t.Name(), at, at))
	if err == nil {
		err = os.Rename(t.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("keep endorsement: %w", errors.Join(err, os.Remove(t.Name())))
	}
	d, err := os.Open(filepath.Dir(path)) // #nosec G304 -- the operator names the folder
	if err != nil {
		return fmt.Errorf("keep endorsement: %w", err)
	}
	return errors.Join(d.Sync(), d.Close())
}
