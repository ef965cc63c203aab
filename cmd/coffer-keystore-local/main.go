// Command coffer-keystore-local is the key store plugin over one encrypted file.
// coffer-broker starts it; by hand, it makes and changes the file.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
	"github.com/coffer-run/coffer/internal/keystore/attestation"
	"github.com/coffer-run/coffer/plugins/contract/keystore"
	"github.com/coffer-run/coffer/plugins/keystore/local"
	"github.com/coffer-run/coffer/plugins/kit"
)

// Config is the configuration file.
type Config struct {
	// Store is the store's name, by which the broker's configuration calls it.
	Store string `json:"store"`
	File  string `json:"file"`
	// PassphraseFile (mode 0600), PassphraseCredential (the name of one of
	// systemd's) or TPM locks the file: exactly one.
	PassphraseFile       string `json:"passphraseFile"`
	PassphraseCredential string `json:"passphraseCredential"`
	TPM                  *TPM   `json:"tpm"`
	// Attestation says what a caller must be; without it everyone is served.
	Attestation *attestation.Config `json:"attestation,omitempty"`
}

// TPM names a TPM.
type TPM struct {
	// Device is /dev/tpmrm0, or a software TPM's socket.
	Device string `json:"device"`
	// PCRs are the SHA-256 registers whose values a new file is sealed to.
	PCRs []uint `json:"pcrs"`
}

const usage = `usage: coffer-keystore-local --config FILE COMMAND

commands:
  create KEY    make the file, with one key
  add KEY       add a key
  rotate KEY    add a version to a key; older versions still unwrap
  disable KEY   refuse to wrap and unwrap under a key
  enable KEY    take it back
  status        list the keys`

func main() { daemon.Main(run) }

func run(ctx context.Context, args []string, _ io.Reader, stdout, stderr io.Writer) (err error) {
	fs := flag.NewFlagSet("coffer-keystore-local", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() { fmt.Fprintln(stderr, usage) }
	path := fs.String("config", "", "configuration `file` (JSON)")
	if err := fs.Parse(args); err != nil {
		return err
	}
	commands := map[string]int{"": 0, "status": 1, "create": 2, "add": 2, "rotate": 2, "disable": 2, "enable": 2}
	if n, known := commands[fs.Arg(0)]; *path == "" || !known || fs.NArg() != n {
		return errors.New(usage)
	}
	var c Config
	if err := daemon.ReadConfig(*path, &c); err != nil {
		return err
	}
	lock, err := c.lock()
	if err != nil {
		return fmt.Errorf("configuration %s: %w", *path, err)
	}
	if fs.Arg(0) == "create" {
		return local.Create(c.File, c.Store, fs.Arg(1), lock)
	}
	s, err := local.Open(c.File, c.Store, lock)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	key := fs.Arg(1)
	switch fs.Arg(0) {
	case "status":
		return kit.WriteKeys(ctx, s, stdout)
	case "add":
		return s.AddKey(key)
	case "rotate":
		return s.Rotate(key)
	case "disable", "enable":
		return s.SetDisabled(key, fs.Arg(0) == "disable")
	default:
		var served keystore.Store = s
		if c.Attestation != nil {
			if served, err = c.Attestation.Guard(s, c.Store); err != nil {
				return err
			}
		}
		return kit.ServeKeyStore(served, stderr)
	}
}

// lock returns what the configuration locks the file with.
func (c Config) lock() (local.Lock, error) {
	n := 0
	for _, set := range []bool{c.PassphraseFile != "", c.PassphraseCredential != "", c.TPM != nil} {
		if set {
			n++
		}
	}
	if n != 1 || c.File == "" {
		return nil, errors.New("want file, and one of passphraseFile, passphraseCredential and tpm")
	}
	if c.TPM != nil {
		return local.TPM{Dial: func() (transport.TPMCloser, error) { return dial(c.TPM.Device) }, PCRs: c.TPM.PCRs}, nil
	}
	path := c.PassphraseFile
	if path == "" {
		dir := os.Getenv("CREDENTIALS_DIRECTORY")
		if dir == "" || c.PassphraseCredential != filepath.Base(c.PassphraseCredential) {
			return nil, fmt.Errorf("passphrase credential %q: systemd gave no credentials, or this is no name of one", c.PassphraseCredential)
		}
		path = filepath.Join(dir, c.PassphraseCredential)
	}
	b, err := keyfile.Read(path)
	if err != nil {
		return nil, err
	}
	return local.Passphrase(bytes.TrimRight(b, "\r\n")), nil
}

func dial(device string) (transport.TPMCloser, error) {
	fi, err := os.Stat(device)
	if err != nil {
		return nil, err
	}
	if fi.Mode()&os.ModeSocket != 0 {
		return linuxudstpm.Open(device)
	}
	return linuxtpm.Open(device)
}
