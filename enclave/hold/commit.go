package hold

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/enclave/seal"
)

type heldSink struct {
	holdapi.Sink
	root *os.Root
}

// setSink takes the folder for checkpoints. root becomes the holder's.
func (h *Holder) setSink(s holdapi.Sink, root *os.Root) (err error) {
	defer func() {
		if err != nil {
			_ = root.Close()
		}
	}()
	if s.Asset == "" || s.Plan.Bytes() == nil || s.MaxBytes <= 0 {
		return fail(holdapi.CodeInvalid, "sink is incomplete")
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.running(); err != nil {
		return err
	}
	if h.reseal.source != nil {
		return fail(holdapi.CodeState, "a job that reseals makes no checkpoints")
	}
	if h.sink != nil {
		if h.sink.Sink != s {
			return fail(holdapi.CodeState, "there is another sink already")
		}
		return root.Close()
	}
	h.sink = &heldSink{Sink: s, root: root}
	h.ckptFS.enable(s.MaxBytes)
	return nil
}

// commit seals one checkpoint for the checkpoint tree, which calls it for one at
// a time.
func (h *Holder) commit(name string, files []seal.Source) error {
	err := h.sealCommit(name, files)
	if err != nil {
		h.log.Error("checkpoint was not sealed", "name", name, "error", err)
		h.events.add(holdapi.Event{Kind: "checkpoint-error", Detail: fmt.Sprintf("%s was not sealed: %v", name, err)})
	}
	return err
}

func (h *Holder) sealCommit(name string, files []seal.Source) error {
	// A checkpoint is the job's own, or it is none.
	if err := h.trace.waitStart(h.ending.Done(), h.cfg.StartWait); err != nil {
		return err
	}
	if err := h.lease.use(); err != nil {
		return err
	}
	start := time.Now()
	h.mu.Lock()
	sink := h.sink
	var k heldKey
	if sink != nil {
		k = h.keys[sink.Asset]
	}
	made := len(h.commits)
	c := seal.Commit{JobID: h.cfg.JobID, Name: name}
	c.Sequence, c.Parent = h.resume.next(h.commits)
	h.mu.Unlock()
	switch {
	case made >= maxCommits:
		return fmt.Errorf("the job has made %d checkpoints already", maxCommits)
	case sink == nil:
		return errors.New("the job has no place for checkpoints")
	case k.key == nil:
		return errors.New("no key for the checkpoints was delivered")
	case k.plan != sink.Plan:
		return errors.New("the key for the checkpoints was released for another plan")
	}
	c.Plan, c.Asset, c.Folder = sink.Plan, sink.Asset, holdapi.CheckpointFolder(c.Sequence, name)
	got, err := seal.SealCheckpoint(h.ending, k.key, h.session, h.leased(files), sink.root, c, time.Now, seal.Options{})
	if err != nil {
		return err
	}
	out := holdapi.Checkpoint{Sequence: c.Sequence, Name: name, Digest: got.Record.Digest, Parent: c.Parent, Bytes: got.Record.Bytes,
		Nanos: time.Since(start).Nanoseconds(), Record: got.Encoded, Signature: got.Signature}
	h.mu.Lock()
	h.commits = append(h.commits, out)
	h.mu.Unlock()
	h.events.add(holdapi.Event{Kind: "checkpoint", Detail: name, Digest: string(out.Digest), Checkpoint: &out})
	return nil
}
