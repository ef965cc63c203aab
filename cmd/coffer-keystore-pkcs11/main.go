// Command coffer-keystore-pkcs11 is the key store plugin over a PKCS#11 token.
// coffer-broker starts it; by hand, it makes and disables keys in the token.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"

	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
	"github.com/coffer-run/coffer/plugins/keystore/pkcs11"
	"github.com/coffer-run/coffer/plugins/kit"
)

// Config is the configuration file.
type Config struct {
	// Store is the store's name, by which the broker's configuration calls it.
	Store string `json:"store"`
	// Module is the token's PKCS#11 library, Token the token's label.
	Module string `json:"module"`
	Token  string `json:"token"`
	// PINFile holds the user PIN (mode 0600).
	PINFile string `json:"pinFile"`
	// Keys are the labels of the keys on offer; the first is the default.
	Keys []string `json:"keys"`
}

const usage = `usage: coffer-keystore-pkcs11 --config FILE COMMAND

commands:
  generate KEY  make the next version of a key in the token
  disable KEY   let the token refuse to encrypt and decrypt under a key
  enable KEY    take it back
  status        list the keys`

func main() { daemon.Main(run) }

func run(ctx context.Context, args []string, _ io.Reader, stdout, stderr io.Writer) (err error) {
	fs := flag.NewFlagSet("coffer-keystore-pkcs11", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() { fmt.Fprintln(stderr, usage) }
	path := fs.String("config", "", "configuration `file` (JSON)")
	if err := fs.Parse(args); err != nil {
		return err
	}
	commands := map[string]int{"": 0, "status": 1, "generate": 2, "disable": 2, "enable": 2}
	if n, known := commands[fs.Arg(0)]; *path == "" || !known || fs.NArg() != n {
		return errors.New(usage)
	}
	var c Config
	if err := daemon.ReadConfig(*path, &c); err != nil {
		return err
	}
	pin, err := keyfile.Read(c.PINFile)
	if err != nil {
		return err
	}
	defer clear(pin)
	s, err := pkcs11.Open(pkcs11.Config{Store: c.Store, Module: c.Module, Token: c.Token, PIN: string(bytes.TrimRight(pin, "\r\n")), Keys: c.Keys})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	key := fs.Arg(1)
	switch fs.Arg(0) {
	case "status":
		return kit.WriteKeys(ctx, s, stdout)
	case "generate":
		return s.Generate(ctx, key)
	case "disable", "enable":
		return s.SetDisabled(ctx, key, fs.Arg(0) == "disable")
	default:
		return kit.ServeKeyStore(s, stderr)
	}
}
