package main

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coffer-run/coffer/internal/stack"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/api/agent/v1/agentv1connect"
	"github.com/coffer-run/coffer/runner/jobspec"
)

// rateOver is over how many of the newest samples a rate is taken.
const rateOver = 5

// maxLeft is up to how long what is left may take for it to be said.
const maxLeft = 100 * time.Hour

// Where there is no live view, what goes on is told in lines: from when it has gone on
// for sayAfter, each after sayEvery.
const (
	sayAfter = 2 * time.Second
	sayEvery = 10 * time.Second
)

// transfers are what goes on of what takes long.
type transfers []going

// going is a transfer or decryption that goes on, with its newest samples.
type going struct {
	what, name  string
	total       int64
	samples     []sample
	began, said time.Time
}

type sample struct {
	at    time.Time
	bytes int64
}

// take takes what goes on. What is not in the list is over.
func (t *transfers) take(list []*agentv1.Progress, at time.Time) {
	var next transfers
	for _, p := range list {
		g := going{what: p.GetWhat(), name: p.GetName(), began: at}
		if i := slices.IndexFunc(*t, func(have going) bool { return have.what == g.what && have.name == g.name }); i >= 0 {
			g = (*t)[i]
		}
		g.total = p.GetTotal()
		g.samples = append(g.samples, sample{at, p.GetBytes()})
		g.samples = g.samples[max(len(g.samples)-rateOver, 0):]
		next = append(next, g)
	}
	*t = next
}

// due returns the lines that are to be said at a time.
func (t transfers) due(at time.Time) (out []string) {
	for i := range t {
		if g := &t[i]; at.Sub(g.began) >= sayAfter && at.Sub(g.said) >= sayEvery {
			g.said = at
			out = append(out, g.line())
		}
	}
	return out
}

// line says how far it is, and how fast once there are two samples.
func (g going) line() string {
	last, first := g.samples[len(g.samples)-1], g.samples[0]
	doing := map[string]string{"fetch": "fetching", "image": "fetching image", "decrypt": "decrypting", "send": "sending checkpoint"}[g.what]
	name := clean(g.name)
	if g.what == "image" {
		// Without registry and digest, which fill a line.
		name, _, _ = strings.Cut(path.Base(name), "@")
		if last.bytes >= g.total {
			return "unpacking image " + name
		}
	}
	s := fmt.Sprintf("%s: %s of %s", strings.TrimSpace(doing+" "+name), stack.Bytes(last.bytes), stack.Bytes(g.total))
	took := last.at.Sub(first.at).Seconds()
	if took <= 0 || last.bytes < first.bytes {
		return s
	}
	rate := float64(last.bytes-first.bytes) / took
	s += fmt.Sprintf(", %s/s", stack.Bytes(int64(rate)))
	if left := float64(g.total - last.bytes); left > 0 && left < rate*maxLeft.Seconds() {
		s += fmt.Sprintf(", %s left", (time.Duration(left / rate * float64(time.Second))).Round(time.Second))
	}
	return s
}

// goingView is something that takes long, in JSON output.
type goingView struct {
	What  string `json:"what"`
	Name  string `json:"name,omitempty"`
	Bytes int64  `json:"bytes"`
	Total int64  `json:"total"`
}

func viewGoing(list []*agentv1.Progress) (out []goingView) {
	for _, p := range list {
		out = append(out, goingView{p.GetWhat(), p.GetName(), p.GetBytes(), p.GetTotal()})
	}
	return out
}

// askEvery is how often a node is asked how far an image is.
const askEvery = time.Second

// whileFetching calls f, which may wait for the image of a job file, and says on the
// side how far the node is with that.
func (c *cli) whileFetching(ctx context.Context, a agentv1connect.AgentServiceClient, file []byte, f func() error) error {
	spec, err := jobspec.Parse(file)
	if err != nil || spec.Image == "" {
		return f() // the node says what is wrong with it
	}
	ctx, stop := context.WithCancel(ctx)
	var asking sync.WaitGroup
	asking.Go(func() {
		show := &progress{w: c.stderr}
		defer show.end()
		var t transfers
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(askEvery):
			}
			res, err := a.Capacity(ctx, connectRequest(&agentv1.CapacityRequest{Image: spec.Image}))
			if err != nil || res.Msg.GetImage() == nil {
				t = nil // what f says counts
				continue
			}
			t.take([]*agentv1.Progress{res.Msg.GetImage()}, time.Now())
			if terminal(c.stderr) {
				show.print(t[0].line())
				continue
			}
			for _, line := range t.due(time.Now()) {
				show.print(line)
			}
		}
	})
	err = f()
	stop()
	asking.Wait()
	return err
}
