package bundletest

import (
	"crypto/x509"
	"slices"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

// Logged appends an entry of the job to the log.
func (j *Job) Logged(b translog.Body) (translog.Entry, error) {
	b.Job, b.JobSequence, b.JobPrev = j.ID, uint64(len(j.Log.Entries))+1, j.lastEntry()
	e, err := j.lab.Append(b)
	if err == nil {
		j.Log.Entries = append(j.Log.Entries, e)
	}
	return e, err
}

// Countersign logs a checkpoint and signs its head, changed before it is signed.
func (j *Job) Countersign(c bundle.Checkpoint, change func(*receipt.CheckpointHead)) (string, error) {
	h := receipt.CheckpointHead{
		Issuer: BrokerID, IssuedAt: j.lab.Now.Unix(), JobID: j.ID, Plan: j.Plan, Asset: "checkpoints", Sequence: c.Sequence, Digest: c.Digest, Record: plan.Sum(c.Record),
	}
	e, err := j.Logged(translog.Body{Kind: translog.KindCheckpoint, Checkpoint: &translog.JobCheckpoint{Asset: h.Asset, Sequence: h.Sequence, Digest: h.Digest, Record: h.Record}})
	if err != nil {
		return "", err
	}
	h.LogIndex, h.LogHash = e.Index, e.Hash
	if change != nil {
		change(&h)
	}
	return j.lab.Broker.Sign(receipt.TypeCheckpointHead, h)
}

// Resumed has the job go on from a checkpoint of from, which its plan's line had
// come to: the resume part, the log's entry, the holder's event and the job's own
// checkpoints after it. point is changed before it is signed. A nil c is that there
// was none.
func (j *Job) Resumed(from *Job, c *bundle.Checkpoint, change func(*receipt.ResumePoint)) error {
	p := receipt.ResumePoint{Issuer: BrokerID, IssuedAt: j.lab.Now.Unix(), JobID: j.ID, Plan: j.Plan, Asset: "checkpoints", Challenge: make([]byte, receipt.ChallengeSize)}
	r := bundle.Resume{}
	if c != nil {
		p.From, p.Sequence, p.Digest, p.Record = from.ID, c.Sequence, c.Digest, plan.Sum(c.Record)
		key, err := x509.MarshalPKIXPublicKey(&from.Session.PublicKey)
		if err != nil {
			return err
		}
		r.Record, r.Signature, r.SessionKey = c.Record, c.Signature, key
	}
	e, err := j.Logged(translog.Body{Kind: translog.KindResume, Resume: &translog.Resume{Asset: p.Asset, Plan: p.Plan, From: p.From, Sequence: p.Sequence, Digest: p.Digest, Record: p.Record}})
	if err != nil {
		return err
	}
	p.LogIndex, p.LogHash = e.Index, e.Hash
	if change != nil {
		change(&p)
	}
	if r.Point, err = j.lab.Broker.Sign(receipt.TypeResumePoint, p); err != nil {
		return err
	}
	if err := j.json(bundle.ResumePart, r); err != nil {
		return err
	}
	var own []bundle.Checkpoint
	last := bundle.Checkpoint{}
	if c != nil {
		last = *c
	}
	for range 2 {
		if last, err = j.Checkpoint(last.Sequence+1, last.Digest, nil); err != nil {
			return err
		}
		if last.Anchor, err = j.Countersign(last, nil); err != nil {
			return err
		}
		own = append(own, last)
	}
	at := j.lab.Now.UnixNano()
	trace := []bundle.Event{{Sequence: 1, UnixNano: at, Kind: bundle.EventContainerStart, Detail: "train"}}
	if c != nil {
		trace = append(trace, bundle.Event{Sequence: 2, UnixNano: at, Kind: bundle.EventResumed, Digest: string(c.Digest)})
	}
	trace = append(trace, bundle.Event{Sequence: uint64(len(trace)) + 1, UnixNano: at + 1000, Kind: bundle.EventExec, Process: "/usr/bin/python3"})
	// The holder does not see what the broker says of its checkpoints.
	held := slices.Clone(own)
	for i := range held {
		held[i].Anchor = ""
	}
	for name, v := range map[bundle.Part]any{
		bundle.Checkpoints:  own,
		bundle.HolderStatus: bundle.Status{Started: true, Execs: 1, Scrubbed: true, LogBytes: 30, Checkpoints: held, Metrics: metrics()},
		bundle.Trace:        trace,
	} {
		if err := j.json(name, v); err != nil {
			return err
		}
	}
	return nil
}

// SessionDER is the job's public session key.
func (j *Job) SessionDER() ([]byte, error) { return x509.MarshalPKIXPublicKey(&j.Session.PublicKey) }
