package server

import (
	"context"
	"time"

	"google.golang.org/protobuf/proto"

	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
)

// progressEvery is how often a watcher hears how far things are.
const progressEvery = time.Second

// progress is what one watcher was told of how far things are. A nil tick never comes.
type progress struct {
	of   func(context.Context) []*agentv1.Progress
	tick <-chan time.Time
	last *agentv1.ProgressEvent
}

// next returns what goes on, and nil if the watcher knows it.
func (p *progress) next(ctx context.Context) *agentv1.ProgressEvent {
	e := &agentv1.ProgressEvent{Going: p.of(ctx)}
	if proto.Equal(e, p.last) || p.last == nil && len(e.GetGoing()) == 0 {
		return nil
	}
	p.last = e
	return e
}
