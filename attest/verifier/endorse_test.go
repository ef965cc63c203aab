package verifier_test

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/endorse/endorsetest"
	"github.com/coffer-run/coffer/attest/nvgpu"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/snp"
	"github.com/coffer-run/coffer/attest/verifier"
)

// endorsed is a world whose policy requires of SNP and GPU what production does,
// and whose machine hands out no certificates.
func endorsed(t *testing.T) (*world, *endorsetest.Services, *endorse.Library) {
	t.Helper()
	w := newWorld(t)
	production, err := policy.Named("production")
	if err != nil {
		t.Fatal(err)
	}
	cpu, gpu := *w.policy.SNP, *w.policy.GPU
	cpu.Require, gpu.Require = production.SNP.Require, production.GPU.Require
	w.policy.Name, w.policy.SNP, w.policy.GPU = "all-but-the-anchors", &cpu, &gpu
	s := endorsetest.New(t, w.vendor, w.now)
	lib := endorse.NewLibrary()
	c, err := endorse.New(endorse.Options{Store: lib, Anchors: w.anchors, Clock: func() time.Time { return w.now }, Fetch: s})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	w.v = w.verifier(func(o *verifier.Options) { o.Endorsements = c })
	return w, s, lib
}

func (w *world) bare() *attester {
	w.t.Helper()
	a := w.attester().collect()
	a.e.SNP.Certificates = nil
	return a
}

// All that production requires is met, but the anchors, and the result lists by
// digest what it was met with.
func TestEndorsedJobIsAffirmed(t *testing.T) {
	w, _, lib := endorsed(t)
	for range 2 {
		token, r := w.bare().appraise()
		if f := r.AllChecks().Failed(); len(f) > 0 {
			t.Fatalf("refused: %+v", f)
		}
		for _, id := range []string{snp.CheckCRL, nvgpu.CheckOCSP, nvgpu.CheckMeasurements} {
			if !slices.ContainsFunc(r.AllChecks(), func(c check.Check) bool { return c.ID == id && c.Outcome == check.Pass }) {
				t.Errorf("%s did not pass", id)
			}
		}
		v, err := w.relyingParty(token)
		if err != nil {
			t.Fatal(err)
		}
		used, err := endorse.UsedIn(v.Result())
		if err != nil {
			t.Fatal(err)
		}
		for _, u := range used {
			if _, ok := lib.ByDigest(u.Key, u.Digest); !ok {
				t.Errorf("%s is not held", u.Key)
			}
		}
		if len(used) != 11 {
			t.Errorf("used %d endorsements: %v", len(used), used)
		}
		if !r.Simulated || r.Submods["cpu0"].Status != receipt.Affirming {
			t.Errorf("simulated %v, cpu0 %s", r.Simulated, r.Submods["cpu0"].Status)
		}
	}
}

// Bad news, and no news, refuse.
func TestEndorsementsRefuse(t *testing.T) {
	for _, row := range []struct {
		situation string
		change    func(w *world, s *endorsetest.Services)
		by        string
		also      []string
	}{
		{"revocation list that is old", func(w *world, s *endorsetest.Services) {
			b, err := w.vendor.CRL(w.now.AddDate(0, -2, 0))
			if err != nil {
				w.t.Fatal(err)
			}
			s.Set(endorse.CRLKey(w.vendor.Chip().Product(), snp.VCEK), b)
		}, snp.CheckCRL, []string{"policy.snp.require"}},
		{"revoked signer of a manifest", func(w *world, s *endorsetest.Services) {
			p := s.Signer()
			s.Status(p.Cert, p.Issuer, simulate.OCSPOptions{Status: 1, ThisUpdate: w.now.Add(-time.Minute)})
		}, "gpu.driver-rim-ocsp", []string{"policy.gpu.require"}},
		{"services that are away", func(_ *world, s *endorsetest.Services) { s.Away(errors.New("connection refused")) },
			snp.CheckChain, []string{nvgpu.CheckOCSP, nvgpu.CheckDriverRIM, nvgpu.CheckVBIOSRIM, "policy.snp.require", "policy.gpu.require"}},
	} {
		t.Run(row.situation, func(t *testing.T) {
			w, s, _ := endorsed(t)
			row.change(w, s)
			w.bare().wantRefused(row.by, row.also...)
		})
	}
}

// What an appraisal used is handed out for its signed result, whole or not at all.
func TestEndorsementsOfAResult(t *testing.T) {
	w, _, lib := endorsed(t)
	token, _ := w.bare().appraise()
	b, err := w.v.Endorsements(token)
	if err != nil {
		t.Fatal(err)
	}
	items, err := endorse.Decode(b)
	if err != nil || len(items) != 11 {
		t.Fatalf("%d endorsements, %v", len(items), err)
	}
	for _, i := range items {
		if h, ok := lib.ByDigest(i.Key, i.Digest); !ok || h.Key != i.Key {
			t.Errorf("%s is not what was used", i.Key)
		}
	}
	for situation, token := range map[string]string{"nothing": "", "not a token": "x", "a changed result": token[:len(token)-4] + "AAAA"} {
		if _, err := w.v.Endorsements(token); !errors.Is(err, verifier.ErrMalformed) {
			t.Errorf("%s: %v", situation, err)
		}
	}
	// A replica that was started since, with an empty folder.
	c, err := endorse.New(endorse.Options{Store: endorse.NewLibrary(), Anchors: w.anchors, Clock: func() time.Time { return w.now }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	replica := w.verifier(func(o *verifier.Options) { o.Endorsements = c })
	var refused *check.Refusal
	if b, err := replica.Endorsements(token); !errors.As(err, &refused) || b != nil {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	// Without a cache there is nothing that a result could list.
	w = newWorld(t)
	token, _ = w.attester().collect().appraise()
	if b, err := w.v.Endorsements(token); err != nil || string(b) != "[]" {
		t.Errorf("%s, %v", b, err)
	}
}
