package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/receipt/sshsig"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/stack"
)

// keyFlag adds --key for what an owner signs.
func keyFlag(cmd *cobra.Command, key *string) {
	cmd.Flags().StringVar(key, "key", "", "SSH key `file` to sign with (default: the stack's own for who acts, if it has one)")
}

// hand is who acts, and the key to sign with. Without a key nothing is signed.
type hand struct {
	name   string
	signer ssh.Signer
	close  func()
}

// hand returns who acts with the key in the file that was named, or with the one
// that the stack has for its own people: it plays them.
func (c *cli) hand(ctx context.Context, key string) (hand, error) {
	h := hand{close: func() {}}
	e, err := stack.OpenEndpoint(c.dir)
	if err != nil {
		return h, err
	}
	if h.name, _, err = c.signedIn(ctx, e); err != nil {
		return h, err
	}
	if h.name == "" {
		h.name = daemon.RoleOwner // the certificate's
	}
	if key == "" {
		key = e.SSHKeyFile(h.name)
		if _, err := os.Stat(key); errors.Is(err, fs.ErrNotExist) || h.name != filepath.Base(h.name) {
			return h, nil
		}
	}
	h.signer, h.close, err = sshSigner(ctx, key)
	return h, err
}

// signAsset signs the policy of a new asset, if there is a key to sign with.
func (c *cli) signAsset(ctx context.Context, b brokerClient, a *brokerv1.CreateAssetRequest, key string) error {
	h, err := c.hand(ctx, key)
	if err != nil || h.signer == nil {
		return err
	}
	defer h.close()
	settle(a.GetPolicy())
	a.Statement, a.StatementSignature, err = h.policy(ctx, c, b, a.GetName(), 1, a.GetPolicy(), a.GetLabels())
	return err
}

// settle fills in the defaults that the broker would.
func settle(p *brokerv1.AssetPolicy) {
	if p.LeaseSeconds == 0 {
		p.LeaseSeconds = defaultLease
	}
	if p.VerifierThreshold == 1 && len(p.Verifiers) == 0 {
		p.VerifierThreshold = 0
	}
}

// defaultLease is the broker's, in seconds.
const defaultLease = 60

func (h hand) policy(ctx context.Context, c *cli, b brokerClient, asset string, revision int64, p *brokerv1.AssetPolicy, l *brokerv1.Labels) (document, signature []byte, err error) {
	info, err := call(ctx, c, "ask the broker for its name", serverBroker, b.Info, &brokerv1.InfoRequest{})
	if err != nil {
		return nil, nil, err
	}
	s := receipt.PolicyStatement{
		Version: receipt.PolicyVersion, Broker: info.GetBrokerId(), Asset: asset, Owner: h.name, Revision: revision,
		Policy: receipt.AssetPolicy{
			Verifiers: p.GetVerifiers(), Threshold: int(p.GetVerifierThreshold()), KEMs: p.GetKems(), Protocols: p.GetProtocols(), LeaseSeconds: p.GetLeaseSeconds(),
			GraceSeconds: p.GetGraceSeconds(), MaxReleases: int(p.GetMaxReleases()), MaxDurationSeconds: p.GetMaxDurationSeconds(), Affirming: p.GetAffirming(),
			StopAtExpiry: p.GetStopAtExpiry(), StopAtKeyDisabled: p.GetStopAtKeyDisabled(), MaxResultAgeSeconds: p.GetMaxResultAgeSeconds(),
		},
		Labels: receipt.AssetLabels{Sensitivity: l.GetSensitivity(), Region: l.GetRegion(), Project: l.GetProject()},
	}
	for _, r := range p.GetApprovals() {
		s.Policy.Approvals = append(s.Policy.Approvals, receipt.Rule{Group: r.GetGroup(), Count: int(r.GetCount())})
	}
	if document, err = s.Canonical(); err != nil {
		return nil, nil, err
	}
	if signature, err = sshsig.Sign(h.signer, receipt.PolicyNamespace, document); err != nil {
		return nil, nil, fmt.Errorf("sign the policy of %s: %w", asset, err)
	}
	return document, signature, nil
}

// decide signs a decision on a grant.
func (h hand) decide(terms receipt.GrantTerms, decision, reason, ticket string) (*brokerv1.Approval, error) {
	canonical, err := terms.Canonical()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	doc, err := receipt.Approval{
		Version: receipt.ApprovalVersion, Broker: terms.Broker, Grant: terms.Grant, Plan: terms.Plan, Assets: terms.Assets, Terms: plan.Sum(canonical),
		Approver: h.name, Decision: decision, Reason: reason, Ticket: ticket, Time: now.Unix(), Expires: max(terms.NotAfter, now.Unix()+1),
	}.Canonical()
	if err != nil {
		return nil, err
	}
	signature, err := sshsig.Sign(h.signer, receipt.ApprovalNamespace, doc)
	if err != nil {
		return nil, fmt.Errorf("sign the decision %q: %w", decision, err)
	}
	return &brokerv1.Approval{Document: doc, Signature: signature}, nil
}

// decideAs is decide for whom it may be that no key is known, and who then decides
// without a signature.
func (c *cli) decideAs(ctx context.Context, key string, terms receipt.GrantTerms, decision, reason string) (*brokerv1.Approval, error) {
	h, err := c.hand(ctx, key)
	if err != nil || h.signer == nil {
		return nil, err
	}
	defer h.close()
	return h.decide(terms, decision, reason, "")
}

// consented signs the consent to a grant that its owner just made, where the broker
// waits for that.
func (c *cli) consented(ctx context.Context, b brokerClient, g *brokerv1.Grant, key string) (*brokerv1.Grant, error) {
	if len(g.GetMissing()) == 0 {
		return g, nil
	}
	_, terms, err := c.readGrant(ctx, b, g.GetId())
	if err != nil {
		return nil, err
	}
	signed, err := c.decideAs(ctx, key, terms, receipt.DecisionConsent, "made by its owner")
	if err != nil || signed == nil {
		return g, err
	}
	res, err := call(ctx, c, "consent to grant "+g.GetId(), serverBroker, b.ApproveGrant, &brokerv1.ApproveGrantRequest{Id: g.GetId(), Approval: signed})
	if err != nil {
		return nil, err
	}
	return res.GetGrant(), nil
}
