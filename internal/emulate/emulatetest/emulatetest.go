// Package emulatetest runs the device emulator and the software TPM in tests.
package emulatetest

import (
	"context"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/internal/emulate/server"
	"github.com/coffer-run/coffer/internal/emulate/swtpm"
)

// mint makes the RSA keys of a vendor once for all tests of a package: they take
// seconds.
var mint = sync.OnceValues(func() (*simulate.Vendor, error) {
	return simulate.New(simulate.Options{Product: anchor.Genoa, GPUs: 2, Fast: true})
})

// Vendor returns a simulated chip and two GPUs.
func Vendor(t *testing.T) *simulate.Vendor {
	t.Helper()
	v, err := mint()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// Devices serves the vendor's devices and returns the socket. The
// machine has one GPU if the configuration does not say; its socket and folder
// are not used.
func Devices(t *testing.T, v *simulate.Vendor, cfg server.Config) string {
	t.Helper()
	if cfg.GPUs == 0 {
		cfg.GPUs = 1
	}
	s, err := server.New(cfg, v.Chip(), v.GPUs(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(shortDir(t), "devices")
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	l, err := server.Listen(ctx, socket)
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return socket
}

// TPM is a software TPM that can be switched off and on.
type TPM struct {
	// Socket is where it answers while it is on.
	Socket string
	// CA is the authority of its endorsement certificate, as PEM.
	CA  []byte
	dir string
	cmd *exec.Cmd
}

// NewTPM provisions a software TPM and switches it on. Where swtpm is not
// installed the test is skipped, or fails if CI=true.
func NewTPM(t *testing.T) *TPM {
	t.Helper()
	for _, tool := range []string{"swtpm", "swtpm_setup", "swtpm_localca"} {
		if _, err := exec.LookPath(tool); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatalf("%s is not installed", tool)
			}
			t.Skipf("%s is not installed", tool)
		}
	}
	m := &TPM{dir: filepath.Join(t.TempDir(), "tpm"), Socket: filepath.Join(shortDir(t), "tpm")}
	var err error
	if m.CA, err = swtpm.Provision(t.Context(), m.dir); err != nil {
		t.Fatal(err)
	}
	m.On(t)
	t.Cleanup(m.Off)
	return m
}

// On starts the TPM, which resets it.
func (m *TPM) On(t *testing.T) {
	t.Helper()
	args := swtpm.Args(m.dir, m.Socket)
	m.cmd = exec.Command(args[0], args[1:]...) // #nosec G204 -- fixed program
	m.cmd.Stderr = os.Stderr
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for range 500 {
		// The file is there before the socket listens.
		if conn, err := net.Dial("unix", m.Socket); err == nil {
			_ = conn.Close()
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("swtpm did not open its socket")
}

// Off ends the TPM as a power failure would.
func (m *TPM) Off() {
	_ = m.cmd.Process.Kill()
	_ = m.cmd.Wait()
	_ = os.Remove(m.Socket)
}

// shortDir is a folder whose path leaves room for a socket's name.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "emu")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}
