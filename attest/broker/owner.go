package broker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/receipt/sshsig"
)

// Signed is a document with its owner's SSHSIG signature (armored).
type Signed struct {
	Document  []byte
	Signature []byte
}

// bounds is an error if s is larger than a signed decision can be. None is none.
func (s *Signed) bounds() error {
	if s != nil && (len(s.Document) > receipt.MaxApproval || len(s.Signature) > sshsig.MaxSize) {
		return fmt.Errorf("%w: a signed decision has at most %d bytes and its signature %d", ErrInvalid, receipt.MaxApproval, sshsig.MaxSize)
	}
	return nil
}

// policyDigest names what the owner signed; empty if nobody did.
func (a Asset) policyDigest() plan.Digest {
	if len(a.Statement.Document) == 0 {
		return ""
	}
	return plan.Sum(a.Statement.Document)
}

// statement is what the owner of a signs: its policy and labels at its revision.
func (b *Broker) statement(a Asset) ([]byte, error) {
	return receipt.PolicyStatement{
		Version: receipt.PolicyVersion, Broker: b.id, Asset: a.Name, Owner: a.Owner, Revision: a.Revision,
		Policy: receipt.AssetPolicy(a.Policy), Labels: receipt.AssetLabels(a.Labels),
	}.Canonical()
}

// sign takes the owner's signature over the policy of a. An owner whose keys the
// directory knows must sign: whoever writes the store can do much, and not that.
func (b *Broker) sign(ctx context.Context, a *Asset, s *Signed) error {
	keys, _, err := b.approver(ctx, a.Owner)
	if err != nil {
		return err
	}
	a.Statement = Signed{}
	var l check.List
	switch {
	case s == nil && len(keys) == 0:
		return nil
	case s == nil:
		l.Fail("asset.policy-signature", "a policy that "+a.Owner+" signed", "none", "sign it: coffer assets policy "+a.Name+" --key FILE")
		return check.Refuse("policy", l)
	case len(s.Document) > receipt.MaxPolicyStatement || len(s.Signature) > sshsig.MaxSize:
		return fmt.Errorf("%w: a policy statement has at most %d bytes and its signature %d", ErrInvalid, receipt.MaxPolicyStatement, sshsig.MaxSize)
	}
	a.Statement = *s
	if err := b.checkStatement(*a, keys); err != nil {
		l.Fail("asset.policy-signature", "the policy of "+a.Name+", revision "+strconv.FormatInt(a.Revision, 10)+", signed by a key of "+a.Owner, trim(err.Error()), "sign with a key that the policy set has for you")
		return check.Refuse("policy", l)
	}
	return nil
}

// checkStatement holds what an asset is released under against what its owner
// signed with one of keys.
func (b *Broker) checkStatement(a Asset, keys []ssh.PublicKey) error {
	if len(a.Statement.Document) == 0 {
		return errors.New("nobody signed it")
	}
	want, err := b.statement(a)
	if err != nil {
		return err
	}
	if !bytes.Equal(want, a.Statement.Document) {
		return errors.New("the signature is over another policy or revision")
	}
	_, err = b.signatures.verify(a.Statement.Signature, want, receipt.PolicyNamespace, keys)
	return err
}

// unsigned names the assets whose policies their owner should have signed and did
// not, one line each.
func (b *Broker) unsigned(assets []Asset, owner string, keys []ssh.PublicKey) []string {
	var out []string
	for _, a := range assets {
		if len(keys) == 0 || a.Owner != owner {
			continue
		}
		if err := b.checkStatement(a, keys); err != nil {
			out = append(out, "the signature of "+owner+" over the policy of "+a.Name)
		}
	}
	return out
}

// consent finds the signed consent of a grant's owner among its approvals, and
// when it expires. Its digest is empty if there is none that counts.
func (b *Broker) consent(ctx context.Context, g Grant, approvals []StoredApproval) (plan.Digest, time.Time, error) {
	for _, a := range approvals {
		if a.Approver != g.Owner {
			continue
		}
		_, _, expires, err := b.approve(ctx, g, a, receipt.DecisionConsent)
		switch {
		case errors.Is(err, ErrUnavailable):
			return "", time.Time{}, err
		case err == nil:
			return a.Digest, expires, nil
		}
	}
	return "", time.Time{}, nil
}

// addSigned keeps a signed decision, once.
func addSigned(ctx context.Context, tx Tx, s StoredApproval) (added bool, err error) {
	old, err := tx.Approvals(ctx, s.Grant)
	if err != nil {
		return false, err
	}
	own := 0
	for _, o := range old {
		if o.Digest == s.Digest {
			return false, nil
		}
		if o.Approver == s.Approver {
			own++
		}
	}
	if own >= MaxGrantApprovals {
		return false, fmt.Errorf("%w: grant %s has %d decisions by %s, which is as many as one may make", ErrTooMany, s.Grant, own, s.Approver)
	}
	return true, tx.InsertApproval(ctx, s)
}

// mustSign refuses a decision without a signature of somebody whose keys the
// directory knows.
func mustSign(stage string, who Actor, keys []ssh.PublicKey) error {
	if len(keys) == 0 {
		return nil
	}
	var l check.List
	l.Fail("approval.signature", "a signature by a key of "+who.Name, "none", "sign with a key that the broker knows you by")
	return check.Refuse(stage, l)
}
