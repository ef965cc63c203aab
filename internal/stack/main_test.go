package stack

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
)

// TestMain plays the daemons of a stack when the test binary is run by one of
// their names.
func TestMain(m *testing.M) {
	if name := filepath.Base(os.Args[0]); slices.Contains(ourTools(), name) {
		daemon.Main(func(ctx context.Context, args []string, _ io.Reader, _, stderr io.Writer) error {
			if name == keyStoreProgram {
				return playKeyStore(args)
			}
			return play(ctx, name, args, stderr)
		})
	}
	os.Exit(runTests(m))
}

func runTests(m *testing.M) int {
	var err error
	if mintedDir, err = os.MkdirTemp("", "coffer-stack-test-"); err != nil {
		panic(err)
	}
	defer func() { _ = os.RemoveAll(mintedDir) }()
	return m.Run()
}

// playKeyStore makes a file that differs each time, where the configuration
// names one.
func playKeyStore(args []string) error {
	if len(args) != 4 || args[0] != "--config" || args[2] != "create" || args[3] != ownKey {
		return fmt.Errorf("unexpected arguments %q", args)
	}
	var c localKeyStoreConfig
	if err := readJSON(args[1], &c); err != nil {
		return err
	}
	if strings.Contains(filepath.Dir(os.Args[0]), "broken-"+keyStoreProgram) {
		return errors.New("this program is broken on purpose")
	}
	return keyfile.Write(c.File, []byte(rand.Text()))
}

// play answers on the port that the configuration names, and nothing more. It
// reads that much of the configuration only: the real daemons check the rest.
func play(ctx context.Context, name string, args []string, stderr io.Writer) error {
	file, err := daemon.ConfigFlag(name, args, stderr)
	if err != nil {
		return err
	}
	var conf struct {
		Listen string
		TLS    daemon.TLS
		Socket string
	}
	if err := readLoosely(file, &conf); err != nil {
		return err
	}
	if strings.Contains(filepath.Dir(os.Args[0]), "broken-"+name) {
		return errors.New("this daemon is broken on purpose")
	}
	if conf.Socket != "" {
		return listenUnix(ctx, conf.Socket)
	}
	tlsConfig, err := conf.TLS.Server()
	if err != nil {
		return err
	}
	return daemon.Serve(ctx, conf.Listen, tlsConfig, http.NotFoundHandler(), daemon.Logger(stderr, name))
}
