// Command coffer-verifier appraises evidence against the vendors' trust anchors
// and signs attestation results.
//
// It holds no code that can load a simulation's anchors, and it does not start
// with a policy that accepts them.
package main

import (
	"context"
	"io"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/verifierd"
)

const name = "coffer-verifier"

func main() { daemon.Main(run) }

func run(ctx context.Context, args []string, _ io.Reader, _, stderr io.Writer) error {
	path, err := daemon.ConfigFlag(name, args, stderr)
	if err != nil {
		return err
	}
	read := func() (c verifierd.Config, err error) {
		err = daemon.ReadConfig(path, &c)
		return c, err
	}
	return verifierd.Run(ctx, name, read, anchor.Vendor(), []string{"production", "cpu-only"}, stderr)
}
