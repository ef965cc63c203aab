package bundletest

import (
	"context"
	"slices"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

// AttestTwice has a job that ran attest twice while it did, and extends its run by
// that. It begins its record of these anew.
func (j *Job) AttestTwice(o Options) error {
	l := j.lab
	delete(j.Parts, bundle.ReattestPart)
	for i := range 2 {
		a, err := j.Later(Options{}, time.Duration(int64(i+1)*o.Reattest.EverySeconds)*time.Second)
		if err != nil {
			return err
		}
		if err := j.Attested(a); err != nil {
			return err
		}
	}
	end := l.Now.Add(time.Duration(2*o.Reattest.EverySeconds+1) * time.Second).UnixNano()
	run := &j.Timeline[slices.IndexFunc(j.Timeline, func(s bundle.Step) bool { return s.Stage == bundle.StageRun })]
	run.Nanos = end - run.StartUnixNano
	return nil
}

// Later is an attestation of the running job, after it began, with the faults of o.
func (j *Job) Later(o Options, after time.Duration) (bundle.Reattestation, error) {
	l := j.lab
	now := l.Now
	l.Now = now.Add(after)
	defer func() { l.Now = now }()
	a := bundle.Reattestation{Cause: "timer", StartUnixNano: l.Now.UnixNano(), Nanos: 1e8, Tries: 1, Verdict: bundle.ReattestAffirmed, Then: bundle.ReattestGoesOn}
	e, err := j.envelope(o)
	if err != nil {
		return a, err
	}
	if a.Evidence, err = plan.Canonical(e); err != nil {
		return a, err
	}
	token, r, err := l.service.Appraise(context.Background(), a.Evidence, BrokerID)
	if err != nil {
		return a, err
	}
	if receipt.RefusedFor(r) != "" {
		a.Verdict, a.Then, a.Failed = bundle.ReattestRefused, bundle.ReattestStopped, failedIDs(r.AllChecks())
	}
	a.Result, a.ResultDigest, a.EvidenceDigest = token, plan.Sum([]byte(token)), plan.Sum(a.Evidence)
	return a, nil
}

func failedIDs(l check.List) []string {
	var out []string
	for _, c := range l.Failed() {
		out = append(out, c.ID)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// Attested shows the broker an attestation, and adds it to the record.
func (j *Job) Attested(a bundle.Reattestation) error {
	var r receipt.Result
	jwks, err := j.lab.Verifier.JWKS()
	if err != nil {
		return err
	}
	keys, err := receipt.ParseKeys(VerifierID, jwks)
	if err != nil {
		return err
	}
	if err := keys.Open(receipt.TypeResult, a.Result, &r); err != nil {
		return err
	}
	e, err := j.lab.Append(translog.Body{
		Kind: translog.KindReattest, Job: j.ID, JobSequence: uint64(len(j.Log.Entries)) + 1, JobPrev: j.lastEntry(),
		Reattest: &translog.Reattest{Result: translog.Result{Verifier: r.Issuer, ResultID: r.ID, Evidence: r.EvidenceDigest}, IssuedAt: r.IssuedAt, Refused: receipt.RefusedFor(r)},
	})
	if err != nil {
		return err
	}
	j.Log.Entries = append(j.Log.Entries, e)
	a.Shown = true
	return j.Attests(func(l *bundle.Reattestations) {
		a.Number = len(l.List) + 1
		l.Add(a)
	})
}

// Attests changes the record of the later attestations.
func (j *Job) Attests(change func(*bundle.Reattestations)) error {
	l := bundle.Reattestations{List: []bundle.Reattestation{}}
	if b, ok := j.Parts[bundle.ReattestPart]; ok {
		var err error
		if l, err = bundle.Decode[bundle.Reattestations](b); err != nil {
			return err
		}
	}
	change(&l)
	return j.json(bundle.ReattestPart, l)
}
