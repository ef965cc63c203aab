// Package plan defines the canonical resolved job and its digest: what people
// approve, what grants name and what evidence binds.
package plan

import (
	"bytes"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"

	jsonv2 "github.com/go-json-experiment/json"
)

// Version is the only plan version there is.
const Version = "coffer.run/plan/v1"

// MaxSize bounds a canonical plan, in bytes.
const MaxSize = 256 << 10

// Digest is "sha384:" and 96 lower-case hex digits.
type Digest string

// ParseDigest checks the form of a digest.
func ParseDigest(s string) (Digest, error) {
	if Digest(s).Bytes() == nil {
		return "", fmt.Errorf("digest %.120q: want sha384: and 96 lower-case hex digits", s)
	}
	return Digest(s), nil
}

// Sum returns the digest of b.
func Sum(b []byte) Digest {
	h := sha512.Sum384(b)
	return Digest("sha384:" + hex.EncodeToString(h[:]))
}

// Bytes returns the 48 bytes of a well-formed digest, and nil for any other.
func (d Digest) Bytes() []byte {
	digits, ok := strings.CutPrefix(string(d), "sha384:")
	if !ok || len(digits) != 2*sha512.Size384 || strings.ContainsAny(digits, "ABCDEF") {
		return nil
	}
	b, err := hex.DecodeString(digits)
	if err != nil {
		return nil
	}
	return b
}

// Plan is a job with every name resolved to a digest. It holds no secret:
// environment values appear as digests only.
type Plan struct {
	Version string `json:"version"`
	Name    string `json:"name"`
	// Image is the digest of the OCI image manifest, "sha256:<hex>". It and Command
	// are absent where the job reseals.
	Image       string       `json:"image,omitempty"`
	Command     []string     `json:"command,omitempty"`
	Env         []Env        `json:"env,omitempty"`
	Inputs      []Input      `json:"inputs"`
	Checkpoints *Checkpoints `json:"checkpoints,omitempty"`
	// Reseal is there for a job without a container.
	Reseal *Reseal `json:"reseal,omitempty"`
	// Egress lists allowed destinations. Empty means no network device at all.
	Egress    []Egress  `json:"egress,omitempty"`
	Output    Output    `json:"output"`
	Resources Resources `json:"resources"`
	// Retry is absent where the job is tried once.
	Retry *Retry `json:"retry,omitempty"`
	// Reattest is absent where the job attests once.
	Reattest *Reattest `json:"reattest,omitempty"`
	// Gang is absent where the job begins alone.
	Gang *Gang `json:"gang,omitempty"`
	// Budget is absent where attempts are bounded by MaxSeconds and Retry alone.
	Budget *Budget `json:"budget,omitempty"`
	// Evidence is absent where the node keeps the record.
	Evidence *Retention `json:"evidence,omitempty"`
	// Policy is the attestation policy by which evidence is appraised.
	Policy Policy `json:"policy"`
	// SandboxProfile is the digest of the rules from which the sandbox is made:
	// runtime binaries and flags, trace points, mount and privilege rules.
	SandboxProfile Digest `json:"sandboxProfile"`
}

// Env is one environment variable. The value stays with the submitter and the job.
type Env struct {
	Name        string `json:"name"`
	ValueDigest Digest `json:"valueDigest"`
}

// Input is a sealed asset that appears, opened, under Mount.
type Input struct {
	Name  string `json:"name"`
	Asset string `json:"asset"`
	// Digest is that of the sealed manifest.
	Digest Digest `json:"digest"`
	Mount  string `json:"mount"`
	// Secret: it is one small file, at SecretsMount under its name.
	Secret bool `json:"secret,omitempty"`
}

// Checkpoints says under which asset's key the job's checkpoints are sealed.
type Checkpoints struct {
	Asset string `json:"asset"`
	Mount string `json:"mount"`
	// Resume is ResumeLatest, or the digest of the one checkpoint that the job goes
	// on from. Absent if it goes on from none.
	Resume string `json:"resume,omitempty"`
}

// Output bounds what the job may say to people, in bytes.
type Output struct {
	LogBytes int64 `json:"logBytes"`
	// LogBytesPerSecond is DefaultLogBytesPerSecond if absent.
	LogBytesPerSecond int64 `json:"logBytesPerSecond,omitempty"`
	// EgressBytes and EgressBytesPerSecond bound what the job sends to all
	// destinations together. Absent if there are none.
	EgressBytes          int64 `json:"egressBytes,omitempty"`
	EgressBytesPerSecond int64 `json:"egressBytesPerSecond,omitempty"`
	// EgressEvents is how many different refused connections are told by the name
	// that the job asked for. The job chooses the names, so they are output too.
	EgressEvents int64 `json:"egressEvents,omitempty"`
	// LogReaders says who may read what the job printed, besides its submitter:
	// ReadersOwners, ReadersEngineers, or, if absent, nobody.
	LogReaders string `json:"logReaders,omitempty"`
	// Metrics is absent where the job reports none.
	Metrics *Metrics `json:"metrics,omitempty"`
	// ExitCodes is ExitPassFail, or absent: then 8 bits leave.
	ExitCodes string `json:"exitCodes,omitempty"`
}

// Resources are limits, not requests.
type Resources struct {
	// CPUMillis is in thousandths of a core.
	CPUMillis   int64 `json:"cpuMillis"`
	MemoryBytes int64 `json:"memoryBytes"`
	Pids        int64 `json:"pids"`
	GPUs        int   `json:"gpus"`
	// CC is what the job asks of confidential computing on its GPUs: CCOn, CCRequired,
	// or, if absent, nothing besides what the attestation policy asks for.
	CC string `json:"cc,omitempty"`
	// MaxSeconds ends a job that runs longer.
	MaxSeconds int64 `json:"maxSeconds"`
	// StopSeconds is how long a job that is told to end may take for it, with its
	// keys, for a last checkpoint; DefaultStopSeconds if absent.
	StopSeconds int64 `json:"stopSeconds,omitempty"`
	// ShmBytes is the size of /dev/shm; Shm says what it is if absent.
	ShmBytes int64 `json:"shmBytes,omitempty"`
	// IO bounds the traffic with the node's disks. Absent if nothing does.
	IO IO `json:"io,omitzero"`
}

// Policy names an attestation policy and pins its content.
type Policy struct {
	Name   string `json:"name"`
	Digest Digest `json:"digest"`
}

// Canonical returns the plan in the JSON Canonicalization Scheme (RFC 8785);
// its SHA-384 is the plan digest, so that sha384sum of the stored plan shows it.
func (p Plan) Canonical() ([]byte, error) {
	if err := p.validate(); err != nil {
		return nil, err
	}
	return Canonical(p)
}

// Digest returns the SHA-384 of the canonical plan.
func (p Plan) Digest() (Digest, error) {
	b, err := p.Canonical()
	if err != nil {
		return "", err
	}
	return Sum(b), nil
}

// Parse reads a canonical plan. Bytes that are not exactly the canonical form
// of what they say are an error, so that one plan has one digest.
func Parse(b []byte) (Plan, error) {
	var p Plan
	if err := decodeOwn(b, MaxSize, &p); err != nil {
		return Plan{}, fmt.Errorf("parse plan: %w", err)
	}
	c, err := p.Canonical()
	if err != nil {
		return Plan{}, fmt.Errorf("parse plan: %w", err)
	}
	if !bytes.Equal(b, c) {
		return Plan{}, errors.New("parse plan: not in canonical form (RFC 8785)")
	}
	return p, nil
}

var imageForm = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

func (p Plan) validate() error {
	switch {
	case p.Version != Version:
		return fmt.Errorf("plan version %.40q: want %q", p.Version, Version)
	case p.Name == "":
		return errors.New("plan has no name")
	case p.Reseal == nil && !imageForm.MatchString(p.Image):
		return fmt.Errorf("plan image %.100q: want sha256: and 64 lower-case hex digits", p.Image)
	case p.Reseal == nil && len(p.Command) == 0:
		return errors.New("plan has no command")
	case p.Policy.Name == "" || p.Policy.Digest.Bytes() == nil:
		return errors.New("plan names no attestation policy by digest")
	case p.SandboxProfile.Bytes() == nil:
		return errors.New("plan names no sandbox profile by digest")
	case p.Resources.GPUs < 0 || p.Resources.CPUMillis <= 0 || p.Resources.MemoryBytes <= 0 || p.Resources.Pids <= 0 || p.Resources.MaxSeconds <= 0:
		return errors.New("plan resources must be positive")
	case p.Output.LogBytes <= 0:
		return errors.New("plan bounds no output")
	}
	if err := errors.Join(p.Output.validate(), p.Resources.validate(), p.Retry.validate(), p.Reattest.validate(), p.validateGang(), p.validateBudget(), p.validateKeeping(), p.validateEgress(), p.validateReseal()); err != nil {
		return err
	}
	for _, in := range p.Inputs {
		if in.Name == "" || in.Asset == "" || in.Mount == "" || in.Digest.Bytes() == nil {
			return fmt.Errorf("plan input %.80q is incomplete", in.Name)
		}
		if err := in.validateSecret(); err != nil {
			return err
		}
	}
	for _, e := range p.Env {
		if e.Name == "" || e.ValueDigest.Bytes() == nil {
			return fmt.Errorf("plan environment variable %.80q is incomplete", e.Name)
		}
	}
	return p.Checkpoints.validate()
}

// Canonical encodes v as JSON in the form of RFC 8785.
func Canonical(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	if b, err = canonical(b); err != nil {
		return nil, fmt.Errorf("canonicalize: %w", err)
	}
	return b, nil
}

// Decode reads one JSON value of at most limit bytes into v. Unknown fields,
// a second value and anything after it are errors.
func Decode(b []byte, limit int, v any) error {
	if len(b) > limit {
		return fmt.Errorf("%d bytes, at most %d are allowed", len(b), limit)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("data after the JSON value")
	}
	return nil
}

// decodeOwn is Decode of a document that programs write, where every appraisal
// reads one: this reader takes a third of the time, and is stricter than
// encoding/json, which takes a field given twice and one in other letters.
func decodeOwn(b []byte, limit int, v any) error {
	if len(b) > limit {
		return fmt.Errorf("%d bytes, at most %d are allowed", len(b), limit)
	}
	return jsonv2.Unmarshal(b, v, jsonv2.RejectUnknownMembers(true))
}
