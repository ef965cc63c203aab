package runner

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/collect"
	"github.com/coffer-run/coffer/enclave/device"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/runner/alerts"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/egress"
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
	// maxLive bounds the jobs that have not ended. The last lastLive of them are for
	// submitters of whom each has less than fewLive.
	maxLive, lastLive, fewLive = 10_000, 1000, 100
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
