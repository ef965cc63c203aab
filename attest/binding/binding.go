// Package binding ties one nonce, one plan, one sandbox and one pair of keys
// into the evidence of every device, so that no part can be swapped for
// another's. Both the attester and the verifier compute it here.
//
// Every field is preceded by its length as 4 bytes, big-endian; labels are
// fields too. Values compare exactly: nothing is padded or cut.
package binding

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"hash"
	"slices"

	"github.com/coffer-run/coffer/attest/plan"
)

const (
	labelChallenge = "coffer/v1 challenge"
	labelGPU       = "coffer/v1 gpu"
	labelDevices   = "coffer/v1 devices"
	labelTPM       = "coffer/v1 tpm"
	labelSNP       = "coffer/v1 snp"
	labelQuote     = "coffer/v1 quote"
)

// Challenge is what the evidence of one attempt of one job must speak of.
type Challenge struct {
	// VerifierID names the verifier that gave the nonce.
	VerifierID string
	// Nonce is the verifier's token, byte for byte.
	Nonce         []byte
	PlanDigest    plan.Digest
	JobID         string
	SandboxDigest plan.Digest
	// RecipientKey is the HPKE public key to which data keys are wrapped.
	RecipientKey []byte
	// SessionKey is the job's signing public key, PKIX DER.
	SessionKey []byte
	// AKPublic is the TPM attestation key, TPMT_PUBLIC. Empty only where the
	// job's policy asks for no TPM.
	AKPublic []byte
}

// Bound is the challenge in the form in which evidence carries it.
type Bound struct {
	c [sha512.Size384]byte
}

// Bind computes C. A challenge that lacks a part is an error: an empty field
// would let two different challenges agree by omission.
func (ch Challenge) Bind() (Bound, error) {
	switch {
	case ch.VerifierID == "":
		return Bound{}, errors.New("bind challenge: no verifier")
	case len(ch.Nonce) < 16:
		return Bound{}, errors.New("bind challenge: nonce under 16 bytes")
	case ch.PlanDigest.Bytes() == nil:
		return Bound{}, errors.New("bind challenge: no plan digest")
	case ch.JobID == "":
		return Bound{}, errors.New("bind challenge: no job")
	case ch.SandboxDigest.Bytes() == nil:
		return Bound{}, errors.New("bind challenge: no sandbox digest")
	case len(ch.RecipientKey) == 0 || len(ch.SessionKey) == 0:
		return Bound{}, errors.New("bind challenge: no recipient or session key")
	}
	h := sha512.New384()
	fields(h, []byte(labelChallenge), []byte(ch.VerifierID), ch.Nonce, ch.PlanDigest.Bytes(), []byte(ch.JobID),
		ch.SandboxDigest.Bytes(), ch.RecipientKey, ch.SessionKey, ch.AKPublic)
	var b Bound
	h.Sum(b.c[:0])
	return b, nil
}

// GPUNonce is the nonce given to every GPU of the job.
func (b Bound) GPUNonce() [32]byte {
	h := sha256.New()
	fields(h, []byte(labelGPU), b.c[:])
	return [32]byte(h.Sum(nil))
}

// Devices is D: the digest over every GPU's report and certificate chain, in an
// order that does not depend on that of collection.
type Devices [sha512.Size384]byte

// GPU is the part of a GPU's evidence that D covers.
type GPU struct {
	Report []byte
	Chain  []byte
}

// DevicesOf computes D. No GPU at all has a D of its own.
func DevicesOf(gpus []GPU) Devices {
	sums := make([][]byte, 0, len(gpus))
	for _, g := range gpus {
		h := sha512.New384()
		fields(h, g.Report, g.Chain)
		sums = append(sums, h.Sum(nil))
	}
	slices.SortFunc(sums, bytes.Compare)
	h := sha512.New384()
	fields(h, []byte(labelDevices))
	fields(h, sums...)
	var d Devices
	h.Sum(d[:0])
	return d
}

// TPMExtraData is the qualifying data of the TPM quote.
func (b Bound) TPMExtraData(d Devices) [32]byte {
	h := sha256.New()
	fields(h, []byte(labelTPM), b.c[:], d[:])
	return [32]byte(h.Sum(nil))
}

// SNPReportData is the report data of the SEV-SNP report, which is collected
// last and signs for all the rest. The quote's part is SHA-384 over label,
// quote, agent's event log and, where there is one, the firmware's event log as
// a fourth field. quote and eventLog are empty where the job's policy asks for
// no TPM; a firmware log that is empty is one that is not there, so that two
// lists of logs never have one digest.
func (b Bound) SNPReportData(d Devices, quote, eventLog []byte, firmwareLog ...[]byte) [64]byte {
	q := sha512.New384()
	fields(q, []byte(labelQuote), quote, eventLog)
	for _, l := range firmwareLog {
		if len(l) > 0 {
			fields(q, l)
		}
	}
	h := sha512.New()
	fields(h, []byte(labelSNP), b.c[:], d[:], q.Sum(nil))
	return [64]byte(h.Sum(nil))
}

func fields(h hash.Hash, parts ...[]byte) {
	for _, p := range parts {
		var n [4]byte
		binary.BigEndian.PutUint32(n[:], uint32(len(p))) //nolint:gosec // evidence is bounded to 4 MiB
		h.Write(n[:])
		h.Write(p)
	}
}
