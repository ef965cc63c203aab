package runner

import (
	"fmt"
	"testing"
	"time"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/runner/egress/gate"
)

func exec(path, digest string) holdapi.Event {
	return holdapi.Event{Kind: "exec", Detail: path, Digest: digest}
}

func connectTo(at time.Time, address, process string) holdapi.Event {
	return holdapi.Event{Kind: "connect", UnixNano: at.UnixNano(), Detail: address, Process: process}
}

func TestWhoWasRefused(t *testing.T) {
	const proxy = "10.77.0.1:3128"
	now := time.Unix(1000, 0)
	before := func(d time.Duration) time.Time { return now.Add(-d) }
	for name, tt := range map[string]struct {
		trace           []holdapi.Event
		process, digest string
	}{
		"the only program":                 {[]holdapi.Event{exec("/usr/bin/curl", "sha256:1"), connectTo(before(time.Second), proxy, "curl")}, "curl", "sha256:1"},
		"the first one, without an exec":   {[]holdapi.Event{connectTo(before(time.Second), proxy, "python3")}, "python3", ""},
		"a long name":                      {[]holdapi.Event{exec("/usr/bin/a-program-with-a-long-name", "sha256:1"), connectTo(before(time.Second), proxy, "a-program-with-a-long-name")}, "a-program-with-a-long-name", "sha256:1"},
		"two programs of one name":         {[]holdapi.Event{exec("/usr/bin/curl", "sha256:1"), exec("/tmp/curl", "sha256:2"), connectTo(before(time.Second), proxy, "curl")}, "curl", ""},
		"one of two":                       {[]holdapi.Event{connectTo(before(time.Second), proxy, "curl"), connectTo(before(2*time.Second), proxy, "wget")}, "", ""},
		"one before, another one too long": {[]holdapi.Event{connectTo(before(time.Second), proxy, "curl"), connectTo(before(time.Minute), proxy, "wget")}, "curl", ""},
		"one that came after":              {[]holdapi.Event{connectTo(now.Add(time.Second), proxy, "curl")}, "", ""},
		"nobody":                           {nil, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			e := &jobEgress{programs: map[string]string{}}
			for _, ev := range tt.trace {
				if told := e.saw(ev, 10); told != nil {
					t.Errorf("a connection to the gateway is told as a refusal: %v", told)
				}
			}
			told := e.note(gate.Report{Sequence: 1, Denials: []gate.Denial{{Number: 0, FirstUnixNano: now.UnixNano(), Host: "x.example.com", Port: 443, Rule: gate.RuleNotListed, Count: 1}}})
			if len(told) != 1 || told[0].GetProcess() != tt.process || told[0].GetDigest() != tt.digest {
				t.Errorf("told %v, want %q %q", told, tt.process, tt.digest)
			}
		})
	}
}

func TestWhatDoesNotAskTheGatewayIsToldFromTheTrace(t *testing.T) {
	e := &jobEgress{programs: map[string]string{}}
	now := time.Unix(1000, 0)
	for _, quiet := range []string{"10.77.0.1:3128", "10.77.0.1:53", "127.0.0.1:8080", "[::1]:8080", `unix:"/run/coffer/regions.sock"`} {
		if told := e.saw(connectTo(now, quiet, "p"), 10); told != nil {
			t.Errorf("%s: told %v", quiet, told)
		}
	}
	var nobody *jobEgress
	if told := nobody.saw(connectTo(now, "44.1.0.2:443", "p"), 10); told != nil {
		t.Errorf("of a job without egress, told %v", told)
	}
	told := e.saw(connectTo(now, "44.1.0.2:443", "p"), 2)
	if told == nil || told.GetHost() != "44.1.0.2" || told.GetPort() != 443 || told.GetRule() != ruleDirect || told.GetProcess() != "p" {
		t.Fatalf("told %v", told)
	}
	// Events come when a count doubles, names up to the budget.
	events := 1
	for range 999 {
		if e.saw(connectTo(now, "44.1.0.2:443", "p"), 2) != nil {
			events++
		}
	}
	if events != 10 {
		t.Errorf("%d events for 1000 attempts, want 10", events)
	}
	for i := range 10 {
		e.saw(connectTo(now, fmt.Sprintf("44.1.0.3:%d", i+1), "p"), 2)
	}
	r := e.report(2, nil)
	if len(r.Denials) != 2 || r.Denials[0].Count != 1000 || r.Untold != 9 {
		t.Errorf("%d by name, %d more: %+v", len(r.Denials), r.Untold, r.Denials)
	}
	// Together with the gateway's they stay within it.
	e.note(gate.Report{Sequence: 1, Denials: []gate.Denial{{Number: 0, FirstUnixNano: 1, Host: "x.example.com", Rule: gate.RuleNotListed, Count: 5}}, Untold: 100})
	if r := e.report(2, nil); len(r.Denials) != 2 || r.Denials[0].Host != "x.example.com" || r.Untold != 110 {
		t.Errorf("%+v", r.Denials)
	}
}

func TestGatewayReportsAreTakenIn(t *testing.T) {
	e := &jobEgress{programs: map[string]string{}}
	open := gate.Connection{Number: 0, Host: "a.example.com", Port: 443, Sent: 10}
	if told := e.note(gate.Report{Sequence: 1, Connections: []gate.Connection{open}}); len(told) != 0 {
		t.Errorf("an open connection is told: %v", told)
	}
	open.Sent, open.End = 20, "closed"
	if told := e.note(gate.Report{Sequence: 2, Connections: []gate.Connection{open}}); len(told) != 1 || told[0].GetSent() != 20 || told[0].GetEnd() != "closed" {
		t.Errorf("told %v", told)
	}
	if told := e.note(gate.Report{Sequence: 2, Connections: []gate.Connection{open}}); len(told) != 0 {
		t.Errorf("told twice: %v", told)
	}
	// A number out of order is no gateway's.
	e.note(gate.Report{Sequence: 3, Connections: []gate.Connection{{Number: 7}, {Number: -1}}, Denials: []gate.Denial{{Number: 7}, {Number: -1}}})
	if r := e.report(10, nil); len(r.Connections) != 1 || len(r.Denials) != 0 {
		t.Errorf("%+v", r)
	}
	// What stands in a dead gateway's place changes nothing of the record.
	e.lost = true
	e.note(gate.Report{Sequence: 9, Connections: []gate.Connection{{Number: 0, Host: "b.example.com"}}})
	if r := e.report(10, nil); r.Connections[0].Host != "a.example.com" || !r.Lost {
		t.Errorf("%+v", r)
	}
}
