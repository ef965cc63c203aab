package main

import (
	"bytes"
	"errors"
	"flag"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/internal/emulate"
	"github.com/coffer-run/coffer/internal/emulate/emulatetest"
	"github.com/coffer-run/coffer/internal/emulate/nvml"
	"github.com/coffer-run/coffer/internal/emulate/server"
	"github.com/coffer-run/coffer/plugins/contract"
	"github.com/coffer-run/coffer/plugins/contract/contracttest"
	"github.com/coffer-run/coffer/plugins/gpu/nvidia"
	"github.com/coffer-run/coffer/plugins/host"
)

// build makes the plugin as the Makefile does: cgo, and lazy binding, because
// the driver's library is looked for only when the plugin runs.
func build(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "coffer-gpu-nvidia")
	cmd := exec.Command("go", "build", "-ldflags=-extldflags=-Wl,-z,lazy", "-o", path, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v: %s", err, out)
	}
	return path
}

func start(t *testing.T, path string, args ...string) (*host.GPU, error) {
	t.Helper()
	sum, err := host.Checksum(path)
	if err != nil {
		t.Fatal(err)
	}
	g, err := host.StartGPU(t.Context(), host.Config{Path: path, SHA256: sum, Args: args}, host.Options{})
	if err == nil {
		t.Cleanup(func() { _ = g.Close() })
	}
	return g, err
}

func TestConformance(t *testing.T) {
	v := emulatetest.Vendor(t)
	socket := emulatetest.Devices(t, v, server.Config{GPUs: 2})

	t.Run("in process", func(t *testing.T) {
		p, err := nvidia.Open(nvml.New(t.Context(), emulate.Dial(socket)), true)
		if err != nil {
			t.Fatal(err)
		}
		contracttest.Run(t, contracttest.Served(t, p))
	})

	path := build(t)
	t.Run("out of process", func(t *testing.T) {
		g, err := start(t, path, "--emulated", socket)
		if err != nil {
			t.Fatal(err)
		}
		contracttest.Run(t, g)
		inv, err := g.Inventory(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if !inv.Simulated || len(inv.Devices) != 2 || !strings.Contains(inv.Devices[0].Name, "simulated") {
			t.Errorf("inventory %+v", inv)
		}
		evs, err := g.Collect(t.Context(), [32]byte{1}, []string{v.GPUs()[0].UUID()})
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(evs[0].Chain, v.GPUs()[0].ChainPEM()) {
			t.Error("the certificates changed on their way")
		}
	})
	t.Run("no emulator", func(t *testing.T) {
		_, err := start(t, path, "--emulated", filepath.Join(t.TempDir(), "none"))
		if err == nil || !strings.Contains(err.Error(), "open NVML") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("no driver", func(t *testing.T) {
		if _, err := os.Stat("/proc/driver/nvidia/version"); err == nil {
			t.Skip("this machine has the driver")
		}
		_, err := start(t, path)
		if err == nil || !strings.Contains(err.Error(), "open NVML") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("devtools mode is named", func(t *testing.T) {
		g, err := start(t, path, "--emulated", emulatetest.Devices(t, v, server.Config{CCMode: "devtools"}))
		if err != nil {
			t.Fatal(err)
		}
		inv, err := g.Inventory(t.Context())
		if err != nil || inv.CCMode != contract.CCDevtools {
			t.Errorf("got %+v, %v", inv, err)
		}
		if err := g.SetReady(t.Context(), true); err == nil {
			t.Error("GPUs are ready in devtools mode")
		}
	})
	t.Run("confidential computing is off", func(t *testing.T) {
		g, err := start(t, path, "--emulated", emulatetest.Devices(t, v, server.Config{CCMode: "off"}))
		if err != nil {
			t.Fatal(err)
		}
		inv, err := g.Inventory(t.Context())
		if err != nil || inv.CCMode != contract.CCOff || inv.Ready {
			t.Errorf("got %+v, %v", inv, err)
		}
		if _, err := g.Collect(t.Context(), [32]byte{1}, []string{v.GPUs()[0].UUID()}); err == nil {
			t.Error("a GPU attested")
		}
	})
}

func TestArguments(t *testing.T) {
	if err := run(t.Context(), []string{"extra"}, nil, io.Discard, io.Discard); err == nil {
		t.Error("accepted an argument")
	}
	if err := run(t.Context(), []string{"--help"}, nil, io.Discard, io.Discard); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("got %v", err)
	}
}
