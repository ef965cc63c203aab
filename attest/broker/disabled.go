package broker

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
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

// StopDisabled marks the running jobs that have the key of an asset whose policy
// says StopAtKeyDisabled and whose key-encryption key is disabled: their next
// renewal tells them to stop. It returns their ids. A store that does not answer
// stops nothing and is named in the error; the others are still asked.
func (b *Broker) StopDisabled(ctx context.Context) ([]string, error) {
	assets := map[string]Asset{}
	if err := b.view(ctx, func(ctx context.Context, r Reader) error {
		return eachLease(ctx, r, func(l Lease) error {
			for _, u := range l.Uses {
				if _, seen := assets[u.Asset]; seen || l.Stop != "" {
					continue
				}
				a, err := r.Asset(ctx, u.Asset)
				if err != nil {
					return err
				}
				assets[u.Asset] = a
			}
			return nil
		})
	}); err != nil {
		return nil, err
	}
	disabled := map[string]struct{}{}
	var failed []error
	for _, name := range slices.Sorted(maps.Keys(assets)) {
		a := assets[name]
		store, ok := b.keys[a.KeyStore].(Watched)
		if !ok || !a.Policy.StopAtKeyDisabled {
			continue
		}
		switch off, err := store.Disabled(ctx, a.Wrapped); {
		case err != nil:
			failed = append(failed, fmt.Errorf("key of asset %s: %w", name, err))
		case off:
			disabled[name] = struct{}{}
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
