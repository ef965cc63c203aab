package runner

import (
	"context"
	"crypto/sha512"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"
	"golang.org/x/sys/unix"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/enclave/collect"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/holder"
	"github.com/coffer-run/coffer/runner/jobspec"
	"github.com/coffer-run/coffer/runner/journal"
	"github.com/coffer-run/coffer/runner/remote"
	"github.com/coffer-run/coffer/runner/sandbox"
	"github.com/coffer-run/coffer/runner/source/cache"
)

type grantInfo = brokerv1.Grant

// GPUs is what the agent asks of a GPU plugin besides evidence.
type GPUs interface {
	// UUIDs lists the devices. A node without GPUs has none.
	UUIDs(ctx context.Context) ([]string, error)
	// SetReady tells the driver whether GPUs may take work.
	SetReady(ctx context.Context, ready bool) error
}

// Deps are the parts of a node that an agent drives. All but Cache are required.
type Deps struct {
	Node      *sandbox.Node
	Journal   *journal.Journal
	Verifier  *remote.Verifier
	Broker    *remote.Broker
	Collector *collect.Collector
	GPUs      GPUs
	// AKCredential returns a current credential of the TPM's attestation key.
	AKCredential func(ctx context.Context) (string, error)
	// Cache has the inputs that come from object stores; without it there are none.
	Cache *cache.Cache
	// Holder is the holder's binary.
	Holder string
	// RunDir holds a directory per running job.
	RunDir string
	// Cgroup is the group under which every job has its own.
	Cgroup string
	// Name is the node's; Version is the agent's.
	Name    string
	Version string
	Log     *slog.Logger
}

// MaxRunning bounds the jobs that run at once.
const MaxRunning = 8

// Agent runs jobs. Its methods may be called concurrently.
type Agent struct {
	Deps
	log     *slog.Logger
	profile plan.Digest
	uuids   []string
	ctx     context.Context //nolint:containedctx // the life of the jobs, not of a call
	stop    context.CancelCauseFunc
	jobs    sync.WaitGroup
	slots   chan struct{}

	readyMu sync.Mutex // guards ready; held over calls of the plugin
	ready   int        // jobs for which the GPUs are set ready

	mu    sync.Mutex // guards what follows
	live  map[string]*Job
	ended map[string]*feed
	free  []string // GPUs that no job has
	moved chan struct{}
}

var (
	errShutdown  = errors.New("the agent is shutting down")
	errCancelled = errors.New("cancelled by its submitter")
	errDeadline  = errors.New("it ran longer than its maxDuration")
)

// Open returns an agent that has taken up the jobs of an earlier one.
func Open(ctx context.Context, d Deps) (*Agent, error) {
	if d.Node == nil || d.Journal == nil || d.Verifier == nil || d.Broker == nil || d.Collector == nil || d.GPUs == nil || d.AKCredential == nil ||
		d.Holder == "" || d.RunDir == "" || d.Cgroup == "" || d.Name == "" || d.Log == nil {
		return nil, errors.New("open agent: a part is missing")
	}
	profile, err := d.Node.Profile().Digest()
	if err != nil {
		return nil, fmt.Errorf("open agent: %w", err)
	}
	uuids, err := d.GPUs.UUIDs(ctx)
	if err != nil {
		return nil, fmt.Errorf("open agent: list GPUs: %w", err)
	}
	a := &Agent{
		Deps: d, log: d.Log, profile: profile, uuids: uuids, slots: make(chan struct{}, MaxRunning),
		live: map[string]*Job{}, ended: map[string]*feed{}, free: slices.Clone(uuids), moved: make(chan struct{}),
	}
	a.ctx, a.stop = context.WithCancelCause(context.WithoutCancel(ctx))
	if err := a.takeUp(ctx); err != nil {
		return nil, err
	}
	a.jobs.Go(func() { a.renewals(a.ctx) }) //nolint:contextcheck // for as long as the agent runs
	return a, nil
}

// Close lets go of the jobs and leaves them running for the next agent.
func (a *Agent) Close() {
	a.stop(errShutdown)
	a.jobs.Wait()
}

// Job is a job that was admitted. Only Submit and an agent's restart make one.
type Job struct {
	id        string
	submitter string
	spec      jobspec.Spec
	plan      plan.Plan
	canonical []byte
	digest    plan.Digest
	image     sandbox.Image
	env       []string
	runDir    string
	feed      *feed
	cancel    context.CancelCauseFunc
	redacted  []byte
	lease     leaseState

	// What follows belongs to the goroutine that runs the job.
	slot     bool
	ready    bool // the GPUs are set ready for this job
	gpus     []string
	holder   *holder.Holder
	sandbox  *sandbox.Sandbox
	record   record
	timeline []bundle.Step
	at       bundle.Stage
	exitCode int

	// The pumps write logs, seen and checkpoints; conclude reads them after
	// waiting for the pumps.
	pumps       sync.WaitGroup
	logs        [2]logDigest // stdout, stderr
	seen        uint64       // newest checkpoint that watchers know of
	checkpoints bundle.Step
	traceLost   chan struct{} // closed by the event pump, also when it fails
	finished    chan struct{} // closed by conclude
}

func newJob(id, submitter string) *Job {
	return &Job{
		id: id, submitter: submitter, traceLost: make(chan struct{}), finished: make(chan struct{}),
		logs: [2]logDigest{{hash: sha512.New384()}, {hash: sha512.New384()}},
	}
}

// record is what the stages left behind for the bundle; none of it is secret.
type record struct {
	Sandbox  []byte   `json:"sandbox,omitempty"`
	Evidence []byte   `json:"evidence,omitempty"`
	Result   string   `json:"result,omitempty"`
	Releases []string `json:"releases,omitempty"`
	// Approved is one for each grant of Releases, if the broker said.
	Approved []bundle.Approved `json:"approved,omitempty"`
}

// assets lists the assets whose keys the job needs, inputs first, each once.
func (j *Job) assets() []string {
	var out []string
	for _, in := range j.plan.Inputs {
		if !slices.Contains(out, in.Asset) {
			out = append(out, in.Asset)
		}
	}
	if c := j.plan.Checkpoints; c != nil && !slices.Contains(out, c.Asset) {
		out = append(out, c.Asset)
	}
	return out
}

// assetDigest is the digest that the plan has for an asset; empty for checkpoints.
func (j *Job) assetDigest(asset string) plan.Digest {
	for _, in := range j.plan.Inputs {
		if in.Asset == asset {
			return in.Digest
		}
	}
	return ""
}

// Plan resolves a job file without taking the job.
func (a *Agent) Plan(ctx context.Context, file []byte) (plan.Digest, []byte, error) {
	spec, err := jobspec.Parse(file)
	if err != nil {
		return "", nil, err
	}
	j, err := a.admit(ctx, spec)
	if err != nil {
		return "", nil, err
	}
	return j.digest, j.canonical, nil
}

// admit is stage 2: every name becomes a digest.
func (a *Agent) admit(ctx context.Context, spec jobspec.Spec) (*Job, error) {
	image, err := a.Node.Image(ctx, spec.Image)
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
	digests := map[string]plan.Digest{}
	for _, in := range spec.Inputs {
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
	if err := fits(int64(spec.Resources.Memory)); err != nil {
		return nil, err
	}
	p, err := spec.Plan(jobspec.Resolved{
		Image: image.Digest, Digests: digests, Policy: ref, Profile: a.profile,
	})
	if err != nil {
		return nil, err
	}
	j := newJob("", "")
	j.spec, j.plan, j.image = spec, p, image
	if j.canonical, err = p.Canonical(); err != nil {
		return nil, err
	}
	j.digest = plan.Sum(j.canonical)
	for _, e := range p.Env {
		j.env = append(j.env, spec.Env[e.Name])
	}
	return j, nil
}

// fits says whether the machine has the memory at all.
func fits(memory int64) error {
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return fmt.Errorf("read memory size: %w", err)
	}
	if has := int64(si.Totalram) * int64(si.Unit); memory > has { //nolint:gosec // a machine's size fits
		return fmt.Errorf("the job asks for %d MiB of memory and this node has %d", memory>>20, has>>20)
	}
	return nil
}

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
	j.id, j.submitter = ulid.Make().String(), submitter
	if j.redacted, err = spec.Redacted(); err != nil {
		return journal.Job{}, err
	}
	row, isNew, err := a.Journal.Submit(ctx, journal.Job{
		ID: j.id, Name: spec.Name, IdempotencyKey: key, FileDigest: plan.Sum(file), JobFile: j.redacted, Plan: j.canonical, PlanDigest: j.digest,
		Submitter: submitter, State: journal.Queued, Stage: string(bundle.StageAdmit), Submitted: began,
	})
	if err != nil || !isNew {
		return row, err
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
	a.launch(j, func(ctx context.Context) error { //nolint:contextcheck // a job outlives the call that submits it
		if err := a.approval(ctx, j); err != nil {
			return err
		}
		if err := a.acquire(ctx, j); err != nil {
			return err
		}
		return a.run(ctx, j)
	})
	return row, nil
}

// launch gives a job its goroutine and its ways to end.
func (a *Agent) launch(j *Job, work func(context.Context) error) {
	ctx, cancel := context.WithCancelCause(a.ctx)
	j.cancel = cancel
	j.runDir = a.jobDir(j.id)
	a.mu.Lock()
	a.live[j.id] = j
	a.mu.Unlock()
	a.jobs.Go(func() {
		defer cancel(nil)
		err := work(ctx)
		if errors.Is(context.Cause(ctx), errShutdown) {
			// The next agent takes the job up; nothing of it is touched.
			a.detach(j)
			return
		}
		j.lease.release()
		a.conclude(context.WithoutCancel(ctx), j, a.outcome(ctx, j, j.ended(ctx, err)))
	})
}

func (a *Agent) jobDir(id string) string { return filepath.Join(a.RunDir, "jobs", id) }

func (a *Agent) detach(j *Job) {
	if j.holder != nil {
		if err := j.holder.Detach(); err != nil {
			a.log.Warn("let go of holder", "job", j.id, "error", err)
		}
	}
}

// acquire waits for a slot and for the GPUs that the job asks for.
func (a *Agent) acquire(ctx context.Context, j *Job) error {
	select {
	case a.slots <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	j.slot = true
	for {
		a.mu.Lock()
		if n := j.plan.Resources.GPUs; len(a.free) >= n {
			j.gpus, a.free = slices.Clone(a.free[:n]), slices.Clone(a.free[n:])
			a.mu.Unlock()
			return nil
		}
		moved := a.moved
		a.mu.Unlock()
		select {
		case <-moved:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// setReady tells the driver that a job may use its GPUs. The driver knows one
// state for all of them, so the last job to end takes it back.
func (a *Agent) setReady(ctx context.Context, j *Job) error {
	if len(j.gpus) == 0 || j.ready {
		return nil
	}
	a.readyMu.Lock()
	defer a.readyMu.Unlock()
	if err := a.GPUs.SetReady(ctx, true); err != nil {
		return fmt.Errorf("set GPUs ready: %w", err)
	}
	j.ready = true
	a.ready++
	return nil
}

func (a *Agent) setUnready(ctx context.Context, j *Job) error {
	if !j.ready {
		return nil
	}
	a.readyMu.Lock()
	defer a.readyMu.Unlock()
	j.ready = false
	a.ready--
	if a.ready > 0 {
		return nil
	}
	if err := a.GPUs.SetReady(ctx, false); err != nil {
		return fmt.Errorf("set GPUs not ready: %w", err)
	}
	return nil
}

// giveBack returns a job's slot and GPUs.
func (a *Agent) giveBack(j *Job) {
	a.mu.Lock()
	a.free = append(a.free, j.gpus...)
	j.gpus = nil
	delete(a.live, j.id)
	a.remember(j)
	close(a.moved)
	a.moved = make(chan struct{})
	a.mu.Unlock()
	if j.slot {
		<-a.slots
	}
}

// maxRemembered bounds how many ended jobs keep their log lines in memory.
const maxRemembered = 16

// remember keeps an ended job's feed for late watchers. a.mu is held.
func (a *Agent) remember(j *Job) {
	if len(a.ended) >= maxRemembered {
		oldest := ""
		for id := range a.ended {
			if oldest == "" || id < oldest {
				oldest = id
			}
		}
		delete(a.ended, oldest)
	}
	a.ended[j.id] = j.feed
}

// Cancel ends a job that has not ended.
func (a *Agent) Cancel(ctx context.Context, id string) (journal.Job, error) {
	a.mu.Lock()
	j := a.live[id]
	a.mu.Unlock()
	if j != nil {
		j.cancel(errCancelled)
	}
	return a.Journal.Job(ctx, id)
}

// Feed returns what watchers of a job are told, or nil if the agent keeps
// nothing of it in memory.
func (a *Agent) Feed(id string) *Feed {
	a.mu.Lock()
	defer a.mu.Unlock()
	if j := a.live[id]; j != nil {
		return (*Feed)(j.feed)
	}
	if f := a.ended[id]; f != nil {
		return (*Feed)(f)
	}
	return nil
}

// Feed is a job's events, for a server to pass on.
type Feed feed

// After returns the events after a sequence number, whether they are the last,
// and a channel that is closed when there is more.
func (f *Feed) After(seq uint64) ([]*agentv1.WatchResponse, bool, <-chan struct{}) {
	return (*feed)(f).after(seq)
}

// Load says how many jobs run and wait, and how many GPUs there are.
func (a *Agent) Load() (running, queued, gpus int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.slots), max(0, len(a.live)-len(a.slots)), len(a.uuids)
}

// cleanUp removes everything a job has on this node. It is safe to call again.
func (a *Agent) cleanUp(ctx context.Context, j *Job) error {
	var errs []error
	if j.sandbox != nil {
		errs = append(errs, j.sandbox.Remove(ctx))
	} else {
		errs = append(errs, a.Node.Forget(ctx, j.id, j.runDir))
	}
	if j.holder != nil {
		errs = append(errs, j.holder.End(ctx, a.log))
	} else {
		errs = append(errs, holdapi.Cleanup(j.runDir))
	}
	errs = append(errs, sandbox.OpenCgroup(sandbox.JobCgroup(a.Cgroup, j.id)).Remove(), os.RemoveAll(j.runDir))
	if a.Cache != nil {
		errs = append(errs, a.Cache.Release(j.id))
	}
	return errors.Join(errs...)
}
