package broker

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

// reattestStage is where a refusal of a later result says that it happened.
const reattestStage = "reattest"

// reattestEntries bounds the log entries of one job that record later results. One
// that affirms counts whether or not there is room to log it; one that does not is
// then a stop, which is always logged.
const reattestEntries = MaxJobEntries / 2

// Attested is where a running job stands with its attestation results.
type Attested struct {
	// Verifier issued the newest result that affirms, ResultID names it, and
	// IssuedAt is when, in seconds since 1970.
	Verifier string `json:"verifier,omitempty"`
	ResultID string `json:"resultId,omitempty"`
	IssuedAt int64  `json:"issuedAt,omitempty"`
	// Recipient is the digest of the recipient key in it.
	Recipient plan.Digest `json:"recipient,omitempty"`
	Simulated bool        `json:"simulated,omitempty"`
	// Sandbox is what the job runs in, GPUs are those that it was released to.
	Sandbox plan.Digest `json:"sandbox,omitempty"`
	GPUs    []string    `json:"gpus,omitempty"`
	// MaxAge stops the job once the result is older, in seconds; 0 is no bound.
	MaxAge int64 `json:"maxAge,omitempty"`
	// Count is how many results were logged after the first.
	Count int `json:"count,omitempty"`
	// Pauses is that the plan has the job wait after a result that does not affirm.
	// Refused says why it waits, and Since from when on, in seconds since 1970.
	Pauses  bool   `json:"pauses,omitempty"`
	Refused string `json:"refused,omitempty"`
	Since   int64  `json:"since,omitempty"`
}

// attested is where a job stands once the claim's key is released to it.
func (c claim) attested(had Lease, p Policy) Attested {
	most := c.reattest.MaxAge()
	if !c.shown {
		most = MinResultAge
	}
	a := Attested{
		Verifier: c.verifier, ResultID: c.result.ID, IssuedAt: c.result.IssuedAt, Recipient: c.recipient, Simulated: c.result.Simulated,
		MaxAge: shorter(p.MaxResultAgeSeconds, most), Pauses: c.reattest.Pauses(),
		Sandbox: c.result.SandboxDigest, GPUs: claims(c.results(), claimGPU),
	}
	if had.JobID == "" {
		return a
	}
	// The strictest of all that the job has keys for: a result that one key is not
	// released for must not keep the lease of that key.
	a.Simulated = a.Simulated && had.Attested.Simulated
	a.MaxAge, a.Count = shorter(a.MaxAge, had.Attested.MaxAge), had.Attested.Count
	a.Pauses = a.Pauses && had.Attested.Pauses
	a.GPUs = join(a.GPUs, had.Attested.GPUs)
	return a
}

// claimGPU names a GPU by its device's certificate (nvgpu.ClaimDevice), which stays
// where that of its firmware changes.
const claimGPU = "gpu.device"

// shorter is the smaller of two times of which 0 is no bound.
func shorter(a, b int64) int64 {
	if a == 0 || b == 0 {
		return max(a, b)
	}
	return min(a, b)
}

// late says why the job has to stop for want of a result at now; empty is that it
// need not.
func (a Attested) late(now time.Time, lease int64) string {
	switch {
	case a.Refused != "" && now.Unix() >= a.Since+lease:
		return a.Refused
	case a.MaxAge > 0 && now.Unix() > a.IssuedAt+a.MaxAge:
		return receipt.LateReason(a.IssuedAt, a.MaxAge)
	}
	return ""
}

// Reattest takes a later attestation result of a running job: one by the same
// verifier, for the same plan, keys and chip, newer than what the broker has. If it
// affirms, it counts from when the verifier issued it. If it does not, the job is
// told to stop without grace, or gets no lease until one affirms where its plan
// pauses: for as long as its lease at most. Every other result is a *check.Refusal
// at stage "reattest" and changes nothing.
func (b *Broker) Reattest(ctx context.Context, agent Actor, job, result string) error {
	if !jobForm.MatchString(job) || len(result) > receipt.MaxToken {
		return fmt.Errorf("%w: result for job %.80q of %d bytes, at most %d are allowed", ErrInvalid, job, len(result), receipt.MaxToken)
	}
	if err := b.may(ctx, agent, ActionReattest, Resource{Kind: "job", Name: job}); err != nil {
		return err
	}
	var l check.List
	issuer := issuerOf(result)
	keys, ok := b.verifiers[issuer]
	if !ok {
		l.Fail("result.issuer", "a result of a verifier that this broker trusts", strconv.Quote(trim(issuer)), "attest to the verifier of the release")
		return check.Refuse(reattestStage, l)
	}
	var r receipt.Result
	if err := keys.Open(receipt.TypeResult, result, &r); err != nil {
		l.Fail("result.signature", "a result signed by "+issuer, trim(err.Error()), "ask the verifier for a new result")
		return check.Refuse(reattestStage, l)
	}
	refused := ""
	if receipt.RefusedFor(r) != "" {
		refused = receipt.RefusedReason(r)
	}
	return b.update(ctx, func(ctx context.Context, tx Tx) error {
		lease, none, err := leaseOf(ctx, tx, agent, job)
		if err != nil {
			return err
		}
		var l check.List
		if none != "" {
			l.Fail("reattest.lease", "a running job of this agent", none, "")
			return check.Refuse(reattestStage, l)
		}
		if reason := lease.reason(b.now()); reason != "" {
			l.Fail("reattest.stopped", "a job that may run", reason, "start another job")
			return check.Refuse(reattestStage, l)
		}
		if err := b.checkLater(ctx, tx, &l, lease, issuer, r); err != nil {
			return err
		}
		if refused == "" {
			if err := b.checkAffirms(ctx, tx, &l, lease, issuer, r); err != nil {
				return err
			}
		}
		if len(l.Failed()) > 0 {
			return check.Refuse(reattestStage, l)
		}
		if err := tx.InsertUse(ctx, Use{Verifier: issuer, Nonce: r.Nonce, ResultID: r.ID, Recipient: plan.Sum(r.Confirmation.Recipient)}); err != nil {
			return unexpected(err)
		}
		last, err := tx.JobHead(ctx, job)
		if err != nil {
			return err
		}
		if lease.Attested.Count < reattestEntries && last.Size < MaxJobEntries-bundleEntries {
			lease.Attested.Count++
			if _, err := b.log(ctx, tx, translog.Body{Kind: translog.KindReattest, Actor: agent.String(), Job: job, Reattest: &translog.Reattest{
				Result: translog.Result{Verifier: issuer, ResultID: r.ID, Evidence: r.EvidenceDigest}, IssuedAt: r.IssuedAt, Refused: receipt.RefusedFor(r),
			}}); err != nil {
				return err
			}
		} else {
			// A job that waits would be in no log.
			lease.Attested.Pauses = false
		}
		return b.settle(ctx, tx, agent, lease, r, refused)
	})
}

// settle gives a job's lease what a result does to it.
func (b *Broker) settle(ctx context.Context, tx Tx, agent Actor, lease Lease, r receipt.Result, refused string) error {
	now := b.now().UTC().Truncate(time.Second)
	switch a := &lease.Attested; {
	case refused == "":
		a.ResultID, a.IssuedAt, a.Refused, a.Since = r.ID, r.IssuedAt, "", 0
	case a.Pauses && a.Refused == "":
		a.Refused, a.Since = refused, now.Unix()
	case a.Pauses:
		a.Refused = refused // since the first
	default:
		// The machine is not what it was: it gets no time with the keys.
		lease.Stop, lease.Told, lease.Grace = refused, now, 0
		if _, err := b.log(ctx, tx, translog.Body{Kind: translog.KindStop, Actor: agent.String(), Job: lease.JobID, Stop: &translog.Stop{Reason: refused}}); err != nil {
			return err
		}
	}
	return tx.PutLease(ctx, lease)
}

// checkLater holds a result against what the job has shown: it speaks of the same
// job, and is newer.
func (b *Broker) checkLater(ctx context.Context, r Reader, l *check.List, lease Lease, issuer string, res receipt.Result) error {
	had := lease.Attested
	l.Equal("reattest.verifier", had.Verifier, issuer, "attest to the verifier of the release")
	l.Equal("reattest.audience", b.id, trim(res.Audience), "ask for a result for this broker")
	l.Equal("reattest.job", lease.JobID, trim(res.JobID), "a result speaks for one job only")
	l.Equal("reattest.plan", string(lease.Plan), trim(string(res.PlanDigest)), "a result speaks for one plan only")
	l.Equal("reattest.sandbox", string(had.Sandbox), trim(string(res.SandboxDigest)), "the job runs in the sandbox that it was released to")
	l.Equal("reattest.recipient", string(had.Recipient), string(plan.Sum(res.Confirmation.Recipient)), "attest the keys that the job has")
	var session []byte
	if jwk := res.Confirmation.JWK; jwk != nil {
		if pub, ok := jwk.Key.(*ecdsa.PublicKey); ok {
			session, _ = x509.MarshalPKIXPublicKey(pub)
		}
	}
	l.Equal("reattest.session-key", string(plan.Sum(lease.Session)), string(plan.Sum(session)), "attest the keys that the job has")
	if res.IssuedAt < had.IssuedAt || (res.IssuedAt == had.IssuedAt && res.ID == had.ResultID) {
		l.Fail("reattest.newer", "a result issued after "+stamp(time.Unix(had.IssuedAt, 0)), stamp(time.Unix(res.IssuedAt, 0)), "attest again")
	}
	if now := b.now(); time.Unix(res.IssuedAt, 0).After(now.Add(receipt.Leeway)) || !now.Before(time.Unix(res.Expires, 0)) || res.Expires-res.IssuedAt > int64(receipt.ResultLifetime/time.Second) {
		l.Fail("reattest.expiry", "a result that is valid at "+stamp(now), stamp(time.Unix(res.IssuedAt, 0))+" to "+stamp(time.Unix(res.Expires, 0)), "attest again")
	}
	uses, err := r.Uses(ctx, issuer, res.Nonce, res.ID)
	if err != nil {
		return err
	}
	if len(uses) > 0 {
		l.Fail("reattest.replay", "a nonce and a result that were not shown before", "one of them was", "attest again")
	}
	return nil
}

// checkAffirms makes the checks of a result by which a job keeps its keys. What was
// revoked has stopped the job already, and the result is of the same chip, guest and GPUs.
func (b *Broker) checkAffirms(ctx context.Context, tx Reader, l *check.List, lease Lease, issuer string, res receipt.Result) error {
	shown := []presented{{issuer, res}}
	l.Equal("reattest.chip", fmt.Sprint(lease.Chips), fmt.Sprint(claims(shown, "snp.chip-id")), "the job runs on the chip that it was released to")
	l.Equal("reattest.measurement", fmt.Sprint(lease.Measurements), fmt.Sprint(claims(shown, "snp.measurement")), "the guest is the one that the keys were released to")
	l.Equal("reattest.gpus", fmt.Sprint(lease.Attested.GPUs), fmt.Sprint(claims(shown, claimGPU)), "the job has the GPUs that it was released to")
	if res.Simulated && !lease.Attested.Simulated {
		l.Fail("reattest.simulated", "evidence rooted in a vendor's anchor, as at the release", "evidence rooted in a simulation anchor", "")
	}
	for _, u := range lease.Uses {
		a, err := tx.Asset(ctx, u.Asset)
		if err != nil {
			return err
		}
		if len(a.Policy.Verifiers) > 0 && !slices.Contains(a.Policy.Verifiers, issuer) {
			l.Fail("asset.verifiers", "a result of "+fmt.Sprint(a.Policy.Verifiers), trim(issuer), "attest to a verifier that the asset's policy names")
		}
		a.Policy.checkAffirming(l, res)
	}
	return nil
}
