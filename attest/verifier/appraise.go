package verifier

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

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
	if err := checkRecipient(e.RecipientKey); err != nil {
		return nil, err
	}
	s.confirm.Recipient = e.RecipientKey
	if s.evidence, err = composite.Open(e); err != nil {
		return nil, err
	}
	return s, nil
}

// TypeCheck is the token type of what Check returns.
const TypeCheck = receipt.TypeCheck

// Bounds on a relying party's own nonce, in characters: at least what binding asks
// for, and at most what EAT allows where it is text (RFC 9711, section 4.1: 88).
const (
	minForeignNonce = 16
	maxForeignNonce = 88
)

// Appraise judges an evidence envelope for one audience: the broker that will
// rely on the result. It returns a signed result whether the evidence is
// accepted or refused; a refusal holds every failed check. Input that is no
// evidence is an error that wraps ErrMalformed. The nonce is counted against the
// caller that endorse.WithCaller noted.
func (v *Verifier) Appraise(ctx context.Context, envelope []byte, audience string) (string, receipt.Result, error) {
	return v.judge(ctx, envelope, audience, receipt.TypeResult, v.useNonce)
}

// Check judges an evidence envelope for a relying party that is no broker of
// coffer's (RFC 9334, section 5.2). The evidence must answer the given nonce,
// which the relying party chose and whose freshness is its own affair; with an
// empty one it must answer a nonce of this verifier's, as in Appraise. The
// result is of TypeCheck: whoever can choose a nonce could have old evidence
// judged again, and no key is released on that.
func (v *Verifier) Check(ctx context.Context, envelope []byte, audience, nonce string) (string, receipt.Result, error) {
	if nonce == "" {
		return v.judge(ctx, envelope, audience, TypeCheck, v.useNonce)
	}
	if len(nonce) < minForeignNonce || len(nonce) > maxForeignNonce || !goodName(nonce) {
		return "", receipt.Result{}, fmt.Errorf("%w: nonce: want %d to %d printable characters without spaces", ErrMalformed, minForeignNonce, maxForeignNonce)
	}
	return v.judge(ctx, envelope, audience, TypeCheck, func(_ context.Context, found string, _ time.Time, l *check.List) (string, error) {
		same(l, "nonce.given", nonce, found, "attest with the nonce that the relying party gave")
		return nonce, nil
	})
}

// developer is who made this verifier, as results say.
const developer = "https://github.com/coffer-run/coffer"

// nonceRule checks the nonce of an envelope, and returns what results say of it.
type nonceRule func(ctx context.Context, nonce string, now time.Time, l *check.List) (string, error)

func (v *Verifier) judge(ctx context.Context, envelope []byte, audience, typ string, answers nonceRule) (string, receipt.Result, error) {
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

	// Is this an answer to the question that was asked, and the first one?
	same(&l, "binding.verifier", v.id, s.VerifierID, "attest to this verifier")
	nonce, err := answers(ctx, s.Nonce, now, &l)
	if err != nil {
		return "", receipt.Result{}, err
	}

	// Do the documents that the evidence binds speak of one and the same job?
	s.checkDocuments(&l)
	t := v.trusted.Load()
	pol := t.policy(s.plan.Policy, &l)
	if pol != nil {
		pol.Source().CheckSandbox(&l, s.sandbox)
	}

	// Is each device genuine, and does it speak of this very challenge?
	found := s.evidence.Appraise(ctx, v.trust(t), now)
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
	r := receipt.Result{
		Profile: receipt.Profile, Verifier: receipt.VerifierIdentity{Developer: developer, Build: v.build},
		Issuer: v.id, Audience: audience, ID: id, IssuedAt: now.Unix(), Expires: now.Add(receipt.ResultLifetime).Unix(),
		Nonce: nonce, Submods: map[string]receipt.Appraisal{},
		Confirmation: s.confirm, JobID: s.JobID, PlanDigest: plan.Sum(s.Plan), SandboxDigest: plan.Sum(s.Sandbox),
		Policy: s.plan.Policy, EvidenceDigest: plan.Sum(envelope),
		// Nothing that a simulation's verifier says counts as real, not even of
		// evidence whose devices are missing.
		Simulated: v.simulated || found.Simulated(), Checks: clipAll(l),
	}
	for _, d := range found.Devices() {
		r.Submods[d.Name] = appraisal(d, s.plan.Policy, len(l.Failed()) == 0)
	}
	if found.CPU == nil {
		// An EAR has at least one submodule, and every policy asks for this one.
		r.Submods["cpu0"] = receipt.Appraisal{Status: receipt.Contraindicated, Vector: missing(), PolicyID: policyID(s.plan.Policy), Claims: map[string]any{}}
	}
	token, err := v.keys.Load().signer.Sign(typ, r)
	if err != nil {
		return "", receipt.Result{}, err
	}
	if len(token) > receipt.MaxToken {
		return "", receipt.Result{}, fmt.Errorf("%w: result of %d bytes, at most %d are allowed", ErrMalformed, len(token), receipt.MaxToken)
	}
	return token, r, nil
}

// trust is what appraisals of devices believe.
func (v *Verifier) trust(t *trusted) composite.Trust {
	return composite.Trust{Anchors: t.anchors, CredentialKeys: v.keys.Load().public, GPUEndorsements: v.endorsements, Endorsements: v.endorsed, TPMMemory: &v.attestationKeys}
}

// checkDocuments holds the sandbox against the plan and the job.
func (s *statement) checkDocuments(l *check.List) {
	same(l, "sandbox.job", s.JobID, s.sandbox.JobID, "the sandbox was made for another job")
	same(l, "sandbox.image", s.plan.Image, s.sandbox.Image, "the sandbox runs another image than the plan names")
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
func (t *trusted) policy(want plan.Policy, l *check.List) *rego.Policy {
	p, ok := t.policies[want.Digest]
	if !ok {
		l.Fail("policy.known", "a policy that this verifier has", clip(want.Name)+" "+string(want.Digest), "give the verifier this policy, or plan with one that it has")
		return nil
	}
	if !same(l, "policy.known", p.Source().Name, want.Name, "the plan calls the policy by another name") {
		return nil
	}
	return p
}

// appraisal makes a submodule of the result. Its status is what the policy says
// of the device, if all of the device's checks hold, and affirming only if those
// of the whole do too.
func appraisal(d *composite.Device, p plan.Policy, whole bool) receipt.Appraisal {
	checks := clipAll(d.Checks, d.Accepted)
	a := receipt.Appraisal{Status: receipt.Contraindicated, PolicyID: policyID(p), Claims: d.Claims, Checks: checks, Vector: vector(d.Kind, grades(checks))}
	// A device on which the policy did not speak was not accepted by it.
	accepted := d.Genuine() && len(d.Accepted) > 0
	switch {
	case accepted && d.Tier == receipt.Affirming && whole && len(checks.Failed()) == 0:
		a.Status = receipt.Affirming
	case accepted && (d.Tier == receipt.Warning || d.Tier == receipt.None):
		a.Status = d.Tier
	}
	return a
}

func policyID(p plan.Policy) string { return "policy:" + clip(p.Name) + "@" + string(p.Digest) }

// maxText bounds one text of a check. Evidence may be made to say more.
const maxText = 400

// same records whether two texts are equal as they are. What is recorded is clipped,
// and clipped texts may be equal where the texts are not.
func same(l *check.List, id, expected, found, hint string) bool {
	if expected != found && clip(expected) == clip(found) {
		l.Fail(id, clip(expected), "other characters than these", hint)
		return false
	}
	return l.Equal(id, clip(expected), clip(found), hint)
}

func clip(s string) string {
	if plain(s) {
		return s
	}
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

// plain is true of a text that clip leaves as it is, as nearly every one is.
func plain(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return len(s) <= maxText
}

// clipAll returns a list of its own.
func clipAll(lists ...check.List) check.List {
	out := slices.Concat(lists...)
	for i := range out {
		c := &out[i]
		c.Expected, c.Found, c.Hint = clip(c.Expected), clip(c.Found), clip(c.Hint)
	}
	return out
}
