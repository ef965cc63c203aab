// Command coffer-keystore-vault is the key store plugin over the transit engine
// of Vault or OpenBao. coffer-broker starts it.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"io"

	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
	"github.com/coffer-run/coffer/plugins/keystore/vault"
	"github.com/coffer-run/coffer/plugins/kit"
)

// Config is the configuration file.
type Config struct {
	// Store is the store's name, by which the broker's configuration calls it.
	Store string `json:"store"`
	// Address is the server's, https; CAFile the authorities of its certificate,
	// the system's if it is empty.
	Address   string `json:"address"`
	CAFile    string `json:"caFile"`
	Namespace string `json:"namespace"`
	// Mount is where the transit engine is.
	Mount string `json:"mount"`
	// TokenFile holds the token (mode 0600). It is read again when the server
	// takes the token no longer.
	TokenFile string `json:"tokenFile"`
	// Keys are the names of the keys on offer; the first is the default.
	Keys []string `json:"keys"`
}

const usage = "usage: coffer-keystore-vault --config FILE [status]"

func main() { daemon.Main(run) }

func run(ctx context.Context, args []string, _ io.Reader, stdout, stderr io.Writer) (err error) {
	fs := flag.NewFlagSet("coffer-keystore-vault", flag.ContinueOnError)
	fs.SetOutput(stderr)
	path := fs.String("config", "", "configuration `file` (JSON)")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *path == "" || fs.NArg() > 1 || fs.NArg() == 1 && fs.Arg(0) != "status" {
		return errors.New(usage)
	}
	var c Config
	if err := daemon.ReadConfig(*path, &c); err != nil {
		return err
	}
	s, err := vault.Open(ctx, vault.Config{
		Store: c.Store, Address: c.Address, CAFile: c.CAFile, Namespace: c.Namespace, Mount: c.Mount, Keys: c.Keys,
		Token: func() (string, error) {
			b, err := keyfile.Read(c.TokenFile)
			return string(bytes.TrimSpace(b)), err
		},
		Log: daemon.Logger(stderr, "coffer-keystore-vault"),
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if fs.NArg() == 0 {
		return kit.ServeKeyStore(s, stderr)
	}
	return kit.WriteKeys(ctx, s, stdout)
}
