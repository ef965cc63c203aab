// Package snp appraises AMD SEV-SNP attestation reports: is the report
// genuine, and what does it say?
//
// Trusted: the anchors that the caller gives. Checked: every byte's form, the
// chain from the report's signing key (VCEK or VLEK) to the pinned root key of
// its product, what the key's certificate says of chip and TCB, the signature,
// the report data, and a CRL where the caller gives one; one in the evidence
// itself can fail the check and not pass it. Not checked: whether the
// claims are acceptable (debug, VMPL, minimum TCB, measurement): that is the
// policy's.
//
// Everything here reads hostile bytes and is our own. google/go-sev-guest
// v0.15.0 refuses genuine Turin evidence (certificate extension 3.9, platform
// info bit 6, the older TCB layout) and its certificate table parser adds
// offset and length in 32 bits, so that a forged table panics; it serves the
// tests here as a second opinion on Milan and Genoa.
package snp

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/check"
)

// Names of the checks.
const (
	CheckParse      = "snp.parse"
	CheckChain      = "snp.chain"
	CheckValidity   = "snp.chain-validity"
	CheckProduct    = "snp.product"
	CheckTCB        = "snp.vcek-tcb"
	CheckHWID       = "snp.hwid"
	CheckSignature  = "snp.signature"
	CheckReportData = "snp.report-data"
	CheckCRL        = "snp.crl"
)

// Evidence is a report and the certificates that endorse it.
type Evidence struct {
	Report []byte
	// Certificates is the certificate table that came with the report.
	Certificates []byte
	// Chain is DER, VCEK or VLEK first, then ASK or ASVK, then ARK. Each fills
	// the place of what the table lacks.
	Chain [][]byte
	// CRL is the root key's revocation list in DER, by the caller. Without one,
	// revocation is reported as not checked: the one in the table was chosen by
	// whoever shows the evidence, and may be from before the revocation. It only
	// counts against them. An empty list here, and not nil, leaves it aside.
	CRL []byte
}

// Want is what the report must speak of.
type Want struct {
	ReportData [64]byte
}

// Result is what appraisal found.
type Result struct {
	// Report is nil if the report did not parse.
	Report *Report
	Claims map[string]any
	Checks check.List
	// Simulated is true if the anchors are a simulation's.
	Simulated bool
}

// Genuine reports whether the evidence is what it claims to be: the chain and
// the signature were checked and no check failed. The zero Result is not.
func (r Result) Genuine() bool {
	signature, chain := false, false
	for _, c := range r.Checks {
		signature = signature || c.ID == CheckSignature && c.Outcome == check.Pass
		chain = chain || c.ID == CheckChain && c.Outcome == check.Pass
	}
	return r.Report != nil && signature && chain && len(r.Checks.Failed()) == 0
}

// Appraise checks evidence in the order of the checks above. It goes on after a
// failure as far as there is something to check, so that a refusal lists all.
func Appraise(ev Evidence, want Want, anchors anchor.Set, now time.Time) Result {
	res := Result{Claims: make(map[string]any, 48), Checks: make(check.List, 0, 12), Simulated: anchors.Simulated()}
	l := &res.Checks

	report, err := Parse(ev.Report)
	if err != nil {
		l.Fail(CheckParse, "an SEV-SNP attestation report of version 2, 3 or 5", err.Error(), "collect the evidence again")
		return res
	}
	l.Pass(CheckParse, fmt.Sprintf("version %d", report.Version))
	res.Report = report
	l.Equal(CheckReportData, hex.EncodeToString(want.ReportData[:]), hex.EncodeToString(report.ReportData[:]),
		"the report was made for another challenge, job, plan, sandbox, key, quote or set of GPUs")

	chain, crl, err := ev.chain(report.Signer, anchors)
	if err != nil {
		l.Fail(CheckChain, fmt.Sprintf("certificates of %s, signing key and root key", report.Signer), err.Error(), "have the platform hand out its certificates, or import the vendor's endorsements")
		res.claim(report, report.Product)
		return res
	}
	endorsed, err := parseVEK(chain[0], report.Signer)
	if err != nil {
		l.Fail(CheckChain, "a "+report.Signer.String()+" certificate", err.Error(), "")
		res.claim(report, report.Product)
		return res
	}
	err = checkChain(chain, endorsed, report.Signer, anchors)
	anchored := err == nil
	if err != nil {
		l.Fail(CheckChain, "a chain to the pinned root key of "+string(endorsed.product), err.Error(), "the report does not come from a processor that these trust anchors cover")
	} else {
		l.Pass(CheckChain, fmt.Sprintf("%s, %s, ARK-%s", report.Signer, chain[1].Subject.CommonName, endorsed.product))
	}
	if err := anchor.CheckTimes(chain, now); err != nil {
		l.Fail(CheckValidity, "certificates that are valid at "+now.UTC().Format(time.RFC3339), err.Error(), "get the current certificate from the vendor's key distribution service")
	} else {
		l.Pass(CheckValidity, "")
	}

	// Version 2 does not name its processor. Its TCB layout is the older one,
	// so a Turin certificate can endorse no such report.
	if report.Product == "" && endorsed.product == anchor.Turin {
		l.Fail(CheckProduct, "a report of version 3 or later from Turin", "version 2", "")
	} else if report.Product == "" {
		l.Pass(CheckProduct, string(endorsed.product))
	} else {
		l.Equal(CheckProduct, string(report.Product), string(endorsed.product), "the certificate is another processor's")
	}
	l.Equal(CheckTCB, report.ReportedTCB.String(), endorsed.tcb.String(), "the certificate is for another TCB version than the report states: get that for the reported one")

	switch {
	case report.Signer == VLEK && isZero(report.ChipID[:]):
		l.Skip(CheckHWID, "the platform masks the chip id, and a VLEK names no chip")
	case report.Signer == VLEK:
		l.Skip(CheckHWID, "a VLEK names no chip")
	default:
		l.Equal(CheckHWID, hex.EncodeToString(report.ChipID[:len(endorsed.hwid)]), hex.EncodeToString(endorsed.hwid), "the certificate is another chip's, or the platform masks the chip id")
	}

	if ecdsa.Verify(endorsed.key, report.digest[:], report.r, report.s) {
		l.Pass(CheckSignature, "ECDSA P-384 by the "+report.Signer.String())
	} else {
		l.Fail(CheckSignature, "a signature by the "+report.Signer.String()+" in the certificate", "another", "the report was changed, or the certificate is another chip's or TCB version's")
	}
	if anchored {
		checkCRL(l, crl, ev.CRL == nil, chain, now)
	} else {
		l.Skip(CheckCRL, "the chain does not end at an anchor")
	}

	res.claim(report, endorsed.product)
	if report.Signer == VLEK {
		res.Claims["snp.csp"] = endorsed.csp
	}
	return res
}

// chain returns the signing key's certificate, its issuer and the root, and the
// revocation list if there is one.
func (ev Evidence) chain(s Signer, anchors anchor.Set) ([]*x509.Certificate, []byte, error) {
	table, err := parseTable(ev.Certificates)
	if err != nil {
		return nil, nil, err
	}
	if len(ev.Chain) > 3 {
		return nil, nil, fmt.Errorf("%d certificates: want three", len(ev.Chain))
	}
	leaf := guidVCEK
	if s == VLEK {
		leaf = guidVLEK
	}
	chain := make([]*x509.Certificate, 0, 3)
	for i, guid := range []string{leaf, guidASK, guidARK} {
		der := table[guid]
		if der == nil && i < len(ev.Chain) {
			der = ev.Chain[i]
		}
		if len(der) == 0 {
			return nil, nil, fmt.Errorf("no certificate of %s", []string{"the " + s.String(), "its issuer", "the root key"}[i])
		}
		if len(der) > maxCertificate {
			return nil, nil, fmt.Errorf("a certificate of %d bytes, at most %d are allowed", len(der), maxCertificate)
		}
		c, err := anchors.Certificate(der)
		if err != nil {
			return nil, nil, err
		}
		chain = append(chain, c)
	}
	crl := ev.CRL
	if crl == nil {
		crl = table[guidCRL]
	}
	return chain, crl, nil
}

// checkChain checks that the three certificates play the parts that they
// should. The issuers of VCEKs and VLEKs have the same root, so their names
// keep the one from standing in for the other.
func checkChain(chain []*x509.Certificate, v *vek, s Signer, anchors anchor.Set) error {
	issuer := "SEV-" + string(v.product)
	if s == VLEK {
		issuer = "SEV-VLEK-" + string(v.product)
	}
	switch {
	case chain[0].Subject.CommonName != "SEV-"+s.String():
		return fmt.Errorf("the signing key's certificate is of %.60q", chain[0].Subject.CommonName)
	case chain[1].Subject.CommonName != issuer:
		return fmt.Errorf("the issuer is %.60q: want %q", chain[1].Subject.CommonName, issuer)
	case chain[0].IsCA:
		return errors.New("the signing key's certificate is a CA's")
	case !anchors.ARK(v.product, chain[2].Raw):
		return fmt.Errorf("the root certificate %.60q is not the pinned one", chain[2].Subject.CommonName)
	}
	return anchors.Path(chain)
}

// checkCRL checks the root key's revocation list, which names the issuers of
// VCEKs and VLEKs. AMD gives every VCEK and VLEK the serial number 0 and revokes
// none by name: it raises the TCB version. A list that does name one counts. own
// is true of a list that came with the evidence.
func checkCRL(l *check.List, crl []byte, own bool, chain []*x509.Certificate, now time.Time) {
	if len(crl) == 0 {
		l.Skip(CheckCRL, "no revocation list was given")
		return
	}
	if err := revocation(crl, chain, now); err != nil {
		l.Fail(CheckCRL, "a current revocation list of the root key that does not name the chain", err.Error(), "get the current list; a revoked issuer means that the platform's keys are not to be trusted")
		return
	}
	if own {
		l.Skip(CheckCRL, "no revocation list was given but the evidence's own, which does not name the chain")
		return
	}
	l.Pass(CheckCRL, "")
}

func revocation(crl []byte, chain []*x509.Certificate, now time.Time) error {
	if len(crl) > maxTable {
		return fmt.Errorf("%d bytes, at most %d are allowed", len(crl), maxTable)
	}
	list, err := x509.ParseRevocationList(crl)
	if err != nil {
		return err
	}
	if err := list.CheckSignatureFrom(chain[2]); err != nil {
		return err
	}
	if now.Before(list.ThisUpdate) || list.NextUpdate.IsZero() || now.After(list.NextUpdate) {
		return fmt.Errorf("it is of %s to %s", list.ThisUpdate.UTC().Format(time.RFC3339), list.NextUpdate.UTC().Format(time.RFC3339))
	}
	// RFC 5280, sections 5.2 and 5.3: a critical extension that is not understood
	// can mean that the list has only some certificates, or only what changed.
	for _, e := range list.Extensions {
		if e.Critical {
			return fmt.Errorf("it has the critical extension %s, which is not understood", e.Id)
		}
	}
	for _, e := range list.RevokedCertificateEntries {
		for _, x := range e.Extensions {
			if x.Critical {
				return fmt.Errorf("an entry has the critical extension %s, which is not understood", x.Id)
			}
		}
		for _, c := range chain {
			if e.SerialNumber.Cmp(c.SerialNumber) == 0 {
				return fmt.Errorf("%s is revoked since %s", c.Subject.CommonName, e.RevocationTime.UTC().Format(time.RFC3339))
			}
		}
	}
	return nil
}

func (res *Result) claim(r *Report, product anchor.Product) {
	tcb := func(t TCB) map[string]any {
		return map[string]any{"fmc": int(t.FMC), "bootloader": int(t.Bootloader), "tee": int(t.TEE), "snp": int(t.SNP), "microcode": int(t.Microcode)}
	}
	c := res.Claims
	c["snp.version"] = int(r.Version)
	c["snp.product"] = string(product)
	c["snp.guest-svn"] = int(r.GuestSVN)
	c["snp.vmpl"] = int(r.VMPL)
	c["snp.signing-key"] = r.Signer.String()
	c["snp.author-key-in-use"] = r.AuthorKeyInUse
	c["snp.policy.abi-major"] = int(r.Policy.ABIMajor)
	c["snp.policy.abi-minor"] = int(r.Policy.ABIMinor)
	c["snp.policy.smt"] = r.Policy.SMT
	c["snp.policy.migration-agent"] = r.Policy.MigrationAgent
	c["snp.policy.debug"] = r.Policy.Debug
	c["snp.policy.single-socket"] = r.Policy.SingleSocket
	c["snp.policy.cxl"] = r.Policy.CXL
	c["snp.policy.mem-aes-256-xts"] = r.Policy.MemAES256XTS
	c["snp.policy.rapl-disabled"] = r.Policy.RAPLDisabled
	c["snp.policy.ciphertext-hiding"] = r.Policy.CiphertextHiding
	c["snp.policy.page-swap-disabled"] = r.Policy.PageSwapDisabled
	c["snp.platform.smt"] = r.PlatformInfo.SMT
	c["snp.platform.tsme"] = r.PlatformInfo.TSME
	c["snp.platform.ecc"] = r.PlatformInfo.ECC
	c["snp.platform.rapl-disabled"] = r.PlatformInfo.RAPLDisabled
	c["snp.platform.ciphertext-hiding"] = r.PlatformInfo.CiphertextHiding
	c["snp.platform.alias-check-complete"] = r.PlatformInfo.AliasCheckComplete
	c["snp.platform.tio"] = r.PlatformInfo.TIO
	c["snp.measurement"] = hex.EncodeToString(r.Measurement[:])
	c["snp.host-data"] = hex.EncodeToString(r.HostData[:])
	c["snp.family-id"] = hex.EncodeToString(r.FamilyID[:])
	c["snp.image-id"] = hex.EncodeToString(r.ImageID[:])
	c["snp.id-key-digest"] = hex.EncodeToString(r.IDKeyDigest[:])
	c["snp.author-key-digest"] = hex.EncodeToString(r.AuthorKeyDigest[:])
	c["snp.report-id"] = hex.EncodeToString(r.ReportID[:])
	c["snp.report-id-ma"] = hex.EncodeToString(r.ReportIDMA[:])
	c["snp.chip-id"] = hex.EncodeToString(r.ChipID[:])
	c["snp.current-tcb"] = tcb(r.CurrentTCB)
	c["snp.reported-tcb"] = tcb(r.ReportedTCB)
	c["snp.committed-tcb"] = tcb(r.CommittedTCB)
	c["snp.launch-tcb"] = tcb(r.LaunchTCB)
	c["snp.current-firmware"] = r.Current.String()
	c["snp.committed-firmware"] = r.Committed.String()
	c["snp.launch-mitigations"] = fmt.Sprintf("%#x", r.LaunchMitigations)
	c["snp.current-mitigations"] = fmt.Sprintf("%#x", r.CurrentMitigations)
}
