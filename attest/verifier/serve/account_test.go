package serve_test

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	verifierv1 "github.com/coffer-run/coffer/attest/api/verifier/v1"
	"github.com/coffer-run/coffer/attest/endorse"
)

// accounts notes on whose account endorsements are fetched, and has none.
type accounts struct {
	mu  sync.Mutex
	all []string
}

func (a *accounts) Fetch(ctx context.Context, _ endorse.Request) ([]byte, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all = append(a.all, endorse.CallerOf(ctx))
	return nil, endorse.ErrUnknown
}

// What evidence makes the verifier fetch is on the account of the peer who handed
// it in, whatever the evidence says of itself.
func TestFetchesAreOnTheCallersAccount(t *testing.T) {
	f := newFixture(t)
	a := &accounts{}
	cache, err := endorse.New(endorse.Options{Store: endorse.NewLibrary(), Anchors: f.options.Anchors, Clock: time.Now, Fetch: a})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cache.Close)
	f.options.Endorsements = cache
	b := f.balance(t)
	if _, err := b.direct[0].Appraise(t.Context(), connect.NewRequest(&verifierv1.AppraiseRequest{Evidence: f.attest(t, challenge(t, b.direct[0])), Audience: "broker"})); err != nil {
		t.Fatal(err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.all) == 0 || slices.ContainsFunc(a.all, func(s string) bool { return s != "agent/node-1" }) {
		t.Errorf("fetched on the accounts of %q", a.all)
	}
}
