package receipt

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

// VerifyCheckpointHead checks a broker's countersignature of one record: that it
// speaks of the very record and of what that says. Everything that it refuses is
// a *check.Refusal at stage "checkpoint".
func VerifyCheckpointHead(keys Keys, token string, record []byte, r CheckpointRecord) (CheckpointHead, error) {
	var h CheckpointHead
	var l check.List
	if err := keys.Open(TypeCheckpointHead, token, &h); err != nil {
		l.Fail("checkpoint.countersignature", "a countersignature by "+keys.issuer, err.Error(), "the broker was not shown this checkpoint")
		return CheckpointHead{}, check.Refuse("checkpoint", l)
	}
	l.Equal("checkpoint.countersigned-record", string(plan.Sum(record)), string(h.Record), "the countersignature is another checkpoint's")
	l.Equal("checkpoint.countersigned-digest", string(r.Digest), string(h.Digest), "the countersignature is another checkpoint's")
	l.Equal("checkpoint.countersigned-sequence", strconv.FormatUint(r.Sequence, 10), strconv.FormatUint(h.Sequence, 10), "")
	l.Equal("checkpoint.countersigned-job", r.JobID, h.JobID, "")
	l.Equal("checkpoint.countersigned-plan", string(r.Plan), string(h.Plan), "")
	l.Equal("checkpoint.countersigned-asset", r.Asset, h.Asset, "")
	if len(l.Failed()) > 0 {
		return CheckpointHead{}, check.Refuse("checkpoint", l)
	}
	return h, nil
}

// TypeResumePoint is the token type of resume points.
const TypeResumePoint = "resume-point"

// ResumePoint is the claims set by which a broker says from which checkpoint a
// job goes on: the newest that it countersigned for any job of the same plan
// under the same asset. It gives that line of checkpoints to the job.
type ResumePoint struct {
	Issuer   string      `json:"iss"`
	IssuedAt int64       `json:"iat"`
	JobID    string      `json:"job"`
	Plan     plan.Digest `json:"plan"`
	Asset    string      `json:"asset"`
	// Challenge is the holder's, ChallengeSize bytes: the answer is of this moment.
	Challenge []byte `json:"challenge"`
	// From is the job that made the checkpoint. It is empty, and so is all that
	// follows, if there is none to go on from.
	From     string `json:"from,omitempty"`
	Sequence uint64 `json:"sequence,omitempty"`
	// Digest is that of the sealed manifest, Record that of the signed record.
	Digest plan.Digest `json:"digest,omitempty"`
	Record plan.Digest `json:"record,omitempty"`
	// LogIndex and LogHash are the entry of the evidence log that records that the
	// job goes on from there.
	LogIndex uint64 `json:"logIndex"`
	LogHash  []byte `json:"logHash"`
}

// Nothing says that there is no checkpoint to go on from.
func (p ResumePoint) Nothing() bool { return p.Sequence == 0 }

func (p ResumePoint) validate() error {
	switch {
	case p.Nothing() && (p.From != "" || p.Digest != "" || p.Record != ""):
		return errors.New("a point with no sequence number names a checkpoint")
	case !p.Nothing() && (p.From == "" || p.Digest.Bytes() == nil || p.Record.Bytes() == nil):
		return errors.New("a point with a sequence number names no checkpoint")
	}
	return nil
}

// VerifyResumePoint checks a broker's answer to one challenge for one job, plan
// and asset. Everything that it refuses is a *check.Refusal at stage "resume".
func VerifyResumePoint(keys Keys, token, job string, p plan.Digest, asset string, challenge []byte) (ResumePoint, error) {
	var r ResumePoint
	var l check.List
	if len(challenge) != ChallengeSize || job == "" || p.Bytes() == nil || asset == "" {
		return ResumePoint{}, errors.New("verify resume point: expectation is incomplete")
	}
	if err := keys.Open(TypeResumePoint, token, &r); err != nil {
		l.Fail("resume.signature", "a resume point signed by "+keys.issuer, err.Error(), "ask the broker again")
		return ResumePoint{}, check.Refuse("resume", l)
	}
	l.Equal("resume.job", job, r.JobID, "the point was given to another job")
	l.Equal("resume.plan", string(p), string(r.Plan), "the line of checkpoints is another plan's")
	l.Equal("resume.asset", asset, r.Asset, "the line of checkpoints is another asset's")
	if !bytes.Equal(challenge, r.Challenge) {
		l.Fail("resume.challenge", hex.EncodeToString(challenge), hex.EncodeToString(r.Challenge[:min(len(r.Challenge), ChallengeSize)]), "an earlier answer could lead back to an older checkpoint")
	}
	if err := r.validate(); err != nil {
		l.Fail("resume.form", "a resume point as attest/receipt describes it", err.Error(), "use a broker of the same version")
	}
	if len(l.Failed()) > 0 {
		return ResumePoint{}, check.Refuse("resume", l)
	}
	return r, nil
}

// SignedCheckpoint is what lies beside a sealed checkpoint: its record, the
// session key's signature over it, and that key (PKIX DER). Whose key it is, the
// job's evidence says.
type SignedCheckpoint struct {
	Record     []byte `json:"record"`
	Signature  []byte `json:"signature"`
	SessionKey []byte `json:"sessionKey"`
}

// MaxSignedCheckpoint bounds an encoded SignedCheckpoint, in bytes: base64 makes a
// record longer by a third.
const MaxSignedCheckpoint = 2 * MaxCheckpointRecord

// ParseSignedCheckpoint reads a SignedCheckpoint and checks its signature by the
// key in it.
func ParseSignedCheckpoint(b []byte) (SignedCheckpoint, CheckpointRecord, error) {
	var s SignedCheckpoint
	if err := plan.Decode(b, MaxSignedCheckpoint, &s); err != nil {
		return SignedCheckpoint{}, CheckpointRecord{}, fmt.Errorf("parse signed checkpoint: %w", err)
	}
	k, err := x509.ParsePKIXPublicKey(s.SessionKey)
	if err != nil {
		return SignedCheckpoint{}, CheckpointRecord{}, fmt.Errorf("parse signed checkpoint: session key: %w", err)
	}
	session, _ := k.(*ecdsa.PublicKey)
	if session == nil || session.Curve != elliptic.P256() {
		return SignedCheckpoint{}, CheckpointRecord{}, errors.New("parse signed checkpoint: the session key is not on P-256")
	}
	r, err := ParseCheckpointRecord(session, s.Record, s.Signature)
	if err != nil {
		return SignedCheckpoint{}, CheckpointRecord{}, err
	}
	return s, r, nil
}
