package runner

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/collect"
	"github.com/coffer-run/coffer/enclave/device"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/holder"
	"github.com/coffer-run/coffer/runner/sandbox"
)

const (
	// reattestTry is the pause before an attestation that found nobody is tried again,
	// and before a paused job's next one.
	reattestTry = 2 * time.Second
	// reattestLook is how often the job's devices are asked whether something happened
	// to them.
	reattestLook = 5 * time.Second
	// rulesAge is how old the node's knowledge of the verifier's rules may be.
	rulesAge = 10 * time.Second
	// collectTries is how often evidence with a failed source is collected again
	// before the verifier is shown it as it is.
	collectTries = 3
	// leaseMargin is how long before its lease ends a paused job is stopped.
	leaseMargin = 5 * time.Second
	// reattestEntry is where the journal has the record of the later attestations.
	reattestEntry = "reattest"
	// causeTimer is the cause of an attestation that was due.
	causeTimer = "timer"
)

// reattestRule says when a running job attests again.
type reattestRule struct {
	// every is the time between two attestations, maxAge how old a result may become,
	// counted from when its attestation began. Zero is never.
	every, maxAge time.Duration
	// pause is how long a job is frozen whose attestation failed; zero stops it.
	pause time.Duration
}

// reattestRule joins what the plan asks for with what the releases do.
func (j *Job) reattestRule() reattestRule {
	var r reattestRule
	if p := j.plan.Reattest; p != nil {
		r.every, r.maxAge = time.Duration(p.EverySeconds)*time.Second, time.Duration(p.MaxAge())*time.Second
		if p.Pauses() {
			r.pause = time.Duration(p.Within()) * time.Second
			if lease := time.Duration(j.record.LeaseSeconds) * time.Second; lease > 0 {
				r.pause = min(r.pause, max(lease-leaseMargin, lease/2))
			}
		}
	}
	if age := time.Duration(j.record.ResultSeconds) * time.Second; age > 0 {
		if r.maxAge == 0 || age < r.maxAge {
			r.maxAge = age
		}
		if r.every == 0 || age/2 < r.every {
			r.every = age / 2
		}
	}
	return r
}

// attested is one try to attest.
type attestedTry struct {
	evidence []byte
	token    string
	// result is the token's, the zero value if there is no genuine one.
	result receipt.Result
	// err is why the verifier does not affirm, or why it could not be asked.
	err error
}

// attester attests for one running job. Its functions are the agent's; it decides
// when, and what becomes of the job.
type attester struct {
	rule reattestRule
	// began is when the newest attestation that affirmed began, and issued when the
	// verifier issued its result.
	began  time.Time
	issued int64
	number int
	// paused is since when the job is frozen, zero if it is not.
	paused time.Time
	grace  time.Duration
	// looking has what changed says next, while it is asked.
	looking chan string

	try func(ctx context.Context, n int) attestedTry
	// show has the broker take a result.
	show func(ctx context.Context, token string) error
	// changed says what happened to the machine since it was asked last, if anything
	// that only evidence can judge.
	changed func(ctx context.Context) string
	// freeze stops the job's processes, or lets them go on.
	freeze func(ctx context.Context, on bool) error
	// note records an attestation.
	note func(ctx context.Context, a bundle.Reattestation)
}

// run attests until ctx ends, or until the job must stop: then it says why.
func (t *attester) run(ctx context.Context) *stopError {
	for {
		cause := t.wait(ctx)
		if cause == "" {
			return nil
		}
		if stop := t.attest(ctx, cause); stop != nil {
			return stop
		}
	}
}

// wait waits for the next cause to attest; none is the end of ctx.
func (t *attester) wait(ctx context.Context) string {
	in := time.Until(t.began.Add(t.rule.every))
	if !t.paused.IsZero() {
		in = reattestTry
	}
	timer := time.NewTimer(max(in, 0))
	defer timer.Stop()
	look := time.NewTicker(reattestLook)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return ""
		case <-timer.C:
			return causeTimer
		case <-look.C:
			// A driver that does not answer holds up no timer.
			if t.looking == nil {
				said := make(chan string, 1)
				go func() { said <- t.changed(ctx) }()
				t.looking = said
			}
		case cause := <-t.looking:
			if t.looking = nil; cause != "" {
				return cause
			}
		}
	}
}

// errNoAnswer is of a device or a service that did not answer while there was time.
var errNoAnswer = errors.New("no answer in time")

// answered calls f for as long as ctx lasts, also where f does not heed it: a device
// that hangs, or a network that the host cuts, decides nothing about a job.
func answered[T any](ctx context.Context, late T, f func(context.Context) T) T {
	if ctx.Err() != nil {
		return late
	}
	out := make(chan T, 1)
	go func() { out <- f(ctx) }()
	select {
	case v := <-out:
		return v
	case <-ctx.Done():
		return late
	}
}

// shown has the broker take a result until ctx ends.
func (t *attester) shown(ctx context.Context, token string) error {
	return answered(ctx, errNoAnswer, func(ctx context.Context) error { return t.show(ctx, token) })
}

// attest attests once, with as many tries as there is time for.
func (t *attester) attest(ctx context.Context, cause string) *stopError {
	deadline := t.began.Add(t.rule.maxAge)
	if !t.paused.IsZero() {
		deadline = t.paused.Add(t.rule.pause)
	}
	inTime, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	start := time.Now()
	t.number++
	a := bundle.Reattestation{Number: t.number, Cause: cause, StartUnixNano: start.UnixNano()}
	var got attestedTry
	began := start
	for {
		a.Tries++
		n := a.Tries
		began = time.Now()
		got = answered(inTime, attestedTry{err: errNoAnswer}, func(ctx context.Context) attestedTry { return t.try(ctx, n) })
		if ctx.Err() == nil && got.err == nil {
			got.err = t.shown(inTime, got.token)
			a.Shown = got.err == nil
		}
		if ctx.Err() != nil {
			return nil
		}
		var refused *check.Refusal
		if got.err == nil || errors.As(got.err, &refused) || !time.Now().Add(reattestTry).Before(deadline) {
			break
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(reattestTry):
		}
	}
	stop := t.judge(ctx, &a, got, began)
	a.Nanos = time.Since(start).Nanoseconds()
	t.note(ctx, a)
	return stop
}

// judge says what becomes of the job after an attestation.
func (t *attester) judge(ctx context.Context, a *bundle.Reattestation, got attestedTry, began time.Time) *stopError {
	a.Verdict, a.Then = bundle.ReattestNone, bundle.ReattestStopped
	if got.err != nil {
		a.Message = clipped(got.err.Error())
	}
	refusedFor := receipt.RefusedFor(got.result)
	if got.result.ID != "" {
		a.Result, a.Evidence = got.token, got.evidence
		a.ResultDigest, a.EvidenceDigest = plan.Sum([]byte(got.token)), plan.Sum(got.evidence)
		if a.Verdict = bundle.ReattestAffirmed; refusedFor != "" {
			a.Verdict, a.Failed = bundle.ReattestRefused, failedIDs(got.result.AllChecks())
		}
	}
	if got.err == nil {
		if !t.paused.IsZero() {
			if err := t.freeze(ctx, false); err != nil {
				a.Message = clipped(err.Error())
				return &stopError{code: bundle.ReasonReattestLate, reason: "the paused job does not go on: " + a.Message}
			}
			a.Then = bundle.ReattestResumed
		} else {
			a.Then = bundle.ReattestGoesOn
		}
		t.began, t.issued, t.paused = began, got.result.IssuedAt, time.Time{}
		return nil
	}
	if a.Verdict == bundle.ReattestRefused {
		// The broker takes the lease by the verifier's word. Without it, the age does.
		soon, cancel := context.WithTimeout(ctx, reattestTry)
		defer cancel()
		if err := t.shown(soon, got.token); err != nil {
			a.Message = clipped(a.Message + "; " + err.Error())
		} else {
			a.Shown = true
		}
	}
	if t.mayPause(a.Verdict) {
		err := error(nil)
		if t.paused.IsZero() {
			err = t.freeze(ctx, true)
		}
		if err == nil {
			if a.Then = bundle.ReattestPaused; t.paused.IsZero() {
				t.paused = time.Now()
			}
			return nil
		}
		a.Message = clipped(a.Message + "; " + err.Error())
	}
	var refusal *check.Refusal
	switch {
	case a.Verdict == bundle.ReattestRefused:
		// The machine is not what it was: it gets no time with the keys.
		return &stopError{code: bundle.ReasonReattestRefused, reason: receipt.RefusedReason(got.result), checks: got.result.AllChecks().Failed()}
	case errors.As(got.err, &refusal):
		return &stopError{code: bundle.ReasonReattestLate, reason: "no result that counts: " + a.Message, grace: t.grace, checks: refusal.Checks.Failed()}
	default:
		return &stopError{code: bundle.ReasonReattestLate, reason: receipt.LateReason(t.issued, int64(t.rule.maxAge/time.Second)), grace: t.grace}
	}
}

// mayPause says whether a job whose attestation failed is frozen for a while more.
func (t *attester) mayPause(verdict string) bool {
	switch {
	case t.rule.pause == 0:
		return false
	case t.paused.IsZero():
		return verdict == bundle.ReattestRefused
	}
	return time.Now().Add(reattestTry).Before(t.paused.Add(t.rule.pause))
}

// failedIDs are the ids of the failed checks, each once, sorted.
func failedIDs(l check.List) []string {
	var out []string
	for _, c := range l.Failed() {
		out = append(out, c.ID)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// maxReattestMessage bounds what a record says of a failure, in bytes.
const maxReattestMessage = 400

func clipped(s string) string { return strings.ToValidUTF8(s[:min(len(s), maxReattestMessage)], "?") }

// reattesting is what others see of a job's later attestations.
type reattesting struct {
	mu     sync.Mutex // guards what follows
	record bundle.Reattestations
	// newest is when the newest attestation that affirmed began, next when the next
	// one is due, zero for a job that attests once.
	newest, next time.Time
	paused       bool
}

// keepAttested has a running job attest as its plan and the owners of its keys ask.
// The function that it returns ends that, and says why the job must stop, if it
// must.
func (a *Agent) keepAttested(ctx context.Context, j *Job, h *holder.Holder, box *sandbox.Sandbox) func() *stopError {
	rule := j.reattestRule()
	if rule.every == 0 {
		return func() *stopError { return nil }
	}
	ctx, cancel := context.WithCancel(ctx)
	t := &attester{rule: rule, grace: j.grace()}
	a.whereAttested(j, t)
	devices, rules := a.deviceLook(j), rulesLook(a.Verifier.Rules)
	t.try = func(ctx context.Context, n int) attestedTry { return a.tryAttest(ctx, j, h, n) }
	t.show = func(ctx context.Context, token string) error {
		if len(j.record.Releases) == 0 {
			return nil // the broker knows nothing of a job without keys
		}
		return a.Broker.Reattest(ctx, j.id, token)
	}
	t.changed = func(ctx context.Context) string { return cmp.Or(devices(ctx), rules(ctx)) }
	t.freeze = func(ctx context.Context, on bool) error {
		// While it is frozen nobody asks for its lease.
		if on {
			j.lease.pause(true)
		}
		if err := box.Freeze(ctx, on); err != nil {
			return err
		}
		if !on {
			j.lease.pause(false)
		}
		return nil
	}
	t.note = func(ctx context.Context, r bundle.Reattestation) { a.noteReattest(ctx, j, t, r) }
	j.reattest.show(t)
	out := make(chan *stopError, 1)
	go func() {
		stop := t.run(ctx)
		if stop != nil {
			a.tellReattest(ctx, j, stop)
		}
		out <- stop
	}()
	return func() *stopError {
		cancel()
		return <-out
	}
}

// whereAttested sets t to where the job stands by its record.
func (a *Agent) whereAttested(j *Job, t *attester) {
	issued := func(token string, began time.Time) {
		t.began, t.issued = began, began.Unix()
		if r, err := a.Verifier.Result(token); err == nil {
			t.issued = r.IssuedAt
		}
	}
	began := time.Now()
	for _, s := range j.timeline {
		if s.Stage == bundle.StageCollect {
			began = time.Unix(0, s.StartUnixNano)
		}
	}
	issued(j.record.Result, began)
	j.reattest.mu.Lock()
	defer j.reattest.mu.Unlock()
	for _, r := range j.reattest.record.List {
		t.number = max(t.number, r.Number)
		switch {
		case r.Then == bundle.ReattestPaused && t.paused.IsZero():
			t.paused = time.Unix(0, r.StartUnixNano)
		case r.Then == bundle.ReattestGoesOn || r.Then == bundle.ReattestResumed:
			issued(r.Result, time.Unix(0, r.StartUnixNano))
			t.paused = time.Time{}
		}
	}
	if !t.paused.IsZero() {
		j.lease.pause(true)
	}
}

// show tells others where t stands.
func (r *reattesting) show(t *attester) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.newest, r.next, r.paused = t.began, t.began.Add(t.rule.every), !t.paused.IsZero()
}

// noteReattest records an attestation: for the bundle, for an agent that takes the
// job up, and for who watches.
func (a *Agent) noteReattest(ctx context.Context, j *Job, t *attester, r bundle.Reattestation) {
	ctx = context.WithoutCancel(ctx)
	j.reattest.mu.Lock()
	j.reattest.record.Add(r)
	kept := bundle.Reattestations{List: slices.Clone(j.reattest.record.List), Omitted: j.reattest.record.Omitted}
	j.reattest.mu.Unlock()
	j.reattest.show(t)
	if err := a.Journal.Keep(ctx, j.id, reattestEntry, kept); err != nil {
		a.log.ErrorContext(ctx, "record an attestation", slog.String("job", j.id), slog.Any("error", err))
	}
	a.log.InfoContext(ctx, "attested again", slog.String("job", j.id), slog.Int("number", r.Number), slog.String("cause", r.Cause), slog.String("verdict", r.Verdict), slog.String("then", r.Then))
	a.tell(ctx, j, &agentv1.WatchResponse{Event: &agentv1.WatchResponse_Reattest{Reattest: &agentv1.ReattestEvent{
		Number: int32(r.Number), Cause: r.Cause, Verdict: r.Verdict, Then: r.Then, DurationNanos: r.Nanos, Failed: r.Failed, Message: r.Message, //nolint:gosec // it counts from 1
	}}})
}

// tryAttest collects evidence for the job's keys and has it judged.
func (a *Agent) tryAttest(ctx context.Context, j *Job, h *holder.Holder, n int) attestedTry {
	env, err := a.gatherEvidence(ctx, j, h)
	if err != nil {
		return attestedTry{err: err}
	}
	if len(env.Failures) > 0 && n < collectTries {
		return attestedTry{err: fmt.Errorf("collect evidence: %s: %s", env.Failures[0].Source, env.Failures[0].Message)}
	}
	b, err := plan.Canonical(env)
	if err != nil {
		return attestedTry{err: fmt.Errorf("encode evidence: %w", err)}
	}
	v, token, err := a.Verifier.Appraise(ctx, b, receipt.Expect{Audience: a.Broker.ID(), JobID: j.id, Plan: j.digest, AllowSimulated: true})
	out := attestedTry{evidence: b, token: token, err: err}
	if err == nil {
		out.result = v.Result()
		a.attestedBy(v)
	} else if token != "" {
		if r, oerr := a.Verifier.Result(token); oerr == nil && receipt.RefusedFor(r) != "" {
			out.result = r
		}
	}
	return out
}

// gatherEvidence collects evidence of the job's machine and keys under a fresh nonce.
func (a *Agent) gatherEvidence(ctx context.Context, j *Job, h *holder.Holder) (*evidence.Envelope, error) {
	credential, err := a.AKCredential(ctx)
	if err != nil {
		return nil, fmt.Errorf("enrol attestation key: %w", err)
	}
	nonce, err := a.Verifier.Challenge(ctx)
	if err != nil {
		return nil, err
	}
	return a.Collector.Collect(ctx, collect.Request{
		VerifierID: a.Verifier.ID(), Nonce: nonce, JobID: j.id, Plan: j.canonical, Sandbox: j.record.Sandbox,
		RecipientKey: h.Hello.RecipientKey, SessionKey: h.Hello.SessionKey, AKCredential: credential,
		Want: collect.Want{TPM: true, SNP: true, GPUs: j.place.got},
	})
}

// deviceLook returns what says how the job's GPUs differ from what they were at the
// job's begin: the driver is not ready any more after a reset or a reload. A
// difference is told once.
func (a *Agent) deviceLook(j *Job) func(context.Context) string {
	if j.gpus == nil || j.gpus.Launch == nil {
		return func(context.Context) string { return "" }
	}
	at := *j.gpus.Launch
	// A driver that was loaded while no agent was there is one of which there is no
	// evidence.
	if env, err := evidence.Parse(j.record.Evidence); err == nil && len(env.GPUs) > 0 {
		at.Driver = env.GPUs[0].DriverVersion
	}
	last := ""
	return func(ctx context.Context) string {
		now, err := a.GPUs.State(ctx, j.place.got)
		found := ""
		if err != nil {
			found = "gpu: " + clipped(err.Error())
		} else {
			found = device.Differs(at, now)
		}
		if found == last {
			return ""
		}
		last = found
		return found
	}
}

// rulesLook returns what says that the verifier holds evidence against other policies or
// reference values than when it was asked before.
func rulesLook(rules func(context.Context, time.Duration) string) func(context.Context) string {
	last := ""
	return func(ctx context.Context) string {
		now := rules(ctx, rulesAge)
		was := last
		if now != "" {
			last = now
		}
		if was == "" || now == "" || now == was {
			return ""
		}
		return "policy: the verifier has other policies or reference values"
	}
}

// tellReattest ends a job for its attestation, also one without keys.
func (a *Agent) tellReattest(ctx context.Context, j *Job, stop *stopError) {
	j.lease.mu.Lock()
	first := j.lease.stop == nil
	if first {
		j.lease.stop = stop
	}
	j.lease.mu.Unlock()
	if !first {
		return
	}
	ctx = context.WithoutCancel(ctx)
	a.log.WarnContext(ctx, "job must stop", slog.String("job", j.id), slog.String("code", stop.code), slog.String("reason", stop.reason))
	a.tell(ctx, j, &agentv1.WatchResponse{Event: &agentv1.WatchResponse_Lease{Lease: &agentv1.LeaseEvent{
		Code: stop.code, Reason: stop.reason, GraceMillis: stop.grace.Milliseconds(),
	}}})
	j.cancel(stop)
}

// addReattest adds the record of the later attestations to a bundle.
func (j *Job) addReattest(b *bundle.Builder) error {
	if j.reattestRule().every == 0 || !slices.ContainsFunc(j.timeline, func(s bundle.Step) bool { return s.Stage == bundle.StageStart && s.Outcome == bundle.StepDone }) {
		return nil
	}
	j.reattest.mu.Lock()
	defer j.reattest.mu.Unlock()
	r := j.reattest.record
	if r.List == nil {
		r.List = []bundle.Reattestation{}
	}
	return b.AddJSON(bundle.ReattestPart, r)
}

// Attested says when a running job attested last and when it will again, and
// whether it is paused. Times are zero for a job that attests once.
func (a *Agent) Attested(id string) (newest, next time.Time, paused bool) {
	a.mu.Lock()
	j := a.live[id]
	a.mu.Unlock()
	if j == nil {
		return time.Time{}, time.Time{}, false
	}
	j.reattest.mu.Lock()
	defer j.reattest.mu.Unlock()
	return j.reattest.newest, j.reattest.next, j.reattest.paused
}
