// Package evidence is the envelope in which an attester hands its evidence to a
// verifier: raw device output, and nothing that could be taken for a judgement.
//
// Trusted: nothing. Checked here: size, form and counts. Whether evidence is
// genuine is for attest/snp, attest/vtpm and attest/nvgpu; whether it is
// acceptable is for attest/policy.
package evidence

import (
	"errors"
	"fmt"
	"strconv"

	"github.com/go-json-experiment/json"

	"github.com/coffer-run/coffer/attest/binding"
	"github.com/coffer-run/coffer/attest/plan"
)

// Version is the only envelope version there is.
const Version = "coffer.run/evidence/v1"

const (
	// MaxSize bounds an encoded envelope, in bytes.
	MaxSize = 4 << 20
	// MaxGPUs bounds the GPUs of one envelope.
	MaxGPUs = 16
	// MaxPart bounds every single byte field but plan and sandbox, in bytes.
	MaxPart = 256 << 10
)

// Envelope is the evidence of one attempt of one job. Byte fields are base64 in
// JSON.
type Envelope struct {
	Version    string `json:"version"`
	VerifierID string `json:"verifierId"`
	Nonce      string `json:"nonce"`
	JobID      string `json:"jobId"`
	// Plan and Sandbox are the canonical documents whose digests are bound.
	Plan         []byte `json:"plan"`
	Sandbox      []byte `json:"sandbox"`
	RecipientKey []byte `json:"recipientKey"`
	SessionKey   []byte `json:"sessionKey"`

	TPM  *TPM  `json:"tpm,omitempty"`
	SNP  *SNP  `json:"snp,omitempty"`
	GPUs []GPU `json:"gpus,omitempty"`
	// Failures name what could not be collected. Where the policy asks for it,
	// a failure is a refusal like absence.
	Failures []Failure `json:"failures,omitempty"`
}

// TPM is a quote and what is needed to judge it.
type TPM struct {
	// AKPublic is TPMT_PUBLIC.
	AKPublic []byte `json:"akPublic"`
	// AKCredential is the verifier's JWT from enrolment.
	AKCredential string `json:"akCredential"`
	// Quote is TPMS_ATTEST, Signature TPMT_SIGNATURE.
	Quote     []byte `json:"quote"`
	Signature []byte `json:"signature"`
	// PCRs are the SHA-256 bank's values by index, as read.
	PCRs map[int][]byte `json:"pcrs"`
	// EventLog explains PCR 14, in the format of attest/vtpm.
	EventLog []byte `json:"eventLog"`
	// TCGLog is the log of firmware and boot loader as the kernel keeps it (TCG
	// PC Client Platform Firmware Profile, section 10), or empty. Where it is
	// there, the binding covers it.
	TCGLog []byte `json:"tcgLog,omitempty"`
}

// SNP is an SEV-SNP attestation report.
type SNP struct {
	Report []byte `json:"report"`
	// Certificates is the certificate table that the platform gave with the
	// report (GHCB specification, MSG_REPORT certificates), or empty.
	Certificates []byte `json:"certificates,omitempty"`
	// HCLReport is what Azure's paravisor keeps in the TPM: it holds the report,
	// and Report is then empty. Its report data is the paravisor's, so that the
	// quote alone speaks of the job.
	HCLReport []byte `json:"hclReport,omitempty"`
}

// GPU is one GPU's attestation report.
type GPU struct {
	UUID string `json:"uuid"`
	// Report is the GET_MEASUREMENTS request and response.
	Report []byte `json:"report"`
	// Chain is PEM, leaf first.
	Chain         []byte `json:"chain"`
	DriverVersion string `json:"driverVersion"`
	VBIOSVersion  string `json:"vbiosVersion"`
}

// Failure says which source of evidence failed, and how.
type Failure struct {
	// Source is "tpm", "snp" or "gpu".
	Source  string `json:"source"`
	Message string `json:"message"`
}

// Parse reads an envelope and bounds every part of it.
func Parse(b []byte) (*Envelope, error) {
	if len(b) > MaxSize {
		return nil, fmt.Errorf("parse evidence: %d bytes, at most %d are allowed", len(b), MaxSize)
	}
	var e Envelope
	// This reader is stricter than encoding/json, which takes a field given twice
	// and one in other letters, and takes a fifth of the time.
	if err := json.Unmarshal(b, &e, json.RejectUnknownMembers(true)); err != nil {
		return nil, fmt.Errorf("parse evidence: %w", err)
	}
	if e.Version != Version {
		return nil, fmt.Errorf("parse evidence: version %.40q: want %q", e.Version, Version)
	}
	if err := e.Bounded(); err != nil {
		return nil, fmt.Errorf("parse evidence: %w", err)
	}
	return &e, nil
}

// Bounded checks the sizes and counts of everything in an envelope but plan and
// sandbox, as Parse does, where the parts came by another way.
func (e *Envelope) Bounded() error {
	if len(e.GPUs) > MaxGPUs {
		return fmt.Errorf("%d GPUs, at most %d are allowed", len(e.GPUs), MaxGPUs)
	}
	if len(e.Failures) > MaxGPUs+2 {
		return errors.New("too many failures")
	}
	type part struct {
		name string
		size int
	}
	parts := append(make([]part, 0, 32), part{"verifier", len(e.VerifierID)}, part{"nonce", len(e.Nonce)}, part{"job", len(e.JobID)},
		part{"recipient key", len(e.RecipientKey)}, part{"session key", len(e.SessionKey)})
	if t := e.TPM; t != nil {
		parts = append(parts, part{"tpm ak", len(t.AKPublic)}, part{"tpm credential", len(t.AKCredential)}, part{"tpm quote", len(t.Quote)},
			part{"tpm signature", len(t.Signature)}, part{"tpm event log", len(t.EventLog)}, part{"tpm firmware log", len(t.TCGLog)})
		if len(t.PCRs) > 24 {
			return fmt.Errorf("%d PCRs, a bank has 24", len(t.PCRs))
		}
		for i, v := range t.PCRs {
			if i < 0 || i > 23 || len(v) != 32 {
				return fmt.Errorf("PCR %d with %d bytes: want 0 to 23 with 32", i, len(v))
			}
		}
	}
	if s := e.SNP; s != nil {
		parts = append(parts, part{"snp report", len(s.Report)}, part{"snp certificates", len(s.Certificates)}, part{"snp hcl report", len(s.HCLReport)})
		if len(s.Report) > 0 && len(s.HCLReport) > 0 {
			return errors.New("two SEV-SNP reports")
		}
	}
	for i, g := range e.GPUs {
		name := "gpu" + strconv.Itoa(i)
		parts = append(parts, part{name + " report", len(g.Report)}, part{name + " chain", len(g.Chain)},
			part{name + " versions", len(g.UUID) + len(g.DriverVersion) + len(g.VBIOSVersion)})
	}
	for _, p := range parts {
		if p.size > MaxPart {
			return fmt.Errorf("%s has %d bytes, at most %d are allowed", p.name, p.size, MaxPart)
		}
	}
	return nil
}

// Challenge returns what this evidence claims to speak of. The digests are
// computed from the documents, never taken from the envelope's word.
func (e *Envelope) Challenge() binding.Challenge {
	ch := binding.Challenge{
		VerifierID: e.VerifierID, Nonce: []byte(e.Nonce), PlanDigest: plan.Sum(e.Plan), JobID: e.JobID,
		SandboxDigest: plan.Sum(e.Sandbox), RecipientKey: e.RecipientKey, SessionKey: e.SessionKey,
	}
	if e.TPM != nil {
		ch.AKPublic = e.TPM.AKPublic
	}
	return ch
}

// Devices returns D over the envelope's GPUs.
func (e *Envelope) Devices() binding.Devices {
	gpus := make([]binding.GPU, 0, len(e.GPUs))
	for _, g := range e.GPUs {
		gpus = append(gpus, binding.GPU{Report: g.Report, Chain: g.Chain})
	}
	return binding.DevicesOf(gpus)
}
