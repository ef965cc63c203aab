// Command coffer-issuer is the embedded stack's OpenID provider: its people sign
// in with a password, and the broker takes its tokens.
package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
	"github.com/coffer-run/coffer/internal/issuer"
)

const name = "coffer-issuer"

// Config is the issuer's configuration file. Every field is required.
type Config struct {
	// Listen is the address to answer on, URL how people and the broker reach it.
	Listen string     `json:"listen"`
	URL    string     `json:"url"`
	TLS    daemon.TLS `json:"tls"`
	// KeyFile holds the P-384 key that signs tokens (PKCS#8 PEM), mode 0600.
	KeyFile string `json:"keyFile"`
	// PeopleFile holds names, groups and password hashes, mode 0600.
	PeopleFile string `json:"peopleFile"`
}

func main() { daemon.Main(run) }

func run(ctx context.Context, args []string, _ io.Reader, _, stderr io.Writer) error {
	path, err := daemon.ConfigFlag(name, args, stderr)
	if err != nil {
		return err
	}
	var c Config
	if err := daemon.ReadConfig(path, &c); err != nil {
		return err
	}
	if c.Listen == "" {
		return fmt.Errorf("configuration %s: listen is required", path)
	}
	log := daemon.Logger(stderr, name)
	// People come without a certificate: nothing here asks for one.
	tlsConfig, err := c.TLS.ServerForPeople()
	if err != nil {
		return err
	}
	key, err := keyfile.ReadP384(c.KeyFile)
	if err != nil {
		return err
	}
	b, err := keyfile.Read(c.PeopleFile)
	if err != nil {
		return err
	}
	people, err := issuer.ParsePeople(b)
	if err != nil {
		return fmt.Errorf("%s: %w", c.PeopleFile, err)
	}
	handler, err := issuer.New(issuer.Options{URL: c.URL, Key: key, People: people, Now: time.Now, Log: log})
	if err != nil {
		return err
	}
	log.LogAttrs(ctx, slog.LevelInfo, "serving", slog.String("address", c.Listen), slog.String("url", c.URL))
	return daemon.Serve(ctx, c.Listen, tlsConfig, handler, log)
}
