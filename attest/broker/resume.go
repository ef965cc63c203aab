package broker

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

// Line is the one line of checkpoints that the jobs of a plan make under an
// asset, where the plan resumes from the latest. One job at a time goes on with
// it: the checkpoints that another still makes are countersigned no more, so that
// the line never forks.
type Line struct {
	Plan  plan.Digest
	Asset string
	// Job goes on with the line.
	Job string
	// From is the job that made the checkpoint from which Job goes on, and Sequence,
	// Digest and Record are that checkpoint's. All are zero if there was none.
	From     string
	Sequence uint64
	Digest   plan.Digest
	Record   plan.Digest
	// LogIndex and LogHash are the entry that records this.
	LogIndex uint64
	LogHash  []byte
}

// ResumeCheckpoint gives the line of checkpoints of a job's plan under asset to
// the job, and signs for where it stands: a receipt.ResumePoint. Asked again, a
// job that has the line is told where it stands now.
func (b *Broker) ResumeCheckpoint(ctx context.Context, agent Actor, job, asset string, challenge []byte) (string, error) {
	if !jobForm.MatchString(job) || asset == "" || len(challenge) != receipt.ChallengeSize {
		return "", fmt.Errorf("%w: resume of job %.80q under asset %.80q with a challenge of %d bytes, want %d", ErrInvalid, job, asset, len(challenge), receipt.ChallengeSize)
	}
	if err := b.may(ctx, agent, ActionCountersign, Resource{Kind: "job", Name: job}); err != nil {
		return "", err
	}
	var at receipt.ResumePoint
	err := b.update(ctx, func(ctx context.Context, tx Tx) error {
		lease, refused, err := leaseOf(ctx, tx, agent, job)
		if err != nil {
			return err
		}
		var l check.List
		if refused != "" {
			l.Fail("resume.lease", "a running job of this agent", refused, "")
			return check.Refuse("resume", l)
		}
		if !slices.ContainsFunc(lease.Uses, func(u LeaseUse) bool { return u.Asset == asset }) {
			l.Fail("resume.asset", "an asset whose key the job has", strconv.Quote(trim(asset)), "")
			return check.Refuse("resume", l)
		}
		line, err := tx.Line(ctx, lease.Plan, asset)
		if err != nil && !errors.Is(err, ErrNotFound) {
			return err
		}
		if line.Job != job {
			if line, err = b.takeLine(ctx, tx, agent, lease, asset, line); err != nil {
				return err
			}
		}
		at = receipt.ResumePoint{
			Issuer: b.id, IssuedAt: b.now().Unix(), JobID: job, Plan: lease.Plan, Asset: asset, Challenge: challenge,
			From: line.From, Sequence: line.Sequence, Digest: line.Digest, Record: line.Record, LogIndex: line.LogIndex, LogHash: line.LogHash,
		}
		// A job that is tried again has checkpoints of its own.
		head, err := tx.CheckpointHead(ctx, job, asset)
		switch {
		case errors.Is(err, ErrNotFound):
			return nil
		case err != nil:
			return err
		}
		at.From, at.Sequence, at.Digest, at.Record = job, head.Sequence, head.Digest, head.Record
		return nil
	})
	if err != nil {
		return "", err
	}
	token, err := b.signer.Sign(receipt.TypeResumePoint, at)
	if err != nil {
		return "", fmt.Errorf("%w: sign resume point: %w", ErrUnavailable, err)
	}
	return token, nil
}

// takeLine gives the line, which stands as was says, to the job of lease.
func (b *Broker) takeLine(ctx context.Context, tx Tx, agent Actor, lease Lease, asset string, was Line) (Line, error) {
	line := Line{Plan: lease.Plan, Asset: asset, Job: lease.JobID, From: was.From, Sequence: was.Sequence, Digest: was.Digest, Record: was.Record}
	if was.Job != "" {
		head, err := tx.CheckpointHead(ctx, was.Job, asset)
		switch {
		case errors.Is(err, ErrNotFound):
			// It made none: the line stands where it took it up.
		case err != nil:
			return Line{}, err
		default:
			line.From, line.Sequence, line.Digest, line.Record = was.Job, head.Sequence, head.Digest, head.Record
		}
	}
	switch _, err := tx.CheckpointHead(ctx, lease.JobID, asset); {
	case err == nil:
		var l check.List
		l.Fail("resume.started", "a job that has made no checkpoint yet, or that has the line", "one whose line another job took up", "submit it as another job")
		return Line{}, check.Refuse("resume", l)
	case !errors.Is(err, ErrNotFound):
		return Line{}, err
	}
	last, err := tx.JobHead(ctx, lease.JobID)
	if err != nil {
		return Line{}, err
	}
	if limit := uint64(MaxJobEntries - bundleEntries); last.Size >= limit {
		return Line{}, fmt.Errorf("%w: job %s has %d log entries, which leaves none for this", ErrTooMany, lease.JobID, last.Size)
	}
	e, err := b.log(ctx, tx, translog.Body{Kind: translog.KindResume, Actor: agent.String(), Job: lease.JobID, Resume: &translog.Resume{
		Asset: asset, Plan: lease.Plan, From: line.From, Sequence: line.Sequence, Digest: line.Digest, Record: line.Record,
	}})
	if err != nil {
		return Line{}, err
	}
	line.LogIndex, line.LogHash = e.Index, e.Hash
	return line, tx.PutLine(ctx, line)
}

// headOn is where a job's checkpoints stand: at its own newest, or where it took
// up its plan's line. It fails l where another job has the line.
func headOn(ctx context.Context, r Reader, lease Lease, asset string, l *check.List) (Head, error) {
	line, err := r.Line(ctx, lease.Plan, asset)
	if err != nil && !errors.Is(err, ErrNotFound) {
		return Head{}, err
	}
	if line.Job != "" && line.Job != lease.JobID {
		l.Fail("checkpoint.fork", "the job that has the plan's line of checkpoints", lease.JobID+"; the line is with "+line.Job, "another job has resumed from what this one made")
	}
	head, err := r.CheckpointHead(ctx, lease.JobID, asset)
	if !errors.Is(err, ErrNotFound) {
		return head, err
	}
	head = Head{JobID: lease.JobID, Asset: asset}
	if line.Job == lease.JobID {
		head.Sequence, head.Digest = line.Sequence, line.Digest
	}
	return head, nil
}
