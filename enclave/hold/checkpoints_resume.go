package hold

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"strconv"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/dma"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/enclave/seal"
)

const (
	eventResumed = "resumed"
	// resumeInput is the name of the resumed checkpoint among the inputs. It is no
	// inputName, so that no input has it.
	resumeInput = ".resume"
)

// resume is what a job goes on from. The zero value is nothing.
type resume struct {
	// rule, asset and plan are the plan's; rule is empty until resumeBegin.
	rule, asset string
	plan        plan.Digest
	challenge   []byte
	// settled: the job knows what it goes on from.
	settled bool
	// sequence and digest are where the job's own checkpoints go on, zero where they
	// begin anew.
	sequence uint64
	digest   plan.Digest
}

// next numbers the commit after those that the job has made.
func (r resume) next(commits []holdapi.Checkpoint) (sequence uint64, parent plan.Digest) {
	parent = r.digest
	if n := len(commits); n > 0 {
		parent = commits[n-1].Digest
	}
	return r.sequence + uint64(len(commits)) + 1, parent
}

// resumeBegin reads in the plan what the job resumes from. The plan is believed
// because the checkpoints' key was released for its digest.
func (h *Holder) resumeBegin(canonical []byte) (holdapi.ResumeRule, error) {
	p, err := plan.Parse(canonical)
	if err != nil {
		return holdapi.ResumeRule{}, &apiError{holdapi.CodeInvalid, err}
	}
	c := p.Checkpoints
	if c == nil || c.Resume == "" {
		return holdapi.ResumeRule{}, fail(holdapi.CodeRefused, "the plan resumes from nothing")
	}
	if err := h.lease.use(); err != nil {
		return holdapi.ResumeRule{}, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.running(); err != nil {
		return holdapi.ResumeRule{}, err
	}
	k, ok := h.keys[c.Asset]
	switch {
	case !ok:
		return holdapi.ResumeRule{}, fail(holdapi.CodeState, "no key for asset %.80q was delivered", c.Asset)
	case k.plan != plan.Sum(canonical):
		return holdapi.ResumeRule{}, fail(holdapi.CodeRefused, "the key of %.80q was released for another plan", c.Asset)
	case h.state != notDecrypted || h.resume.settled:
		return holdapi.ResumeRule{}, fail(holdapi.CodeState, "what the job goes on from is settled")
	}
	h.resume = resume{rule: c.Resume, asset: c.Asset, plan: k.plan}
	if c.ResumesLatest() {
		h.resume.challenge = make([]byte, receipt.ChallengeSize)
		_, _ = rand.Read(h.resume.challenge) // it does not fail
	}
	return holdapi.ResumeRule{Rule: c.Resume, Challenge: h.resume.challenge}, nil
}

func (h *Holder) answerResume(ctx context.Context, r holdapi.Resume, fds []*os.File) error {
	if r.Nothing {
		return h.resumeFrom(ctx, r, nil)
	}
	root, err := openFolder(fds[0])
	if err != nil {
		return err
	}
	return h.resumeFrom(ctx, r, root)
}

// resumeFrom takes the sealed checkpoint that the job goes on from, as the plan
// says it. root becomes the holder's; it is nil where there is nothing.
func (h *Holder) resumeFrom(ctx context.Context, r holdapi.Resume, root *os.Root) (err error) {
	defer func() {
		if err != nil && root != nil {
			_ = root.Close()
		}
	}()
	h.mu.Lock()
	at, err := h.unsettled()
	h.mu.Unlock()
	if err != nil {
		return err
	}
	keys, err := h.lease.trusted()
	if err != nil {
		return err
	}
	var point receipt.ResumePoint
	if at.rule == plan.ResumeLatest {
		if point, err = receipt.VerifyResumePoint(keys, r.Point, h.cfg.JobID, at.plan, at.asset, at.challenge); err != nil {
			return &apiError{holdapi.CodeRefused, err}
		}
		if point.Nothing() != (root == nil) {
			return fail(holdapi.CodeRefused, "the broker says that the newest checkpoint is number %d, and a folder comes with that: %t", point.Sequence, root != nil)
		}
	} else if root == nil {
		return fail(holdapi.CodeRefused, "the plan names a checkpoint, and none came")
	}
	var c receipt.CheckpointRecord
	var folder *seal.Folder
	if root != nil {
		// It reads all of the checkpoint, and ends with the job.
		ctx, cancel := context.WithCancel(ctx)
		defer context.AfterFunc(h.ending, cancel)() //nolint:contextcheck // the job's end is another's than the request's
		defer cancel()
		if c, folder, err = readResume(ctx, root, at, point, keys, r.Anchor); err != nil {
			return &apiError{holdapi.CodeRefused, err}
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if again, err := h.unsettled(); err != nil {
		return err
	} else if !bytes.Equal(again.challenge, at.challenge) || again.rule != at.rule {
		return fail(holdapi.CodeState, "the plan was shown again meanwhile")
	}
	if root == nil {
		h.resume.settled = true
		return nil
	}
	if err := h.addResume(ctx, folder, root); err != nil {
		return err
	}
	h.resume.settled = true
	if at.rule == plan.ResumeLatest {
		h.resume.sequence, h.resume.digest = point.Sequence, point.Digest
	}
	how := "countersigned"
	if at.rule != plan.ResumeLatest && r.Anchor == "" {
		how = "unanchored"
	}
	h.events.add(holdapi.Event{Kind: eventResumed, Detail: fmt.Sprintf("%s of job %s, %s", holdapi.CheckpointFolder(c.Sequence, c.Name), c.JobID, how), Digest: string(c.Digest)})
	return nil
}

// unsettled is what the plan says of resuming, while nothing was taken. h.mu is held.
func (h *Holder) unsettled() (resume, error) {
	if err := h.running(); err != nil {
		return resume{}, err
	}
	switch {
	case h.resume.rule == "":
		return resume{}, fail(holdapi.CodeState, "nobody asked what the plan says of resuming")
	case h.resume.settled || h.state != notDecrypted:
		return resume{}, fail(holdapi.CodeState, "what the job goes on from is settled")
	}
	return h.resume, nil
}

// readResume holds a checkpoint's folder against what the job may go on from.
// Everything that it refuses is a *check.Refusal at stage "resume".
func readResume(ctx context.Context, root *os.Root, at resume, point receipt.ResumePoint, keys receipt.Keys, anchor string) (receipt.CheckpointRecord, *seal.Folder, error) {
	var l check.List
	signed, r, err := seal.ReadSignedRecord(root)
	if err != nil {
		l.Fail("resume.signature", "a record with its signature", err.Error(), "the checkpoint was damaged or made up")
		return receipt.CheckpointRecord{}, nil, check.Refuse("resume", l)
	}
	l.Equal("resume.asset", at.asset, r.Asset, "the checkpoint is under another key")
	if at.rule == plan.ResumeLatest {
		l.Equal("resume.plan", string(at.plan), string(r.Plan), "the checkpoint is another plan's")
		l.Equal("resume.from", point.From, r.JobID, "the checkpoint is another job's")
		switch {
		case r.Sequence < point.Sequence:
			l.Fail("resume.rollback", "checkpoint "+strconv.FormatUint(point.Sequence, 10), strconv.FormatUint(r.Sequence, 10), "the broker countersigned a newer one; name this one by its digest to go back")
		case r.Sequence > point.Sequence:
			l.Fail("resume.unanchored", "checkpoint "+strconv.FormatUint(point.Sequence, 10), strconv.FormatUint(r.Sequence, 10), "the broker has not countersigned this one; name it by its digest to go on from it")
		case plan.Sum(signed.Record) != point.Record || r.Digest != point.Digest:
			l.Fail("resume.fork", string(point.Record), string(plan.Sum(signed.Record)), "the broker countersigned another checkpoint with this number")
		}
	} else {
		l.Equal("resume.digest", at.rule, string(r.Digest), "the plan names another checkpoint")
		if anchor != "" {
			if _, err := receipt.VerifyCheckpointHead(keys, anchor, signed.Record, r); err != nil {
				l.Fail("resume.anchor", "a countersignature of this checkpoint, or none", err.Error(), "")
			}
		}
	}
	if len(l.Failed()) > 0 {
		return receipt.CheckpointRecord{}, nil, check.Refuse("resume", l)
	}
	folder, err := seal.ReadFolder(root, at.asset, r.Digest)
	if err != nil {
		l.Fail("resume.manifest", "the manifest that the record names", err.Error(), "the checkpoint was damaged")
		return receipt.CheckpointRecord{}, nil, check.Refuse("resume", l)
	}
	if err := folder.Check(ctx); err != nil {
		l.Fail("resume.whole", "every file of the manifest, by its digest", err.Error(), "the checkpoint was damaged; an older one can be named by its digest")
		return receipt.CheckpointRecord{}, nil, check.Refuse("resume", l)
	}
	return r, folder, nil
}

// addResume puts the checkpoint among the inputs: it is opened with them, and
// shows in the checkpoint folder. h.mu is held.
func (h *Holder) addResume(ctx context.Context, folder *seal.Folder, root *os.Root) error {
	sizes, err := folder.Sizes()
	if err != nil {
		return &apiError{holdapi.CodeRefused, err}
	}
	in := &heldInput{
		Input: holdapi.Input{Name: resumeInput, Asset: folder.Manifest().Asset, Digest: folder.Digest()}, root: root, folder: folder,
		prepared: make([]*dma.Region, len(sizes)), done: make(chan struct{}), sizes: sizes,
	}
	h.plan(in) //nolint:contextcheck // it ends with the job, not with the request
	h.inputs = append(h.inputs, in)
	h.inputFS.share(resumeInput, h.ckptFS.showResume(ctx, h.inputFS))
	return nil
}

// trusted are the keys by which the broker's words are checked.
func (l *lease) trusted() (receipt.Keys, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.keys, l.check()
}

// share has an input's files appear in a folder of another tree.
func (t *inputTree) share(input string, d *inputDir) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.dirs[input] = d
}

// showResume makes the folder in which the job finds what it goes on from. Its
// files are the input tree's, with its gate.
func (t *checkpointTree) showResume(ctx context.Context, inputs *inputTree) *inputDir {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.resume = &inputDir{t: inputs, gated: true}
	t.root.NewPersistentInode(ctx, t.resume, fs.StableAttr{Mode: syscall.S_IFDIR})
	return t.resume
}

// resumes reports whether name is the folder of showResume. t.mu is held.
func (n *checkpointNode) resumes(name string) bool {
	return n == n.t.root && n.t.resume != nil && name == holdapi.ResumeName
}

// What go-fuse takes for done where it is not refused: the folder of showResume
// lies in a tree that can be written.

// Unlink refuses.
func (*inputDir) Unlink(context.Context, string) syscall.Errno { return syscall.EROFS }

// Rmdir refuses.
func (*inputDir) Rmdir(context.Context, string) syscall.Errno { return syscall.EROFS }

// Rename refuses.
func (*inputDir) Rename(context.Context, string, fs.InodeEmbedder, string, uint32) syscall.Errno {
	return syscall.EROFS
}
