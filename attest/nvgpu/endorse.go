package nvgpu

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
)

// ErrNotOffered is a Source's answer for a kind of endorsement that it does not
// have at all. What depends on it is reported as not checked. Every other error
// is a failed check: an outage does not turn into acceptance.
var ErrNotOffered = errors.New("this kind of endorsement is not offered")

// Source finds what the vendor publishes about a GPU.
//
// Answers need not be trusted: they are verified here. A Source MUST bound what
// it reads and MUST end when ctx does. It MAY answer from a cache; whether an
// answer is current is checked against the clock of the appraisal.
type Source interface {
	// RIM returns the reference integrity manifest of that id, in XML.
	RIM(ctx context.Context, id string) ([]byte, error)
	// OCSP returns the status of cert in DER, with the CertID by SHA-384.
	OCSP(ctx context.Context, cert, issuer *x509.Certificate) ([]byte, error)
}

// DriverRIM returns the id of the manifest of a driver.
func DriverRIM(r *Report) string { return "NV_GPU_DRIVER_" + supportedModel + "_" + r.DriverVersion }

// VBIOSRIM returns the id of the manifest of a VBIOS.
func VBIOSRIM(r *Report) string {
	return strings.ToUpper("NV_GPU_VBIOS_" + r.Project + "_" + r.ProjectSKU + "_" + r.ChipSKU + "_" + strings.ReplaceAll(r.VBIOSVersion, ".", ""))
}

// Endorsements is where an appraisal gets what the vendor publishes. The zero
// value has nothing, and what depends on it is reported as not checked.
type Endorsements struct {
	Source Source
	// Memory spares verifying the same content twice. It may be nil.
	Memory *Memory
}

// nvdec0 is the measurement of the video decoder's firmware.
const nvdec0 = 35

// Mismatch is a measurement that has none of the values that it should.
type Mismatch struct {
	Index   int      `json:"index"`
	Source  string   `json:"measurementSource"`
	Golden  []string `json:"goldenValue"`
	Runtime string   `json:"runtimeValue"`
}

// AppraiseWith is Appraise with what the vendor publishes: the status of every
// certificate and the reference values of driver and VBIOS.
func AppraiseWith(ctx context.Context, ev Evidence, want Want, anchors anchor.Set, e Endorsements, now time.Time) Result {
	return appraise(ctx, ev, want, anchors, e, now)
}

// appraiseOCSP asks for the status of every certificate of a chain between leaf
// and root, and of the leaf itself if first is 0.
func (res *Result) appraiseOCSP(ctx context.Context, id string, e Endorsements, chain []*x509.Certificate, first int, now time.Time) {
	l := &res.Checks
	if e.Source == nil {
		l.Skip(id, "no status of the certificates was asked for")
		return
	}
	var bad []string
	for i := first; i < len(chain)-1; i++ {
		der, err := e.Source.OCSP(ctx, chain[i], chain[i+1])
		if errors.Is(err, ErrNotOffered) {
			l.Skip(id, "the status of certificates is not offered here")
			return
		}
		if err == nil {
			var s *status
			if s, err = e.Memory.status(der, chain[i], chain[i+1]); err == nil {
				err = s.check(now)
			}
		}
		if err != nil {
			bad = append(bad, chain[i].Subject.CommonName+": "+err.Error())
		}
	}
	if len(bad) > 0 {
		l.Fail(id, "the status good, at "+now.UTC().Format(time.RFC3339), strings.Join(bad, "; "), "a revoked certificate, also one on hold, is not to be trusted; for an outdated answer, ask again")
		return
	}
	l.Pass(id, fmt.Sprintf("%d certificates are good", len(chain)-1-first))
}

// appraiseRIMs compares the measurements with the vendor's reference values.
func (res *Result) appraiseRIMs(ctx context.Context, anchors anchor.Set, e Endorsements, now time.Time) {
	l, r, c := &res.Checks, res.Report, res.Claims
	if e.Source == nil {
		res.skipRIMs("no reference values were asked for")
		return
	}
	driver := res.appraiseRIM(ctx, "driver", DriverRIM(r), r.DriverVersion, anchors, e, now)
	vbios := res.appraiseRIM(ctx, "vbios", VBIOSRIM(r), r.VBIOSVersion, anchors, e, now)
	if driver == nil || vbios == nil {
		l.Skip(CheckMeasurements, "there are no reference values to compare with")
		return
	}
	var both []string
	for i := range blockCount {
		if driver.golden[i] != nil && vbios.golden[i] != nil {
			both = append(both, fmt.Sprint(i))
		}
	}
	c["x-nvidia-gpu-vbios-index-no-conflict"] = len(both) == 0
	if len(both) > 0 {
		l.Fail(CheckRIMConflict, "measurements of which the driver's or the VBIOS's manifest speaks, not both", strings.Join(both, ", "), "")
		l.Skip(CheckMeasurements, "the manifests contradict each other")
		return
	}
	l.Pass(CheckRIMConflict, "")

	var mismatches []Mismatch
	compared := 0
	for i := range blockCount {
		source, golden := "driver", driver.golden[i]
		if golden == nil {
			source, golden = "vbios", vbios.golden[i]
		}
		if golden == nil || i == nvdec0 && !r.NVDEC0Enabled {
			continue
		}
		compared++
		match := false
		m := Mismatch{Index: i, Source: source, Runtime: hex.EncodeToString(r.Measurements[i][:])}
		for _, g := range golden {
			match = match || g == r.Measurements[i]
			m.Golden = append(m.Golden, hex.EncodeToString(g[:]))
		}
		if !match {
			mismatches = append(mismatches, m)
		}
	}
	if len(mismatches) > 0 {
		indexes := make([]string, len(mismatches))
		for i, m := range mismatches {
			indexes[i] = fmt.Sprint(m.Index)
		}
		c["measres"] = "fail"
		c["x-nvidia-mismatch-measurement-records"] = mismatches
		l.Fail(CheckMeasurements, "the reference values of driver and VBIOS", "other values at "+strings.Join(indexes, ", "), "the GPU runs firmware or settings that the vendor does not vouch for; a reboot of the node and a current driver are worth a try")
		return
	}
	// What a match proves, in the field's words: debug is off, boot was secure.
	c["measres"], c["secboot"], c["dbgstat"] = "success", true, "disabled"
	l.Pass(CheckMeasurements, fmt.Sprintf("%d measurements", compared))
}

func (res *Result) skipRIMs(why string) {
	for _, id := range []string{CheckDriverRIM, CheckVBIOSRIM, CheckMeasurements} {
		res.Checks.Skip(id, why)
	}
}

// appraiseRIM fetches and verifies one manifest. It returns nil if a check of
// it did not pass.
func (res *Result) appraiseRIM(ctx context.Context, kind, id, version string, anchors anchor.Set, e Endorsements, now time.Time) *rim {
	l, c := &res.Checks, res.Claims
	check := map[string]string{"driver": CheckDriverRIM, "vbios": CheckVBIOSRIM}[kind]
	claim := func(name string, v bool) { c["x-nvidia-gpu-"+kind+"-rim-"+name] = v }
	b, err := e.Source.RIM(ctx, id)
	if errors.Is(err, ErrNotOffered) {
		l.Skip(check, "reference values are not offered here")
		return nil
	}
	claim("fetched", err == nil)
	if err != nil {
		l.Fail(check, "the manifest "+id, err.Error(), "import the vendor's manifest, or use a driver and VBIOS for which there is one")
		return nil
	}
	m, err := e.Memory.rim(b)
	var form rimFormError
	switch {
	case errors.As(err, &form):
		l.Fail(check, "the manifest "+id, err.Error(), "")
		return nil
	case err != nil:
		l.Pass(check, id)
		claim("signature-verified", false)
		l.Fail(check+suffixSignature, "a signature over the manifest", err.Error(), "the manifest was changed")
		return nil
	}
	l.Pass(check, id)
	claim("signature-verified", true)
	l.Pass(check+suffixSignature, "")

	ok := true
	err = checkRIMChain(m.chain, anchors)
	claim("cert-chain", err == nil)
	if err != nil {
		l.Fail(check+suffixChain, "a chain from the manifest's signer to the pinned root", err.Error(), "")
		ok = false
	} else {
		l.Pass(check+suffixChain, m.chain[0].Subject.CommonName)
	}
	if err := anchor.CheckTimes(m.chain, now); err != nil {
		l.Fail(check+suffixValidity, "certificates that are valid at "+now.UTC().Format(time.RFC3339), err.Error(), "signers live two years: get the manifest again, the vendor signs it anew")
		ok = false
	} else {
		l.Pass(check+suffixValidity, "")
	}
	if ok {
		before := len(l.Failed())
		res.appraiseOCSP(ctx, check+suffixOCSP, e, m.chain, 0, now)
		ok = len(l.Failed()) == before
	}

	same := m.product == supportedModel && strings.EqualFold(m.version, version)
	claim("version-match", same)
	if same {
		l.Pass(check+suffixVersion, m.version)
	} else {
		l.Fail(check+suffixVersion, supportedModel+" "+version, m.product+" "+m.version, "")
		ok = false
	}
	claim("measurements-available", len(m.golden) > 0)
	if len(m.golden) == 0 {
		l.Fail(check+suffixValues, "reference values", "none that is active", "")
		ok = false
	}
	if !ok {
		return nil
	}
	return m
}
