package rego_test

import (
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/policy/rego"
)

const good = `{"version":"coffer.run/policy/v1","name":"p","allowSimulated":false,
"snp":{"require":["snp.crl"],"allowDebug":false,"allowMigration":false,"maxVMPL":0,"products":["Genoa"],
"minimumTCB":{"Genoa":{"fmc":0,"bootloader":9,"tee":0,"snp":23,"microcode":72}},"measurements":["MEASUREMENT"]},
"tpm":{"require":[],"allowSelfMeasured":false,"classes":["discrete"],"pcr14":["PCR"]},
"gpu":{"require":["gpu.rim"],"featureFlags":["SPT"],"driverVersions":["550.90.07"],"vbiosVersions":["96.00.9F.00.01"]}}`

var (
	measurement = strings.Repeat("ab", 48)
	pcr14       = strings.Repeat("cd", 32)
	document    = strings.NewReplacer("MEASUREMENT", measurement, "PCR", pcr14).Replace(good)
)

func compiled(t testing.TB, p policy.Policy, references ...policy.References) *rego.Policy {
	t.Helper()
	out, err := rego.Compile(p, references...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func evidence() policy.Evidence {
	pass := func(ids ...string) (l check.List) {
		for _, id := range ids {
			l.Pass(id, "")
		}
		return l
	}
	return policy.Evidence{
		SNP: &policy.Device{Checks: pass("snp.crl"), Claims: map[string]any{
			"snp.product": "Genoa", "snp.policy.debug": false, "snp.policy.migration-agent": false, "snp.vmpl": 0, "snp.measurement": measurement,
			"snp.reported-tcb": map[string]any{"fmc": 0, "bootloader": 9, "tee": 0, "snp": 23, "microcode": 72},
		}},
		TPM: &policy.Device{Claims: map[string]any{
			"tpm.trust-class": "discrete", "tpm.measured-by": []string{"firmware"}, "tpm.pcrs": map[string]string{"14": pcr14},
		}},
		GPUs: []policy.Device{{Checks: pass("gpu.rim"), Claims: map[string]any{
			"x-nvidia-gpu-driver-version": "550.90.07", "x-nvidia-gpu-vbios-version": "96.00.9f.00.01", "gpu.feature-flag": "SPT",
		}}},
		WantGPUs: 1,
	}
}

func TestDecideAccepts(t *testing.T) {
	p, err := policy.Parse([]byte(document))
	if err != nil {
		t.Fatal(err)
	}
	d := compiled(t, p).Decide(evidence())
	for _, c := range d.All() {
		if c.Outcome != check.Pass {
			t.Errorf("%s is %q: %s, %s", c.ID, c.Outcome, c.Expected, c.Found)
		}
	}
}

func TestDecideRefuses(t *testing.T) {
	type ev = policy.Evidence
	for _, row := range []struct {
		situation string
		spoil     func(*ev)
		by        string
	}{
		{"no SEV-SNP report", func(e *ev) { e.SNP = nil }, "policy.snp.required"},
		{"SEV-SNP report failed to collect", func(e *ev) { e.Failures = map[string]string{"snp": "device gone"} }, "policy.snp.required"},
		{"no TPM quote", func(e *ev) { e.TPM = nil }, "policy.tpm.required"},
		{"TPM quote failed to collect", func(e *ev) { e.Failures = map[string]string{"tpm": "busy"} }, "policy.tpm.required"},
		{"no GPU", func(e *ev) { e.GPUs = nil }, "policy.gpu.count"},
		{"two GPUs where one was asked", func(e *ev) { e.GPUs = append(e.GPUs, e.GPUs[0]) }, "policy.gpu.count"},
		{"a GPU failed to collect", func(e *ev) { e.Failures = map[string]string{"gpu": "lost"} }, "policy.gpu.count"},
		{"a GPU where none was asked", func(e *ev) { e.WantGPUs = 0 }, "policy.gpu.count"},
		{"several GPUs", func(e *ev) { e.WantGPUs = 2; e.GPUs = append(e.GPUs, e.GPUs[0]) }, "policy.gpu.several"},
		{"simulated chip", func(e *ev) { e.SNP.Simulated = true }, "policy.snp.simulated"},
		{"simulated TPM", func(e *ev) { e.TPM.Simulated = true }, "policy.tpm.simulated"},
		{"simulated GPU", func(e *ev) { e.GPUs[0].Simulated = true }, "policy.gpu.simulated"},
		{"debugging on", func(e *ev) { e.SNP.Claims["snp.policy.debug"] = true }, "policy.snp.debug"},
		{"no word on debugging", func(e *ev) { delete(e.SNP.Claims, "snp.policy.debug") }, "policy.snp.debug"},
		{"debugging is a text", func(e *ev) { e.SNP.Claims["snp.policy.debug"] = "false" }, "policy.snp.debug"},
		{"migration agent", func(e *ev) { e.SNP.Claims["snp.policy.migration-agent"] = true }, "policy.snp.migration"},
		{"less privileged level", func(e *ev) { e.SNP.Claims["snp.vmpl"] = 1 }, "policy.snp.vmpl"},
		{"negative level", func(e *ev) { e.SNP.Claims["snp.vmpl"] = -1 }, "policy.snp.vmpl"},
		{"no level", func(e *ev) { delete(e.SNP.Claims, "snp.vmpl") }, "policy.snp.vmpl"},
		{"another product", func(e *ev) {
			e.SNP.Claims["snp.product"] = "Milan"
		}, "policy.snp.product"},
		{"no product", func(e *ev) { delete(e.SNP.Claims, "snp.product") }, "policy.snp.product"},
		{"old microcode", func(e *ev) { e.SNP.Claims["snp.reported-tcb"].(map[string]any)["microcode"] = 71 }, "policy.snp.minimum-tcb"},
		{"TCB without a component", func(e *ev) { delete(e.SNP.Claims["snp.reported-tcb"].(map[string]any), "snp") }, "policy.snp.minimum-tcb"},
		{"no TCB", func(e *ev) { delete(e.SNP.Claims, "snp.reported-tcb") }, "policy.snp.minimum-tcb"},
		{"another launch digest", func(e *ev) { e.SNP.Claims["snp.measurement"] = strings.Repeat("ac", 48) }, "policy.snp.measurement"},
		{"no launch digest", func(e *ev) { delete(e.SNP.Claims, "snp.measurement") }, "policy.snp.measurement"},
		{"a required check that nobody made", func(e *ev) { e.SNP.Checks = nil }, "policy.snp.require"},
		{"a required check that was skipped", func(e *ev) { e.SNP.Checks = nil; e.SNP.Checks.Skip("snp.crl", "no list") }, "policy.snp.require"},
		{"a required check that failed", func(e *ev) { e.GPUs[0].Checks = nil; e.GPUs[0].Checks.Fail("gpu.rim", "", "", "") }, "policy.gpu.require"},
		{"a required check of no known outcome", func(e *ev) { e.GPUs[0].Checks = check.List{{ID: "gpu.rim"}} }, "policy.gpu.require"},
		{"trust class that is not listed", func(e *ev) { e.TPM.Claims["tpm.trust-class"] = "hypervisor" }, "policy.tpm.trust-class"},
		{"no trust class", func(e *ev) { delete(e.TPM.Claims, "tpm.trust-class") }, "policy.tpm.trust-class"},
		{"self-measured log", func(e *ev) { e.TPM.Claims["tpm.measured-by"] = []string{"firmware", "self"} }, "policy.tpm.self-measured"},
		{"nothing measured", func(e *ev) { e.TPM.Claims["tpm.measured-by"] = []string{} }, "policy.tpm.self-measured"},
		{"no word on who measured", func(e *ev) { delete(e.TPM.Claims, "tpm.measured-by") }, "policy.tpm.self-measured"},
		{"another value of PCR 14", func(e *ev) { e.TPM.Claims["tpm.pcrs"] = map[string]string{"14": strings.Repeat("00", 32)} }, "policy.tpm.pcr14"},
		{"PCR 14 was not quoted", func(e *ev) { e.TPM.Claims["tpm.pcrs"] = map[string]string{"0": pcr14} }, "policy.tpm.pcr14"},
		{"GPU in another mode", func(e *ev) { e.GPUs[0].Claims["gpu.feature-flag"] = "MPT" }, "policy.gpu.feature-flag"},
		{"GPU that does not say its mode", func(e *ev) { delete(e.GPUs[0].Claims, "gpu.feature-flag") }, "policy.gpu.feature-flag"},
		{"another driver", func(e *ev) { e.GPUs[0].Claims["x-nvidia-gpu-driver-version"] = "535.1" }, "policy.gpu.driver-version"},
		{"no driver version", func(e *ev) { delete(e.GPUs[0].Claims, "x-nvidia-gpu-driver-version") }, "policy.gpu.driver-version"},
		{"another VBIOS", func(e *ev) { e.GPUs[0].Claims["x-nvidia-gpu-vbios-version"] = "96.00.00.00.00" }, "policy.gpu.vbios-version"},
		{"claims that are not JSON", func(e *ev) { e.TPM.Claims["x"] = func() {} }, "policy.tpm.claims"},
	} {
		t.Run(row.situation, func(t *testing.T) {
			p, err := policy.Parse([]byte(document))
			if err != nil {
				t.Fatal(err)
			}
			e := evidence()
			row.spoil(&e)
			var ids []string
			for _, c := range compiled(t, p).Decide(e).All().Failed() {
				if c.ID == row.by {
					return
				}
				ids = append(ids, c.ID)
			}
			t.Fatalf("failed %v, want %s", ids, row.by)
		})
	}
}

func TestZeroPolicyRefuses(t *testing.T) {
	if f := new(rego.Policy).Decide(evidence()).All().Failed(); len(f) == 0 {
		t.Fatal("the zero policy accepts")
	}
	if f := (*rego.Policy)(nil).Decide(evidence()).All().Failed(); len(f) == 0 {
		t.Fatal("no policy accepts")
	}
	if _, err := rego.Compile(policy.Policy{}); err == nil {
		t.Fatal("the zero policy compiles")
	}
}

func TestUnlistedIsNotPassed(t *testing.T) {
	p, err := policy.Parse([]byte(document))
	if err != nil {
		t.Fatal(err)
	}
	p.SNP.Measurements, p.SNP.MinimumTCB = nil, nil
	p.TPM.PCR14, p.TPM.AllowSelfMeasured = nil, true
	p.GPU.DriverVersions, p.GPU.VBIOSVersions = nil, nil
	skipped := map[string]bool{}
	all := compiled(t, p).Decide(evidence()).All()
	for _, c := range all {
		if c.Outcome == check.NotChecked {
			skipped[c.ID] = true
		}
	}
	for _, id := range []string{"policy.snp.measurement", "policy.snp.minimum-tcb", "policy.tpm.pcr14", "policy.tpm.self-measured", "policy.gpu.driver-version", "policy.gpu.vbios-version"} {
		if !skipped[id] {
			t.Errorf("%s is not reported as not checked", id)
		}
	}
	if f := all.Failed(); len(f) > 0 {
		t.Errorf("failed %+v", f)
	}
}

func TestCPUOnlyRefusesGPUPlans(t *testing.T) {
	p, err := policy.Named("cpu-only")
	if err != nil {
		t.Fatal(err)
	}
	e := evidence()
	e.SNP.Claims["snp.product"] = string(anchor.Genoa)
	for _, c := range compiled(t, p).Decide(e).All().Failed() {
		if c.ID == "policy.gpu.count" {
			return
		}
	}
	t.Fatal("a plan with a GPU is acceptable")
}

// PCR 14 has a place in the document: that it is empty lists nothing.
func TestDemandedPCRWithoutValuesRefuses(t *testing.T) {
	p, err := policy.Parse([]byte(document))
	if err != nil {
		t.Fatal(err)
	}
	p.TPM.PCR14, p.TPM.RequirePCRs = nil, []string{"14"}
	f := compiled(t, p).Decide(evidence()).All().Failed()
	if len(f) != 1 || f[0].ID != "policy.tpm.pcr14" {
		t.Errorf("failed %+v", f)
	}
}
