package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
	"github.com/coffer-run/coffer/internal/keystore"
	"github.com/coffer-run/coffer/internal/keystore/attestation"
	contract "github.com/coffer-run/coffer/plugins/contract/keystore"
)

// rewrapEvery is how often data keys are moved to the newest versions of their
// key-encryption keys.
const rewrapEvery = 24 * time.Hour

// keyStores gives cfg its key stores: the key-encryption key in KEKFile or the
// plugin named by DefaultKeyStore, and every plugin under its name.
func keyStores(ctx context.Context, c Config, cfg *broker.Config, log *slog.Logger) (_ func() error, err error) {
	var started []*keystore.Store
	stop := func() (err error) {
		for _, s := range started {
			err = errors.Join(err, s.Close())
		}
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, stop())
		}
	}()
	if (c.KEKFile == "") == (c.DefaultKeyStore == "") {
		return nil, errors.New("configuration: want one of kekFile and defaultKeyStore")
	}
	if c.KEKFile != "" {
		kek, err := keyfile.ReadSecret(c.KEKFile, broker.KEKSize)
		if err != nil {
			return nil, err
		}
		defer clear(kek)
		if cfg.Keys, err = broker.NewLocalKeys(kek); err != nil {
			return nil, err
		}
	}
	var prover contract.Prover
	if c.Attestation != nil {
		if prover, err = attestation.NewProver(attestation.Program(*c.Attestation), time.Now); err != nil {
			return nil, err
		}
	}
	cfg.KeyStores = map[string]broker.KeyStore{}
	for _, k := range c.KeyStores {
		if _, twice := cfg.KeyStores[k.Name]; twice {
			return nil, fmt.Errorf("configuration: key store %s is named twice", k.Name)
		}
		s, err := keystore.Start(ctx, k, prover, log)
		if err != nil {
			return nil, err
		}
		started = append(started, s)
		cfg.KeyStores[k.Name] = s
	}
	if c.DefaultKeyStore != "" {
		def, ok := cfg.KeyStores[c.DefaultKeyStore]
		if !ok {
			return nil, fmt.Errorf("configuration: defaultKeyStore %q is none of keyStores", c.DefaultKeyStore)
		}
		cfg.Keys = def
	}
	return stop, nil
}

// rewrapping moves data keys to the newest versions now and every rewrapEvery,
// until stop.
func rewrapping(ctx context.Context, b *broker.Broker, id string, log *slog.Logger) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			p, err := b.Rewrap(ctx, id, "")
			if ctx.Err() != nil {
				return
			}
			if err != nil {
				log.LogAttrs(ctx, slog.LevelError, "some data keys were not rewrapped", slog.Any("error", err))
			}
			if p.Changed > 0 {
				log.LogAttrs(ctx, slog.LevelInfo, "data keys were rewrapped", slog.Int("looked", p.Looked), slog.Int("changed", p.Changed))
			}
			select {
			case <-time.After(rewrapEvery):
			case <-ctx.Done():
				return
			}
		}
	}()
	return func() {
		cancel()
		<-done
	}
}
