// Package statement says what a verification found in formats that other tools
// read: in-toto statements with SLSA provenance, a verification summary or a
// predicate of our own, and a CycloneDX ML-BOM. docs/formats/statements.md describes
// them.
//
// Trusted: the verification (attest/bundle/verify) that it is given. Checked: only
// that it verified. What checks stand behind is kept apart from what the record
// merely declares. Statements say nothing that the bundle does not: whoever doubts
// one verifies the bundle, which each names by its digest.
package statement

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/secure-systems-lab/go-securesystemslib/dsse"
	"golang.org/x/crypto/ssh"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
)

// Types of statements and predicates.
const (
	// Type is in-toto's (in-toto attestation framework, statement, version 1).
	Type = "https://in-toto.io/Statement/v1"
	// PayloadType is that of an in-toto statement in a DSSE envelope.
	PayloadType = "application/vnd.in-toto+json"
	// SummaryType is SLSA's verification summary, version 1.
	SummaryType = "https://slsa.dev/verification_summary/v1"
	// ProvenanceType is SLSA's provenance, version 1.
	ProvenanceType = "https://slsa.dev/provenance/v1"
	// TrainingType is our own.
	TrainingType = "https://coffer.run/training-run/v1"
	// BuildType is the kind of build that a training job is to SLSA.
	BuildType = "https://coffer.run/training-job/v1"
)

// Builders, as SLSA's provenance names who built. Devices that a simulation plays
// are another builder, so that who trusts the one does not trust the other.
const (
	BuilderAttested  = "https://coffer.run/builder/attested/v1"
	BuilderSimulated = "https://coffer.run/builder/simulated/v1"
)

// Levels of a verification summary: none of them is one of SLSA's own.
const (
	LevelAttested  = "COFFER_ATTESTED"
	LevelSimulated = "COFFER_SIMULATED"
	LevelFailed    = "FAILED"
)

// Format is what can be written.
type Format string

// The formats.
const (
	Summary    Format = "vsa"
	Provenance Format = "slsa"
	Training   Format = "training"
	CycloneDX  Format = "cyclonedx"
)

// Formats lists every format.
func Formats() []Format { return []Format{Summary, Provenance, Training, CycloneDX} }

// ErrUnverified is that there is nothing to state of a bundle that does not verify.
var ErrUnverified = errors.New("the bundle does not verify: there is nothing to state of it but a vsa")

// Digests is an in-toto DigestSet.
type Digests map[string]string

// Resource is an in-toto ResourceDescriptor, as far as it is used here.
type Resource struct {
	Name        string         `json:"name,omitempty"`
	URI         string         `json:"uri,omitempty"`
	Digest      Digests        `json:"digest,omitempty"`
	Annotations map[string]any `json:"annotations,omitempty"`
}

// Statement is an in-toto statement.
type Statement struct {
	Type          string     `json:"_type"`
	Subject       []Resource `json:"subject"`
	PredicateType string     `json:"predicateType"`
	Predicate     any        `json:"predicate"`
}

// Input is what a statement is made of.
type Input struct {
	// Report is what came of verifying File.
	Report verify.Report
	File   []byte
	// Now is when it was verified.
	Now time.Time
	// Verifier names the program that verified, Version its build.
	Verifier, Version string
}

// Write returns the canonical JSON (RFC 8785) of a statement, or a CycloneDX
// document. Of a bundle that does not verify only a summary is made, which says so;
// for all else the error is ErrUnverified.
func Write(f Format, in Input) ([]byte, error) {
	if f == Summary {
		return plan.Canonical(summary(in))
	}
	if in.Report.Verdict != verify.Verified {
		return nil, ErrUnverified
	}
	r, err := read(in)
	if err != nil {
		return nil, err
	}
	switch f {
	case Provenance:
		return plan.Canonical(r.statement(ProvenanceType, r.provenance()))
	case Training:
		return plan.Canonical(r.statement(TrainingType, r.training()))
	case CycloneDX:
		return r.bom()
	case Summary:
	}
	return nil, fmt.Errorf("format %.40q: want vsa, slsa, training or cyclonedx", string(f))
}

func sha384(b []byte) Digests {
	sum := sha512.Sum384(b)
	return Digests{"sha384": hex.EncodeToString(sum[:])}
}

// digests is the DigestSet of a digest that is written "sha384:..." or "sha256:...".
func digests[T ~string](d T) Digests {
	name, digits, _ := strings.Cut(string(d), ":")
	return Digests{name: digits}
}

// reading is a verified bundle, read.
type reading struct {
	Input
	bundle      *bundle.Bundle
	plan        plan.Plan
	agent       bundle.Agent
	checkpoints []receipt.CheckpointRecord
	// sbom is the image's bill of materials, empty if the record has none, and
	// sbomSigner who signed it.
	sbom       bundle.SBOM
	sbomSigner string
	metrics    []bundle.Metric
}

func read(in Input) (*reading, error) {
	r := &reading{Input: in}
	var err error
	if r.bundle, err = bundle.Parse(in.File); err != nil {
		return nil, err
	}
	if r.plan, err = plan.Parse(r.bundle.Parts[bundle.Plan]); err != nil {
		return nil, err
	}
	if r.agent, err = bundle.Decode[bundle.Agent](r.bundle.Parts[bundle.AgentPart]); err != nil {
		return nil, err
	}
	if b, ok := r.bundle.Parts[bundle.ImageSBOMPart]; ok {
		s, err := bundle.Decode[bundle.ImageSBOM](b)
		if err != nil {
			return nil, err
		}
		if r.sbom, err = s.SBOM(); err != nil {
			return nil, err
		}
		r.sbomSigner = s.Signer
	}
	if b, ok := r.bundle.Parts[bundle.HolderStatus]; ok {
		s, err := bundle.Decode[bundle.Status](b)
		if err != nil {
			return nil, err
		}
		if s.Metrics != nil {
			r.metrics = s.Metrics.Values
		}
	}
	if b, ok := r.bundle.Parts[bundle.Checkpoints]; ok {
		list, err := bundle.Decode[[]bundle.Checkpoint](b)
		if err != nil {
			return nil, err
		}
		for _, c := range list {
			rec, err := receipt.DecodeCheckpointRecord(c.Record)
			if err != nil {
				return nil, err
			}
			r.checkpoints = append(r.checkpoints, rec)
		}
	}
	return r, nil
}

// statement is about the job's checkpoints, and its record, which every job has.
func (r *reading) statement(predicate string, body any) Statement {
	s := Statement{Type: Type, PredicateType: predicate, Predicate: body}
	for _, c := range r.checkpoints {
		s.Subject = append(s.Subject, Resource{Name: "checkpoint " + c.Name + ", sealed", Digest: digests(c.Digest)})
	}
	s.Subject = append(s.Subject, Resource{Name: "record of job " + r.Report.JobID, Digest: digests(r.Report.Statement)})
	return s
}

// provenance is SLSA's predicate. Its times are the agent's.
func (r *reading) provenance() map[string]any {
	builder := BuilderAttested
	if r.Report.Simulated {
		builder = BuilderSimulated
	}
	var parameters map[string]any
	// It parsed as a plan.
	_ = json.Unmarshal(r.bundle.Parts[bundle.Plan], &parameters)
	dependencies := []Resource{}
	if r.plan.Image != "" {
		dependencies = append(dependencies, Resource{Name: "image", Digest: digests(r.plan.Image)})
	}
	for _, i := range r.plan.Inputs {
		dependencies = append(dependencies, Resource{Name: "input " + i.Name + ", sealed", Digest: digests(i.Digest), Annotations: map[string]any{"asset": i.Asset}})
	}
	steps := r.Report.Timeline
	first, last := steps[0].StartUnixNano, steps[0].StartUnixNano
	for _, s := range steps {
		first, last = min(first, s.StartUnixNano), max(last, s.StartUnixNano+s.Nanos)
	}
	return map[string]any{
		"buildDefinition": map[string]any{
			"buildType":            BuildType,
			"externalParameters":   map[string]any{"plan": parameters},
			"internalParameters":   map[string]any{"policy": r.plan.Policy.Name, "sandbox": string(plan.Sum(r.bundle.Parts[bundle.Sandbox]))},
			"resolvedDependencies": dependencies,
		},
		"runDetails": map[string]any{
			"builder":  map[string]any{"id": builder},
			"metadata": map[string]any{"invocationId": r.Report.JobID, "startedOn": stamp(time.Unix(0, first)), "finishedOn": stamp(time.Unix(0, last))},
			"byproducts": []Resource{
				{Name: "record", Digest: digests(r.Report.Statement)},
				{Name: "evidence", Digest: sha384(r.bundle.Parts[bundle.Evidence])},
				{Name: "attestation result", Digest: sha384(r.bundle.Parts[bundle.Result])},
			},
		},
	}
}

// summary is SLSA's predicate about the bundle. What nobody can tell has not passed.
func summary(in Input) Statement {
	r := in.Report
	s := Statement{Type: Type, PredicateType: SummaryType, Subject: []Resource{{Name: "bundle", Digest: sha384(in.File)}}}
	if r.Statement != "" {
		s.Subject = append(s.Subject, Resource{Name: "record of job " + r.JobID, Digest: digests(r.Statement)})
	}
	result, level := "FAILED", LevelFailed
	if r.Verdict == verify.Verified {
		result, level = "PASSED", LevelAttested
		if r.Simulated {
			level = LevelSimulated
		}
	}
	policy := map[string]any{"uri": "coffer-plan:unknown"}
	if r.Plan != "" {
		policy = map[string]any{"uri": "coffer-plan:" + string(r.Plan), "digest": digests(r.Plan)}
	}
	s.Predicate = map[string]any{
		"verifier":           map[string]any{"id": in.Verifier},
		"timeVerified":       stamp(in.Now),
		"resourceUri":        "coffer-job:" + r.JobID,
		"policy":             policy,
		"inputAttestations":  []any{map[string]any{"uri": "coffer-bundle:" + r.JobID, "digest": sha384(in.File)}},
		"verificationResult": result,
		"verifiedLevels":     []string{level},
		"slsaVersion":        "1.0",
	}
	return s
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// Sign puts a statement into a DSSE envelope with one signature: ed25519, or ECDSA
// with SHA-256 (P-256) or SHA-384 (P-384). The key id is the SSH fingerprint.
func Sign(ctx context.Context, statement []byte, key crypto.Signer) ([]byte, error) {
	e, err := dsse.NewEnvelopeSigner(&signer{key})
	if err != nil {
		return nil, fmt.Errorf("sign statement: %w", err)
	}
	signed, err := e.SignPayload(ctx, PayloadType, statement)
	if err != nil {
		return nil, fmt.Errorf("sign statement: %w", err)
	}
	return json.Marshal(signed)
}

type signer struct{ key crypto.Signer }

// Sign implements dsse.Signer.
func (s *signer) Sign(_ context.Context, data []byte) ([]byte, error) {
	switch k := s.key.(type) {
	case ed25519.PrivateKey:
		return ed25519.Sign(k, data), nil
	case *ecdsa.PrivateKey:
		switch k.Curve {
		case elliptic.P256():
			sum := sha256.Sum256(data)
			return ecdsa.SignASN1(rand.Reader, k, sum[:])
		case elliptic.P384():
			sum := sha512.Sum384(data)
			return ecdsa.SignASN1(rand.Reader, k, sum[:])
		}
	}
	return nil, fmt.Errorf("a key of the kind %T: want ed25519, or ECDSA on P-256 or P-384", s.key)
}

// KeyID implements dsse.Signer.
func (s *signer) KeyID() (string, error) {
	p, err := ssh.NewPublicKey(s.key.Public())
	if err != nil {
		return "", err
	}
	return ssh.FingerprintSHA256(p), nil
}
