package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/coffer-run/coffer/internal/stack"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
)

// rateOver is over how many of the newest samples a rate is taken.
const rateOver = 5

// maxLeft is up to how long what is left may take for it to be said.
const maxLeft = 100 * time.Hour

// going is a transfer or decryption that goes on, with its newest samples.
type going struct {
	what, name string
	total      int64
	samples    []sample
}

type sample struct {
	at    time.Time
	bytes int64
}

// progress takes what goes on. What is not in the list is over.
func (l *live) progress(list []*agentv1.Progress, at time.Time) {
	var next []going
	for _, p := range list {
		g := going{what: p.GetWhat(), name: p.GetName()}
		if i := slices.IndexFunc(l.going, func(have going) bool { return have.what == g.what && have.name == g.name }); i >= 0 {
			g = l.going[i]
		}
		g.total = p.GetTotal()
		g.samples = append(g.samples, sample{at, p.GetBytes()})
		g.samples = g.samples[max(len(g.samples)-rateOver, 0):]
		next = append(next, g)
	}
	l.going = next
}

// line says how far it is, and how fast once there are two samples.
func (g going) line() string {
	last, first := g.samples[len(g.samples)-1], g.samples[0]
	what := strings.TrimSpace(map[string]string{"fetch": "fetching", "decrypt": "decrypting"}[g.what] + " " + clean(g.name))
	s := fmt.Sprintf("%s: %s of %s", what, stack.Bytes(last.bytes), stack.Bytes(g.total))
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
