package composite

import (
	"context"
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/azure"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/vtpm"
)

// azure appraises a machine whose paravisor takes the report data for itself:
//
//  1. the SEV-SNP report is genuine, and its report data is the digest of the
//     runtime claims;
//  2. a trusted key signed the guest that made it, at VMPL 0: it is a paravisor,
//     and its claims speak of the TPM that it keeps;
//  3. the quote is signed by the attestation key in these claims;
//  4. the quote's extra data binds the job, which the report cannot.
//
// The job's binding rests on all four, so that the report counts for a job with
// its quote only.
func (s *Statement) azure(ctx context.Context, trust Trust, now time.Time) (cpu, tpm *Device) {
	e := s.envelope.SNP
	h, err := azure.Parse(e.HCLReport)
	if err != nil {
		cpu = &Device{Kind: CPU, Name: "cpu0", Claims: map[string]any{}, Simulated: trust.Anchors.Simulated()}
		cpu.Checks.Fail("hcl.parse", "a report of Azure's paravisor", err.Error(), "send the report as it lies in the TPM")
		return cpu, s.tpm(trust, &vtpm.PlatformKey{}, now)
	}
	cpu, r := report(ctx, h.SNP, e.Certificates, h.ReportData(), trust, now)
	genuine := cpu.Genuine()
	l := &cpu.Checks
	l.Pass("hcl.parse", "SEV-SNP report and runtime claims")
	if s.alone != nil && s.alone.SNPReportData != nil {
		data := h.ReportData()
		l.Equal("hcl.report-data", hex.EncodeToString(s.alone.SNPReportData[:]), hex.EncodeToString(data[:]), "these are not the runtime claims that the caller named")
	}
	paravisor := genuine && checkParavisor(r.Report.IDKeyDigest, r.Report.VMPL, trust.Anchors, l)

	// What nobody vouches for is handed on as no key at all.
	platform := &vtpm.PlatformKey{}
	if paravisor {
		platform = &vtpm.PlatformKey{Key: h.AK, Class: anchor.HCLVMPL0, Simulated: r.Simulated}
		cpu.Claims["hcl.vm"] = h.VM
		for name, v := range map[string]*bool{"hcl.secure-boot": h.SecureBoot, "hcl.console": h.Console} {
			if v != nil {
				cpu.Claims[name] = *v
			}
		}
	}
	tpm = s.tpm(trust, platform, now)

	const id = "hcl.binding"
	switch {
	case !paravisor:
		l.Fail(id, "a quote by the TPM of a trusted paravisor", "no paravisor that is trusted", "")
	case s.alone.names(h.ReportData()) && tpm == nil:
		l.Pass(id, "by the report data that the caller named")
	case tpm == nil:
		l.Fail(id, "a quote by the TPM of a trusted paravisor", "none", "the report alone speaks of no job: send the quote too")
	case !platform.Signs(s.envelope.TPM.AKPublic):
		// A credential for another key would leave the report without a job.
		l.Fail(id, "a quote by the key in the runtime claims", "by another key", "quote with the key that the paravisor made")
	case !passed(tpm.Checks, "tpm.signature", "tpm.extra-data", "tpm.ak"):
		l.Fail(id, "a genuine quote that speaks of this job", "none", "")
	default:
		l.Pass(id, "by the quote, under the key in the runtime claims")
	}
	return cpu, tpm
}

func checkParavisor(signer [48]byte, vmpl uint32, anchors anchor.Set, l *check.List) bool {
	const id = "hcl.paravisor"
	switch {
	case !anchors.Paravisor(signer):
		l.Fail(id, "a guest signed by a trusted maker of paravisors", fmt.Sprintf("signed under id key %x", signer),
			"if this is a paravisor that you trust, give the verifier the digest of its id key")
	case vmpl != 0:
		l.Fail(id, "a report of VMPL 0", fmt.Sprintf("VMPL %d", vmpl), "the report was made by what runs inside the paravisor")
	default:
		l.Pass(id, fmt.Sprintf("signed under id key %x", signer))
		return true
	}
	return false
}

func passed(l check.List, ids ...string) bool {
	for _, id := range ids {
		if !slices.ContainsFunc(l, func(c check.Check) bool { return c.ID == id && c.Outcome == check.Pass }) {
			return false
		}
	}
	return len(l) > 0
}
