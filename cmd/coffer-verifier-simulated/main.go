// Command coffer-verifier-simulated appraises evidence against the trust anchors
// of one simulation. Everything that it signs says that it is simulated.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/verifierd"
)

const name = "coffer-verifier-simulated"

// Config is the daemon's configuration file.
type Config struct {
	verifierd.Config
	// SimulationDir is a folder that attest/simulate minted; its roots are read.
	SimulationDir string `json:"simulationDir"`
}

func main() { daemon.Main(run) }

func run(ctx context.Context, args []string, _ io.Reader, _, stderr io.Writer) error {
	path, err := daemon.ConfigFlag(name, args, stderr)
	if err != nil {
		return err
	}
	read := func() (c Config, err error) {
		err = daemon.ReadConfig(path, &c)
		return c, err
	}
	c, err := read()
	if err != nil {
		return err
	}
	switch {
	case c.SimulationDir == "":
		return fmt.Errorf("configuration %s: simulationDir is required", path)
	case !strings.Contains(c.ID, "simulated"):
		// The name is in every result: readers see it before any claim.
		return fmt.Errorf("configuration %s: id %.80q must say \"simulated\"", path, c.ID)
	}
	anchors, err := simulate.LoadRoots(c.SimulationDir)
	if err != nil {
		return err
	}
	if !anchors.Simulated() {
		return errors.New("the simulation's anchors are not a simulation's")
	}
	shared := func() (verifierd.Config, error) {
		c, err := read()
		return c.Config, err
	}
	return verifierd.Run(ctx, name, shared, anchors, []string{"simulation", "production", "cpu-only"}, stderr)
}
