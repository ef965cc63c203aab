// Package nvgpu appraises attestation reports of NVIDIA Hopper GPUs: is the
// report genuine, and what does it say?
//
// Trusted: the anchors that the caller gives. Checked: every byte's form, the
// chain of five certificates to the pinned device root, the firmware identity
// (FWID), the nonce, the signature, the versions that the driver stated outside
// the report and, from a Source, the certificates' status and the vendor's
// reference values for driver and VBIOS. Not checked: that the GPU is attached
// to the machine that sent the report, which nothing on Hopper can prove, and
// whether the claims are acceptable, which is the policy's.
package nvgpu

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/check"
)

// Names of the checks.
const (
	CheckParse        = "gpu.parse"
	CheckChain        = "gpu.chain"
	CheckValidity     = "gpu.chain-validity"
	CheckArchitecture = "gpu.architecture"
	CheckFWID         = "gpu.fwid"
	CheckNonce        = "gpu.nonce"
	CheckSignature    = "gpu.signature"
	CheckDriver       = "gpu.driver-version"
	CheckVBIOS        = "gpu.vbios-version"
	CheckOCSP         = "gpu.ocsp"
	CheckDriverRIM    = "gpu.driver-rim"
	CheckVBIOSRIM     = "gpu.vbios-rim"
	CheckRIMConflict  = "gpu.rim-conflict"
	CheckMeasurements = "gpu.measurements"
)

// Each manifest has checks of its own, named by CheckDriverRIM or CheckVBIOSRIM
// and one of these.
const (
	suffixSignature = "-signature"
	suffixChain     = "-chain"
	suffixValidity  = "-validity"
	suffixOCSP      = "-ocsp"
	suffixVersion   = "-version"
	suffixValues    = "-values"
)

// Claim names in the field.
const (
	ClaimNonce    = "eat_nonce"
	ClaimModel    = "hwmodel"
	ClaimUEID     = "ueid"
	ClaimOEMID    = "oemid"
	ClaimDriver   = "x-nvidia-gpu-driver-version"
	ClaimVBIOS    = "x-nvidia-gpu-vbios-version"
	ClaimParsed   = "x-nvidia-gpu-attestation-report-parsed"
	ClaimNonceOK  = "x-nvidia-gpu-attestation-report-nonce-match"
	ClaimChainOK  = "x-nvidia-gpu-attestation-report-cert-chain"
	ClaimFWIDOK   = "x-nvidia-gpu-attestation-report-cert-chain-fwid-match"
	ClaimSigned   = "x-nvidia-gpu-attestation-report-signature-verified"
	ClaimFeature  = "gpu.feature-flag"
	ClaimPPCIE    = "gpu.protected-pcie"
	ClaimNVDEC0   = "gpu.nvdec0"
	ClaimFWID     = "gpu.fwid"
	ClaimBoard    = "gpu.board-id"
	ClaimSwitches = "gpu.switch-pdis"
	ClaimProject  = "gpu.project"
	// ClaimDevice is the serial number of the boot ROM's certificate. It stays
	// the same where the leaf, and with it the ueid, changes with the firmware.
	ClaimDevice    = "gpu.device"
	oemNVIDIA      = "5703"
	supportedModel = "GH100"
)

// Evidence is one GPU's report, and what its driver said beside it.
type Evidence struct {
	Report []byte
	// Chain is PEM, leaf first.
	Chain []byte
	// DriverVersion and VBIOSVersion are NVML's.
	DriverVersion, VBIOSVersion string
}

// Want is what the report must speak of.
type Want struct {
	Nonce [32]byte
}

// Result is what appraisal found.
type Result struct {
	// Report is nil if the report did not parse.
	Report *Report
	// UEID is the leaf's serial number, and Device that of the certificate
	// above it. Two GPUs of one job that have either in common are one GPU: the
	// caller refuses them.
	UEID, Device string
	Claims       map[string]any
	Checks       check.List
	// Simulated is true if the anchors are a simulation's.
	Simulated bool
}

// Genuine reports whether the evidence is what it claims to be: chain, nonce
// and signature were checked and no check failed. The zero Result is not.
func (r Result) Genuine() bool {
	passed := map[string]bool{}
	for _, c := range r.Checks {
		if c.Outcome == check.Pass {
			passed[c.ID] = true
		}
	}
	return r.Report != nil && passed[CheckChain] && passed[CheckNonce] && passed[CheckSignature] && len(r.Checks.Failed()) == 0
}

// Appraise checks evidence in the order of the checks above. It goes on after a
// failure as far as there is something to check, so that a refusal lists all.
//
// Without endorsements the status of certificates and the reference values are
// reported as not checked.
func Appraise(ev Evidence, want Want, anchors anchor.Set, now time.Time) Result {
	return appraise(context.Background(), ev, want, anchors, Endorsements{}, now)
}

func appraise(ctx context.Context, ev Evidence, want Want, anchors anchor.Set, e Endorsements, now time.Time) Result {
	res := Result{Claims: make(map[string]any, 24), Checks: make(check.List, 0, 16), Simulated: anchors.Simulated()}
	l := &res.Checks

	// Nobody is asked about certificates and versions that nobody vouches for.
	anchored, signed := false, false
	chain, err := parseChain(ev.Chain, anchors)
	if err != nil {
		l.Fail(CheckChain, "a PEM chain of five certificates", err.Error(), "collect the evidence again; chains of other lengths are of other GPUs than Hopper")
	} else {
		res.UEID, res.Device = chain[0].SerialNumber.String(), chain[1].SerialNumber.String()
		anchored = res.appraiseChain(chain, anchors, now)
		if anchored {
			// The leaf has no responder: its device's boot ROM issues it.
			res.appraiseOCSP(ctx, CheckOCSP, e, chain, 1, now)
		} else {
			l.Skip(CheckOCSP, "the chain does not end at an anchor")
		}
	}

	report, err := Parse(ev.Report)
	res.Claims[ClaimParsed] = err == nil
	if err != nil {
		l.Fail(CheckParse, "a Hopper attestation report", err.Error(), "collect the evidence again")
		return res
	}
	l.Pass(CheckParse, "")
	res.Report = report

	res.Claims[ClaimNonceOK] = l.Equal(CheckNonce, hex.EncodeToString(want.Nonce[:]), hex.EncodeToString(report.Nonce[:]),
		"the report was made for another challenge, job, plan, sandbox or key")
	if chain != nil {
		res.appraiseFWID(chain)
		signed = res.appraiseSignature(chain[0])
	}
	l.Equal(CheckDriver, ev.DriverVersion, report.DriverVersion, "the driver states another version than the GPU measured")
	// NVML and the report disagree about the case of hex digits.
	l.Equal(CheckVBIOS, strings.ToLower(ev.VBIOSVersion), strings.ToLower(report.VBIOSVersion), "the driver states another version than the GPU measured")

	if anchored && signed {
		res.appraiseRIMs(ctx, anchors, e, now)
	} else {
		res.skipRIMs("the report is not signed by a GPU that these trust anchors cover")
	}
	res.claim(report)
	return res
}

func (res *Result) appraiseChain(chain []*x509.Certificate, anchors anchor.Set, now time.Time) bool {
	l, c := &res.Checks, res.Claims
	c[ClaimUEID], c[ClaimModel], c[ClaimOEMID] = res.UEID, chain[1].Subject.CommonName, oemNVIDIA
	c[ClaimDevice] = res.Device
	err := checkChain(chain, anchors)
	ok := err == nil
	c[ClaimChainOK] = ok
	if err != nil {
		l.Fail(CheckChain, "a chain of five certificates to the pinned device root", err.Error(), "the report does not come from a GPU that these trust anchors cover")
	} else {
		l.Pass(CheckChain, chain[1].Subject.CommonName)
	}
	if err := anchor.CheckTimes(chain, now); err != nil {
		l.Fail(CheckValidity, "certificates that are valid at "+now.UTC().Format(time.RFC3339), err.Error(), "")
	} else {
		l.Pass(CheckValidity, "")
	}
	l.Equal(CheckArchitecture, supportedModel, architecture(chain), "unsupported architecture: only Hopper reports are appraised")
	return ok
}

// appraiseFWID compares the firmware that the report names with the one for
// which the GPU's boot ROM certified the signing key.
func (res *Result) appraiseFWID(chain []*x509.Certificate) {
	l := &res.Checks
	fwid, deviceKey, err := leafFWID(chain[0])
	match := false
	switch {
	case err != nil:
		l.Fail(CheckFWID, "a firmware identity in the leaf certificate", err.Error(), "")
	case res.Report.FWID == nil:
		l.Skip(CheckFWID, "the report names no firmware identity: its driver is older than that field")
	case fwid == nil:
		l.Fail(CheckFWID, hex.EncodeToString(res.Report.FWID), "a leaf certificate without firmware identity", "the certificate is another GPU's")
	case !bytes.Equal(deviceKey, chain[1].RawSubjectPublicKeyInfo):
		l.Fail(CheckFWID, "the device key that issued the leaf, in its composite device id", "another key", "the certificate is another GPU's")
	default:
		match = l.Equal(CheckFWID, hex.EncodeToString(fwid), hex.EncodeToString(res.Report.FWID), "the certificate is for other firmware than the report's")
	}
	res.Claims[ClaimFWIDOK] = match
}

func (res *Result) appraiseSignature(leaf *x509.Certificate) bool {
	key, ok := leaf.PublicKey.(*ecdsa.PublicKey)
	ok = ok && key.Curve.Params().BitSize == 384
	if ok {
		ok = ecdsa.Verify(key, res.Report.digest[:], res.Report.r, res.Report.s)
	}
	res.Claims[ClaimSigned] = ok
	if ok {
		res.Checks.Pass(CheckSignature, "ECDSA P-384 by the leaf certificate's key")
		return true
	}
	res.Checks.Fail(CheckSignature, "a signature by the leaf certificate's key", "another", "the report was changed, or the certificate is another GPU's")
	return false
}

func (res *Result) claim(r *Report) {
	c := res.Claims
	c[ClaimNonce] = hex.EncodeToString(r.Nonce[:])
	c[ClaimDriver], c[ClaimVBIOS] = r.DriverVersion, r.VBIOSVersion
	c[ClaimNVDEC0] = r.NVDEC0Enabled
	c[ClaimBoard] = r.BoardID
	c[ClaimProject] = fmt.Sprintf("%s_%s_%s", r.Project, r.ProjectSKU, r.ChipSKU)
	if r.FWID != nil {
		c[ClaimFWID] = hex.EncodeToString(r.FWID)
	}
	if r.ProtectedPCIe != nil {
		c[ClaimPPCIE] = *r.ProtectedPCIe
	}
	if r.Feature != nil {
		c[ClaimFeature] = r.Feature.String()
	}
	if r.SwitchPDIs != nil {
		c[ClaimSwitches] = r.SwitchPDIs
	}
}
