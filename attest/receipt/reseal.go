package receipt

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

const (
	// ResealFileVersion and ResealVersion are the only versions of the two kinds of
	// re-sealing records.
	ResealFileVersion = "coffer.run/reseal-file/v1"
	ResealVersion     = "coffer.run/reseal/v1"
	// MaxResealRecord bounds an encoded record of either kind, in bytes.
	MaxResealRecord = 4 << 10
	// ResealLabel and a zero byte stand before a record when the session key signs
	// it, so that no other thing it signs is a record.
	ResealLabel = "coffer/v1 reseal"
)

// Resealing says what a re-sealing is of. Both kinds of records have it.
type Resealing struct {
	JobID string      `json:"jobId"`
	Plan  plan.Digest `json:"plan"`
	// From is the source asset and FromDigest that of its sealed manifest.
	From       string      `json:"from"`
	FromDigest plan.Digest `json:"fromDigest"`
	// To is the asset under whose key the files are sealed.
	To string `json:"to"`
}

func (r Resealing) complete() bool {
	return r.JobID != "" && r.Plan.Bytes() != nil && r.From != "" && r.FromDigest.Bytes() != nil && r.To != "" && r.To != r.From
}

// ResealFile is what a job's session key signs about one file: that the plaintext
// of the one ciphertext is that of the other. The plaintext's own digest is not in
// it: it would tell whoever guesses the plaintext that the guess is right.
type ResealFile struct {
	Version string `json:"version"`
	Resealing
	// SealedBy is the job that sealed the file. It is another one than JobID if that
	// went on with what an earlier job of the same plan had left.
	SealedBy string `json:"sealedBy"`
	// ID is the file's place in both manifests.
	ID string `json:"id"`
	// FromRoot and ToRoot are the Merkle roots of the two ciphertexts, "sha256:" and
	// 64 hex digits, as the manifests have them.
	FromRoot string `json:"fromRoot"`
	ToRoot   string `json:"toRoot"`
	// Bytes are those of the plaintext.
	Bytes int64 `json:"bytes"`
}

var (
	resealID   = regexp.MustCompile(`^[0-9]{6,}$`)
	resealRoot = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
)

func (r ResealFile) validate() error {
	switch {
	case r.Version != ResealFileVersion:
		return fmt.Errorf("re-sealing record of a file, version %.40q: want %q", r.Version, ResealFileVersion)
	case !r.complete() || r.SealedBy == "" || !resealID.MatchString(r.ID) || r.Bytes < 0:
		return errors.New("re-sealing record of a file is incomplete")
	case !resealRoot.MatchString(r.FromRoot) || !resealRoot.MatchString(r.ToRoot) || r.FromRoot == r.ToRoot:
		return errors.New("re-sealing record of a file names no two ciphertexts")
	}
	return nil
}

// Canonical returns the record as it is signed (RFC 8785).
func (r ResealFile) Canonical() ([]byte, error) {
	if err := r.validate(); err != nil {
		return nil, err
	}
	return plan.Canonical(r)
}

// ParseResealFile reads a canonical record. Who signed it is for the caller.
func ParseResealFile(b []byte) (ResealFile, error) { return parseReseal[ResealFile](b) }

// ResealRecord is what a job's session key signs once all files are sealed.
type ResealRecord struct {
	Version string `json:"version"`
	Resealing
	// Digest is that of the new sealed manifest.
	Digest plan.Digest `json:"digest"`
	Files  int         `json:"files"`
	// Bytes are those of the plaintext.
	Bytes int64 `json:"bytes"`
	// Records is ResealRecords of the files' records, in the order of their ids.
	Records plan.Digest `json:"records"`
}

func (r ResealRecord) validate() error {
	switch {
	case r.Version != ResealVersion:
		return fmt.Errorf("re-sealing record version %.40q: want %q", r.Version, ResealVersion)
	case !r.complete() || r.Digest.Bytes() == nil || r.Digest == r.FromDigest || r.Records.Bytes() == nil || r.Files <= 0 || r.Bytes < 0:
		return errors.New("re-sealing record is incomplete")
	}
	return nil
}

// Canonical returns the record as it is signed (RFC 8785).
func (r ResealRecord) Canonical() ([]byte, error) {
	if err := r.validate(); err != nil {
		return nil, err
	}
	return plan.Canonical(r)
}

// ParseResealRecord reads a canonical record. Who signed it is for the caller.
func ParseResealRecord(b []byte) (ResealRecord, error) { return parseReseal[ResealRecord](b) }

func parseReseal[T interface{ Canonical() ([]byte, error) }](b []byte) (T, error) {
	var r, zero T
	if err := plan.Decode(b, MaxResealRecord, &r); err != nil {
		return zero, fmt.Errorf("parse re-sealing record: %w", err)
	}
	c, err := r.Canonical()
	if err != nil {
		return zero, fmt.Errorf("parse re-sealing record: %w", err)
	}
	if !bytes.Equal(b, c) {
		return zero, errors.New("parse re-sealing record: not in canonical form (RFC 8785)")
	}
	return r, nil
}

// VerifyReseal checks the session key's signature over a record of either kind:
// ECDSA P-256 over SHA-256 of ResealLabel, a zero byte and the record, ASN.1.
func VerifyReseal(session *ecdsa.PublicKey, record, signature []byte) error {
	sum := sha256.Sum256(append([]byte(ResealLabel+"\x00"), record...))
	if session == nil || !ecdsa.VerifyASN1(session, sum[:], signature) {
		var l check.List
		l.Fail("reseal.session-key", "a record signed by the session key of the job", "another signature", "only the attested job itself can say what it sealed")
		return check.Refuse("reseal", l)
	}
	return nil
}

// ResealRecords digests a list of files' records: the SHA-384 of their SHA-384s,
// one after the other.
func ResealRecords(records [][]byte) plan.Digest {
	h := sha512.New384()
	for _, r := range records {
		sum := sha512.Sum384(r)
		_, _ = h.Write(sum[:]) // a hash does not fail
	}
	return plan.Digest("sha384:" + hex.EncodeToString(h.Sum(nil)))
}

// TypeResealed is the token type of a broker's word on a re-sealing.
const TypeResealed = "resealed"

// Resealed is the claims set by which a broker says that it has set the digest of
// an asset to what a job sealed.
type Resealed struct {
	Issuer   string      `json:"iss"`
	IssuedAt int64       `json:"iat"`
	JobID    string      `json:"job"`
	Plan     plan.Digest `json:"plan"`
	Asset    string      `json:"asset"`
	// Digest is that of the sealed manifest, Record that of the signed record.
	Digest plan.Digest `json:"digest"`
	Record plan.Digest `json:"record"`
	// LogIndex and LogHash are the entry of the evidence log that records this.
	LogIndex uint64 `json:"logIndex"`
	LogHash  []byte `json:"logHash"`
}

// VerifyResealed checks a broker's word on the record r, whose bytes are record.
func VerifyResealed(keys Keys, token string, record []byte, r ResealRecord) (Resealed, error) {
	var w Resealed
	var l check.List
	if err := keys.Open(TypeResealed, token, &w); err != nil {
		l.Fail("reseal.countersignature", "a record countersigned by the broker", err.Error(), "the broker has not set the asset's digest")
		return Resealed{}, check.Refuse("reseal", l)
	}
	l.Equal("reseal.countersigned-record", string(plan.Sum(record)), string(w.Record), "the broker countersigned another record")
	l.Equal("reseal.countersigned-job", r.JobID, w.JobID, "the broker countersigned another job's record")
	l.Equal("reseal.countersigned-plan", string(r.Plan), string(w.Plan), "the broker countersigned another plan's record")
	l.Equal("reseal.countersigned-asset", r.To, w.Asset, "the broker set another asset's digest")
	l.Equal("reseal.countersigned-digest", string(r.Digest), string(w.Digest), "the broker set another digest")
	if len(l.Failed()) > 0 {
		return Resealed{}, check.Refuse("reseal", l)
	}
	return w, nil
}
