package verify_test

import (
	"crypto/x509"
	"math/big"
	"slices"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/endorse/endorsetest"
	"github.com/coffer-run/coffer/attest/nvgpu"
	"github.com/coffer-run/coffer/attest/snp"
)

// Years later, by what was exported: checks are made that are the verifier's
// word without it, at the time of the job.
func TestWithEndorsements(t *testing.T) {
	l := newLab(t)
	v, err := machine()
	if err != nil {
		t.Fatal(err)
	}
	file := build(t, newJob(t, l, bundletest.Options{}))
	library := func(revoked ...*big.Int) *endorse.Library {
		crl, err := v.CRL(clock.Add(-time.Hour), revoked...)
		if err != nil {
			t.Fatal(err)
		}
		s := endorsetest.New(t, v, clock)
		s.Set(endorse.CRLKey(v.Chip().Product()), crl)
		lib := endorse.NewLibrary()
		for k, b := range s.Answers() {
			i, err := endorse.Parse(k.Kind, k.ID, b)
			if err != nil {
				t.Fatal(err)
			}
			if err := lib.Put(i, clock); err != nil {
				t.Fatal(err)
			}
		}
		return lib
	}
	outcome := func(r verify.Report, id string) check.Outcome {
		i := slices.IndexFunc(r.Checks(), func(c check.Check) bool { return c.ID == id })
		if i < 0 {
			return ""
		}
		return r.Checks()[i].Outcome
	}
	trust := pinned(t, l)
	if r := verify.Verify(file, trust); outcome(r, snp.CheckCRL) != check.NotChecked || outcome(r, nvgpu.CheckMeasurements) != check.NotChecked {
		t.Error("checked without anything to check by")
	}
	trust.Endorsements = library()
	r := verify.Verify(file, trust)
	if r.Verdict != verify.Verified {
		t.Errorf("%s: %v", r.Verdict, failedIDs(r))
	}
	for _, id := range []string{snp.CheckCRL, nvgpu.CheckOCSP, nvgpu.CheckMeasurements, "gpu.driver-rim-ocsp"} {
		if got := outcome(r, id); got != check.Pass {
			t.Errorf("%s: %s", id, got)
		}
	}

	late := trust
	late.At = clock.AddDate(3, 0, 0)
	if r := verify.Verify(file, late); r.Verdict != verify.Failed || outcome(r, snp.CheckCRL) != check.Fail {
		t.Errorf("%s at a clock years later", r.Verdict)
	}
	_, ask, _ := v.Chip().Certificates()
	c, err := x509.ParseCertificate(ask)
	if err != nil {
		t.Fatal(err)
	}
	trust.Endorsements = library(c.SerialNumber)
	if r := verify.Verify(file, trust); r.Verdict != verify.Failed || outcome(r, snp.CheckCRL) != check.Fail {
		t.Errorf("%s with a revoked issuer", r.Verdict)
	}
}
