package policy

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
)

const (
	// ReferencesVersion is the only version of reference values there is.
	ReferencesVersion = "coffer.run/reference-values/v1"
	// TypeReferences is the token type of reference values.
	TypeReferences = "reference-values"
)

// Values are reference values. A list that is empty says nothing. One that is
// not holds all that is acceptable, together with the same list in other files.
type Values struct {
	Version  string `json:"version"`
	Issuer   string `json:"iss"`
	IssuedAt int64  `json:"iat"`
	Expires  int64  `json:"exp"`

	SNP *SNPValues `json:"snp,omitempty"`
	TPM *TPMValues `json:"tpm,omitempty"`
	GPU *GPUValues `json:"gpu,omitempty"`
}

// SNPValues are those of SEV-SNP reports, in lower-case hex.
type SNPValues struct {
	Measurements []string               `json:"measurements,omitempty"`
	IDKeyDigests []string               `json:"idKeyDigests,omitempty"`
	ChipIDs      []string               `json:"chipIds,omitempty"`
	MinimumTCB   map[anchor.Product]TCB `json:"minimumTCB,omitempty"`
}

// TPMValues are those of TPM quotes.
type TPMValues struct {
	// PCRs are acceptable SHA-256 values by index, "0" to "23".
	PCRs map[string][]string `json:"pcrs,omitempty"`
}

// GPUValues are those of GPU reports.
type GPUValues struct {
	DriverVersions []string `json:"driverVersions,omitempty"`
	VBIOSVersions  []string `json:"vbiosVersions,omitempty"`
	FeatureFlags   []string `json:"featureFlags,omitempty"`
}

// SignValues returns reference values as a token signed by s, under its name.
func SignValues(s *receipt.Signer, v Values) (string, error) {
	v.Version, v.Issuer = ReferencesVersion, s.Issuer()
	if err := v.validate(); err != nil {
		return "", fmt.Errorf("sign reference values: %w", err)
	}
	return s.Sign(TypeReferences, v)
}

// References are reference values whose signature and times were checked under
// one policy. Only Policy.OpenReferences makes them; the zero value is refused.
type References struct {
	values Values
	policy plan.Digest
}

// Values returns the reference values. It panics on the zero value, which no
// check made.
func (r References) Values() Values {
	if r.policy == "" {
		panic("policy: use of unverified reference values")
	}
	return r.values
}

// Policy returns the digest of the policy under which the values were opened.
func (r References) Policy() plan.Digest { return r.policy }

// ValidAt reports whether the values may be used at the given time.
func (r References) ValidAt(now time.Time) bool {
	return r.policy != "" && !now.IsZero() && now.Unix() < r.values.Expires && !time.Unix(r.values.IssuedAt, 0).After(now.Add(receipt.Leeway))
}

// OpenReferences checks a token of reference values: that one of the policy's
// sources signed it under its own name, that it is well-formed, and that it may
// be used at the given time.
func (p Policy) OpenReferences(token string, now time.Time) (References, error) {
	d, err := p.Digest()
	if err != nil {
		return References{}, err
	}
	if len(p.Sources) == 0 {
		return References{}, fmt.Errorf("reference values: policy %s names no source of any", p.Name)
	}
	var refused []error
	for _, s := range p.Sources {
		keys, err := receipt.ParseKeys(s.Issuer, s.Keys)
		if err != nil {
			return References{}, err
		}
		var raw claims
		if err := keys.Open(TypeReferences, token, &raw); err != nil {
			refused = append(refused, err)
			continue
		}
		r := References{policy: d}
		if r.values, err = parseValues(raw); err != nil {
			return References{}, fmt.Errorf("reference values of %s: %w", s.Issuer, err)
		}
		if !r.ValidAt(now) {
			return References{}, fmt.Errorf("reference values of %s: issued %s, expire %s: not valid at %s", s.Issuer,
				stamp(r.values.IssuedAt), stamp(r.values.Expires), now.UTC().Format(time.RFC3339))
		}
		return r, nil
	}
	return References{}, fmt.Errorf("reference values: %w", errors.Join(refused...))
}

func stamp(unix int64) string { return time.Unix(unix, 0).UTC().Format(time.RFC3339) }

// claims are those of a token, less its type, as they were signed: a value that
// is left out is not one that was given as zero.
type claims map[string]json.RawMessage

// MarshalJSON implements json.Marshaler.
func (c claims) MarshalJSON() ([]byte, error) {
	rest := maps.Clone(c)
	delete(rest, "coffer.type")
	return json.Marshal(map[string]json.RawMessage(rest))
}

func parseValues(c claims) (Values, error) {
	raw, err := json.Marshal(c)
	if err != nil {
		return Values{}, err
	}
	var v Values
	if err := plan.Decode(raw, receipt.MaxToken, &v); err != nil {
		return Values{}, err
	}
	return v, v.validate()
}

var pcrForm = regexp.MustCompile(`^([0-9]|1[0-9]|2[0-3])$`)

func (v Values) validate() error {
	switch {
	case v.Version != ReferencesVersion:
		return fmt.Errorf("version %.40q: want %q", v.Version, ReferencesVersion)
	case v.Issuer == "" || v.IssuedAt <= 0 || v.Expires <= v.IssuedAt:
		return errors.New("want an issuer, and to expire after being issued")
	case v.SNP == nil && v.TPM == nil && v.GPU == nil:
		return errors.New("there are none")
	}
	var errs []error
	if s := v.SNP; s != nil {
		errs = append(errs, match("measurements", s.Measurements, hexOf(48)), match("idKeyDigests", s.IDKeyDigests, hexOf(48)),
			match("chipIds", s.ChipIDs, hexOf(64)))
		for product := range s.MinimumTCB {
			errs = append(errs, among("minimumTCB", []anchor.Product{product}, anchor.Products()))
		}
	}
	if t := v.TPM; t != nil {
		for index, list := range t.PCRs {
			if !pcrForm.MatchString(index) || len(list) == 0 {
				errs = append(errs, fmt.Errorf("pcrs: %.10q: want an index of a PCR, 0 to 23, and values", index))
			}
			errs = append(errs, match("pcrs", list, hexOf(32)))
		}
	}
	if g := v.GPU; g != nil {
		errs = append(errs, match("driverVersions", g.DriverVersions, versionForm.MatchString), match("vbiosVersions", g.VBIOSVersions, versionForm.MatchString),
			match("featureFlags", g.FeatureFlags, func(s string) bool { return slices.Contains(flags, s) }))
	}
	return errors.Join(errs...)
}
