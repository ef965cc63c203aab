// Package server is the emulator's side of internal/emulate: it holds the
// simulated chip's and GPUs' keys and answers for them.
package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/internal/emulate"
)

const (
	// hopperMemory is that of an H100 with 80 GB, as NVML gives it.
	hopperMemory = 85520809984
	// maxConns bounds concurrent requests; more wait in the socket's queue.
	maxConns = 64
)

// Config is the emulator's configuration.
type Config struct {
	// SimulationDir is what attest/simulate.Mint made.
	SimulationDir string `json:"simulationDir"`
	// Socket is where requests are answered.
	Socket string `json:"socket"`
	// GPUs is how many of the simulation's GPUs this machine has.
	GPUs int `json:"gpus"`
	// DriverVersion replaces the one that the GPUs were minted with.
	DriverVersion string `json:"driverVersion,omitempty"`
	// CCMode is "on", "off" or "devtools". Empty means on.
	CCMode string `json:"ccMode,omitempty"`
	// Faults allows attacks on the evidence, for tests and demonstrations.
	Faults bool `json:"faults,omitempty"`
}

// Server answers for one machine's devices.
type Server struct {
	chip *simulate.Chip
	gpus []*simulate.GPU
	cfg  Config
	log  *slog.Logger

	// mu guards what follows.
	mu    sync.Mutex
	ready bool
	// flip is the bit to flip in the next GPU report; negative for none.
	flip int
	// rollback is that the chip reports older firmware than it has.
	rollback bool
	// driver replaces the configured version; empty does not.
	driver string
	// advantage and devices are what was set, devices by UUID.
	advantage uint64
	devices   map[string]*deviceState
}

// Load makes a Server from the configuration's simulation folder.
func Load(cfg Config, log *slog.Logger) (*Server, error) {
	chip, gpus, err := simulate.LoadDevices(cfg.SimulationDir)
	if err != nil {
		return nil, fmt.Errorf("load simulated devices: %w", err)
	}
	return New(cfg, chip, gpus, log)
}

// New makes a Server for devices at hand.
func New(cfg Config, chip *simulate.Chip, gpus []*simulate.GPU, log *slog.Logger) (*Server, error) {
	switch cfg.CCMode {
	case "":
		cfg.CCMode = "on"
	case "on", "off", "devtools":
	default:
		return nil, fmt.Errorf("emulator configuration: ccMode %.40q: want on, off or devtools", cfg.CCMode)
	}
	if chip == nil || log == nil {
		return nil, errors.New("emulator configuration: no chip or no logger")
	}
	if cfg.GPUs < 0 || cfg.GPUs > len(gpus) {
		return nil, fmt.Errorf("emulator configuration: %d GPUs, the simulation has %d", cfg.GPUs, len(gpus))
	}
	return &Server{chip: chip, gpus: gpus[:cfg.GPUs], cfg: cfg, log: log, flip: -1, advantage: defaultAdvantage, devices: map[string]*deviceState{}}, nil
}

// Listen opens the configured socket for its owner alone. A socket that nobody
// answers on any more is replaced; one that somebody does is an error.
func Listen(ctx context.Context, path string) (net.Listener, error) {
	var d net.Dialer
	if conn, err := d.DialContext(ctx, "unix", path); err == nil {
		_ = conn.Close()
		return nil, fmt.Errorf("listen on %s: another emulator answers there", path)
	} else if errors.Is(err, syscall.ECONNREFUSED) {
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("replace %s: %w", path, err)
		}
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, errors.Join(err, l.Close()))
	}
	return l, nil
}

// Serve answers on l until ctx ends, then waits for the requests being answered.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	var running sync.WaitGroup
	defer running.Wait()
	slots := make(chan struct{}, maxConns)
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		slots <- struct{}{}
		running.Go(func() {
			defer func() { <-slots }()
			s.handle(ctx, conn)
		})
	}
}

func (s *Server) handle(ctx context.Context, conn net.Conn) {
	defer conn.Close() //nolint:errcheck // the peer sees a missing answer
	_ = conn.SetDeadline(time.Now().Add(emulate.Timeout))
	var req emulate.Request
	var resp *emulate.Response
	err := emulate.Read(conn, &req)
	if err == nil {
		resp, err = s.answer(req)
	}
	if err != nil {
		resp = &emulate.Response{Error: err.Error()}
	}
	s.log.InfoContext(ctx, "request", "op", req.Op, "uuid", req.UUID, "error", resp.Error)
	if err := emulate.Write(conn, resp); err != nil {
		s.log.WarnContext(ctx, "request not answered", "op", req.Op, "error", err)
	}
}

func (s *Server) answer(req emulate.Request) (*emulate.Response, error) {
	switch req.Op {
	case emulate.OpSNPReport:
		if len(req.ReportData) != 64 {
			return nil, fmt.Errorf("report data has %d bytes: want 64", len(req.ReportData))
		}
		o := simulate.SNPOptions{VMPL: req.VMPL}
		s.mu.Lock()
		if s.rollback {
			tcb := s.chip.TCB()
			tcb.SNP--
			o.ReportedTCB = &tcb
		}
		s.mu.Unlock()
		report, err := s.chip.Report([64]byte(req.ReportData), o)
		if err != nil {
			return nil, err
		}
		return &emulate.Response{Report: report, Certificates: s.chip.CertTable()}, nil
	case emulate.OpGPUs:
		return &emulate.Response{GPUs: s.inventory()}, nil
	case emulate.OpGPUReport:
		return s.gpuReport(req)
	case emulate.OpSetReady:
		s.mu.Lock()
		defer s.mu.Unlock()
		s.ready = req.Ready
		if s.ready {
			// Whoever may use the GPUs does.
			for _, g := range s.gpus {
				s.device(g.UUID()).used = jobBytes
			}
		}
		return &emulate.Response{}, nil
	case emulate.OpUnprotected, emulate.OpClear:
		return s.changeGPU(req)
	case emulate.OpRotation:
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.ready {
			return nil, errors.New("the GPUs take work")
		}
		s.advantage = req.Advantage
		return &emulate.Response{}, nil
	case emulate.OpRollback:
		if !s.cfg.Faults {
			return nil, errors.New("faults are not allowed by the configuration")
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.rollback = req.Rollback
		return &emulate.Response{}, nil
	case emulate.OpXID, emulate.OpDriver:
		if !s.cfg.Faults {
			return nil, errors.New("faults are not allowed by the configuration")
		}
		if req.Op == emulate.OpXID {
			return s.changeGPU(req)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.driver = req.Driver
		return &emulate.Response{}, nil
	case emulate.OpFlip:
		if !s.cfg.Faults {
			return nil, errors.New("faults are not allowed by the configuration")
		}
		if req.Bit < 0 {
			return nil, fmt.Errorf("bit %d: want 0 or more", req.Bit)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.flip = req.Bit
		return &emulate.Response{}, nil
	default:
		return nil, fmt.Errorf("operation %.40q is unknown", req.Op)
	}
}

// deviceState is what changes about one GPU.
type deviceState struct {
	unprotected, used uint64
	xids              []uint64
}

// maxXIDs bounds the errors that a GPU remembers.
const maxXIDs = 64

// jobBytes is what a job leaves in a GPU's memory, defaultAdvantage the driver's
// threshold until it is set (nvml.h).
const (
	jobBytes         = 1 << 30
	defaultAdvantage = 60
)

// device is called with s.mu held.
func (s *Server) device(uuid string) *deviceState {
	d := s.devices[uuid]
	if d == nil {
		d = &deviceState{}
		s.devices[uuid] = d
	}
	return d
}

func (s *Server) changeGPU(req emulate.Request) (*emulate.Response, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, g := range s.gpus {
		if g.UUID() != req.UUID {
			continue
		}
		d := s.device(req.UUID)
		switch req.Op {
		case emulate.OpClear:
			d.used = 0
		case emulate.OpXID:
			if len(d.xids) == maxXIDs {
				return nil, fmt.Errorf("GPU %s had %d errors already", req.UUID, maxXIDs)
			}
			d.xids = append(d.xids, req.XID)
		default:
			d.unprotected = req.Bytes
		}
		return &emulate.Response{}, nil
	}
	return nil, fmt.Errorf("no GPU %.80q", req.UUID)
}

func (s *Server) gpuReport(req emulate.Request) (*emulate.Response, error) {
	if len(req.Nonce) != 32 {
		return nil, fmt.Errorf("nonce has %d bytes: want 32", len(req.Nonce))
	}
	if s.cfg.CCMode == "off" {
		return nil, errors.New("confidential computing is off")
	}
	for _, g := range s.gpus {
		if g.UUID() != req.UUID {
			continue
		}
		report, err := g.Report([32]byte(req.Nonce), simulate.GPUOptions{Driver: s.driverVersion()})
		if err != nil {
			return nil, err
		}
		s.mu.Lock()
		bit := s.flip
		s.flip = -1
		s.mu.Unlock()
		if bit >= 8*len(report) {
			return nil, fmt.Errorf("bit %d to flip is beyond a report of %d bytes", bit, len(report))
		}
		if bit >= 0 {
			report[bit/8] ^= 1 << (bit % 8)
		}
		return &emulate.Response{Report: report}, nil
	}
	return nil, fmt.Errorf("no GPU %.80q", req.UUID)
}

// driverVersion is that of the driver, empty for the one that GPUs were minted with.
func (s *Server) driverVersion() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return cmp.Or(s.driver, s.cfg.DriverVersion)
}

func (s *Server) inventory() *emulate.GPUs {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := &emulate.GPUs{DriverVersion: cmp.Or(s.driver, s.cfg.DriverVersion), CCMode: s.cfg.CCMode, Ready: s.ready, Advantage: s.advantage}
	for _, g := range s.gpus {
		if out.DriverVersion == "" {
			out.DriverVersion = g.DriverVersion()
		}
		d := emulate.GPU{
			UUID: g.UUID(), Name: "NVIDIA H100 80GB HBM3 (simulated)", VBIOSVersion: g.VBIOSVersion(),
			MemoryBytes: hopperMemory, Chain: g.ChainPEM(),
		}
		if s.cfg.CCMode != "off" {
			d.UnprotectedBytes = s.device(d.UUID).unprotected
			d.ProtectedMemoryBytes = hopperMemory - d.UnprotectedBytes
		}
		d.UsedBytes, d.XIDs = s.device(d.UUID).used, slices.Clone(s.device(d.UUID).xids)
		out.Devices = append(out.Devices, d)
	}
	return out
}
