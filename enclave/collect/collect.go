// Package collect gathers the evidence of one attempt of one job, in the order
// in which each device's answer can be bound into the next one's.
//
// Trusted: the devices that answer. Checked: that every source that was asked
// for either answered with evidence of the right form or is named as a failure.
// Not checked: whether evidence is genuine or acceptable, which the attester
// cannot judge of itself; that is for the verifier.
package collect

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/coffer-run/coffer/attest/binding"
	"github.com/coffer-run/coffer/attest/evidence"
)

// maxMessage bounds the text of a failure, in bytes.
const maxMessage = 1024

// Quote is what a TPM says about its PCRs.
type Quote struct {
	// Attest is TPMS_ATTEST, Signature TPMT_SIGNATURE.
	Attest    []byte
	Signature []byte
	// PCRs are the SHA-256 bank's values that the quote covers.
	PCRs map[int][]byte
	// EventLog explains the PCRs, in the format of attest/vtpm.
	EventLog []byte
	// FirmwareLog is that of firmware and boot loader, or nil. The binding covers
	// it.
	FirmwareLog []byte
}

// TPM quotes with one attestation key. Implementations MUST be safe for
// concurrent use.
type TPM interface {
	// AKPublic returns the attestation key as TPMT_PUBLIC.
	AKPublic() []byte
	Quote(ctx context.Context, extraData [32]byte) (*Quote, error)
}

// SNP makes SEV-SNP reports. Implementations MUST be safe for concurrent use.
type SNP interface {
	// Report returns the report and the platform's certificate table, which may
	// be empty.
	Report(ctx context.Context, reportData [64]byte) (report, certificates []byte, err error)
}

// Paravisor is what runs below the guest on Azure and answers the CPU's firmware
// in its place: its report is the paravisor's, and only the TPM's quote, by the
// key that the report names, speaks of the job. Implementations MUST be safe for
// concurrent use.
type Paravisor interface {
	HCLReport(ctx context.Context) ([]byte, error)
}

// GPUs asks every named GPU for a report over the same nonce. It is declared
// here and implemented over the GPU plugin by the agent, so that this package
// links no RPC. Implementations MUST be safe for concurrent use.
type GPUs interface {
	Collect(ctx context.Context, nonce [32]byte, uuids []string) ([]evidence.GPU, error)
}

// Collector holds a node's sources of evidence. A nil source is a source that
// the node does not have: asking for it yields a named failure.
type Collector struct {
	TPM TPM
	SNP SNP
	// Paravisor takes the place of SNP where there is one.
	Paravisor Paravisor
	GPUs      GPUs
}

// Want says which sources a job's policy asks for.
type Want struct {
	TPM bool
	SNP bool
	// GPUs are the devices given to the job. None at all asks for no GPU.
	GPUs []string
}

// Request is what the evidence must speak of.
type Request struct {
	VerifierID string
	// Nonce is the verifier's token; its bytes are what is bound.
	Nonce string
	JobID string
	// Plan and Sandbox are canonical documents; their digests are bound.
	Plan         []byte
	Sandbox      []byte
	RecipientKey []byte
	SessionKey   []byte
	// AKCredential is the verifier's word on the attestation key.
	AKCredential string
	Want         Want
}

// Collect asks every wanted source once. A source that fails is named in the
// envelope's Failures, and the others are still asked, so that a refusal can
// name everything that is wrong. An error means that no evidence could be bound
// at all, or that ctx ended.
func (c *Collector) Collect(ctx context.Context, req Request) (*evidence.Envelope, error) {
	if len(req.Want.GPUs) > evidence.MaxGPUs {
		return nil, fmt.Errorf("collect evidence: %d GPUs asked for, at most %d are possible", len(req.Want.GPUs), evidence.MaxGPUs)
	}
	if !req.Want.TPM && !req.Want.SNP && len(req.Want.GPUs) == 0 {
		return nil, errors.New("collect evidence: no source asked for")
	}
	env := &evidence.Envelope{
		Version: evidence.Version, VerifierID: req.VerifierID, Nonce: req.Nonce, JobID: req.JobID,
		Plan: req.Plan, Sandbox: req.Sandbox, RecipientKey: req.RecipientKey, SessionKey: req.SessionKey,
	}
	fail := func(source string, err error) {
		env.Failures = append(env.Failures, evidence.Failure{Source: source, Message: printable(err)})
	}

	// The challenge names the attestation key before the key has quoted, so a
	// TPM whose quote fails later still appears with its key: the bindings of
	// the other devices then verify, and only the quote is missing.
	if req.Want.TPM {
		if c.TPM == nil {
			fail("tpm", errors.New("this node has no TPM"))
		} else {
			env.TPM = &evidence.TPM{AKPublic: c.TPM.AKPublic(), AKCredential: req.AKCredential}
		}
	}
	bound, err := env.Challenge().Bind()
	if err != nil {
		return nil, fmt.Errorf("collect evidence: %w", err)
	}

	if len(req.Want.GPUs) > 0 {
		gpus, err := c.gpus(ctx, bound, req.Want.GPUs)
		if err != nil {
			fail("gpu", err)
		}
		env.GPUs = gpus
	}
	devices := env.Devices()

	var quote, eventLog, firmwareLog []byte
	if env.TPM != nil {
		q, err := c.TPM.Quote(ctx, bound.TPMExtraData(devices))
		if err != nil {
			fail("tpm", err)
		} else {
			env.TPM.Quote, env.TPM.Signature, env.TPM.PCRs, env.TPM.EventLog, env.TPM.TCGLog = q.Attest, q.Signature, q.PCRs, q.EventLog, q.FirmwareLog
			quote, eventLog, firmwareLog = q.Attest, q.EventLog, q.FirmwareLog
		}
	}

	if req.Want.SNP {
		if err := c.snp(ctx, env, bound.SNPReportData(devices, quote, eventLog, firmwareLog)); err != nil {
			fail("snp", err)
		}
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("collect evidence: %w", err)
	}
	return env, nil
}

func (c *Collector) gpus(ctx context.Context, bound binding.Bound, uuids []string) ([]evidence.GPU, error) {
	if c.GPUs == nil {
		return nil, errors.New("this node has no GPU collector")
	}
	got, err := c.GPUs.Collect(ctx, bound.GPUNonce(), uuids)
	if err != nil {
		return nil, err
	}
	answered := make([]string, 0, len(got))
	for _, g := range got {
		if len(g.Report) == 0 || len(g.Chain) == 0 {
			return nil, fmt.Errorf("GPU %s answered without a report or certificates", g.UUID)
		}
		answered = append(answered, g.UUID)
	}
	want := slices.Clone(uuids)
	slices.Sort(want)
	slices.Sort(answered)
	if !slices.Equal(want, answered) {
		return nil, fmt.Errorf("GPUs %s were asked, %s answered", strings.Join(want, ", "), strings.Join(answered, ", "))
	}
	return got, nil
}

func (c *Collector) snp(ctx context.Context, env *evidence.Envelope, reportData [64]byte) error {
	if c.Paravisor != nil {
		b, err := c.Paravisor.HCLReport(ctx)
		if err != nil {
			return err
		}
		env.SNP = &evidence.SNP{HCLReport: b}
		return nil
	}
	if c.SNP == nil {
		return errors.New("this node has no SEV-SNP report source")
	}
	report, certificates, err := c.SNP.Report(ctx, reportData)
	if err != nil {
		return err
	}
	env.SNP = &evidence.SNP{Report: report, Certificates: certificates}
	return nil
}

// printable bounds an error's text and keeps it on one line of valid UTF-8: it
// goes into evidence and from there into logs.
func printable(err error) string {
	b := bytes.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, bytes.ToValidUTF8([]byte(err.Error()), []byte("?")))
	if len(b) > maxMessage {
		b = bytes.ToValidUTF8(b[:maxMessage], nil)
	}
	return string(b)
}
