// Package contract is what a host and its plugins agree on: the handshake, the
// GPU interface in Go, and its form on the wire.
//
// Trusted: nothing that a plugin answers. Checked, by the host's side of the
// contract: that an answer is bounded, complete and about what was asked. Not
// checked: whether evidence is genuine.
package contract

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"unicode/utf8"

	"github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	gpuv1 "github.com/coffer-run/coffer/plugins/contract/gpu/v1"
)

const (
	// ProtocolVersion changes with every incompatible change of a contract.
	ProtocolVersion = 1
	// GPUName is under what a GPU plugin serves.
	GPUName = "gpu"
	// LifelineEnv names the file descriptor whose end tells a plugin that its
	// host is gone.
	LifelineEnv = "COFFER_PLUGIN_LIFELINE"

	// MaxGPUs bounds the GPUs of one machine.
	MaxGPUs = 16
	// MaxReport is the largest report that NVML returns, in bytes.
	MaxReport = 8192
	// MaxChain bounds one GPU's certificates, in bytes.
	MaxChain = 64 << 10
	// MaxText bounds names and versions, in bytes.
	MaxText = 256
	// MaxMessage bounds one answer on the wire, in bytes.
	MaxMessage = MaxGPUs*(MaxReport+MaxChain+4*MaxText) + 4096
	// NonceSize is the length of a GPU nonce.
	NonceSize = 32
)

// Handshake is what host and plugin show each other before anything else. It
// guards against mistakes, not against attackers: the host's checksum does that.
func Handshake() plugin.HandshakeConfig {
	return plugin.HandshakeConfig{
		ProtocolVersion:  ProtocolVersion,
		MagicCookieKey:   "COFFER_PLUGIN",
		MagicCookieValue: "3ad0a9b0b62a4e0fb0f3c1c4a6de1f4b",
	}
}

// CCMode is the state of confidential computing on the machine's GPUs.
type CCMode string

// Confidential-computing states. The zero value is none of them.
const (
	CCOn       CCMode = "on"
	CCOff      CCMode = "off"
	CCDevtools CCMode = "devtools"
	CCUnknown  CCMode = "unknown"
)

func (m CCMode) check() error {
	switch m {
	case CCOn, CCOff, CCDevtools, CCUnknown:
		return nil
	default:
		return fmt.Errorf("confidential computing is %.40q: want on, off, devtools or unknown", m)
	}
}

// Inventory is what a plugin says about the machine. It decides no trust.
type Inventory struct {
	DriverVersion string
	CCMode        CCMode
	Ready         bool
	Simulated     bool
	Devices       []Device
}

// Device is one GPU.
type Device struct {
	UUID                 string
	Name                 string
	VBIOSVersion         string
	MemoryBytes          int64
	ProtectedMemoryBytes int64
	// Persistent: the driver keeps the device when nobody uses it.
	Persistent bool
}

// Evidence is one GPU's answer to a nonce.
type Evidence struct {
	UUID string
	// Report is the GET_MEASUREMENTS request and response.
	Report []byte
	// Chain is PEM, leaf first.
	Chain         []byte
	DriverVersion string
	VBIOSVersion  string
}

// GPU is a GPU plugin. Implementations MUST be safe for concurrent use, and MUST
// return when ctx ends, but for a call that the driver does not return from: the
// host waits no longer than its own limit.
type GPU interface {
	// Inventory lists the machine's GPUs.
	Inventory(ctx context.Context) (*Inventory, error)
	// Collect asks each named GPU, once, for a report over nonce. It MUST answer
	// for all of them or fail.
	Collect(ctx context.Context, nonce [NonceSize]byte, uuids []string) ([]Evidence, error)
	// SetReady tells the driver whether the GPUs may take work.
	SetReady(ctx context.Context, ready bool) error
	// State says how the driver stands, and of each named GPU, in the order asked,
	// what it holds.
	State(ctx context.Context, uuids []string) (*State, error)
	// Prepare makes settings for the named GPUs. It MUST fail while GPUs are ready,
	// and unless the driver says afterwards that it has them.
	Prepare(ctx context.Context, uuids []string, s Settings) error
	// Clear resets the named GPUs, so that nothing of who used them is left. It MUST
	// fail while anybody uses one.
	Clear(ctx context.Context, uuids []string) error
}

// GPUPlugin is a GPU on the wire. Impl is set in a plugin, and nil in a host.
type GPUPlugin struct {
	plugin.NetRPCUnsupportedPlugin
	Impl GPU
}

var _ plugin.GRPCPlugin = (*GPUPlugin)(nil)

// GRPCServer serves Impl.
func (p *GPUPlugin) GRPCServer(_ *plugin.GRPCBroker, s *grpc.Server) error {
	if p.Impl == nil {
		return errors.New("serve GPU plugin: no implementation")
	}
	RegisterGPU(s, p.Impl)
	return nil
}

// GRPCClient returns a GPU.
func (p *GPUPlugin) GRPCClient(_ context.Context, _ *plugin.GRPCBroker, c *grpc.ClientConn) (any, error) {
	return NewGPU(c), nil
}

// RegisterGPU serves impl on s.
func RegisterGPU(s grpc.ServiceRegistrar, impl GPU) {
	gpuv1.RegisterGPUServiceServer(s, &server{impl: impl})
}

// NewGPU returns the GPU served over c.
func NewGPU(c grpc.ClientConnInterface) GPU { return &client{c: gpuv1.NewGPUServiceClient(c)} }

type server struct {
	gpuv1.UnimplementedGPUServiceServer
	impl GPU
}

func (s *server) Inventory(ctx context.Context, _ *gpuv1.InventoryRequest) (*gpuv1.InventoryResponse, error) {
	inv, err := s.impl.Inventory(ctx)
	if err != nil {
		return nil, failed(ctx, err)
	}
	out := &gpuv1.InventoryResponse{
		DriverVersion: inv.DriverVersion, CcMode: string(inv.CCMode), Ready: inv.Ready, Simulated: inv.Simulated,
	}
	for _, d := range inv.Devices {
		out.Devices = append(out.Devices, &gpuv1.Device{
			Uuid: d.UUID, Name: d.Name, VbiosVersion: d.VBIOSVersion,
			MemoryBytes: d.MemoryBytes, ProtectedMemoryBytes: d.ProtectedMemoryBytes, Persistent: d.Persistent,
		})
	}
	return out, nil
}

func (s *server) Collect(ctx context.Context, req *gpuv1.CollectRequest) (*gpuv1.CollectResponse, error) {
	if len(req.GetNonce()) != NonceSize {
		return nil, status.Errorf(codes.InvalidArgument, "nonce has %d bytes: want %d", len(req.GetNonce()), NonceSize)
	}
	if err := checkUUIDs(req.GetUuids()); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	evs, err := s.impl.Collect(ctx, [NonceSize]byte(req.GetNonce()), req.GetUuids())
	if err != nil {
		return nil, failed(ctx, err)
	}
	out := &gpuv1.CollectResponse{}
	for _, e := range evs {
		out.Evidence = append(out.Evidence, &gpuv1.Evidence{
			Uuid: e.UUID, Report: e.Report, Chain: e.Chain, DriverVersion: e.DriverVersion, VbiosVersion: e.VBIOSVersion,
		})
	}
	return out, nil
}

func (s *server) SetReady(ctx context.Context, req *gpuv1.SetReadyRequest) (*gpuv1.SetReadyResponse, error) {
	if err := s.impl.SetReady(ctx, req.GetReady()); err != nil {
		return nil, failed(ctx, err)
	}
	return &gpuv1.SetReadyResponse{}, nil
}

// failed keeps the text of an error; its type does not cross the wire.
func failed(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return status.FromContextError(ctx.Err()).Err()
	}
	return status.Error(codes.Internal, err.Error())
}

type client struct{ c gpuv1.GPUServiceClient }

// limit overrides go-plugin's, which is the largest that fits.
func limit() grpc.CallOption { return grpc.MaxCallRecvMsgSize(MaxMessage) }

func (c *client) Inventory(ctx context.Context) (*Inventory, error) {
	resp, err := c.c.Inventory(ctx, &gpuv1.InventoryRequest{}, limit())
	if err != nil {
		return nil, fmt.Errorf("GPU inventory: %w", err)
	}
	inv := &Inventory{
		DriverVersion: resp.GetDriverVersion(), CCMode: CCMode(resp.GetCcMode()), Ready: resp.GetReady(), Simulated: resp.GetSimulated(),
	}
	if err := inv.CCMode.check(); err != nil {
		return nil, fmt.Errorf("GPU inventory: %w", err)
	}
	if err := checkText("driver version", inv.DriverVersion); err != nil {
		return nil, fmt.Errorf("GPU inventory: %w", err)
	}
	uuids := []string{}
	for _, d := range resp.GetDevices() {
		uuids = append(uuids, d.GetUuid())
		if err := errors.Join(checkText("name", d.GetName()), checkText("VBIOS version", d.GetVbiosVersion())); err != nil {
			return nil, fmt.Errorf("GPU inventory: %w", err)
		}
		if d.GetMemoryBytes() < 0 || d.GetProtectedMemoryBytes() < 0 {
			return nil, fmt.Errorf("GPU inventory: %s has negative memory", d.GetUuid())
		}
		inv.Devices = append(inv.Devices, Device{
			UUID: d.GetUuid(), Name: d.GetName(), VBIOSVersion: d.GetVbiosVersion(),
			MemoryBytes: d.GetMemoryBytes(), ProtectedMemoryBytes: d.GetProtectedMemoryBytes(), Persistent: d.GetPersistent(),
		})
	}
	if len(uuids) == 0 {
		return inv, nil
	}
	if err := checkUUIDs(uuids); err != nil {
		return nil, fmt.Errorf("GPU inventory: %w", err)
	}
	return inv, nil
}

func (c *client) Collect(ctx context.Context, nonce [NonceSize]byte, uuids []string) ([]Evidence, error) {
	if err := checkUUIDs(uuids); err != nil {
		return nil, fmt.Errorf("collect GPU evidence: %w", err)
	}
	resp, err := c.c.Collect(ctx, &gpuv1.CollectRequest{Nonce: nonce[:], Uuids: uuids}, limit())
	if err != nil {
		return nil, fmt.Errorf("collect GPU evidence: %w", err)
	}
	if len(resp.GetEvidence()) != len(uuids) {
		return nil, fmt.Errorf("collect GPU evidence: %d GPUs answered, %d were asked", len(resp.GetEvidence()), len(uuids))
	}
	out := make([]Evidence, 0, len(uuids))
	for i, e := range resp.GetEvidence() {
		switch {
		case e.GetUuid() != uuids[i]:
			return nil, fmt.Errorf("collect GPU evidence: answer %d is of %.80q, %q was asked", i, e.GetUuid(), uuids[i])
		case len(e.GetReport()) == 0 || len(e.GetReport()) > MaxReport:
			return nil, fmt.Errorf("collect GPU evidence: %s: report has %d bytes: want 1 to %d", uuids[i], len(e.GetReport()), MaxReport)
		case len(e.GetChain()) == 0 || len(e.GetChain()) > MaxChain:
			return nil, fmt.Errorf("collect GPU evidence: %s: certificates have %d bytes: want 1 to %d", uuids[i], len(e.GetChain()), MaxChain)
		}
		if err := errors.Join(checkText("driver version", e.GetDriverVersion()), checkText("VBIOS version", e.GetVbiosVersion())); err != nil {
			return nil, fmt.Errorf("collect GPU evidence: %s: %w", uuids[i], err)
		}
		out = append(out, Evidence{
			UUID: e.GetUuid(), Report: e.GetReport(), Chain: e.GetChain(),
			DriverVersion: e.GetDriverVersion(), VBIOSVersion: e.GetVbiosVersion(),
		})
	}
	return out, nil
}

func (c *client) SetReady(ctx context.Context, ready bool) error {
	if _, err := c.c.SetReady(ctx, &gpuv1.SetReadyRequest{Ready: ready}, limit()); err != nil {
		return fmt.Errorf("set GPUs ready: %w", err)
	}
	return nil
}

func checkUUIDs(uuids []string) error {
	if len(uuids) == 0 || len(uuids) > MaxGPUs {
		return fmt.Errorf("%d GPUs: want 1 to %d", len(uuids), MaxGPUs)
	}
	for i, u := range uuids {
		if err := checkText("UUID", u); err != nil {
			return err
		}
		if slices.Contains(uuids[:i], u) {
			return fmt.Errorf("GPU %s is named twice", u)
		}
	}
	return nil
}

func checkText(what, s string) error {
	if s == "" || len(s) > MaxText || !utf8.ValidString(s) {
		return fmt.Errorf("%s has %d bytes: want 1 to %d of text", what, len(s), MaxText)
	}
	for _, r := range s {
		if r < ' ' || r == 0x7f {
			return fmt.Errorf("%s %q holds a control character", what, s)
		}
	}
	return nil
}
