package runner

import (
	"context"
	"time"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
)

// What a Progress is of.
const (
	progressFetch   = "fetch"
	progressDecrypt = "decrypt"
)

// progressWait bounds how long a holder may take to say how far it is.
const progressWait = 500 * time.Millisecond

// Progress says how far a job's transfers and decryption are, of those that go on.
func (a *Agent) Progress(ctx context.Context, id string) []*agentv1.Progress {
	a.mu.Lock()
	j := a.live[id]
	a.mu.Unlock()
	if j == nil {
		return nil
	}
	var out []*agentv1.Progress
	if a.Cache != nil {
		for _, in := range j.plan.Inputs {
			if got, total, ok := a.Cache.Progress(in.Digest); ok {
				out = append(out, &agentv1.Progress{What: progressFetch, Name: in.Name, Bytes: got, Total: total})
			}
		}
	}
	h := j.opening.Load()
	if h == nil {
		return out
	}
	ctx, cancel := context.WithTimeout(ctx, progressWait)
	defer cancel()
	s, err := h.Status(ctx)
	p, over := decrypting(s, err)
	if over {
		j.opening.Store(nil)
	}
	if p != nil {
		out = append(out, p)
	}
	return out
}

// decrypting reads a holder's status: nil where decryption has not begun, or is over.
func decrypting(s holdapi.Status, err error) (p *agentv1.Progress, over bool) {
	switch {
	case err != nil || s.Opened == nil:
		return nil, false
	case s.Opened.Bytes >= s.Opened.Total:
		return nil, true
	}
	return &agentv1.Progress{What: progressDecrypt, Bytes: s.Opened.Bytes, Total: s.Opened.Total}, false
}
