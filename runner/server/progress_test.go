package server

import (
	"context"
	"testing"

	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
)

// A watcher hears what is new to it, and once that nothing goes on any more.
func TestProgressIsToldOnce(t *testing.T) {
	var now []*agentv1.Progress
	p := progress{of: func(context.Context) []*agentv1.Progress { return now }}
	at := func(bytes int64) []*agentv1.Progress {
		return []*agentv1.Progress{{What: "decrypt", Bytes: bytes, Total: 10}}
	}
	for i, row := range []struct {
		now  []*agentv1.Progress
		want int // things that go on, -1 for no event
	}{{nil, -1}, {at(1), 1}, {at(1), -1}, {at(2), 1}, {nil, 0}, {nil, -1}, {at(3), 1}} {
		now = row.now
		e := p.next(t.Context())
		if got := len(e.GetGoing()); (e == nil) != (row.want < 0) || e != nil && got != row.want {
			t.Errorf("%d: %v, want %d", i, e, row.want)
		}
	}
}
