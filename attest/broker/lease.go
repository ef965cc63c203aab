package broker

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

// MaxRenewals bounds the jobs of one renewal.
const MaxRenewals = 64

// Renewal asks for a lease of one job.
type Renewal struct {
	JobID     string
	Challenge []byte
}

// Renewed is the answer to a Renewal: a lease or the reason why there is none.
type Renewed struct {
	JobID   string
	Lease   string
	Refused string
}

// Renew signs a lease for each job that the agent acts for. A job under
// something that was taken back gets one that tells it to stop. Nothing is
// written but the first time that a job is told so.
func (b *Broker) Renew(ctx context.Context, agent Actor, l []Renewal) ([]Renewed, error) {
	if len(l) == 0 || len(l) > MaxRenewals {
		return nil, fmt.Errorf("%w: a renewal is of 1 to %d jobs", ErrInvalid, MaxRenewals)
	}
	for _, r := range l {
		if !jobForm.MatchString(r.JobID) || len(r.Challenge) != receipt.ChallengeSize {
			return nil, fmt.Errorf("%w: renewal of job %.80q with a challenge of %d bytes, want %d", ErrInvalid, r.JobID, len(r.Challenge), receipt.ChallengeSize)
		}
		if err := b.may(ctx, agent, ActionRenew, Resource{Kind: "job", Name: r.JobID}); err != nil {
			return nil, err
		}
	}
	leases := make([]Lease, len(l))
	refused := make([]string, len(l))
	tell := false
	now := b.now()
	if err := b.view(ctx, func(ctx context.Context, r Reader) error {
		for i := range l {
			var err error
			if leases[i], refused[i], err = leaseOf(ctx, r, agent, l[i].JobID); err != nil {
				return err
			}
			tell = tell || refused[i] == "" && leases[i].reason(now) != "" && leases[i].Told.IsZero()
		}
		return nil
	}); err != nil {
		return nil, err
	}
	if tell {
		if err := b.tell(ctx, agent, l, leases, refused); err != nil {
			return nil, err
		}
	}
	out := make([]Renewed, 0, len(l))
	for i, r := range l {
		if refused[i] != "" {
			out = append(out, Renewed{JobID: r.JobID, Refused: refused[i]})
			continue
		}
		if leases[i].reason(now) == "" && leases[i].Attested.Refused != "" {
			out = append(out, Renewed{JobID: r.JobID, Refused: leases[i].Attested.Refused})
			continue
		}
		token, err := b.signLease(leases[i], r.Challenge, now)
		if err != nil {
			return nil, err
		}
		out = append(out, Renewed{JobID: r.JobID, Lease: token})
	}
	return out, nil
}

// leaseOf reads the lease of a job of agent, or says why there is none.
func leaseOf(ctx context.Context, r Reader, agent Actor, job string) (Lease, string, error) {
	l, err := r.Lease(ctx, job)
	switch {
	case errors.Is(err, ErrNotFound):
		return Lease{}, "lease.missing: nothing was released to this job", nil
	case err != nil:
		return Lease{}, "", err
	case l.Agent != agent.String():
		// Whose job it is stays untold.
		return Lease{}, "job.agent: another agent acts for this job", nil
	case !l.Ended.IsZero():
		return Lease{}, "lease.ended: the job was reported gone", nil
	}
	return l, "", nil
}

// reason says why a job has to stop at now; empty is that it may run.
func (l Lease) reason(now time.Time) string {
	if l.Stop == "" && !l.StopAt.IsZero() && !now.Before(l.StopAt) {
		return "expired: the grant ended at " + stamp(l.StopAt)
	}
	if l.Stop == "" {
		return l.Attested.late(now, l.Seconds)
	}
	return l.Stop
}

// tell records that jobs are told to stop, before they are.
func (b *Broker) tell(ctx context.Context, agent Actor, l []Renewal, leases []Lease, refused []string) error {
	return b.update(ctx, func(ctx context.Context, tx Tx) error {
		for i, r := range l {
			var err error
			if leases[i], refused[i], err = leaseOf(ctx, tx, agent, r.JobID); err != nil {
				return err
			}
			reason := leases[i].reason(b.now())
			if refused[i] != "" || reason == "" || !leases[i].Told.IsZero() {
				continue
			}
			leases[i].Stop, leases[i].Told = reason, b.now().UTC().Truncate(time.Second)
			if err := tx.PutLease(ctx, leases[i]); err != nil {
				return err
			}
			if _, err := b.log(ctx, tx, translog.Body{Kind: translog.KindStop, Actor: agent.String(), Job: r.JobID, Stop: &translog.Stop{Reason: reason}}); err != nil {
				return err
			}
		}
		return nil
	})
}

func (b *Broker) signLease(l Lease, challenge []byte, now time.Time) (string, error) {
	c := receipt.Lease{IssuedAt: now.Unix(), JobID: l.JobID, Plan: l.Plan, Session: plan.Sum(l.Session), Challenge: challenge, State: receipt.LeaseRunning, Seconds: l.Seconds}
	if reason := l.reason(now); reason != "" {
		c.State, c.Seconds, c.GraceSeconds, c.Reason = receipt.LeaseStop, 0, l.Grace, reason
	}
	token, err := receipt.SignLease(b.signer, c)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return token, nil
}

// lease is what the job runs under once v is released to it: what it had, and
// this.
func (c claim) lease(had Lease, v verdict, now time.Time) (Lease, error) {
	pub, ok := c.result.Confirmation.JWK.Key.(*ecdsa.PublicKey)
	if !ok {
		return Lease{}, errors.New("result confirms no session key")
	}
	session, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return Lease{}, fmt.Errorf("session key: %w", err)
	}
	l := Lease{
		JobID: c.result.JobID, Agent: c.actor.String(), Submitter: c.request.Submitter, Plan: c.result.PlanDigest, Session: session, Image: c.image,
		Seconds: v.asset.Policy.LeaseSeconds, Grace: v.asset.Policy.GraceSeconds, Uses: slices.Clone(had.Uses), Opened: now.UTC().Truncate(time.Second), Stop: had.Stop, Told: had.Told,
		Attested: c.attested(had, v.asset.Policy),
	}
	if had.JobID != "" {
		l.Opened = had.Opened
		// The strictest of all that the job has keys for.
		l.Seconds, l.Grace, l.StopAt = min(l.Seconds, had.Seconds), min(l.Grace, had.Grace), had.StopAt
	}
	if l.Image == "" {
		l.Image = had.Image
	}
	if l.Submitter == "" {
		l.Submitter = had.Submitter
	}
	if v.asset.Policy.StopAtExpiry {
		l.StopAt = earlier(l.StopAt, ends(v.grant, v.asset))
	}
	results := c.results()
	l.Chips, l.Measurements = claims(results, "snp.chip-id"), claims(results, "snp.measurement")
	l.Chips, l.Measurements = join(l.Chips, had.Chips), join(l.Measurements, had.Measurements)
	use := LeaseUse{Grant: v.grant.ID, Requester: v.grant.Requester, Asset: v.asset.Name, Owner: v.asset.Owner}
	if !slices.Contains(l.Uses, use) {
		l.Uses = append(l.Uses, use)
	}
	return l, nil
}

// join returns what is in either list.
func join(a, b []string) []string {
	for _, s := range b {
		if !slices.Contains(a, s) {
			a = append(a, s)
		}
	}
	return a
}

// Stopped is an agent's report that a job is gone. Times that are zero did not
// happen.
type Stopped struct {
	Told, Gone, Scrubbed time.Time
	Reason               string
}

// ReportStopped ends the lease of a job and records the times. A second report
// changes nothing.
func (b *Broker) ReportStopped(ctx context.Context, agent Actor, job string, s Stopped) error {
	if !jobForm.MatchString(job) || len(s.Reason) > MaxReason {
		return fmt.Errorf("%w: report on job %.80q with a reason of %d bytes, at most %d are allowed", ErrInvalid, job, len(s.Reason), MaxReason)
	}
	if err := b.may(ctx, agent, ActionReportStopped, Resource{Kind: "job", Name: job}); err != nil {
		return err
	}
	return b.update(ctx, func(ctx context.Context, tx Tx) error {
		l, err := tx.Lease(ctx, job)
		if err != nil {
			return fmt.Errorf("lease of job %s: %w", job, err)
		}
		if l.Agent != agent.String() {
			return otherAgent("stop", agent)
		}
		if !l.Ended.IsZero() {
			return nil
		}
		if err := b.room(ctx, tx, job); err != nil {
			return err
		}
		l.Ended = b.now().UTC().Truncate(time.Second)
		if err := tx.PutLease(ctx, l); err != nil {
			return err
		}
		_, err = b.log(ctx, tx, translog.Body{Kind: translog.KindStopped, Actor: agent.String(), Job: job, Stopped: &translog.Stopped{
			Reason: s.Reason, Told: millis(s.Told), Gone: millis(s.Gone), Scrubbed: millis(s.Scrubbed),
		}})
		return err
	})
}

func millis(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

func otherAgent(stage string, agent Actor) error {
	var l check.List
	l.Fail("job.agent", "the agent that acts for this job", agent.String(), "act for jobs of this agent only")
	return check.Refuse(stage, l)
}

// room is an error if the log of a job is full.
func (b *Broker) room(ctx context.Context, r Reader, job string) error {
	head, err := r.JobHead(ctx, job)
	if err == nil && head.Size >= MaxJobEntries {
		return fmt.Errorf("%w: job %s has %d log entries, which is as many as a job may have", ErrTooMany, job, head.Size)
	}
	return err
}

// CountersignCheckpoint records the newest checkpoint of a job and signs for it:
// a receipt.CheckpointHead. A record of another job or plan, one that is not the
// next of its line, or whose parent is not the last one, is refused. The same
// record again gets the same answer.
func (b *Broker) CountersignCheckpoint(ctx context.Context, agent Actor, job string, record, signature []byte) (string, error) {
	if !jobForm.MatchString(job) || len(record) > receipt.MaxCheckpointRecord {
		return "", fmt.Errorf("%w: checkpoint of job %.80q of %d bytes, at most %d are allowed", ErrInvalid, job, len(record), receipt.MaxCheckpointRecord)
	}
	if err := b.may(ctx, agent, ActionCountersign, Resource{Kind: "job", Name: job}); err != nil {
		return "", err
	}
	var head Head
	err := b.update(ctx, func(ctx context.Context, tx Tx) error {
		lease, refused, err := leaseOf(ctx, tx, agent, job)
		if err != nil {
			return err
		}
		var l check.List
		if refused != "" {
			l.Fail("checkpoint.lease", "a running job of this agent", refused, "")
			return check.Refuse("checkpoint", l)
		}
		key, err := x509.ParsePKIXPublicKey(lease.Session)
		if err != nil {
			return fmt.Errorf("session key of job %s: %w", job, err)
		}
		session, _ := key.(*ecdsa.PublicKey)
		r, err := receipt.ParseCheckpointRecord(session, record, signature)
		if err != nil {
			var refusal *check.Refusal
			if errors.As(err, &refusal) {
				return err
			}
			return fmt.Errorf("%w: %w", ErrInvalid, err)
		}
		l.Equal("checkpoint.job", job, trim(r.JobID), "")
		l.Equal("checkpoint.plan", string(lease.Plan), string(r.Plan), "")
		if !slices.ContainsFunc(lease.Uses, func(u LeaseUse) bool { return u.Asset == r.Asset }) {
			l.Fail("checkpoint.asset", "an asset whose key the job has", strconv.Quote(trim(r.Asset)), "")
		}
		if len(l.Failed()) > 0 {
			return check.Refuse("checkpoint", l)
		}
		digest := plan.Sum(record)
		if head, err = headOn(ctx, tx, lease, r.Asset, &l); err != nil {
			return err
		}
		if head.Record == digest {
			return nil
		}
		switch {
		case r.Sequence < head.Sequence:
			l.Fail("checkpoint.rollback", "a checkpoint after "+strconv.FormatUint(head.Sequence, 10), strconv.FormatUint(r.Sequence, 10), "go on from the newest checkpoint")
		case r.Sequence == head.Sequence:
			l.Fail("checkpoint.fork", string(head.Record), string(digest), "another checkpoint has this number")
		case r.Sequence > head.Sequence+1:
			l.Fail("checkpoint.gap", "checkpoint "+strconv.FormatUint(head.Sequence+1, 10), strconv.FormatUint(r.Sequence, 10), "show the checkpoints between first")
		case r.Parent != head.Digest:
			l.Fail("checkpoint.fork", "parent "+string(head.Digest), string(r.Parent), "go on from the newest checkpoint")
		}
		last, err := tx.JobHead(ctx, job)
		if err != nil {
			return err
		}
		if limit := uint64(MaxJobEntries - bundleEntries); last.Size >= limit {
			l.Fail("job.entries", fmt.Sprintf("a job with fewer than %d log entries", limit), strconv.FormatUint(last.Size, 10), "checkpoint less often")
		}
		if len(l.Failed()) > 0 {
			return check.Refuse("checkpoint", l)
		}
		e, err := b.log(ctx, tx, translog.Body{Kind: translog.KindCheckpoint, Actor: agent.String(), Job: job, Checkpoint: &translog.JobCheckpoint{
			Asset: r.Asset, Sequence: r.Sequence, Digest: r.Digest, Record: digest,
		}})
		if err != nil {
			return err
		}
		head = Head{
			JobID: job, Asset: r.Asset, Plan: r.Plan, Sequence: r.Sequence, Digest: r.Digest, Record: digest, Time: b.now().UTC().Truncate(time.Second),
			LogIndex: e.Index, LogHash: e.Hash,
		}
		return tx.PutCheckpointHead(ctx, head)
	})
	if err != nil {
		return "", err
	}
	token, err := b.signer.Sign(receipt.TypeCheckpointHead, receipt.CheckpointHead{
		Issuer: b.id, IssuedAt: head.Time.Unix(), JobID: head.JobID, Plan: head.Plan, Asset: head.Asset, Sequence: head.Sequence, Digest: head.Digest, Record: head.Record,
		LogIndex: head.LogIndex, LogHash: head.LogHash,
	})
	if err != nil {
		return "", fmt.Errorf("%w: sign checkpoint head: %w", ErrUnavailable, err)
	}
	return token, nil
}
