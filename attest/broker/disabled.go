package broker

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// Watched is a KeyStore that can say whether a key-encryption key is disabled
// without opening anything.
type Watched interface {
	KeyStore
	// Disabled reports whether the key that wrapped is under is disabled or gone. An
	// error is no answer.
	Disabled(ctx context.Context, wrapped []byte) (bool, error)
}

// reasonDisabled starts the reason of jobs that stop because a key is disabled.
const reasonDisabled = "key-disabled"

// askDisabled bounds how long one store may take to say which keys are disabled.
const askDisabled = 2 * time.Second

// StopDisabled marks the running jobs that have the key of an asset whose policy
// says StopAtKeyDisabled and whose key-encryption key is disabled: their next
// renewal tells them to stop. It returns their ids. Each store is asked by itself. One
// that does not answer within 2 s stops nothing and is named in the error.
func (b *Broker) StopDisabled(ctx context.Context) ([]string, error) {
	of := map[string][]Asset{} // by their stores
	seen := map[string]struct{}{}
	if err := b.view(ctx, func(ctx context.Context, r Reader) error {
		return eachLease(ctx, r, func(l Lease) error {
			for _, u := range l.Uses {
				if _, again := seen[u.Asset]; again || l.Stop != "" {
					continue
				}
				a, err := r.Asset(ctx, u.Asset)
				if err != nil {
					return err
				}
				seen[u.Asset] = struct{}{}
				if a.Policy.StopAtKeyDisabled {
					of[a.KeyStore] = append(of[a.KeyStore], a)
				}
			}
			return nil
		})
	}); err != nil {
		return nil, err
	}
	var mu sync.Mutex // guards jobs and failed
	var jobs []string
	var failed []error
	var wg sync.WaitGroup
	for name, assets := range of {
		store, ok := b.keys[name].(Watched)
		if !ok {
			continue
		}
		wg.Go(func() {
			stopped, err := b.stopDisabled(ctx, store, assets)
			mu.Lock()
			defer mu.Unlock()
			jobs, failed = append(jobs, stopped...), append(failed, err)
		})
	}
	wg.Wait()
	slices.Sort(jobs)
	return jobs, errors.Join(failed...)
}

// stopDisabled asks one store for the keys of assets.
func (b *Broker) stopDisabled(ctx context.Context, store Watched, assets []Asset) ([]string, error) {
	asking, cancel := context.WithTimeout(ctx, askDisabled)
	defer cancel()
	disabled := map[string]struct{}{}
	var failed []error
	for _, a := range assets {
		switch off, err := store.Disabled(asking, a.Wrapped); {
		case err != nil:
			failed = append(failed, fmt.Errorf("key of asset %s: %w", a.Name, err))
		case off:
			disabled[a.Name] = struct{}{}
		}
	}
	if len(disabled) == 0 {
		return nil, errors.Join(failed...)
	}
	var jobs []string
	err := b.update(ctx, func(ctx context.Context, tx Tx) error {
		jobs = nil
		return eachLease(ctx, tx, func(l Lease) error {
			i := slices.IndexFunc(l.Uses, func(u LeaseUse) bool { _, off := disabled[u.Asset]; return off })
			if l.Stop != "" || i < 0 {
				return nil
			}
			l.Stop = reasonDisabled + ": the key of asset " + l.Uses[i].Asset + " is disabled at its key store"
			jobs = append(jobs, l.JobID)
			return tx.PutLease(ctx, l)
		})
	})
	return jobs, errors.Join(append(failed, err)...)
}

// eachLease calls f for every lease that has not ended.
func eachLease(ctx context.Context, r Reader, f func(Lease) error) error {
	after := ""
	for {
		l, err := r.OpenLeases(ctx, after, leasePage)
		if err != nil {
			return err
		}
		for _, lease := range l {
			after = lease.JobID
			if err := f(lease); err != nil {
				return err
			}
		}
		if len(l) < leasePage {
			return nil
		}
	}
}
