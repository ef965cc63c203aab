package verify

import (
	"fmt"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

// stopSlack is how long the node may take, beside the plan's grace, until a container
// that was told to end is gone.
const stopSlack = 30 * time.Second

// attempt holds which attempt the record is of, and what the attempts used together,
// against the plan; and the records of the attempts before, where the caller has them,
// against this one.
func (v *verification) attempt(g *check.List) {
	const form = "attempt.form"
	ab, ok := v.part(bundle.AgentPart)
	if !ok || v.pl == nil {
		return
	}
	a, err := bundle.Decode[bundle.Agent](ab)
	if err != nil {
		return // which the sandbox's group has said
	}
	seconds, bounded := v.pl.BudgetSeconds()
	most := v.pl.Attempts()
	w := a.Attempt
	switch wanted := bounded || most > 1; {
	case w == nil && wanted:
		g.Fail(form, "which attempt it is, because the plan has a budget or allows several", "nothing", "the record is not complete")
		return
	case w != nil && !wanted:
		g.Fail(form, "no attempts: the plan has no budget and allows one", fmt.Sprintf("attempt %d", w.Number), "")
		return
	case w == nil:
		v.noEarlier(g)
		return
	case w.Number < 1 || w.Number > most:
		g.Fail("attempt.number", fmt.Sprintf("one of the %d attempts of the plan", most), fmt.Sprint(w.Number), "the job was tried more often than was approved")
		return
	case w.SpentNanos < 0 || w.UsedNanos < 0, !bounded && (w.SpentNanos != 0 || w.UsedNanos != 0),
		w.Number == 1 && (w.First != "" || w.Before != ""), w.Number > 1 && (w.First == "" || w.First == v.st.JobID):
		g.Fail(form, "an attempt that follows those before it", fmt.Sprintf("attempt %d of %.80q, %d and %d ns", w.Number, w.First, w.SpentNanos, w.UsedNanos), "")
		return
	}
	g.Pass("attempt.number", fmt.Sprintf("attempt %d of at most %d", w.Number, most))
	if bounded {
		v.budget(g, *w, time.Duration(seconds)*time.Second)
	}
	if w.Number == 1 {
		v.noEarlier(g)
		return
	}
	v.earlier(g, *w, bounded)
}

// noEarlier refuses records of attempts before the first.
func (v *verification) noEarlier(g *check.List) {
	if n := len(v.trust.Earlier); n > 0 {
		g.Fail("attempt.earlier", "no attempt before this one", fmt.Sprintf("%d records", n), "they are of other jobs")
	}
}

// budget holds what this record says of the budget against the plan and against its own
// timeline.
func (v *verification) budget(g *check.List, w bundle.Attempt, budget time.Duration) {
	const id = "budget.time"
	spent, used := time.Duration(w.SpentNanos), time.Duration(w.UsedNanos)
	if shown := v.shown(); used < shown-clockJitter {
		g.Fail(id, "at least the "+shown.String()+" of the stages", used.String(), "the record says less than its own timeline")
		return
	}
	grace := time.Duration(v.pl.Resources.StopGrace())*time.Second + stopSlack
	// Neither sum can overflow: what is over the budget alone was over it already.
	switch over := max(spent-budget, used-budget, spent+used-budget); {
	case over > grace:
		g.Fail(id, fmt.Sprintf("at most %s, and %s to end", budget, grace), fmt.Sprintf("%s before, and %s in this attempt", spent, used), "the job had more than was approved")
	case over > 0:
		g.Pass(id, fmt.Sprintf("the budget of %s, and %s to end", budget, over.Round(time.Millisecond)))
	default:
		g.Pass(id, fmt.Sprintf("%s of %s", (spent+used).Round(time.Millisecond), budget))
	}
}

// shown is how long the stages took for which the job has room.
func (v *verification) shown() time.Duration {
	var sum time.Duration
	room := false
	for _, s := range v.st.Timeline {
		room = room || s.Stage == bundle.StageSandbox
		if room && !beside(s.Stage) {
			sum += time.Duration(s.Nanos)
		}
	}
	return sum
}

// earlier follows the records back to the first attempt, each named by the digest of
// its statement in the one after it.
func (v *verification) earlier(g *check.List, w bundle.Attempt, bounded bool) {
	const id, sum = "attempt.earlier", "budget.attempts"
	if len(v.trust.Earlier) == 0 {
		what := "that there were none but those before it"
		if bounded {
			what = fmt.Sprintf("that those before it used %s", time.Duration(w.SpentNanos).Round(time.Millisecond))
		}
		g.Skip(id, fmt.Sprintf("the agent's word, %s: the records of the %d before were not given", what, w.Number-1))
		return
	}
	records := map[plan.Digest]*verification{}
	for _, file := range v.trust.Earlier {
		trust := v.trust
		trust.Earlier = nil
		e := &verification{trust: trust}
		e.run(file)
		if e.rep.Verdict == Failed {
			g.Fail(id, "records that are what they say", fmt.Sprintf("job %.80q: %s", e.rep.JobID, e.rep.Summary), "")
			return
		}
		records[e.rep.Statement] = e
	}
	var total time.Duration
	for after := w; after.Number > 1; {
		e := records[after.Before]
		if e == nil {
			v.unproven = fmt.Sprintf("the record of attempt %d, which would be %s, is not among those given", after.Number-1, orNone(after.Before))
			g.Skip(id, v.unproven)
			return
		}
		delete(records, after.Before)
		// A record that did not fail, of a plan with attempts, has the part.
		a, err := bundle.Decode[bundle.Agent](e.b.Parts[bundle.AgentPart])
		if err != nil || a.Attempt == nil {
			g.Fail(id, fmt.Sprintf("attempt %d", after.Number-1), "a record that does not say which attempt it is of", "")
			return
		}
		before := *a.Attempt
		first := before.First
		if before.Number == 1 {
			first = e.st.JobID
		}
		if e.st.PlanDigest != v.st.PlanDigest || before.Number != after.Number-1 || first != w.First || e.st.Outcome.State != bundle.Failed {
			g.Fail(id, fmt.Sprintf("attempt %d of job %s, of the same plan, which failed", after.Number-1, w.First),
				fmt.Sprintf("attempt %d of job %.80q, which %s", before.Number, first, e.st.Outcome.State), "")
			return
		}
		if after.SpentNanos < before.SpentNanos+before.UsedNanos {
			g.Fail(sum, fmt.Sprintf("at least %s, as attempt %d says", time.Duration(before.SpentNanos+before.UsedNanos), before.Number),
				time.Duration(after.SpentNanos).String(), "a later attempt counts less than was used before it")
			return
		}
		total += time.Duration(before.UsedNanos)
		after = before
	}
	for _, e := range records {
		g.Fail(id, "records of the attempts before", fmt.Sprintf("job %.80q besides", e.rep.JobID), "it is no attempt before this one")
	}
	if len(records) > 0 {
		return
	}
	g.Pass(id, fmt.Sprintf("%d, each named by the one after it", w.Number-1))
	if bounded {
		g.Pass(sum, fmt.Sprintf("%d attempts, %s by their records", w.Number, (total+time.Duration(w.UsedNanos)).Round(time.Millisecond)))
	}
}
