package verifier

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/composite"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy/rego"
	"github.com/coffer-run/coffer/attest/receipt"
)

// TypeDevices is the token type of what CheckDevices returns. Brokers and bundles
// take receipt.TypeResult alone, so that no key is released on it whatever else
// it says.
const TypeDevices = "device-check"

// Devices is evidence as devices hand it out, of one device or several, outside
// of coffer's envelope: of no plan, no job and no keys.
type Devices struct {
	SNP *SNPDevice
	// TPM is as in an envelope. An agent's log may be left out.
	TPM  *evidence.TPM
	GPUs []evidence.GPU
	// Named is what the caller says that each of them must speak of.
	Named composite.Alone
	// Policy names the policy of the verifier's that the devices are held against,
	// each by itself. Empty: whether they are acceptable is not asked.
	Policy string
}

// SNPDevice is an SEV-SNP report, or a report of Azure's paravisor with one in it.
type SNPDevice struct {
	evidence.SNP
	// Chain is DER: VCEK or VLEK, then its issuer, then the root key's
	// certificate, as far as they are there, in the place of a certificate table.
	Chain [][]byte
}

// Named is what a caller of CheckDevices said that devices must speak of, in
// lower-case hex.
type Named struct {
	SNPReportData string `json:"snp-report-data,omitempty"`
	TPMExtraData  string `json:"tpm-extra-data,omitempty"`
	GPUNonce      string `json:"gpu-nonce,omitempty"`
}

// DevicesResult is the claims set of a result on devices by themselves (EAR). It
// has no job, no plan and no key to confirm.
type DevicesResult struct {
	Profile  string                       `json:"eat_profile"`
	Verifier receipt.VerifierIdentity     `json:"ear.verifier-id"`
	Issuer   string                       `json:"iss"`
	Audience string                       `json:"aud"`
	ID       string                       `json:"jti"`
	IssuedAt int64                        `json:"iat"`
	Expires  int64                        `json:"exp"`
	Submods  map[string]receipt.Appraisal `json:"submods"`
	// Named is what each device was found to speak of, or was refused for not
	// speaking of. Whether that is fresh, the verifier does not know.
	Named Named `json:"coffer.named"`
	// Policy is absent where the caller asked for none.
	Policy *plan.Policy `json:"coffer.policy,omitempty"`
	// Simulated is true if any device's chain ended in a simulation anchor.
	Simulated bool `json:"coffer.simulated"`
	// Checks are those of no single device.
	Checks check.List `json:"coffer.checks"`
}

// CheckDevices judges devices by themselves for a relying party (RFC 9334,
// section 5.2) that names what each must speak of. It returns a signed result
// (TypeDevices) whether they are accepted or refused; a refusal holds every failed
// check. A device without something named for it, something named for no device,
// and input that is no evidence are errors that wrap ErrMalformed.
//
// That evidence of several devices comes from one machine, and that it is fresh,
// follows from what the caller named alone. A device is affirmed only by a
// policy; without one the best is "none".
func (v *Verifier) CheckDevices(ctx context.Context, d Devices, audience string) (string, DevicesResult, error) {
	if !goodName(audience) {
		return "", DevicesResult{}, fmt.Errorf("%w: audience: want 1 to %d printable characters without spaces", ErrMalformed, maxName)
	}
	s, err := d.open()
	if err != nil {
		return "", DevicesResult{}, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if err := ctx.Err(); err != nil {
		return "", DevicesResult{}, err
	}
	now, t := v.clock(), v.trusted.Load()
	found := s.Appraise(ctx, v.trust(t), now)
	if err := ctx.Err(); err != nil {
		return "", DevicesResult{}, err
	}
	r := DevicesResult{
		Profile: receipt.Profile, Verifier: receipt.VerifierIdentity{Developer: developer, Build: v.build},
		Issuer: v.id, Audience: audience, IssuedAt: now.Unix(), Expires: now.Add(receipt.ResultLifetime).Unix(),
		Submods: map[string]receipt.Appraisal{}, Named: d.named(), Simulated: v.simulated || found.Simulated(),
	}
	l := found.Checks
	if d.Policy == "" {
		l.Skip("policy.known", "no policy was asked for: whether the devices are acceptable was not judged")
		for _, dev := range found.Devices() {
			r.Submods[dev.Name] = unjudged(dev)
		}
	} else {
		ref, p := t.named(d.Policy, &l)
		r.Policy = &ref
		l = append(l, found.Decide(p, len(found.GPUs))...)
		for _, dev := range found.Devices() {
			r.Submods[dev.Name] = appraisal(dev, ref, len(l.Failed()) == 0)
		}
	}
	r.Checks = clipAll(l)
	if r.ID, err = tokenID(); err != nil {
		return "", DevicesResult{}, err
	}
	token, err := v.keys.Load().signer.Sign(TypeDevices, r)
	if err != nil {
		return "", DevicesResult{}, err
	}
	if len(token) > receipt.MaxToken {
		return "", DevicesResult{}, fmt.Errorf("%w: result of %d bytes, at most %d are allowed", ErrMalformed, len(token), receipt.MaxToken)
	}
	return token, r, nil
}

// unjudged is the submodule of a device that no policy was asked about.
func unjudged(d *composite.Device) receipt.Appraisal {
	checks := clipAll(d.Checks)
	a := receipt.Appraisal{Status: receipt.Contraindicated, PolicyID: "policy:none", Claims: d.Claims, Checks: checks, Vector: vector(d.Kind, grades(checks))}
	if d.Genuine() {
		a.Status = receipt.None
	}
	return a
}

// named finds a policy by its name. Without one nil is returned, which accepts
// nothing; of two by one name neither is meant.
func (t *trusted) named(name string, l *check.List) (plan.Policy, *rego.Policy) {
	var digest plan.Digest
	n := 0
	for d, p := range t.policies {
		if p.Source().Name == name {
			digest, n = d, n+1
		}
	}
	if n != 1 {
		l.Fail("policy.known", "one policy of this verifier's", fmt.Sprintf("%d are named %s", n, clip(name)), "name a policy that this verifier has")
		return plan.Policy{Name: clip(name)}, nil
	}
	l.Pass("policy.known", clip(name))
	return plan.Policy{Name: name, Digest: digest}, t.policies[digest]
}

func (d Devices) open() (*composite.Statement, error) {
	if len(d.Policy) > maxName {
		return nil, errors.New("policy: the name is too long")
	}
	e := &evidence.Envelope{TPM: d.TPM, GPUs: d.GPUs}
	if d.SNP != nil {
		s := d.SNP.SNP
		if len(d.SNP.Chain) > 0 {
			if len(s.Certificates) > 0 {
				return nil, errors.New("snp: both a certificate table and certificates")
			}
			var err error
			if s.Certificates, err = chainTable(d.SNP.Chain); err != nil {
				return nil, fmt.Errorf("snp: certificates: %w", err)
			}
		}
		e.SNP = &s
	}
	return composite.OpenAlone(e, d.Named)
}

// chainTable writes certificates as platforms hand them out.
func chainTable(chain [][]byte) ([]byte, error) {
	if len(chain) > 3 {
		return nil, fmt.Errorf("%d certificates, want at most 3", len(chain))
	}
	c, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, err
	}
	kinds := []string{"VCEK", "ASK", "ARK"}
	if c.Subject.CommonName == "SEV-VLEK" {
		kinds[0] = "VLEK"
	}
	var table []tableEntry
	for i, der := range chain {
		if len(der) > evidence.MaxPart {
			return nil, fmt.Errorf("one of %d bytes", len(der))
		}
		table = append(table, tableEntry{kbsGUID(kinds[i]), der})
	}
	return encodeTable(table), nil
}

func (d Devices) named() Named {
	var n Named
	if b := d.Named.SNPReportData; b != nil {
		n.SNPReportData = hex.EncodeToString(b[:])
	}
	n.TPMExtraData = hex.EncodeToString(d.Named.TPMExtraData)
	if b := d.Named.GPUNonce; b != nil {
		n.GPUNonce = hex.EncodeToString(b[:])
	}
	return n
}
