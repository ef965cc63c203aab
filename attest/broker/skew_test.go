package broker_test

import (
	"crypto/rand"
	"slices"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/receipt"
)

// TestSkew is a broker whose clock and that of who made a result, an approval or a
// grant are apart: up to receipt.Leeway it makes no difference for what was just
// made, and an end is an end to the second by the broker's clock.
func TestSkew(t *testing.T) {
	second := time.Second
	t.Run("a result", func(t *testing.T) {
		for name, tc := range map[string]struct {
			issued time.Duration
			want   []string
		}{
			"a verifier ahead by the leeway":       {issued: receipt.Leeway},
			"a verifier further ahead":             {issued: receipt.Leeway + second, want: []string{"result.issued"}},
			"a verifier behind, one second left":   {issued: second - receipt.ResultLifetime},
			"a verifier behind by a result's life": {issued: -receipt.ResultLifetime, want: []string{"result.expiry"}},
		} {
			t.Run(name, func(t *testing.T) {
				w := newWorld(t, false)
				a, err := newJob(t, w, func(r *receipt.Result) {
					at := w.clock().Add(tc.issued)
					r.IssuedAt, r.Expires = at.Unix(), at.Add(receipt.ResultLifetime).Unix()
				}).release(t, w.Broker, w.grant(t, nil), "data")
				if tc.want != nil {
					wantRefused(t, a, err, tc.want...)
				} else if err != nil {
					t.Error(err)
				}
			})
		}
	})
	t.Run("an approval", func(t *testing.T) {
		for name, tc := range map[string]struct {
			made, expires time.Duration
			want          string
		}{
			"an approver ahead by the leeway":               {made: receipt.Leeway, expires: time.Hour},
			"an approver further ahead":                     {made: receipt.Leeway + second, expires: time.Hour, want: "approval.time"},
			"an approver behind by the leeway":              {made: -receipt.Leeway, expires: time.Hour},
			"an approver who seems to approve before asked": {made: -receipt.Leeway - second, expires: time.Hour, want: "approval.time"},
			"expired by the broker's clock to the second":   {made: -receipt.Leeway, expires: 0, want: "approval.expiry"},
			"one second left":                               {made: -receipt.Leeway, expires: second},
		} {
			t.Run(name, func(t *testing.T) {
				w, p := withApprovers(t)
				g := w.requested(t, nil)
				doc := w.approval(t, ann, g.ID, func(a *receipt.Approval) {
					a.Time, a.Expires = w.clock().Add(tc.made).Unix(), w.clock().Add(tc.expires).Unix()
				})
				_, err := w.ApproveGrant(t.Context(), ann, g.ID, doc, signed(t, p.known["ann"].keys[0], doc))
				if tc.want == "" && err != nil || tc.want != "" && !refusedWith(err, tc.want) {
					t.Error(err)
				}
			})
		}
	})
	t.Run("a grant", func(t *testing.T) {
		w := newWorld(t, false)
		g := w.grant(t, func(n *broker.NewGrant) {
			n.NotBefore, n.NotAfter, n.MaxReleases = w.clock().Add(time.Minute), w.clock().Add(2*time.Minute), 9
		})
		ask := func(job string) []string {
			a, err := newJob(t, w, func(r *receipt.Result) { r.JobID = job }).release(t, w.Broker, g, "data")
			if err == nil && a.Ciphertext == nil {
				t.Error("no key and no refusal")
			}
			return failed(err)
		}
		for _, step := range []struct {
			forward time.Duration
			want    []string
		}{{time.Minute - second, []string{"grant.not-before"}}, {second, nil}, {time.Minute - second, nil}, {second, []string{"grant.expiry"}}, {-time.Minute, nil}} {
			w.advance(step.forward)
			if got := ask("job-" + rand.Text()); !slices.Equal(got, step.want) && !(got == nil && step.want == nil) {
				t.Errorf("at %s: refused for %v, want %v", w.clock().Format(time.TimeOnly), got, step.want)
			}
		}
	})
	t.Run("a lease", func(t *testing.T) {
		// Its seconds count on the holder's own clock: the broker's may be anywhere.
		for _, off := range []time.Duration{-24 * time.Hour, 24 * time.Hour} {
			w := newWorld(t, false)
			j, _ := w.run(t, "job-1")
			w.advance(off)
			l, _ := w.renew(t, j)
			if l.State != receipt.LeaseRunning || l.Seconds != 60 {
				t.Errorf("with the broker's clock off by %s: %+v", off, l)
			}
		}
	})
}
