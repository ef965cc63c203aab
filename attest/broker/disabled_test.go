package broker_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/receipt"
)

// watched is a key store whose owner may say no, or whose backend may be away.
type watched struct {
	broker.KeyStore
	disabled, away bool
}

func (w *watched) Disabled(context.Context, []byte) (bool, error) {
	if w.away {
		return false, errInjected
	}
	return w.disabled, nil
}

// TestStopDisabled is a running job whose key's owner disables the key.
func TestStopDisabled(t *testing.T) {
	for name, tc := range map[string]struct {
		policy, disabled, away bool
		want                   []string
	}{
		"the policy says stop":      {policy: true, disabled: true, want: []string{"job-1"}},
		"the policy says nothing":   {disabled: true},
		"the key is there":          {policy: true},
		"the store does not answer": {policy: true, away: true},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, false)
			store := &watched{KeyStore: w.cfg.Keys}
			w.cfg.Keys = store
			w.Broker = must[*broker.Broker](t)(broker.New(w.cfg))
			w.policy(t, "data", func(p *broker.Policy) { p.StopAtKeyDisabled = tc.policy })
			g := w.grant(t, nil)
			j := newJob(t, w, nil)
			must[broker.Answer](t)(j.release(t, w.Broker, g, "data"))
			store.disabled, store.away = tc.disabled, tc.away
			for i := range 2 {
				jobs, err := w.StopDisabled(t.Context())
				if tc.away != errors.Is(err, errInjected) {
					t.Errorf("error %v", err)
				}
				if i == 0 && !slices.Equal(jobs, tc.want) || i > 0 && len(jobs) > 0 {
					t.Errorf("pass %d stops %v, want %v once", i, jobs, tc.want)
				}
			}
			got := must[[]broker.Renewed](t)(w.Renew(t.Context(), node, []broker.Renewal{{JobID: "job-1", Challenge: make([]byte, receipt.ChallengeSize)}}))
			lease := must[receipt.Lease](t)(receipt.VerifyLease(w.brokerKeys, got[0].Lease, "job-1", w.plan, make([]byte, receipt.ChallengeSize)))
			if stops := lease.State == receipt.LeaseStop; stops != (tc.want != nil) || stops && !strings.HasPrefix(lease.Reason, "key-disabled: ") {
				t.Errorf("lease says %s: %s", lease.State, lease.Reason)
			}
			// The next key is asked for in vain.
			if _, err := j.release(t, w.Broker, g, "weights"); tc.want != nil && !slices.Equal(failed(err), []string{"job.stopped"}) {
				t.Error(err)
			}
		})
	}
}
