// Package nvml is an nvml.Interface whose devices are emulated, for the GPU
// plugin above it to run as on hardware. It needs no driver and no library.
package nvml

import (
	"context"
	"slices"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock"

	"github.com/coffer-run/coffer/internal/emulate"
)

// New returns an interface to the emulator's GPUs. NVML has no cancellation: ctx
// is that of the process, and the client bounds each request. Functions that the
// plugin does not use are not there: calling one panics with its name.
func New(ctx context.Context, c *emulate.Client) nvml.Interface {
	m := &library{ctx: ctx, c: c}
	gpus := func() (*emulate.GPUs, nvml.Return) {
		resp, err := c.Do(ctx, emulate.Request{Op: emulate.OpGPUs})
		if err != nil || resp.GPUs == nil {
			return nil, nvml.ERROR_DRIVER_NOT_LOADED
		}
		return resp.GPUs, nvml.SUCCESS
	}
	m.InitFunc = func() nvml.Return {
		_, ret := gpus()
		return ret
	}
	m.ShutdownFunc = func() nvml.Return { return nvml.SUCCESS }
	m.ErrorStringFunc = func(r nvml.Return) string { return r.Error() }
	m.SystemGetDriverVersionFunc = func() (string, nvml.Return) {
		g, ret := gpus()
		if ret != nvml.SUCCESS {
			return "", ret
		}
		return g.DriverVersion, nvml.SUCCESS
	}
	m.SystemGetConfComputeStateFunc = func() (nvml.ConfComputeSystemState, nvml.Return) {
		g, ret := gpus()
		if ret != nvml.SUCCESS {
			return nvml.ConfComputeSystemState{}, ret
		}
		s := nvml.ConfComputeSystemState{Environment: nvml.CC_SYSTEM_ENVIRONMENT_SIM}
		if g.CCMode != "off" {
			s.CcFeature = nvml.CC_SYSTEM_FEATURE_ENABLED
		}
		if g.CCMode == "devtools" {
			s.DevToolsMode = nvml.CC_SYSTEM_DEVTOOLS_MODE_ON
		}
		return s, nvml.SUCCESS
	}
	m.SystemGetConfComputeGpusReadyStateFunc = func() (uint32, nvml.Return) {
		g, ret := gpus()
		if ret != nvml.SUCCESS {
			return 0, ret
		}
		if g.Ready {
			return nvml.CC_ACCEPTING_CLIENT_REQUESTS_TRUE, nvml.SUCCESS
		}
		return nvml.CC_ACCEPTING_CLIENT_REQUESTS_FALSE, nvml.SUCCESS
	}
	m.SystemSetConfComputeGpusReadyStateFunc = func(v uint32) nvml.Return {
		if _, err := c.Do(ctx, emulate.Request{Op: emulate.OpSetReady, Ready: v == nvml.CC_ACCEPTING_CLIENT_REQUESTS_TRUE}); err != nil {
			return nvml.ERROR_UNKNOWN
		}
		return nvml.SUCCESS
	}
	m.SystemGetConfComputeKeyRotationThresholdInfoFunc = func() (nvml.ConfComputeGetKeyRotationThresholdInfo, nvml.Return) {
		g, ret := gpus()
		if ret != nvml.SUCCESS {
			return nvml.ConfComputeGetKeyRotationThresholdInfo{}, ret
		}
		return nvml.ConfComputeGetKeyRotationThresholdInfo{AttackerAdvantage: g.Advantage}, nvml.SUCCESS
	}
	m.SystemSetConfComputeKeyRotationThresholdInfoFunc = func(v nvml.ConfComputeSetKeyRotationThresholdInfo) nvml.Return {
		if v.MaxAttackerAdvantage < nvml.CC_KEY_ROTATION_THRESHOLD_ATTACKER_ADVANTAGE_MIN || v.MaxAttackerAdvantage > nvml.CC_KEY_ROTATION_THRESHOLD_ATTACKER_ADVANTAGE_MAX {
			return nvml.ERROR_INVALID_ARGUMENT
		}
		if _, err := c.Do(ctx, emulate.Request{Op: emulate.OpRotation, Advantage: v.MaxAttackerAdvantage}); err != nil {
			return nvml.ERROR_INVALID_STATE
		}
		return nvml.SUCCESS
	}
	m.DeviceGetCountFunc = func() (int, nvml.Return) {
		g, ret := gpus()
		if ret != nvml.SUCCESS {
			return 0, ret
		}
		return len(g.Devices), nvml.SUCCESS
	}
	m.DeviceGetHandleByIndexFunc = func(i int) (nvml.Device, nvml.Return) {
		g, ret := gpus()
		if ret != nvml.SUCCESS {
			return nil, ret
		}
		if i < 0 || i >= len(g.Devices) {
			return nil, nvml.ERROR_INVALID_ARGUMENT
		}
		return device(ctx, c, g.Devices[i]), nvml.SUCCESS
	}
	m.DeviceGetHandleByUUIDFunc = func(uuid string) (nvml.Device, nvml.Return) {
		g, ret := gpus()
		if ret != nvml.SUCCESS {
			return nil, ret
		}
		i := slices.IndexFunc(g.Devices, func(d emulate.GPU) bool { return d.UUID == uuid })
		if i < 0 {
			return nil, nvml.ERROR_NOT_FOUND
		}
		return device(ctx, c, g.Devices[i]), nvml.SUCCESS
	}
	m.EventSetCreateFunc = func() (nvml.EventSet, nvml.Return) { return events(ctx, c, gpus), nvml.SUCCESS }
	return m
}

// events is a set of events whose registrations begin with what a device told last:
// what it tells after that is handed out once, in order.
func events(ctx context.Context, c *emulate.Client, gpus func() (*emulate.GPUs, nvml.Return)) nvml.EventSet {
	seen := map[string]int{}
	s := &eventSet{register: func(g emulate.GPU) { seen[g.UUID] = len(g.XIDs) }}
	s.FreeFunc = func() nvml.Return { return nvml.SUCCESS }
	s.WaitFunc = func(uint32) (nvml.EventData, nvml.Return) {
		now, ret := gpus()
		if ret != nvml.SUCCESS {
			return nvml.EventData{}, ret
		}
		for _, g := range now.Devices {
			if n, registered := seen[g.UUID]; registered && n < len(g.XIDs) {
				seen[g.UUID]++
				return nvml.EventData{Device: device(ctx, c, g), EventType: nvml.EventTypeXidCriticalError, EventData: g.XIDs[n]}, nvml.SUCCESS
			}
		}
		return nvml.EventData{}, nvml.ERROR_TIMEOUT
	}
	return s
}

// eventSet is a mock that knows who registers.
type eventSet struct {
	mock.EventSet
	register func(emulate.GPU)
}

// library is a mock that the plugin can reset devices of: there is no bus.
type library struct {
	mock.Interface
	ctx context.Context
	c   *emulate.Client
}

// Reset forgets what a device holds.
func (l *library) Reset(uuid string) error {
	_, err := l.c.Do(l.ctx, emulate.Request{Op: emulate.OpClear, UUID: uuid})
	return err
}

func device(ctx context.Context, c *emulate.Client, g emulate.GPU) nvml.Device {
	d := &mock.Device{}
	d.GetUUIDFunc = func() (string, nvml.Return) { return g.UUID, nvml.SUCCESS }
	d.GetNameFunc = func() (string, nvml.Return) { return g.Name, nvml.SUCCESS }
	d.GetVbiosVersionFunc = func() (string, nvml.Return) { return g.VBIOSVersion, nvml.SUCCESS }
	d.RegisterEventsFunc = func(_ uint64, s nvml.EventSet) nvml.Return {
		set, ok := s.(*eventSet)
		if !ok {
			return nvml.ERROR_INVALID_ARGUMENT
		}
		set.register(g)
		return nvml.SUCCESS
	}
	d.GetPersistenceModeFunc = func() (nvml.EnableState, nvml.Return) { return nvml.FEATURE_ENABLED, nvml.SUCCESS }
	d.GetMemoryInfoFunc = func() (nvml.Memory, nvml.Return) {
		return nvml.Memory{Total: g.MemoryBytes, Free: g.MemoryBytes}, nvml.SUCCESS
	}
	d.GetConfComputeMemSizeInfoFunc = func() (nvml.ConfComputeMemSizeInfo, nvml.Return) {
		return nvml.ConfComputeMemSizeInfo{
			ProtectedMemSizeKib:   g.ProtectedMemoryBytes >> 10,
			UnprotectedMemSizeKib: g.UnprotectedBytes >> 10,
		}, nvml.SUCCESS
	}
	d.SetConfComputeUnprotectedMemSizeFunc = func(kib uint64) nvml.Return {
		if kib > g.MemoryBytes>>10 {
			return nvml.ERROR_INVALID_ARGUMENT
		}
		if _, err := c.Do(ctx, emulate.Request{Op: emulate.OpUnprotected, UUID: g.UUID, Bytes: kib << 10}); err != nil {
			return nvml.ERROR_UNKNOWN
		}
		return nvml.SUCCESS
	}
	d.GetMemoryInfo_v2Func = func() (nvml.Memory_v2, nvml.Return) {
		return nvml.Memory_v2{Total: g.MemoryBytes, Free: g.MemoryBytes - g.UsedBytes, Used: g.UsedBytes}, nvml.SUCCESS
	}
	d.GetComputeRunningProcessesFunc = func() ([]nvml.ProcessInfo, nvml.Return) { return nil, nvml.SUCCESS }
	d.GetPciInfoFunc = func() (nvml.PciInfo, nvml.Return) { return nvml.PciInfo{}, nvml.SUCCESS }
	d.GetConfComputeGpuCertificateFunc = func() (nvml.ConfComputeGpuCertificate, nvml.Return) {
		var out nvml.ConfComputeGpuCertificate
		if len(g.Chain) > len(out.AttestationCertChain) {
			return out, nvml.ERROR_INSUFFICIENT_SIZE
		}
		out.AttestationCertChainSize = uint32(copy(out.AttestationCertChain[:], g.Chain)) // #nosec G115 -- at most 5120
		return out, nvml.SUCCESS
	}
	d.GetConfComputeGpuAttestationReportFunc = func(r *nvml.ConfComputeGpuAttestationReport) nvml.Return {
		resp, err := c.Do(ctx, emulate.Request{Op: emulate.OpGPUReport, UUID: g.UUID, Nonce: r.Nonce[:]})
		if err != nil {
			return nvml.ERROR_UNKNOWN
		}
		if len(resp.Report) > len(r.AttestationReport) {
			return nvml.ERROR_INSUFFICIENT_SIZE
		}
		r.AttestationReportSize = uint32(copy(r.AttestationReport[:], resp.Report)) // #nosec G115 -- at most 8192
		return nvml.SUCCESS
	}
	return d
}
