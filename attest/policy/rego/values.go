package rego

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
)

func toValue(v any) (ast.Value, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return fromJSON(b)
}

// requirements are the document as rules see it: without the rules, and with
// lists where it has none.
func requirements(p policy.Policy) (ast.Value, error) {
	p.Rules = nil
	if p.SNP != nil {
		s := *p.SNP
		s.Require = append([]string{}, s.Require...)
		p.SNP = &s
	}
	if p.TPM != nil {
		t := *p.TPM
		t.Require = append([]string{}, t.Require...)
		p.TPM = &t
	}
	if p.GPU != nil {
		g := *p.GPU
		g.Require = append([]string{}, g.Require...)
		p.GPU = &g
	}
	return toValue(p)
}

// acceptable are values that document and signed files accept together. A list
// that is null says nothing; one that is empty accepts nothing.
type acceptable struct {
	SNP struct {
		Measurements []string                            `json:"measurements"`
		IDKeyDigests []string                            `json:"idKeyDigests"`
		ChipIDs      []string                            `json:"chipIds"`
		MinimumTCB   map[anchor.Product]map[string]uint8 `json:"minimumTCB"`
	} `json:"snp"`
	TPM struct {
		PCRs map[string][]string `json:"pcrs"`
	} `json:"tpm"`
	GPU struct {
		FeatureFlags   []string `json:"featureFlags"`
		DriverVersions []string `json:"driverVersions"`
		VBIOSVersions  []string `json:"vbiosVersions"`
	} `json:"gpu"`
}

// accept joins the document's values with those of signed files. Files add to
// each other; all of them together narrow what the document accepts.
func accept(p policy.Policy, references []policy.References) (ast.Value, error) {
	signed := policy.Values{SNP: &policy.SNPValues{}, TPM: &policy.TPMValues{PCRs: map[string][]string{}}, GPU: &policy.GPUValues{}}
	var a acceptable
	a.SNP.MinimumTCB = map[anchor.Product]map[string]uint8{}
	raise(a.SNP.MinimumTCB, p.SNP.MinimumTCB)
	for _, r := range references {
		v := r.Values()
		if s := v.SNP; s != nil {
			signed.SNP.Measurements = append(signed.SNP.Measurements, s.Measurements...)
			signed.SNP.IDKeyDigests = append(signed.SNP.IDKeyDigests, s.IDKeyDigests...)
			signed.SNP.ChipIDs = append(signed.SNP.ChipIDs, s.ChipIDs...)
			raise(a.SNP.MinimumTCB, s.MinimumTCB)
		}
		if t := v.TPM; t != nil {
			for index, list := range t.PCRs {
				signed.TPM.PCRs[index] = append(signed.TPM.PCRs[index], list...)
			}
		}
		if g := v.GPU; g != nil {
			signed.GPU.DriverVersions = append(signed.GPU.DriverVersions, g.DriverVersions...)
			signed.GPU.VBIOSVersions = append(signed.GPU.VBIOSVersions, g.VBIOSVersions...)
			signed.GPU.FeatureFlags = append(signed.GPU.FeatureFlags, g.FeatureFlags...)
		}
	}
	a.SNP.Measurements = both(folded(p.SNP.Measurements), folded(signed.SNP.Measurements))
	a.SNP.IDKeyDigests, a.SNP.ChipIDs = folded(signed.SNP.IDKeyDigests), folded(signed.SNP.ChipIDs)
	a.TPM.PCRs = map[string][]string{"14": nil}
	if p.TPM != nil {
		a.TPM.PCRs["14"] = folded(p.TPM.PCR14)
	}
	for index, list := range signed.TPM.PCRs {
		a.TPM.PCRs[index] = both(a.TPM.PCRs[index], folded(list))
	}
	if p.GPU != nil {
		a.GPU.FeatureFlags = both(p.GPU.FeatureFlags, signed.GPU.FeatureFlags)
		a.GPU.DriverVersions = both(folded(p.GPU.DriverVersions), folded(signed.GPU.DriverVersions))
		a.GPU.VBIOSVersions = both(folded(p.GPU.VBIOSVersions), folded(signed.GPU.VBIOSVersions))
	}
	return toValue(a)
}

// both returns what is in each of two lists, of which a nil one says nothing.
func both(a, b []string) []string {
	if a == nil {
		return b
	}
	if b == nil {
		return a
	}
	out := []string{}
	for _, v := range a {
		if slices.Contains(b, v) {
			out = append(out, v)
		}
	}
	return out
}

// folded returns a list in lower case, as rules compare, and nil for an empty one.
func folded(list []string) []string {
	var out []string
	for _, v := range list {
		out = append(out, strings.ToLower(v))
	}
	return out
}

// raise sets each component of a minimum to the highest that is asked for.
func raise(minimum map[anchor.Product]map[string]uint8, by map[anchor.Product]policy.TCB) {
	for product, t := range by {
		if minimum[product] == nil {
			minimum[product] = map[string]uint8{}
		}
		for name, v := range map[string]uint8{"fmc": t.FMC, "bootloader": t.Bootloader, "tee": t.TEE, "snp": t.SNP, "microcode": t.Microcode} {
			minimum[product][name] = max(minimum[product][name], v)
		}
	}
}

func fromJSON(b []byte) (ast.Value, error) { return ast.ValueFromReader(bytes.NewReader(b)) }

// reader takes claims as rules see them: in their JSON form, the one in which
// results carry them, so that no rule depends on a Go type. The types that
// appraisals use are read without the detour over JSON.
type reader struct {
	// size is about that of the JSON form, in bytes.
	size int
}

func (r *reader) read(v any) (*ast.Term, error) {
	switch v := v.(type) {
	case string:
		if !utf8.ValidString(v) {
			break
		}
		r.size += len(v)
		return ast.StringTerm(v), nil
	case bool:
		return ast.InternedTerm(v), nil
	case int:
		return ast.InternedTerm(v), nil
	case []string:
		if v == nil {
			break
		}
		out := make([]*ast.Term, len(v))
		for i, e := range v {
			var err error
			if out[i], err = r.read(e); err != nil {
				return nil, err
			}
		}
		return ast.ArrayTerm(out...), nil
	case []any:
		if v == nil {
			break
		}
		out := make([]*ast.Term, len(v))
		for i, e := range v {
			var err error
			if out[i], err = r.read(e); err != nil {
				return nil, err
			}
		}
		return ast.ArrayTerm(out...), nil
	case map[string]string:
		if v != nil {
			return readObject(r, v)
		}
	case map[string]any:
		if v != nil {
			return readObject(r, v)
		}
	}
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	r.size += len(b)
	out, err := fromJSON(b)
	return ast.NewTerm(out), err
}

func readObject[T any](r *reader, m map[string]T) (*ast.Term, error) {
	items := make([][2]*ast.Term, 0, len(m))
	for k, e := range m {
		if !utf8.ValidString(k) {
			return nil, errors.New("a name that is not UTF-8")
		}
		r.size += len(k)
		t, err := r.read(e)
		if err != nil {
			return nil, err
		}
		items = append(items, ast.Item(ast.InternedTerm(k), t))
	}
	return ast.ObjectTerm(items...), nil
}

func item(key string, v *ast.Term) [2]*ast.Term { return ast.Item(ast.InternedTerm(key), v) }

// input is what rules see, in the form of claims.schema.json.
func input(ev policy.Evidence, subs []submodule, accepted ast.Value) ast.Value {
	devices := ast.NewObject()
	for _, s := range subs {
		devices.Insert(ast.StringTerm(s.name), ast.ObjectTerm(
			item("kind", ast.InternedTerm(s.kind)),
			item("claims", s.claims),
			item("checks", ast.NewTerm(outcomes(s.device.Checks))),
			item("simulated", ast.InternedTerm(s.device.Simulated)),
		))
	}
	failures := ast.NewObject()
	for source, message := range ev.Failures {
		failures.Insert(ast.StringTerm(source), ast.StringTerm(message))
	}
	in := ast.NewObject(
		item("submods", ast.NewTerm(devices)),
		item("wantGPUs", ast.InternedTerm(ev.WantGPUs)),
		item("failures", ast.NewTerm(failures)),
		item("accepted", ast.NewTerm(accepted)),
	)
	if !ev.Now.IsZero() {
		in.Insert(ast.InternedTerm("now"), ast.NewTerm(ast.Number(json.Number(fmt.Sprint(ev.Now.Unix())))))
	}
	return in
}

// outcomes are checks by id. Of several under one id the worst counts.
func outcomes(l check.List) ast.Object {
	worst := make(map[string]int, len(l))
	for i, c := range l {
		if was, again := worst[c.ID]; !again || rank(c.Outcome) > rank(l[was].Outcome) {
			worst[c.ID] = i
		}
	}
	items := make([][2]*ast.Term, 0, len(worst))
	for id, i := range worst {
		outcome := l[i].Outcome
		if rank(outcome) == rank(check.Fail) {
			outcome = check.Fail
		}
		said := ast.NewObject(item("outcome", ast.InternedTerm(string(outcome))))
		if found, there := seen(l[i]); there {
			said.Insert(ast.InternedTerm("found"), ast.StringTerm(found))
		}
		items = append(items, ast.Item(ast.StringTerm(id), ast.NewTerm(said)))
	}
	return ast.NewObject(items...)
}

func rank(o check.Outcome) int {
	switch o {
	case check.Pass:
		return 0
	case check.NotChecked:
		return 1
	case check.Fail:
	}
	return 2
}

// said is what rules answer of one device.
type said struct {
	tier   receipt.Tier
	checks check.List
}

type answered struct {
	checks  check.List
	submods map[string]said
	count   int
	size    int
}

var idForm = regexp.MustCompile(`^policy(\.[a-z0-9-]+)+$`)

// reserved are the checks that are not made by rules.
var reserved = []string{
	"policy.valid", "policy.known", "policy.rules", "policy.references", "policy.snp.required", "policy.tpm.required", "policy.gpu.count", "policy.gpu.several",
	"policy.snp.simulated", "policy.tpm.simulated", "policy.gpu.simulated", "policy.snp.claims", "policy.tpm.claims", "policy.gpu.claims",
	"policy.snp.tier", "policy.tpm.tier", "policy.gpu.tier",
}

// readAnswer reads a decision. Every field that is not known is an error.
func readAnswer(v ast.Value) (*answered, error) {
	a := &answered{submods: map[string]said{}}
	top, err := fields(v, "checks", "submods")
	if err != nil {
		return nil, fmt.Errorf("%s: %w", EntryPoint, err)
	}
	if a.checks, err = a.list(top["checks"]); err != nil {
		return nil, err
	}
	subs, ok := top["submods"].(ast.Object)
	if !ok || subs.Len() > MaxChecks {
		return nil, fmt.Errorf("%s.submods: want an object of at most %d", EntryPoint, MaxChecks)
	}
	err = subs.Iter(func(k, v *ast.Term) error {
		name, err := a.text(k.Value)
		if err != nil {
			return err
		}
		f, err := fields(v.Value, "tier", "checks")
		if err != nil {
			return fmt.Errorf("%.40q: %w", name, err)
		}
		tier, err := a.text(f["tier"])
		if err != nil {
			return err
		}
		s := said{tier: receipt.Tier(tier)}
		if !slices.Contains([]receipt.Tier{receipt.Affirming, receipt.Warning, receipt.Contraindicated, receipt.None}, s.tier) {
			return fmt.Errorf("%.40q: tier %.40q is none of EAR's", name, tier)
		}
		if s.checks, err = a.list(f["checks"]); err != nil {
			return err
		}
		a.submods[name] = s
		return nil
	})
	if err != nil {
		return nil, err
	}
	return a, nil
}

func (a *answered) list(v ast.Value) (check.List, error) {
	l, ok := v.(*ast.Array)
	if !ok {
		return nil, errors.New("checks: want a list")
	}
	if a.count += l.Len(); a.count > MaxChecks {
		return nil, fmt.Errorf("more than %d checks", MaxChecks)
	}
	var out check.List
	err := l.Iter(func(t *ast.Term) error {
		c, err := a.check(t.Value)
		out = append(out, c)
		return err
	})
	return out, err
}

func (a *answered) check(v ast.Value) (check.Check, error) {
	var c check.Check
	o, ok := v.(ast.Object)
	if !ok {
		return c, errors.New("check: want an object")
	}
	err := o.Iter(func(k, v *ast.Term) error {
		text, err := a.text(v.Value)
		if err != nil {
			return err
		}
		switch k.Value {
		case ast.String("id"):
			c.ID = text
		case ast.String("outcome"):
			c.Outcome = check.Outcome(text)
		case ast.String("expected"):
			c.Expected = printable(text)
		case ast.String("found"):
			c.Found = printable(text)
		case ast.String("hint"):
			c.Hint = printable(text)
		default:
			return fmt.Errorf("check: unknown field %.40q", k.Value.String())
		}
		return nil
	})
	switch {
	case err != nil:
		return c, err
	case len(c.ID) > 80 || !idForm.MatchString(c.ID):
		return c, fmt.Errorf("check %.80q: want an id that begins with policy", c.ID)
	case slices.Contains(reserved, c.ID):
		return c, fmt.Errorf("check %s is not for rules to make", c.ID)
	case c.Outcome != check.Pass && c.Outcome != check.Fail && c.Outcome != check.NotChecked:
		return c, fmt.Errorf("check %s: outcome %.40q is none", c.ID, c.Outcome)
	}
	return c, nil
}

func (a *answered) text(v ast.Value) (string, error) {
	s, ok := v.(ast.String)
	if !ok {
		return "", errors.New("want a text")
	}
	if a.size += len(s); a.size > MaxOutput {
		return "", fmt.Errorf("more than %d bytes of text", MaxOutput)
	}
	return string(s), nil
}

// fields returns the fields of an object that has exactly these.
func fields(v ast.Value, names ...string) (map[string]ast.Value, error) {
	o, ok := v.(ast.Object)
	if !ok || o.Len() != len(names) {
		return nil, fmt.Errorf("want an object of %s", strings.Join(names, " and "))
	}
	out := map[string]ast.Value{}
	for _, n := range names {
		t := o.Get(ast.InternedTerm(n))
		if t == nil {
			return nil, fmt.Errorf("no %s", n)
		}
		out[n] = t.Value
	}
	return out, nil
}

// printable makes a foreign text fit for a check, which people read.
func printable(s string) string {
	const limit = 400
	if len(s) > limit {
		s = s[:limit] + "..."
	}
	return strings.Map(func(c rune) rune {
		if c < ' ' || c > '~' {
			return '?'
		}
		return c
	}, s)
}
