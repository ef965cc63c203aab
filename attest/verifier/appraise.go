package verifier

import (
	"context"
	"crypto/hpke"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/composite"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy/rego"
	"github.com/coffer-run/coffer/attest/receipt"
)

// statement is well-formed evidence, before anything in it is believed.
type statement struct {
	*evidence.Envelope
	plan     plan.Plan
	sandbox  plan.Sandbox
	confirm  receipt.Confirmation
	evidence *composite.Statement
}

// parse reads an envelope and the documents in it.
func parse(b []byte) (*statement, error) {
	e, err := evidence.Parse(b)
	if err != nil {
		return nil, err
	}
	s := &statement{Envelope: e}
	if !goodName(e.JobID) {
		return nil, fmt.Errorf("job id: want 1 to %d printable characters without spaces", maxName)
	}
	if s.plan, err = plan.Parse(e.Plan); err != nil {
		return nil, err
	}
	if s.sandbox, err = plan.ParseSandbox(e.Sandbox); err != nil {
		return nil, err
	}
	if s.confirm.JWK, err = receipt.SessionJWK(e.SessionKey); err != nil {
		return nil, err
	}
	if _, err := hpke.MLKEM768X25519().NewPublicKey(e.RecipientKey); err != nil {
		return nil, fmt.Errorf("recipient key: %w", err)
	}
	s.confirm.Recipient = e.RecipientKey
	if s.evidence, err = composite.Open(e); err != nil {
		return nil, err
	}
	return s, nil
}

// Appraise judges an evidence envelope for one audience: the broker that will
// rely on the result. It returns a signed result whether the evidence is
// accepted or refused; a refusal holds every failed check. Input that is no
// evidence is an error that wraps ErrMalformed.
func (v *Verifier) Appraise(ctx context.Context, envelope []byte, audience string) (string, receipt.Result, error) {
	if !goodName(audience) {
		return "", receipt.Result{}, fmt.Errorf("%w: audience: want 1 to %d printable characters without spaces", ErrMalformed, maxName)
	}
	s, err := parse(envelope)
	if err != nil {
		return "", receipt.Result{}, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if err := ctx.Err(); err != nil {
		return "", receipt.Result{}, err
	}
	now := v.clock()
	var l check.List

	// Is this an answer to a question of ours, and the first one?
	l.Equal("binding.verifier", v.id, clip(s.VerifierID), "attest to this verifier with its own nonce")
	if err := v.useNonce(s.Nonce, now, &l); err != nil {
		return "", receipt.Result{}, err
	}

	// Do the documents that the evidence binds speak of one and the same job?
	s.checkDocuments(&l)
	pol := v.policy(s.plan.Policy, &l)

	// Is each device genuine, and does it speak of this very challenge?
	found := s.evidence.Appraise(ctx, composite.Trust{Anchors: v.anchors, CredentialKeys: v.keys, GPUEndorsements: v.endorsements, Endorsements: v.endorsed}, now)
	if err := ctx.Err(); err != nil {
		return "", receipt.Result{}, err
	}
	l = append(l, found.Checks...)

	// Does the policy accept them?
	l = append(l, found.Decide(pol, s.plan.Resources.GPUs)...)

	id, err := tokenID()
	if err != nil {
		return "", receipt.Result{}, err
	}
	nonce := sha256.Sum256([]byte(s.Nonce))
	r := receipt.Result{
		Profile: receipt.Profile, Verifier: receipt.VerifierIdentity{Developer: "https://github.com/coffer-run/coffer", Build: v.build},
		Issuer: v.id, Audience: audience, ID: id, IssuedAt: now.Unix(), Expires: now.Add(receipt.ResultLifetime).Unix(),
		Nonce: hex.EncodeToString(nonce[:]), Submods: map[string]receipt.Appraisal{},
		Confirmation: s.confirm, JobID: s.JobID, PlanDigest: plan.Sum(s.Plan), SandboxDigest: plan.Sum(s.Sandbox),
		Policy: s.plan.Policy, EvidenceDigest: plan.Sum(envelope),
		// Nothing that a simulation's verifier says counts as real, not even of
		// evidence whose devices are missing.
		Simulated: v.anchors.Simulated() || found.Simulated(), Checks: clipAll(l),
	}
	for _, d := range found.Devices() {
		r.Submods[d.Name] = appraisal(d, s.plan.Policy, len(l.Failed()) == 0)
	}
	if found.CPU == nil {
		// An EAR has at least one submodule, and every policy asks for this one.
		r.Submods["cpu0"] = receipt.Appraisal{Status: receipt.Contraindicated, Vector: missing(), PolicyID: policyID(s.plan.Policy), Claims: map[string]any{}}
	}
	token, err := v.signer.Sign(receipt.TypeResult, r)
	if err != nil {
		return "", receipt.Result{}, err
	}
	if len(token) > receipt.MaxToken {
		return "", receipt.Result{}, fmt.Errorf("%w: result of %d bytes, at most %d are allowed", ErrMalformed, len(token), receipt.MaxToken)
	}
	return token, r, nil
}

// checkDocuments holds the sandbox against the plan and the job.
func (s *statement) checkDocuments(l *check.List) {
	l.Equal("sandbox.job", clip(s.JobID), clip(s.sandbox.JobID), "the sandbox was made for another job")
	l.Equal("sandbox.image", s.plan.Image, clip(s.sandbox.Image), "the sandbox runs another image than the plan names")
	d, err := s.sandbox.Profile.Digest()
	if err != nil {
		l.Fail("sandbox.profile", string(s.plan.SandboxProfile), err.Error(), "")
	} else {
		l.Equal("sandbox.profile", string(s.plan.SandboxProfile), string(d), "the sandbox is made of other binaries, flags or rules than the plan names")
	}
	l.Skip("sandbox.specification", "that it follows from plan and profile is the measured agent's word")
}

// policy finds the policy that the plan pins. Without one nil is returned, which
// accepts nothing.
func (v *Verifier) policy(want plan.Policy, l *check.List) *rego.Policy {
	p, ok := v.policies[want.Digest]
	if !ok {
		l.Fail("policy.known", "a policy that this verifier has", clip(want.Name)+" "+string(want.Digest), "give the verifier this policy, or plan with one that it has")
		return nil
	}
	if !l.Equal("policy.known", p.Source().Name, clip(want.Name), "the plan calls the policy by another name") {
		return nil
	}
	return p
}

// appraisal makes a submodule of the result. It affirms only if all checks of
// the device hold, and those of the whole.
func appraisal(d *composite.Device, p plan.Policy, whole bool) receipt.Appraisal {
	checks := clipAll(append(append(check.List(nil), d.Checks...), d.Accepted...))
	a := receipt.Appraisal{Status: receipt.Contraindicated, PolicyID: policyID(p), Claims: d.Claims, Checks: checks, Vector: vector(d.Kind, grades(checks))}
	// A device on which the policy did not speak was not accepted by it.
	if whole && d.Genuine() && len(d.Accepted) > 0 && len(checks.Failed()) == 0 {
		a.Status = receipt.Affirming
	}
	return a
}

func policyID(p plan.Policy) string { return "policy:" + clip(p.Name) + "@" + string(p.Digest) }

// maxText bounds one text of a check. Evidence may be made to say more.
const maxText = 400

func clip(s string) string {
	if len(s) > maxText {
		s = s[:maxText] + "..."
	}
	return strings.Map(func(c rune) rune {
		if c < ' ' || c > '~' {
			return '?'
		}
		return c
	}, s)
}

func clipAll(l check.List) check.List {
	out := make(check.List, len(l))
	for i, c := range l {
		c.Expected, c.Found, c.Hint = clip(c.Expected), clip(c.Found), clip(c.Hint)
		out[i] = c
	}
	return out
}
