package seal

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/keys"
)

// RecordVersion is the only checkpoint record version there is.
const RecordVersion = "coffer.run/checkpoint/v1"

// Record is what the job's session key signs about one checkpoint.
type Record struct {
	Version  string      `json:"version"`
	JobID    string      `json:"jobId"`
	Plan     plan.Digest `json:"plan"`
	Asset    string      `json:"asset"`
	Sequence uint64      `json:"sequence"`
	Name     string      `json:"name"`
	// Digest is that of the sealed manifest, Parent that of the commit before
	// this one, empty for the first.
	Digest   plan.Digest `json:"digest"`
	Parent   plan.Digest `json:"parent,omitempty"`
	Bytes    int64       `json:"bytes"`
	UnixNano int64       `json:"unixNano"`
}

func (r Record) validate() error {
	switch {
	case r.Version != RecordVersion:
		return fmt.Errorf("checkpoint record version %.40q: want %q", r.Version, RecordVersion)
	case r.JobID == "" || r.Asset == "" || r.Name == "":
		return errors.New("checkpoint record is incomplete")
	case r.Plan.Bytes() == nil || r.Digest.Bytes() == nil:
		return errors.New("checkpoint record names no plan or digest")
	case r.Sequence == 0:
		return errors.New("checkpoint record has no sequence number")
	case (r.Sequence == 1) != (r.Parent == "") || (r.Parent != "" && r.Parent.Bytes() == nil):
		return errors.New("checkpoint record: the first has no parent and every other has one")
	case r.Bytes < 0 || r.UnixNano <= 0:
		return errors.New("checkpoint record: size or time is missing")
	}
	return nil
}

// ParseRecord reads a canonical checkpoint record.
func ParseRecord(b []byte) (Record, error) {
	var r Record
	if err := plan.Decode(b, keys.MaxRecord, &r); err != nil {
		return Record{}, fmt.Errorf("parse checkpoint record: %w", err)
	}
	if err := r.validate(); err != nil {
		return Record{}, err
	}
	c, err := plan.Canonical(r)
	if err != nil {
		return Record{}, err
	}
	if !bytes.Equal(b, c) {
		return Record{}, errors.New("parse checkpoint record: not in canonical form (RFC 8785)")
	}
	return r, nil
}

// SignedRecord is what RecordName holds.
type SignedRecord struct {
	Record    []byte `json:"record"`
	Signature []byte `json:"signature"`
	// SessionKey is the public key that signed, PKIX DER. Whether it is the
	// job's is for the job's evidence to say.
	SessionKey []byte `json:"sessionKey"`
}

// Checkpoint is one commit.
type Checkpoint struct {
	Record    Record
	Encoded   []byte
	Signature []byte
}

// Commit says what is being committed.
type Commit struct {
	JobID    string
	Plan     plan.Digest
	Asset    string
	Sequence uint64
	Parent   plan.Digest
	// Name is the job's name for the checkpoint, Folder the name in the sink.
	Name   string
	Folder string
}

// SealCheckpoint seals the sources into the sink as c.Folder: all of them or
// none. When it returns without an error the folder, with its signed record, is
// durable. The plaintext is not digested: the digest of the ciphertext, with the
// key that its headers commit to, names it, and a job waits while it is sealed.
func SealCheckpoint(ctx context.Context, key *keys.DataKey, session *keys.Session, sources []Source, sink *os.Root, c Commit, now func() time.Time, o Options) (Checkpoint, error) {
	var out Checkpoint
	o.noPlainRoots = true
	o.direct = cmp.Or(o.direct, directMin)
	_, err := sealInto(ctx, key, c.Asset, sources, sink, c.Folder, o, func(tmp *os.Root, s Sealed) error {
		r := Record{Version: RecordVersion, JobID: c.JobID, Plan: c.Plan, Asset: c.Asset, Sequence: c.Sequence, Name: c.Name,
			Digest: s.Digest, Parent: c.Parent, Bytes: s.Bytes, UnixNano: now().UnixNano()}
		if err := r.validate(); err != nil {
			return err
		}
		b, err := plan.Canonical(r)
		if err != nil {
			return err
		}
		sig, err := session.SignCheckpoint(b)
		if err != nil {
			return err
		}
		f, err := plan.Canonical(SignedRecord{Record: b, Signature: sig, SessionKey: session.Public()})
		if err != nil {
			return err
		}
		// Canonical JSON carries numbers as doubles (RFC 8785, section 3.2.2.3), so
		// the time in the record is what it reads back as.
		if r, err = ParseRecord(b); err != nil {
			return err
		}
		out = Checkpoint{Record: r, Encoded: b, Signature: sig}
		return writeNew(tmp, RecordName, f)
	})
	if err != nil {
		return Checkpoint{}, err
	}
	return out, nil
}
