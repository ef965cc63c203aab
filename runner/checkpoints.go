package runner

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/holder"
	"github.com/coffer-run/coffer/runner/jobspec"
	"github.com/coffer-run/coffer/runner/remote"
	"github.com/coffer-run/coffer/runner/source/sink"
)

const (
	// anchorRetry is how long after a broker was away it is asked again.
	anchorRetry = 2 * time.Second
	// anchorPause is how long after it when the job is over and waits for that.
	anchorPause = 200 * time.Millisecond
	// anchorLast bounds how long a job's end waits for the broker to countersign its
	// last checkpoints, once they are in their bucket if they go to one.
	anchorLast = 10 * time.Second
)

// anchors is which of a job's checkpoints the broker has countersigned. One that
// it has not is unanchored: it is kept, and shown to the broker again while the
// job lives, and nothing resumes from it unless it is named.
type anchors struct {
	news chan struct{} // 1 if there may be something to show

	// showing is held while the broker is shown checkpoints: they have an order.
	showing sync.Mutex

	mu   sync.Mutex // guards what follows
	list []holdapi.Checkpoint
	// heads are the countersignatures by number, refused why there is none and will
	// be none.
	heads   map[uint64]string
	refused map[uint64]error
	// removed are those whose sealed files the keep rules let go.
	removed map[uint64]bool
	// told are those of which watchers know that they are countersigned.
	told map[uint64]bool
	stop context.CancelFunc
	done chan struct{}
}

func newAnchors() *anchors {
	return &anchors{news: make(chan struct{}, 1), heads: map[uint64]string{}, refused: map[uint64]error{}, removed: map[uint64]bool{}, told: map[uint64]bool{}}
}

// note takes a commit, in the order of their making. One that is known changes
// nothing.
func (s *anchors) note(c holdapi.Checkpoint) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(s.list); n > 0 && s.list[n-1].Sequence >= c.Sequence {
		return
	}
	s.list = append(s.list, c)
	select {
	case s.news <- struct{}{}:
	default:
	}
}

// open are the commits that have neither countersignature nor refusal.
func (s *anchors) open() []holdapi.Checkpoint {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []holdapi.Checkpoint
	for _, c := range s.list {
		if s.heads[c.Sequence] == "" && s.refused[c.Sequence] == nil {
			out = append(out, c)
		}
	}
	return out
}

// tell notes that watchers know of a countersignature, and says whether they did not.
func (s *anchors) tell(sequence uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	known := s.told[sequence]
	s.told[sequence] = true
	return !known
}

func (s *anchors) head(sequence uint64) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.heads[sequence]
}

// followCheckpoints shows the broker a job's checkpoints as they come, until settle.
func (a *Agent) followCheckpoints(j *Job) {
	ctx, stop := context.WithCancel(a.ctx)
	done := make(chan struct{})
	j.anchors.mu.Lock()
	j.anchors.stop, j.anchors.done = stop, done
	j.anchors.mu.Unlock()
	go func() {
		defer close(done)
		defer stop()
		for away := false; ; {
			wait := time.Hour
			if away {
				wait = anchorRetry
			}
			select {
			case <-ctx.Done():
				return
			case <-j.anchors.news:
			case <-time.After(wait):
			}
			err := a.anchor(ctx, j)
			if err != nil && !away && ctx.Err() == nil {
				a.log.WarnContext(ctx, "checkpoints are unanchored for now", slog.String("job", j.id), slog.Any("error", err))
			}
			away = err != nil
		}
	}()
}

// settle ends followCheckpoints and shows the broker once more what it has not seen.
func (a *Agent) settle(ctx context.Context, j *Job, commits []holdapi.Checkpoint) {
	j.anchors.mu.Lock()
	stop, done := j.anchors.stop, j.anchors.done
	j.anchors.mu.Unlock()
	if stop != nil {
		stop()
		<-done
	}
	for _, c := range commits {
		j.anchors.note(c)
	}
	ctx, cancel := context.WithTimeout(ctx, anchorLast+a.sendTime(j))
	defer cancel()
	if err := whileAway(ctx, func(ctx context.Context) error { return a.anchor(ctx, j) }); err != nil {
		a.log.WarnContext(ctx, "checkpoints stay unanchored", slog.String("job", j.id), slog.Any("error", err))
	}
}

// whileAway calls f again while a service that it needs is away, until ctx ends.
func whileAway(ctx context.Context, f func(context.Context) error) error {
	for {
		err := f(ctx)
		var away *remote.Unavailable
		if !errors.As(err, &away) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(anchorPause):
		}
	}
}

// anchor has the broker countersign what it has not, in order. An error means
// that it may work later.
func (a *Agent) anchor(ctx context.Context, j *Job) error {
	j.anchors.showing.Lock()
	defer j.anchors.showing.Unlock()
	for _, c := range j.anchors.open() {
		token, err := a.anchorOne(ctx, j, c)
		var refused *check.Refusal
		if err != nil && !errors.As(err, &refused) {
			return err
		}
		j.anchors.mu.Lock()
		if err != nil {
			j.anchors.refused[c.Sequence] = err
		} else {
			j.anchors.heads[c.Sequence] = token
		}
		j.anchors.mu.Unlock()
		if err != nil {
			a.log.WarnContext(ctx, "the broker does not countersign a checkpoint", slog.String("job", j.id), slog.Uint64("sequence", c.Sequence), slog.Any("error", err))
			continue
		}
		a.anchored(ctx, j, c)
		a.prune(ctx, j)
	}
	return nil
}

// anchored tells watchers of a countersignature, unless an agent before this one did.
func (a *Agent) anchored(ctx context.Context, j *Job, c holdapi.Checkpoint) {
	if j.anchors.tell(c.Sequence) {
		a.tell(ctx, j, checkpointEvent(c, true))
	}
}

// anchorOne returns the countersignature of one checkpoint, which lies beside it
// afterwards.
func (a *Agent) anchorOne(ctx context.Context, j *Job, c holdapi.Checkpoint) (string, error) {
	session := j.holder.Hello.SessionKey
	if err := a.bring(ctx, j, c); err != nil {
		return "", err
	}
	dir, derr := a.checkpointDir(j, c.Folder())
	if derr == nil {
		// An agent that was restarted finds what the one before it wrote.
		if token, err := sink.ReadAnchor(dir); err == nil && token != "" && a.Broker.Countersigned(token, session, c.Record, c.Signature) == nil {
			a.bringAnchor(ctx, j, c)
			return token, nil
		}
	}
	token, err := a.Broker.Countersign(ctx, j.id, session, c.Record, c.Signature)
	if err != nil {
		return "", err
	}
	if derr == nil {
		derr = sink.WriteAnchor(dir, token)
	}
	if derr != nil {
		// The bundle has it, and the log its digest.
		a.log.WarnContext(ctx, "keep countersignature", slog.String("job", j.id), slog.Uint64("sequence", c.Sequence), slog.Any("error", derr))
		return token, nil
	}
	a.bringAnchor(ctx, j, c)
	return token, nil
}

// checkpointSpec is what the job file says of them, also for a job that was taken up
// from the journal; nil if the job makes none.
func (j *Job) checkpointSpec() (*jobspec.Checkpoints, error) {
	if j.plan.Checkpoints == nil {
		return nil, nil
	}
	if j.spec.Checkpoints != nil {
		return j.spec.Checkpoints, nil
	}
	spec, err := jobspec.Parse(j.redacted)
	if err != nil {
		return nil, err
	}
	if spec.Checkpoints == nil {
		return nil, errors.New("the job file has no checkpoints and the plan has")
	}
	return spec.Checkpoints, nil
}

func checkpointEvent(c holdapi.Checkpoint, anchored bool) *agentv1.WatchResponse {
	return &agentv1.WatchResponse{Event: &agentv1.WatchResponse_Checkpoint{Checkpoint: &agentv1.CheckpointEvent{
		Sequence: c.Sequence, Name: c.Name, Digest: string(c.Digest), Bytes: c.Bytes, Anchored: anchored,
	}}}
}

// checkpointsOf is the list for the bundle, with the countersignatures.
func (j *Job) checkpointsOf(commits []holdapi.Checkpoint) []bundle.Checkpoint {
	out := checkpointsOf(commits)
	for i := range out {
		out[i].Anchor = j.anchors.head(out[i].Sequence)
	}
	return out
}

// resume hands the holder what the job goes on from, if its plan says so. The
// holder checks all of it.
func (a *Agent) resume(ctx context.Context, j *Job, h *holder.Holder) (string, error) {
	c := j.plan.Checkpoints
	if c == nil || c.Resume == "" {
		return "", nil
	}
	spec, err := j.checkpointSpec()
	if err != nil {
		return "", fmt.Errorf("resume: %w", err)
	}
	rule, err := h.ResumeBegin(ctx, j.canonical)
	if err != nil {
		return "", fmt.Errorf("resume: %w", err)
	}
	var hand holdapi.Resume
	how := ""
	// goOn has the holder go on from a folder, if that holds.
	goOn := func(dir string) error {
		signed, r, err := sink.ReadRecord(dir)
		if err != nil {
			return err
		}
		j.record.Resume = &bundle.Resume{Point: hand.Point, Anchor: hand.Anchor, Record: signed.Record, Signature: signed.Signature, SessionKey: signed.SessionKey}
		if err := h.Resume(ctx, hand, dir); err != nil {
			return err
		}
		how = fmt.Sprintf("from checkpoint %d of job %s", r.Sequence, r.JobID)
		return nil
	}
	if !c.ResumesLatest() {
		err = a.tryDigest(ctx, j, spec.URI, c.ResumeDigest(), func(dir string) (err error) {
			if hand.Anchor, err = sink.ReadAnchor(dir); err != nil {
				return err
			}
			return goOn(dir)
		})
		if err != nil {
			return "", fmt.Errorf("resume: %w", err)
		}
		return how, nil
	}
	token, at, err := a.Broker.ResumePoint(ctx, j.id, j.digest, c.Asset, rule.Challenge)
	if err != nil {
		return "", fmt.Errorf("resume: %w", err)
	}
	hand = holdapi.Resume{Point: token, Nothing: at.Nothing()}
	j.record.Resume = &bundle.Resume{Point: token}
	if at.Nothing() {
		return "from the beginning", h.Resume(ctx, hand, "")
	}
	// Only the newest: to go on from an older one is for people to approve.
	if err := a.tryNumber(ctx, j, spec.URI, at.From, at.Sequence, at.Digest, goOn); err != nil {
		return "", fmt.Errorf("resume from checkpoint %d of job %s, the newest that the broker countersigned: %w", at.Sequence, at.From, err)
	}
	return how, nil
}
