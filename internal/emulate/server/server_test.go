package server_test

import (
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/internal/emulate"
	"github.com/coffer-run/coffer/internal/emulate/emulatetest"
	"github.com/coffer-run/coffer/internal/emulate/nvml"
	"github.com/coffer-run/coffer/internal/emulate/server"
	"github.com/coffer-run/coffer/plugins/gpu/nvidia"
)

func gpuReport(t *testing.T, c *emulate.Client, v *simulate.Vendor) ([]byte, error) {
	t.Helper()
	resp, err := c.Do(t.Context(), emulate.Request{Op: emulate.OpGPUReport, UUID: v.GPUs()[0].UUID(), Nonce: make([]byte, 32)})
	if err != nil {
		return nil, err
	}
	return resp.Report, nil
}

func TestFlip(t *testing.T) {
	v := emulatetest.Vendor(t)
	t.Run("refused unless configured", func(t *testing.T) {
		c := emulate.Dial(emulatetest.Devices(t, v, server.Config{}))
		if _, err := c.Do(t.Context(), emulate.Request{Op: emulate.OpFlip, Bit: 3}); err == nil || !strings.Contains(err.Error(), "not allowed") {
			t.Errorf("got %v", err)
		}
	})
	c := emulate.Dial(emulatetest.Devices(t, v, server.Config{Faults: true}))
	t.Run("flips one bit of the next report alone", func(t *testing.T) {
		// Bit 8*36 is in the slot, which the simulation sets to zero.
		if _, err := c.Do(t.Context(), emulate.Request{Op: emulate.OpFlip, Bit: 8 * 36}); err != nil {
			t.Fatal(err)
		}
		for i, want := range []byte{1, 0} {
			r, err := gpuReport(t, c, v)
			if err != nil {
				t.Fatal(err)
			}
			if r[36] != want {
				t.Errorf("report %d: byte 36 is %d, want %d", i, r[36], want)
			}
		}
	})
	t.Run("a bit beyond the report fails that report", func(t *testing.T) {
		if _, err := c.Do(t.Context(), emulate.Request{Op: emulate.OpFlip, Bit: 1 << 20}); err != nil {
			t.Fatal(err)
		}
		if _, err := gpuReport(t, c, v); err == nil {
			t.Error("answered")
		}
	})
	t.Run("a negative bit is refused", func(t *testing.T) {
		if _, err := c.Do(t.Context(), emulate.Request{Op: emulate.OpFlip, Bit: -1}); err == nil {
			t.Error("accepted")
		}
	})
}

func TestRollback(t *testing.T) {
	v := emulatetest.Vendor(t)
	if _, err := emulate.Dial(emulatetest.Devices(t, v, server.Config{})).Do(t.Context(), emulate.Request{Op: emulate.OpRollback, Rollback: true}); err == nil || !strings.Contains(err.Error(), "not allowed") {
		t.Errorf("got %v", err)
	}
	c := emulate.Dial(emulatetest.Devices(t, v, server.Config{Faults: true}))
	for _, on := range []bool{false, true, true, false} {
		if _, err := c.Do(t.Context(), emulate.Request{Op: emulate.OpRollback, Rollback: on}); err != nil {
			t.Fatal(err)
		}
		r, err := c.Do(t.Context(), emulate.Request{Op: emulate.OpSNPReport, ReportData: make([]byte, 64)})
		if err != nil {
			t.Fatal(err)
		}
		want := v.Chip().TCB()
		if on {
			want.SNP--
		}
		// REPORTED_TCB (SEV-SNP firmware ABI, table 23).
		if enc := want.Encode(v.Chip().Product()); !bytes.Equal(r.Report[0x180:0x188], enc[:]) {
			t.Errorf("rollback %t: the report says %x, want %x", on, r.Report[0x180:0x188], enc)
		}
	}
}

// What happens to GPUs reaches the plugin above, through NVML's own calls.
func TestGPUEvents(t *testing.T) {
	v := emulatetest.Vendor(t)
	gpu := v.GPUs()[0].UUID()
	for _, r := range []emulate.Request{{Op: emulate.OpXID, UUID: gpu, XID: 79}, {Op: emulate.OpDriver, Driver: "1.2.3"}} {
		if _, err := emulate.Dial(emulatetest.Devices(t, v, server.Config{})).Do(t.Context(), r); err == nil || !strings.Contains(err.Error(), "not allowed") {
			t.Errorf("%s: %v", r.Op, err)
		}
	}
	c := emulate.Dial(emulatetest.Devices(t, v, server.Config{Faults: true}))
	do := func(r emulate.Request) {
		t.Helper()
		if _, err := c.Do(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	do(emulate.Request{Op: emulate.OpXID, UUID: gpu, XID: 31})
	p, err := nvidia.Open(nvml.New(t.Context(), c), true)
	if err != nil {
		t.Fatal(err)
	}
	look := func(faults, last uint64, driver string) {
		t.Helper()
		st, err := p.State(t.Context(), []string{gpu})
		if err != nil || st.Devices[0].Faults != faults || st.Devices[0].LastFault != last || st.DriverVersion != driver {
			t.Errorf("%+v, %v; want %d errors, the last %d, driver %s", st, err, faults, last, driver)
		}
	}
	own := v.GPUs()[0].DriverVersion()
	look(0, 0, own) // what was before is nobody's
	do(emulate.Request{Op: emulate.OpXID, UUID: gpu, XID: 79})
	do(emulate.Request{Op: emulate.OpXID, UUID: gpu, XID: 48})
	look(2, 48, own)
	do(emulate.Request{Op: emulate.OpDriver, Driver: "1.2.3"})
	look(2, 48, "1.2.3")
	do(emulate.Request{Op: emulate.OpDriver})
	look(2, 48, own)
}

func TestRequestsThatAreRefused(t *testing.T) {
	v := emulatetest.Vendor(t)
	socket := emulatetest.Devices(t, v, server.Config{})
	for name, line := range map[string]string{
		"unknown operation":      `{"op":"dump-keys"}`,
		"unknown field":          `{"op":"gpus","verbose":true}`,
		"not JSON":               `gpus`,
		"report data too short":  `{"op":"snp-report","reportData":"AAAA"}`,
		"nonce too short":        `{"op":"gpu-report","nonce":"AAAA"}`,
		"a GPU that is not here": `{"op":"gpu-report","uuid":"GPU-none","nonce":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}`,
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := net.Dial("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close() //nolint:errcheck // a test
			if _, err := conn.Write([]byte(line + "\n")); err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(conn)
			if err != nil {
				t.Fatal(err)
			}
			var resp emulate.Response
			if err := json.Unmarshal(b, &resp); err != nil || resp.Error == "" || resp.Report != nil {
				t.Errorf("answered %s", b)
			}
		})
	}
}

func TestKeysStayInside(t *testing.T) {
	socket := emulatetest.Devices(t, emulatetest.Vendor(t), server.Config{})
	fi, err := os.Stat(socket)
	if err != nil {
		t.Fatal(err)
	}
	if fi.Mode().Perm() != 0o600 {
		t.Errorf("socket has mode %o", fi.Mode().Perm())
	}
	resp, err := emulate.Dial(socket).Do(t.Context(), emulate.Request{Op: emulate.OpGPUs})
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := json.Marshal(resp); bytes.Contains(b, []byte("PRIVATE")) {
		t.Error("a key in the inventory")
	}
	if d := resp.GPUs.Devices[0]; !strings.Contains(d.Name, "simulated") || len(d.Chain) == 0 || len(d.Chain) > 5120 {
		t.Errorf("device %q with %d bytes of certificates: NVML holds 5120", d.Name, len(d.Chain))
	}
}

func TestConfigurations(t *testing.T) {
	v := emulatetest.Vendor(t)
	log := slog.New(slog.DiscardHandler)
	for name, cfg := range map[string]server.Config{
		"more GPUs than there are": {GPUs: 3},
		"fewer than none":          {GPUs: -1},
		"a mode that is none":      {CCMode: "maybe"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := server.New(cfg, v.Chip(), v.GPUs(), log); err == nil {
				t.Error("accepted")
			}
		})
	}
	if _, err := server.New(server.Config{}, nil, nil, log); err == nil {
		t.Error("accepted no chip")
	}
	if _, err := server.Load(server.Config{SimulationDir: t.TempDir()}, log); err == nil {
		t.Error("loaded an empty folder")
	}
	dir := filepath.Join(t.TempDir(), "sim")
	if err := simulate.Mint(dir, simulate.Options{Product: anchor.Genoa, Fast: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := server.Load(server.Config{SimulationDir: dir, GPUs: 1}, log); err != nil {
		t.Error(err)
	}
}

func TestConfiguredMachine(t *testing.T) {
	v := emulatetest.Vendor(t)
	c := emulate.Dial(emulatetest.Devices(t, v, server.Config{CCMode: "off", DriverVersion: "590.48.01"}))
	resp, err := c.Do(t.Context(), emulate.Request{Op: emulate.OpGPUs})
	if err != nil {
		t.Fatal(err)
	}
	if g := resp.GPUs; g.CCMode != "off" || g.DriverVersion != "590.48.01" || g.Devices[0].ProtectedMemoryBytes != 0 {
		t.Errorf("got %+v", g)
	}
	if _, err := gpuReport(t, c, v); err == nil {
		t.Error("a GPU attested with confidential computing off")
	}
}

func TestListen(t *testing.T) {
	v := emulatetest.Vendor(t)
	socket := emulatetest.Devices(t, v, server.Config{})
	if _, err := server.Listen(t.Context(), socket); err == nil || !strings.Contains(err.Error(), "another emulator") {
		t.Errorf("got %v", err)
	}
	left := filepath.Join(filepath.Dir(socket), "left")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: left, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	_ = l.Close()
	again, err := server.Listen(t.Context(), left)
	if err != nil {
		t.Fatal(err)
	}
	_ = again.Close()
}
