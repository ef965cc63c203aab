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
	// CheckpointLabel and a zero byte stand before a record when the session key
	// signs it, so that no other thing it signs is a record.
	CheckpointLabel = "coffer/v1 checkpoint"
)

// CheckpointRecord is what a job's session key signs about one checkpoint
// (docs/formats/sealed.md, a checkpoint). The holder makes it; broker and verification
// read it.
type CheckpointRecord struct {
	Version  string      `json:"version"`
	JobID    string      `json:"jobId"`
	Plan     plan.Digest `json:"plan"`
	Asset    string      `json:"asset"`
	Sequence uint64      `json:"sequence"`
	Name     string      `json:"name"`
	// Digest is the SHA-384 of the sealed manifest, Parent that of the commit before,
	// empty for the first.
	Digest   plan.Digest `json:"digest"`
	Parent   plan.Digest `json:"parent,omitempty"`
	Bytes    int64       `json:"bytes"`
	UnixNano int64       `json:"unixNano"`
}

// Canonical checks the record's form and returns the bytes that are signed.
func (r CheckpointRecord) Canonical() ([]byte, error) {
	if err := r.validate(); err != nil {
		return nil, err
	}
	return plan.Canonical(r)
}

func (r CheckpointRecord) validate() error {
	switch {
	case r.Version != CheckpointVersion:
		return fmt.Errorf("checkpoint record version %.40q: want %q", r.Version, CheckpointVersion)
	case r.JobID == "" || r.Asset == "" || r.Name == "" || r.Sequence == 0 || r.Plan.Bytes() == nil || r.Digest.Bytes() == nil:
		return errors.New("checkpoint record is incomplete")
	case (r.Sequence == 1) != (r.Parent == ""), r.Parent != "" && r.Parent.Bytes() == nil:
		return errors.New("checkpoint record: the first has no parent and every other has one")
	case r.Bytes < 0 || r.UnixNano <= 0:
		return errors.New("checkpoint record: size or time is missing")
	}
	return nil
}

// DecodeCheckpointRecord reads a canonical record and checks its form; who signed it is
// for ParseCheckpointRecord, or for the caller.
func DecodeCheckpointRecord(record []byte) (CheckpointRecord, error) {
	var r CheckpointRecord
	if err := plan.Decode(record, MaxCheckpointRecord, &r); err != nil {
		return CheckpointRecord{}, fmt.Errorf("parse checkpoint record: %w", err)
	}
	c, err := r.Canonical()
	if err != nil {
		return CheckpointRecord{}, err
	}
	if !bytes.Equal(c, record) {
		return CheckpointRecord{}, errors.New("parse checkpoint record: not in canonical form (RFC 8785)")
	}
	return r, nil
}

// ParseCheckpointRecord reads a canonical record and checks the session key's
// signature over it: ECDSA P-256 over SHA-256, ASN.1.
func ParseCheckpointRecord(session *ecdsa.PublicKey, record, signature []byte) (CheckpointRecord, error) {
	r, err := DecodeCheckpointRecord(record)
	if err != nil {
		return CheckpointRecord{}, err
	}
	sum := sha256.Sum256(append([]byte(CheckpointLabel+"\x00"), record...))
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
