// Command coffer-emulator plays the SEV-SNP chip and the GPUs of the embedded
// stack. Evidence it makes is accepted only where a simulation's roots are.
package main

import (
	"context"
	"io"

	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/emulate/server"
)

func main() { daemon.Main(run) }

func run(ctx context.Context, args []string, _ io.Reader, _, stderr io.Writer) error {
	const name = "coffer-emulator"
	path, err := daemon.ConfigFlag(name, args, stderr)
	if err != nil {
		return err
	}
	var cfg server.Config
	if err := daemon.ReadConfig(path, &cfg); err != nil {
		return err
	}
	log := daemon.Logger(stderr, name)
	s, err := server.Load(cfg, log)
	if err != nil {
		return err
	}
	l, err := server.Listen(ctx, cfg.Socket)
	if err != nil {
		return err
	}
	log.InfoContext(ctx, "serving simulated devices", "socket", cfg.Socket, "gpus", cfg.GPUs, "faults", cfg.Faults, "simulated", true)
	return s.Serve(ctx, l)
}
