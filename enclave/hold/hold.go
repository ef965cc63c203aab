// Package hold is the holder: the one process of a job that has its keys, its
// plaintext, its trace and its logs.
//
// Trusted: the kernel, and whoever may connect to a socket of the holder's own
// user (the measured agent). Checked: the order of operations, sealed inputs
// against their digests and keys, that the trace has shown the container's start
// before any path opens, that memory is locked and reads back as zero in the end.
// Not checked: what the job does with the plaintext that it was started to read.
package hold

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/dma"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/enclave/seal"
)

const (
	// DefaultStartWait is how long a path under inputs/ waits for the container's
	// start before it fails.
	DefaultStartWait = 15 * time.Second
	// DefaultTraceGrace is how long after its trace has closed a sandbox may be
	// reported as ended.
	DefaultTraceGrace = 5 * time.Second

	// maxStatusCheckpoints bounds those in a Status; Events has them all.
	maxStatusCheckpoints = 100
	// maxCommits bounds the checkpoints of one job.
	maxCommits = 10_000
	maxInputs  = 64
	maxKeys    = 128
)

// inputName is a folder's name under inputs/.
var inputName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

// Config is what a holder is started with.
type Config struct {
	// RunDir exists, belongs to the holder's user and is for nobody else.
	RunDir string
	JobID  string
	// UID and GID are the job's, as the files that it sees show them.
	UID, GID uint32
	// LogBytes bounds what is kept of both log streams together.
	LogBytes int64
	Log      *slog.Logger
	// StartWait and TraceGrace are the defaults above if zero.
	StartWait, TraceGrace time.Duration
}

type decryptState int

const (
	notDecrypted decryptState = iota
	decrypting
	decrypted
	decryptFailed
)

type heldKey struct {
	key *keys.DataKey
	// plan is the one under which the broker released the key.
	plan plan.Digest
}

type heldInput struct {
	holdapi.Input
	root   *os.Root
	folder *seal.Folder
}

type heldSink struct {
	holdapi.Sink
	root *os.Root
}

// Holder is the state of one job.
type Holder struct {
	cfg       Config
	log       *slog.Logger
	recipient *keys.Recipient
	session   *keys.Session
	events    *eventLog
	trace     *trace
	budget    *budget
	stdout    *logStream
	stderr    *logStream
	inputFS   *inputTree
	ckptFS    *checkpointTree

	// ending is cancelled when the job is over, and with it work under way.
	ending context.Context
	end    context.CancelFunc
	// made are the names under the run folder that are this holder's to remove.
	made []string

	// mu guards what follows. It is not held while regions fill or a commit seals.
	mu       sync.Mutex
	keys     map[string]heldKey
	inputs   []*heldInput
	sink     *heldSink
	state    decryptState
	filled   chan struct{} // closed when decrypting is over
	result   holdapi.Decrypted
	failure  error
	regions  []*dma.Region
	commits  []holdapi.Checkpoint
	finished chan struct{} // closed when Finish is over; nil before it began
	scrubbed bool
	final    holdapi.Status
}

// Create makes a holder in cfg.RunDir: its keys, pipes, mounts and trace socket.
// The caller serves it, and Finish takes everything away again.
func Create(ctx context.Context, cfg Config) (_ *Holder, err error) {
	if cfg.JobID == "" || cfg.LogBytes <= 0 || cfg.Log == nil {
		return nil, errors.New("holder needs a job, a log budget and a logger")
	}
	st, err := os.Stat(cfg.RunDir)
	if err != nil {
		return nil, fmt.Errorf("run folder: %w", err)
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); !ok || !st.IsDir() || st.Mode().Perm()&0o077 != 0 || int(sys.Uid) != os.Geteuid() {
		return nil, fmt.Errorf("run folder %s must be a folder of this user's alone (mode 0700)", cfg.RunDir)
	}
	cfg.StartWait = cmp.Or(cfg.StartWait, DefaultStartWait)
	cfg.TraceGrace = cmp.Or(cfg.TraceGrace, DefaultTraceGrace)
	h := &Holder{cfg: cfg, log: cfg.Log, keys: map[string]heldKey{}, events: newEventLog(time.Now), budget: &budget{left: cfg.LogBytes}, filled: make(chan struct{})}
	// The job's end is said by an operation, not by the caller's context.
	h.ending, h.end = context.WithCancel(context.WithoutCancel(ctx))
	defer func() {
		if err != nil {
			h.end()
			err = errors.Join(err, h.release(ctx))
		}
	}()
	if h.recipient, err = keys.GenerateRecipient(); err != nil {
		return nil, err
	}
	if h.session, err = keys.GenerateSession(); err != nil {
		return nil, err
	}
	if h.stdout, err = openLog(h.path(holdapi.StdoutName), h.budget); err != nil {
		return nil, err
	}
	h.made = append(h.made, holdapi.StdoutName)
	if h.stderr, err = openLog(h.path(holdapi.StderrName), h.budget); err != nil {
		return nil, err
	}
	h.made = append(h.made, holdapi.StderrName)
	if h.trace, err = listenTrace(h.path(holdapi.TraceName), h.events, cfg.TraceGrace, cfg.Log); err != nil {
		return nil, err
	}
	for _, n := range []string{holdapi.InputsName, holdapi.CheckpointsName} {
		if err := os.Mkdir(h.path(n), 0o700); err != nil {
			return nil, fmt.Errorf("make mount point: %w", err)
		}
		h.made = append(h.made, n)
	}
	wait := func(done <-chan struct{}) error { return h.trace.waitStart(done, cfg.StartWait) }
	failed := func(err error) { h.events.add(holdapi.Event{Kind: "input-error", Detail: err.Error()}) }
	if h.inputFS, err = mountInputs(h.path(holdapi.InputsName), cfg.UID, cfg.GID, wait, failed, time.Now()); err != nil {
		return nil, err
	}
	if h.ckptFS, err = mountCheckpoints(h.path(holdapi.CheckpointsName), cfg.UID, cfg.GID, h.commit, time.Now); err != nil {
		return nil, err
	}
	h.log.InfoContext(ctx, "holder is ready", "passthrough", h.inputFS.passthrough)
	return h, nil
}

func (h *Holder) path(name string) string { return filepath.Join(h.cfg.RunDir, name) }

// apiError is an operation refused with a stable code.
type apiError struct {
	code string
	err  error
}

func (e *apiError) Error() string { return e.err.Error() }
func (e *apiError) Unwrap() error { return e.err }

func fail(code, format string, args ...any) error {
	return &apiError{code, fmt.Errorf(format, args...)}
}

// running is nil unless the job is over. h.mu is held.
func (h *Holder) running() error {
	if h.finished != nil {
		return fail(holdapi.CodeState, "the job is over")
	}
	return nil
}

func (h *Holder) hello() holdapi.Hello {
	return holdapi.Hello{JobID: h.cfg.JobID, Pid: os.Getpid(), RecipientKey: h.recipient.Public(), SessionKey: h.session.Public()}
}

func (h *Holder) signRelease(request []byte) ([]byte, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.running(); err != nil {
		return nil, err
	}
	sig, err := h.session.SignRelease(request)
	if err != nil {
		return nil, &apiError{holdapi.CodeRefused, err}
	}
	return sig, nil
}

// sign signs a statement, at any time: the last one speaks of the scrubbing.
func (h *Holder) sign(statement []byte) ([]byte, error) {
	sig, err := h.session.SignStatement(statement)
	if err != nil {
		return nil, &apiError{holdapi.CodeRefused, err}
	}
	return sig, nil
}

// wrapInfo is what receipt.WrapInfo encodes.
type wrapInfo struct {
	Label    string      `json:"label"`
	Grant    string      `json:"grant"`
	Plan     plan.Digest `json:"plan"`
	Asset    string      `json:"asset"`
	ResultID string      `json:"resultId"`
}

const maxWrapInfo = 8 << 10

// deliver takes a data key. The same key for the same asset may come twice: an
// agent that was restarted does not know what its predecessor did.
func (h *Holder) deliver(d holdapi.Deliver) error {
	var info wrapInfo
	if err := plan.Decode(d.Info, maxWrapInfo, &info); err != nil {
		return fail(holdapi.CodeInvalid, "wrap info: %w", err)
	}
	want, err := receipt.WrapInfo(info.Grant, info.Plan, info.Asset, info.ResultID)
	if err != nil || !bytes.Equal(want, d.Info) {
		return fail(holdapi.CodeInvalid, "wrap info is not that of a release")
	}
	if d.Asset == "" || info.Asset != d.Asset || info.Plan.Bytes() == nil {
		return fail(holdapi.CodeRefused, "wrap info speaks of another asset, or of no plan")
	}
	key, err := h.recipient.Open(d.Enc, d.Ciphertext, d.Info, []byte(d.Asset))
	if err != nil {
		return &apiError{holdapi.CodeRefused, err}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.running(); err != nil {
		key.Destroy()
		return err
	}
	if old, ok := h.keys[d.Asset]; ok {
		same := old.key.Equal(key) && old.plan == info.Plan
		key.Destroy()
		if !same {
			return fail(holdapi.CodeRefused, "asset %.80q has another key already", d.Asset)
		}
		return nil
	}
	if len(h.keys) == maxKeys {
		key.Destroy()
		return fail(holdapi.CodeFull, "more than %d keys", maxKeys)
	}
	for _, k := range h.keys {
		if k.plan != info.Plan {
			key.Destroy()
			return fail(holdapi.CodeRefused, "key was released for another plan than the keys before it")
		}
	}
	h.keys[d.Asset] = heldKey{key: key, plan: info.Plan}
	return nil
}

// input takes a sealed folder. root becomes the holder's.
func (h *Holder) input(ctx context.Context, in holdapi.Input, root *os.Root) (err error) {
	defer func() {
		if err != nil {
			_ = root.Close()
		}
	}()
	if !inputName.MatchString(in.Name) {
		return fail(holdapi.CodeInvalid, "input name %.80q", in.Name)
	}
	folder, err := seal.ReadFolder(root, in.Asset, in.Digest)
	if err != nil {
		return &apiError{holdapi.CodeRefused, err}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.running(); err != nil {
		return err
	}
	if i := slices.IndexFunc(h.inputs, func(o *heldInput) bool { return o.Name == in.Name }); i >= 0 {
		if h.inputs[i].Input != in {
			return fail(holdapi.CodeState, "input %s is another one", in.Name)
		}
		return root.Close()
	}
	if h.state != notDecrypted {
		return fail(holdapi.CodeState, "inputs are decrypted already")
	}
	if len(h.inputs) == maxInputs {
		return fail(holdapi.CodeFull, "more than %d inputs", maxInputs)
	}
	h.inputs = append(h.inputs, &heldInput{Input: in, root: root, folder: folder})
	h.inputFS.addInput(ctx, in.Name)
	return nil
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

// decrypt fills the regions of all inputs, once. A second call waits for the
// first and has its answer.
func (h *Holder) decrypt(ctx context.Context) (holdapi.Decrypted, error) {
	h.mu.Lock()
	if h.state != notDecrypted {
		filled := h.filled
		h.mu.Unlock()
		<-filled
		h.mu.Lock()
		defer h.mu.Unlock()
		return h.result, h.failure
	}
	if err := h.running(); err != nil {
		h.mu.Unlock()
		return holdapi.Decrypted{}, err
	}
	work := make(map[*heldInput]*keys.DataKey, len(h.inputs))
	inputs := slices.Clone(h.inputs)
	for _, in := range inputs {
		k, ok := h.keys[in.Asset]
		if !ok {
			h.mu.Unlock()
			return holdapi.Decrypted{}, fail(holdapi.CodeState, "no key for asset %.80q was delivered", in.Asset)
		}
		work[in] = k.key
	}
	h.state = decrypting
	h.mu.Unlock()

	start := time.Now()
	res, err := h.fill(ctx, inputs, work)
	res.Nanos = time.Since(start).Nanoseconds()

	h.mu.Lock()
	defer h.mu.Unlock()
	h.result, h.state = res, decrypted
	if err != nil {
		h.result, h.failure, h.state = holdapi.Decrypted{}, err, decryptFailed
		// Nothing of an input that was damaged is kept.
		for _, r := range h.regions {
			if serr := r.Scrub(); serr != nil {
				h.log.ErrorContext(ctx, "scrub after failed decryption", "error", serr)
			}
		}
	}
	close(h.filled)
	return h.result, h.failure
}

func (h *Holder) fill(ctx context.Context, inputs []*heldInput, work map[*heldInput]*keys.DataKey) (holdapi.Decrypted, error) {
	var res holdapi.Decrypted
	type placed struct {
		input, name string
		region      *dma.Region
	}
	var files []placed
	for _, in := range inputs {
		es, err := in.folder.Entries(work[in])
		if err != nil {
			return res, fail(holdapi.CodeRefused, "input %s: %w", in.Name, err)
		}
		for _, e := range es {
			r, err := h.fillFile(in, work[in], e)
			if err != nil {
				// Names of files are secret, and errors reach people's logs.
				return res, fail(holdapi.CodeIO, "input %s: file %s: %w", in.Name, e.ID, err)
			}
			files = append(files, placed{in.Name, e.Name, r})
			res.Files++
			res.Bytes += e.Size
		}
	}
	for _, f := range files {
		h.inputFS.addFile(ctx, f.input, f.name, f.region)
	}
	return res, nil
}

func (h *Holder) fillFile(in *heldInput, key *keys.DataKey, e seal.Entry) (*dma.Region, error) {
	f, err := in.folder.Open(key, e)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r, err := dma.New("coffer-region", f.Size())
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	h.regions = append(h.regions, r)
	h.mu.Unlock()
	if err := r.Fill(h.ending, f.ChunkSize(), 0, func() func(int64, []byte) error { return f.Worker().ReadChunk }); err != nil {
		return nil, err
	}
	return r, nil
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
	start := time.Now()
	h.mu.Lock()
	sink := h.sink
	var k heldKey
	if sink != nil {
		k = h.keys[sink.Asset]
	}
	c := seal.Commit{JobID: h.cfg.JobID, Sequence: uint64(len(h.commits)) + 1, Name: name}
	if n := len(h.commits); n > 0 {
		c.Parent = h.commits[n-1].Digest
	}
	h.mu.Unlock()
	switch {
	case c.Sequence > maxCommits:
		return fmt.Errorf("the job has made %d checkpoints already", maxCommits)
	case sink == nil:
		return errors.New("the job has no place for checkpoints")
	case k.key == nil:
		return errors.New("no key for the checkpoints was delivered")
	case k.plan != sink.Plan:
		return errors.New("the key for the checkpoints was released for another plan")
	}
	c.Plan, c.Asset, c.Folder = sink.Plan, sink.Asset, holdapi.CheckpointFolder(c.Sequence, name)
	got, err := seal.SealCheckpoint(h.ending, k.key, h.session, files, sink.root, c, time.Now, seal.Options{})
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

// status says how things are.
func (h *Holder) status() holdapi.Status {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.finished != nil && isClosed(h.finished) {
		return h.final
	}
	return h.current()
}

// current is called with h.mu held.
func (h *Holder) current() holdapi.Status {
	s := holdapi.Status{Scrubbed: h.scrubbed, LogBytes: h.stdout.size() + h.stderr.size(), LogCut: h.budget.dropped()}
	h.trace.status(&s)
	if !h.scrubbed {
		for _, r := range h.regions {
			s.RegionBytes += r.Size()
		}
		s.RegionBytes += h.ckptFS.held()
	}
	s.Checkpoints = slices.Clone(h.commits[max(0, len(h.commits)-maxStatusCheckpoints):])
	return s
}

// finish ends the job: no path opens any more, logs are drained, mounts go,
// regions are scrubbed and read back, data keys destroyed. It is done once; a
// second call waits for the first. The session key lives until exit, to sign what
// this returns.
func (h *Holder) finish(ctx context.Context) (holdapi.Status, error) {
	h.mu.Lock()
	if h.finished != nil {
		finished := h.finished
		h.mu.Unlock()
		<-finished
		return h.status(), nil
	}
	h.finished = make(chan struct{})
	h.mu.Unlock()

	err := h.release(ctx)
	if err != nil {
		h.log.ErrorContext(ctx, "finish", "error", err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.scrubbed = err == nil
	h.final = h.current()
	close(h.finished)
	h.events.close()
	if err != nil {
		return h.final, &apiError{holdapi.CodeIO, err}
	}
	return h.final, nil
}

// release takes down whatever was set up, in the order in which it stops
// plaintext from going out.
func (h *Holder) release(ctx context.Context) error {
	var errs []error
	if h.trace != nil {
		// Shuts the gate.
		h.trace.finish()
	}
	for _, l := range []*logStream{h.stdout, h.stderr} {
		if l != nil {
			errs = append(errs, l.finish(ctx))
		}
	}
	// A decryption under way ends at its next chunk.
	h.end()
	h.mu.Lock()
	waiting := h.state == decrypting
	h.mu.Unlock()
	if waiting {
		<-h.filled
	}
	if h.ckptFS != nil {
		errs = append(errs, h.ckptFS.close(), h.ckptFS.unmount())
	}
	if h.inputFS != nil {
		errs = append(errs, h.inputFS.unmount())
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, r := range h.regions {
		errs = append(errs, r.Scrub(), r.Close())
	}
	for _, k := range h.keys {
		k.key.Destroy()
	}
	if h.recipient != nil {
		h.recipient.Destroy()
	}
	for _, in := range h.inputs {
		errs = append(errs, in.root.Close())
	}
	if h.sink != nil {
		errs = append(errs, h.sink.root.Close())
	}
	errs = append(errs, h.removeNames())
	return errors.Join(errs...)
}

// removeNames takes away what Create made under the run folder. Sockets go with
// their listeners.
func (h *Holder) removeNames() error {
	var errs error
	for _, n := range h.made {
		if err := os.Remove(h.path(n)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = errors.Join(errs, fmt.Errorf("clean up: %w", err))
		}
	}
	h.made = nil
	return errs
}

// listen makes a socket for this user alone.
func listen(path string) (*net.UnixListener, error) {
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		_ = l.Close()
		return nil, err
	}
	return l, nil
}
