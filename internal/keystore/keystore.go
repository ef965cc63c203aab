// Package keystore gives the broker its key stores, each a plugin in a process
// of its own.
//
// Trusted: the plugins whose checksums the configuration names. Checked, by
// plugins/contract/keystore: that what a plugin unwraps is what was wrapped, for
// the same asset. Not kept: any unwrapped key. A plugin that asks what the broker is
// gets the proofs of a Prover.
package keystore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	contract "github.com/coffer-run/coffer/plugins/contract/keystore"
	"github.com/coffer-run/coffer/plugins/host"
)

// credentials is where systemd puts a service's credentials. A plugin reads its
// own from there; it gets nothing else of the environment.
const credentials = "CREDENTIALS_DIRECTORY"

// Config is one key store of the broker's configuration.
type Config struct {
	// Name is the store's name, which its own configuration must say too. Wrapped
	// keys carry it: a store that is renamed opens none of them.
	Name string `json:"name"`
	// Plugin is the program, its checksum and its arguments.
	Plugin host.Config `json:"plugin"`
	// Key is the key to wrap under; the store's first if it is empty.
	Key string `json:"key,omitempty"`
	// Env is the plugin's environment, as NAME=value. PKCS#11 modules often want
	// one.
	Env []string `json:"env,omitempty"`
}

// Store is a key store as the broker sees it.
type Store struct {
	key    string
	plugin *host.KeyStore
	prover contract.Prover

	mu sync.Mutex // guards what follows
	// named has a prover once the store has said that it asks for proofs.
	named contract.Named
	known bool
}

var (
	_ broker.Rewrapper = (*Store)(nil)
	_ broker.Keeper    = (*Store)(nil)
)

// Start starts a store's plugin. A store that goes by another name is an error, and
// so is one that asks for the broker's attestation where there is no prover; one
// whose backend does not answer yet is not.
func Start(ctx context.Context, c Config, prover contract.Prover, log *slog.Logger) (*Store, error) {
	env := append([]string{}, c.Env...)
	if dir := os.Getenv(credentials); dir != "" {
		env = append(env, credentials+"="+dir)
	}
	plugin, err := host.StartKeyStore(ctx, c.Plugin, host.Options{Env: env, Log: log})
	if err != nil {
		return nil, fmt.Errorf("key store %s: %w", c.Name, err)
	}
	s := &Store{named: contract.Named{Name: c.Name, Store: plugin}, key: c.Key, plugin: plugin, prover: prover}
	info, err := s.learn(ctx)
	switch {
	case errors.Is(err, contract.ErrBackend):
		log.LogAttrs(ctx, slog.LevelWarn, "key store's backend does not answer", slog.String("store", c.Name), slog.Any("error", err))
		return s, nil
	case err != nil:
		return nil, errors.Join(err, plugin.Close())
	}
	log.LogAttrs(ctx, slog.LevelInfo, "key store", slog.String("store", c.Name), slog.String("kind", info.Kind), slog.Int("keys", len(info.Keys)), slog.Bool("materialCanLeave", info.MaterialCanLeave), slog.Bool("attestationRequired", info.AttestationRequired))
	return s, nil
}

// learn asks the store what it is, and whether it asks what its caller is.
func (s *Store) learn(ctx context.Context) (*contract.Info, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	info, err := s.named.Info(ctx)
	if err != nil {
		return nil, err
	}
	if info.AttestationRequired && s.prover == nil {
		return nil, fmt.Errorf("key store %s: it asks for the broker's attestation: configure attestation", s.named.Name)
	}
	s.known = true
	if info.AttestationRequired {
		s.named.Prover = s.prover
	}
	return info, nil
}

// ask returns the store as it is to be asked.
func (s *Store) ask(ctx context.Context) (contract.Named, error) {
	s.mu.Lock()
	known := s.known
	s.mu.Unlock()
	if !known {
		if _, err := s.learn(ctx); err != nil {
			return contract.Named{}, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.named, nil
}

// Name is the store's.
func (s *Store) name() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.named.Name
}

// Wrap asks the plugin to wrap key.
func (s *Store) Wrap(ctx context.Context, key *broker.DataKey, associated []byte) ([]byte, error) {
	k, err := contract.NewDataKey(bytes.Clone(key.Reveal()))
	if err != nil {
		return nil, fmt.Errorf("key store %s: wrap: %w", s.name(), err)
	}
	defer k.Destroy()
	named, err := s.ask(ctx)
	if err != nil {
		return nil, err
	}
	wrapped, err := named.Wrap(ctx, s.key, k, associated)
	return wrapped, answered(err)
}

// Unwrap asks the plugin for a data key, each time anew.
func (s *Store) Unwrap(ctx context.Context, wrapped, associated []byte) (*broker.DataKey, error) {
	k, _, err := s.UnwrapHeld(ctx, wrapped, associated)
	return k, err
}

// UnwrapHeld is Unwrap, and says which key opened it and whether the store asked
// what the broker is.
func (s *Store) UnwrapHeld(ctx context.Context, wrapped, associated []byte) (*broker.DataKey, receipt.Held, error) {
	e, err := contract.ParseEnvelope(wrapped)
	if err != nil {
		return nil, receipt.Held{}, err
	}
	named, err := s.ask(ctx)
	if err != nil {
		return nil, receipt.Held{}, err
	}
	k, result, err := named.UnwrapAttested(ctx, wrapped, associated)
	if err != nil {
		return nil, receipt.Held{}, answered(err)
	}
	defer k.Destroy()
	held := receipt.Held{Store: e.Store, Key: e.Key, Version: e.Version}
	if result != "" {
		held.Attested = plan.Sum([]byte(result))
	}
	out, err := broker.NewDataKey(bytes.Clone(k.Reveal()))
	return out, held, err
}

// Disabled says whether the key-encryption key of a wrapped key is disabled, or gone
// from the store.
func (s *Store) Disabled(ctx context.Context, wrapped []byte) (bool, error) {
	e, err := contract.ParseEnvelope(wrapped)
	if err != nil {
		return false, err
	}
	named, err := s.ask(ctx)
	if err != nil {
		return false, err
	}
	info, err := named.Info(ctx)
	if err != nil {
		return false, err
	}
	for _, k := range info.Keys {
		if k.ID == e.Key {
			return k.Disabled || e.Version < k.Oldest, nil
		}
	}
	return true, nil
}

// Rewrap asks the plugin for the same data key under the newest version.
func (s *Store) Rewrap(ctx context.Context, wrapped, associated []byte) ([]byte, bool, error) {
	e, err := contract.ParseEnvelope(wrapped)
	if err != nil {
		return nil, false, err
	}
	named, err := s.ask(ctx)
	if err != nil {
		return nil, false, err
	}
	info, err := named.Info(ctx)
	if err != nil {
		return nil, false, err
	}
	for _, k := range info.Keys {
		if k.ID == e.Key && !k.Disabled && k.Newest == e.Version {
			return wrapped, false, nil
		}
	}
	newest, err := named.Rewrap(ctx, wrapped, associated)
	return newest, err == nil, err
}

// answered tells the broker which errors are an answer.
func answered(err error) error {
	if errors.Is(err, contract.ErrDisabled) {
		return fmt.Errorf("%w: %w", broker.ErrKeyDisabled, err)
	}
	return err
}

// Close ends the plugin.
func (s *Store) Close() error { return s.plugin.Close() }
