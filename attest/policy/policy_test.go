package policy_test

import (
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/policy"
)

func TestNamed(t *testing.T) {
	seen := map[string]bool{}
	for _, n := range policy.Names() {
		p, err := policy.Named(n)
		if err != nil {
			t.Fatal(err)
		}
		d, err := p.Digest()
		if err != nil || d.Bytes() == nil || seen[string(d)] {
			t.Errorf("%s: digest %q, %v", n, d, err)
		}
		seen[string(d)] = true
		if p.AllowSimulated != (n == "simulation") {
			t.Errorf("%s: simulation is allowed: %v", n, p.AllowSimulated)
		}
		if p.SNP.AllowDebug || p.SNP.AllowMigration {
			t.Errorf("%s allows debugging or migration", n)
		}
	}
	for _, n := range []string{"", "other", "../policy", "simulation.json"} {
		if _, err := policy.Named(n); err == nil {
			t.Errorf("policy %q exists", n)
		}
	}
}

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

func TestParseRefuses(t *testing.T) {
	if _, err := policy.Parse([]byte(document)); err != nil {
		t.Fatal(err)
	}
	for situation, edit := range map[string][2]string{
		"unknown version":                   {"policy/v1", "policy/v2"},
		"unknown field":                     {`"allowSimulated":false`, `"allowSimulated":false,"allowEverything":true`},
		"no name":                           {`"name":"p"`, `"name":""`},
		"name that is a path":               {`"name":"p"`, `"name":"../p"`},
		"no product":                        {`"products":["Genoa"]`, `"products":[]`},
		"unknown product":                   {`"products":["Genoa"]`, `"products":["Rome"]`},
		"minimum for another product":       {`"minimumTCB":{"Genoa"`, `"minimumTCB":{"Milan"`},
		"VMPL that does not exist":          {`"maxVMPL":0`, `"maxVMPL":4`},
		"malformed check":                   {`["snp.crl"]`, `["snp crl"]`},
		"short measurement":                 {measurement, "abab"},
		"upper-case measurement":            {measurement, strings.ToUpper(measurement)},
		"no trust class":                    {`"classes":["discrete"]`, `"classes":[]`},
		"unknown trust class":               {`"classes":["discrete"]`, `"classes":["any"]`},
		"software TPM without simulation":   {`"classes":["discrete"]`, `"classes":["software"]`},
		"PCR value of another length":       {pcr14, "cdcd"},
		"PCR that there is not":             {`"pcr14"`, `"requirePCRs":["24"],"pcr14"`},
		"PCR with a sign":                   {`"pcr14"`, `"requirePCRs":["+4"],"pcr14"`},
		"no feature flag":                   {`"featureFlags":["SPT"]`, `"featureFlags":[]`},
		"unknown feature flag":              {`"featureFlags":["SPT"]`, `"featureFlags":["DEVTOOLS"]`},
		"malformed driver version":          {`"550.90.07"`, `"latest"`},
		"data after the policy":             {`"vbiosVersions":["96.00.9F.00.01"]}}`, `"vbiosVersions":["96.00.9F.00.01"]}}{}`},
		"more values than anybody compares": {`"550.90.07"`, `"1"` + strings.Repeat(`,"1"`, 256)},
	} {
		text := strings.Replace(document, edit[0], edit[1], 1)
		if text == document {
			t.Fatalf("%s: nothing was changed", situation)
		}
		if _, err := policy.Parse([]byte(text)); err == nil {
			t.Errorf("%s: accepted", situation)
		}
	}
	if _, err := policy.Parse([]byte(`{"version":"coffer.run/policy/v1","name":"p","allowSimulated":false,"snp":null}`)); err == nil {
		t.Error("accepted a policy that asks for no SEV-SNP evidence")
	}
	if _, err := policy.Parse(make([]byte, policy.MaxSize+1)); err == nil {
		t.Error("accepted a policy of unreasonable size")
	}
}

func TestZeroPolicyHasNoDigest(t *testing.T) {
	if _, err := (policy.Policy{}).Digest(); err == nil {
		t.Fatal("the zero policy has a digest")
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(document))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := policy.Parse(b)
		if err != nil {
			return
		}
		if _, err := p.Digest(); err != nil {
			t.Fatalf("a parsed policy has no digest: %v", err)
		}
	})
}
