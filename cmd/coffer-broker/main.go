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
	logserve "github.com/coffer-run/coffer/attest/translog/serve"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
	"github.com/coffer-run/coffer/internal/keystore"
	"github.com/coffer-run/coffer/plugins/host"
)

const name = "coffer-broker"

// Config is the broker's configuration file. Every field is required but
// simulation, access, kbs, attestation and those of key stores.
type Config struct {
	// Listen is the address to answer on, 127.0.0.1:7442 in the embedded stack.
	Listen string     `json:"listen"`
	TLS    daemon.TLS `json:"tls"`
	// ID is the broker's name: audience of results, issuer of receipts.
	ID string `json:"id"`
	// KeyFile holds the P-384 key that signs receipts (PKCS#8 PEM),
	// OwnerWrapKeyFile the HPKE private key to which owners wrap data keys. Both
	// are mode 0600.
	KeyFile          string `json:"keyFile"`
	OwnerWrapKeyFile string `json:"ownerWrapKeyFile"`
	// KEKFile holds a 32-byte key-encryption key (mode 0600) under which the
	// broker itself wraps what names no key store. DefaultKeyStore names one of
	// KeyStores to do that. Exactly one is set.
	KEKFile         string `json:"kekFile,omitempty"`
	DefaultKeyStore string `json:"defaultKeyStore,omitempty"`
	// KeyStores are plugins, by whose names assets choose them.
	KeyStores []keystore.Config `json:"keyStores,omitempty"`
	// Attestation is the program, coffer-attest, that attests this machine for key
	// stores that ask what their caller is. Without it none of those is used.
	Attestation *host.Config `json:"attestation,omitempty"`
	// DB is the SQLite database, made at the first start.
	DB string `json:"db"`
	// Log is the Merkle tree over the evidence log in DB.
	Log Log `json:"log"`
	// Verifiers are those whose results count, with their public keys pinned.
	Verifiers []Verifier `json:"verifiers"`
	// Simulation lets owners make grants that accept simulated evidence.
	Simulation bool `json:"simulation"`
	// Access says who may do what; without it certificates' roles alone do.
	Access *Access `json:"access,omitempty"`
	// KBS serves assets whose policies name that protocol; without it none is.
	KBS *KBS `json:"kbs,omitempty"`
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
	cfg, err := keys(c)
	if err != nil {
		return err
	}
	stop, err := keyStores(ctx, c, &cfg, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	tlsConfig, who := c.TLS.Server, identify
	var g *gate
	if c.Access != nil {
		if g, err = newGate(c); err != nil {
			return err
		}
		tlsConfig, who, cfg.Access, cfg.Directory = c.TLS.ServerForPeople, g.identify, g, g
	}
	if c.KBS != nil {
		tlsConfig = c.TLS.ServerForPeople
	}
	serverTLS, err := tlsConfig()
	if err != nil {
		return err
	}
	store, err := serve.OpenStore(ctx, c.DB, c.ID)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	outbox, tree, err := openLog(c, store, log)
	if err != nil {
		return err
	}
	cfg.Store = outbox
	b, err := broker.New(cfg)
	if err != nil {
		return err
	}
	// A log that someone edited is found before anything is added to it.
	head, err := b.CheckLog(ctx)
	if err != nil {
		return fmt.Errorf("evidence log in %s: %w", c.DB, err)
	}
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	sequenced, err := sequence(ctx, tree, log, fail)
	if err != nil {
		return fmt.Errorf("database %s and evidence log in %s: %w", c.DB, c.Log.Dir, err)
	}
	defer sequenced()
	if g != nil {
		if err := g.load(ctx, b, log); err != nil {
			return err
		}
		g.reload(ctx, b, log)
	}
	handler, err := serve.Handler(serve.Options{Broker: b, Identify: who, Log: log})
	if err != nil {
		return err
	}
	if handler, err = beside(c, tree, mayReadLog(who, cfg.Access), b, log, handler); err != nil {
		return err
	}
	defer rewrapping(ctx, b, c.ID, log)()
	defer watching(ctx, b, log)()
	log.LogAttrs(ctx, slog.LevelInfo, "serving", slog.String("address", c.Listen), slog.String("id", c.ID), slog.Bool("simulation", c.Simulation), slog.Uint64("logEntries", head.Size))
	if err := daemon.Serve(ctx, c.Listen, serverTLS, handler, log); err != nil {
		return err
	}
	if cause := context.Cause(ctx); errors.Is(cause, logserve.ErrOldDatabase) {
		return fmt.Errorf("database %s: %w", c.DB, cause)
	}
	return nil
}

// keys reads every key that the configuration names, but those of key stores.
func keys(c Config) (broker.Config, error) {
	out := broker.Config{ID: c.ID, Simulation: c.Simulation, Now: time.Now, Access: broker.Roles{}}
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
