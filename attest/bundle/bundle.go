// Package bundle is the record of one job in one file, and its builder: what was
// asked for, what ran, what the evidence said, who judged it, which keys were
// released and what came out.
//
// Trusted: nothing. Checked here: form, sizes, and that a file is the only
// encoding of what it says. Whether the record is true is for
// attest/bundle/verify, which the builder's users do not link.
//
// The file is canonical JSON (RFC 8785); docs/formats/bundle.md describes it.
package bundle

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/translog"
)

const (
	// Version is the only bundle version there is.
	Version = "coffer.run/bundle/v1"
	// StatementVersion is the only statement version there is.
	StatementVersion = "coffer.run/bundle-statement/v1"
)

const (
	// MaxSize bounds a bundle, in bytes.
	MaxSize = 64 << 20
	// MaxStatement bounds a statement, in bytes.
	MaxStatement = 128 << 10
	// MaxPart bounds one part, in bytes.
	MaxPart = 8 << 20
)

// Part names what one part of a bundle is.
type Part string

// The parts there are. A bundle with any other is refused.
const (
	// JobFile is the job file, with digests in place of environment values.
	JobFile Part = "job-file"
	// Plan is the canonical plan (attest/plan).
	Plan Part = "plan"
	// Sandbox is the canonical sandbox description (attest/plan).
	Sandbox Part = "sandbox"
	// Evidence is the envelope that was appraised (attest/evidence).
	Evidence Part = "evidence"
	// Result is the signed attestation result (attest/receipt).
	Result Part = "result"
	// Endorsements are those that the appraisal used besides the evidence's own
	// (endorse.Encode).
	Endorsements Part = "endorsements"
	// VerifierKeys and BrokerKeys are JSON Web Key Sets.
	VerifierKeys Part = "verifier-keys"
	BrokerKeys   Part = "broker-keys"
	// Releases is a JSON list of release receipts, in the order of release.
	Releases Part = "releases"
	// Approvals is a JSON list of Approved, one for each grant of Releases, in the
	// order in which they were first used.
	Approvals Part = "approvals"
	// Checkpoints is a JSON list of Checkpoint, in the order of commit.
	Checkpoints Part = "checkpoints"
	// ResumePart is a Resume: what the job went on from.
	ResumePart Part = "resume"
	// HolderStatus is the holder's last Status.
	HolderStatus Part = "holder-status"
	// Trace is a JSON list of Event.
	Trace Part = "trace"
	// AgentPart is an Agent: what ran.
	AgentPart Part = "agent"
	// LogsDigest is a Logs: what the job printed, without the words.
	LogsDigest Part = "logs-digest"
)

// Parts lists every part there is.
func Parts() []Part {
	return []Part{JobFile, Plan, Sandbox, Evidence, Result, Endorsements, VerifierKeys, BrokerKeys, Releases, Approvals, Checkpoints, ResumePart, HolderStatus, Trace, AgentPart, LogsDigest, EgressPart, AlertsPart, ImageSignaturePart, ImageSBOMPart, ResealPart, ReattestPart}
}

// Stage names one step of a job's way.
type Stage string

// The stages, in order.
const (
	StageJobspec Stage = "jobspec"
	StageAdmit   Stage = "admit"
	// StageApproval is there only if the job waited for people.
	StageApproval   Stage = "approval"
	StageSandbox    Stage = "sandbox"
	StageCollect    Stage = "collect"
	StageVerify     Stage = "verify"
	StageRelease    Stage = "release"
	StageDecrypt    Stage = "decrypt"
	StageStart      Stage = "start"
	StageRun        Stage = "run"
	StageCheckpoint Stage = "checkpoint"
	StageEvidence   Stage = "evidence"
)

// Stages lists every stage in order.
func Stages() []Stage {
	return []Stage{StageJobspec, StageAdmit, StageApproval, StageSandbox, StageCollect, StageVerify, StageRelease, StageDecrypt, StageStart, StageRun, StageCheckpoint, StageReseal, StageEvidence}
}

// State is how a job ended.
type State string

// The states in which a job can have ended.
const (
	Succeeded State = "succeeded"
	Failed    State = "failed"
	Refused   State = "refused"
	Cancelled State = "cancelled"
)

// Outcome is how and where a job ended.
type Outcome struct {
	State    State `json:"state"`
	ExitCode int   `json:"exitCode"`
	// Stage is the one in which the job ended; for a job that succeeded, the last.
	Stage Stage `json:"stage"`
	// Reason is a stable reason code, empty if the job succeeded.
	Reason string `json:"reason"`
	// Checks are the failed checks of a refusal.
	Checks check.List `json:"checks,omitempty"`
	// Stop is there if the job's keys were taken back, its lease lapsed or it did not
	// attest: Reason is then ReasonRevoked, ReasonLapsed, ReasonReattestRefused or
	// ReasonReattestLate.
	Stop *Stop `json:"stop,omitempty"`
}

// Reasons of jobs that have a Stop.
const (
	ReasonRevoked = "revoked"
	ReasonLapsed  = "lease-lapsed"
)

// Stop says how a job was ended that lost its lease. Times are the node's, in
// nanoseconds since 1970; 0 is for what did not happen: a job is told by a running
// agent only.
type Stop struct {
	// By is what was taken back and why, in the broker's words, or why no renewal
	// came.
	By string `json:"by"`
	// ToldUnixNano is when the job was told to stop, GoneUnixNano when its last
	// process was gone, and ScrubbedUnixNano when its memory read back as zero.
	ToldUnixNano     int64 `json:"toldUnixNano"`
	GoneUnixNano     int64 `json:"goneUnixNano"`
	ScrubbedUnixNano int64 `json:"scrubbedUnixNano"`
}

// Step is one stage as it went.
type Step struct {
	Stage         Stage `json:"stage"`
	StartUnixNano int64 `json:"startUnixNano"`
	Nanos         int64 `json:"nanos"`
	// Outcome is "done" or "failed".
	Outcome string `json:"outcome"`
}

// Outcomes of a step.
const (
	StepDone   = "done"
	StepFailed = "failed"
)

// Statement is what the job's session key signs.
type Statement struct {
	Version    string               `json:"version"`
	JobID      string               `json:"jobId"`
	PlanDigest plan.Digest          `json:"planDigest"`
	Parts      map[Part]plan.Digest `json:"parts"`
	Outcome    Outcome              `json:"outcome"`
	Timeline   []Step               `json:"timeline"`
}

// Log is where the evidence log has the statement's digest.
type Log struct {
	// Receipt is the broker's signed answer to logging the digest.
	Receipt string `json:"receipt"`
	// Entries are the log's entries for the job.
	Entries []translog.Entry `json:"entries"`
	// Checkpoint is a signed checkpoint of the log's Merkle tree with the
	// cosignatures that it had (C2SP tlog-checkpoint). It is absent if none had
	// the entries yet.
	Checkpoint []byte `json:"checkpoint,omitempty"`
	// Proofs has the inclusion proof of each of Entries under Checkpoint.
	Proofs [][][]byte `json:"proofs,omitempty"`
}

// Bundle is a parsed bundle. Nothing in it is verified.
type Bundle struct {
	Version   string          `json:"version"`
	Statement []byte          `json:"statement"`
	Signature []byte          `json:"signature,omitempty"`
	Parts     map[Part][]byte `json:"parts"`
	Log       *Log            `json:"log,omitempty"`
}

// StatementLabel separates a statement's signature from every other by the
// session key.
const StatementLabel = "coffer/v1 statement"

// SignedDigest is what the session key signs: SHA-256 of label, a zero byte and body.
func SignedDigest(label string, body []byte) [sha256.Size]byte {
	b := make([]byte, 0, len(label)+1+len(body))
	b = append(b, label...)
	b = append(b, 0)
	return sha256.Sum256(append(b, body...))
}

// Parse reads a bundle. One record has one encoding: anything but the canonical
// form is an error, so that no two readers can see different things in one file.
func Parse(b []byte) (*Bundle, error) {
	var out Bundle
	if err := plan.Decode(b, MaxSize, &out); err != nil {
		return nil, fmt.Errorf("parse bundle: %w", err)
	}
	if out.Version != Version {
		return nil, fmt.Errorf("parse bundle: version %.40q: want %q", out.Version, Version)
	}
	if len(out.Statement) > MaxStatement {
		return nil, fmt.Errorf("parse bundle: statement has %d bytes, at most %d are allowed", len(out.Statement), MaxStatement)
	}
	for name, p := range out.Parts {
		if len(p) > MaxPart {
			return nil, fmt.Errorf("parse bundle: part %.40q has %d bytes, at most %d are allowed", string(name), len(p), MaxPart)
		}
	}
	c, err := plan.Canonical(out)
	if err != nil {
		return nil, fmt.Errorf("parse bundle: %w", err)
	}
	if !bytes.Equal(b, c) {
		return nil, errors.New("parse bundle: not in canonical form (RFC 8785)")
	}
	return &out, nil
}

// WithLog returns the bundle with the evidence log's word on it, in place of the one that
// it has.
func (b *Bundle) WithLog(l Log) ([]byte, error) {
	out := *b
	out.Log = &l
	enc, err := plan.Canonical(out)
	if err != nil {
		return nil, fmt.Errorf("add the log's word: %w", err)
	}
	if len(enc) > MaxSize {
		return nil, fmt.Errorf("add the log's word: %d bytes, at most %d are allowed", len(enc), MaxSize)
	}
	return enc, nil
}

// WithProofs returns the bundle with a checkpoint of the log and inclusion proofs
// in place of those that it has. The statement does not cover them, so that they
// can be added when the log has published them.
func (b *Bundle) WithProofs(p translog.Proofs) ([]byte, error) {
	if b.Log == nil {
		return nil, errors.New("add proofs: the bundle was not logged")
	}
	if len(p.Checkpoint) == 0 || len(p.Hashes) != len(b.Log.Entries) {
		return nil, fmt.Errorf("add proofs: %d for %d entries", len(p.Hashes), len(b.Log.Entries))
	}
	out, logged := *b, *b.Log
	logged.Checkpoint, logged.Proofs = p.Checkpoint, p.Hashes
	out.Log = &logged
	enc, err := plan.Canonical(out)
	if err != nil {
		return nil, fmt.Errorf("add proofs: %w", err)
	}
	if len(enc) > MaxSize {
		return nil, fmt.Errorf("add proofs: %d bytes, at most %d are allowed", len(enc), MaxSize)
	}
	return enc, nil
}

// ParseStatement reads a canonical statement.
func ParseStatement(b []byte) (Statement, error) {
	var s Statement
	if err := plan.Decode(b, MaxStatement, &s); err != nil {
		return Statement{}, fmt.Errorf("parse statement: %w", err)
	}
	c, err := s.canonical()
	if err != nil {
		return Statement{}, fmt.Errorf("parse statement: %w", err)
	}
	if !bytes.Equal(b, c) {
		return Statement{}, errors.New("parse statement: not in canonical form (RFC 8785)")
	}
	return s, nil
}

func (s Statement) canonical() ([]byte, error) {
	switch {
	case s.Version != StatementVersion:
		return nil, fmt.Errorf("statement version %.40q: want %q", s.Version, StatementVersion)
	case s.JobID == "":
		return nil, errors.New("statement names no job")
	case s.PlanDigest.Bytes() == nil:
		return nil, errors.New("statement names no plan digest")
	case !slices.Contains([]State{Succeeded, Failed, Refused, Cancelled}, s.Outcome.State):
		return nil, fmt.Errorf("statement with the unknown outcome %.40q", string(s.Outcome.State))
	case !slices.Contains(Stages(), s.Outcome.Stage):
		return nil, fmt.Errorf("statement with the unknown stage %.40q", string(s.Outcome.Stage))
	case len(s.Timeline) == 0:
		return nil, errors.New("statement has no timeline")
	case len(s.Timeline) > len(Stages()):
		return nil, errors.New("statement has more steps than there are stages")
	}
	for _, step := range s.Timeline {
		if !slices.Contains(Stages(), step.Stage) {
			return nil, fmt.Errorf("statement with the unknown stage %.40q", string(step.Stage))
		}
		if step.Outcome != StepDone && step.Outcome != StepFailed {
			return nil, fmt.Errorf("stage %s has the unknown outcome %.40q", step.Stage, step.Outcome)
		}
	}
	for name, d := range s.Parts {
		if !slices.Contains(Parts(), name) {
			return nil, fmt.Errorf("statement with the unknown part %.40q", string(name))
		}
		if d.Bytes() == nil {
			return nil, fmt.Errorf("statement has no digest of part %s", name)
		}
	}
	b, err := plan.Canonical(s)
	if err != nil {
		return nil, err
	}
	if len(b) > MaxStatement {
		return nil, fmt.Errorf("statement has %d bytes, at most %d are allowed", len(b), MaxStatement)
	}
	return b, nil
}

// Builder puts a bundle together: parts first, then the statement over them,
// then the signature and the log's receipt. Its user owns it; it is not safe for
// concurrent use.
type Builder struct {
	parts     map[Part][]byte
	statement []byte
}

// NewBuilder returns an empty builder.
func NewBuilder() *Builder {
	return &Builder{parts: map[Part][]byte{}}
}

// Add adds one part. Each part can be added once, before the statement is made.
func (b *Builder) Add(name Part, body []byte) error {
	switch {
	case b.statement != nil:
		return fmt.Errorf("add part %s: the statement is made already", name)
	case !slices.Contains(Parts(), name):
		return fmt.Errorf("add part %.40q: there is no such part", string(name))
	case len(body) > MaxPart:
		return fmt.Errorf("add part %s: %d bytes, at most %d are allowed", name, len(body), MaxPart)
	}
	if _, ok := b.parts[name]; ok {
		return fmt.Errorf("add part %s: added already", name)
	}
	b.parts[name] = bytes.Clone(body)
	return nil
}

// AddJSON adds one part in canonical JSON.
func (b *Builder) AddJSON(name Part, v any) error {
	body, err := plan.Canonical(v)
	if err != nil {
		return fmt.Errorf("add part %s: %w", name, err)
	}
	return b.Add(name, body)
}

// Statement returns the canonical statement over the parts added so far. These
// are the bytes for the holder to sign and whose digest is logged.
func (b *Builder) Statement(jobID string, planDigest plan.Digest, outcome Outcome, timeline []Step) ([]byte, error) {
	if b.statement != nil {
		return nil, errors.New("make statement: made already")
	}
	s := Statement{
		Version: StatementVersion, JobID: jobID, PlanDigest: planDigest,
		Parts: map[Part]plan.Digest{}, Outcome: outcome, Timeline: timeline,
	}
	for name, body := range maps.All(b.parts) {
		s.Parts[name] = plan.Sum(body)
	}
	c, err := s.canonical()
	if err != nil {
		return nil, fmt.Errorf("make statement: %w", err)
	}
	b.statement = c
	return bytes.Clone(c), nil
}

// Finish returns the bundle. signature is empty only where the job ended before
// it had a session key; log is nil only where the log could not be reached.
func (b *Builder) Finish(signature []byte, log *Log) ([]byte, error) {
	if b.statement == nil {
		return nil, errors.New("finish bundle: no statement is made")
	}
	out, err := plan.Canonical(Bundle{Version: Version, Statement: b.statement, Signature: signature, Parts: b.parts, Log: log})
	if err != nil {
		return nil, fmt.Errorf("finish bundle: %w", err)
	}
	if len(out) > MaxSize {
		return nil, fmt.Errorf("finish bundle: %d bytes, at most %d are allowed", len(out), MaxSize)
	}
	return out, nil
}
