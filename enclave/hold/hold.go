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
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/dma"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/enclave/keys"
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
			err = errors.Join(err, h.takeDown(ctx))
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
	if h.inputFS, err = mountInputs(h.path(holdapi.InputsName), cfg.UID, cfg.GID, h.mayOpen, h.refusedInput(ctx), time.Now()); err != nil {
		return nil, err
	}
	if h.ckptFS, err = mountCheckpoints(h.path(holdapi.CheckpointsName), cfg.UID, cfg.GID, h.commit, time.Now); err != nil {
		return nil, err
	}
	// The job's user goes through this folder, and through none above it.
	if err := os.Chmod(h.path(holdapi.RegionsDir), 0o755); err != nil { // #nosec G302 -- as it says
		return nil, fmt.Errorf("hand out regions: %w", err)
	}
	if h.handout, err = listenHandout(h.path(holdapi.RegionsDir, holdapi.RegionsSocket), h.mayOpen, cfg.Log); err != nil {
		return nil, err
	}
	h.log.InfoContext(ctx, "holder is ready", "passthrough", h.inputFS.passthrough)
	return h, nil
}

// mayOpen waits until the trace has shown the container's start, or done is closed, and
// says whether the lease holds: nothing that is plaintext opens before.
func (h *Holder) mayOpen(done <-chan struct{}) error {
	if err := h.trace.waitStart(done, h.cfg.StartWait); err != nil {
		return err
	}
	return h.lease.use()
}

// refusedInput records errors of inputs. A job that reads on after one says nothing new.
func (h *Holder) refusedInput(ctx context.Context) func(error) {
	var mu sync.Mutex
	var last string
	return func(err error) {
		mu.Lock()
		defer mu.Unlock()
		if s := err.Error(); s != last {
			last = s
			h.log.WarnContext(ctx, "input was refused", "error", err)
			h.events.add(holdapi.Event{Kind: bundle.EventInputError, Detail: s})
		}
	}
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
