package verify_test

import (
	"slices"
	"testing"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

// withEgress builds an honest job's bundle whose record of connections is another
// one, signed as such: what the record says is all that is wrong with it.
func withEgress(t *testing.T, l *bundletest.Lab, change func(*bundle.Egress)) verify.Report {
	t.Helper()
	j := newJob(t, l, bundletest.Options{})
	e, err := bundle.Decode[bundle.Egress](j.Parts[bundle.EgressPart])
	if err != nil {
		t.Fatal(err)
	}
	change(&e)
	if j.Parts[bundle.EgressPart], err = plan.Canonical(e); err != nil {
		t.Fatal(err)
	}
	return verify.Verify(build(t, j), pinned(t, l))
}

func TestConnectionsAreHeldAgainstThePlan(t *testing.T) {
	l := newLab(t)
	more := func(c bundle.Connection) func(*bundle.Egress) {
		return func(e *bundle.Egress) { e.Connections = append(e.Connections, c) }
	}
	for name, tt := range map[string]struct {
		fails  string
		change func(*bundle.Egress)
	}{
		"a name that is not in the plan":     {"egress.destination", more(bundle.Connection{Host: "evil.example.com", Port: 443})},
		"another port":                       {"egress.destination", more(bundle.Connection{Host: bundletest.EgressHost, Port: 22})},
		"a name that contains the plan's":    {"egress.destination", more(bundle.Connection{Host: "x." + bundletest.EgressHost, Port: 443})},
		"more bytes than approved":           {"egress.budget", func(e *bundle.Egress) { e.Connections[0].Sent = 10_001 }},
		"more in two connections":            {"egress.budget", more(bundle.Connection{Host: bundletest.EgressHost, Port: 443, Sent: 6001})},
		"less than nothing, to make up":      {"egress.form", more(bundle.Connection{Host: bundletest.EgressHost, Port: 443, Sent: -4000})},
		"more refusals by name than allowed": {"egress.events", func(e *bundle.Egress) { e.Denials = append(e.Denials, e.Denials[0], e.Denials[0]) }},
	} {
		t.Run(name, func(t *testing.T) {
			r := withEgress(t, l, tt.change)
			got := slices.Compact(slices.Sorted(slices.Values(failedIDs(r))))
			if r.Verdict != verify.Failed || !slices.Equal(got, []string{tt.fails}) {
				t.Errorf("verdict %s, failed %v, want %s alone", r.Verdict, got, tt.fails)
			}
		})
	}
	t.Run("unchanged", func(t *testing.T) {
		r := withEgress(t, l, func(*bundle.Egress) {})
		if r.Verdict != verify.Verified {
			dump(t, r)
			t.Error(r.Verdict)
		}
		for _, id := range []string{"egress.sandbox", "egress.destination", "egress.budget", "egress.events"} {
			if o := outcomes(r, id); !slices.Equal(o, []check.Outcome{check.Pass}) {
				t.Errorf("%s: %v", id, o)
			}
		}
	})
	t.Run("a gateway that died", func(t *testing.T) {
		if r := withEgress(t, l, func(e *bundle.Egress) { e.Lost = true }); r.Verdict != verify.Unknown {
			t.Errorf("verdict %s, want could not tell", r.Verdict)
		}
	})
	t.Run("no record", func(t *testing.T) {
		j := newJob(t, l, bundletest.Options{})
		delete(j.Parts, bundle.EgressPart)
		if r := verify.Verify(build(t, j), pinned(t, l)); !slices.Equal(failedIDs(r), []string{"egress.complete"}) {
			t.Errorf("failed %v", failedIDs(r))
		}
	})
}
