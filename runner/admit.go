package runner

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/oklog/ulid/v2"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/runner/jobspec"
	"github.com/coffer-run/coffer/runner/journal"
)

// Submit takes a job: stages 1 and 2, and the journal's promise.
func (a *Agent) Submit(ctx context.Context, submitter string, file []byte, key string) (journal.Job, error) {
	began := time.Now()
	spec, err := jobspec.Parse(file)
	if err != nil {
		return journal.Job{}, err
	}
	parsed := time.Now()
	j, err := a.admit(ctx, spec)
	if err != nil {
		return journal.Job{}, err
	}
	j.id, j.submitter, j.submitted = ulid.Make().String(), submitter, began
	if j.redacted, err = spec.Redacted(); err != nil {
		return journal.Job{}, err
	}
	if err := a.mayQueue(j); err != nil {
		return journal.Job{}, err
	}
	if err := a.mayGang(j); err != nil {
		return journal.Job{}, err
	}
	if err := a.mayWait(submitter); err != nil {
		return journal.Job{}, err
	}
	// Before the journal's promise: a job that it has is one that can go on.
	if err := a.Values.keep(j.id, j.digest, submission{Submitter: submitter, Attempt: 1, Env: spec.Env}); err != nil {
		return journal.Job{}, err
	}
	row, isNew, err := a.Journal.Submit(ctx, j.row(key, plan.Sum(file)))
	if err != nil || !isNew {
		return row, errors.Join(err, a.Values.drop(j.id))
	}
	j.timeline = []bundle.Step{
		{Stage: bundle.StageJobspec, StartUnixNano: began.UnixNano(), Nanos: parsed.Sub(began).Nanoseconds(), Outcome: bundle.StepDone},
		{Stage: bundle.StageAdmit, StartUnixNano: parsed.UnixNano(), Nanos: time.Since(parsed).Nanoseconds(), Outcome: bundle.StepDone},
	}
	// The journal has the job: from here on it runs, whether or not whoever
	// submitted it is still there to hear of it.
	j.feed = newFeed(j.id, a.Journal)
	for _, s := range j.timeline {
		detail := ""
		if s.Stage == bundle.StageAdmit {
			detail = "plan " + string(j.digest)
		}
		a.tell(ctx, j, stageEvent(s.Stage, "done", s.Nanos, detail))
	}
	a.launch(j, func(ctx context.Context) error { return a.begin(ctx, j) }) //nolint:contextcheck // a job outlives the call that submits it
	return row, nil
}

// Plan resolves a job file without taking the job.
func (a *Agent) Plan(ctx context.Context, file []byte) (plan.Digest, []byte, error) {
	j, err := a.resolve(ctx, file)
	if err != nil {
		return "", nil, err
	}
	return j.digest, j.canonical, nil
}

// resolve is stages 1 and 2 of a job that is not taken.
func (a *Agent) resolve(ctx context.Context, file []byte) (*Job, error) {
	spec, err := jobspec.Parse(file)
	if err != nil {
		return nil, err
	}
	return a.admit(ctx, spec)
}

// admit is stage 2: every name becomes a digest.
func (a *Agent) admit(ctx context.Context, spec jobspec.Spec) (*Job, error) {
	var image admitted
	profile, err := a.profile, error(nil)
	digests := map[string]plan.Digest{}
	if spec.Reseal != nil {
		profile, err = a.admitReseal(ctx, spec.Reseal, digests)
	} else {
		image, err = a.Images.resolve(ctx, a.Node, spec.Image, a.log)
	}
	if err != nil {
		return nil, err
	}
	pol, err := policy.Named(spec.AttestationPolicy)
	if err != nil {
		return nil, err
	}
	ref, err := pol.Ref()
	if err != nil {
		return nil, err
	}
	if spec.Resources.GPUs > len(a.uuids) {
		return nil, fmt.Errorf("the job asks for %d GPUs and this node has %d", spec.Resources.GPUs, len(a.uuids))
	}
	for _, in := range spec.Sealed() {
		asset, err := a.Broker.Asset(ctx, in.Asset)
		if err != nil {
			return nil, err
		}
		if digests[in.Asset], err = plan.ParseDigest(asset.GetDigest()); err != nil {
			return nil, fmt.Errorf("asset %s is no input: %w", in.Asset, err)
		}
	}
	if c := spec.Checkpoints; c != nil {
		asset, err := a.Broker.Asset(ctx, c.Asset)
		if err != nil {
			return nil, err
		}
		// A key that somebody has seen, as the owner of a data set has, must not
		// seal what was made from another owner's weights.
		if asset.GetKind() != brokerv1.AssetKind_ASSET_KIND_CHECKPOINTS {
			return nil, fmt.Errorf("asset %s is not for checkpoints: create one with coffer assets create NAME --kind checkpoints", c.Asset)
		}
	}
	if err := a.fits(int64(spec.Resources.Memory)); err != nil {
		return nil, err
	}
	p, err := spec.Plan(jobspec.Resolved{
		Image: image.image.Digest, Digests: digests, Policy: ref, Profile: profile,
	})
	if err != nil {
		return nil, err
	}
	if err := a.offersEgress(p); err != nil {
		return nil, err
	}
	if err := a.Node.CheckGPUs(p); err != nil {
		return nil, err
	}
	if err := a.offersCC(ctx, p); err != nil {
		return nil, err
	}
	j := newJob("", "")
	j.admitted, j.spec, j.plan, j.image, j.signature, j.sbom = true, spec, p, image.image, image.signature, image.sbom
	if j.canonical, err = p.Canonical(); err != nil {
		return nil, err
	}
	j.digest = plan.Sum(j.canonical)
	for _, e := range p.Env {
		j.env = append(j.env, spec.Env[e.Name])
	}
	return j, nil
}

// fits says whether the node has the memory at all.
func (a *Agent) fits(memory int64) error {
	if total, _, _ := a.queue.look(); memory > total.MemoryBytes {
		return fmt.Errorf("the job asks for %d MiB of memory and this node has %d MiB for jobs", memory>>20, total.MemoryBytes>>20)
	}
	return nil
}

// mayWait refuses a job where too many have not ended. One submitter cannot have them
// all: the last places are for those who have few.
func (a *Agent) mayWait(submitter string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch n := len(a.live); {
	case n >= maxLive:
		return ErrFull
	case n < maxLive-lastLive:
		return nil
	}
	own := 0
	for _, j := range a.live {
		if j.submitter == submitter {
			own++
		}
	}
	if own >= fewLive {
		return ErrFull
	}
	return nil
}
