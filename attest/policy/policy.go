// Package policy has the documents that say what evidence is acceptable, and
// names them by digest; package rego decides by them.
//
// Trusted: a policy document, which a plan pins by digest, and the keys in it.
// Checked: that a document is complete and well-formed, that its digest covers
// its rules, and that reference values are signed by whom it names and have not
// expired. Not checked: that its rules compile, and any evidence, which are
// package rego's.
package policy

import (
	"embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
)

// Version is the only policy version there is.
const Version = "coffer.run/policy/v1"

const (
	// MaxSize bounds a policy document, in bytes.
	MaxSize = 64 << 10
	// maxRules and maxSources bound its lists.
	maxRules   = 16
	maxSources = 8
	// maxValues bounds each list of reference values.
	maxValues = 256
)

// Policy is an attestation policy. A part that is there is required of the
// evidence; the zero value is not valid and accepts nothing.
type Policy struct {
	Version string `json:"version"`
	Name    string `json:"name"`
	// AllowSimulated accepts chains that end in a simulation's anchors.
	AllowSimulated bool `json:"allowSimulated"`
	// SNP, TPM and GPU are what must be there, and how it must be. Every policy
	// requires SNP. Without GPU, plans that ask for a GPU are refused; with it,
	// exactly as many as the plan asks for must be there.
	SNP *SNP `json:"snp"`
	TPM *TPM `json:"tpm,omitempty"`
	GPU *GPU `json:"gpu,omitempty"`
	// Sandbox is how the job's sandbox must be. Without it any is acceptable that
	// the plan names.
	Sandbox *Sandbox `json:"sandbox,omitempty"`
	// Sources sign reference values that hold besides those listed here: they
	// narrow what is acceptable and never widen it. With a source, evidence is
	// refused while none of its files is valid.
	Sources []Source `json:"sources,omitempty"`
	// Rules are the Rego modules that decide, by file name. A document without
	// any has those that ship with coffer, which its digest then covers.
	Rules map[string]string `json:"rules"`
	// Data is for rules other than those that ship.
	Data map[string]any `json:"data,omitempty"`
}

// Source is who signs reference values.
type Source struct {
	Issuer string `json:"issuer"`
	// Keys is a JSON Web Key Set of P-384 signature keys.
	Keys json.RawMessage `json:"keys"`
}

// SNP are the rules for the SEV-SNP report.
type SNP struct {
	// Require lists checks that must have been made and passed: one that was
	// not made refuses.
	Require        []string `json:"require"`
	AllowDebug     bool     `json:"allowDebug"`
	AllowMigration bool     `json:"allowMigration"`
	// MaxVMPL is the least privileged level from which a report may come.
	MaxVMPL int `json:"maxVMPL"`
	// Products lists the acceptable product lines.
	Products []anchor.Product `json:"products"`
	// MinimumTCB is by product line. A line without one is not checked.
	MinimumTCB map[anchor.Product]TCB `json:"minimumTCB,omitempty"`
	// Measurements are acceptable launch digests, SHA-384 in hex. None means
	// not checked.
	Measurements []string `json:"measurements,omitempty"`
	// RequireMeasurement refuses everything while nobody lists launch digests:
	// neither this document nor signed reference values.
	RequireMeasurement bool `json:"requireMeasurement,omitempty"`
}

// TCB is a floor for each component of a TCB version.
type TCB struct {
	FMC        uint8 `json:"fmc"`
	Bootloader uint8 `json:"bootloader"`
	TEE        uint8 `json:"tee"`
	SNP        uint8 `json:"snp"`
	Microcode  uint8 `json:"microcode"`
}

// TPM are the rules for the TPM quote.
type TPM struct {
	Require []string `json:"require"`
	// AllowSelfMeasured accepts event logs by the agent's own word.
	AllowSelfMeasured bool `json:"allowSelfMeasured"`
	// Classes lists the acceptable trust classes.
	Classes []anchor.Class `json:"classes"`
	// PCR14 are acceptable values, SHA-256 in hex. None means not checked.
	PCR14 []string `json:"pcr14,omitempty"`
	// RequirePCRs are the PCRs, "0" to "23", for which somebody must list values:
	// everything is refused while nobody does.
	RequirePCRs []string `json:"requirePCRs,omitempty"`
}

// GPU are the rules for every GPU report.
type GPU struct {
	Require []string `json:"require"`
	// FeatureFlags lists the acceptable modes: "SPT", "MPT", "PPCIE".
	FeatureFlags []string `json:"featureFlags"`
	// DriverVersions and VBIOSVersions are acceptable versions. None means not
	// checked.
	DriverVersions []string `json:"driverVersions,omitempty"`
	VBIOSVersions  []string `json:"vbiosVersions,omitempty"`
}

//go:embed policies/*.json rules/*.rego
var files embed.FS

const standardRules = "appraisal.rego"

// StandardRules returns the Rego modules that ship with coffer.
func StandardRules() (map[string]string, error) {
	b, err := fs.ReadFile(files, "rules/"+standardRules)
	if err != nil {
		return nil, fmt.Errorf("policy rules: %w", err)
	}
	return map[string]string{standardRules: string(b)}, nil
}

// Names lists the policies that ship with coffer.
func Names() []string { return []string{"cpu-only", "production", "simulation"} }

// Named returns a policy that ships with coffer.
func Named(name string) (Policy, error) {
	if !slices.Contains(Names(), name) {
		return Policy{}, fmt.Errorf("policy %.80q: there are %s", name, strings.Join(Names(), ", "))
	}
	b, err := fs.ReadFile(files, "policies/"+name+".json")
	if err != nil {
		return Policy{}, fmt.Errorf("policy %s: %w", name, err)
	}
	p, err := Parse(b)
	if err != nil {
		return Policy{}, err
	}
	if p.Name != name {
		return Policy{}, fmt.Errorf("policy %s calls itself %.80q", name, p.Name)
	}
	return p, nil
}

// Parse reads a policy document. It need not be in canonical form: its digest
// is that of the canonical form.
func Parse(b []byte) (Policy, error) {
	var p Policy
	if err := plan.Decode(b, MaxSize, &p); err != nil {
		return Policy{}, fmt.Errorf("parse policy: %w", err)
	}
	if p.Rules == nil {
		var err error
		if p.Rules, err = StandardRules(); err != nil {
			return Policy{}, err
		}
	}
	if err := p.validate(); err != nil {
		return Policy{}, fmt.Errorf("parse policy: %w", err)
	}
	return p, nil
}

// ParseFolder reads a policy from a folder: policy.json, and beside it its rules
// as *.rego, which the document itself then does not have.
func ParseFolder(fsys fs.FS) (Policy, error) {
	document, err := readBounded(fsys, "policy.json")
	if err != nil {
		return Policy{}, err
	}
	names, err := fs.Glob(fsys, "*.rego")
	if err != nil || len(names) == 0 {
		return Policy{}, errors.Join(errors.New("parse policy folder: no *.rego"), err)
	}
	if len(names) > maxRules {
		return Policy{}, fmt.Errorf("parse policy folder: %d modules, at most %d are allowed", len(names), maxRules)
	}
	var p Policy
	if err := plan.Decode(document, MaxSize, &p); err != nil {
		return Policy{}, fmt.Errorf("parse policy folder: %w", err)
	}
	if p.Rules != nil {
		return Policy{}, errors.New("parse policy folder: rules both in policy.json and beside it")
	}
	p.Rules = map[string]string{}
	for _, n := range names {
		b, err := readBounded(fsys, n)
		if err != nil {
			return Policy{}, err
		}
		p.Rules[n] = string(b)
	}
	// JSON would carry other text than the files have, were it not UTF-8.
	if err := p.validateRules(); err != nil {
		return Policy{}, fmt.Errorf("parse policy folder: %w", err)
	}
	whole, err := json.Marshal(p)
	if err != nil {
		return Policy{}, fmt.Errorf("parse policy folder: %w", err)
	}
	return Parse(whole)
}

func readBounded(fsys fs.FS, name string) ([]byte, error) {
	f, err := fsys.Open(name)
	if err != nil {
		return nil, fmt.Errorf("parse policy folder: %w", err)
	}
	defer f.Close() //nolint:errcheck // read only
	b, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("parse policy folder: %s: %w", name, err)
	}
	if len(b) > MaxSize {
		return nil, fmt.Errorf("parse policy folder: %s: more than %d bytes", name, MaxSize)
	}
	return b, nil
}

// Digest returns the SHA-384 of the canonical form (RFC 8785).
func (p Policy) Digest() (plan.Digest, error) {
	if err := p.validate(); err != nil {
		return "", err
	}
	b, err := plan.Canonical(p)
	if err != nil {
		return "", err
	}
	return plan.Sum(b), nil
}

// Ref names the policy and pins its content, as plans and results do.
func (p Policy) Ref() (plan.Policy, error) {
	d, err := p.Digest()
	return plan.Policy{Name: p.Name, Digest: d}, err
}

var (
	nameForm    = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	checkForm   = regexp.MustCompile(`^[a-z0-9]+(\.[a-z0-9-]+)+$`)
	moduleForm  = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,62}\.rego$`)
	versionForm = regexp.MustCompile(`^[0-9A-Fa-f.]{1,32}$`)
	flags       = []string{"SPT", "MPT", "PPCIE"}
)

func (p Policy) validate() error {
	switch {
	case p.Version != Version:
		return fmt.Errorf("policy version %.40q: want %q", p.Version, Version)
	case !nameForm.MatchString(p.Name):
		return fmt.Errorf("policy name %.80q: want lower-case letters, digits and '-', at most 63", p.Name)
	case p.SNP == nil:
		return fmt.Errorf("policy %s does not ask for SEV-SNP evidence", p.Name)
	}
	if err := p.SNP.validate(); err != nil {
		return fmt.Errorf("policy %s: snp: %w", p.Name, err)
	}
	if p.TPM != nil {
		if err := p.TPM.validate(p.AllowSimulated); err != nil {
			return fmt.Errorf("policy %s: tpm: %w", p.Name, err)
		}
	}
	if p.GPU != nil {
		if err := p.GPU.validate(); err != nil {
			return fmt.Errorf("policy %s: gpu: %w", p.Name, err)
		}
	}
	if p.Sandbox != nil {
		if err := p.Sandbox.validate(); err != nil {
			return fmt.Errorf("policy %s: sandbox: %w", p.Name, err)
		}
	}
	if err := p.validateRules(); err != nil {
		return fmt.Errorf("policy %s: %w", p.Name, err)
	}
	return nil
}

func (p Policy) validateRules() error {
	if len(p.Rules) == 0 || len(p.Rules) > maxRules {
		return fmt.Errorf("%d rule modules: want 1 to %d", len(p.Rules), maxRules)
	}
	for name, text := range p.Rules {
		if !moduleForm.MatchString(name) || !utf8.ValidString(text) {
			return fmt.Errorf("rule module %.80q: want a lower-case name that ends in .rego, and UTF-8", name)
		}
	}
	if len(p.Sources) > maxSources {
		return fmt.Errorf("%d sources, at most %d are allowed", len(p.Sources), maxSources)
	}
	seen := map[string]bool{}
	for _, s := range p.Sources {
		if seen[s.Issuer] {
			return fmt.Errorf("source %.80q is named twice", s.Issuer)
		}
		seen[s.Issuer] = true
		if _, err := receipt.ParseKeys(s.Issuer, s.Keys); err != nil {
			return fmt.Errorf("source %.80q: %w", s.Issuer, err)
		}
	}
	return nil
}

func (s SNP) validate() error {
	if s.MaxVMPL < 0 || s.MaxVMPL > 3 {
		return fmt.Errorf("maxVMPL %d: want 0 to 3", s.MaxVMPL)
	}
	if err := among("products", s.Products, anchor.Products()); err != nil {
		return err
	}
	for product := range s.MinimumTCB {
		if !slices.Contains(s.Products, product) {
			return fmt.Errorf("minimumTCB for %.40q, which is none of the products", product)
		}
	}
	return errors.Join(match("require", s.Require, checkForm.MatchString), match("measurements", s.Measurements, hexOf(48)))
}

func (t TPM) validate(simulated bool) error {
	if err := among("classes", t.Classes, anchor.Classes()); err != nil {
		return err
	}
	if !simulated && slices.Contains(t.Classes, anchor.Software) {
		return errors.New("class software belongs to policies that allow simulation")
	}
	return errors.Join(match("require", t.Require, checkForm.MatchString), match("pcr14", t.PCR14, hexOf(32)), match("requirePCRs", t.RequirePCRs, pcrForm.MatchString))
}

func (g GPU) validate() error {
	if err := among("featureFlags", g.FeatureFlags, flags); err != nil {
		return err
	}
	return errors.Join(match("require", g.Require, checkForm.MatchString),
		match("driverVersions", g.DriverVersions, versionForm.MatchString), match("vbiosVersions", g.VBIOSVersions, versionForm.MatchString))
}

// among requires a list that is not empty and holds known values only: leaving
// it out must not mean that anything goes.
func among[T ~string](field string, list, known []T) error {
	if len(list) == 0 {
		return fmt.Errorf("%s is empty: nothing would be acceptable", field)
	}
	for _, v := range list {
		if !slices.Contains(known, v) {
			return fmt.Errorf("%s %.40q: want some of %v", field, v, known)
		}
	}
	return nil
}

func match(field string, list []string, ok func(string) bool) error {
	if len(list) > maxValues {
		return fmt.Errorf("%s has %d values, at most %d are allowed", field, len(list), maxValues)
	}
	for _, v := range list {
		if !ok(v) {
			return fmt.Errorf("%s %.120q is malformed", field, v)
		}
	}
	return nil
}

func hexOf(size int) func(string) bool {
	return func(s string) bool {
		b, err := hex.DecodeString(s)
		return err == nil && len(b) == size && s == strings.ToLower(s)
	}
}
