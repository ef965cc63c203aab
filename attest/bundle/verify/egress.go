package verify

import (
	"fmt"

	"github.com/coffer-run/coffer/attest/bundle"
)

// egressGroup holds where the job connected to against what its plan allows.
func (v *verification) egressGroup() {
	g := v.group("egress", "Where it connected to")
	defer v.done("egress", g)
	if v.pl == nil {
		g.Skip("egress.plan", "the bundle has no plan that can be relied on")
		return
	}
	p := *v.pl
	if v.sb != nil && !v.reseals() {
		want, got := v.sb.Network(p)
		g.Equal("egress.sandbox", want, got, "the sandbox has another network than the plan allows")
	}
	b, ok := v.part(bundle.EgressPart)
	switch {
	case !ok && len(p.Egress) > 0 && v.reached(bundle.StageStart):
		g.Fail("egress.complete", "the connections of a job whose plan allows some", "none that can be relied on", "the record is not complete")
		return
	case !ok && len(p.Egress) > 0:
		g.Skip("egress.complete", "the job did not start")
		return
	case !ok:
		g.Pass("egress.none", "the plan allows no connection, and the sandbox had no network")
		return
	}
	e, err := bundle.Decode[bundle.Egress](b)
	if err != nil {
		g.Fail("egress.form", "a list of connections", err.Error(), "")
		return
	}
	sent := map[string]int64{}
	total, strangers := int64(0), 0
	for _, c := range e.Connections {
		at := fmt.Sprintf("%s:%d", c.Host, c.Port)
		if !p.Allows(c.Host, c.Port) {
			strangers++
			g.Fail("egress.destination", "a destination of the plan", fmt.Sprintf("%.280q", at), "the job connected to where nobody approved")
		}
		if c.Sent < 0 || c.Received < 0 {
			g.Fail("egress.form", "counts", fmt.Sprintf("%d bytes sent and %d received", c.Sent, c.Received), "")
			return
		}
		sent[at] += c.Sent
		total += c.Sent
	}
	if strangers == 0 {
		g.Pass("egress.destination", fmt.Sprintf("%d connections, to %d of %d destinations of the plan", len(e.Connections), len(sent), len(p.Egress)))
	}
	over := false
	for _, d := range p.Egress {
		if n := sent[fmt.Sprintf("%s:%d", d.Host, d.Port)]; n > d.MaxBytes {
			over = true
			g.Fail("egress.budget", fmt.Sprintf("at most %d bytes to %s", d.MaxBytes, d.Host), fmt.Sprint(n), "more was sent than was approved")
		}
	}
	if total > p.Output.EgressBytes {
		over = true
		g.Fail("egress.budget", fmt.Sprintf("at most %d bytes in all", p.Output.EgressBytes), fmt.Sprint(total), "more was sent than was approved")
	}
	if !over {
		g.Pass("egress.budget", fmt.Sprintf("%d of %d bytes sent", total, p.Output.EgressBytes))
	}
	if told := int64(len(e.Denials)); told > p.Output.EgressEvents {
		g.Fail("egress.events", fmt.Sprintf("at most %d refusals by name", p.Output.EgressEvents), fmt.Sprint(told), "the job said more through what it was refused than the plan allows")
	} else {
		g.Pass("egress.events", fmt.Sprintf("%d refusals by name, %d more counted", told, e.Untold))
	}
	if e.Lost {
		g.Skip("egress.complete", "the gateway died: what it let through after its last report is not known")
		v.unproven = "its gateway died: not every connection is known"
	}
	g.Skip("egress.word", "that the gateway let nothing else through is the measured agent's word")
}
