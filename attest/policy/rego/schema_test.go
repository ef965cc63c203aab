package rego_test

import (
	"encoding/hex"
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/composite"
	envelope "github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/nvgpu"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/policy/rego"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate/vectortest"
	"github.com/coffer-run/coffer/attest/snp"
)

// violations holds the input of rules against the published schema.
func violations(t *testing.T, input []byte) string {
	t.Helper()
	schema, err := os.ReadFile("../claims.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	var out string
	err = topdown.GetBuiltin("json.match_schema")(topdown.BuiltinContext{}, []*ast.Term{ast.StringTerm(string(input)), ast.StringTerm(string(schema))}, func(r *ast.Term) error {
		pair := r.Value.(*ast.Array)
		if pair.Elem(0).Value.Compare(ast.Boolean(true)) != 0 {
			out = pair.Elem(1).String()
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func production(t *testing.T) *rego.Policy {
	t.Helper()
	p, err := policy.Named("production")
	if err != nil {
		t.Fatal(err)
	}
	return compiled(t, p)
}

func inputOf(t *testing.T, ev policy.Evidence) []byte {
	t.Helper()
	b, err := production(t).Input(ev)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// jobEvidence is what was found of a whole job of a simulation.
func jobEvidence(t testing.TB) policy.Evidence {
	t.Helper()
	now := time.Now()
	lab, err := bundletest.New(now)
	if err != nil {
		t.Fatal(err)
	}
	job, err := lab.Job(bundletest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	e, err := envelope.Parse(job.Parts[bundle.Evidence])
	if err != nil {
		t.Fatal(err)
	}
	jwks, err := lab.Verifier.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	keys, err := receipt.ParseKeys(bundletest.VerifierID, jwks)
	if err != nil {
		t.Fatal(err)
	}
	s, err := composite.Open(e)
	if err != nil {
		t.Fatal(err)
	}
	ev := s.Appraise(t.Context(), composite.Trust{Anchors: lab.Anchors, CredentialKeys: keys}, now).Evidence(1)
	if ev.SNP == nil || ev.TPM == nil || len(ev.GPUs) != 1 || ev.Now.IsZero() {
		t.Fatal("a part is missing")
	}
	return ev
}

// What rules see of a whole job, with every device there is.
func TestSchemaOfAJob(t *testing.T) {
	ev := jobEvidence(t)
	in := inputOf(t, ev)
	if v := violations(t, in); v != "" {
		t.Errorf("the schema lacks what rules see: %s", v)
	}
	for situation, edit := range map[string][2]string{
		"claim that nobody defined": {`"snp.vmpl"`, `"snp.vmple"`},
		"claim of another type":     {`"snp.policy.debug":false`, `"snp.policy.debug":"no"`},
		"outcome that nobody knows": {`"outcome":"pass"`, `"outcome":"passed"`},
		"another kind of device":    {`"kind":"tpm"`, `"kind":"gpu"`},
		"a field beside":            {`"wantGPUs"`, `"x":1,"wantGPUs"`},
	} {
		text := strings.Replace(string(in), edit[0], edit[1], 1)
		if text == string(in) {
			t.Fatalf("%s: nothing was changed", situation)
		}
		if violations(t, []byte(text)) == "" {
			t.Errorf("%s: the schema allows it", situation)
		}
	}
}

func TestSchemaOfRealEvidence(t *testing.T) {
	at := time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC)
	devices := 0
	for _, v := range vectortest.All(t, "nvidia-gpu") {
		nonce, err := hex.DecodeString(v.Nonce)
		if err != nil {
			t.Fatal(err)
		}
		r := nvgpu.Appraise(nvgpu.Evidence{Report: vectortest.Read(t, v.Report), Chain: vectortest.Read(t, v.Chain), DriverVersion: v.Driver, VBIOSVersion: v.VBIOS},
			nvgpu.Want{Nonce: [32]byte(nonce)}, anchor.Vendor(), at)
		holds(t, v.Name, policy.Evidence{GPUs: []policy.Device{{Claims: r.Claims, Checks: r.Checks}}})
		devices++
	}
	for _, v := range vectortest.All(t, "snp-vcek", "snp-vlek") {
		r := snp.Appraise(snp.Evidence{Report: vectortest.Read(t, v.Report)}, snp.Want{}, anchor.Vendor(), at)
		holds(t, v.Name, policy.Evidence{SNP: &policy.Device{Claims: r.Claims, Checks: r.Checks}})
		devices++
	}
	t.Logf("claims of %d real devices", devices)
}

func holds(t *testing.T, name string, ev policy.Evidence) {
	t.Helper()
	in := inputOf(t, ev)
	if v := violations(t, in); v != "" {
		t.Errorf("%s: %s", name, v)
	}
	if !json.Valid(in) {
		t.Errorf("%s: not JSON", name)
	}
}
