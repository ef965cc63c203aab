// Package verifiertest is a machine that attests as an honest one does, with a
// simulation's devices, for tests that need evidence which a verifier accepts.
package verifiertest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hpke"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"strings"

	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/vtpm"
	"github.com/coffer-run/coffer/attest/vtpm/vtpmtest"
)

// Machine has one device of each kind. Without a GPU its plan asks for none.
type Machine struct {
	Chip *simulate.Chip
	TPM  *vtpmtest.TPM
	GPU  *simulate.GPU
	// Policy is the one that its plan names.
	Policy policy.Policy
	// Credential stands for the TPM's attestation key.
	Credential string
}

// Evidence is an envelope, and the keys that it binds.
type Evidence struct {
	evidence.Envelope
	Session   *ecdsa.PrivateKey
	Recipient hpke.PrivateKey
}

// JSON is the encoded envelope.
func (e *Evidence) JSON() ([]byte, error) { return json.Marshal(e.Envelope) }

// Attest collects evidence of a job that answers a nonce, for a verifier.
func (m *Machine) Attest(verifierID, nonce, job string) (*Evidence, error) {
	e := &Evidence{}
	var err error
	if e.Session, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, err
	}
	if e.Recipient, err = hpke.MLKEM768X25519().GenerateKey(); err != nil {
		return nil, err
	}
	session, err := x509.MarshalPKIXPublicKey(&e.Session.PublicKey)
	if err != nil {
		return nil, err
	}
	e.Envelope = evidence.Envelope{
		Version: evidence.Version, VerifierID: verifierID, Nonce: nonce, JobID: job,
		RecipientKey: e.Recipient.PublicKey().Bytes(), SessionKey: session,
		TPM: &evidence.TPM{AKPublic: m.TPM.AKPublic, AKCredential: m.Credential},
	}
	if err := m.documents(&e.Envelope); err != nil {
		return nil, err
	}
	return e, m.collect(&e.Envelope)
}

func (m *Machine) documents(e *evidence.Envelope) error {
	profile := plan.Profile{Version: plan.SandboxVersion, ShimDigest: plan.Sum([]byte("shim")), RuntimeDigest: plan.Sum([]byte("runsc")), Trace: plan.Sum([]byte("trace"))}
	digest, err := profile.Digest()
	if err != nil {
		return err
	}
	ref, err := m.Policy.Ref()
	if err != nil {
		return err
	}
	gpus := 0
	if m.GPU != nil {
		gpus = 1
	}
	image := "sha256:" + strings.Repeat("ab", 32)
	if e.Plan, err = (plan.Plan{
		Version: plan.Version, Name: "job", Image: image, Command: []string{"/bin/true"}, Inputs: []plan.Input{}, Output: plan.Output{LogBytes: 1},
		Resources: plan.Resources{CPUMillis: 1, MemoryBytes: 1, Pids: 1, GPUs: gpus, MaxSeconds: 1}, Policy: ref, SandboxProfile: digest,
	}).Canonical(); err != nil {
		return err
	}
	e.Sandbox, err = plan.Sandbox{Version: plan.SandboxVersion, JobID: e.JobID, Image: image, Profile: profile, Trace: json.RawMessage(`{}`), Spec: json.RawMessage(`{}`)}.Canonical()
	return err
}

// collect asks each device, in the order in which they sign for each other.
func (m *Machine) collect(e *evidence.Envelope) error {
	bound, err := e.Challenge().Bind()
	if err != nil {
		return err
	}
	if g := m.GPU; g != nil {
		report, err := g.Report(bound.GPUNonce(), simulate.GPUOptions{})
		if err != nil {
			return err
		}
		e.GPUs = []evidence.GPU{{UUID: g.UUID(), Report: report, Chain: g.ChainPEM(), DriverVersion: g.DriverVersion(), VBIOSVersion: g.VBIOSVersion()}}
	}
	extra := bound.TPMExtraData(e.Devices())
	if e.TPM.Quote, e.TPM.Signature, err = m.TPM.Quote(extra[:], nil, vtpm.AgentPCR); err != nil {
		return err
	}
	e.TPM.PCRs = m.TPM.PCRs(vtpm.AgentPCR)
	if e.TPM.EventLog, err = vtpm.EncodeLog(m.TPM.Events); err != nil {
		return err
	}
	report, err := m.Chip.Report(bound.SNPReportData(e.Devices(), e.TPM.Quote, e.TPM.EventLog), simulate.SNPOptions{})
	e.SNP = &evidence.SNP{Report: report, Certificates: m.Chip.CertTable()}
	return err
}
