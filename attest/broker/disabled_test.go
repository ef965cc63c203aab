package broker_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/receipt"
)

// watched is a key store whose owner may say no, or whose backend may be away.
type watched struct {
	broker.KeyStore
	disabled, away bool
	// hangs is what it waits for before it answers, and waits how long it may.
	hangs chan struct{}
	waits time.Duration
}

func (w *watched) Disabled(ctx context.Context, _ []byte) (bool, error) {
	if w.hangs != nil {
		if end, ok := ctx.Deadline(); ok {
			w.waits = time.Until(end)
		}
		select {
		case <-w.hangs:
		case <-ctx.Done():
		}
		return false, errInjected
	}
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
			lease := must[receipt.Lease](t)(receipt.VerifyLease(w.brokerKeys, got[0].Lease, "job-1", w.plan, j.sessionDigest(t), make([]byte, receipt.ChallengeSize)))
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

// TestStopDisabledBesideAStoreThatHangs: one owner's store keeps nobody else's job.
func TestStopDisabledBesideAStoreThatHangs(t *testing.T) {
	w := newWorld(t, false)
	hangs, answers := &watched{KeyStore: w.cfg.Keys, hangs: make(chan struct{})}, &watched{KeyStore: w.cfg.Keys, disabled: true}
	w.cfg.KeyStores = map[string]broker.KeyStore{"hangs": hangs, "answers": answers}
	w.Broker = must[*broker.Broker](t)(broker.New(w.cfg))
	stops := broker.DefaultPolicy()
	stops.StopAtKeyDisabled = true
	jobs := map[string]*job{}
	for n, store := range map[string]string{"a": "hangs", "b": "answers"} {
		must[broker.Asset](t)(w.CreateAsset(t.Context(), alice, broker.NewAsset{Name: n, Kind: broker.KindCheckpoints, KeyStore: store, Policy: &stops}))
		g := w.grant(t, func(g *broker.NewGrant) { g.Assets = []string{n} })
		jobs[store] = newJob(t, w, func(r *receipt.Result) { r.JobID = "job-" + store })
		must[broker.Answer](t)(jobs[store].release(t, w.Broker, g, n))
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		stopped, err := w.StopDisabled(t.Context())
		if !slices.Equal(stopped, []string{"job-answers"}) || !errors.Is(err, errInjected) {
			t.Errorf("%v, %v", stopped, err)
		}
	}()
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if l, _ := w.renew(t, jobs["answers"]); l.State == receipt.LeaseStop {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the job is not told to stop")
		}
	}
	close(hangs.hangs)
	<-done
	if hangs.waits <= 0 || hangs.waits > 2*time.Second {
		t.Errorf("a store may take %s", hangs.waits)
	}
	if l, _ := w.renew(t, jobs["hangs"]); l.State != receipt.LeaseRunning {
		t.Errorf("%+v", l)
	}
}
