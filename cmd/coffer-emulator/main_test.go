package main

import (
	"context"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/internal/emulate"
	"github.com/coffer-run/coffer/internal/emulate/server"
)

func TestServesUntilItIsStopped(t *testing.T) {
	dir, err := os.MkdirTemp("", "emu")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	sim := filepath.Join(dir, "sim")
	if err := simulate.Mint(sim, simulate.Options{Product: anchor.Genoa, Fast: true}); err != nil {
		t.Fatal(err)
	}
	socket, path := filepath.Join(dir, "s"), filepath.Join(dir, "config.json")
	b, err := json.Marshal(server.Config{SimulationDir: sim, Socket: socket, GPUs: 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- run(ctx, []string{"--config", path}, nil, io.Discard, io.Discard) }()
	var resp *emulate.Response
	for range 6000 {
		if resp, err = emulate.Dial(socket).Do(t.Context(), emulate.Request{Op: emulate.OpSNPReport, ReportData: make([]byte, 64)}); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil || len(resp.Report) != 1184 {
		t.Errorf("report: %v", err)
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(socket); err == nil {
		t.Error("the socket is left behind")
	}
}

func TestConfigurationsThatAreRefused(t *testing.T) {
	for name, c := range map[string]struct{ config, want string }{
		"unknown field": {`{"simulationDir":"x","socket":"y","gpus":1,"trustMe":true}`, "trustMe"},
		"no simulation": {`{"simulationDir":"/none","socket":"y","gpus":1}`, "load simulated devices"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "config.json")
			if err := os.WriteFile(path, []byte(c.config), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := run(t.Context(), []string{"--config", path}, nil, io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v", err)
			}
		})
	}
	if err := run(t.Context(), nil, nil, io.Discard, io.Discard); err == nil {
		t.Error("ran without a configuration")
	}
}
