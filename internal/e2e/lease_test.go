package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/api/broker/v1/brokerv1connect"
	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/stack"
)

const (
	// shortLease is a lease in seconds that a test can wait out, and longLease one in
	// which a busy machine brings back an agent.
	shortLease, longLease = 6, 30
	// reaction is how long the end of a job may take that is to stop, from the
	// command to the last process gone, without the grace that the job has.
	reaction = 5 * time.Second
)

// owner is a client of the broker in the owner's name.
func (n *node) owner(t *testing.T) brokerv1connect.BrokerServiceClient {
	t.Helper()
	ep, err := stack.OpenEndpoint(n.dir)
	if err != nil {
		t.Fatal(err)
	}
	c, err := ep.HTTPClient(daemon.RoleOwner, daemon.RoleBroker)
	if err != nil {
		t.Fatal(err)
	}
	return brokerv1connect.NewBrokerServiceClient(c, ep.Broker())
}

const (
	// trains is the command of the example's job.
	trains = "[/usr/bin/python3, /app/train.py]"
	// staysOn makes a last checkpoint when it is told to stop, and does not stop.
	staysOn = `[/usr/bin/python3, -c, "import os, signal, time\ndef told(*_):\n    open('/checkpoints/last.tmp', 'w').write('the last')\n    os.rename('/checkpoints/last.tmp', '/checkpoints/last')\nsignal.signal(signal.SIGTERM, told)\nwhile True:\n    time.sleep(0.05)"]`
)

// leased submits a long job under a lease of so many seconds, and returns its id and
// grant.
func (n *node) leased(t *testing.T, name, command string, seconds time.Duration) (id, grant string) {
	t.Helper()
	b := n.owner(t)
	asset := fmt.Sprintf("ckpt-%ds", seconds)
	_, err := b.GetAsset(t.Context(), connect.NewRequest(&brokerv1.GetAssetRequest{Name: asset}))
	if connect.CodeOf(err) == connect.CodeNotFound {
		// The command signs the policy in the owner's name.
		n.must(t, "assets", "create", asset, "--kind", "checkpoints", "--lease", (seconds * time.Second).String())
	} else if err != nil {
		t.Fatal(err)
	}
	job := n.jobFile(t, name, func(s string) string {
		return strings.NewReplacer(trains, command, "asset: ckpt\n", "asset: "+asset+"\n", `EPOCHS: "1"`, `EPOCHS: "500"`, "maxDuration: 30m", "maxDuration: 10m").Replace(s)
	})
	res, err := b.CreateGrant(t.Context(), connect.NewRequest(&brokerv1.CreateGrantRequest{
		Assets: []string{"data", "model", asset}, PlanDigest: n.planDigest(t, job), NotBeforeUnix: time.Now().Add(-time.Minute).Unix(),
		NotAfterUnix: time.Now().Add(time.Hour).Unix(), MaxReleases: 1, AllowSimulated: true,
	}))
	if err != nil {
		t.Fatal(err)
	}
	n.must(t, "grant", "approve", res.Msg.GetGrant().GetId(), "--consent")
	id = n.submit(t, job)
	if s := n.wait(t, id, "running", running); s.Stage != "run" {
		t.Fatalf("%+v", s)
	}
	return id, res.Msg.GetGrant().GetId()
}

func (n *node) revoke(t *testing.T, grant string) {
	t.Helper()
	res, err := n.owner(t).Revoke(t.Context(), connect.NewRequest(&brokerv1.RevokeRequest{Kind: brokerv1.RevocationKind_REVOCATION_KIND_GRANT, Value: grant, Reason: "licence ended"}))
	if err != nil {
		t.Fatal(err)
	}
	if len(res.Msg.GetJobs()) != 1 {
		t.Errorf("the broker tells jobs %v to stop, want one", res.Msg.GetJobs())
	}
}

// procs counts the processes in a job's control group, which has the runtime, the
// job and its holder.
func (n *node) procs(t *testing.T, id string) int {
	t.Helper()
	for _, root := range []string{"/sys/fs/cgroup/pids", "/sys/fs/cgroup"} {
		b, err := os.ReadFile(filepath.Join(root, n.layout.Cgroup(), strings.ToLower(id), "cgroup.procs"))
		// The group goes while it is read.
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		return len(strings.Fields(string(b)))
	}
	return 0
}

// gone waits until no process of the job but its holder is left, and returns when
// that was.
func (n *node) gone(t *testing.T, id string, limit time.Duration) time.Time {
	t.Helper()
	for deadline := time.Now().Add(limit); ; time.Sleep(5 * time.Millisecond) {
		if n.procs(t, id) <= 1 {
			return time.Now()
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %s, %d processes of job %s are there", limit, n.procs(t, id), id)
		}
	}
}

// stopOf verifies a job's bundle and returns what it says of the job's stop, and
// what the verification says.
func (n *node) stopOf(t *testing.T, id string) (bundle.Outcome, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "bundle.json")
	n.must(t, "evidence", "get", id, "-o", path)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	out, err := n.verify(t, b, true)
	if err != nil {
		t.Errorf("the bundle does not verify: %v\n%s", err, out)
	}
	parsed, err := bundle.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	st, err := bundle.ParseStatement(parsed.Statement)
	if err != nil {
		t.Fatal(err)
	}
	if st.Outcome.Stop == nil || st.Outcome.Stop.GoneUnixNano == 0 || st.Outcome.Stop.ScrubbedUnixNano < st.Outcome.Stop.GoneUnixNano {
		t.Fatalf("the evidence does not say how it was stopped: %+v", st.Outcome)
	}
	status, err := bundle.Decode[bundle.Status](parsed.Parts[bundle.HolderStatus])
	if err != nil || !status.Scrubbed || status.RegionBytes != 0 {
		t.Errorf("the holder's last words: %+v %v", status, err)
	}
	return st.Outcome, out
}

// TestRevokedWhileItRuns takes a grant back in the middle of a job that uses all
// the time it has.
func TestRevokedWhileItRuns(t *testing.T) {
	n := need(t)
	id, grant := n.leased(t, "revoked", staysOn, shortLease)
	time.Sleep(2 * shortLease * time.Second / 3)
	if s := n.status(t, id); s.State != "running" {
		t.Fatalf("%+v", s)
	}
	began := time.Now()
	n.revoke(t, grant)
	gone := n.gone(t, id, time.Minute)
	s := n.wait(t, id, "ended", ended)
	if s.State != "failed" || s.Reason != "revoked" || !strings.Contains(s.Message, "licence ended") {
		t.Errorf("%+v", s)
	}
	o, out := n.stopOf(t, id)
	if sealed, err := filepath.Glob(filepath.Join(n.sink, id, "*-last")); err != nil || len(sealed) != 1 {
		t.Errorf("sealed when it was told to stop: %v %v", sealed, err)
	}
	told := time.Unix(0, o.Stop.ToldUnixNano)
	grace := min(gone.Sub(told), 5*time.Second)
	t.Logf("revoked: told to stop %s after the command, gone %s after it, of which %s grace; scrubbed %s after that",
		told.Sub(began).Round(time.Millisecond), gone.Sub(began).Round(time.Millisecond), grace.Round(time.Millisecond),
		time.Unix(0, o.Stop.ScrubbedUnixNano).Sub(gone).Round(time.Millisecond))
	if told.Before(began) || gone.Sub(began)-grace > reaction {
		t.Errorf("gone after %s with %s grace, want at most %s without the grace", gone.Sub(began), grace, reaction)
	}
	if o.Reason != bundle.ReasonRevoked || !strings.Contains(o.Stop.By, "licence ended") || !strings.Contains(out, "licence ended") {
		t.Errorf("%+v\n%s", o, out)
	}
}

// TestBrokerAwayLongerThanTheLease kills the broker: the job ends with its lease.
func TestBrokerAwayLongerThanTheLease(t *testing.T) {
	n := need(t)
	id, _ := n.leased(t, "broker-away", trains, shortLease)
	time.Sleep(2 * time.Second)
	began := time.Now()
	kill(t, n.pid(t, "coffer-broker"))
	defer func() { n.must(t, "restart") }()
	gone := n.gone(t, id, time.Minute)
	t.Logf("a lease of %d s, broker killed: gone after %s", shortLease, gone.Sub(began).Round(time.Millisecond))
	if took := gone.Sub(began); took > shortLease*time.Second+reaction {
		t.Errorf("gone after %s", took)
	}
	n.must(t, "restart")
	s := n.wait(t, id, "ended", ended)
	if s.State != "failed" || s.Reason != "lease-lapsed" {
		t.Errorf("%+v", s)
	}
	if o, _ := n.stopOf(t, id); o.Reason != bundle.ReasonLapsed {
		t.Errorf("%+v", o)
	}
}

// TestAgentKilledAndRevoked leaves nobody who could hear of the revocation: the
// holder ends the job by itself, and the agent that comes back finds out why.
func TestAgentKilledAndRevoked(t *testing.T) {
	n := need(t)
	id, grant := n.leased(t, "agent-away", trains, shortLease)
	began := time.Now()
	kill(t, n.pid(t, "cofferd"))
	defer func() { n.must(t, "restart") }()
	n.revoke(t, grant)
	input := filepath.Join(n.layout.Jobs(), id, "inputs")
	if _, err := os.Stat(input); err != nil {
		t.Errorf("the job's inputs are gone already: %v", err)
	}
	gone := n.gone(t, id, time.Minute)
	t.Logf("a lease of %d s, agent killed, grant revoked: gone after %s", shortLease, gone.Sub(began).Round(time.Millisecond))
	if took := gone.Sub(began); took > shortLease*time.Second+reaction {
		t.Errorf("gone after %s", took)
	}
	n.holderPid(t, id) // it lives, to sign the evidence
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(input); errors.Is(err, fs.ErrNotExist) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the job's inputs are still there")
		}
	}
	n.must(t, "restart")
	s := n.wait(t, id, "ended", ended)
	if s.State != "failed" || s.Reason != "lease-lapsed" {
		t.Errorf("%+v", s)
	}
	o, _ := n.stopOf(t, id)
	if o.Reason != bundle.ReasonLapsed || o.Stop.ToldUnixNano != 0 || time.Unix(0, o.Stop.GoneUnixNano).Sub(gone).Abs() > reaction {
		t.Errorf("%+v, %+v; gone at %s", o, o.Stop, gone)
	}
}

// TestAdoptedJobKeepsItsLease kills the agent for less than the lease.
func TestAdoptedJobKeepsItsLease(t *testing.T) {
	n := need(t)
	id, _ := n.leased(t, "adopted", trains, longLease)
	began := time.Now()
	kill(t, n.pid(t, "cofferd"))
	n.must(t, "restart")
	away := time.Since(began).Round(time.Millisecond)
	renewed := func(s status) bool {
		return ended(s) || time.Unix(n.job(t, id).GetLeaseUntilUnix(), 0).After(began.Add((longLease+2)*time.Second))
	}
	if s := n.wait(t, id, "renewed", renewed); s.State != "running" {
		t.Fatalf("the agent was away for %s: %+v", away, s)
	}
	t.Logf("a lease of %d s, agent away for %s: the job goes on", longLease, away)
	n.must(t, "cancel", id)
	if s := n.wait(t, id, "ended", ended); s.Reason != "cancelled" {
		t.Errorf("%+v", s)
	}
}
