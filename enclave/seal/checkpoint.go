package seal

import (
	"cmp"
	"context"
	"os"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/keys"
)

// Checkpoint is one commit.
type Checkpoint struct {
	Record    receipt.CheckpointRecord
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
		b, err := receipt.CheckpointRecord{Version: receipt.CheckpointVersion, JobID: c.JobID, Plan: c.Plan, Asset: c.Asset, Sequence: c.Sequence, Name: c.Name,
			Digest: s.Digest, Parent: c.Parent, Bytes: s.Bytes, UnixNano: now().UnixNano()}.Canonical()
		if err != nil {
			return err
		}
		sig, err := session.SignCheckpoint(b)
		if err != nil {
			return err
		}
		f, err := plan.Canonical(receipt.SignedCheckpoint{Record: b, Signature: sig, SessionKey: session.Public()})
		if err != nil {
			return err
		}
		// Canonical JSON carries numbers as doubles (RFC 8785, section 3.2.2.3), so
		// the time in the record is what it reads back as.
		r, err := receipt.DecodeCheckpointRecord(b)
		if err != nil {
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
