package verify

import (
	"fmt"
	"slices"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/translog"
)

// outcomeStop holds what is said of a job that lost its lease against its reason
// and its times.
func (v *verification) outcomeStop(g *check.List) {
	o := v.st.Outcome
	lost := slices.Contains([]string{bundle.ReasonRevoked, bundle.ReasonLapsed, bundle.ReasonReattestRefused, bundle.ReasonReattestLate}, o.Reason)
	if !lost && o.Stop == nil {
		return
	}
	if !lost || o.Stop == nil || o.Stop.By == "" {
		g.Fail("outcome.stop", "why a job lost its lease, if it did, and only then", fmt.Sprintf("reason %.80q, stop said: %t", o.Reason, o.Stop != nil), "")
		return
	}
	s := o.Stop
	times := fmt.Sprintf("told %s, gone %s, scrubbed %s", moment(s.ToldUnixNano), moment(s.GoneUnixNano), moment(s.ScrubbedUnixNano))
	switch {
	case s.GoneUnixNano == 0 || s.ScrubbedUnixNano == 0:
		// True or not, it is no record of a job that was taken back whole.
		g.Skip("outcome.stop", "nobody saw that all of it ended: "+times)
	case s.ToldUnixNano > s.GoneUnixNano+int64(clockJitter):
		g.Fail("outcome.stop", "a job that is told to stop before it is gone", times, "")
	default:
		g.Pass("outcome.stop", fmt.Sprintf("%s, %s; %s", o.Reason, s.By, times))
	}
}

// logStop holds a revocation against the broker's own entry of it.
func (v *verification) logStop(g *check.List, bodies []translog.Body) {
	o := v.st.Outcome
	i := slices.IndexFunc(bodies, func(b translog.Body) bool { return b.Kind == translog.KindStop })
	switch {
	case i >= 0 && o.Stop != nil && o.Reason != bundle.ReasonLapsed:
		g.Equal("log.stop", bodies[i].Stop.Reason, o.Stop.By, "the broker told the job to stop for another reason")
	case o.Reason == bundle.ReasonRevoked:
		g.Fail("log.stop", "the broker's entry that it told the job to stop", "none", "")
	case i >= 0:
		// It may have ended by itself in that moment.
		g.Pass("log.stop", "the job was told to stop, "+bodies[i].Stop.Reason+", and ended otherwise")
	}
}

// moment is a time in nanoseconds since 1970; 0 is never.
func moment(n int64) string {
	if n == 0 {
		return "never"
	}
	return time.Unix(0, n).UTC().Format("15:04:05.000")
}
