package contract

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	gpuv1 "github.com/coffer-run/coffer/plugins/contract/gpu/v1"
)

// The driver takes a threshold for changing its keys within these bounds
// (nvml.h, NVML_CC_KEY_ROTATION_THRESHOLD_ATTACKER_ADVANTAGE_MIN and _MAX).
const (
	MinAttackerAdvantage = 50
	MaxAttackerAdvantage = 65
)

// State is how the driver and some of its devices stand.
type State struct {
	CCMode CCMode
	// DriverVersion is that of the driver that runs.
	DriverVersion string
	// Ready: the GPUs take work. False without confidential computing, where there
	// is no such state.
	Ready bool
	// AttackerAdvantage is the exponent of two at which the driver changes the keys
	// of its encrypted copies; 0 if it does not say.
	AttackerAdvantage uint64
	Devices           []DeviceState
}

// DeviceState is what one device holds, in bytes.
type DeviceState struct {
	UUID             string
	UsedBytes        int64
	ProtectedBytes   int64
	UnprotectedBytes int64
	// Processes have a compute context on the device.
	Processes int
	// NearNode is the number of the memory node that is near to the device, and 1
	// more than Linux calls it; 0: none is.
	NearNode int
	// Faults counts the device's critical errors (XID) since the plugin began to
	// listen, and LastFault is the number of the newest. A driver that tells of none
	// leaves both 0.
	Faults, LastFault uint64
}

// maxNodes bounds memory nodes (Linux, CONFIG_NODES_SHIFT).
const maxNodes = 1 << 10

// Settings are what a job needs of the driver.
type Settings struct {
	// UnprotectedBytes of each device's memory are for staged copies; a multiple of
	// 1024 and more than 0.
	UnprotectedBytes int64
	// MaxAttackerAdvantage is from MinAttackerAdvantage to MaxAttackerAdvantage.
	MaxAttackerAdvantage uint64
}

// Check says whether a driver can be given s.
func (s Settings) Check() error {
	if s.UnprotectedBytes <= 0 || s.UnprotectedBytes%1024 != 0 {
		return fmt.Errorf("%d bytes of unprotected memory: want more than 0, in KiB", s.UnprotectedBytes)
	}
	if s.MaxAttackerAdvantage < MinAttackerAdvantage || s.MaxAttackerAdvantage > MaxAttackerAdvantage {
		return fmt.Errorf("attacker's advantage 2^%d: want 2^%d to 2^%d", s.MaxAttackerAdvantage, MinAttackerAdvantage, MaxAttackerAdvantage)
	}
	return nil
}

func (s *server) State(ctx context.Context, req *gpuv1.StateRequest) (*gpuv1.StateResponse, error) {
	if err := checkUUIDs(req.GetUuids()); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	st, err := s.impl.State(ctx, req.GetUuids())
	if err != nil {
		return nil, failed(ctx, err)
	}
	out := &gpuv1.StateResponse{CcMode: string(st.CCMode), DriverVersion: st.DriverVersion, Ready: st.Ready, AttackerAdvantage: st.AttackerAdvantage}
	for _, d := range st.Devices {
		out.Devices = append(out.Devices, &gpuv1.DeviceState{
			Uuid: d.UUID, UsedMemoryBytes: d.UsedBytes, ProtectedMemoryBytes: d.ProtectedBytes, UnprotectedMemoryBytes: d.UnprotectedBytes,
			Processes: int32(min(d.Processes, 1<<20)), NearNode: int32(min(d.NearNode, maxNodes)), Faults: d.Faults, LastFault: d.LastFault, // #nosec G115 -- bounded
		})
	}
	return out, nil
}

func (s *server) Prepare(ctx context.Context, req *gpuv1.PrepareRequest) (*gpuv1.PrepareResponse, error) {
	set := Settings{UnprotectedBytes: req.GetUnprotectedMemoryBytes(), MaxAttackerAdvantage: req.GetMaxAttackerAdvantage()}
	if err := errors.Join(checkUUIDs(req.GetUuids()), set.Check()); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if err := s.impl.Prepare(ctx, req.GetUuids(), set); err != nil {
		return nil, failed(ctx, err)
	}
	return &gpuv1.PrepareResponse{}, nil
}

func (s *server) Clear(ctx context.Context, req *gpuv1.ClearRequest) (*gpuv1.ClearResponse, error) {
	if err := checkUUIDs(req.GetUuids()); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if err := s.impl.Clear(ctx, req.GetUuids()); err != nil {
		return nil, failed(ctx, err)
	}
	return &gpuv1.ClearResponse{}, nil
}

func (c *client) State(ctx context.Context, uuids []string) (*State, error) {
	if err := checkUUIDs(uuids); err != nil {
		return nil, fmt.Errorf("GPU state: %w", err)
	}
	resp, err := c.c.State(ctx, &gpuv1.StateRequest{Uuids: uuids}, limit())
	if err != nil {
		return nil, fmt.Errorf("GPU state: %w", err)
	}
	out := &State{CCMode: CCMode(resp.GetCcMode()), DriverVersion: resp.GetDriverVersion(), Ready: resp.GetReady(), AttackerAdvantage: resp.GetAttackerAdvantage()}
	if err := errors.Join(out.CCMode.check(), checkText("driver version", out.DriverVersion)); err != nil {
		return nil, fmt.Errorf("GPU state: %w", err)
	}
	if len(resp.GetDevices()) != len(uuids) {
		return nil, fmt.Errorf("GPU state: of %d GPUs, %d were asked", len(resp.GetDevices()), len(uuids))
	}
	for i, d := range resp.GetDevices() {
		if d.GetUuid() != uuids[i] {
			return nil, fmt.Errorf("GPU state: answer %d is of %.80q, %q was asked", i, d.GetUuid(), uuids[i])
		}
		if d.GetUsedMemoryBytes() < 0 || d.GetProtectedMemoryBytes() < 0 || d.GetUnprotectedMemoryBytes() < 0 || d.GetProcesses() < 0 || d.GetNearNode() < 0 || d.GetNearNode() > maxNodes {
			return nil, fmt.Errorf("GPU state: %s has less than nothing", uuids[i])
		}
		out.Devices = append(out.Devices, DeviceState{
			UUID: d.GetUuid(), UsedBytes: d.GetUsedMemoryBytes(), ProtectedBytes: d.GetProtectedMemoryBytes(),
			UnprotectedBytes: d.GetUnprotectedMemoryBytes(), Processes: int(d.GetProcesses()), NearNode: int(d.GetNearNode()), Faults: d.GetFaults(), LastFault: d.GetLastFault(),
		})
	}
	return out, nil
}

func (c *client) Prepare(ctx context.Context, uuids []string, s Settings) error {
	if err := errors.Join(checkUUIDs(uuids), s.Check()); err != nil {
		return fmt.Errorf("prepare GPUs: %w", err)
	}
	_, err := c.c.Prepare(ctx, &gpuv1.PrepareRequest{Uuids: uuids, UnprotectedMemoryBytes: s.UnprotectedBytes, MaxAttackerAdvantage: s.MaxAttackerAdvantage}, limit())
	if err != nil {
		return fmt.Errorf("prepare GPUs: %w", err)
	}
	return nil
}

func (c *client) Clear(ctx context.Context, uuids []string) error {
	if err := checkUUIDs(uuids); err != nil {
		return fmt.Errorf("clear GPUs: %w", err)
	}
	if _, err := c.c.Clear(ctx, &gpuv1.ClearRequest{Uuids: uuids}, limit()); err != nil {
		return fmt.Errorf("clear GPUs: %w", err)
	}
	return nil
}
