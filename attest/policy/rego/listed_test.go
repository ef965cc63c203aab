package rego_test

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/policy"
)

// The policies for real machines accept none of which nobody says what it must
// have booted.
func TestShippedPoliciesDemandReferenceValues(t *testing.T) {
	zero := strings.Repeat("00", 32)
	listed := func() policy.Values {
		return policy.Values{
			SNP: &policy.SNPValues{Measurements: []string{measurement}},
			TPM: &policy.TPMValues{PCRs: map[string][]string{"4": {pcr7}, "8": {pcr7}, "9": {pcr7}, "11": {zero}, "12": {zero}, "13": {zero}}},
		}
	}
	missing := []string{"policy.snp.measurement", "policy.tpm.pcr11", "policy.tpm.pcr12", "policy.tpm.pcr13", "policy.tpm.pcr4", "policy.tpm.pcr8", "policy.tpm.pcr9"}
	for _, name := range []string{"production", "cpu-only"} {
		p, err := policy.Named(name)
		if err != nil {
			t.Fatal(err)
		}
		// What is looked at here is what the lists decide.
		decide := func(p policy.Policy, references []policy.References, claims map[string]string) []string {
			e := referenced()
			pcrs := map[string]string{"4": pcr7, "8": pcr7, "9": pcr7, "11": zero, "12": zero, "13": zero, "14": pcr14}
			for k, v := range claims {
				pcrs[k] = v
			}
			e.TPM.Claims["tpm.pcrs"] = pcrs
			ids := []string{}
			for _, c := range compiled(t, p, references...).Decide(e).All().Failed() {
				if c.ID == "policy.snp.measurement" || strings.HasPrefix(c.ID, "policy.tpm.pcr") {
					ids = append(ids, c.ID)
				}
			}
			slices.Sort(ids)
			return ids
		}
		if got := decide(p, nil, nil); !slices.Equal(got, missing) {
			t.Errorf("%s: nothing is listed, and these fail: %v", name, got)
		}
		_, s := sourced(t)
		keys, err := s.JWKS()
		if err != nil {
			t.Fatal(err)
		}
		p.Sources = []policy.Source{{Issuer: s.Issuer(), Keys: keys}}
		for _, row := range []struct {
			situation string
			change    func(*policy.Values)
			claims    map[string]string
			fails     []string
		}{
			{"all listed", nil, nil, []string{}},
			{"no measurement listed", func(v *policy.Values) { v.SNP = nil }, nil, missing[:1]},
			{"a list of measurements that is empty", func(v *policy.Values) { v.SNP.Measurements = []string{} }, nil, missing[:1]},
			{"another measurement listed", func(v *policy.Values) { v.SNP.Measurements = []string{strings.Repeat("00", 48)} }, nil, missing[:1]},
			{"no PCR listed", func(v *policy.Values) { v.TPM = nil }, nil, missing[1:]},
			{"PCR 14 alone listed", func(v *policy.Values) { v.TPM.PCRs = map[string][]string{"14": {pcr14}} }, nil, missing[1:]},
			{"one PCR not listed", func(v *policy.Values) { delete(v.TPM.PCRs, "9") }, nil, []string{"policy.tpm.pcr9"}},
			{"another kernel", nil, map[string]string{"9": zero}, []string{"policy.tpm.pcr9"}},
			{"another way to boot", nil, map[string]string{"11": pcr7}, []string{"policy.tpm.pcr11"}},
			{"another command line of a unified kernel", nil, map[string]string{"12": pcr7}, []string{"policy.tpm.pcr12"}},
			{"an extension of its initrd", nil, map[string]string{"13": pcr7}, []string{"policy.tpm.pcr13"}},
		} {
			v := listed()
			if row.change != nil {
				row.change(&v)
			}
			if v.SNP == nil && v.TPM == nil {
				t.Fatal("no values at all")
			}
			if got := decide(p, []policy.References{opened(t, p, s, time.Hour, v)}, row.claims); !slices.Equal(got, row.fails) {
				t.Errorf("%s: %s: failed %v, want %v", name, row.situation, got, row.fails)
			}
		}
	}
}

// Whether values must be listed is part of what a plan approves.
func TestDemandsAreInTheDigest(t *testing.T) {
	p, err := policy.Named("production")
	if err != nil {
		t.Fatal(err)
	}
	digest := func(change func(*policy.Policy)) string {
		b, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		q, err := policy.Parse(b)
		if err != nil {
			t.Fatal(err)
		}
		change(&q)
		d, err := q.Digest()
		if err != nil {
			t.Fatal(err)
		}
		return string(d)
	}
	seen := []string{digest(func(*policy.Policy) {}), digest(func(q *policy.Policy) { q.SNP.RequireMeasurement = false }), digest(func(q *policy.Policy) { q.TPM.RequirePCRs = q.TPM.RequirePCRs[1:] })}
	if slices.Sort(seen); len(slices.Compact(seen)) != 3 {
		t.Error("the digest does not cover what must be listed")
	}
}

// Protected PCIe mode alone is not enough: without the switches' evidence several
// GPUs are unsupported, whatever the document accepts.
func TestSeveralGPUsAreUnsupported(t *testing.T) {
	p, err := policy.Parse([]byte(strings.Replace(document, `"SPT"`, `"SPT","PPCIE"`, 1)))
	if err != nil {
		t.Fatal(err)
	}
	e := referenced()
	e.GPUs[0].Claims["gpu.feature-flag"], e.GPUs[0].Claims["gpu.protected-pcie"] = "PPCIE", true
	if f := compiled(t, p).Decide(e).All().Failed(); len(f) > 0 {
		t.Fatalf("one GPU: %+v", f)
	}
	e.GPUs, e.WantGPUs = append(e.GPUs, e.GPUs[0]), 2
	f := compiled(t, p).Decide(e).All().Failed()
	if len(f) != 1 || f[0].ID != "policy.gpu.several" || !strings.Contains(f[0].Hint, "NVSwitch evidence, which is not supported") {
		t.Errorf("two GPUs: %+v", f)
	}
}
