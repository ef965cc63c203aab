package sink

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/runner/source"
	"github.com/coffer-run/coffer/runner/source/cache"
)

// Bucket is a bucket into which checkpoints go.
type Bucket interface {
	cache.Bucket
	// Put makes an object of size bytes of r, or none: a Put that fails MUST leave no
	// object that is cut short.
	Put(ctx context.Context, object string, r io.Reader, size int64) error
	// List returns what lies directly below a prefix that ends in a slash: objects
	// with their sizes in bytes, and folders with a negative number. More than limit
	// entries are an error.
	List(ctx context.Context, prefix string, limit int) (map[string]int64, error)
	// Delete removes an object. One that is not there is no error.
	Delete(ctx context.Context, object string) error
}

const (
	// parallelFiles bounds the files of a checkpoint that are sent at one time.
	parallelFiles = 4
	// tries bounds requests in a row for something small, firstPause is what lies
	// between the first two; it doubles.
	tries      = 5
	firstPause = 250 * time.Millisecond
	// leftPause lies between two attempts to send what ended jobs left.
	leftPause = 30 * time.Second
)

// The entries of a job's folder in BucketConfig.Dir.
const (
	uriName    = "uri"    // the sink's URI
	sealedDir  = "sealed" // where the holder seals
	resumeDir  = "resume" // the checkpoint that the job goes on from
	sentSuffix = ".sent"  // of a countersignature that is in the bucket
)

var sealedForm = regexp.MustCompile(`^[0-9]{6,}\.sealed$`)

// BucketConfig is what Buckets need. All of it is required.
type BucketConfig struct {
	// Dir is a folder of its own, which must exist and lie in the file system of the
	// cache: sealed checkpoints wait there until they are in their bucket.
	Dir string
	// Open opens the bucket that a location is in for writing, under the node's
	// credentials.
	Open func(ctx context.Context, at source.Location) (Bucket, error)
	// Fetch is cache.Cache.Hold.
	Fetch func(ctx context.Context, job string, at source.Location, digest plan.Digest) (string, error)
	Log   *slog.Logger
}

// Buckets are the sinks in object stores. A checkpoint is sealed into a folder of
// the node, by a holder that has no network, and sent from there: its sealed files
// first, in any order, its record, and its manifest last. Without a manifest there is no
// checkpoint in the bucket. All that has to be known after an agent's end is on
// the disk and in the bucket.
type Buckets struct {
	BucketConfig
	ctx  context.Context //nolint:containedctx // the life of what ended jobs left, which is of no call
	stop context.CancelFunc
	wait sync.WaitGroup

	mu    sync.Mutex          // guards going
	going map[string]*sending // by job
}

// OpenBuckets returns the sinks of a node. Close ends what they do.
func OpenBuckets(c BucketConfig) (*Buckets, error) {
	if c.Dir == "" || c.Open == nil || c.Fetch == nil || c.Log == nil {
		return nil, errors.New("open sinks: a part is missing")
	}
	if st, err := os.Stat(c.Dir); err != nil {
		return nil, fmt.Errorf("open sinks: %w", err)
	} else if !st.IsDir() || st.Mode().Perm()&0o022 != 0 {
		return nil, fmt.Errorf("open sinks: %s: want a folder with mode 0700", c.Dir)
	}
	b := &Buckets{BucketConfig: c}
	b.ctx, b.stop = context.WithCancel(context.Background())
	return b, nil
}

// Close gives up what is being sent. The next Keep goes on with it.
func (b *Buckets) Close() error {
	b.stop()
	b.wait.Wait()
	return nil
}

// below is the location of names below at.
func below(at source.Location, names ...string) source.Location {
	at.Prefix = strings.Join(append([]string{at.Prefix}, names...), "/")
	return at
}

func isPlain(name string) bool {
	return filepath.IsLocal(name) && filepath.Base(name) == name && name != "."
}

// path is a place in a job's folder.
func (b *Buckets) path(job string, names ...string) (string, error) {
	for _, n := range append([]string{job}, names...) {
		if !isPlain(n) {
			return "", fmt.Errorf("find sink: %q is not a plain name", n)
		}
	}
	return filepath.Join(append([]string{b.Dir, job}, names...)...), nil
}

// Folder is where a job's checkpoints are sealed.
func (b *Buckets) Folder(job string) (string, error) { return b.path(job, sealedDir) }

// Create makes the folder into which a job's checkpoints are sealed. It is an error if
// the bucket cannot be listed, or has anything of the job already.
func (b *Buckets) Create(ctx context.Context, uri, job string) (string, error) {
	at, err := source.ParseSink(uri)
	if err != nil {
		return "", fmt.Errorf("make sink: %w", err)
	}
	dir, err := b.Folder(job)
	if err != nil {
		return "", err
	}
	there, err := b.list(ctx, below(at, job))
	if err != nil {
		return "", fmt.Errorf("make sink: %w", err)
	}
	if len(there) > 0 {
		return "", fmt.Errorf("make sink: %s is there already", below(at, job))
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("make sink: %w", err)
	}
	// A folder that is there and empty is the job's own, from before it began anew.
	if l, err := list(dir); err != nil || len(l) > 0 {
		return "", errors.Join(fmt.Errorf("make sink: %s is in use", dir), err)
	}
	if err := replace(filepath.Join(b.Dir, job), uriName, []byte(uri)); err != nil {
		return "", fmt.Errorf("make sink: %w", err)
	}
	return dir, nil
}

// replace writes a small file, durably, or leaves what was there.
func replace(dir, name string, body []byte) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	return writeWhole(root, name, body)
}

// at is where a job's checkpoints go.
func (b *Buckets) at(job string) (source.Location, error) {
	dir, err := b.path(job)
	if err != nil {
		return source.Location{}, err
	}
	uri, err := read(dir, uriName)
	if err != nil {
		return source.Location{}, fmt.Errorf("find sink of job %s: %w", job, err)
	}
	return source.ParseSink(string(uri))
}

// again tries f until it succeeds, fails for good, or fails too often.
func again(ctx context.Context, f func() error) error {
	pause := firstPause
	for try := 1; ; try++ {
		err := f()
		if err == nil || try == tries || errors.Is(err, cache.ErrPermanent) {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), err)
		case <-time.After(pause):
		}
		pause *= 2
	}
}

// with opens the bucket of a location for f.
func (b *Buckets) with(ctx context.Context, at source.Location, f func(Bucket) error) error {
	k, err := b.Open(ctx, at)
	if err != nil {
		return err
	}
	return errors.Join(f(k), k.Close())
}

func (b *Buckets) list(ctx context.Context, at source.Location) (out map[string]int64, err error) {
	err = b.with(ctx, at, func(k Bucket) error {
		return again(ctx, func() (err error) {
			out, err = k.List(ctx, at.Prefix+"/", maxListed)
			return err
		})
	})
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", at, err)
	}
	return out, nil
}

// Upload brings a checkpoint into the bucket, unless it is there. Of one that was
// begun, files that are in the bucket with their size are not sent again. When it
// returns without an error the checkpoint is in the bucket, and its sealed files are
// gone from the node. Calls for the same job exclude each other: the caller sees to that.
func (b *Buckets) Upload(ctx context.Context, job, folder string) error {
	dir, at, err := b.checkpoint(job, folder)
	if err != nil {
		return fmt.Errorf("send checkpoint %s: %w", folder, err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("send checkpoint %s: %w", folder, err)
	}
	defer root.Close()
	names, err := list(dir)
	if err != nil {
		return err
	}
	if slices.Contains(names, manifestName) {
		s, done, err := b.begin(job, folder, root, names)
		if err != nil {
			return fmt.Errorf("send checkpoint %s: %w", folder, err)
		}
		defer done()
		if err := b.with(ctx, at, func(k Bucket) error { return send(ctx, k, root, at, names, s) }); err != nil {
			return fmt.Errorf("send checkpoint to %s: %w", at, err)
		}
		// First: a folder without it has been sent.
		if err := root.Remove(manifestName); err != nil {
			return fmt.Errorf("send checkpoint %s: %w", folder, err)
		}
	}
	for _, n := range names {
		if sealedForm.MatchString(n) {
			if err := root.Remove(n); err != nil {
				return fmt.Errorf("send checkpoint %s: %w", folder, err)
			}
		}
	}
	return nil
}

func (b *Buckets) checkpoint(job, folder string) (string, source.Location, error) {
	if _, ok := Sequence(folder); !ok {
		return "", source.Location{}, fmt.Errorf("%q is not the folder of a checkpoint", folder)
	}
	at, err := b.at(job)
	if err != nil {
		return "", source.Location{}, err
	}
	dir, err := b.path(job, sealedDir, folder)
	return dir, below(at, job, folder), err
}

// send puts the files of a whole checkpoint into a bucket, the manifest last.
func send(ctx context.Context, k Bucket, root *os.Root, at source.Location, names []string, s *sending) error {
	there, err := k.List(ctx, at.Prefix+"/", maxListed)
	if err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(parallelFiles)
	for _, n := range names {
		if sealedForm.MatchString(n) {
			g.Go(func() error { return put(gctx, k, root, at, n, there, s) })
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for _, n := range []string{recordName, manifestName} {
		if err := put(ctx, k, root, at, n, nil, nil); err != nil {
			return err
		}
	}
	return nil
}

// put sends one file, unless there says that it is in the bucket. s may be nil.
func put(ctx context.Context, k Bucket, root *os.Root, at source.Location, name string, there map[string]int64, s *sending) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	f, err := root.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if size, ok := there[name]; ok && size == st.Size() {
		s.add(size)
		return nil
	}
	if err := k.Put(ctx, at.Object(name), s.reader(f), st.Size()); err != nil {
		return fmt.Errorf("send %s: %w", name, err)
	}
	return nil
}

// SendAnchor brings the countersignature beside a checkpoint into the bucket. It
// does nothing if there is none, or it is there.
func (b *Buckets) SendAnchor(ctx context.Context, job, folder string) error {
	dir, at, err := b.checkpoint(job, folder)
	if err != nil {
		return fmt.Errorf("send countersignature: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("send countersignature: %w", err)
	}
	defer root.Close()
	if _, err := root.Lstat(anchorName + sentSuffix); err == nil {
		return nil
	}
	if _, err := root.Lstat(anchorName); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := b.with(ctx, at, func(k Bucket) error { return put(ctx, k, root, at, anchorName, nil, nil) }); err != nil {
		return fmt.Errorf("send countersignature to %s: %w", at, err)
	}
	return root.WriteFile(anchorName+sentSuffix, nil, 0o600)
}

// Trim removes a checkpoint's sealed files from the bucket, the manifest first, and leaves
// its record, as the function of that name does in a folder.
func (b *Buckets) Trim(ctx context.Context, job, folder string) error {
	_, at, err := b.checkpoint(job, folder)
	if err != nil {
		return fmt.Errorf("remove checkpoint: %w", err)
	}
	err = b.with(ctx, at, func(k Bucket) error {
		if err := k.Delete(ctx, at.Object(manifestName)); err != nil {
			return err
		}
		there, err := k.List(ctx, at.Prefix+"/", maxListed)
		if err != nil {
			return err
		}
		for name := range there {
			if sealedForm.MatchString(name) {
				if err := k.Delete(ctx, at.Object(name)); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("remove checkpoint %s: %w", at, err)
	}
	return nil
}

// TryNumber is TryNumber of a folder for a bucket: each folder of job from is fetched
// for job, and held against the digest, before try is called. What is fetched lies there
// until the job that asks is left: sealed files, record, and countersignature if there
// is one.
func (b *Buckets) TryNumber(ctx context.Context, uri, job, from string, sequence uint64, digest plan.Digest, try func(dir string) error) error {
	at, err := source.ParseSink(uri)
	if err != nil {
		return err
	}
	if !isPlain(from) {
		return fmt.Errorf("find sink: %q is not a plain name", from)
	}
	folders, err := b.list(ctx, below(at, from))
	if err != nil {
		return err
	}
	var refused error
	for name := range folders {
		if n, ok := Sequence(name); !ok || n != sequence {
			continue
		}
		refusal, err := b.try(ctx, job, below(at, from, name), digest, try)
		if err != nil || refusal == nil {
			return err
		}
		refused = errors.Join(refused, fmt.Errorf("%s: %w", name, refusal))
	}
	return cmp.Or(refused, fmt.Errorf("checkpoint %d of job %s in %s: %w", sequence, from, uri, ErrNotFound))
}

// try fetches one folder for job and calls try with it. A refusal is what is wrong with
// this folder; after another error the next would have it as well.
func (b *Buckets) try(ctx context.Context, job string, at source.Location, digest plan.Digest, try func(dir string) error) (refusal, err error) {
	dir, err := b.fetch(ctx, job, at, digest)
	if errors.Is(err, cache.ErrPermanent) {
		return err, nil
	}
	if err != nil {
		return nil, err
	}
	return try(dir), nil
}

// TryDigest is TryDigest of a folder for a bucket: each folder is fetched for job,
// and held against the digest, before try is called.
func (b *Buckets) TryDigest(ctx context.Context, uri, job string, digest plan.Digest, try func(dir string) error) error {
	at, err := source.ParseSink(uri)
	if err != nil {
		return err
	}
	jobs, err := b.list(ctx, at)
	if err != nil {
		return err
	}
	var refused error
	for from := range jobs {
		if !isPlain(from) {
			continue
		}
		folders, err := b.list(ctx, below(at, from))
		if err != nil {
			return err
		}
		for name := range folders {
			if _, ok := Sequence(name); !ok {
				continue
			}
			raw, err := b.object(ctx, below(at, from, name), recordName)
			if err != nil && !errors.Is(err, cache.ErrPermanent) {
				return err
			}
			// One that lacks its record, or whose record was changed, is not the one that is looked for.
			if _, r, perr := receipt.ParseSignedCheckpoint(raw); err != nil || perr != nil || r.Digest != digest {
				continue
			}
			refusal, err := b.try(ctx, job, below(at, from, name), digest, try)
			if err != nil || refusal == nil {
				return err
			}
			refused = errors.Join(refused, fmt.Errorf("%s of job %s: %w", name, from, refusal))
		}
	}
	return cmp.Or(refused, fmt.Errorf("checkpoint %s in %s: %w", digest, uri, ErrNotFound))
}

// object reads a small object.
func (b *Buckets) object(ctx context.Context, at source.Location, name string) (out []byte, err error) {
	err = b.with(ctx, at, func(k Bucket) error {
		return again(ctx, func() error {
			r, size, err := k.Read(ctx, at.Object(name), 0, -1)
			if err != nil {
				return err
			}
			defer r.Close()
			if size > receipt.MaxSignedCheckpoint {
				return fmt.Errorf("%d bytes, at most %d are allowed: %w", size, receipt.MaxSignedCheckpoint, cache.ErrPermanent)
			}
			var buf bytes.Buffer
			n, err := io.Copy(&buf, io.LimitReader(r, size+1))
			if err == nil && n != size {
				err = fmt.Errorf("%d bytes came of %d", n, size)
			}
			out = buf.Bytes()
			return err
		})
	})
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", at.Object(name), err)
	}
	return out, nil
}

// fetch makes the folder from which a job goes on. The sealed files are the cache's,
// which held them against the digest.
func (b *Buckets) fetch(ctx context.Context, job string, at source.Location, digest plan.Digest) (string, error) {
	dir, err := b.path(job, resumeDir)
	if err != nil {
		return "", err
	}
	kept, err := b.Fetch(ctx, job, at, digest)
	if err != nil {
		return "", err
	}
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o700)); err != nil {
		return "", fmt.Errorf("fetch checkpoint: %w", err)
	}
	names, err := list(kept)
	if err != nil {
		return "", err
	}
	for _, n := range names {
		if err := os.Link(filepath.Join(kept, n), filepath.Join(dir, n)); err != nil {
			return "", fmt.Errorf("fetch checkpoint: %w", err)
		}
	}
	there, err := b.list(ctx, at)
	if err != nil {
		return "", err
	}
	for _, n := range []string{recordName, anchorName} {
		if _, ok := there[n]; !ok {
			continue // whoever needs it says that it is not there
		}
		body, err := b.object(ctx, at, n)
		if err != nil {
			return "", err
		}
		if err := replace(dir, n, body); err != nil {
			return "", fmt.Errorf("fetch checkpoint: %w", err)
		}
	}
	return dir, nil
}

// Staged is how many bytes of a job's checkpoints are still to be sent.
func (b *Buckets) Staged(job string) int64 {
	dir, err := b.Folder(job)
	if err != nil {
		return 0
	}
	var n int64
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return fs.SkipDir
		}
		if i, err := d.Info(); err == nil && d.Type().IsRegular() && sealedForm.MatchString(d.Name()) {
			n += i.Size()
		}
		return nil
	})
	return n
}

// Leave says that a job is over. What it sealed and is not in the bucket is sent,
// however often that is tried, and then its folder goes. Call it once for a job.
func (b *Buckets) Leave(job string) {
	dir, err := b.path(job)
	if err != nil {
		return
	}
	if _, err := os.Lstat(dir); err != nil {
		return // it had no sink in a bucket
	}
	b.wait.Go(func() {
		for told := false; ; told = true {
			err := b.leave(b.ctx, job)
			if err == nil {
				err = os.RemoveAll(dir)
			}
			if err == nil || b.ctx.Err() != nil {
				return
			}
			if !told {
				b.Log.WarnContext(b.ctx, "checkpoints of an ended job are not in their bucket yet", slog.String("job", job), slog.Any("error", err))
			}
			select {
			case <-b.ctx.Done():
				return
			case <-time.After(leftPause):
			}
		}
	})
}

func (b *Buckets) leave(ctx context.Context, job string) error {
	dir, err := b.Folder(job)
	if err != nil {
		return err
	}
	names, err := list(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	slices.Sort(names)
	for _, n := range names {
		if _, ok := Sequence(n); !ok {
			continue // a commit that was cut off
		}
		if err := b.Upload(ctx, job, n); err != nil {
			return err
		}
		if err := b.SendAnchor(ctx, job, n); err != nil {
			return err
		}
	}
	return nil
}

// Keep leaves every job but these, after an agent's restart.
func (b *Buckets) Keep(unfinished map[string]bool) error {
	jobs, err := list(b.Dir)
	if err != nil {
		return err
	}
	for _, job := range jobs {
		if !unfinished[job] {
			b.Leave(job)
		}
	}
	return nil
}
