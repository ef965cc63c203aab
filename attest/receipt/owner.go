package receipt

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/coffer-run/coffer/attest/plan"
)

const (
	// PolicyVersion is the only version of policy statements there is.
	PolicyVersion = "coffer.run/asset-policy/v1"
	// PolicyNamespace is the SSHSIG namespace of policy statements.
	PolicyNamespace = "coffer-asset-policy@coffer.run"
	// MaxPolicyStatement bounds an encoded policy statement, in bytes.
	MaxPolicyStatement = 16 << 10
)

// Rule asks for approvals by Count members of Group.
type Rule struct {
	Group string `json:"group"`
	Count int    `json:"count"`
}

// AssetPolicy says under what an asset's key is released. Its owner signs it.
type AssetPolicy struct {
	// Approvals must all hold. Without any, a grant needs the owner's consent, for
	// which approvals that another asset's policy asks for do not stand.
	Approvals []Rule `json:"approvals,omitempty"`
	// Verifiers are whose results count, Threshold how many of them must have
	// one. Empty is every one that the broker knows, and one.
	Verifiers []string `json:"verifiers,omitempty"`
	Threshold int      `json:"verifierThreshold,omitempty"`
	// KEMs are the kinds of recipient keys; empty is mlkem768-x25519 alone.
	KEMs []string `json:"kems,omitempty"`
	// Protocols serve the asset; empty is coffer's own alone.
	Protocols []string `json:"protocols,omitempty"`
	// LeaseSeconds and GraceSeconds are Lease's.
	LeaseSeconds int64 `json:"leaseSeconds"`
	GraceSeconds int64 `json:"graceSeconds"`
	// MaxReleases and MaxDurationSeconds bound grants; 0 is the broker's bound.
	MaxReleases        int   `json:"maxReleases,omitempty"`
	MaxDurationSeconds int64 `json:"maxDurationSeconds,omitempty"`
	// Affirming are claims of the trust vector (draft-ietf-rats-ar4si, section
	// 2.3) that at least one device must affirm. No device may be less than
	// affirming in any case.
	Affirming []string `json:"affirming,omitempty"`
	// StopAtExpiry stops running jobs when their grant ends.
	StopAtExpiry bool `json:"stopAtExpiry,omitempty"`
	// StopAtKeyDisabled stops running jobs when the key-encryption key of the asset
	// is disabled at its store.
	StopAtKeyDisabled bool `json:"stopAtKeyDisabled,omitempty"`
	// MaxResultAgeSeconds stops running jobs whose newest attestation result is
	// older; 0 asks for no result after the first.
	MaxResultAgeSeconds int64 `json:"maxResultAgeSeconds,omitempty"`
}

// AssetLabels are what access policies see of an asset.
type AssetLabels struct {
	Sensitivity string `json:"sensitivity,omitempty"`
	Region      string `json:"region,omitempty"`
	Project     string `json:"project,omitempty"`
}

// PolicyStatement is an owner's word on one asset: this is its policy from
// Revision on. The signature is an SSHSIG over the canonical form in
// PolicyNamespace. It carries no time; revisions count from 1 without gaps.
type PolicyStatement struct {
	Version string `json:"version"`
	Broker  string `json:"broker"`
	Asset   string `json:"asset"`
	// Owner is the name of the asset's owner, who signs.
	Owner    string      `json:"owner"`
	Revision int64       `json:"revision"`
	Policy   AssetPolicy `json:"policy"`
	Labels   AssetLabels `json:"labels"`
}

// Canonical returns the bytes that are signed.
func (s PolicyStatement) Canonical() ([]byte, error) {
	switch {
	case s.Version != PolicyVersion:
		return nil, fmt.Errorf("policy statement version %.40q: want %q", s.Version, PolicyVersion)
	case s.Broker == "" || s.Asset == "" || s.Owner == "" || s.Revision < 1:
		return nil, errors.New("policy statement is incomplete")
	}
	return plan.Canonical(s)
}

// ParsePolicyStatement reads a statement. Only the canonical form is one. Who
// signed it is not checked here.
func ParsePolicyStatement(b []byte) (PolicyStatement, error) {
	var s PolicyStatement
	if err := plan.Decode(b, MaxPolicyStatement, &s); err != nil {
		return PolicyStatement{}, fmt.Errorf("parse policy statement: %w", err)
	}
	c, err := s.Canonical()
	if err != nil {
		return PolicyStatement{}, fmt.Errorf("parse policy statement: %w", err)
	}
	if !bytes.Equal(c, b) {
		return PolicyStatement{}, errors.New("parse policy statement: not in canonical form (RFC 8785)")
	}
	return s, nil
}

// Held says where a released data key was kept, by the broker's word.
type Held struct {
	// Store is the name of the key store, "broker" for the broker's own
	// key-encryption key.
	Store string `json:"store"`
	// Key and Version name the key-encryption key; Version is 0 where keys have
	// none.
	Key     string `json:"key"`
	Version uint32 `json:"version,omitempty"`
	// Attested is the digest of the attestation result of the broker's own machine
	// that the store asked for before it opened the key; empty if it asked for none.
	Attested plan.Digest `json:"attested,omitempty"`
}
