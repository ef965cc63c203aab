package runner

import (
	"testing"

	"github.com/coffer-run/coffer/runner/egress/gate"
)

// A gateway that stands in the place of one that died knows of no connection. An
// agent that is restarted finds it, and must not take its silence for the record.
func TestRestartedAgentKnowsThatTheGatewayDied(t *testing.T) {
	e := &jobEgress{programs: map[string]string{}}
	e.note(gate.Report{Sequence: 1, Closed: gatewayLost})
	if r := e.report(10, nil); !r.Lost || r.Closed != gatewayLost {
		t.Errorf("recorded as complete: %+v", r)
	}
	e = &jobEgress{programs: map[string]string{}}
	e.note(gate.Report{Sequence: 1, Closed: "job-ended"})
	if r := e.report(10, nil); r.Lost {
		t.Errorf("recorded as lost: %+v", r)
	}
}
