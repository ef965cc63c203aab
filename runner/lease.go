package runner

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/remote"
)

const (
	// renewEvery is how often leases are renewed, and so how long a revocation
	// takes to be heard. Each pause is up to renewJitter longer, so that nodes that
	// started together do not call together.
	renewEvery  = 1500 * time.Millisecond
	renewJitter = 300 * time.Millisecond
	// leaseTimeout is how long a holder may take to answer about its lease.
	leaseTimeout = time.Second
)

// leaseState is what the agent knows of one job's lease. The holder keeps the
// lease and ends it; the agent carries the broker's words to it, and tells the
// job to stop in time for the job to do so well.
type leaseState struct {
	mu sync.Mutex // guards what follows
	// held is set once a key came under a lease.
	held bool
	// paused: the job is frozen, and its lease not renewed.
	paused bool
	until  time.Time
	stop   *stopError
	told   time.Time // when the job was told to stop
	gone   time.Time // when its last process was seen to be gone
}

// stopError is the end of a job whose keys were taken back, or whose lease lapsed.
type stopError struct {
	// code is holdapi.LeaseRevoked, holdapi.LeaseLapsed or one of bundle's
	// ReasonReattest.
	code, reason string
	// checks are those of a refused attestation that failed.
	checks check.List
	// grace is how long the job may take to end.
	grace time.Duration
}

func (e *stopError) Error() string {
	if strings.HasPrefix(e.reason, e.code+": ") {
		return e.reason // the broker's reasons begin with a code
	}
	return e.code + ": " + e.reason
}

// stopOf turns a lease that is stopping or over into the end of its job, which may
// take longest for it at most.
func stopOf(l holdapi.Lease, longest time.Duration) *stopError {
	if l.State != holdapi.LeaseStopping && l.State != holdapi.LeaseOver {
		return nil
	}
	code := l.Code
	for _, c := range []string{bundle.ReasonReattestRefused, bundle.ReasonReattestLate} {
		if l.Code == holdapi.LeaseRevoked && strings.HasPrefix(l.Reason, c+": ") {
			code = c
		}
	}
	return &stopError{code: code, reason: l.Reason, grace: min(longest, time.Duration(l.RemainingMillis)*time.Millisecond)}
}

// release ends the renewals of a job that has ended: whatever becomes of its
// lease is not why.
func (s *leaseState) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held = false
}

// hold notes that the job has a key under a lease.
func (s *leaseState) hold() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held = true
}

// pause notes whether the job is frozen.
func (s *leaseState) pause(on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.paused = on
}

// renews says whether the lease is to be renewed.
func (s *leaseState) renews() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.held && !s.paused
}

// renewals renews the leases of all jobs until ctx ends, at once for jobs that
// were taken up.
func (a *Agent) renewals(ctx context.Context) {
	for away := false; ; {
		err := a.renewAll(ctx)
		if err != nil && !away && ctx.Err() == nil {
			a.log.WarnContext(ctx, "renew leases", slog.Any("error", err))
		}
		if err == nil && away {
			a.log.InfoContext(ctx, "leases are renewed again")
		}
		away = err != nil
		select {
		case <-ctx.Done():
			return
		case <-time.After(renewEvery + rand.N(renewJitter)): //nolint:gosec // a pause is no secret
		}
	}
}

// renewing is one job in a round of renewals.
type renewing struct {
	job   *Job
	asked time.Time
	lease holdapi.Lease
	err   error
}

// renewAll renews every lease once, with one call of the broker for all.
func (a *Agent) renewAll(ctx context.Context) error {
	a.mu.Lock()
	var round []*renewing
	for _, j := range a.live {
		if j.lease.renews() {
			round = append(round, &renewing{job: j})
		}
	}
	a.mu.Unlock()
	// A holder that does not answer keeps no other job waiting.
	each(round, func(r *renewing) {
		r.asked = time.Now()
		r.lease, r.err = r.job.askHolder(ctx, func(ctx context.Context, c *holdapi.Client) (holdapi.Lease, error) { return c.Lease(ctx) })
		a.heed(ctx, r)
	})
	var ask []remote.Renewal
	asking := map[string]*renewing{}
	for _, r := range round {
		if r.err == nil && len(r.lease.Challenge) > 0 {
			ask = append(ask, remote.Renewal{JobID: r.job.id, Challenge: r.lease.Challenge})
			asking[r.job.id] = r
		}
	}
	if len(ask) == 0 {
		return nil
	}
	leases, err := a.Broker.Renew(ctx, ask)
	var mu sync.Mutex
	var errs []error
	each(round, func(r *renewing) {
		if asking[r.job.id] == nil {
			return
		}
		lease, rerr := leases[r.job.id], err
		if rerr == nil {
			rerr = lease.Err
		}
		if rerr == nil {
			var renewed holdapi.Lease
			renewed, rerr = r.job.askHolder(ctx, func(ctx context.Context, c *holdapi.Client) (holdapi.Lease, error) {
				return c.RenewLease(ctx, lease.Token)
			})
			if rerr == nil {
				r.asked, r.lease = time.Now(), renewed
				a.heed(ctx, r)
				return
			}
		}
		mu.Lock()
		errs = append(errs, fmt.Errorf("job %s: %w", r.job.id, rerr))
		mu.Unlock()
		a.lapsing(ctx, r, rerr)
	})
	return errors.Join(errs...)
}

// each calls f for all of a round at once and waits.
func each(round []*renewing, f func(*renewing)) {
	var wg sync.WaitGroup
	for _, r := range round {
		wg.Go(func() { f(r) })
	}
	wg.Wait()
}

// askHolder has the job's holder answer on a connection of its own: the job's
// other one may be waiting for inputs to be decrypted.
func (j *Job) askHolder(ctx context.Context, f func(context.Context, *holdapi.Client) (holdapi.Lease, error)) (holdapi.Lease, error) {
	ctx, cancel := context.WithTimeout(ctx, leaseTimeout)
	defer cancel()
	c, err := holdapi.Dial(ctx, j.runDir)
	if err != nil {
		return holdapi.Lease{}, err
	}
	defer c.Close()
	return f(ctx, c)
}

// heed does what the holder says of the lease.
func (a *Agent) heed(ctx context.Context, r *renewing) {
	if r.err != nil {
		return
	}
	if stop := stopOf(r.lease, r.job.grace()); stop != nil {
		a.tellStop(ctx, r.job, stop)
		return
	}
	r.job.lease.mu.Lock()
	r.job.lease.until = r.asked.Add(time.Duration(r.lease.RemainingMillis) * time.Millisecond)
	r.job.lease.mu.Unlock()
}

// lapsing ends a job whose lease is about to lapse, early enough for it to make a
// last checkpoint while its keys can still be used.
func (a *Agent) lapsing(ctx context.Context, r *renewing, why error) {
	grace := min(r.job.grace(), time.Duration(r.lease.Seconds)*time.Second/4)
	left := time.Duration(r.lease.RemainingMillis)*time.Millisecond - time.Since(r.asked)
	if left > grace+renewEvery {
		return
	}
	a.tellStop(ctx, r.job, &stopError{code: holdapi.LeaseLapsed, reason: fmt.Sprintf("no renewal for %d s: %v", r.lease.Seconds, why), grace: min(grace, max(0, left))})
}

// tellStop ends a job, once.
func (a *Agent) tellStop(ctx context.Context, j *Job, stop *stopError) {
	j.lease.mu.Lock()
	first := j.lease.held && j.lease.stop == nil
	if first {
		j.lease.stop = stop
	}
	j.lease.mu.Unlock()
	if !first {
		return
	}
	a.log.WarnContext(ctx, "job must stop", slog.String("job", j.id), slog.String("code", stop.code), slog.String("reason", stop.reason), slog.Duration("grace", stop.grace))
	a.tell(ctx, j, &agentv1.WatchResponse{Event: &agentv1.WatchResponse_Lease{Lease: &agentv1.LeaseEvent{
		Code: stop.code, Reason: stop.reason, GraceMillis: stop.grace.Milliseconds(),
	}}})
	j.cancel(stop)
}

// ended replaces the error of a job that ended because its holder took its keys
// back: it shows as a killed container or as a stage that the holder refused.
func (j *Job) ended(ctx context.Context, err error) error {
	var stop *stopError
	if err == nil || j.holder == nil || errors.As(err, &stop) || errors.Is(err, errHolderLost) {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), askTimeout)
	defer cancel()
	// The connection may be one on which a call was given up.
	c, derr := holdapi.Dial(ctx, j.runDir)
	if derr != nil {
		return err
	}
	defer c.Close()
	st, serr := c.Status(ctx)
	if serr != nil || st.Lease.State != holdapi.LeaseOver {
		return err
	}
	stop = stopOf(st.Lease, j.grace())
	j.lease.mu.Lock()
	defer j.lease.mu.Unlock()
	j.lease.stop = stop
	return stop
}

// toldNow notes that the job is told to stop.
func (j *Job) toldNow() {
	j.lease.mu.Lock()
	defer j.lease.mu.Unlock()
	j.lease.told = time.Now()
}

// goneNow notes that the job's last process is gone.
func (j *Job) goneNow() {
	j.lease.mu.Lock()
	defer j.lease.mu.Unlock()
	if j.lease.gone.IsZero() {
		j.lease.gone = time.Now()
	}
}

// stopped is how the job's end went, for the evidence; nil for a job that ended
// for another reason than its lease. What the holder did by itself counts from its
// own events.
func (j *Job) stopped(reason string, trace []bundle.Event) *bundle.Stop {
	j.lease.mu.Lock()
	defer j.lease.mu.Unlock()
	if j.lease.stop == nil || j.lease.stop.code != reason {
		return nil
	}
	s := &bundle.Stop{By: j.lease.stop.reason, ToldUnixNano: unixNano(j.lease.told), GoneUnixNano: unixNano(j.lease.gone)}
	for _, e := range trace {
		switch e.Kind {
		case bundle.EventJobKilled:
			s.GoneUnixNano = e.UnixNano
		case bundle.EventScrubbed:
			s.ScrubbedUnixNano = e.UnixNano
		}
	}
	if s.GoneUnixNano != 0 && s.ToldUnixNano > s.GoneUnixNano {
		// Nobody was left to tell: an agent that comes back tells what its holder
		// may have killed while it was away.
		s.ToldUnixNano = 0
	}
	return s
}

func unixNano(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

// reportStopped tells the broker that a job is gone to which it released keys. s is how
// its end went if it was told to stop.
func (a *Agent) reportStopped(ctx context.Context, j *Job, reason string, s *bundle.Stop, trace []bundle.Event) {
	if len(j.record.Releases) == 0 {
		return
	}
	r := remote.Stopped{JobID: j.id, Reason: reason}
	if s != nil {
		r.Told, r.Gone, r.Scrubbed = s.ToldUnixNano, s.GoneUnixNano, s.ScrubbedUnixNano
	} else {
		j.lease.mu.Lock()
		r.Gone = unixNano(j.lease.gone)
		j.lease.mu.Unlock()
		for _, e := range trace {
			if e.Kind == bundle.EventScrubbed {
				r.Scrubbed = e.UnixNano
			}
		}
	}
	if err := a.Broker.ReportStopped(ctx, r); err != nil {
		// Its lease ends at the broker without this, too.
		a.log.WarnContext(ctx, "report the job's end", slog.String("job", j.id), slog.Any("error", err))
	}
}

// Lease says until when a running job has a lease, and why it must stop. Both are
// zero for a job without.
func (a *Agent) Lease(id string) (until time.Time, stopping string) {
	a.mu.Lock()
	j := a.live[id]
	a.mu.Unlock()
	if j == nil {
		return time.Time{}, ""
	}
	j.lease.mu.Lock()
	defer j.lease.mu.Unlock()
	if j.lease.stop != nil {
		stopping = j.lease.stop.Error()
	}
	return j.lease.until, stopping
}
