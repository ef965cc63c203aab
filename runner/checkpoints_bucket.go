package runner

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/runner/source"
	"github.com/coffer-run/coffer/runner/source/sink"
)

// sendRate is what a bucket is given time for at a job's end, in bytes per second.
// What is slower is sent after the end, and stays unanchored.
const sendRate = 4 << 20

// bucket is where the checkpoints of a job with this URI go; nil if that is a folder
// of the node.
func (a *Agent) bucket(uri string) (*sink.Buckets, error) {
	switch {
	case !source.InBucket(uri):
		return nil, nil
	case a.Sinks == nil:
		return nil, fmt.Errorf("checkpoints in %s: no bucket in this node's configuration takes checkpoints", uri)
	}
	return a.Sinks, nil
}

// sinkOf is the URI where a job's checkpoints go, with its bucket.
func (a *Agent) sinkOf(j *Job) (string, *sink.Buckets, error) {
	c, err := j.checkpointSpec()
	if err != nil {
		return "", nil, err
	}
	if c == nil {
		return "", nil, fmt.Errorf("job %s has no place for checkpoints", j.id)
	}
	b, err := a.bucket(c.URI)
	return c.URI, b, err
}

// createSink makes the folder into which the holder seals a job's checkpoints.
func (a *Agent) createSink(ctx context.Context, j *Job) (string, error) {
	uri := j.spec.Checkpoints.URI
	b, err := a.bucket(uri)
	if err != nil {
		return "", err
	}
	if b != nil {
		return b.Create(ctx, uri, j.id)
	}
	return sink.Create(uri, j.id)
}

// checkpointDir is where a checkpoint of this job was sealed.
func (a *Agent) checkpointDir(j *Job, folder string) (string, error) {
	uri, b, err := a.sinkOf(j)
	if err != nil {
		return "", err
	}
	var dir string
	if b != nil {
		dir, err = b.Folder(j.id)
	} else {
		dir, err = sink.Dir(uri, j.id)
	}
	return filepath.Join(dir, folder), err
}

// bring has a checkpoint in its bucket, if it goes to one. The broker sees it only
// then: what it countersigned is there to go on from, whatever becomes of the node.
func (a *Agent) bring(ctx context.Context, j *Job, c holdapi.Checkpoint) error {
	_, b, err := a.sinkOf(j)
	if err != nil || b == nil {
		return err
	}
	return b.Upload(ctx, j.id, c.Folder())
}

// bringAnchor has the countersignature in the bucket beside it. If that does not
// work the job's end tries again.
func (a *Agent) bringAnchor(ctx context.Context, j *Job, c holdapi.Checkpoint) {
	_, b, err := a.sinkOf(j)
	if err == nil && b != nil {
		err = b.SendAnchor(ctx, j.id, c.Folder())
	}
	if err != nil {
		a.log.WarnContext(ctx, "keep countersignature", slog.String("job", j.id), slog.Uint64("sequence", c.Sequence), slog.Any("error", err))
	}
}

// trim removes the sealed files of a checkpoint.
func (a *Agent) trim(ctx context.Context, j *Job, folder string) error {
	_, b, err := a.sinkOf(j)
	if err != nil {
		return err
	}
	if b != nil {
		return b.Trim(ctx, j.id, folder)
	}
	dir, err := a.checkpointDir(j, folder)
	if err != nil {
		return err
	}
	return sink.Trim(dir)
}

// tryNumber calls try with each folder that is called as checkpoint sequence of job from,
// until try takes one.
func (a *Agent) tryNumber(ctx context.Context, j *Job, uri, from string, sequence uint64, digest plan.Digest, try func(dir string) error) error {
	b, err := a.bucket(uri)
	if err != nil {
		return err
	}
	if b != nil {
		return b.TryNumber(ctx, uri, j.id, from, sequence, digest, try)
	}
	return sink.TryNumber(uri, from, sequence, try)
}

// tryDigest calls try with each folder that says that it is the checkpoint with a
// digest, until try takes one.
func (a *Agent) tryDigest(ctx context.Context, j *Job, uri string, digest plan.Digest, try func(dir string) error) error {
	b, err := a.bucket(uri)
	if err != nil {
		return err
	}
	if b != nil {
		return b.TryDigest(ctx, uri, j.id, digest, try)
	}
	return sink.TryDigest(uri, digest, try)
}

// sendTime is how long a job's end waits for what is not in its bucket.
func (a *Agent) sendTime(j *Job) time.Duration {
	_, b, err := a.sinkOf(j)
	if err != nil || b == nil {
		return 0
	}
	return time.Duration(b.Staged(j.id)/sendRate) * time.Second
}
