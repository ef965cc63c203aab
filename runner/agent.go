package runner

import (
	"cmp"
	"context"
	"crypto/sha512"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/oklog/ulid/v2"
	"golang.org/x/sys/unix"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/enclave/collect"
	"github.com/coffer-run/coffer/enclave/device"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/runner/alerts"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/egress"
	"github.com/coffer-run/coffer/runner/holder"
	"github.com/coffer-run/coffer/runner/jobspec"
	"github.com/coffer-run/coffer/runner/journal"
	"github.com/coffer-run/coffer/runner/logs"
	"github.com/coffer-run/coffer/runner/remote"
	"github.com/coffer-run/coffer/runner/rules"
	"github.com/coffer-run/coffer/runner/sandbox"
	"github.com/coffer-run/coffer/runner/source/cache"
	"github.com/coffer-run/coffer/runner/source/sink"
)

type grantInfo = brokerv1.Grant

// GPUs is what the agent asks of a GPU plugin besides evidence.
type GPUs interface {
	// UUIDs lists the devices. A node without GPUs has none.
	UUIDs(ctx context.Context) ([]string, error)
	device.Driver
}

// Deps are the parts of a node that an agent drives.
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
	// Sinks are the buckets that take checkpoints; without it, folders of the node do.
	Sinks *sink.Buckets
	// Images is who signs images and where they come from; nil for nobody and nowhere.
	Images *Images
	// Egress is the node's way to the network for jobs; nil if it offers none.
	Egress *egress.Config
	// Holder is the holder's binary.
	Holder string
	// RunDir holds a directory per running job.
	RunDir string
	// WarmRegions are the sizes, in bytes, of the regions that one holder makes ready
	// for the next job while no job runs; none: no holder is started before its job.
	WarmRegions []int64
	// Room bounds the jobs that run at once. What is zero is the machine's memory,
	// four times its cores, and DefaultJobs.
	Room Room
	// Queues divide the node between its users; one for everybody if there are none.
	Queues []Queue
	// Logs keeps what jobs print; without it the newest lines stay in memory.
	Logs *logs.Store
	// Values keeps what jobs that wait need; without it they do not survive the agent.
	Values *Values
	// Rules are what traces are held against; the node's profile has their digest.
	Rules *rules.Set
	// Alerts takes what they find; without it, only the job's record does.
	Alerts *alerts.Sink
	// Cgroup is the group under which every job has its own.
	Cgroup string
	// Name is the node's; Version is the agent's.
	Name    string
	Version string
	Log     *slog.Logger
}

const (
	// DefaultJobs is how many jobs run at once unless Deps says otherwise.
	DefaultJobs = 8
	// cpuShare is how many times over the cores may be given away unless Deps says
	// otherwise: a job's cores are a limit, and what it leaves idle others can use.
	// Memory and GPUs are given once.
	cpuShare = 4
	// maxLive bounds the jobs that have not ended.
	maxLive = 10_000
)

// ErrFull means that too many jobs wait already.
var ErrFull = errors.New("too many jobs wait on this node")

// Agent runs jobs. Its methods may be called concurrently.
type Agent struct {
	Deps
	log     *slog.Logger
	profile plan.Digest
	uuids   []string
	ctx     context.Context //nolint:containedctx // the life of the jobs, not of a call
	stop    context.CancelCauseFunc
	jobs    sync.WaitGroup
	queue   *queue

	machine *device.Machine
	warm    *warm
	// predicting has a value while a prediction is made.
	predicting chan struct{}

	mu      sync.Mutex // guards what follows
	live    map[string]*Job
	ended   map[string]*feed
	endings map[Ending]uint64
	newest  Attested
}

var (
	errShutdown  = errors.New("the agent is shutting down")
	errCancelled = errors.New("cancelled by its submitter")
	errDeadline  = errors.New("it ran longer than its maxDuration")
	errWaited    = errors.New("it waited longer than its maxWait")
)

// Open returns an agent that has taken up the jobs of an earlier one.
func Open(ctx context.Context, d Deps) (*Agent, error) {
	if d.Node == nil || d.Journal == nil || d.Verifier == nil || d.Broker == nil || d.Collector == nil || d.GPUs == nil || d.AKCredential == nil ||
		d.Rules == nil || d.Holder == "" || d.RunDir == "" || d.Cgroup == "" || d.Name == "" || d.Log == nil {
		return nil, errors.New("open agent: a part is missing")
	}
	profile, err := d.Node.Profile().Digest()
	if err != nil {
		return nil, fmt.Errorf("open agent: %w", err)
	}
	if d.Node.Profile().RuleSet != d.Rules.Digest() {
		return nil, errors.New("open agent: the sandbox profile names other rules than those that traces are held against")
	}
	uuids, err := d.GPUs.UUIDs(ctx)
	if err != nil {
		return nil, fmt.Errorf("open agent: list GPUs: %w", err)
	}
	room, err := d.Room.whole()
	if err != nil {
		return nil, fmt.Errorf("open agent: %w", err)
	}
	queues, err := checkQueues(d.Queues)
	if err != nil {
		return nil, fmt.Errorf("open agent: %w", err)
	}
	a := &Agent{
		Deps: d, log: d.Log, profile: profile, uuids: uuids, queue: newQueue(room, uuids, queues), machine: device.New(d.GPUs, uuids, device.Defaults), live: map[string]*Job{}, ended: map[string]*feed{}, predicting: make(chan struct{}, 1),
	}
	a.ctx, a.stop = context.WithCancelCause(context.WithoutCancel(ctx))
	if a.warm, err = a.openWarm(ctx); err != nil {
		return nil, fmt.Errorf("open agent: %w", err)
	}
	if err := a.takeUp(ctx); err != nil {
		return nil, err
	}
	a.warmUp()
	a.jobs.Go(func() { a.renewals(a.ctx) }) //nolint:contextcheck // for as long as the agent runs
	a.jobs.Go(func() { a.sweeps(a.ctx) })   //nolint:contextcheck // for as long as the agent runs
	return a, nil
}

// Close lets go of the jobs and leaves them running for the next agent.
func (a *Agent) Close() {
	a.stop(errShutdown)
	a.jobs.Wait()
	a.coolDown()
}

// Job is a job that was admitted. Only Submit and an agent's restart make one.
type Job struct {
	id        string
	submitter string
	spec      jobspec.Spec
	plan      plan.Plan
	canonical []byte
	digest    plan.Digest
	admitted  bool // its names were resolved by this agent
	image     sandbox.Image
	signature []byte // of the image, as the bundle has it; nil where nobody must sign
	sbom      []byte // the image's bill of materials, as the bundle has it; nil for none
	env       []string
	runDir    string
	feed      *feed
	cancel    context.CancelCauseFunc
	redacted  []byte
	lease     leaseState
	reattest  reattesting

	submitted time.Time
	attempt   int
	retryOf   string // the first attempt's id, empty for itself
	notBefore time.Time
	gang      gangState
	spent     time.Duration // of the budget, by the attempts before this one
	roomAt    time.Time     // when it got its room; zero before
	before    plan.Digest   // of the statement of the attempt before
	place     *place

	// What follows belongs to the goroutine that runs the job.
	placed bool // the job has entered the queue
	gpus   *device.Use
	holder *holder.Holder
	// opening is the holder while it may be decrypting; anybody may load it.
	opening  atomic.Pointer[holder.Holder]
	sandbox  *sandbox.Sandbox
	egress   *jobEgress // nil without egress
	record   record
	timeline []bundle.Step
	at       bundle.Stage
	exitCode int

	// The pumps write logs, seen and checkpoints; conclude reads them after
	// waiting for the pumps.
	pumps       sync.WaitGroup
	logs        [2]logDigest // stdout, stderr
	seen        uint64       // newest checkpoint that watchers know of
	pumped      bool         // the pumps have begun
	endRecorded bool         // Values has how the job ended
	checkpoints bundle.Step
	anchors     *anchors
	metrics     metrics
	watching    watching
	reported    reported
	traceLost   chan struct{} // closed by the event pump, also when it fails
	finished    chan struct{} // closed by conclude
}

func newJob(id, submitter string) *Job {
	return &Job{
		id: id, submitter: submitter, attempt: 1, gang: gangState{ready: make(chan struct{})}, anchors: newAnchors(), traceLost: make(chan struct{}), finished: make(chan struct{}),
		logs: [2]logDigest{{hash: sha512.New384()}, {hash: sha512.New384()}},
	}
}

// record is what the stages left behind for the bundle; none of it is secret.
type record struct {
	Sandbox []byte `json:"sandbox,omitempty"`
	// ImageSignature and ImageSBOM are those of which Sandbox speaks.
	ImageSignature []byte   `json:"imageSignature,omitempty"`
	ImageSBOM      []byte   `json:"imageSbom,omitempty"`
	Evidence       []byte   `json:"evidence,omitempty"`
	Result         string   `json:"result,omitempty"`
	Releases       []string `json:"releases,omitempty"`
	// ResultSeconds and LeaseSeconds are the last release's (receipt.Release).
	ResultSeconds int64 `json:"resultSeconds,omitempty"`
	LeaseSeconds  int64 `json:"leaseSeconds,omitempty"`
	// Approved is one for each grant of Releases, if the broker said.
	Approved []bundle.Approved `json:"approved,omitempty"`
	// Resume is what the job went on from, if its plan says so.
	Resume *bundle.Resume `json:"resume,omitempty"`
	// Reseal is what the job sealed anew, without the records of the files.
	Reseal *bundle.Reseal `json:"reseal,omitempty"`
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
	if r := j.plan.Reseal; r != nil {
		out = append(out, r.Asset, r.To)
	}
	return out
}

// assetDigest is the digest that the plan has for an asset; empty for checkpoints
// and for what the job is to seal.
func (j *Job) assetDigest(asset string) plan.Digest {
	for _, in := range j.plan.Inputs {
		if in.Asset == asset {
			return in.Digest
		}
	}
	if r := j.plan.Reseal; r != nil && r.Asset == asset && !r.Checkpoint {
		return r.Digest
	}
	return ""
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

// whole fills in what the machine has where r is silent.
func (r Room) whole() (Room, error) {
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return Room{}, fmt.Errorf("read memory size: %w", err)
	}
	r.Jobs = cmp.Or(r.Jobs, DefaultJobs)
	r.CPUMillis = cmp.Or(r.CPUMillis, cpuShare*int64(runtime.NumCPU())*1000)
	r.MemoryBytes = cmp.Or(r.MemoryBytes, int64(si.Totalram)*int64(si.Unit)) //nolint:gosec // a machine's size fits
	if r.Jobs < 0 || r.CPUMillis < 0 || r.MemoryBytes < 0 {
		return Room{}, fmt.Errorf("room for jobs %+v is negative", r)
	}
	return r, nil
}

// fits says whether the node has the memory at all.
func (a *Agent) fits(memory int64) error {
	if total, _, _ := a.queue.look(); memory > total.MemoryBytes {
		return fmt.Errorf("the job asks for %d MiB of memory and this node has %d MiB for jobs", memory>>20, total.MemoryBytes>>20)
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
	if err := a.mayWait(); err != nil {
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

// row is the job as the journal has it when it is new.
func (j *Job) row(key string, file plan.Digest) journal.Job {
	return journal.Job{
		ID: j.id, Name: j.spec.Name, IdempotencyKey: key, FileDigest: file, JobFile: j.redacted, Plan: j.canonical, PlanDigest: j.digest,
		Submitter: j.submitter, State: journal.Queued, Stage: string(bundle.StageAdmit), Submitted: j.submitted,
		Attempt: j.attempt, RetryOf: j.retryOf, NotBefore: j.notBefore, Priority: j.spec.Priority,
	}
}

func (a *Agent) mayWait() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.live) >= maxLive {
		return ErrFull
	}
	return nil
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
		err := cause(ctx, work(ctx))
		if errors.Is(context.Cause(ctx), errShutdown) {
			// The next agent takes the job up; nothing of it is touched.
			a.detach(j)
			return
		}
		j.lease.release()
		end := a.outcome(ctx, j, j.ended(ctx, err))
		a.endGang(j, end)
		a.conclude(context.WithoutCancel(ctx), j, end)
		if row, err := a.Journal.Job(context.WithoutCancel(ctx), j.id); err == nil && row.State.Final() {
			// A record that could not be made is a failure too, and a job that an agent
			// was just taking up may not have heard.
			a.endGang(j, row)
		}
	})
}

func (a *Agent) jobDir(id string) string { return filepath.Join(a.RunDir, "jobs", id) }

func (a *Agent) detach(j *Job) {
	j.pumps.Wait()
	if err := j.feed.forget(); err != nil {
		a.log.Warn("close a log", slog.String("job", j.id), slog.Any("error", err))
	}
	if j.holder != nil {
		if err := j.holder.Detach(); err != nil {
			a.log.Warn("let go of holder", "job", j.id, "error", err)
		}
	}
}

// giveBack ends the job's use of the node.
func (a *Agent) giveBack(j *Job) {
	a.mu.Lock()
	delete(a.live, j.id)
	a.remember(j)
	a.mu.Unlock()
	if j.placed {
		a.queue.leave(j.place)
	}
	a.warmUp()
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
		if err := a.ended[oldest].forget(); err != nil {
			a.log.Warn("close a log", slog.String("job", oldest), slog.Any("error", err))
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

// Load is what a node has and what it does.
type Load struct {
	Total, Free    Room
	GPUs, FreeGPUs int
	// Waiting jobs wait for approvals, for a retry's time or for room.
	Running, Waiting int
	Attested         Attested
}

// Load says how many jobs run and wait, and what is free.
func (a *Agent) Load() Load {
	l := Load{GPUs: len(a.uuids)}
	l.Total, l.Free, l.FreeGPUs = a.queue.look()
	l.Running = l.Total.Jobs - l.Free.Jobs
	a.mu.Lock()
	defer a.mu.Unlock()
	l.Waiting, l.Attested = max(0, len(a.live)-l.Running), a.newest
	return l
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
	errs = append(errs, a.removeEgress(j))
	errs = append(errs, sandbox.OpenCgroup(sandbox.JobCgroup(a.Cgroup, j.id)).Remove(), os.RemoveAll(j.runDir))
	if a.Cache != nil {
		errs = append(errs, a.Cache.Release(j.id))
	}
	return errors.Join(errs...)
}
