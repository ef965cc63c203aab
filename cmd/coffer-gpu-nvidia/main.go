// Command coffer-gpu-nvidia is the GPU plugin for NVIDIA GPUs. cofferd starts it.
package main

import (
	"context"
	"errors"
	"flag"
	"io"

	gonvml "github.com/NVIDIA/go-nvml/pkg/nvml"

	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/emulate"
	"github.com/coffer-run/coffer/internal/emulate/nvml"
	"github.com/coffer-run/coffer/plugins/gpu/nvidia"
	"github.com/coffer-run/coffer/plugins/kit"
)

func main() { daemon.Main(run) }

func run(ctx context.Context, args []string, _ io.Reader, _, stderr io.Writer) error {
	fs := flag.NewFlagSet("coffer-gpu-nvidia", flag.ContinueOnError)
	fs.SetOutput(stderr)
	emulated := fs.String("emulated", "", "use the GPUs of the device emulator at `socket`")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() > 0 {
		return errors.New("usage: coffer-gpu-nvidia [--emulated SOCKET]")
	}
	lib := gonvml.New()
	if *emulated != "" {
		lib = nvml.New(ctx, emulate.Dial(*emulated))
	}
	p, err := nvidia.Open(lib, *emulated != "")
	if err != nil {
		return err
	}
	return errors.Join(kit.ServeGPU(p, stderr), p.Close())
}
