package gate

import (
	"net"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
)

// A job whose network is closed before it is stopped must not put that off by
// asking again and again: each connection may take headTimeout for its request.
func TestCloseDoesNotWaitForWhatComesAfterIt(t *testing.T) {
	g := newGate(t, Config{Destinations: []plan.Egress{dest(good)}, MaxBytes: 10, BytesPerSecond: 1, Events: 10})
	before, after := pipeEnd(t), pipeEnd(t)
	if !g.ledger.enter(before) {
		t.Fatal("no room for the first connection")
	}
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		g.Close("revoked")
	}()
	<-g.ctx.Done() // the connection that is there has been cut
	if !g.ledger.enter(after) {
		t.Fatal("no room for the second connection")
	}
	select {
	case <-closed:
		t.Fatal("closed while a connection of before was there")
	case <-time.After(20 * time.Millisecond):
	}
	g.ledger.leave(before)
	select {
	case <-closed:
	case <-time.After(time.Minute):
		t.Error("closing waits for a connection that came after it")
	}
	if rule := g.permitted(good, 443); rule != RuleClosed {
		t.Errorf("what comes after the close is answered with %q", rule)
	}
}

// A connection beyond those that are recorded is refused before it is made: what
// the destination would see of it is in no record.
func TestNothingIsDialledBeyondTheRecord(t *testing.T) {
	g := newGate(t, Config{Destinations: []plan.Egress{dest(good)}, MaxBytes: 10, BytesPerSecond: 1, Events: 10})
	g.ledger.tunnels = make([]*tunnel, MaxConnections-1)
	if rule := g.permitted(good, 443); rule != "" {
		t.Errorf("the last connection is refused: %s", rule)
	}
	g.ledger.tunnels = append(g.ledger.tunnels, nil)
	if rule := g.permitted(good, 443); rule != RuleConnections {
		t.Errorf("rule %q", rule)
	}
	g.ledger.tunnels = nil
}

func pipeEnd(t *testing.T) net.Conn {
	t.Helper()
	a, b := net.Pipe()
	t.Cleanup(func() { _, _ = a.Close(), b.Close() })
	return a
}
