// Command cofferd is the node agent: it takes jobs, orders their stages and
// gathers their evidence. It holds no key and links no code that could.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/enclave/collect"
	"github.com/coffer-run/coffer/enclave/collect/tpm"
	"github.com/coffer-run/coffer/enclave/collect/tsm"
	"github.com/coffer-run/coffer/enclave/device"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/emulate"
	"github.com/coffer-run/coffer/plugins/contract"
	"github.com/coffer-run/coffer/plugins/host"
	"github.com/coffer-run/coffer/runner"
	"github.com/coffer-run/coffer/runner/bootkey"
	"github.com/coffer-run/coffer/runner/journal"
	"github.com/coffer-run/coffer/runner/logs"
	"github.com/coffer-run/coffer/runner/remote"
	"github.com/coffer-run/coffer/runner/rules"
	"github.com/coffer-run/coffer/runner/sandbox"
	"github.com/coffer-run/coffer/runner/server"
)

func main() { daemon.Main(run) }

func run(ctx context.Context, args []string, _ io.Reader, _, stderr io.Writer) (err error) {
	path, err := daemon.ConfigFlag("cofferd", args, stderr)
	if err != nil {
		return err
	}
	var cfg Config
	if err := daemon.ReadConfig(path, &cfg); err != nil {
		return err
	}
	if err := cfg.validate(); err != nil {
		return err
	}
	log := daemon.Logger(stderr, "cofferd")
	lock, err := lockState(cfg.StateDir)
	if err != nil {
		return err
	}
	defer closing(&err, lock)

	t, err := tpm.Open(ctx, cfg.TPM, tpm.Options{FirmwareLog: cfg.FirmwareLog, Paravisor: cfg.TSM == paravisorTSM})
	if err != nil {
		return err
	}
	defer closing(&err, t)
	if err := measure(ctx, cfg, path, t); err != nil {
		return err
	}
	plugin, err := host.StartGPU(ctx, cfg.GPUPlugin, host.Options{SocketDir: cfg.RunDir, Log: log})
	if err != nil {
		return err
	}
	defer closing(&err, plugin)
	inventory, err := plugin.Inventory(ctx)
	if err != nil {
		return err
	}
	collector := &collect.Collector{TPM: t}
	if cfg.TSM == paravisorTSM {
		collector.Paravisor = t
	} else if collector.SNP, err = openTSM(cfg.TSM); err != nil {
		return err
	}
	network, networkProfile, err := cfg.Egress.open()
	if err != nil {
		return err
	}
	set, err := cfg.rules()
	if err != nil {
		return err
	}
	told, err := cfg.Alerts.open(log) //nolint:contextcheck // it is closed at the end, not by the call's
	if err != nil {
		return err
	}
	defer closeAlerts(told) //nolint:contextcheck // what is queued outlives the call
	images, signers, err := cfg.Images.open()
	if err != nil {
		return err
	}
	node, err := sandbox.Open(ctx, sandbox.Config{Containerd: cfg.Containerd, Runsc: cfg.Runsc, ShimPath: cfg.Shim, Cgroup: cfg.Cgroup, ImageStore: cfg.ImageStore, ImageBytes: cfg.Images.unpacked(), ImageSigners: signers, GPUs: gpuDevices(cfg, inventory.DriverVersion), Egress: networkProfile, Rules: set.Digest(), Opens: set.Needs(rules.Open)})
	if err != nil {
		return err
	}
	defer closing(&err, node)
	verifier, broker, err := services(cfg)
	if err != nil {
		return err
	}
	jnl, err := journal.Open(filepath.Join(cfg.StateDir, "journal.db"))
	if err != nil {
		return err
	}
	defer closing(&err, jnl)
	inputs, err := cfg.cache(log)
	if err != nil {
		return err
	}
	if inputs != nil {
		defer closing(&err, inputs)
	}
	sinks, err := cfg.sinks(inputs, log)
	if err != nil {
		return err
	}
	if sinks != nil {
		defer closing(&err, sinks)
	}
	kept, values, err := keep(ctx, cfg, log)
	if err != nil {
		return err
	}
	gpus := gpuSource{plugin}
	collector.GPUs = gpus
	credential := (&enrolment{tpm: t, verifier: verifier}).credential
	if cfg.TSM == paravisorTSM {
		// The paravisor's report stands for its key.
		credential = func(context.Context) (string, error) { return "", nil }
	}
	agent, err := runner.Open(ctx, runner.Deps{
		Node: node, Journal: jnl, Verifier: verifier, Broker: broker, GPUs: gpus, AKCredential: credential,
		Collector: collector,
		Cache:     inputs,
		Sinks:     sinks,
		Images:    images,
		Egress:    network,
		Rules:     set, Alerts: told,
		Room: cfg.Capacity, Queues: cfg.Queues, WarmRegions: cfg.WarmRegions, Logs: kept, Values: values,
		Holder: cfg.Holder, RunDir: cfg.RunDir, Cgroup: cfg.Cgroup, Name: cfg.Node, Version: version(), Log: log,
	})
	if err != nil {
		return err
	}
	defer agent.Close()

	who, tlsConfig, err := newCallers(cfg)
	if err != nil {
		return err
	}
	handler, err := server.New(agent, server.GPUInfo{Driver: inventory.DriverVersion, CCMode: string(inventory.CCMode)}, who.identify, server.DefaultLimits(), log)
	if err != nil {
		return err
	}
	log.InfoContext(ctx, "ready", slog.String("listen", cfg.Listen), slog.String("node", cfg.Node), slog.Int("gpus", len(inventory.Devices)))
	return daemon.Serve(ctx, cfg.Listen, tlsConfig, handler, log)
}

// keep opens what is sealed under the key of this boot. A kernel without keyrings
// has a key for this process alone: then what jobs print is readable for as long as
// the agent runs, and jobs that wait do not survive it.
func keep(ctx context.Context, cfg Config, log *slog.Logger) (*logs.Store, *runner.Values, error) {
	var values *runner.Values
	key, err := bootkey.Get("coffer-agent:" + cfg.StateDir)
	if err != nil {
		log.WarnContext(ctx, "nothing that is sealed outlives this process", slog.Any("error", err))
		key = bootkey.New()
	} else if values, err = runner.OpenValues(filepath.Join(cfg.StateDir, "values"), key); err != nil {
		return nil, nil, err
	}
	kept, err := logs.Open(filepath.Join(cfg.StateDir, "logs"), key, cmp.Or(cfg.LogBytes, logs.DefaultMaxBytes))
	return kept, values, err
}

// lockState keeps a second agent off the same state: two would take each other's
// jobs for leftovers. The kernel drops the lock when the process ends.
func lockState(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock state: %w", err)
	}
	// A killed agent's last threads may hold the lock a moment longer.
	for deadline := time.Now().Add(lockPatience); ; time.Sleep(lockPatience / 50) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(deadline) {
			return nil, errors.Join(fmt.Errorf("another agent runs on %s: %w", dir, err), f.Close())
		}
	}
}

const lockPatience = 2 * time.Second

func closing(err *error, c io.Closer) { *err = errors.Join(*err, c.Close()) }

// measure extends the TPM with what decides how jobs run, before any job does.
func measure(ctx context.Context, cfg Config, configFile string, t *tpm.TPM) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find own binary: %w", err)
	}
	files := []tpm.File{
		{Name: "agent", Path: self}, {Name: "holder", Path: cfg.Holder}, {Name: "runsc", Path: cfg.Runsc}, {Name: "shim", Path: cfg.Shim},
		{Name: "gpu-plugin", Path: cfg.GPUPlugin.Path}, {Name: "configuration", Path: configFile},
	}
	if cfg.Egress != nil {
		files = append(files, tpm.File{Name: "gateway", Path: cfg.Egress.Gateway})
	}
	events, err := tpm.Events(files)
	if err != nil {
		return err
	}
	_, err = t.Measure(ctx, filepath.Join(cfg.StateDir, "event-log"), events)
	return err
}

func openTSM(where string) (*tsm.Source, error) {
	if socket, ok := strings.CutPrefix(where, emulatedPrefix); ok {
		return tsm.New(emulate.NewTSM(emulate.Dial(socket))), nil
	}
	return tsm.Open()
}

func services(cfg Config) (*remote.Verifier, *remote.Broker, error) {
	service := func(s Service, role string) (remote.Service, error) {
		jwks, err := os.ReadFile(s.KeysFile)
		if err != nil {
			return remote.Service{}, fmt.Errorf("read keys of %s: %w", s.ID, err)
		}
		client, err := cfg.TLS.HTTPClient(role)
		if err != nil {
			return remote.Service{}, err
		}
		return remote.Service{URL: s.URL, ID: s.ID, HTTP: client, JWKS: jwks}, nil
	}
	vs, err := service(cfg.Verifier, daemon.RoleVerifier)
	if err != nil {
		return nil, nil, err
	}
	verifier, err := remote.NewVerifier(vs)
	if err != nil {
		return nil, nil, err
	}
	bs, err := service(cfg.Broker, daemon.RoleBroker)
	if err != nil {
		return nil, nil, err
	}
	broker, err := remote.NewBroker(bs)
	return verifier, broker, err
}

// gpuSource is the GPU plugin as the collector and the runner see it.
type gpuSource struct{ plugin *host.GPU }

func (g gpuSource) Collect(ctx context.Context, nonce [32]byte, uuids []string) ([]evidence.GPU, error) {
	got, err := g.plugin.Collect(ctx, nonce, uuids)
	if err != nil {
		return nil, err
	}
	out := make([]evidence.GPU, 0, len(got))
	for _, e := range got {
		out = append(out, evidence.GPU{UUID: e.UUID, Report: e.Report, Chain: e.Chain, DriverVersion: e.DriverVersion, VBIOSVersion: e.VBIOSVersion})
	}
	return out, nil
}

func (g gpuSource) UUIDs(ctx context.Context) ([]string, error) {
	inv, err := g.plugin.Inventory(ctx)
	if err != nil {
		return nil, err
	}
	// Evidence of a GPU outside confidential mode cannot be had, and DevTools
	// mode is for debugging: neither may hold a job's data.
	if len(inv.Devices) > 0 && inv.CCMode != contract.CCOn {
		return nil, fmt.Errorf("GPUs are in confidential-computing mode %q, want %q", inv.CCMode, contract.CCOn)
	}
	var out []string
	for _, d := range inv.Devices {
		out = append(out, d.UUID)
	}
	return out, nil
}

func (g gpuSource) SetReady(ctx context.Context, ready bool) error {
	return g.plugin.SetReady(ctx, ready)
}

func (g gpuSource) State(ctx context.Context, uuids []string) (device.State, error) {
	st, err := g.plugin.State(ctx, uuids)
	if err != nil {
		return device.State{}, err
	}
	out := device.State{Mode: device.Mode(st.CCMode), Driver: st.DriverVersion, Ready: st.Ready, AttackerAdvantage: st.AttackerAdvantage}
	for _, d := range st.Devices {
		out.GPUs = append(out.GPUs, device.GPU(d))
	}
	return out, nil
}

func (g gpuSource) Prepare(ctx context.Context, uuids []string, s device.Settings) error {
	return g.plugin.Prepare(ctx, uuids, contract.Settings{UnprotectedBytes: s.UnprotectedBytes, MaxAttackerAdvantage: s.AttackerAdvantage})
}

func (g gpuSource) Clear(ctx context.Context, uuids []string) error {
	return g.plugin.Clear(ctx, uuids)
}

// renewAfter is half of an attestation key credential's life.
const renewAfter = 12 * time.Hour

// enrolment keeps the credential of the TPM's attestation key current.
type enrolment struct {
	tpm      *tpm.TPM
	verifier *remote.Verifier

	mu    sync.Mutex // guards what follows
	token string
	since time.Time
}

func (e *enrolment) credential(ctx context.Context) (string, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.token != "" && time.Since(e.since) < renewAfter {
		return e.token, nil
	}
	chain, err := e.tpm.EKChain(ctx)
	if err != nil {
		return "", err
	}
	token, err := e.verifier.Enrol(ctx, chain, e.tpm.AKPublic(), e.tpm.Activate)
	if err != nil {
		return "", err
	}
	e.token, e.since = token, time.Now()
	return token, nil
}

// version is the module's, as the toolchain recorded it.
func version() string {
	if bi, ok := debug.ReadBuildInfo(); ok {
		return "cofferd " + bi.Main.Version + " " + bi.GoVersion
	}
	return "cofferd"
}

// gpuDevices is nil unless the configuration gives sandboxes GPU devices.
func gpuDevices(cfg Config, driver string) *sandbox.GPUs {
	if len(cfg.GPUSpecs) == 0 {
		return nil
	}
	return &sandbox.GPUs{Driver: driver, SpecDirs: cfg.GPUSpecs}
}
