package hold

import (
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
)

// maxAsked bounds the release requests that one job signs.
const maxAsked = 1024

// lease says whether the job's keys may be used. The broker's word is signed and
// names a challenge that this process made; how long it holds is counted from when
// the challenge went out, on CLOCK_BOOTTIME, which no one sets and which goes on
// while the machine sleeps. Whose word counts, and for how long at most, stands in
// what each key was wrapped under (receipt.LeaseTerms), so no file and no agent
// chooses it.
//
// The zero value lets nothing be used.
type lease struct {
	job string
	// session is the digest of the session key's public half.
	session plan.Digest
	now     func() time.Duration
	// arm has expire called once the clock shows at.
	arm func(at time.Duration) error
	// stopping is told of the broker's word that the job must stop, over of the
	// lease's end. Each is called once, in a goroutine of its own.
	stopping, over func(holdapi.Lease)

	mu sync.Mutex
	// asked are the times at which release requests were signed.
	asked map[askedFor]time.Duration
	terms receipt.LeaseTerms
	keys  receipt.Keys
	plan  plan.Digest
	// until is when the lease ends, 0 while there is none.
	until time.Duration
	// challenge is that of the renewal under way, made at sent.
	challenge []byte
	sent      time.Duration
	// stop is the broker's reason why the job must stop, ended why keys may not be
	// used any more. Neither is taken back.
	stop  string
	ended error
}

// askedFor names one release.
type askedFor struct{ grant, asset, result string }

// bootTime is CLOCK_BOOTTIME.
func bootTime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		// Every lease has ended by then.
		return 1<<63 - 1
	}
	return time.Duration(t.Nano())
}

// ask notes when a release request was signed: the lease that comes with the key
// counts from then.
func (l *lease) ask(r receipt.ReleaseRequest) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.check(); err != nil && !errors.Is(err, errNoLease) {
		return err
	}
	k := askedFor{r.Grant, r.Asset, r.ResultID}
	if _, ok := l.asked[k]; ok {
		return nil
	}
	if len(l.asked) == maxAsked {
		return fail(holdapi.CodeFull, "more than %d release requests", maxAsked)
	}
	if l.asked == nil {
		l.asked = map[askedFor]time.Duration{}
	}
	l.asked[k] = l.now()
	return nil
}

// grant begins the lease under which a key was released, or joins it with the
// lease that the job has: the shorter one counts.
func (l *lease) grant(i wrapInfo, keys receipt.Keys) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	asked, ok := l.asked[askedFor{i.Grant, i.Asset, i.ResultID}]
	if !ok {
		return fail(holdapi.CodeRefused, "no release of %.80q was asked for", i.Asset)
	}
	if err := l.check(); err != nil && !errors.Is(err, errNoLease) {
		return err
	}
	if l.stop != "" {
		return fail(holdapi.CodeState, "the job must stop: %s", l.stop)
	}
	if l.until != 0 && (l.terms.Broker != i.Lease.Broker || l.terms.Key != i.Lease.Key) {
		return fail(holdapi.CodeRefused, "key of %.80q is under leases of another broker or key than the keys before it", i.Asset)
	}
	until := asked + time.Duration(i.Lease.Seconds)*time.Second
	if l.now() >= until {
		return fail(holdapi.CodeRefused, "key of %.80q came after its lease of %d s had ended", i.Asset, i.Lease.Seconds)
	}
	if l.until == 0 {
		l.terms, l.keys, l.plan, l.until = i.Lease, keys, i.Plan, until
	}
	l.terms.Seconds, l.until = min(l.terms.Seconds, i.Lease.Seconds), min(l.until, until)
	return l.arm(l.until)
}

// begin makes the challenge of a renewal. There is one renewal under way at most.
func (l *lease) begin() holdapi.Lease {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.check(); err == nil && l.stop == "" {
		l.challenge = make([]byte, receipt.ChallengeSize)
		_, _ = rand.Read(l.challenge) // it does not fail
		l.sent = l.now()
	}
	s := l.state()
	s.Challenge = l.challenge
	return s
}

// renew takes the broker's answer to the renewal under way.
func (l *lease) renew(token string) (holdapi.Lease, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.check(); err != nil {
		return holdapi.Lease{}, err
	}
	if l.challenge == nil {
		return holdapi.Lease{}, fail(holdapi.CodeState, "no renewal is under way")
	}
	got, err := receipt.VerifyLease(l.keys, token, l.job, l.plan, l.session, l.challenge)
	if err != nil {
		return holdapi.Lease{}, &apiError{holdapi.CodeRefused, err}
	}
	l.challenge = nil
	switch got.State {
	case receipt.LeaseRunning:
		// No longer than what the key was released under.
		l.until = l.sent + time.Duration(min(got.Seconds, l.terms.Seconds))*time.Second
	default:
		// The broker allows this much from its answer on, even where the lease
		// would have ended sooner.
		l.stop, l.until = got.Reason, l.sent+got.Grace()
		go l.stopping(l.state())
	}
	if err := l.arm(l.until); err != nil {
		return holdapi.Lease{}, err
	}
	return l.state(), nil
}

// use is called before every use of a key. An error means that the job has no
// lease at this moment; once it had one, it gets no other.
func (l *lease) use() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.check()
}

// expire is called when the timer rings.
func (l *lease) expire() { _ = l.use() }

// check is use with l.mu held. The clock is asked each time: a process that was
// paused may come here before its timers do.
func (l *lease) check() error {
	switch {
	case l.ended != nil:
		return l.ended
	case l.until == 0:
		return errNoLease
	case l.now() < l.until:
		return nil
	}
	if l.stop != "" {
		l.ended = fail(holdapi.CodeState, "the job was told to stop (%s) and its grace is over", l.stop)
	} else {
		l.ended = fail(holdapi.CodeState, "the job's lease has lapsed")
	}
	l.challenge = nil
	go l.over(l.state())
	return l.ended
}

var errNoLease error = &apiError{holdapi.CodeState, errors.New("the job has no lease")}

// look is state for others, after a look at the clock.
func (l *lease) look() holdapi.Lease {
	l.mu.Lock()
	defer l.mu.Unlock()
	_ = l.check()
	return l.state()
}

// state is called with l.mu held.
func (l *lease) state() holdapi.Lease {
	s := holdapi.Lease{State: holdapi.LeaseNone}
	if l.until == 0 {
		return s
	}
	s.State, s.Seconds, s.RemainingMillis = holdapi.LeaseRunning, l.terms.Seconds, max(0, (l.until-l.now()).Milliseconds())
	if l.stop != "" {
		s.State, s.Code, s.Reason = holdapi.LeaseStopping, holdapi.LeaseRevoked, l.stop
	}
	if l.ended != nil {
		s.State, s.RemainingMillis = holdapi.LeaseOver, 0
		if l.stop == "" {
			s.Code, s.Reason = holdapi.LeaseLapsed, fmt.Sprintf("no renewal for %d s", l.terms.Seconds)
		}
	}
	return s
}
