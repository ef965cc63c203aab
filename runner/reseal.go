package runner

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/runner/holder"
	"github.com/coffer-run/coffer/runner/jobspec"
	"github.com/coffer-run/coffer/runner/source"
)

const (
	// resealEvery is how often a holder is asked how far it is, resealTell how often
	// watchers are told.
	resealEvery = 100 * time.Millisecond
	resealTell  = 5 * time.Second
)

// admitReseal resolves what a job file reseals: the digest of the source, and that
// the target's is open.
func (a *Agent) admitReseal(ctx context.Context, r *jobspec.Reseal, digests map[string]plan.Digest) (profile plan.Digest, err error) {
	from, err := a.Broker.Asset(ctx, r.Asset)
	if err != nil {
		return "", err
	}
	switch checkpoints := from.GetKind() == brokerv1.AssetKind_ASSET_KIND_CHECKPOINTS; {
	case r.Checkpoint != "" && !checkpoints:
		return "", fmt.Errorf("asset %s is not one of checkpoints: leave reseal.checkpoint out", r.Asset)
	case r.Checkpoint == "" && checkpoints:
		return "", fmt.Errorf("asset %s is one of checkpoints: name one of them with reseal.checkpoint", r.Asset)
	case r.Checkpoint == "":
		if digests[r.Asset], err = plan.ParseDigest(from.GetDigest()); err != nil {
			return "", fmt.Errorf("asset %s cannot be sealed anew: %w", r.Asset, err)
		}
	}
	to, err := a.Broker.Asset(ctx, r.To)
	if err != nil {
		return "", err
	}
	if to.GetDigest() != "" || to.GetKind() == brokerv1.AssetKind_ASSET_KIND_CHECKPOINTS {
		return "", fmt.Errorf("asset %s is not open: create one with coffer assets reseal %s NAME", r.To, r.Asset)
	}
	return plan.NoContainer().Digest()
}

// createReseal is stage 3 of a job without a container: the holder has the source,
// and the sandbox is described as none.
func (a *Agent) createReseal(ctx context.Context, j *Job, h *holder.Holder) (created, string, error) {
	r := j.plan.Reseal
	dir, err := a.inputFolder(ctx, j.id, j.spec.Reseal.URI, r.Digest)
	if err != nil {
		return created{}, "", fmt.Errorf("source: %w", err)
	}
	if err := h.ResealSource(ctx, holdapi.ResealSource{Asset: r.Asset, Digest: r.Digest}, dir); err != nil {
		return created{}, "", fmt.Errorf("hand over source: %w", err)
	}
	if j.record.Sandbox, err = plan.NoSandbox(j.id).Canonical(); err != nil {
		return created{}, "", err
	}
	if err := a.Journal.Leave(ctx, j.id, string(bundle.StageSandbox), j.record); err != nil {
		return created{}, "", err
	}
	return created{holder: h}, "no container", nil
}

// reseal is the stage that a job without a container has in the place of decrypt,
// start and run: the holder seals the source anew, and the broker sets the digest.
// It may be begun again for a holder that is at work or has done it.
func (a *Agent) reseal(ctx context.Context, j *Job, h *holder.Holder) error {
	began := j.hasKeys()
	_, err := stage(ctx, a, j, bundle.StageReseal, func(ctx context.Context, j *Job) (struct{}, string, error) {
		ctx, cancel := context.WithDeadlineCause(ctx, began.Add(time.Duration(j.plan.Resources.MaxSeconds)*time.Second), errDeadline)
		defer cancel()
		at, name, err := j.spec.Reseal.Folder()
		if err != nil {
			return struct{}{}, "", err
		}
		dir, err := source.Folder(at)
		if err != nil {
			return struct{}{}, "", err
		}
		if err := h.Reseal(ctx, holdapi.Reseal{Plan: j.canonical, Name: name}, dir); err != nil {
			return struct{}{}, "", fmt.Errorf("begin to seal anew: %w", err)
		}
		st, err := a.followReseal(ctx, j, h)
		if err != nil {
			return struct{}{}, "", err
		}
		token, err := a.Broker.CommitReseal(ctx, j.id, j.canonical, st.Result.Record, st.Result.Signature)
		if err != nil {
			return struct{}{}, "", err
		}
		j.record.Reseal = &bundle.Reseal{Record: st.Result.Record, Signature: st.Result.Signature, Receipt: token}
		detail := fmt.Sprintf("%d files, %.1f MB at %.2f GB/s, in %s", st.Files, float64(st.Bytes)/1e6, float64(st.Bytes)/float64(max(st.Nanos, 1)), filepath.Join(dir, name))
		return struct{}{}, detail, a.Journal.Leave(ctx, j.id, string(bundle.StageReseal), j.record)
	})
	return err
}

// hasKeys is when the keys were released; a job that was taken up does not get its
// time anew.
func (j *Job) hasKeys() time.Time {
	for _, s := range j.timeline {
		if s.Stage == bundle.StageRelease {
			return time.Unix(0, s.StartUnixNano+s.Nanos)
		}
	}
	return time.Now()
}

// followReseal waits until the holder has done it.
func (a *Agent) followReseal(ctx context.Context, j *Job, h *holder.Holder) (holdapi.ResealStatus, error) {
	told := time.Now()
	for seen := 0; ; {
		st, err := h.ResealStatus(ctx, holdapi.ResealStatusQuery{After: seen})
		switch {
		case ctx.Err() != nil:
			return st, context.Cause(ctx)
		case errors.Is(err, holdapi.ErrLost):
			return st, errors.Join(errHolderLost, err)
		case err != nil:
			return st, fmt.Errorf("ask holder how far it is: %w", err)
		case st.State == holdapi.ResealDone && st.Result != nil:
			return st, nil
		case st.State != holdapi.ResealRunning:
			return st, fmt.Errorf("seal anew: %s", st.Error)
		}
		seen = st.Files
		if time.Since(told) > resealTell {
			told = time.Now()
			a.tell(ctx, j, stageEvent(bundle.StageReseal, "running", 0, fmt.Sprintf("%d files, %d of %d bytes", st.Files, st.Bytes, st.Total)))
		}
		select {
		case <-ctx.Done():
			return st, context.Cause(ctx)
		case <-h.Lost():
			return st, errHolderLost
		case <-time.After(resealEvery):
		}
	}
}

// adoptReseal takes up a job without a container that an earlier agent left with
// its keys: its holder went on meanwhile.
func (a *Agent) adoptReseal(ctx context.Context, j *Job) (func(context.Context) error, error) {
	h, err := holder.Attach(ctx, j.runDir, j.id)
	if err != nil {
		return nil, errors.Join(errHolderLost, err)
	}
	j.holder = h
	if _, err := a.attested(j); err != nil {
		return nil, err
	}
	j.place = newPlace(j.id, queueName(j.spec), j.spec.Priority, j.submitted, j.plan.Resources)
	if err := a.queue.adopt(j.place, nil); err != nil {
		return nil, err
	}
	j.placed = true
	if j.record.Reseal != nil {
		return func(context.Context) error { return nil }, nil
	}
	return func(ctx context.Context) error { return a.reseal(ctx, j, h) }, nil
}

// addReseal adds what the job sealed anew to the bundle, with the records of the
// files, which a holder that has finished still has. Without them verification says
// that they are missing.
func (a *Agent) addReseal(ctx context.Context, j *Job, b *bundle.Builder) error {
	r := j.record.Reseal
	if r == nil {
		return nil
	}
	out := *r
	for j.holder != nil {
		st, err := j.holder.ResealStatus(ctx, holdapi.ResealStatusQuery{After: len(out.Files)})
		if err != nil {
			a.log.WarnContext(ctx, "the bundle lacks the records of files that were sealed anew", slog.String("job", j.id), slog.Any("error", err))
			break
		}
		if len(st.Records) == 0 || st.Files > bundle.MaxResealFiles {
			break
		}
		for _, rec := range st.Records {
			out.Files = append(out.Files, bundle.ResealedFile{Record: rec.Record, Signature: rec.Signature})
		}
	}
	return b.AddJSON(bundle.ResealPart, out)
}
