package broker

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/coffer-run/coffer/attest/translog"
)

// Rewrapper is a KeyStore whose key-encryption keys have versions.
type Rewrapper interface {
	KeyStore
	// Rewrap returns the same data key under the newest version of its
	// key-encryption key, and false if wrapped is that already. It MUST have seen
	// that what it returns opens for associated.
	Rewrap(ctx context.Context, wrapped, associated []byte) (newest []byte, changed bool, err error)
}

// RewrapPass is what one pass of Rewrap did.
type RewrapPass struct {
	// Looked counts the assets, Changed those with another wrapped key by now.
	Looked, Changed int
	// Failed are the assets that were passed over.
	Failed []string
	// Last is the last asset that was looked at: a pass that ended early goes on
	// after it. Done says that none is left.
	Last string
	Done bool
}

const (
	// maxRewrapAssets bounds the assets of one pass.
	maxRewrapAssets = 1 << 20
	// rewrapBatch bounds those of one call of an operator's.
	rewrapBatch = 64
)

// RewrapKeys does a part of what Rewrap does, for an operator: the next
// rewrapBatch assets after after.
func (b *Broker) RewrapKeys(ctx context.Context, who Actor, after string) (RewrapPass, error) {
	if err := b.may(ctx, who, ActionRewrapKeys, Resource{}); err != nil {
		return RewrapPass{}, err
	}
	return b.rewrapPass(ctx, who.String(), after, rewrapBatch)
}

// Rewrap moves the data keys of all assets whose names sort after after to the
// newest versions of their key-encryption keys. Sealed files stay as they are.
//
// Each asset is committed and logged by itself, under actor's name, so that a
// pass that ends half-way has done no harm and the next one leaves out what is
// done. An asset whose key does not open is passed over, and named in the error
// with all others; nothing of it is changed. Rewrap asks nobody for leave: it is
// for the broker's own program.
func (b *Broker) Rewrap(ctx context.Context, actor, after string) (RewrapPass, error) {
	return b.rewrapPass(ctx, actor, after, maxRewrapAssets)
}

func (b *Broker) rewrapPass(ctx context.Context, actor, after string, most int) (RewrapPass, error) {
	p := RewrapPass{Last: after}
	var assets []Asset
	if err := b.view(ctx, func(ctx context.Context, r Reader) (err error) {
		assets, err = r.Assets(ctx, maxRewrapAssets)
		return err
	}); err != nil {
		return p, err
	}
	var failed []error
	for _, a := range assets {
		if err := ctx.Err(); err != nil {
			return p, errors.Join(append(failed, fmt.Errorf("rewrap: stopped after asset %q: %w", p.Last, err))...)
		}
		store, ok := b.keys[a.KeyStore].(Rewrapper)
		if !ok || a.Name <= after {
			continue
		}
		if p.Looked == most {
			return p, errors.Join(failed...)
		}
		changed, err := b.rewrap(ctx, actor, store, a)
		switch {
		case err != nil:
			failed = append(failed, fmt.Errorf("rewrap key of asset %s: %w", a.Name, err))
			p.Failed = append(p.Failed, a.Name)
		case changed:
			p.Changed++
		}
		p.Looked, p.Last = p.Looked+1, a.Name
	}
	p.Done = true
	return p, errors.Join(failed...)
}

func (b *Broker) rewrap(ctx context.Context, actor string, store Rewrapper, a Asset) (bool, error) {
	ad, err := a.associated()
	if err != nil {
		return false, err
	}
	newest, changed, err := store.Rewrap(ctx, a.Wrapped, ad)
	if err != nil || !changed {
		return false, err
	}
	err = b.update(ctx, func(ctx context.Context, tx Tx) error {
		now, err := tx.Asset(ctx, a.Name)
		if err != nil {
			return err
		}
		if !bytes.Equal(now.Wrapped, a.Wrapped) || now.KeyStore != a.KeyStore {
			changed = false // another pass was faster
			return nil
		}
		now.Wrapped = newest
		if err := tx.SetAssetKey(ctx, now); err != nil {
			return err
		}
		_, err = b.log(ctx, tx, translog.Body{Kind: translog.KindRewrap, Actor: actor, Rewrap: &translog.Rewrap{Asset: a.Name, KeyStore: a.KeyStore}})
		return err
	})
	return changed && err == nil, err
}
