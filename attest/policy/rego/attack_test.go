package rego_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/policy/rego"
	"github.com/coffer-run/coffer/attest/receipt"
)

// withRules is the good document under rules of somebody else.
func withRules(t *testing.T, text string) policy.Policy {
	t.Helper()
	p, err := policy.Parse([]byte(document))
	if err != nil {
		t.Fatal(err)
	}
	p.Rules = map[string]string{"own.rego": text}
	return p
}

// affirm are rules that accept whatever is there.
const affirm = `package coffer.appraisal

decision := {"checks": [], "submods": {name: {"tier": "affirming", "checks": [{"id": "policy.own", "outcome": "pass"}]} | some name, _ in input.submods}}
`

func TestRulesRefusedAtLoad(t *testing.T) {
	if _, err := rego.Compile(withRules(t, affirm)); err != nil {
		t.Fatal(err)
	}
	call := func(expression string) string { return affirm + "\nx := " + expression + "\n" }
	for situation, row := range map[string]struct{ text, want string }{
		"asks a web server":                       {call(`http.send({"method": "get", "url": "http://127.0.0.1/"})`), "http.send"},
		"resolves a name":                         {call(`net.lookup_ip_addr("example.com")`), "net.lookup_ip_addr"},
		"reads the environment":                   {call(`opa.runtime()`), "opa.runtime"},
		"reads the clock":                         {call(`time.now_ns()`), "time.now_ns"},
		"throws dice":                             {call(`rand.intn("a", 2)`), "rand.intn"},
		"makes an identifier":                     {call(`uuid.rfc4122("a")`), "uuid.rfc4122"},
		"validates against a remote schema":       {call(`json.match_schema({}, {"$ref": "http://127.0.0.1/"})`), "json.match_schema"},
		"counts to a large number":                {call(`numbers.range(1, 1000000000)`), "numbers.range"},
		"multiplies":                              {call(`input.wantGPUs * 2`), "mul"},
		"pads a text":                             {call(`sprintf("%999999d", [1])`), "sprintf"},
		"parses a certificate":                    {call(`crypto.x509.parse_certificates("")`), "crypto.x509.parse_certificates"},
		"replaces a function that is not allowed": {affirm + "\nx if { http.send({}) with http.send as {} }\n", "with keyword target"},
		"another package":                         {strings.Replace(affirm, "coffer.appraisal", "coffer.other", 1), "package"},
		"a package below":                         {strings.Replace(affirm, "coffer.appraisal", "coffer.appraisal.more", 1), "package"},
		"no entry point":                          {strings.Replace(affirm, "decision :=", "verdict :=", 1), "decision"},
		"no rules":                                {"package coffer.appraisal", "decision"},
		"no package":                              {"", "empty"},
		"not Rego":                                {"all is well", "rego_parse_error"},
		"Rego of the old version":                 {"package coffer.appraisal\n\ndecision = x { x := {} }\n", "rego_parse_error"},
		"a variable that nobody uses":             {affirm + "\nx if { y := 1; true }\n", "unused"},
		"an import that nobody uses":              {strings.Replace(affirm, "\n\n", "\n\nimport data.policy as other\n\n", 1), "unused"},
		"a variable that nobody set":              {affirm + "\nx := y\n", "unsafe"},
		"rules that need each other":              {affirm + "\nx if y\n\ny if x\n", "recursive"},
	} {
		t.Run(situation, func(t *testing.T) {
			_, err := rego.Compile(withRules(t, row.text))
			if err == nil || !strings.Contains(err.Error(), row.want) {
				t.Fatalf("compiles, or not for this reason: %v", err)
			}
		})
	}
}

func TestRulesRefusedWhenAsked(t *testing.T) {
	one := func(c string) string {
		return `package coffer.appraisal

decision := {"checks": [], "submods": {name: {"tier": "affirming", "checks": [` + c + `]} | some name, _ in input.submods}}
`
	}
	digits := `package coffer.appraisal

d := [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]

`
	for situation, row := range map[string]struct{ text, by string }{
		"undefined for this evidence":            {"package coffer.appraisal\n\ndecision := {\"checks\": [], \"submods\": {}} if input.wantGPUs == 7\n", "policy.rules"},
		"no checks at all":                       {"package coffer.appraisal\n\ndecision := {\"checks\": [], \"submods\": {}}\n", "policy.rules"},
		"no checks of a device":                  {one(""), "policy.rules"},
		"checks of two devices only":             {strings.Replace(affirm, "in input.submods", "in input.submods; name != \"gpu0\"", 1), "policy.rules"},
		"a device that is not there":             {strings.Replace(affirm, "{name:", "{concat(\"\", [name, \"x\"]):", 1), "policy.rules"},
		"true instead of checks":                 {"package coffer.appraisal\n\ndecision := true\n", "policy.rules"},
		"a set of verdicts":                      {"package coffer.appraisal\n\ndecision contains \"allow\"\n", "policy.rules"},
		"a field that nobody knows":              {strings.Replace(affirm, `"checks": [], `, `"checks": [], "allow": true, `, 1), "policy.rules"},
		"a tier that nobody knows":               {strings.Replace(affirm, "affirming", "excellent", 1), "policy.rules"},
		"a tier that is a number":                {strings.Replace(affirm, `"affirming"`, "2", 1), "policy.rules"},
		"a check with a field that nobody knows": {one(`{"id": "policy.own", "outcome": "pass", "waive": "snp.signature"}`), "policy.rules"},
		"a check without an id":                  {one(`{"outcome": "pass"}`), "policy.rules"},
		"a check without an outcome":             {one(`{"id": "policy.own"}`), "policy.rules"},
		"an outcome that nobody knows":           {one(`{"id": "policy.own", "outcome": "passed"}`), "policy.rules"},
		"a check of the appraisal":               {one(`{"id": "snp.signature", "outcome": "pass"}`), "policy.rules"},
		"a check that rules do not make":         {one(`{"id": "policy.snp.simulated", "outcome": "pass"}`), "policy.rules"},
		"text that is a number":                  {one(`{"id": "policy.own", "outcome": "pass", "found": 1}`), "policy.rules"},
		"two answers that differ":                {affirm + "\ndecision := {} if input.wantGPUs == 1\n", "policy.rules"},
		"a function that fails":                  {affirm + "\n_fails if concat(\"\", [input.wantGPUs]) == \"1\"\n\ndecision := {} if _fails\n", "policy.rules"},
		"warns":                                  {strings.Replace(affirm, "affirming", "warning", 1), "policy.snp.tier"},
		"says nothing":                           {strings.Replace(affirm, "affirming", "none", 1), "policy.gpu.tier"},
		"more checks than anybody reads":         {digits + "decision := {\"checks\": [c | some a in d; some b in d; some e in d; c := {\"id\": $\"policy.own.{a}-{b}-{e}\", \"outcome\": \"pass\"}], \"submods\": {}}\n", "policy.rules"},
		"more text than anybody reads":           {digits + "big := concat(\"\", [\"" + strings.Repeat("x", 4000) + "\" | some _ in d; some _ in d])\n\ndecision := {\"checks\": [{\"id\": \"policy.own\", \"outcome\": \"pass\", \"found\": big}], \"submods\": {}}\n", "policy.rules"},
		"a comprehension without end":            {digits + "decision := {\"checks\": [c | " + strings.Repeat("some _ in d; ", 16) + "c := 1], \"submods\": {}}\n", "policy.rules"},
		"a search without end, known at load":    {digits + "endless if { " + strings.Repeat("some _ in d; ", 16) + "false }\n\ndecision := {\"checks\": [], \"submods\": {}} if endless\n", "policy.rules"},
	} {
		t.Run(situation, func(t *testing.T) {
			p := compiled(t, withRules(t, row.text))
			began := time.Now()
			d := p.Decide(evidence())
			if took := time.Since(began); took > 10*rego.Deadline {
				t.Errorf("took %s", took)
			}
			var ids []string
			for _, c := range d.All().Failed() {
				ids = append(ids, c.ID)
				if len(c.Found) > 500 {
					t.Errorf("%s says %d bytes", c.ID, len(c.Found))
				}
				if c.ID == row.by {
					return
				}
			}
			t.Fatalf("failed %v, want %s", ids, row.by)
		})
	}
}

// What the rules waive is refused all the same.
func TestRulesCannotWaive(t *testing.T) {
	p := compiled(t, withRules(t, affirm))
	if d := p.Decide(evidence()); len(d.All().Failed()) > 0 || d.Tiers["cpu0"] != receipt.Affirming || d.Tiers["gpu0"] != receipt.Affirming {
		t.Fatalf("good evidence is refused: %+v", d)
	}
	for situation, row := range map[string]struct {
		spoil func(*policy.Evidence)
		by    string
	}{
		"no SEV-SNP report":       {func(e *policy.Evidence) { e.SNP = nil }, "policy.snp.required"},
		"no TPM quote":            {func(e *policy.Evidence) { e.TPM = nil }, "policy.tpm.required"},
		"TPM failed to collect":   {func(e *policy.Evidence) { e.Failures = map[string]string{"tpm": "busy"} }, "policy.tpm.required"},
		"no GPU":                  {func(e *policy.Evidence) { e.GPUs = nil }, "policy.gpu.count"},
		"a GPU too many":          {func(e *policy.Evidence) { e.WantGPUs = 0 }, "policy.gpu.count"},
		"several GPUs":            {func(e *policy.Evidence) { e.WantGPUs = 2; e.GPUs = append(e.GPUs, e.GPUs[0]) }, "policy.gpu.several"},
		"simulated chip":          {func(e *policy.Evidence) { e.SNP.Simulated = true }, "policy.snp.simulated"},
		"simulated TPM":           {func(e *policy.Evidence) { e.TPM.Simulated = true }, "policy.tpm.simulated"},
		"simulated GPU":           {func(e *policy.Evidence) { e.GPUs[0].Simulated = true }, "policy.gpu.simulated"},
		"claims that are no JSON": {func(e *policy.Evidence) { e.TPM.Claims["x"] = func() {} }, "policy.tpm.claims"},
		"claims of a size":        {func(e *policy.Evidence) { e.TPM.Claims["x"] = strings.Repeat("x", rego.MaxInput) }, "policy.rules"},
	} {
		t.Run(situation, func(t *testing.T) {
			e := evidence()
			row.spoil(&e)
			d := p.Decide(e)
			for name, tier := range d.Tiers {
				if tier == receipt.Affirming && len(d.Platform.Failed()) > 0 {
					t.Errorf("%s affirms", name)
				}
			}
			for _, c := range d.All().Failed() {
				if c.ID == row.by {
					return
				}
			}
			t.Fatalf("failed %+v, want %s", d.All().Failed(), row.by)
		})
	}
	t.Run("evidence that is not genuine", func(t *testing.T) {
		e := evidence()
		e.SNP.Checks.Fail("snp.signature", "", "", "")
		if tier := p.Decide(e).Tiers["cpu0"]; tier != receipt.Contraindicated {
			t.Fatalf("rules that affirm made %q of a forged report", tier)
		}
	})
	t.Run("outcome of no known kind", func(t *testing.T) {
		e := evidence()
		e.SNP.Checks = append(e.SNP.Checks, check.Check{ID: "snp.signature"})
		if tier := p.Decide(e).Tiers["cpu0"]; tier != receipt.Contraindicated {
			t.Fatalf("rules that affirm made %q of a report that nobody checked", tier)
		}
	})
}

// A decision is the same whichever goroutine asks.
func TestDecideConcurrently(t *testing.T) {
	source, err := policy.Named("production")
	if err != nil {
		t.Fatal(err)
	}
	p := compiled(t, source)
	want, err := json.Marshal(p.Decide(evidence()))
	if err != nil {
		t.Fatal(err)
	}
	answers := make(chan string)
	for range 8 {
		go func() {
			b, err := json.Marshal(p.Decide(evidence()))
			if err != nil {
				b = []byte(err.Error())
			}
			answers <- string(b)
		}()
	}
	for range 8 {
		if got := <-answers; got != string(want) {
			t.Errorf("answers differ:\n%s\n%s", got, want)
		}
	}
}
