package object

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	"gocloud.dev/blob"
	"gocloud.dev/gcerrors"
	"google.golang.org/api/googleapi"

	"github.com/coffer-run/coffer/runner/source"
	"github.com/coffer-run/coffer/runner/source/cache"
	"github.com/coffer-run/coffer/runner/source/sink"
)

const (
	// partSize is how much one request of an upload carries, in bytes, unless a store
	// that takes maxParts of them needs more. partsAtOnce of one file are in memory.
	partSize    = 8 << 20
	maxParts    = 9000
	partsAtOnce = 2
	// putTries is how often a part is sent before the file has failed, putPause the
	// longest pause in between.
	putTries = 5
	putPause = 10 * time.Second
	// putStall is how long an upload may take nothing of a file, in place of a
	// connection's own idea: the last parts of a file are on their way meanwhile.
	putStall = 5 * time.Minute
)

var errPutStalled = errors.New("the store takes nothing")

// OpenSink opens the bucket of a location for checkpoints, if the configuration
// says that it takes them. Credentials are read each time.
func (b *Buckets) OpenSink(ctx context.Context, at source.Location) (sink.Bucket, error) {
	if c, ok := b.known[bucketURI(at)]; ok && !c.Checkpoints {
		return nil, fmt.Errorf("the configuration of this node has no checkpoints in %s", bucketURI(at))
	}
	opened, err := b.open(ctx, at, b.pause)
	if err != nil {
		return nil, err
	}
	return writable{bucket{opened}, b.listTime}, nil
}

// TakesCheckpoints reports whether any bucket does.
func (b *Buckets) TakesCheckpoints() bool {
	for _, c := range b.known {
		if c.Checkpoints {
			return true
		}
	}
	return false
}

// partRetries send a part again: the file's others need not be sent anew for it.
func partRetries(pause time.Duration) aws.Retryer {
	return retry.NewStandard(func(o *retry.StandardOptions) { o.MaxAttempts, o.MaxBackoff = putTries, pause })
}

// writable is a sink.Bucket.
type writable struct {
	bucket
	listTime time.Duration
}

// Put is of sink.Bucket. Stores make an object when all of it has come.
func (w writable) Put(ctx context.Context, object string, r io.Reader, size int64) (err error) {
	defer contain(&err)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silence := time.AfterFunc(putStall, func() { cancel(errPutStalled) })
	defer silence.Stop()
	part := max(int64(partSize), size/maxParts+1)
	exact := &exactReader{r: r, left: size, alive: func() { silence.Reset(putStall) }}
	err = w.b.Upload(ctx, object, exact, &blob.WriterOptions{BufferSize: int(part), MaxConcurrency: partsAtOnce, ContentType: "application/octet-stream"})
	if cause := context.Cause(ctx); err != nil && cause != nil {
		return cause
	}
	return told(err)
}

// exactReader fails unless its source has as many bytes as were said.
type exactReader struct {
	r     io.Reader
	left  int64
	alive func()
}

func (e *exactReader) Read(b []byte) (int, error) {
	e.alive()
	n, err := e.r.Read(b)
	e.left -= int64(n)
	if e.left < 0 || errors.Is(err, io.EOF) && e.left > 0 {
		return n, errors.New("the file changed its size")
	}
	return n, err
}

const (
	// listPage is how many entries one request lists.
	listPage = 1000
	// listTime is how long all requests of one listing may take. The library asks until a
	// page is full: a store that always has one more, with nothing in it, would keep it.
	listTime = 5 * time.Minute
)

// List is of sink.Bucket.
func (w writable) List(ctx context.Context, prefix string, limit int) (_ map[string]int64, err error) {
	defer contain(&err)
	ctx, cancel := context.WithTimeout(ctx, w.listTime)
	defer cancel()
	out := map[string]int64{}
	for page := blob.FirstPageToken; len(page) > 0; {
		l, next, err := w.b.ListPage(ctx, page, listPage, &blob.ListOptions{Prefix: prefix, Delimiter: "/"})
		if err != nil {
			return nil, told(err)
		}
		for _, o := range l {
			name, ok := strings.CutPrefix(strings.TrimSuffix(o.Key, "/"), prefix)
			if !ok || name == "" {
				continue // some tools make an object for the folder itself
			}
			if out[name] = o.Size; o.IsDir {
				out[name] = -1
			}
		}
		if len(out) > limit {
			return nil, fmt.Errorf("more than %d entries: %w", limit, cache.ErrPermanent)
		}
		page = next
	}
	return out, nil
}

// Delete is of sink.Bucket.
func (w writable) Delete(ctx context.Context, object string) (err error) {
	defer contain(&err)
	err = w.b.Delete(ctx, object)
	// The library takes a refusal of Google's for an object that is not there.
	var google *googleapi.Error
	refused := errors.As(err, &google) && google.Code == http.StatusForbidden
	if gcerrors.Code(err) == gcerrors.NotFound && !refused {
		return nil
	}
	return told(err)
}

// told is an error of a store for those who read the job's events.
func told(err error) error {
	if err == nil {
		return nil
	}
	if permanent(err) {
		return fmt.Errorf("%w: %w", clean(err), cache.ErrPermanent)
	}
	return clean(err)
}
