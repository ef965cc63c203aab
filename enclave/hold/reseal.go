package hold

import (
	"context"
	"errors"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/enclave/seal"
)

// maxResealBatch bounds the records of one status, in bytes before their encoding
// in base64; one record always fits (receipt.MaxResealRecord).
const maxResealBatch = holdapi.MaxMessage / 4

// reseal is the re-sealing of a job without a container. The zero value is none.
type reseal struct {
	// source, asked, sink and over are guarded by Holder.mu and set once.
	source *heldInput
	asked  *holdapi.Reseal
	sink   *os.Root
	over   chan struct{} // closed when the work is over; nil before it began

	mu      sync.Mutex // guards what follows
	total   int64
	done    int64
	records []holdapi.ResealRecord
	result  *holdapi.ResealRecord
	nanos   int64
	failure error
}

// resealSource takes the sealed folder that is to be sealed anew. root becomes the
// holder's.
func (h *Holder) resealSource(in holdapi.ResealSource, root *os.Root) (err error) {
	defer func() {
		if err != nil {
			_ = root.Close()
		}
	}()
	folder, err := seal.ReadFolder(root, in.Asset, in.Digest)
	if err != nil {
		return &apiError{holdapi.CodeRefused, err}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.running(); err != nil {
		return err
	}
	if s := h.reseal.source; s != nil {
		if s.Asset != in.Asset || s.Digest != in.Digest {
			return fail(holdapi.CodeState, "there is another source already")
		}
		return root.Close()
	}
	if len(h.inputs) > 0 || h.sink != nil || h.state != notDecrypted {
		return fail(holdapi.CodeState, "a job with inputs or checkpoints reseals nothing")
	}
	h.reseal.source = &heldInput{Input: holdapi.Input{Asset: in.Asset, Digest: in.Digest}, root: root, folder: folder}
	return nil
}

// beginReseal seals the source anew into the folder q.Name of the sink, in the
// background. What it does is the plan's word, and the plan the one under which
// both keys were released. The same request again changes nothing. root becomes
// the holder's.
func (h *Holder) beginReseal(q holdapi.Reseal, root *os.Root) (err error) {
	defer func() {
		if err != nil {
			_ = root.Close()
		}
	}()
	p, err := plan.Parse(q.Plan)
	if err != nil {
		return &apiError{holdapi.CodeInvalid, err}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.running(); err != nil {
		return err
	}
	if a := h.reseal.asked; a != nil {
		if a.Name != q.Name || !slices.Equal(a.Plan, q.Plan) {
			return fail(holdapi.CodeState, "another folder is sealed already")
		}
		return root.Close()
	}
	source := h.reseal.source
	switch {
	case p.Reseal == nil:
		return fail(holdapi.CodeRefused, "the plan reseals nothing")
	case source == nil:
		return fail(holdapi.CodeState, "no source was handed over")
	case p.Reseal.Asset != source.Asset || p.Reseal.Digest != source.Digest:
		return fail(holdapi.CodeRefused, "the source is not the plan's")
	}
	digest := plan.Sum(q.Plan)
	from, to := h.keys[p.Reseal.Asset], h.keys[p.Reseal.To]
	for _, k := range []heldKey{from, to} {
		switch {
		case k.key == nil:
			return fail(holdapi.CodeState, "a key of %.80q or %.80q was not delivered", p.Reseal.Asset, p.Reseal.To)
		case k.plan != digest:
			return fail(holdapi.CodeRefused, "a key was released for another plan")
		}
	}
	if err := h.lease.use(); err != nil {
		return err
	}
	h.reseal.asked, h.reseal.sink, h.reseal.over = &q, root, make(chan struct{})
	work := seal.Reseal{
		JobID: h.cfg.JobID, Plan: digest, From: source.folder, FromKey: from.key, To: p.Reseal.To, ToKey: to.key, Name: q.Name, Use: h.lease.use, Each: h.reseal.add,
	}
	go h.runReseal(h.ending, work)
	return nil
}

// runReseal ends at its next chunk when the job does.
func (h *Holder) runReseal(ctx context.Context, work seal.Reseal) {
	r := &h.reseal
	defer close(r.over)
	start := time.Now()
	out, err := seal.ResealFolder(ctx, work, h.session, r.sink, seal.Options{Progress: r.progress})
	if err == nil {
		err = ctx.Err()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.nanos = time.Since(start).Nanoseconds()
	if err != nil {
		r.failure = err
		h.log.ErrorContext(ctx, "re-sealing failed", "error", err)
		return
	}
	r.result = &holdapi.ResealRecord{Record: out.Record, Signature: out.Signature}
	h.log.InfoContext(ctx, "sealed anew", "files", len(r.records), "bytes", r.done, "nanos", r.nanos)
}

func (r *reseal) add(s seal.SignedReseal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.records = append(r.records, holdapi.ResealRecord{Record: s.Record, Signature: s.Signature})
}

func (r *reseal) progress(done, total int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.done, r.total = done, total
}

// resealStatus says how far the work is, with the records after the first q.After.
func (h *Holder) resealStatus(q holdapi.ResealStatusQuery) (holdapi.ResealStatus, error) {
	h.mu.Lock()
	over := h.reseal.over
	h.mu.Unlock()
	r := &h.reseal
	r.mu.Lock()
	defer r.mu.Unlock()
	if q.After < 0 || q.After > len(r.records) {
		return holdapi.ResealStatus{}, fail(holdapi.CodeInvalid, "records after %d: there are %d", q.After, len(r.records))
	}
	s := holdapi.ResealStatus{State: holdapi.ResealNone, Files: len(r.records), Bytes: r.done, Total: r.total, Nanos: r.nanos}
	size := 0
	for _, rec := range r.records[q.After:] {
		n := len(rec.Record) + len(rec.Signature)
		if size += n; size > maxResealBatch && len(s.Records) > 0 {
			break
		}
		s.Records = append(s.Records, rec)
	}
	switch {
	case over == nil:
	case r.failure != nil:
		s.State, s.Error = holdapi.ResealFailed, r.failure.Error()
		if errors.Is(r.failure, context.Canceled) {
			s.Error = "the job ended first"
		}
	case r.result != nil:
		s.State, s.Result = holdapi.ResealDone, r.result
	default:
		s.State = holdapi.ResealRunning
	}
	return s, nil
}

// close gives the folders back.
func (r *reseal) close() error {
	var errs []error
	if r.source != nil {
		errs = append(errs, r.source.root.Close())
	}
	if r.sink != nil {
		errs = append(errs, r.sink.Close())
	}
	return errors.Join(errs...)
}
