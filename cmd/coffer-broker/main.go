// Command coffer-broker keeps wrapped data keys and releases them to attested
// jobs under grants.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/broker/serve"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
)

const name = "coffer-broker"

// Config is the broker's configuration file. Every field is required but
// simulation.
type Config struct {
	// Listen is the address to answer on, 127.0.0.1:7442 in the embedded stack.
	Listen string     `json:"listen"`
	TLS    daemon.TLS `json:"tls"`
	// ID is the broker's name: audience of results, issuer of receipts.
	ID string `json:"id"`
	// KeyFile holds the P-384 key that signs receipts (PKCS#8 PEM), KEKFile the
	// 32-byte key-encryption key, OwnerWrapKeyFile the HPKE private key to which
	// owners wrap data keys. All are mode 0600.
	KeyFile          string `json:"keyFile"`
	KEKFile          string `json:"kekFile"`
	OwnerWrapKeyFile string `json:"ownerWrapKeyFile"`
	// DB is the SQLite database, made at the first start.
	DB string `json:"db"`
	// Verifiers are those whose results count, with their public keys pinned.
	Verifiers []Verifier `json:"verifiers"`
	// Simulation lets owners make grants that accept simulated evidence.
	Simulation bool `json:"simulation"`
}

// Verifier is one trusted verifier.
type Verifier struct {
	ID       string `json:"id"`
	JWKSFile string `json:"jwksFile"`
}

func main() { daemon.Main(run) }

func run(ctx context.Context, args []string, _ io.Reader, _, stderr io.Writer) (err error) {
	path, err := daemon.ConfigFlag(name, args, stderr)
	if err != nil {
		return err
	}
	var c Config
	if err := daemon.ReadConfig(path, &c); err != nil {
		return err
	}
	if c.Listen == "" || c.DB == "" {
		return fmt.Errorf("configuration %s: listen and db are required", path)
	}
	log := daemon.Logger(stderr, name)
	tlsConfig, err := c.TLS.Server()
	if err != nil {
		return err
	}
	cfg, err := keys(c)
	if err != nil {
		return err
	}
	store, err := serve.OpenStore(ctx, c.DB, c.ID)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	cfg.Store = store
	b, err := broker.New(cfg)
	if err != nil {
		return err
	}
	// A log that someone edited is found before anything is added to it.
	head, err := b.CheckLog(ctx)
	if err != nil {
		return fmt.Errorf("evidence log in %s: %w", c.DB, err)
	}
	handler, err := serve.Handler(serve.Options{Broker: b, Identify: daemon.Identity, Log: log})
	if err != nil {
		return err
	}
	log.LogAttrs(ctx, slog.LevelInfo, "serving", slog.String("address", c.Listen), slog.String("id", c.ID), slog.Bool("simulation", c.Simulation), slog.Uint64("logEntries", head.Size))
	return daemon.Serve(ctx, c.Listen, tlsConfig, handler, log)
}

// keys reads every key that the configuration names.
func keys(c Config) (broker.Config, error) {
	out := broker.Config{ID: c.ID, Simulation: c.Simulation, Now: time.Now}
	key, err := keyfile.ReadP384(c.KeyFile)
	if err != nil {
		return out, err
	}
	if out.Signer, err = receipt.NewSigner(c.ID, key); err != nil {
		return out, err
	}
	if out.OwnerKey, err = keyfile.ReadHPKE(c.OwnerWrapKeyFile); err != nil {
		return out, err
	}
	kek, err := keyfile.ReadSecret(c.KEKFile, broker.KEKSize)
	if err != nil {
		return out, err
	}
	defer clear(kek)
	if out.Keys, err = broker.NewLocalKeys(kek); err != nil {
		return out, err
	}
	for _, v := range c.Verifiers {
		jwks, err := os.ReadFile(v.JWKSFile)
		if err != nil {
			return out, fmt.Errorf("keys of verifier %s: %w", v.ID, err)
		}
		k, err := receipt.ParseKeys(v.ID, jwks)
		if err != nil {
			return out, err
		}
		out.Verifiers = append(out.Verifiers, k)
	}
	return out, nil
}
