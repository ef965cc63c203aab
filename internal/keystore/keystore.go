// Package keystore gives the broker its key stores, each a plugin in a process
// of its own.
//
// Trusted: the plugins whose checksums the configuration names. Checked, by
// plugins/contract/keystore: that what a plugin unwraps is what was wrapped, for
// the same asset. Not kept: any unwrapped key.
package keystore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/coffer-run/coffer/attest/broker"
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
	named  contract.Named
	key    string
	plugin *host.KeyStore
}

var _ broker.Rewrapper = (*Store)(nil)

// Start starts a store's plugin. A store that goes by another name is an error;
// one whose backend does not answer yet is not.
func Start(ctx context.Context, c Config, log *slog.Logger) (*Store, error) {
	env := append([]string{}, c.Env...)
	if dir := os.Getenv(credentials); dir != "" {
		env = append(env, credentials+"="+dir)
	}
	plugin, err := host.StartKeyStore(ctx, c.Plugin, host.Options{Env: env, Log: log})
	if err != nil {
		return nil, fmt.Errorf("key store %s: %w", c.Name, err)
	}
	s := &Store{named: contract.Named{Name: c.Name, Store: plugin}, key: c.Key, plugin: plugin}
	info, err := s.named.Info(ctx)
	switch {
	case errors.Is(err, contract.ErrBackend):
		log.LogAttrs(ctx, slog.LevelWarn, "key store's backend does not answer", slog.String("store", c.Name), slog.Any("error", err))
		return s, nil
	case err != nil:
		return nil, errors.Join(err, plugin.Close())
	case info.AttestationRequired:
		return nil, errors.Join(fmt.Errorf("key store %s: it asks for the broker's attestation, which this broker cannot give", c.Name), plugin.Close())
	}
	log.LogAttrs(ctx, slog.LevelInfo, "key store", slog.String("store", c.Name), slog.String("kind", info.Kind), slog.Int("keys", len(info.Keys)), slog.Bool("materialCanLeave", info.MaterialCanLeave))
	return s, nil
}

// Wrap asks the plugin to wrap key.
func (s *Store) Wrap(ctx context.Context, key *broker.DataKey, associated []byte) ([]byte, error) {
	k, err := contract.NewDataKey(bytes.Clone(key.Reveal()))
	if err != nil {
		return nil, fmt.Errorf("key store %s: wrap: %w", s.named.Name, err)
	}
	defer k.Destroy()
	wrapped, err := s.named.Wrap(ctx, s.key, k, associated)
	return wrapped, answered(err)
}

// Unwrap asks the plugin for a data key, each time anew.
func (s *Store) Unwrap(ctx context.Context, wrapped, associated []byte) (*broker.DataKey, error) {
	k, err := s.named.Unwrap(ctx, wrapped, associated)
	if err != nil {
		return nil, answered(err)
	}
	defer k.Destroy()
	return broker.NewDataKey(bytes.Clone(k.Reveal()))
}

// Rewrap asks the plugin for the same data key under the newest version.
func (s *Store) Rewrap(ctx context.Context, wrapped, associated []byte) ([]byte, bool, error) {
	e, err := contract.ParseEnvelope(wrapped)
	if err != nil {
		return nil, false, err
	}
	info, err := s.named.Info(ctx)
	if err != nil {
		return nil, false, err
	}
	for _, k := range info.Keys {
		if k.ID == e.Key && !k.Disabled && k.Newest == e.Version {
			return wrapped, false, nil
		}
	}
	newest, err := s.named.Rewrap(ctx, wrapped, associated)
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
