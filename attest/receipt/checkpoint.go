package receipt

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

const (
	// CheckpointVersion is the only checkpoint record version there is.
	CheckpointVersion = "coffer.run/checkpoint/v1"
	// MaxCheckpointRecord bounds an encoded checkpoint record, in bytes.
	MaxCheckpointRecord = 16 << 10
	// checkpointLabel and a zero byte stand before a record when the session key
	// signs it, so that no other thing it signs is a record.
	checkpointLabel = "coffer/v1 checkpoint"
)

// CheckpointRecord is what a job's session key signs about one checkpoint.
type CheckpointRecord struct {
	Version  string      `json:"version"`
	JobID    string      `json:"jobId"`
	Plan     plan.Digest `json:"plan"`
	Asset    string      `json:"asset"`
	Sequence uint64      `json:"sequence"`
	Name     string      `json:"name"`
	// Digest is that of the sealed manifest, Parent that of the commit before,
	// empty for the first.
	Digest   plan.Digest `json:"digest"`
	Parent   plan.Digest `json:"parent,omitempty"`
	Bytes    int64       `json:"bytes"`
	UnixNano int64       `json:"unixNano"`
}

// ParseCheckpointRecord reads a canonical record and checks the session key's
// signature over it: ECDSA P-256 over SHA-256, ASN.1.
func ParseCheckpointRecord(session *ecdsa.PublicKey, record, signature []byte) (CheckpointRecord, error) {
	var r CheckpointRecord
	if err := plan.Decode(record, MaxCheckpointRecord, &r); err != nil {
		return CheckpointRecord{}, fmt.Errorf("parse checkpoint record: %w", err)
	}
	c, err := plan.Canonical(r)
	switch {
	case err != nil:
		return CheckpointRecord{}, err
	case !bytes.Equal(c, record):
		return CheckpointRecord{}, errors.New("parse checkpoint record: not in canonical form (RFC 8785)")
	case r.Version != CheckpointVersion:
		return CheckpointRecord{}, fmt.Errorf("checkpoint record version %.40q: want %q", r.Version, CheckpointVersion)
	case r.JobID == "" || r.Asset == "" || r.Name == "" || r.Sequence == 0 || r.Plan.Bytes() == nil || r.Digest.Bytes() == nil:
		return CheckpointRecord{}, errors.New("checkpoint record is incomplete")
	case (r.Sequence == 1) != (r.Parent == ""), r.Parent != "" && r.Parent.Bytes() == nil:
		return CheckpointRecord{}, errors.New("checkpoint record: the first has no parent and every other has one")
	}
	sum := sha256.Sum256(append([]byte(checkpointLabel+"\x00"), record...))
	if session == nil || !ecdsa.VerifyASN1(session, sum[:], signature) {
		var l check.List
		l.Fail("checkpoint.session-key", "a record signed by the session key of the job", "another signature", "only the attested job itself can commit its checkpoints")
		return CheckpointRecord{}, check.Refuse("checkpoint", l)
	}
	return r, nil
}

// TypeCheckpointHead is the token type of checkpoint heads.
const TypeCheckpointHead = "checkpoint-head"

// CheckpointHead is the claims set by which a broker says which checkpoint of a
// job is the newest that it was shown.
type CheckpointHead struct {
	Issuer   string      `json:"iss"`
	IssuedAt int64       `json:"iat"`
	JobID    string      `json:"job"`
	Plan     plan.Digest `json:"plan"`
	Asset    string      `json:"asset"`
	Sequence uint64      `json:"sequence"`
	// Digest is that of the sealed manifest, Record that of the signed record.
	Digest plan.Digest `json:"digest"`
	Record plan.Digest `json:"record"`
	// LogIndex and LogHash are the entry of the evidence log that records this.
	LogIndex uint64 `json:"logIndex"`
	LogHash  []byte `json:"logHash"`
}
