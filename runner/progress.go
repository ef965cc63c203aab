package runner

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"time"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/image"
	"github.com/coffer-run/coffer/runner/jobspec"
	"github.com/coffer-run/coffer/runner/source/sink"
)

// What a Progress is of.
const (
	progressFetch   = "fetch"
	progressImage   = "image"
	progressDecrypt = "decrypt"
	progressSend    = "send"
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
	out := a.fetchingFor(j)
	if p := a.sending(j); p != nil {
		out = append(out, p)
	}
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

// pulling is an image on its way from its registry. It is written what the runtime takes
// of it.
type pulling struct {
	ref   string
	total int64
	got   atomic.Int64
}

func (p *pulling) Write(b []byte) (int, error) {
	p.got.Add(int64(len(b)))
	return len(b), nil
}

// hand hands the content of an image to take as it comes, and counts it meanwhile.
func (i *Images) hand(ref string, img *image.Image, take func(layout io.Reader) error) error {
	going := &pulling{ref: ref, total: img.Bytes}
	i.pulled.Store(going)
	defer i.pulled.Store(nil)
	r, w := io.Pipe()
	go func() {
		_, err := img.WriteTo(io.MultiWriter(w, going))
		_ = w.CloseWithError(err)
	}()
	err := take(r)
	// The writer ends even if nobody read to the end.
	_ = r.CloseWithError(errors.New("the import has ended"))
	return err
}

// Fetching says how far an image is on its way to this node; nil for one that is not. Who
// asks must know its reference: it may be of another's job.
func (a *Agent) Fetching(ref string) *agentv1.Progress {
	if a.Images == nil {
		return nil
	}
	p := a.Images.pulled.Load()
	if p == nil || p.ref != ref {
		return nil
	}
	// What the runtime takes has headers too.
	return &agentv1.Progress{What: progressImage, Name: p.ref, Bytes: min(p.got.Load(), p.total), Total: p.total}
}

// fetchingFor is the image of a job that an agent before this one took, and whose image is
// not there any more.
func (a *Agent) fetchingFor(j *Job) []*agentv1.Progress {
	if a.Images == nil || a.Images.pulled.Load() == nil {
		return nil
	}
	// The job's goroutine owns its spec.
	spec, err := jobspec.Parse(j.redacted)
	if err != nil {
		return nil
	}
	if p := a.Fetching(spec.Image); p != nil {
		return []*agentv1.Progress{p}
	}
	return nil
}

// sending is the checkpoint of a job that is on its way to an object store.
func (a *Agent) sending(j *Job) *agentv1.Progress {
	if a.Sinks == nil {
		return nil
	}
	s, ok := a.Sinks.Sending(j.id)
	if !ok {
		return nil
	}
	name := s.Folder
	if n, ok := sink.Sequence(name); ok {
		_, called, _ := strings.Cut(name, "-")
		name = fmt.Sprintf("#%d %s", n, called)
	}
	return &agentv1.Progress{What: progressSend, Name: name, Bytes: s.Bytes, Total: s.Total}
}
