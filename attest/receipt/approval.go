package receipt

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/coffer-run/coffer/attest/plan"
)

const (
	// TermsVersion is the only version of grant terms there is.
	TermsVersion = "coffer.run/grant-terms/v1"
	// ApprovalVersion is the only approval version there is.
	ApprovalVersion = "coffer.run/approval/v1"
	// ApprovalNamespace is the SSHSIG namespace of approvals: a signature made for
	// anything else is none here.
	ApprovalNamespace = "coffer-approval@coffer.run"
	// DecisionApprove counts for the rules of the assets' policies, DecisionConsent
	// is the yes of the assets' owner, and DecisionDeny ends a request. None stands
	// for another.
	DecisionApprove = "approve"
	DecisionConsent = "consent"
	DecisionDeny    = "deny"
	// MaxApproval bounds an encoded approval, in bytes.
	MaxApproval = 16 << 10
	// MaxApprovalText bounds the reason and the ticket of an approval, in bytes each.
	MaxApprovalText = 512
)

// GrantTerms are what a grant allows, and never change. Approvals name the
// SHA-384 of their canonical form, so that none counts for other terms.
type GrantTerms struct {
	Version string `json:"version"`
	Broker  string `json:"broker"`
	Grant   string `json:"grant"`
	// Owner is the name of the assets' owner, Requester is "ROLE/NAME".
	Owner     string      `json:"owner"`
	Requester string      `json:"requester"`
	Assets    []string    `json:"assets"`
	Plan      plan.Digest `json:"plan"`
	// Principals are who may use the grant; empty is every agent and submitter.
	Principals []string `json:"principals,omitempty"`
	// NotBefore and NotAfter are in seconds since 1970.
	NotBefore      int64  `json:"notBefore"`
	NotAfter       int64  `json:"notAfter"`
	MaxReleases    int    `json:"maxReleases"`
	AllowSimulated bool   `json:"allowSimulated"`
	Purpose        string `json:"purpose,omitempty"`
}

// Canonical returns the bytes whose digest approvals name.
func (t GrantTerms) Canonical() ([]byte, error) {
	if t.Version != TermsVersion || t.Broker == "" || t.Grant == "" || t.Owner == "" || t.Requester == "" || len(t.Assets) == 0 || t.Plan.Bytes() == nil || t.MaxReleases < 1 {
		return nil, errors.New("grant terms are incomplete")
	}
	return plan.Canonical(t)
}

// Approval is what an approver or an owner signs: a decision on one grant, as it
// stands. The signature is an SSHSIG over the canonical form in ApprovalNamespace.
type Approval struct {
	Version string      `json:"version"`
	Broker  string      `json:"broker"`
	Grant   string      `json:"grant"`
	Plan    plan.Digest `json:"plan"`
	Assets  []string    `json:"assets"`
	// Terms is the digest of the canonical GrantTerms.
	Terms    plan.Digest `json:"terms"`
	Approver string      `json:"approver"`
	Decision string      `json:"decision"`
	Reason   string      `json:"reason"`
	Ticket   string      `json:"ticket,omitempty"`
	// Time is when it was made and Expires when it stops counting, in seconds
	// since 1970.
	Time    int64 `json:"time"`
	Expires int64 `json:"expires"`
}

// Canonical returns the bytes that are signed.
func (a Approval) Canonical() ([]byte, error) {
	switch {
	case a.Version != ApprovalVersion:
		return nil, fmt.Errorf("approval version %.40q: want %q", a.Version, ApprovalVersion)
	case a.Broker == "" || a.Grant == "" || a.Plan.Bytes() == nil || len(a.Assets) == 0 || a.Terms.Bytes() == nil || a.Approver == "":
		return nil, errors.New("approval is incomplete")
	case a.Decision != DecisionApprove && a.Decision != DecisionConsent && a.Decision != DecisionDeny:
		return nil, fmt.Errorf("approval decides %.40q: want %q, %q or %q", a.Decision, DecisionApprove, DecisionConsent, DecisionDeny)
	case a.Reason == "" || len(a.Reason) > MaxApprovalText || len(a.Ticket) > MaxApprovalText:
		return nil, fmt.Errorf("approval has a reason, and reason and ticket have at most %d bytes", MaxApprovalText)
	case a.Time <= 0 || a.Expires <= a.Time:
		return nil, errors.New("approval expires after it was made")
	}
	return plan.Canonical(a)
}

// ParseApproval reads an approval. Only the canonical form is one. Who signed it
// and what it decides is not checked here.
func ParseApproval(b []byte) (Approval, error) {
	var a Approval
	if err := plan.Decode(b, MaxApproval, &a); err != nil {
		return Approval{}, fmt.Errorf("parse approval: %w", err)
	}
	c, err := a.Canonical()
	if err != nil {
		return Approval{}, fmt.Errorf("parse approval: %w", err)
	}
	if !bytes.Equal(c, b) {
		return Approval{}, errors.New("parse approval: not in canonical form (RFC 8785)")
	}
	return a, nil
}
