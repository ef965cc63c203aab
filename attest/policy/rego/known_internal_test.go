package rego

import (
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/policy"
)

// The rules that are asked once are those that no evidence can change.
func TestConstants(t *testing.T) {
	p, err := policy.Named("production")
	if err != nil {
		t.Fatal(err)
	}
	c, err := Compile(p)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"gpu_feature_flags", "gpu_required", "snp_levels", "snp_optional", "snp_products", "snp_required", "tpm_classes", "tpm_required", "tpm_unlisted"}
	if got := slices.Sorted(maps.Keys(c.known)); !slices.Equal(got, want) {
		t.Errorf("known are %v, want %v", got, want)
	}

	p.Rules = map[string]string{"own.rego": `package coffer.appraisal

import input.accepted.snp as values

decision := {"checks": [], "submods": {}}

of_document := data.policy.name

of_accepted := [values.measurements, input.accepted.gpu]

of_both := [of_document, of_accepted]

by_function := f(1)

f(x) := [x, data.policy.name]

several := 1 if data.policy.name == "x"

several := 2 if data.policy.name == "production"

otherwise := 1 if data.policy.name == "x" else := of_document

of_evidence := input.submods

of_clock := input.now

of_input := input

of_a_field := [x | some k in ["accepted", "submods"]; x := input[k]]

of_an_accepted_value := input.accepted[input.now]

through_a_rule := [of_evidence, 1]

through_a_function := g(1)

g(x) := [x, input.wantGPUs]

in_a_comprehension := {x | some x, _ in input.submods}

in_an_otherwise := 1 if data.policy.name == "x" else := input.wantGPUs

in_every if {
	every k in ["now"] {
		input[k] == 1
	}
}

not_there if not input.now

with_other_input := x if x := of_document with input.submods as {}

with_other_data := x if x := of_document with data.policy.name as "x"

one_of_several := 1 if data.policy.name == "x"

one_of_several := 2 if input.wantGPUs == 2

undefined := data.policy.nothing

wrong := count(data.policy.allowSimulated)

members contains data.policy.name

fields[k] := 1 if some k in ["a"]
`}
	if c, err = Compile(p); err != nil {
		t.Fatal(err)
	}
	want = []string{"by_function", "of_accepted", "of_both", "of_document", "otherwise", "several"}
	if got := slices.Sorted(maps.Keys(c.known)); !slices.Equal(got, want) {
		t.Errorf("known are %v, want %v", got, want)
	}
}

// What is too large to keep is asked each time.
func TestKnownIsBounded(t *testing.T) {
	p, err := policy.Named("production")
	if err != nil {
		t.Fatal(err)
	}
	p.Rules = map[string]string{"own.rego": `package coffer.appraisal

digits := [0, 1, 2, 3, 4, 5, 6, 7]

small := "a"

large := concat("", ["` + strings.Repeat("x", 1024) + `" | some _ in digits; some _ in digits; some _ in digits])

decision := {"checks": [{"id": "policy.own", "outcome": "pass", "found": small} | large != ""], "submods": {}}
`}
	c, err := Compile(p)
	if err != nil {
		t.Fatal(err)
	}
	if got := slices.Sorted(maps.Keys(c.known)); !slices.Equal(got, []string{"digits"}) {
		t.Errorf("known are %v", got)
	}
	if v, err := c.evaluate(input(policy.Evidence{}, nil, c.accepted), c.known); err != nil || !strings.Contains(v.String(), `"found": "a"`) {
		t.Errorf("decides %v, %v", v, err)
	}
}

// FuzzKnown holds what rules say with the constants known against what the same
// rules say without, of documents and claims of all kinds.
func FuzzKnown(f *testing.F) {
	for seed := range uint64(40) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		r := rand.New(rand.NewPCG(seed, 1)) //nolint:gosec // Which claims are made up is no secret.
		c, err := Compile(madeUpDocument(t, r))
		if err != nil {
			t.Fatal(err)
		}
		// As if signed files listed some too.
		if r.IntN(2) == 0 {
			v, err := ast.JSON(c.accepted)
			if err != nil {
				t.Fatal(err)
			}
			values := v.(map[string]any)["snp"].(map[string]any)
			values["idKeyDigests"], values["chipIds"] = some(r, hexes[:2]), some(r, hexes[:1])
			if c.accepted, err = toValue(v); err != nil {
				t.Fatal(err)
			}
			c.known = c.know()
		}
		if len(c.known) == 0 {
			t.Fatal("nothing is known")
		}
		for range 20 {
			ev := madeUpEvidence(r)
			d := policy.Decision{GPUs: make([]check.List, len(ev.GPUs))}
			subs := c.submodules(ev, &d)
			for i := range subs {
				subs[i].readClaims()
			}
			in := input(ev, subs, c.accepted)
			want, wantErr := c.evaluate(in, nil)
			got, err := c.evaluate(in, c.known)
			if (err == nil) != (wantErr == nil) || (err == nil && got.Compare(want) != 0) {
				t.Fatalf("knowing the constants changes the decision on %v:\n%v, %v\n%v, %v", in, got, err, want, wantErr)
			}
		}
	})
}

var (
	hexes    = []string{strings.Repeat("ab", 48), strings.Repeat("cd", 48), strings.Repeat("AB", 48)}
	pcrs     = []string{strings.Repeat("01", 32), strings.Repeat("02", 32)}
	versions = []string{"550.90.07", "96.00.9F.00.01", "96.00.9f.00.01"}
	ids      = []string{"snp.crl", "snp.signature", "tpm.tcg-log", "tpm.signature", "gpu.rim", "gpu.nonce"}
	indices  = []string{"4", "8", "9", "11", "12", "13", "14"}
)

func one[T any](r *rand.Rand, of []T) T { return of[r.IntN(len(of))] }

// some returns nil, an empty list or a few of the values.
func some(r *rand.Rand, of []string) []string {
	if r.IntN(3) == 0 {
		return nil
	}
	out := []string{}
	for _, v := range of {
		if r.IntN(2) == 0 {
			out = append(out, v)
		}
	}
	return out
}

func madeUpDocument(t *testing.T, r *rand.Rand) policy.Policy {
	t.Helper()
	p, err := policy.Named(one(r, []string{"production", "cpu-only", "simulation"}))
	if err != nil {
		t.Fatal(err)
	}
	lower := func(list []string) []string {
		for i := range list {
			list[i] = strings.ToLower(list[i])
		}
		return list
	}
	if r.IntN(2) == 0 {
		p.SNP.Require = some(r, ids[:2])
		p.SNP.Products = p.SNP.Products[r.IntN(3):]
		p.SNP.Measurements = lower(some(r, hexes[:2]))
		p.SNP.RequireMeasurement = r.IntN(2) == 0
		p.SNP.AllowDebug, p.SNP.AllowMigration, p.SNP.MaxVMPL = r.IntN(2) == 0, r.IntN(2) == 0, r.IntN(4)
		if r.IntN(2) == 0 {
			p.SNP.MinimumTCB = map[anchor.Product]policy.TCB{p.SNP.Products[0]: {Bootloader: 9, SNP: 23, Microcode: uint8(72 + r.IntN(2))}}
		}
	}
	if p.TPM != nil && r.IntN(2) == 0 {
		p.TPM.Require = some(r, ids[2:4])
		p.TPM.AllowSelfMeasured = r.IntN(2) == 0
		p.TPM.PCR14, p.TPM.RequirePCRs = some(r, pcrs), some(r, indices)
	}
	if p.GPU != nil && r.IntN(2) == 0 {
		p.GPU.Require = some(r, ids[4:])
		p.GPU.DriverVersions, p.GPU.VBIOSVersions = some(r, versions), some(r, versions)
	}
	return p
}

// madeUpEvidence is evidence of which a claim is often as it should be, and
// sometimes another, of another type, or not there.
func madeUpEvidence(r *rand.Rand) policy.Evidence {
	claim := func(m map[string]any, name string, values ...any) {
		switch n := r.IntN(12); {
		case n == 0:
		case n == 1:
			m[name] = one(r, []any{nil, true, false, 0, -1, 2.5, "", "x", []string{}, []any{"self", 1}, map[string]any{"4": 1}})
		default:
			m[name] = one(r, values)
		}
	}
	made := func() (l check.List) {
		for _, id := range ids {
			switch r.IntN(8) {
			case 0:
			case 1:
				l.Skip(id, "no list")
			case 2:
				l.Fail(id, "a", "b", "")
			case 3:
				l = append(l, check.Check{ID: id, Outcome: "odd"})
			default:
				l.Pass(id, "")
			}
		}
		return l
	}
	ev := policy.Evidence{WantGPUs: r.IntN(3)}
	if r.IntN(8) > 0 {
		c := map[string]any{}
		claim(c, "snp.product", "Milan", "Genoa", "Turin")
		claim(c, "snp.policy.debug", false, true)
		claim(c, "snp.policy.migration-agent", false, true)
		claim(c, "snp.vmpl", 0, 1, 2, 3, 4)
		claim(c, "snp.measurement", hexes[0], hexes[1], hexes[2])
		claim(c, "snp.reported-tcb", map[string]any{"fmc": 0, "bootloader": 9, "tee": 0, "snp": 23, "microcode": 72}, map[string]any{"bootloader": 9, "snp": "23"})
		claim(c, "snp.id-key-digest", hexes[0], hexes[1])
		claim(c, "snp.chip-id", hexes[0])
		ev.SNP = &policy.Device{Claims: c, Checks: made()}
	}
	if r.IntN(8) > 0 {
		c, values := map[string]any{}, map[string]any{}
		for _, i := range indices {
			claim(values, i, pcrs[0], pcrs[1])
		}
		claim(c, "tpm.pcrs", values)
		claim(c, "tpm.trust-class", "software", "discrete", "svsm")
		claim(c, "tpm.measured-by", []string{"firmware"}, []string{"firmware", "self"}, []string{})
		ev.TPM = &policy.Device{Claims: c, Checks: made()}
	}
	for range r.IntN(3) {
		c := map[string]any{}
		claim(c, "gpu.feature-flag", "SPT", "PPCIE")
		claim(c, "x-nvidia-gpu-driver-version", versions[0])
		claim(c, "x-nvidia-gpu-vbios-version", versions[1], versions[2])
		ev.GPUs = append(ev.GPUs, policy.Device{Claims: c, Checks: made()})
	}
	return ev
}
