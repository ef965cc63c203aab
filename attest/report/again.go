package report

import (
	"strings"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
)

const (
	// maxAffirmed bounds the later attestations on a page that affirmed and changed
	// nothing. All others are listed.
	maxAffirmed = 100
	// markEvery is how near two marks of the picture may be, in units of its view box.
	markEvery = 6.0
)

// again is how a job attested while it ran, by the node's word.
type again struct {
	Affirmed, Other int
	Listed          []attested
	// Unlisted counts those that the page leaves out, Omitted those that the record does.
	Unlisted, Omitted int
}

// attested is one later attestation.
type attested struct {
	Number                                 int
	Began, Took, Cause, Verdict, Why, Then string
	Failed                                 bool
}

// mark is a later attestation in the picture, or several that are near each other.
type mark struct {
	X, Y   float64
	Failed bool
}

func (v *view) reattested(r bundle.Reattestations) {
	a := &again{Omitted: r.Omitted}
	for _, one := range r.List {
		if one.Verdict == bundle.ReattestAffirmed {
			a.Affirmed++
		} else {
			a.Other++
		}
	}
	quiet := 0
	for _, one := range r.List {
		failed := one.Verdict != bundle.ReattestAffirmed
		if !failed && one.Then == bundle.ReattestGoesOn {
			// The newest are listed.
			if quiet++; quiet <= a.Affirmed-maxAffirmed {
				a.Unlisted++
				v.mark(one.StartUnixNano, failed)
				continue
			}
		}
		v.mark(one.StartUnixNano, failed)
		a.Listed = append(a.Listed, attested{
			Number: one.Number, Began: stamp(time.Unix(0, one.StartUnixNano)), Took: duration(one.Nanos), Cause: one.Cause, Verdict: one.Verdict,
			Why: strings.Join(append(one.Failed, one.Message), " "), Then: strings.ReplaceAll(one.Then, "-", " "), Failed: failed,
		})
	}
	v.Again = a
}

// mark puts a mark on the bar of the stage in which the job ran. Of marks that are near
// each other one is drawn, which failed if any did.
func (v *view) mark(unixNano int64, failed bool) {
	for _, w := range v.Way {
		if w.Stage != string(bundle.StageRun) {
			continue
		}
		x := min(max(v.at(unixNano), labelWidth), pictureWidth)
		if n := len(v.Marks); n > 0 && x-v.Marks[n-1].X < markEvery {
			v.Marks[n-1].Failed = v.Marks[n-1].Failed || failed
			return
		}
		v.Marks = append(v.Marks, mark{X: x, Y: w.Y + barHeight/2, Failed: failed})
	}
}
