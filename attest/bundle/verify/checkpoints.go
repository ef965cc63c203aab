package verify

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

// line is where the job's checkpoints begin: after the one that it went on from.
type line struct {
	sequence uint64
	digest   plan.Digest
	// point is the broker's word, if the plan resumes from the latest.
	point *receipt.ResumePoint
}

// brokerWord opens a token of the broker's under the keys that its other receipts
// are checked by.
func (v *verification) brokerWord(typ, token string, claims any) (pinned bool, issuer string, err error) {
	if issuer, err = issuerOf(token); err != nil {
		return false, "", err
	}
	if v.result != nil && issuer != v.result.Audience {
		return false, "", fmt.Errorf("signed by %.80q, and the keys were released by %.80q", issuer, v.result.Audience)
	}
	keys, pinned, err := v.keys(v.trust.BrokerKeys, bundle.BrokerKeys, issuer)
	if err != nil {
		return false, "", err
	}
	return pinned, issuer, keys.Open(typ, token, claims)
}

// resumed holds what the job went on from against its plan.
func (v *verification) resumed(g *check.List) line {
	var from line
	b, there := v.part(bundle.ResumePart)
	if v.pl == nil {
		return from
	}
	c := v.pl.Checkpoints
	switch {
	case c == nil || c.Resume == "":
		if there {
			g.Fail("resume.plan", "a plan that says what to resume from", "none, and a resume", "the job went on from something that nobody approved")
		}
		return from
	case !there && v.reached(bundle.StageDecrypt):
		g.Fail("resume.plan", "what the job went on from, because its plan says "+c.Resume, "nothing", "the record is not complete")
		return from
	case !there:
		return from
	}
	r, err := bundle.Decode[bundle.Resume](b)
	if err != nil {
		g.Fail("resume.form", "what the job went on from", err.Error(), "")
		return from
	}
	if c.ResumesLatest() {
		return v.resumedLatest(g, r, *c)
	}
	rec, ok := resumedRecord(g, r)
	if !ok {
		return from
	}
	g.Equal("resume.digest", c.Resume, string(rec.Digest), "the job went on from another checkpoint than the plan's")
	g.Equal("resume.asset", c.Asset, rec.Asset, "the checkpoint is under another key")
	if r.Anchor == "" {
		g.Skip("resume.anchor", "the broker had not countersigned the checkpoint that the plan names")
	} else {
		v.anchored(g, "resume.anchor", r.Anchor, r.Record, receipt.CheckpointRecord(rec))
	}
	v.resumeSeen(g, rec.Digest)
	return from
}

func (v *verification) resumedLatest(g *check.List, r bundle.Resume, c plan.Checkpoints) line {
	var p receipt.ResumePoint
	pinned, issuer, err := v.brokerWord(receipt.TypeResumePoint, r.Point, &p)
	if err != nil {
		g.Fail("resume.signature", "a resume point signed by the broker", err.Error(), "nobody but the broker knows which checkpoint is the newest")
		return line{}
	}
	byKeys(g, "resume.signature", pinned, issuer)
	g.Equal("resume.job", v.st.JobID, p.JobID, "the point was given to another job")
	g.Equal("resume.plan", string(v.st.PlanDigest), string(p.Plan), "the line of checkpoints is another plan's")
	g.Equal("resume.asset", c.Asset, p.Asset, "the line of checkpoints is another asset's")
	if p.Nothing() {
		g.Equal("resume.record", "none", said(len(r.Record) == 0, "none", "one"), "the broker knew of no checkpoint")
		return line{point: &p}
	}
	if rec, ok := resumedRecord(g, r); ok {
		g.Equal("resume.record", string(p.Record), string(plan.Sum(r.Record)), "the job went on from another checkpoint than the newest")
		g.Equal("resume.from", p.From, rec.JobID, "the checkpoint is another job's")
	}
	v.resumeSeen(g, p.Digest)
	return line{sequence: p.Sequence, digest: p.Digest, point: &p}
}

// resumedRecord checks the record by the key beside it: whose key that was, the
// record of the job that made it says.
func resumedRecord(g *check.List, r bundle.Resume) (receipt.CheckpointRecord, bool) {
	k, err := x509.ParsePKIXPublicKey(r.SessionKey)
	session, _ := k.(*ecdsa.PublicKey)
	if err == nil && session == nil {
		err = errors.New("another kind of key")
	}
	var rec receipt.CheckpointRecord
	if err == nil {
		rec, err = receipt.ParseCheckpointRecord(session, r.Record, r.Signature)
	}
	if err != nil {
		g.Fail("resume.record-signature", "a record with its signature", err.Error(), "")
		return receipt.CheckpointRecord{}, false
	}
	return rec, true
}

// resumeSeen wants the holder's own word in the trace.
func (v *verification) resumeSeen(g *check.List, d plan.Digest) {
	b, ok := v.part(bundle.Trace)
	if !ok {
		return
	}
	events, err := bundle.Decode[[]bundle.Event](b)
	if err != nil {
		return // traceGroup says so
	}
	if !slices.ContainsFunc(events, func(e bundle.Event) bool { return e.Kind == bundle.EventResumed && e.Digest == string(d) }) {
		g.Fail("resume.seen", "the holder's event that it opened "+string(d), "none", "the job went on from something else")
		return
	}
	g.Pass("resume.seen", string(d))
}

// anchored checks one countersignature, and says whether it holds.
func (v *verification) anchored(g *check.List, id, token string, record []byte, r receipt.CheckpointRecord) (receipt.CheckpointHead, bool) {
	var h receipt.CheckpointHead
	pinned, issuer, err := v.brokerWord(receipt.TypeCheckpointHead, token, &h)
	if err != nil {
		g.Fail(id, "a countersignature by the broker", err.Error(), "")
		return h, false
	}
	if h.Record != plan.Sum(record) || h.Digest != r.Digest || h.Sequence != r.Sequence || h.JobID != r.JobID || h.Plan != r.Plan || h.Asset != r.Asset {
		g.Fail(id, fmt.Sprintf("a countersignature of checkpoint %d, %s", r.Sequence, r.Digest), fmt.Sprintf("one of checkpoint %d, %s", h.Sequence, h.Digest), "the countersignature is another checkpoint's")
		return h, false
	}
	byKeys(g, id, pinned, issuer)
	return h, true
}

// anchors checks the countersignatures of the job's own checkpoints.
func (v *verification) anchors(g *check.List, list []bundle.Checkpoint) {
	var open []string
	for _, c := range list {
		r, err := receipt.DecodeCheckpointRecord(c.Record)
		if err != nil {
			continue // said already
		}
		if c.Anchor == "" {
			open = append(open, fmt.Sprint(r.Sequence))
			continue
		}
		if h, ok := v.anchored(g, "checkpoint.anchor", c.Anchor, c.Record, r); ok {
			v.heads = append(v.heads, h)
		}
	}
	if len(open) > 0 {
		g.Skip("checkpoint.anchor", fmt.Sprintf("%d of %d unanchored, the first is %s: the broker was not shown them, or did not countersign them", len(open), len(list), open[0]))
	}
}

// logCheckpoints holds the log's entries of checkpoints against the bundle's, and
// the broker's words against the log.
func (v *verification) logCheckpoints(g *check.List, bodies []translog.Body) {
	hashes, at := map[uint64][]byte{}, map[uint64]translog.Body{}
	for _, e := range v.b.Log.Entries {
		hashes[e.Index] = e.Hash
	}
	for _, b := range bodies {
		at[b.Index] = b
	}
	for _, h := range v.heads {
		b := at[h.LogIndex]
		if k := b.Checkpoint; k == nil || !bytes.Equal(hashes[h.LogIndex], h.LogHash) || k.Asset != h.Asset || k.Sequence != h.Sequence || k.Digest != h.Digest || k.Record != h.Record {
			g.Fail("log.checkpoints", fmt.Sprintf("checkpoint %d in entry %d", h.Sequence, h.LogIndex), "something else", "the broker countersigned what it did not log")
		}
	}
	resumes := 0
	for _, b := range bodies {
		switch b.Kind {
		case translog.KindCheckpoint:
			if v.records != nil && !slices.Contains(v.records, b.Checkpoint.Record) {
				g.Fail("log.checkpoints", "a record for each logged checkpoint", fmt.Sprintf("none for number %d", b.Checkpoint.Sequence), "a checkpoint was left out")
			}
		case translog.KindResume:
			resumes++
			p := v.line.point
			if v.reached(bundle.StageDecrypt) && (p == nil || p.LogIndex != b.Index || !bytes.Equal(hashes[b.Index], p.LogHash) || b.Resume.Asset != p.Asset ||
				b.Resume.Plan != p.Plan || b.Resume.From != p.From || b.Resume.Sequence != p.Sequence || b.Resume.Digest != p.Digest || b.Resume.Record != p.Record) {
				g.Fail("log.resume", "the same in the broker's word and the log", "a difference", "")
			}
		default:
		}
	}
	if v.line.point != nil && resumes == 0 {
		g.Fail("log.resume", "an entry that the job took up its plan's line", "none", "the broker said what it did not log")
	}
	if len(v.heads) > 0 && !slices.ContainsFunc(g.Failed(), func(c check.Check) bool { return c.ID == "log.checkpoints" }) {
		v.brokersWord(g, "log.checkpoints", fmt.Sprintf("%d, each logged", len(v.heads)))
	}
	if v.line.point != nil && !slices.ContainsFunc(g.Failed(), func(c check.Check) bool { return c.ID == "log.resume" }) {
		v.brokersWord(g, "log.resume", fmt.Sprintf("entry %d", v.line.point.LogIndex))
	}
}

// brokersWord records what holds as far as the broker's keys are pinned.
func (v *verification) brokersWord(g *check.List, id, found string) {
	if v.trust.BrokerKeys == nil {
		g.Skip(id, found+": "+fromBundle)
		return
	}
	g.Pass(id, found)
}
