package host_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/coffer-run/coffer/plugins/contract"
	"github.com/coffer-run/coffer/plugins/host"
	"github.com/coffer-run/coffer/plugins/kit"
)

// TestMain makes this test's own binary a plugin when it is started as one, with
// the behaviour named by its argument.
func TestMain(m *testing.M) {
	if os.Getenv(asHost) != "" {
		os.Exit(hostAlone())
	}
	if os.Getenv(contract.Handshake().MagicCookieKey) == "" {
		os.Exit(m.Run())
	}
	switch arg := os.Args[len(os.Args)-1]; arg {
	case "exits":
		_, _ = fmt.Fprintln(os.Stderr, "no driver here")
	case "never-ready":
		time.Sleep(time.Hour)
	case "garbage":
		fmt.Println("1|1|tcp|127.0.0.1:1|grpc")
		time.Sleep(time.Hour)
	default:
		if behaviour, ok := strings.CutPrefix(arg, "keystore-"); ok {
			if err := kit.ServeKeyStore(hostile(behaviour), os.Stderr); err != nil {
				_, _ = fmt.Fprintln(os.Stderr, err)
			}
			os.Exit(1)
		}
		if err := kit.ServeGPU(fake(arg), os.Stderr); err != nil {
			_, _ = fmt.Fprintln(os.Stderr, err)
		}
	}
	os.Exit(1)
}

// fake is a plugin that misbehaves in one way.
type fake string

func (f fake) Inventory(ctx context.Context) (*contract.Inventory, error) {
	inv := &contract.Inventory{DriverVersion: strconv.Itoa(os.Getpid()), CCMode: contract.CCOn, Devices: []contract.Device{{UUID: "GPU-1", Name: "fake", VBIOSVersion: "1", MemoryBytes: 1}}}
	switch f {
	case "hangs":
		<-ctx.Done()
		time.Sleep(time.Hour)
	case "crashes":
		os.Exit(3)
	case "fails":
		return nil, errors.New("the driver said no")
	case "too-much":
		for range 4096 {
			inv.Devices = append(inv.Devices, contract.Device{UUID: strings.Repeat("x", 1024)})
		}
	case "environment":
		inv.DriverVersion = fmt.Sprint(len(os.Getenv("SECRET")), len(os.Getenv("GIVEN")))
	}
	return inv, nil
}

func (f fake) Collect(_ context.Context, nonce [32]byte, uuids []string) ([]contract.Evidence, error) {
	var out []contract.Evidence
	for _, u := range uuids {
		out = append(out, contract.Evidence{UUID: u, Report: nonce[:], Chain: []byte("chain"), DriverVersion: "1", VBIOSVersion: "1"})
	}
	return out, nil
}

func (f fake) SetReady(context.Context, bool) error {
	if f == "fails" {
		return errors.New("the driver said no")
	}
	return nil
}

func (fake) State(context.Context, []string) (*contract.State, error) {
	return nil, errors.New("not here")
}

func (fake) Prepare(context.Context, []string, contract.Settings) error {
	return errors.New("not here")
}

func (fake) Clear(context.Context, []string) error { return errors.New("not here") }

// asHost in the environment makes this binary a host that waits to be killed.
const asHost = "COFFER_TEST_AS_HOST"

func hostAlone() int {
	path, err := os.Executable()
	if err != nil {
		return 1
	}
	sum, err := host.Checksum(path)
	if err != nil {
		return 1
	}
	ctx := context.Background()
	g, err := host.StartGPU(ctx, host.Config{Path: path, SHA256: sum, Args: []string{"well"}}, host.Options{SocketDir: os.Getenv(asHost)})
	if err != nil {
		return 1
	}
	inv, err := g.Inventory(ctx)
	if err != nil {
		return 1
	}
	fmt.Println(inv.DriverVersion)
	time.Sleep(time.Hour)
	return 0
}

func TestHostIsKilled(t *testing.T) {
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path)
	cmd.Env = append(os.Environ(), asHost+"="+t.TempDir())
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var plugin int
	_, scanErr := fmt.Fscan(out, &plugin)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if scanErr != nil {
		t.Fatal(scanErr)
	}
	if !gone(plugin) {
		_ = syscall.Kill(plugin, syscall.SIGKILL)
		t.Error("the plugin outlives its host")
	}
}

// own returns a configuration for this test's binary.
func own(t *testing.T, behaviour string) host.Config {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	sum, err := host.Checksum(path)
	if err != nil {
		t.Fatal(err)
	}
	return host.Config{Path: path, SHA256: sum, Args: []string{behaviour}}
}

func start(t *testing.T, behaviour string, o host.Options) *host.GPU {
	t.Helper()
	g, err := host.StartGPU(t.Context(), own(t, behaviour), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = g.Close() })
	return g
}

func pid(t *testing.T, g *host.GPU) int {
	t.Helper()
	inv, err := g.Inventory(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(inv.DriverVersion)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// state is a process's state as the kernel's letter, or nothing.
func state(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	// It follows the name, which is in parentheses.
	_, after, found := strings.Cut(string(b), ") ")
	if err != nil || !found {
		return ""
	}
	return after[:1]
}

// gone waits until a process has ended: it is no more, or nobody has asked yet how
// it ended, which a first process of a container may never do.
func gone(pid int) bool {
	for range 6000 {
		if state(pid) == "" || state(pid) == "Z" {
			return true
		}
		time.Sleep(10 * time.Millisecond)
	}
	return false
}

func TestWellBehaved(t *testing.T) {
	dir := t.TempDir()
	g := start(t, "well", host.Options{SocketDir: dir})
	p := pid(t, g)
	if sockets, err := os.ReadDir(dir); err != nil || len(sockets) != 1 {
		t.Errorf("socket folder holds %v, %v", sockets, err)
	}
	evs, err := g.Collect(t.Context(), [32]byte{5}, []string{"a", "b"})
	if err != nil || len(evs) != 2 || evs[1].UUID != "b" || evs[1].Report[0] != 5 {
		t.Errorf("got %v, %v", evs, err)
	}
	if err := g.SetReady(t.Context(), true); err != nil {
		t.Error(err)
	}
	if err := g.Close(); err != nil {
		t.Error(err)
	}
	if !gone(p) {
		t.Error("the plugin lives on after Close")
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("Close left %v, %v", left, err)
	}
	if _, err := g.Inventory(t.Context()); !errors.Is(err, host.ErrDied) {
		t.Errorf("after Close: %v", err)
	}
}

func TestEnvironmentIsNotInherited(t *testing.T) {
	t.Setenv("SECRET", "secret")
	g := start(t, "environment", host.Options{Env: []string{"GIVEN=1"}})
	inv, err := g.Inventory(t.Context())
	if err != nil || inv.DriverVersion != "0 1" {
		t.Errorf("got %v, %v", inv, err)
	}
}

func TestChecksum(t *testing.T) {
	good := own(t, "well")
	other := good
	other.Path = filepath.Join(t.TempDir(), "plugin")
	b, err := os.ReadFile(good.Path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-1] ^= 1
	if err := os.WriteFile(other.Path, b, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, cfg := range map[string]host.Config{
		"none":                     {Path: good.Path},
		"too short":                {Path: good.Path, SHA256: good.SHA256[:62]},
		"not hex":                  {Path: good.Path, SHA256: strings.Repeat("g", 64)},
		"of another file":          {Path: good.Path, SHA256: strings.Repeat("0", 64)},
		"of the file before a bit": other,
	} {
		t.Run(name, func(t *testing.T) {
			g, err := host.StartGPU(t.Context(), cfg, host.Options{})
			if g != nil || !errors.Is(err, host.ErrChecksum) {
				t.Errorf("got %v, %v", g, err)
			}
		})
	}
	t.Run("no file", func(t *testing.T) {
		if _, err := host.StartGPU(t.Context(), host.Config{Path: "/none", SHA256: good.SHA256}, host.Options{}); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("got %v", err)
		}
	})
}

func TestReplacedWhileItRuns(t *testing.T) {
	cfg := own(t, "well")
	b, err := os.ReadFile(cfg.Path)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Path = filepath.Join(t.TempDir(), "plugin")
	if err := os.WriteFile(cfg.Path, b, 0o700); err != nil {
		t.Fatal(err)
	}
	g, err := host.StartGPU(t.Context(), cfg, host.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = g.Close() })
	// ETXTBSY would say that the file itself runs.
	if err := os.WriteFile(cfg.Path, []byte("#!/bin/sh\n"), 0o700); err != nil {
		t.Errorf("the file at Path is what runs: %v", err)
	}
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid(t, g)))
	if err != nil || !strings.HasPrefix(exe, "/memfd:") {
		t.Errorf("runs %q, %v", exe, err)
	}
}

func TestStartsThatFail(t *testing.T) {
	for behaviour, want := range map[string]struct {
		says  string
		start time.Duration
	}{
		"exits":       {"no driver here", time.Minute},
		"never-ready": {"timeout", 2 * time.Second},
		"garbage":     {"", time.Minute},
	} {
		t.Run(behaviour, func(t *testing.T) {
			dir := t.TempDir()
			g, err := host.StartGPU(t.Context(), own(t, behaviour), host.Options{Start: want.start, SocketDir: dir})
			if err == nil {
				_, err = g.Inventory(t.Context())
				_ = g.Close()
			}
			if err == nil || !strings.Contains(err.Error(), want.says) {
				t.Errorf("got %v", err)
			}
			if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
				t.Errorf("it left %v, %v", left, err)
			}
		})
	}
	t.Run("the caller gives up", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		if _, err := host.StartGPU(ctx, own(t, "never-ready"), host.Options{Start: time.Hour}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	})
}

func TestHangs(t *testing.T) {
	g := start(t, "hangs", host.Options{Call: 200 * time.Millisecond})
	if _, err := g.Inventory(t.Context()); !errors.Is(err, host.ErrTimeout) {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := g.Inventory(ctx); !errors.Is(err, context.Canceled) || errors.Is(err, host.ErrTimeout) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestStopped(t *testing.T) {
	g := start(t, "well", host.Options{Call: 2 * time.Second})
	p := pid(t, g)
	if err := syscall.Kill(p, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for i := 0; state(p) != "T" && i < 6000; i++ {
		time.Sleep(10 * time.Millisecond)
	}
	if _, err := g.Collect(t.Context(), [32]byte{}, []string{"a"}); !errors.Is(err, host.ErrTimeout) {
		t.Errorf("got %v", err)
	}
	_ = g.Close()
	if !gone(p) {
		t.Error("a stopped plugin outlives Close")
	}
}

func TestCrashes(t *testing.T) {
	g := start(t, "crashes", host.Options{})
	for range 2 {
		if _, err := g.Inventory(t.Context()); !errors.Is(err, host.ErrDied) {
			t.Errorf("got %v", err)
		}
	}
	g = start(t, "well", host.Options{})
	if err := syscall.Kill(pid(t, g), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Collect(t.Context(), [32]byte{}, []string{"a"}); !errors.Is(err, host.ErrDied) {
		t.Errorf("killed: %v", err)
	}
}

func TestFailureKeepsItsText(t *testing.T) {
	g := start(t, "fails", host.Options{})
	_, err := g.Inventory(t.Context())
	for _, err := range []error{err, g.SetReady(t.Context(), true)} {
		if err == nil || !strings.Contains(err.Error(), "the driver said no") || errors.Is(err, host.ErrDied) || errors.Is(err, host.ErrTimeout) {
			t.Errorf("got %v", err)
		}
	}
}

func TestAnswersTooMuch(t *testing.T) {
	if inv, err := start(t, "too-much", host.Options{}).Inventory(t.Context()); err == nil || errors.Is(err, host.ErrDied) {
		t.Errorf("%d devices, %v", len(inv.Devices), err)
	}
}

func TestConcurrentCalls(t *testing.T) {
	g := start(t, "well", host.Options{})
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			evs, err := g.Collect(t.Context(), [32]byte{byte(i)}, []string{"a"})
			if err != nil || evs[0].Report[0] != byte(i) {
				t.Errorf("got %v, %v", evs, err)
			}
		})
	}
	wg.Wait()
}

func TestPluginStartedByHand(t *testing.T) {
	if err := kit.ServeGPU(fake("well"), io.Discard); err == nil || !strings.Contains(err.Error(), "cofferd") {
		t.Errorf("got %v", err)
	}
	hs := contract.Handshake()
	t.Setenv(hs.MagicCookieKey, hs.MagicCookieValue)
	if err := kit.ServeGPU(fake("well"), io.Discard); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("got %v", err)
	}
	t.Setenv("PLUGIN_CLIENT_CERT", "x")
	if err := kit.ServeGPU(fake("well"), io.Discard); err == nil || !strings.Contains(err.Error(), contract.LifelineEnv) {
		t.Errorf("got %v", err)
	}
	if err := kit.ServeGPU(nil, io.Discard); err == nil {
		t.Error("served nothing")
	}
}
