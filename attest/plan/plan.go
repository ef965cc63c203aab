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

	"github.com/gowebpki/jcs"
)

// Version is the only plan version there is.
const Version = "coffer.run/plan/v1"

// MaxSize bounds a canonical plan, in bytes.
const MaxSize = 256 << 10

// Digest is "sha384:" and 96 lower-case hex digits.
type Digest string

var digestForm = regexp.MustCompile(`^sha384:[0-9a-f]{96}$`)

// ParseDigest checks the form of a digest.
func ParseDigest(s string) (Digest, error) {
	if !digestForm.MatchString(s) {
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
	if !digestForm.MatchString(string(d)) {
		return nil
	}
	b, err := hex.DecodeString(string(d[len("sha384:"):]))
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
	// Image is the digest of the OCI image manifest, "sha256:<hex>".
	Image       string       `json:"image"`
	Command     []string     `json:"command"`
	Env         []Env        `json:"env,omitempty"`
	Inputs      []Input      `json:"inputs"`
	Checkpoints *Checkpoints `json:"checkpoints,omitempty"`
	// Egress lists allowed destinations. Empty means no network device at all.
	Egress    []string  `json:"egress,omitempty"`
	Output    Output    `json:"output"`
	Resources Resources `json:"resources"`
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
}

// Checkpoints says under which asset's key the job's checkpoints are sealed.
type Checkpoints struct {
	Asset string `json:"asset"`
	Mount string `json:"mount"`
}

// Output bounds what the job may say to people, in bytes.
type Output struct {
	LogBytes int64 `json:"logBytes"`
}

// Resources are limits, not requests.
type Resources struct {
	// CPUMillis is in thousandths of a core.
	CPUMillis   int64 `json:"cpuMillis"`
	MemoryBytes int64 `json:"memoryBytes"`
	Pids        int64 `json:"pids"`
	GPUs        int   `json:"gpus"`
	// MaxSeconds ends a job that runs longer.
	MaxSeconds int64 `json:"maxSeconds"`
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
	if err := Decode(b, MaxSize, &p); err != nil {
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
	case !imageForm.MatchString(p.Image):
		return fmt.Errorf("plan image %.100q: want sha256: and 64 lower-case hex digits", p.Image)
	case len(p.Command) == 0:
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
	for _, in := range p.Inputs {
		if in.Name == "" || in.Asset == "" || in.Mount == "" || in.Digest.Bytes() == nil {
			return fmt.Errorf("plan input %.80q is incomplete", in.Name)
		}
	}
	for _, e := range p.Env {
		if e.Name == "" || e.ValueDigest.Bytes() == nil {
			return fmt.Errorf("plan environment variable %.80q is incomplete", e.Name)
		}
	}
	if c := p.Checkpoints; c != nil && (c.Asset == "" || c.Mount == "") {
		return errors.New("plan checkpoints are incomplete")
	}
	return nil
}

// Canonical encodes v as JSON in the form of RFC 8785.
func Canonical(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	c, err := jcs.Transform(b)
	if err != nil {
		return nil, fmt.Errorf("canonicalize: %w", err)
	}
	return c, nil
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
