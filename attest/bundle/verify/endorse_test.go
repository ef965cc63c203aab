package verify_test

import (
	"crypto/x509"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/endorse/endorsetest"
	"github.com/coffer-run/coffer/attest/nvgpu"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/snp"
)

func outcome(r verify.Report, id string) check.Outcome {
	i := slices.IndexFunc(r.Checks(), func(c check.Check) bool { return c.ID == id })
	if i < 0 {
		return ""
	}
	return r.Checks()[i].Outcome
}

// endorsed is a lab whose verifier has what vendors published, revoked certificates
// of AMD's included.
func endorsed(t *testing.T, revoked ...*big.Int) (*bundletest.Lab, *endorsetest.Services) {
	t.Helper()
	l := newLab(t)
	v, err := machine()
	if err != nil {
		t.Fatal(err)
	}
	s := endorsetest.New(t, v, clock)
	crl, err := v.CRL(clock.Add(-time.Hour), revoked...)
	if err != nil {
		t.Fatal(err)
	}
	s.Set(endorse.CRLKey(v.Chip().Product(), snp.VCEK), crl)
	c, err := endorse.New(endorse.Options{Store: endorse.NewLibrary(), Anchors: l.Anchors, Clock: func() time.Time { return l.Now }, Fetch: s})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	if err := l.Endorse(c); err != nil {
		t.Fatal(err)
	}
	return l, s
}

// byEndorsements are checks that need what vendors publish.
var byEndorsements = []string{snp.CheckCRL, nvgpu.CheckOCSP, nvgpu.CheckMeasurements, "gpu.driver-rim-ocsp", "gpu.vbios-rim-signature"}

// A bundle carries what its appraisal used, and is verified by it alone: no
// network, no export, the time of the job as the clock.
func TestCarriedEndorsements(t *testing.T) {
	l, _ := endorsed(t)
	j := newJob(t, l, bundletest.Options{})
	file := build(t, j)
	r := verify.Verify(file, pinned(t, l))
	if r.Verdict != verify.Verified || outcome(r, "endorsements.listed") != check.Pass {
		t.Fatalf("%s: %v", r.Verdict, failedIDs(r))
	}
	for _, id := range byEndorsements {
		if got := outcome(r, id); got != check.Pass {
			t.Errorf("%s: %s", id, got)
		}
	}

	t.Run("no keys pinned", func(t *testing.T) {
		// The bundle's maker chose the lists and answers; manifests are what their
		// signatures say.
		r := verify.Verify(file, verify.Trust{Anchors: l.Anchors})
		for id, want := range map[string]check.Outcome{
			snp.CheckCRL: check.NotChecked, nvgpu.CheckOCSP: check.NotChecked, "gpu.driver-rim-ocsp": check.NotChecked,
			"endorsements.current": check.NotChecked, nvgpu.CheckMeasurements: check.Pass,
		} {
			if got := outcome(r, id); got != want {
				t.Errorf("%s: %s, want %s", id, got, want)
			}
		}
		if r.Verdict == verify.Failed {
			t.Error(failedIDs(r))
		}
	})
	t.Run("a clock years later", func(t *testing.T) {
		trust := pinned(t, l)
		trust.At = clock.AddDate(3, 0, 0)
		if r := verify.Verify(file, trust); r.Verdict != verify.Failed || outcome(r, snp.CheckCRL) != check.Fail {
			t.Errorf("%s", r.Verdict)
		}
	})
	t.Run("left out", func(t *testing.T) {
		delete(j.Parts, bundle.Endorsements)
		r := verify.Verify(build(t, j), pinned(t, l))
		if r.Verdict != verify.Verified || outcome(r, "endorsements.listed") != check.NotChecked || outcome(r, snp.CheckCRL) != check.NotChecked {
			t.Errorf("%s: %v", r.Verdict, failedIDs(r))
		}
	})
}

// The holder signs what the agent puts into a bundle; only what the verifier
// used counts. One check stands in each attacker's way.
func TestCarriedEndorsementsAreTampered(t *testing.T) {
	l, s := endorsed(t)
	v, err := machine()
	if err != nil {
		t.Fatal(err)
	}
	older, err := v.CRL(clock.Add(-2 * time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	parse := func(k endorse.Key, b []byte) endorse.Item {
		i, err := endorse.Parse(k.Kind, k.ID, b)
		if err != nil {
			t.Fatal(err)
		}
		return i
	}
	crl := parse(endorse.CRLKey(v.Chip().Product(), snp.VCEK), older)
	vek := endorse.Item{}
	for k, b := range s.Answers() {
		if k.Kind == endorse.VEK {
			vek = parse(k, b)
		}
	}
	j := newJob(t, l, bundletest.Options{})
	good := j.Parts[bundle.Endorsements]
	carry := func(change func([]endorse.Item) []endorse.Item) func() {
		return func() {
			if err := j.Carry(change); err != nil {
				t.Fatal(err)
			}
		}
	}
	part := func(change func(string) string) func() {
		return func() { j.Parts[bundle.Endorsements] = []byte(change(string(good))) }
	}
	for _, row := range []struct {
		situation string
		change    func()
		fails     string
	}{
		{"an older list in the list's place", carry(func(items []endorse.Item) []endorse.Item {
			i := slices.IndexFunc(items, func(i endorse.Item) bool { return i.Key.Kind == endorse.CRL })
			items[i] = crl
			return items
		}), "endorsements.listed"},
		{"an older list besides", carry(func(items []endorse.Item) []endorse.Item { return append(items, crl) }), "endorsements.listed"},
		{"one left out", carry(func(items []endorse.Item) []endorse.Item { return items[1:] }), "endorsements.listed"},
		{"one that was not used", carry(func(items []endorse.Item) []endorse.Item { return append(items, vek) }), "endorsements.listed"},
		{"the first twice", part(func(s string) string { return "[" + s[1:strings.Index(s, "},")+2] + s[1:] }), "endorsements.form"},
		{"another name for one", part(func(s string) string { return strings.Replace(s, "NV_GPU_DRIVER_GH100_", "NV_GPU_DRIVER_GH100_1", 1) }), "endorsements.form"},
		{"a kind that there is not", part(func(s string) string { return strings.Replace(s, `"kind":"crl"`, `"kind":"law"`, 1) }), "endorsements.form"},
		{"a bit of one", part(func(s string) string {
			// Within the base64 of the first body.
			i := strings.Index(s, `"body":"`) + 200
			return s[:i] + string('A'+(s[i]+1)%16) + s[i+1:]
		}), ""},
		{"nothing", part(func(string) string { return "" }), "endorsements.form"},
		{"an empty list", part(func(string) string { return "[]" }), "endorsements.listed"},
		{"a space", part(func(s string) string { return s + " " }), "endorsements.form"},
	} {
		t.Run(row.situation, func(t *testing.T) {
			j.Parts[bundle.Endorsements] = slices.Clone(good)
			row.change()
			r := verify.Verify(build(t, j), pinned(t, l))
			f := failedIDs(r)
			if r.Verdict != verify.Failed || len(f) != 1 || row.fails != "" && f[0] != row.fails || !strings.HasPrefix(f[0], "endorsements.") {
				t.Errorf("%s: failed %v, want %s", r.Verdict, f, row.fails)
			}
			if row.fails == "endorsements.listed" && outcome(r, snp.CheckCRL) == check.Pass {
				t.Error("the list counted")
			}
		})
	}
	j.Parts[bundle.Endorsements] = good
	whole := build(t, j)
	for situation, change := range map[string]func(*bundle.Bundle){
		"one byte changed after signing": func(b *bundle.Bundle) { b.Parts[bundle.Endorsements][len(good)/2] ^= 1 },
		"taken out after signing":        func(b *bundle.Bundle) { delete(b.Parts, bundle.Endorsements) },
	} {
		t.Run(situation, func(t *testing.T) {
			b, err := bundle.Parse(whole)
			if err != nil {
				t.Fatal(err)
			}
			change(b)
			file, err := plan.Canonical(b)
			if err != nil {
				t.Fatal(err)
			}
			if f := failedIDs(verify.Verify(file, pinned(t, l))); !slices.Contains(f, "part.endorsements") {
				t.Errorf("failed %v", f)
			}
		})
	}
}

// The list that led to the refusal is in the record of it.
func TestCarriedEndorsementsOfARefusal(t *testing.T) {
	v, err := machine()
	if err != nil {
		t.Fatal(err)
	}
	_, ask, _ := v.Chip().Certificates()
	c, err := x509.ParseCertificate(ask)
	if err != nil {
		t.Fatal(err)
	}
	l, _ := endorsed(t, c.SerialNumber)
	j := newJob(t, l, bundletest.Options{})
	r := verify.Verify(build(t, j), pinned(t, l))
	if r.Verdict != verify.Verified || r.Outcome.State != bundle.Refused || outcome(r, "endorsements.listed") != check.Pass || outcome(r, "evidence.refusal") != check.Pass {
		t.Errorf("%s, %s: %v", r.Verdict, r.Outcome.State, failedIDs(r))
	}
	if err := j.Carry(func(items []endorse.Item) []endorse.Item { return items[1:] }); err != nil {
		t.Fatal(err)
	}
	if r := verify.Verify(build(t, j), pinned(t, l)); r.Verdict != verify.Failed || outcome(r, "endorsements.listed") != check.Fail {
		t.Errorf("%s: %v", r.Verdict, failedIDs(r))
	}
}

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
		s.Set(endorse.CRLKey(v.Chip().Product(), snp.VCEK), crl)
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
