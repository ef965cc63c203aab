package nvidia_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/NVIDIA/go-nvml/pkg/nvml"

	"github.com/coffer-run/coffer/plugins/contract"
	"github.com/coffer-run/coffer/plugins/gpu/nvidia"
)

var settings = contract.Settings{UnprotectedBytes: 1 << 30, MaxAttackerAdvantage: 56}

// The driver takes a threshold for its keys only before GPUs are ready, so
// settings come first; a reset comes when nobody uses a GPU any more.
func TestOrderOfCalls(t *testing.T) {
	m := newMachine()
	setReady := m.lib.SystemSetConfComputeGpusReadyStateFunc
	m.lib.SystemSetConfComputeGpusReadyStateFunc = func(v uint32) nvml.Return {
		m.calls = append(m.calls, map[uint32]string{0: "not ready", 1: "ready"}[v])
		return setReady(v)
	}
	p, ctx, gpus := m.open(t), t.Context(), []string{uuid}
	if err := errors.Join(p.Prepare(ctx, gpus, settings), p.SetReady(ctx, true), p.SetReady(ctx, false), p.Clear(ctx, gpus)); err != nil {
		t.Fatal(err)
	}
	if want := []string{"unprotected", "rotation", "ready", "not ready", "reset"}; !slices.Equal(m.calls, want) {
		t.Errorf("calls %v, want %v", m.calls, want)
	}
}

// Each row breaks one thing, and the call that must notice it fails.
func TestPrepareAndClearFail(t *testing.T) {
	const bad = nvml.ERROR_GPU_IS_LOST
	for name, c := range map[string]struct {
		breakIt        func(*machine)
		want           string
		prepare, clear bool
	}{
		"GPUs are ready":           {func(m *machine) { m.ready = 1 }, "take work already", true, false},
		"confidential mode is off": {func(m *machine) { m.state.CcFeature = 0 }, "confidential computing is off", true, false},
		"DevTools mode":            {func(m *machine) { m.state.DevToolsMode = 1 }, "confidential computing is devtools", true, false},
		"memory is not set":        {func(m *machine) { m.dev.SetConfComputeUnprotectedMemSizeFunc = func(uint64) nvml.Return { return bad } }, "staged copies", true, false},
		"memory is set to less": {func(m *machine) {
			m.dev.SetConfComputeUnprotectedMemSizeFunc = func(uint64) nvml.Return { return nvml.SUCCESS }
		}, "0 bytes for staged copies", true, false},
		"the threshold is not set": {func(m *machine) {
			m.lib.SystemSetConfComputeKeyRotationThresholdInfoFunc = func(nvml.ConfComputeSetKeyRotationThresholdInfo) nvml.Return { return bad }
		}, "key rotation", true, false},
		"the threshold stays": {func(m *machine) {
			m.lib.SystemSetConfComputeKeyRotationThresholdInfoFunc = func(nvml.ConfComputeSetKeyRotationThresholdInfo) nvml.Return { return nvml.SUCCESS }
		}, "keys change at 2^60", true, false},
		"a driver without rotation": {func(m *machine) {
			m.lib.SystemGetConfComputeKeyRotationThresholdInfoFunc = func() (nvml.ConfComputeGetKeyRotationThresholdInfo, nvml.Return) {
				return nvml.ConfComputeGetKeyRotationThresholdInfo{}, nvml.ERROR_NOT_SUPPORTED
			}
		}, "keys change at 2^0", true, false},
		"the state cannot be read": {func(m *machine) {
			m.lib.SystemGetConfComputeGpusReadyStateFunc = func() (uint32, nvml.Return) { return 0, bad }
		}, "ready state", true, true},
		"somebody uses the GPU": {func(m *machine) { m.processes = 1 }, "1 processes", false, true},
		"processes cannot be read": {func(m *machine) {
			m.dev.GetComputeRunningProcessesFunc = func() ([]nvml.ProcessInfo, nvml.Return) { return nil, bad }
		}, "processes", true, true},
		"the reset leaves memory": {func(m *machine) {
			m.dev.GetMemoryInfo_v2Func = func() (nvml.Memory_v2, nvml.Return) { return nvml.Memory_v2{Used: 1 << 30}, nvml.SUCCESS }
		}, "1073741824 bytes in use", false, true},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine()
			c.breakIt(m)
			p := m.open(t)
			check(t, "prepare", p.Prepare(t.Context(), []string{uuid}, settings), c.prepare, c.want)
			check(t, "clear", p.Clear(t.Context(), []string{uuid}), c.clear, c.want)
			if c.clear && c.want == "1 processes" && slices.Contains(m.calls, "reset") {
				t.Error("a GPU in use was reset")
			}
		})
	}
}

// Without a Resetter a GPU is reset on the bus, and nowhere else.
func TestResetGoesToThePCIFunction(t *testing.T) {
	for name, c := range map[string]struct{ bus, want string }{
		"no such function":   {"00000000:FF:1F.7", "/sys/bus/pci/devices/0000:ff:1f.7/reset"},
		"a path":             {"../../../etc/x", "is no PCI function"},
		"a domain too large": {"00010000:01:00.0", "is no PCI function"},
		"nothing":            {"", "is no PCI function"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine()
			m.dev.GetPciInfoFunc = func() (nvml.PciInfo, nvml.Return) {
				var info nvml.PciInfo
				copy(info.BusId[:], c.bus)
				return info, nvml.SUCCESS
			}
			p, err := nvidia.Open(m.lib, false)
			if err != nil {
				t.Fatal(err)
			}
			if err := p.Clear(t.Context(), []string{uuid}); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v", err)
			}
		})
	}
}
