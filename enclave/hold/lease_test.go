package hold

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
)

var (
	leasePlan    = plan.Sum([]byte("the plan"))
	leaseSession = plan.Sum([]byte("the session key"))
)

// leased is a lease on a clock of the test's own.
type leased struct {
	*lease
	t      *testing.T
	clock  time.Duration
	armed  time.Duration
	broker *receipt.Signer
	told   chan holdapi.Lease // the broker's word to stop
	ended  chan holdapi.Lease
}

func newSigner(t *testing.T, name string) *receipt.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := receipt.NewSigner(name, key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// newLease returns a lease that was never granted. Its alarm never rings: only
// the look at the clock at each use can end it.
func newLease(t *testing.T) *leased {
	t.Helper()
	l := &leased{t: t, clock: 1000 * time.Hour, broker: newSigner(t, "broker.test"), told: make(chan holdapi.Lease, 2), ended: make(chan holdapi.Lease, 2)}
	l.lease = &lease{
		job: "job-1", session: leaseSession, now: func() time.Duration { return l.clock }, arm: func(at time.Duration) error { l.armed = at; return nil },
		stopping: func(s holdapi.Lease) { l.told <- s }, over: func(s holdapi.Lease) { l.ended <- s },
	}
	return l
}

func (l *leased) request(asset string) receipt.ReleaseRequest {
	return receipt.ReleaseRequest{Version: receipt.RequestVersion, Broker: "broker.test", Grant: "g", Attempt: 1, ResultID: "r", Asset: asset}
}

// granted asks for a key and grants its lease in the same moment.
func (l *leased) granted(asset string, seconds int64) error {
	l.t.Helper()
	if err := l.ask(l.request(asset)); err != nil {
		return err
	}
	return l.under(asset, l.broker, l.broker.LeaseTerms(seconds))
}

func (l *leased) under(asset string, signer *receipt.Signer, terms receipt.LeaseTerms) error {
	l.t.Helper()
	jwks, err := signer.JWKS()
	if err != nil {
		l.t.Fatal(err)
	}
	keys, err := terms.Keys(jwks)
	if err != nil {
		l.t.Fatal(err)
	}
	return l.grant(wrapInfo{Grant: "g", Plan: leasePlan, Asset: asset, ResultID: "r", Lease: terms}, keys)
}

// word is the broker's answer to a challenge, changed as edit says.
func (l *leased) word(challenge []byte, edit func(*receipt.Lease)) string {
	l.t.Helper()
	c := receipt.Lease{IssuedAt: time.Now().Unix(), JobID: "job-1", Plan: leasePlan, Session: leaseSession, Challenge: challenge, State: receipt.LeaseRunning, Seconds: 60}
	if edit != nil {
		edit(&c)
	}
	token, err := receipt.SignLease(l.broker, c)
	if err != nil {
		l.t.Fatal(err)
	}
	return token
}

func (l *leased) remaining() time.Duration { return l.until - l.clock }

func TestLeaseCountsFromTheAsking(t *testing.T) {
	l := newLease(t)
	if err := l.use(); !errors.Is(err, errNoLease) {
		t.Errorf("a key could be used without a lease: %v", err)
	}
	if err := l.ask(l.request("a")); err != nil {
		t.Fatal(err)
	}
	l.clock += 20 * time.Second
	if err := l.under("a", l.broker, l.broker.LeaseTerms(60)); err != nil {
		t.Fatal(err)
	}
	if l.remaining() != 40*time.Second || l.armed != l.until {
		t.Errorf("the first lease lasts %s and the alarm is set to %s of %s", l.remaining(), l.armed, l.until)
	}
	// The answer to a renewal is as slow as its way is.
	s := l.begin()
	l.clock += 15 * time.Second
	got, err := l.renew(l.word(s.Challenge, nil))
	if err != nil {
		t.Fatal(err)
	}
	if l.remaining() != 45*time.Second || got.RemainingMillis != 45_000 || got.State != holdapi.LeaseRunning {
		t.Errorf("the renewed lease lasts %s: %+v", l.remaining(), got)
	}
	l.clock += 45*time.Second - 1
	if err := l.use(); err != nil {
		t.Error(err)
	}
	l.clock++
	if err := l.use(); err == nil {
		t.Error("a key could be used after the lease")
	}
	if s := <-l.ended; s.Code != holdapi.LeaseLapsed || s.State != holdapi.LeaseOver {
		t.Errorf("%+v", s)
	}
	if err := l.granted("b", 60); err == nil {
		t.Error("another key began a new lease")
	}
	if s := l.begin(); s.Challenge != nil || s.State != holdapi.LeaseOver {
		t.Errorf("a lease that is over is renewed: %+v", s)
	}
	if err := l.use(); err == nil {
		t.Error("a key could be used later")
	}
	select {
	case <-l.ended:
		t.Error("the lease ended twice")
	default:
	}
}

// A paused process comes back long after its lease: no timer has fired yet, and
// the first use is refused all the same.
func TestPausedPastTheLease(t *testing.T) {
	for _, first := range []struct {
		name string
		use  func(*leased) error
	}{
		{"use of a key", func(l *leased) error { return l.use() }},
		{"renewal that was under way", func(l *leased) error { _, err := l.renew(l.word(l.challenge, nil)); return err }},
		{"another key", func(l *leased) error { return l.under("b", l.broker, l.broker.LeaseTerms(60)) }},
		{"another release request", func(l *leased) error { return l.ask(l.request("c")) }},
	} {
		t.Run(first.name, func(t *testing.T) {
			l := newLease(t)
			for _, a := range []string{"b", "a"} {
				if err := l.ask(l.request(a)); err != nil {
					t.Fatal(err)
				}
			}
			if err := l.under("a", l.broker, l.broker.LeaseTerms(60)); err != nil {
				t.Fatal(err)
			}
			l.begin()
			l.clock += 24 * time.Hour
			if err := first.use(l); err == nil {
				t.Error("it was let through")
			}
			<-l.ended
		})
	}
}

// The wall clock is nowhere in a lease: the one time of day in it, when it was
// signed, may be any.
func TestWallClockHasNoEffect(t *testing.T) {
	for name, at := range map[string]int64{"in 1970": 0, "before 1970": -1 << 40, "a year ago": time.Now().AddDate(-1, 0, 0).Unix(), "in a year": time.Now().AddDate(1, 0, 0).Unix()} {
		t.Run(name, func(t *testing.T) {
			l := newLease(t)
			if err := l.granted("a", 60); err != nil {
				t.Fatal(err)
			}
			l.clock += 30 * time.Second
			if _, err := l.renew(l.word(l.begin().Challenge, func(c *receipt.Lease) { c.IssuedAt = at })); err != nil {
				t.Fatal(err)
			}
			if l.remaining() != time.Minute {
				t.Errorf("the lease lasts %s", l.remaining())
			}
			l.clock += time.Minute
			if err := l.use(); err == nil {
				t.Error("a key could be used after the lease")
			}
		})
	}
}

// Each is refused and leaves the lease as it was.
func TestLeasesThatAreNotTheJobs(t *testing.T) {
	for _, tt := range []struct {
		name, check string
		word        func(l *leased, challenge []byte) string
	}{
		{"of another job", "lease.job", func(l *leased, c []byte) string {
			return l.word(c, func(c *receipt.Lease) { c.JobID = "job-2" })
		}},
		{"of another plan", "lease.plan", func(l *leased, c []byte) string {
			return l.word(c, func(c *receipt.Lease) { c.Plan = plan.Sum([]byte("another")) })
		}},
		{"of another holder of the job", "lease.session", func(l *leased, c []byte) string {
			return l.word(c, func(c *receipt.Lease) { c.Session = plan.Sum([]byte("its session key")) })
		}},
		{"of no holder", "lease.session", func(l *leased, c []byte) string {
			return l.word(c, func(c *receipt.Lease) { c.Session = "" })
		}},
		{"of another challenge", "lease.challenge", func(l *leased, _ []byte) string {
			return l.word(make([]byte, receipt.ChallengeSize), nil)
		}},
		{"of the challenge before", "lease.challenge", func(l *leased, c []byte) string {
			old := l.word(c, nil)
			l.begin()
			return old
		}},
		{"of another broker", "lease.signature", func(l *leased, c []byte) string {
			l.broker = newSigner(l.t, "broker.other")
			return l.word(c, nil)
		}},
		{"under the broker's name by another key", "lease.signature", func(l *leased, c []byte) string {
			l.broker = newSigner(l.t, "broker.test")
			return l.word(c, nil)
		}},
		{"of another kind of token", "lease.signature", func(l *leased, c []byte) string {
			token, err := l.broker.Sign("release", receipt.Lease{Issuer: "broker.test", JobID: "job-1", Plan: leasePlan, Session: leaseSession, Challenge: c, State: receipt.LeaseRunning, Seconds: 60})
			if err != nil {
				l.t.Fatal(err)
			}
			return token
		}},
		{"of no time at all", "lease.form", func(l *leased, c []byte) string {
			token, err := l.broker.Sign(receipt.TypeLease, receipt.Lease{Issuer: "broker.test", JobID: "job-1", Plan: leasePlan, Session: leaseSession, Challenge: c, State: receipt.LeaseRunning})
			if err != nil {
				l.t.Fatal(err)
			}
			return token
		}},
		{"of so many seconds that they are few nanoseconds", "lease.form", func(l *leased, c []byte) string {
			token, err := l.broker.Sign(receipt.TypeLease, receipt.Lease{Issuer: "broker.test", JobID: "job-1", Plan: leasePlan, Session: leaseSession, Challenge: c, State: receipt.LeaseRunning, Seconds: 18446744080})
			if err != nil {
				l.t.Fatal(err)
			}
			return token
		}},
		{"of a grace of as many", "lease.form", func(l *leased, c []byte) string {
			token, err := l.broker.Sign(receipt.TypeLease, receipt.Lease{Issuer: "broker.test", JobID: "job-1", Plan: leasePlan, Session: leaseSession, Challenge: c, State: receipt.LeaseStop, GraceSeconds: 18446744080, Reason: "x"})
			if err != nil {
				l.t.Fatal(err)
			}
			return token
		}},
		{"cut off", "lease.signature", func(l *leased, c []byte) string { w := l.word(c, nil); return w[:len(w)-2] }},
		{"empty", "lease.signature", func(*leased, []byte) string { return "" }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := newLease(t)
			if err := l.granted("a", 60); err != nil {
				t.Fatal(err)
			}
			l.clock += 30 * time.Second
			_, err := l.renew(tt.word(l, l.begin().Challenge))
			if err == nil || !strings.Contains(err.Error(), tt.check) {
				t.Errorf("%v, want %s", err, tt.check)
			}
			if l.remaining() != 30*time.Second {
				t.Errorf("the lease lasts %s", l.remaining())
			}
		})
	}
}

func TestReplayedLease(t *testing.T) {
	l := newLease(t)
	if err := l.granted("a", 60); err != nil {
		t.Fatal(err)
	}
	old := l.word(l.begin().Challenge, nil)
	if _, err := l.renew(old); err != nil {
		t.Fatal(err)
	}
	l.clock += 50 * time.Second
	if _, err := l.renew(old); err == nil {
		t.Error("a lease was taken twice")
	}
	l.begin()
	if _, err := l.renew(old); err == nil {
		t.Error("an old lease was taken for a new challenge")
	}
	if l.remaining() != 10*time.Second {
		t.Errorf("the lease lasts %s", l.remaining())
	}
}

func TestLeaseIsNoLongerThanTheReleaseSaid(t *testing.T) {
	l := newLease(t)
	for asset, seconds := range map[string]int64{"a": 60, "b": 20, "c": 40} {
		if err := l.granted(asset, seconds); err != nil {
			t.Fatal(err)
		}
	}
	if l.remaining() != 20*time.Second {
		t.Errorf("of several leases the shortest counts, not %s", l.remaining())
	}
	if _, err := l.renew(l.word(l.begin().Challenge, func(c *receipt.Lease) { c.Seconds = 3600 })); err != nil {
		t.Fatal(err)
	}
	if l.remaining() != 20*time.Second {
		t.Errorf("the lease lasts %s", l.remaining())
	}
	if _, err := l.renew(l.word(l.begin().Challenge, func(c *receipt.Lease) { c.Seconds = 5 })); err != nil {
		t.Fatal(err)
	}
	if l.remaining() != 5*time.Second {
		t.Errorf("a shorter lease lasts %s", l.remaining())
	}
}

func TestKeysUnderOtherLeases(t *testing.T) {
	l := newLease(t)
	l.clock = time.Second // a machine that just started
	if err := l.under("a", l.broker, l.broker.LeaseTerms(60)); err == nil {
		t.Error("a key that nobody asked for began a lease")
	}
	if err := l.granted("a", 60); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"broker.test", "broker.other"} {
		other := newSigner(t, name)
		if err := l.ask(l.request("b")); err != nil {
			t.Fatal(err)
		}
		if err := l.under("b", other, other.LeaseTerms(60)); err == nil {
			t.Errorf("a key under the leases of another key of %s was taken", name)
		}
	}
	// Asked for long ago, and kept back.
	l.clock += 50 * time.Second
	if _, err := l.renew(l.word(l.begin().Challenge, nil)); err != nil {
		t.Fatal(err)
	}
	l.clock += 20 * time.Second
	if err := l.under("b", l.broker, l.broker.LeaseTerms(60)); err == nil {
		t.Error("a key was taken after its lease")
	}
	for i := range maxAsked {
		if err := l.ask(l.request(fmt.Sprint("x", i))); err != nil {
			return
		}
	}
	t.Error("release requests have no bound")
}

// stopWord is the broker's word that the job must stop.
func stopWord(grace int64) func(*receipt.Lease) {
	return func(c *receipt.Lease) {
		c.State, c.Seconds, c.GraceSeconds, c.Reason = receipt.LeaseStop, 0, grace, "grant: its owner took it back"
	}
}

func TestStopHasItsGraceAndNoWayBack(t *testing.T) {
	l := newLease(t)
	if err := l.granted("a", 60); err != nil {
		t.Fatal(err)
	}
	got, err := l.renew(l.word(l.begin().Challenge, stopWord(10)))
	if err != nil {
		t.Fatal(err)
	}
	if got.State != holdapi.LeaseStopping || got.Code != holdapi.LeaseRevoked || got.Reason != "grant: its owner took it back" || got.RemainingMillis != 10_000 {
		t.Errorf("%+v", got)
	}
	if s := <-l.told; s.Reason != got.Reason {
		t.Errorf("%+v", s)
	}
	if err := l.use(); err != nil {
		t.Errorf("a last checkpoint is not possible: %v", err)
	}
	// Whoever says "running" afterwards, with whatever challenge, is not heard.
	if s := l.begin(); s.Challenge != nil {
		t.Errorf("a job that must stop renews: %+v", s)
	}
	if _, err := l.renew(l.word(make([]byte, receipt.ChallengeSize), nil)); err == nil {
		t.Error("a job that must stop got a lease")
	}
	if err := l.granted("b", 60); err == nil {
		t.Error("a job that must stop got a key")
	}
	l.clock += 10 * time.Second
	if err := l.use(); err == nil {
		t.Error("a key could be used after the grace")
	}
	if s := <-l.ended; s.Code != holdapi.LeaseRevoked || s.Reason != got.Reason {
		t.Errorf("%+v", s)
	}
}

func TestStopWithoutGrace(t *testing.T) {
	l := newLease(t)
	if err := l.granted("a", 60); err != nil {
		t.Fatal(err)
	}
	if _, err := l.renew(l.word(l.begin().Challenge, stopWord(0))); err != nil {
		t.Fatal(err)
	}
	if err := l.use(); err == nil {
		t.Error("a key could be used")
	}
}

// The real clock and timer.
func TestAlarmRings(t *testing.T) {
	rang := make(chan time.Duration, 1)
	a, err := newAlarm(func() { rang <- bootTime() })
	if err != nil {
		t.Fatal(err)
	}
	defer a.close()
	began := bootTime()
	if err := a.set(began + time.Hour); err != nil {
		t.Fatal(err)
	}
	if err := a.set(began + 50*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if at := <-rang; at < began+50*time.Millisecond || at > began+time.Minute {
		t.Errorf("it rang after %s", at-began)
	}
	if err := a.set(began); err != nil {
		t.Fatal(err)
	}
	<-rang // a time that has passed
}

// procsOf writes a list as the kernel does.
func procsOf(t *testing.T, pids ...int) *os.File {
	t.Helper()
	var b strings.Builder
	for _, p := range pids {
		fmt.Fprintln(&b, p)
	}
	path := filepath.Join(t.TempDir(), "procs")
	if err := os.WriteFile(path, []byte(b.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func TestKillGroupSparesItself(t *testing.T) {
	in, out := exec.Command("sleep", "60"), exec.Command("sleep", "60")
	for _, c := range []*exec.Cmd{in, out} {
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			_ = c.Process.Kill()
			_ = c.Wait()
		}()
	}
	procs := procsOf(t, os.Getpid(), in.Process.Pid)
	ended := make(chan error, 1)
	go func() { ended <- in.Wait() }()
	killed := make(chan error, 1)
	go func() { killed <- killGroup(t.Context(), procs) }()
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Fatal("the process in the group lives")
	}
	if err := os.Truncate(procs.Name(), 0); err != nil {
		t.Fatal(err)
	}
	if err := <-killed; err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", out.Process.Pid)); err != nil {
		t.Errorf("a process outside the group is gone: %v", err)
	}
}

func TestKillGroupRefusesWhatIsNoList(t *testing.T) {
	path := filepath.Join(t.TempDir(), "procs")
	for _, s := range []string{"0\n", "-1\n", "x\n", "1 2\n"} {
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := killGroup(t.Context(), f); err == nil {
			t.Errorf("%q was taken for a list of processes", s)
		}
		_ = f.Close()
	}
}
