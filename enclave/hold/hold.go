// Package hold is the holder: the one process of a job that has its keys, its
// plaintext, its trace and its logs.
//
// Trusted: the kernel, and whoever may connect to a socket of the holder's own
// user (the measured agent). Checked: the order of operations, sealed inputs
// against their digests and keys, that the trace has shown the container's start
// before any path opens or any memory is handed out, and that memory only to the
// job's control group, that the broker's lease holds before every use of a key,
// that memory is locked and reads back as zero in the end.
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
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
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

	regionName = "coffer-region"
	// minPrefault is what a file must have for its region to be made before its
	// key is there.
	minPrefault = 1 << 20
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
	// LogRate bounds how many bytes a second are kept; plan.DefaultLogBytesPerSecond
	// if zero.
	LogRate int64
	// Metrics is what of the output are numbers that people see; nil: none.
	Metrics *plan.Metrics
	// WatchOpen are the paths that are told of when the job opens them
	// (holdapi.PathPattern).
	WatchOpen []string
	// RegionBytes bounds the memory that inputs are decrypted into. If they are
	// larger together, files are decrypted when they are opened or read. Zero: no
	// bound, and every input is decrypted before the job starts.
	RegionBytes int64
	// NearNode is 1 more than the number of the memory node that regions should lie
	// on; 0: any.
	NearNode int
	// Reserve is memory that was made ready for the inputs; nil: none. It becomes
	// the holder's.
	Reserve *dma.Reserve
	// Procs is cgroup.procs of the job's control group, in which this process is
	// too. When the lease is over, all others in it are killed. It becomes the
	// holder's.
	Procs *os.File
	Log   *slog.Logger
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
	// prepared are regions by place in the manifest, nil where there is none. They
	// are read once done is closed, which follows stop.
	prepared []*dma.Region
	stop     context.CancelFunc // nil before prepare
	done     chan struct{}
	// sizes are those of its files, in bytes.
	sizes []int64
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
	metrics   *metrics
	progress  progress // of decrypting
	stdout    *logStream
	stderr    *logStream
	inputFS   *inputTree
	ckptFS    *checkpointTree
	handout   *handout
	pool      *dma.Pool
	lease     *lease
	alarm     *alarm

	// first is openFirst.
	first int64

	// ending is cancelled when the job is over, and with it work under way.
	ending context.Context
	end    context.CancelFunc
	// made are the names under the run folder that are this holder's to remove.
	made []string

	// mu guards what follows. It is not held while regions fill or a commit seals.
	mu       sync.Mutex
	keys     map[string]heldKey
	inputs   []*heldInput
	reserve  *dma.Reserve // nil once it is settled
	sink     *heldSink
	resume   resume
	reseal   reseal
	state    decryptState
	begun    chan struct{} // closed when decrypt has its answer
	filled   chan struct{} // closed when nothing more is decrypted into regions
	result   holdapi.Decrypted
	failure  error
	demand   *demand // nil if inputs are resident
	planned  int64   // bytes of all inputs' files
	commits  []holdapi.Checkpoint
	finished chan struct{} // closed when Finish is over; nil before it began
	scrubbed bool
	final    holdapi.Status
}

// Create makes a holder in cfg.RunDir: its keys, pipes, mounts and trace socket.
// The caller serves it, and Finish takes everything away again.
func Create(ctx context.Context, cfg Config) (_ *Holder, err error) {
	if cfg.JobID == "" || cfg.LogBytes <= 0 || cfg.LogRate < 0 || cfg.RegionBytes < 0 || cfg.Procs == nil || cfg.Log == nil {
		return nil, errors.New("holder needs a job, its processes, a log budget and a logger")
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
	cfg.LogRate = cmp.Or(cfg.LogRate, plan.DefaultLogBytesPerSecond)
	h := &Holder{cfg: cfg, log: cfg.Log, keys: map[string]heldKey{}, events: newEventLog(time.Now), budget: newBudget(cfg.LogBytes, cfg.LogRate, time.Now), begun: make(chan struct{}), filled: make(chan struct{}), first: openFirst, pool: dma.NewPool(cfg.RegionBytes), reserve: cfg.Reserve}
	h.pool.Near(cfg.NearNode)
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
	if err := h.openLease(); err != nil {
		return nil, err
	}
	h.metrics = newMetrics(cfg.Metrics, time.Now)
	if h.stdout, err = openLog(h.path(holdapi.StdoutName), h.budget, h.metrics); err != nil {
		return nil, err
	}
	h.made = append(h.made, holdapi.StdoutName)
	if h.stderr, err = openLog(h.path(holdapi.StderrName), h.budget, nil); err != nil {
		return nil, err
	}
	h.made = append(h.made, holdapi.StderrName)
	watched, err := newOpens(cfg.WatchOpen)
	if err != nil {
		return nil, fmt.Errorf("holder: %w", err)
	}
	if h.trace, err = listenTrace(h.path(holdapi.TraceName), h.events, watched, cfg.TraceGrace, cfg.Log); err != nil {
		return nil, err
	}
	for _, n := range []string{holdapi.InputsName, holdapi.CheckpointsName, holdapi.RegionsDir} {
		if err := os.Mkdir(h.path(n), 0o700); err != nil {
			return nil, fmt.Errorf("make mount point: %w", err)
		}
		h.made = append(h.made, n)
	}
	wait := func(done <-chan struct{}) error {
		if err := h.trace.waitStart(done, cfg.StartWait); err != nil {
			return err
		}
		return h.lease.use()
	}
	// A job that reads on after an error says nothing new.
	var last struct {
		sync.Mutex
		said string
	}
	failed := func(err error) {
		last.Lock()
		defer last.Unlock()
		if s := err.Error(); s != last.said {
			last.said = s
			h.log.WarnContext(ctx, "input was refused", "error", err)
			h.events.add(holdapi.Event{Kind: "input-error", Detail: s})
		}
	}
	if h.inputFS, err = mountInputs(h.path(holdapi.InputsName), cfg.UID, cfg.GID, wait, failed, time.Now()); err != nil {
		return nil, err
	}
	if h.ckptFS, err = mountCheckpoints(h.path(holdapi.CheckpointsName), cfg.UID, cfg.GID, h.commit, time.Now); err != nil {
		return nil, err
	}
	// The job's user goes through this folder, and through none above it.
	if err := os.Chmod(h.path(holdapi.RegionsDir), 0o755); err != nil { // #nosec G302 -- as it says
		return nil, fmt.Errorf("hand out regions: %w", err)
	}
	if h.handout, err = listenHandout(h.path(holdapi.RegionsDir, holdapi.RegionsSocket), wait, cfg.Log); err != nil {
		return nil, err
	}
	h.log.InfoContext(ctx, "holder is ready", "passthrough", h.inputFS.passthrough)
	return h, nil
}

func (h *Holder) path(names ...string) string {
	return filepath.Join(h.cfg.RunDir, filepath.Join(names...))
}

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
	var r receipt.ReleaseRequest
	if err := plan.Decode(request, receipt.MaxRequest, &r); err != nil {
		return nil, &apiError{holdapi.CodeRefused, err}
	}
	if err := h.lease.ask(r); err != nil {
		return nil, err
	}
	sig, err := h.session.SignRelease(request)
	if err != nil {
		return nil, &apiError{holdapi.CodeRefused, err}
	}
	return sig, nil
}

// sign signs a bundle statement of this job once the job is over: what it says of
// the end is then known.
func (h *Holder) sign(statement []byte) ([]byte, error) {
	st, err := bundle.ParseStatement(statement)
	if err != nil {
		return nil, &apiError{holdapi.CodeRefused, err}
	}
	if st.JobID != h.cfg.JobID {
		return nil, fail(holdapi.CodeRefused, "the statement speaks of another job")
	}
	h.mu.Lock()
	over := h.finished != nil && isClosed(h.finished)
	h.mu.Unlock()
	if !over {
		return nil, fail(holdapi.CodeState, "the job is not finished")
	}
	sig, err := h.session.SignStatement(statement)
	if err != nil {
		return nil, &apiError{holdapi.CodeRefused, err}
	}
	return sig, nil
}

// wrapInfo is what receipt.WrapInfo encodes.
type wrapInfo struct {
	Label    string             `json:"label"`
	Grant    string             `json:"grant"`
	Plan     plan.Digest        `json:"plan"`
	Asset    string             `json:"asset"`
	ResultID string             `json:"resultId"`
	Lease    receipt.LeaseTerms `json:"lease"`
}

const maxWrapInfo = 8 << 10

// deliver takes a data key. The same key for the same asset may come twice: an
// agent that was restarted does not know what its predecessor did.
func (h *Holder) deliver(d holdapi.Deliver) error {
	var info wrapInfo
	if err := plan.Decode(d.Info, maxWrapInfo, &info); err != nil {
		return fail(holdapi.CodeInvalid, "wrap info: %w", err)
	}
	want, err := receipt.WrapInfo(info.Grant, info.Plan, info.Asset, info.ResultID, info.Lease)
	if err != nil || !bytes.Equal(want, d.Info) {
		return fail(holdapi.CodeInvalid, "wrap info is not that of a release")
	}
	if d.Asset == "" || info.Asset != d.Asset || info.Plan.Bytes() == nil {
		return fail(holdapi.CodeRefused, "wrap info speaks of another asset, or of no plan")
	}
	leaseKeys, err := info.Lease.Keys(d.LeaseKeys)
	if err != nil {
		return &apiError{holdapi.CodeRefused, err}
	}
	if err := h.lease.use(); err != nil && !errors.Is(err, errNoLease) {
		return err
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
	if err := h.lease.grant(info, leaseKeys); err != nil {
		key.Destroy()
		return err
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
	if h.reseal.source != nil {
		return fail(holdapi.CodeState, "a job that reseals has no inputs")
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
	sizes, err := folder.Sizes()
	if err != nil {
		return &apiError{holdapi.CodeRefused, err}
	}
	if in.Secret {
		if err := checkSecret(in.Name, sizes); err != nil {
			return err
		}
	}
	held := &heldInput{Input: in, root: root, folder: folder, prepared: make([]*dma.Region, len(sizes)), done: make(chan struct{}), sizes: sizes}
	h.plan(held) //nolint:contextcheck // it ends with the job, not with the request
	h.inputs = append(h.inputs, held)
	if in.Secret {
		h.inputFS.addSecret(ctx, in.Name)
	} else {
		h.inputFS.addInput(ctx, in.Name)
	}
	return nil
}

// plan counts an input, and prepares it unless there is a reserve: then that waits
// until all inputs are known. h.mu is held.
func (h *Holder) plan(in *heldInput) {
	for _, n := range in.sizes {
		h.planned += n
	}
	if h.reserve == nil {
		h.prepare(in)
	}
}

// prepare makes regions while the job attests, for new memory comes slower than
// the cipher fills it. Half the cores do it: the others have work. h.mu is held.
func (h *Holder) prepare(in *heldInput) {
	ctx, stop := context.WithCancel(h.ending)
	in.stop = stop
	if !h.resident() {
		stop()
		close(in.done)
		return
	}
	workers := max(1, runtime.GOMAXPROCS(0)/2)
	go func() {
		defer close(in.done)
		defer stop()
		for i, n := range in.sizes {
			if n < minPrefault || ctx.Err() != nil {
				continue
			}
			var err error
			if in.prepared[i] == nil {
				in.prepared[i], err = h.pool.Get(regionName, n)
			}
			if err == nil {
				err = in.prepared[i].Prefault(ctx, workers)
			}
			if err != nil {
				// Whoever fills the region meets the same error, and it counts there.
				if ctx.Err() == nil {
					h.log.Warn("prepare memory", "input", in.Name, "error", err)
				}
				return
			}
		}
	}()
}

// resident says whether the inputs so far fit into memory together. h.mu is held.
func (h *Holder) resident() bool { return h.cfg.RegionBytes <= 0 || h.planned <= h.cfg.RegionBytes }

// unprepare ends prepare.
func (in *heldInput) unprepare() {
	if in.stop == nil {
		return
	}
	in.stop()
	<-in.done
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

// decrypt opens all inputs, once: into regions, or so that files are decrypted when
// they are opened or read. Inputs of more than h.first bytes go on being decrypted
// when it has returned. A second call waits for the first and has its answer.
func (h *Holder) decrypt(ctx context.Context) (holdapi.Decrypted, error) {
	h.mu.Lock()
	if h.state != notDecrypted {
		begun := h.begun
		h.mu.Unlock()
		<-begun
		h.mu.Lock()
		defer h.mu.Unlock()
		return h.result, h.failure
	}
	if err := errors.Join(h.running(), h.share()); err != nil { //nolint:contextcheck // it ends with the job, not with the request
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
	res, rest, err := h.fill(ctx, inputs, work)
	res.Nanos = time.Since(start).Nanoseconds()

	h.mu.Lock()
	defer h.mu.Unlock()
	h.result = res
	switch {
	case err != nil:
		h.result, h.failure, h.state = holdapi.Decrypted{}, err, decryptFailed
		// Nothing of an input that was damaged is kept.
		if serr := h.pool.Scrub(); serr != nil {
			h.log.ErrorContext(ctx, "scrub after failed decryption", "error", serr)
		}
	case rest != nil:
		h.result.Opening = true
		go h.openRest(rest, start, h.result) //nolint:contextcheck // it ends with the job, not with the request
	default:
		h.state = decrypted
		h.log.InfoContext(ctx, "inputs are open", "files", res.Files, "bytes", res.Bytes, "nanos", res.Nanos, "onDemand", h.demand != nil, "hugePages", dma.HugePages())
	}
	close(h.begun)
	if rest == nil {
		close(h.filled)
	}
	return h.result, h.failure
}

// fill makes the inputs' files known. rest is what remains to be decrypted, nil if
// nothing does; it is nil after an error.
func (h *Holder) fill(ctx context.Context, inputs []*heldInput, work map[*heldInput]*keys.DataKey) (res holdapi.Decrypted, rest *opening, err error) {
	entries := make([][]seal.Entry, len(inputs))
	var total int64
	chunkSize := 0
	for i, in := range inputs {
		in.unprepare()
		if err := h.lease.use(); err != nil {
			return res, nil, err
		}
		es, err := in.folder.Entries(work[in])
		if err != nil {
			return res, nil, fail(holdapi.CodeRefused, "input %s: %w", in.Name, err)
		}
		entries[i] = es
		for _, e := range es {
			total += e.Size
		}
		chunkSize = max(chunkSize, in.folder.Manifest().ChunkSize)
	}
	var d *demand
	if h.cfg.RegionBytes > 0 && total > h.cfg.RegionBytes {
		if d, err = h.onDemand(inputs, chunkSize); err != nil {
			return res, nil, fail(holdapi.CodeIO, "%w", err)
		}
	}
	o := &opening{
		get: func(size int64) (*dma.Region, error) { return h.pool.Get(regionName, size) },
		use: h.lease.use, passthrough: h.inputFS.passthrough, progress: &h.progress, ending: h.ending,
	}
	files := make([][]content, len(inputs))
	for i, in := range inputs {
		for j, e := range entries[i] {
			res.Files++
			if d == nil {
				res.Bytes += e.Size
				files[i] = append(files[i], o.add(in, work[in], j, e))
				continue
			}
			files[i] = append(files[i], d.add(in, work[in], e))
		}
	}
	if d != nil || res.Bytes > h.first {
		// What is wrong with a whole file shows before the job starts.
		for i, in := range inputs {
			for _, e := range entries[i] {
				if err := h.check(in, work[in], e); err != nil {
					// Names of files are secret, and errors reach people's logs.
					return res, nil, fail(holdapi.CodeIO, "input %s: file %s: %w", in.Name, e.ID, err)
				}
			}
		}
	}
	h.progress.total.Store(res.Bytes)
	if res.Bytes > h.first {
		rest = o
	} else if err := o.run(); err != nil {
		return res, nil, &apiError{holdapi.CodeIO, err}
	}
	for i, in := range inputs {
		for j, c := range files[i] {
			name := entries[i][j].Name
			if in.Secret {
				h.inputFS.addSecretFile(ctx, in.Name, c)
				continue
			}
			h.inputFS.addFile(ctx, in.Name, name, c)
			if f, ok := c.(*residentFile); ok {
				h.handout.add(in.Name+"/"+name, f)
			}
		}
	}
	return res, rest, nil
}

// onDemand makes what serves inputs that do not fit into memory together.
func (h *Holder) onDemand(inputs []*heldInput, chunkSize int) (*demand, error) {
	for _, in := range inputs {
		for _, r := range in.prepared {
			if r == nil {
				continue
			}
			if err := h.pool.Put(r); err != nil {
				return nil, err
			}
		}
	}
	// Two chunks at the least: one that is read, and one that is decrypted.
	size := max(min(maxCache, h.cfg.RegionBytes/4), 2*int64(chunkSize))
	h.pool.Reserve(size)
	d := &demand{pool: h.pool, use: h.lease.use, cache: newChunkCache(h.ending, h.lease.use, size, chunkSize), passthrough: h.inputFS.passthrough, ending: h.ending, log: h.log}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.demand = d
	return d, nil
}

// check opens a file that is decrypted later, to see that it can be.
func (h *Holder) check(in *heldInput, key *keys.DataKey, e seal.Entry) error {
	if err := h.lease.use(); err != nil {
		return err
	}
	f, err := in.folder.Open(key, e)
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), h.ending.Err())
}

// fillRegion bounds its workers by what their buffers take, not by cores alone.
// use says before each chunk whether the key may be used.
func fillRegion(ctx context.Context, use func() error, f *seal.OpenedFile, r *dma.Region) error {
	f.Sequential()
	f.Map()
	return r.Fill(ctx, f.ChunkSize(), workersFor(f.ChunkSize()), func() func(int64, []byte) error {
		w := f.Worker()
		return func(i int64, dst []byte) error {
			if err := use(); err != nil {
				return err
			}
			return w.ReadChunk(i, dst)
		}
	})
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
	s := holdapi.Status{Scrubbed: h.scrubbed, Lease: h.lease.look(), LogBytes: h.stdout.size() + h.stderr.size(), LogCut: h.budget.dropped(), Metrics: h.metrics.look(), Opened: h.progress.look()}
	h.trace.status(&s)
	if !h.scrubbed {
		s.RegionBytes = h.pool.Held() + h.ckptFS.held()
		if h.demand != nil {
			s.RegionBytes += h.demand.cache.held()
		}
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
	if h.scrubbed {
		h.events.add(holdapi.Event{Kind: eventScrubbed})
	}
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
	// A decryption under way ends at its next chunk, and whoever waits for it now.
	h.end()
	if h.handout != nil {
		errs = append(errs, h.handout.close())
	}
	h.mu.Lock()
	waiting := h.state == decrypting
	over := h.reseal.over
	h.mu.Unlock()
	if waiting {
		<-h.filled
	}
	if over != nil {
		<-over
	}
	if h.ckptFS != nil {
		errs = append(errs, h.ckptFS.close(), h.ckptFS.unmount())
	}
	if h.inputFS != nil {
		errs = append(errs, h.inputFS.unmount())
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, in := range h.inputs {
		in.unprepare()
	}
	if h.demand != nil {
		errs = append(errs, h.demand.close())
	}
	errs = append(errs, h.reserve.Close(), h.pool.Close())
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
	errs = append(errs, h.reseal.close())
	if h.alarm != nil {
		h.alarm.close()
	}
	errs = append(errs, h.cfg.Procs.Close(), h.removeNames())
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
