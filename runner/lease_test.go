package runner

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/api/broker/v1/brokerv1connect"
	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/runner/journal"
	"github.com/coffer-run/coffer/runner/remote"
)

// toldBroker answers renewals as a test says. It signs nothing: that a lease is
// the broker's is for the holder to see.
type toldBroker struct {
	brokerv1connect.UnimplementedBrokerServiceHandler
	mu    sync.Mutex
	calls [][]string // jobs of each call
	away  bool
	word  map[string]*brokerv1.Renewed // by job; a lease if there is none
}

func (b *toldBroker) Renew(_ context.Context, r *connect.Request[brokerv1.RenewRequest]) (*connect.Response[brokerv1.RenewResponse], error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var jobs []string
	out := &brokerv1.RenewResponse{}
	for _, n := range r.Msg.GetRenewals() {
		jobs = append(jobs, n.GetJobId())
		w := b.word[n.GetJobId()]
		if w == nil {
			w = &brokerv1.Renewed{JobId: n.GetJobId(), Lease: "running"}
		}
		out.Renewed = append(out.Renewed, w)
	}
	b.calls = append(b.calls, jobs)
	if b.away {
		return nil, connect.NewError(connect.CodeUnavailable, errors.New("away"))
	}
	return connect.NewResponse(out), nil
}

// saysHolder answers on a job's socket with a lease that a test sets. A renewal
// with "stop" makes it stop.
type saysHolder struct {
	mu    sync.Mutex
	lease holdapi.Lease
	stuck bool
}

func (h *saysHolder) set(l holdapi.Lease) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lease = l
}

func (h *saysHolder) stick(on bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stuck = on
}

func (h *saysHolder) serve(c net.Conn) {
	defer c.Close()
	buf := make([]byte, holdapi.MaxMessage)
	for {
		n, err := c.Read(buf)
		if err != nil || n == 0 {
			return
		}
		var q holdapi.Request
		if json.Unmarshal(buf[:n], &q) != nil {
			return
		}
		h.mu.Lock()
		l, stuck := h.lease, h.stuck
		h.mu.Unlock()
		if stuck {
			continue
		}
		res := holdapi.Response{Lease: &l}
		switch q.Op {
		case holdapi.OpStatus:
			res = holdapi.Response{Status: &holdapi.Status{Lease: l}}
		case holdapi.OpRenew:
			l.Challenge = nil
			if q.Renew.Lease == "stop" {
				l = holdapi.Lease{State: holdapi.LeaseStopping, Code: holdapi.LeaseRevoked, Reason: "grant: taken back", RemainingMillis: 10_000}
			}
			if q.Renew.Lease == "forged" {
				res = holdapi.Response{Error: "not the broker's", Code: holdapi.CodeRefused}
			}
		}
		b, err := json.Marshal(res)
		if err != nil {
			return
		}
		if _, err := c.Write(b); err != nil {
			return
		}
	}
}

type rig struct {
	*Agent
	broker  *toldBroker
	holders map[string]*saysHolder
	stopped map[string]func() error // why a job's context ended
}

func newRig(t *testing.T, jobs ...string) *rig {
	t.Helper()
	broker := &toldBroker{word: map[string]*brokerv1.Renewed{}}
	mux := http.NewServeMux()
	mux.Handle(brokerv1connect.NewBrokerServiceHandler(broker))
	srv := httptest.NewServer(mux)
	t.Cleanup(srv.Close)
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := receipt.NewSigner("broker.test", key)
	if err != nil {
		t.Fatal(err)
	}
	jwks, err := signer.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	client, err := remote.NewBroker(remote.Service{URL: srv.URL, ID: "broker.test", HTTP: srv.Client(), JWKS: jwks})
	if err != nil {
		t.Fatal(err)
	}
	jnl, err := journal.Open(filepath.Join(t.TempDir(), "journal.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = jnl.Close() })
	log := slog.New(slog.DiscardHandler)
	r := &rig{
		Agent: &Agent{Deps: Deps{Broker: client, Journal: jnl, Log: log}, log: log, live: map[string]*Job{}}, broker: broker,
		holders: map[string]*saysHolder{}, stopped: map[string]func() error{},
	}
	for _, id := range jobs {
		j := newJob(id, "engineer/e")
		j.runDir, j.feed = t.TempDir(), newFeed(id, jnl)
		if _, _, err := jnl.Submit(t.Context(), journal.Job{ID: id, Name: id, Submitted: time.Now(), State: journal.Queued, Stage: "admit", JobFile: []byte{}, Plan: []byte{}}); err != nil {
			t.Fatal(err)
		}
		var ctx context.Context
		ctx, j.cancel = context.WithCancelCause(t.Context())
		r.stopped[id] = func() error { return context.Cause(ctx) }
		j.lease.hold()
		h := &saysHolder{lease: leaseOf(60)}
		l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: filepath.Join(j.runDir, holdapi.SocketName), Net: "unixpacket"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go h.serve(c)
			}
		}()
		r.live[id], r.holders[id] = j, h
	}
	return r
}

// leaseOf is a running lease of 60 s that has so many left.
func leaseOf(left int64) holdapi.Lease {
	return holdapi.Lease{State: holdapi.LeaseRunning, Seconds: 60, RemainingMillis: left * 1000, Challenge: make([]byte, receipt.ChallengeSize)}
}

// code is the reason with which a job was ended, empty if it was not.
func (r *rig) code(id string) string {
	var stop *stopError
	if errors.As(r.stopped[id](), &stop) {
		return stop.code
	}
	return ""
}

func TestOneCallRenewsAllJobs(t *testing.T) {
	r := newRig(t, "a", "b", "c")
	r.live["c"].lease.held = false // nothing was released to it
	if err := r.renewAll(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(r.broker.calls) != 1 || len(r.broker.calls[0]) != 2 {
		t.Errorf("calls %v, want one for a and b", r.broker.calls)
	}
	until, stopping := r.Lease("a")
	if left := time.Until(until); left < 55*time.Second || left > time.Minute || stopping != "" {
		t.Errorf("the lease of a ends in %s, stopping %q", left, stopping)
	}
	if until, _ := r.Lease("c"); !until.IsZero() {
		t.Errorf("c has a lease until %s", until)
	}
}

func TestRevokedJobIsTold(t *testing.T) {
	r := newRig(t, "a", "b")
	r.broker.word["a"] = &brokerv1.Renewed{JobId: "a", Lease: "stop"}
	for range 2 {
		if err := r.renewAll(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if r.code("a") != "revoked" || r.code("b") != "" {
		t.Errorf("ended for %q and %q", r.code("a"), r.code("b"))
	}
	if _, stopping := r.Lease("a"); stopping != "revoked: grant: taken back" {
		t.Errorf("stopping %q", stopping)
	}
	events, _, _ := r.live["a"].feed.after(0)
	if len(events) != 1 || events[0].GetLease().GetCode() != "revoked" || events[0].GetLease().GetGraceMillis() != r.live["a"].grace().Milliseconds() {
		t.Errorf("events %v", events)
	}
	// The holder has the job's own grace, the agent waits for no more than its own.
	var stop *stopError
	if !errors.As(r.stopped["a"](), &stop) || stop.grace != r.live["a"].grace() {
		t.Errorf("%+v", stop)
	}
	if out := r.outcome(t.Context(), r.live["a"], stop); out.Reason != "revoked" || out.State != journal.Failed || !strings.Contains(out.Message, "grant: taken back") {
		t.Errorf("%+v", out)
	}
}

func TestBrokerAway(t *testing.T) {
	r := newRig(t, "fresh", "ending")
	r.holders["ending"].set(leaseOf(6))
	r.broker.away = true
	if err := r.renewAll(t.Context()); err == nil {
		t.Error("a broker that is away is no error")
	}
	if r.code("fresh") != "" {
		t.Error("a job with time left was ended at the first call that failed")
	}
	if r.code("ending") != "lease-lapsed" {
		t.Errorf("ended for %q", r.code("ending"))
	}
}

func TestNoLeaseForAJob(t *testing.T) {
	for name, word := range map[string]*brokerv1.Renewed{
		"refused":     {JobId: "a", Refused: "lease.missing: nothing was released to this job"},
		"says naught": {JobId: "a"},
		"another job": {JobId: "z", Lease: "running"},
		"forged":      {JobId: "a", Lease: "forged"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, "a", "b")
			r.holders["a"].set(leaseOf(30))
			r.broker.word["a"] = word
			if err := r.renewAll(t.Context()); err == nil {
				t.Error("no error")
			}
			if r.code("a") != "" || r.code("b") != "" {
				t.Error("ended while its lease lasts")
			}
			r.holders["a"].set(leaseOf(3))
			_ = r.renewAll(t.Context())
			if r.code("a") != "lease-lapsed" || r.code("b") != "" {
				t.Errorf("ended for %q and %q", r.code("a"), r.code("b"))
			}
		})
	}
}

// A holder that has taken its keys back ends its job, whatever the broker says.
func TestHolderSaysOver(t *testing.T) {
	r := newRig(t, "a")
	r.holders["a"].set(holdapi.Lease{State: holdapi.LeaseOver, Code: holdapi.LeaseLapsed, Reason: "no renewal for 60 s"})
	if err := r.renewAll(t.Context()); err != nil {
		t.Fatal(err)
	}
	if r.code("a") != "lease-lapsed" || len(r.broker.calls) != 0 {
		t.Errorf("ended for %q after %d calls", r.code("a"), len(r.broker.calls))
	}
}

func TestStuckHolderKeepsNoOtherWaiting(t *testing.T) {
	r := newRig(t, "stuck", "b")
	r.holders["stuck"].stick(true)
	began := time.Now()
	if err := r.renewAll(t.Context()); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > leaseTimeout+8*time.Second {
		t.Errorf("a round took %s", took)
	}
	if until, _ := r.Lease("b"); time.Until(until) < 50*time.Second {
		t.Error("b was not renewed")
	}
	// It comes back.
	r.holders["stuck"].stick(false)
	if err := r.renewAll(t.Context()); err != nil {
		t.Fatal(err)
	}
	if until, _ := r.Lease("stuck"); time.Until(until) < 50*time.Second {
		t.Error("a holder that came back was not renewed")
	}
}

// A job that ends by itself, or is cancelled, while its lease lapses did not end
// for that.
func TestLeaseOfAJobThatHasEnded(t *testing.T) {
	r := newRig(t, "ended", "cancelled")
	r.broker.away = true
	for id, h := range r.holders {
		h.set(leaseOf(1))
		if id == "ended" {
			r.live[id].lease.release()
		}
	}
	r.live["cancelled"].cancel(errCancelled)
	_ = r.renewAll(t.Context())
	r.tellStop(t.Context(), r.live["ended"], &stopError{code: "lease-lapsed", reason: "a round that was under way"})
	if _, stopping := r.Lease("ended"); stopping != "" || r.code("ended") != "" {
		t.Errorf("stopping %q", stopping)
	}
	if cause := r.stopped["cancelled"](); !errors.Is(cause, errCancelled) {
		t.Errorf("cancelled for %v", cause)
	}
	if s := r.live["cancelled"].stopped("cancelled", nil); s != nil {
		t.Errorf("the evidence of a cancelled job says %+v", s)
	}
}

func TestStopInEvidence(t *testing.T) {
	j := newJob("a", "engineer/e")
	trace := []bundle.Event{{Kind: bundle.EventJobKilled, UnixNano: 7}, {Kind: bundle.EventScrubbed, UnixNano: 8}}
	if s := j.stopped("", trace); s != nil {
		t.Errorf("a job that was not stopped: %+v", s)
	}
	j.lease.stop = &stopError{code: "lease-lapsed", reason: "no renewal for 60 s"}
	if s := j.stopped("lease-lapsed", trace); s == nil || *s != (bundle.Stop{By: "no renewal for 60 s", GoneUnixNano: 7, ScrubbedUnixNano: 8}) {
		t.Errorf("%+v", s)
	}
	j.toldNow()
	j.goneNow()
	if s := j.stopped("lease-lapsed", trace); s.ToldUnixNano != 0 || s.GoneUnixNano != 7 {
		t.Errorf("told after the holder had killed it: %+v", s)
	}
	if s := j.stopped("lease-lapsed", trace[1:]); s.ToldUnixNano == 0 || s.GoneUnixNano < s.ToldUnixNano {
		t.Errorf("%+v", s)
	}
}
