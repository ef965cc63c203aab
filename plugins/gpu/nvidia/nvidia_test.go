package nvidia_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock"

	"github.com/coffer-run/coffer/plugins/contract"
	"github.com/coffer-run/coffer/plugins/contract/contracttest"
	"github.com/coffer-run/coffer/plugins/gpu/nvidia"
)

const uuid = "GPU-1"

// machine is a mock of one GPU whose calls can be made to fail one by one.
type machine struct {
	lib   *mock.Interface
	dev   *mock.Device
	state nvml.ConfComputeSystemState
	ready uint32
	// advantage, unprotected and used are what was set, or left behind.
	advantage, unprotected, used uint64
	processes                    int
	events                       *mock.EventSet
	// told are the events that wait to be heard.
	told []nvml.EventData
	// calls are those that change something, in order.
	calls []string
}

// resettable is a library whose devices are on no bus.
type resettable struct {
	*mock.Interface
	m *machine
}

func (r resettable) Reset(string) error {
	r.m.calls = append(r.m.calls, "reset")
	r.m.used = 0
	return nil
}

func newMachine() *machine {
	m := &machine{lib: &mock.Interface{}, dev: &mock.Device{}, events: &mock.EventSet{}, state: nvml.ConfComputeSystemState{CcFeature: nvml.CC_SYSTEM_FEATURE_ENABLED}}
	m.lib.InitFunc = func() nvml.Return { return nvml.SUCCESS }
	m.lib.ShutdownFunc = func() nvml.Return { return nvml.SUCCESS }
	m.lib.SystemGetDriverVersionFunc = func() (string, nvml.Return) { return "580.65.06", nvml.SUCCESS }
	m.lib.SystemGetConfComputeStateFunc = func() (nvml.ConfComputeSystemState, nvml.Return) { return m.state, nvml.SUCCESS }
	m.lib.SystemGetConfComputeGpusReadyStateFunc = func() (uint32, nvml.Return) { return m.ready, nvml.SUCCESS }
	m.lib.SystemSetConfComputeGpusReadyStateFunc = func(v uint32) nvml.Return { m.ready = v; return nvml.SUCCESS }
	m.lib.DeviceGetCountFunc = func() (int, nvml.Return) { return 1, nvml.SUCCESS }
	m.lib.DeviceGetHandleByIndexFunc = func(int) (nvml.Device, nvml.Return) { return m.dev, nvml.SUCCESS }
	m.lib.DeviceGetHandleByUUIDFunc = func(u string) (nvml.Device, nvml.Return) {
		if u != uuid {
			return nil, nvml.ERROR_NOT_FOUND
		}
		return m.dev, nvml.SUCCESS
	}
	m.lib.EventSetCreateFunc = func() (nvml.EventSet, nvml.Return) { return m.events, nvml.SUCCESS }
	m.events.FreeFunc = func() nvml.Return { m.calls = append(m.calls, "free"); return nvml.SUCCESS }
	m.events.WaitFunc = func(ms uint32) (nvml.EventData, nvml.Return) {
		if len(m.told) == 0 || ms != 0 {
			return nvml.EventData{}, nvml.ERROR_TIMEOUT
		}
		e := m.told[0]
		m.told = m.told[1:]
		return e, nvml.SUCCESS
	}
	m.dev.RegisterEventsFunc = func(uint64, nvml.EventSet) nvml.Return { return nvml.SUCCESS }
	m.dev.GetUUIDFunc = func() (string, nvml.Return) { return uuid, nvml.SUCCESS }
	m.dev.GetNameFunc = func() (string, nvml.Return) { return "NVIDIA H100", nvml.SUCCESS }
	m.dev.GetVbiosVersionFunc = func() (string, nvml.Return) { return "96.00.9F.00.01", nvml.SUCCESS }
	m.dev.GetMemoryInfoFunc = func() (nvml.Memory, nvml.Return) { return nvml.Memory{Total: 80 << 30}, nvml.SUCCESS }
	m.dev.GetConfComputeMemSizeInfoFunc = func() (nvml.ConfComputeMemSizeInfo, nvml.Return) {
		return nvml.ConfComputeMemSizeInfo{ProtectedMemSizeKib: 79 << 20, UnprotectedMemSizeKib: m.unprotected}, nvml.SUCCESS
	}
	m.dev.GetMemoryInfo_v2Func = func() (nvml.Memory_v2, nvml.Return) {
		return nvml.Memory_v2{Total: 80 << 30, Used: m.used}, nvml.SUCCESS
	}
	m.dev.GetComputeRunningProcessesFunc = func() ([]nvml.ProcessInfo, nvml.Return) {
		return make([]nvml.ProcessInfo, m.processes), nvml.SUCCESS
	}
	m.dev.GetPciInfoFunc = func() (nvml.PciInfo, nvml.Return) { return nvml.PciInfo{}, nvml.SUCCESS }
	m.advantage = 60
	m.lib.SystemGetConfComputeKeyRotationThresholdInfoFunc = func() (nvml.ConfComputeGetKeyRotationThresholdInfo, nvml.Return) {
		return nvml.ConfComputeGetKeyRotationThresholdInfo{AttackerAdvantage: m.advantage}, nvml.SUCCESS
	}
	m.lib.SystemSetConfComputeKeyRotationThresholdInfoFunc = func(v nvml.ConfComputeSetKeyRotationThresholdInfo) nvml.Return {
		m.calls = append(m.calls, "rotation")
		if m.ready == 1 || v.Version == 0 {
			return nvml.ERROR_INVALID_STATE
		}
		m.advantage = v.MaxAttackerAdvantage
		return nvml.SUCCESS
	}
	m.dev.SetConfComputeUnprotectedMemSizeFunc = func(kib uint64) nvml.Return {
		m.calls = append(m.calls, "unprotected")
		m.unprotected = kib
		return nvml.SUCCESS
	}
	m.dev.GetPersistenceModeFunc = func() (nvml.EnableState, nvml.Return) { return nvml.FEATURE_ENABLED, nvml.SUCCESS }
	m.dev.GetConfComputeGpuCertificateFunc = func() (nvml.ConfComputeGpuCertificate, nvml.Return) { return certificate(5), nvml.SUCCESS }
	m.dev.GetConfComputeGpuAttestationReportFunc = func(r *nvml.ConfComputeGpuAttestationReport) nvml.Return {
		copy(r.AttestationReport[4:], r.Nonce[:])
		r.AttestationReportSize = 100
		return nvml.SUCCESS
	}
	return m
}

func certificate(size uint32) nvml.ConfComputeGpuCertificate {
	c := nvml.ConfComputeGpuCertificate{AttestationCertChainSize: size, CertChainSize: 4}
	copy(c.AttestationCertChain[:], "chainAND MORE")
	copy(c.CertChain[:], "identity")
	return c
}

func (m *machine) open(t *testing.T) *nvidia.Plugin {
	t.Helper()
	p, err := nvidia.Open(resettable{m.lib, m}, false)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestConformance(t *testing.T) {
	t.Run("called directly", func(t *testing.T) {
		p := newMachine().open(t)
		inv, err := p.Inventory(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		want := contract.Device{UUID: uuid, Name: "NVIDIA H100", VBIOSVersion: "96.00.9F.00.01", MemoryBytes: 80 << 30, ProtectedMemoryBytes: 79 << 30, Persistent: true}
		if len(inv.Devices) != 1 || inv.Devices[0] != want {
			t.Errorf("devices %+v", inv.Devices)
		}
	})
	t.Run("served in memory", func(t *testing.T) { contracttest.Run(t, contracttest.Served(t, newMachine().open(t))) })
}

func TestCollectTakesWhatNVMLSizes(t *testing.T) {
	m := newMachine()
	evs, err := m.open(t).Collect(t.Context(), [32]byte{7}, []string{uuid})
	if err != nil {
		t.Fatal(err)
	}
	e := evs[0]
	if len(e.Report) != 100 || string(e.Chain) != "chain" || e.Report[4] != 7 || bytes.Contains(e.Chain, []byte("identity")) {
		t.Errorf("report of %d bytes, chain %q", len(e.Report), e.Chain)
	}
}

func TestInitFails(t *testing.T) {
	// Nothing but Init is set: any other call panics, as the real library would
	// end the process.
	lib := &mock.Interface{InitFunc: func() nvml.Return { return nvml.ERROR_LIBRARY_NOT_FOUND }}
	if p, err := nvidia.Open(lib, false); err == nil || p != nil || !errors.Is(err, nvml.ERROR_LIBRARY_NOT_FOUND) {
		t.Fatalf("got %v, %v", p, err)
	}
	if _, err := nvidia.Open(nil, false); err == nil {
		t.Fatal("opened no library")
	}
}

func TestCCMode(t *testing.T) {
	for name, c := range map[string]struct {
		state nvml.ConfComputeSystemState
		ret   nvml.Return
		want  contract.CCMode
		// collects says whether evidence may be asked for, ready whether GPUs may
		// be given to a job.
		collects, ready bool
	}{
		"on":                           {state: nvml.ConfComputeSystemState{CcFeature: 1}, want: contract.CCOn, collects: true, ready: true},
		"off":                          {state: nvml.ConfComputeSystemState{}, want: contract.CCOff},
		"off, devtools left on":        {state: nvml.ConfComputeSystemState{DevToolsMode: 1}, want: contract.CCOff},
		"devtools":                     {state: nvml.ConfComputeSystemState{CcFeature: 1, DevToolsMode: 1}, want: contract.CCDevtools, collects: true},
		"a feature not known here":     {state: nvml.ConfComputeSystemState{CcFeature: 2}, want: contract.CCUnknown},
		"a devtools mode not known":    {state: nvml.ConfComputeSystemState{CcFeature: 1, DevToolsMode: 2}, want: contract.CCUnknown},
		"a GPU before Hopper":          {ret: nvml.ERROR_NOT_SUPPORTED, want: contract.CCOff},
		"a driver without the call":    {ret: nvml.ERROR_FUNCTION_NOT_FOUND, want: contract.CCOff},
		"the driver cannot be reached": {ret: nvml.ERROR_GPU_IS_LOST},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine()
			m.lib.SystemGetConfComputeStateFunc = func() (nvml.ConfComputeSystemState, nvml.Return) { return c.state, c.ret }
			p := m.open(t)
			inv, err := p.Inventory(t.Context())
			if c.want == "" {
				if err == nil {
					t.Error("inventory in spite of it")
				}
			} else if err != nil || inv.CCMode != c.want {
				t.Errorf("inventory %+v, %v", inv, err)
			}
			if _, err := p.Collect(t.Context(), [32]byte{}, []string{uuid}); (err == nil) != c.collects {
				t.Errorf("collect: %v", err)
			}
			if err := p.SetReady(t.Context(), true); (err == nil) != c.ready {
				t.Errorf("set ready: %v", err)
			}
			if (m.ready == 1) != c.ready {
				t.Errorf("ready state %d", m.ready)
			}
		})
	}
}

func TestSetReadyOffIsAlwaysAllowed(t *testing.T) {
	m := newMachine()
	m.ready, m.state = 1, nvml.ConfComputeSystemState{CcFeature: 1, DevToolsMode: 1}
	if err := m.open(t).SetReady(t.Context(), false); err != nil || m.ready != 0 {
		t.Errorf("%v, ready %d", err, m.ready)
	}
}

func TestCallsThatFail(t *testing.T) {
	const bad = nvml.ERROR_GPU_IS_LOST
	for name, c := range map[string]struct {
		breakIt func(*machine)
		want    string
		// inventory and collect say which of the two must fail.
		inventory, collect bool
	}{
		"driver version": {func(m *machine) {
			m.lib.SystemGetDriverVersionFunc = func() (string, nvml.Return) { return "", bad }
		}, "driver version", true, true},
		"ready state": {func(m *machine) {
			m.lib.SystemGetConfComputeGpusReadyStateFunc = func() (uint32, nvml.Return) { return 1, bad }
		}, "ready state", true, false},
		"count": {func(m *machine) { m.lib.DeviceGetCountFunc = func() (int, nvml.Return) { return 1, bad } }, "count of GPUs", true, false},
		"more GPUs than there can be": {func(m *machine) {
			m.lib.DeviceGetCountFunc = func() (int, nvml.Return) { return 17, nvml.SUCCESS }
		}, "at most 16", true, false},
		"handle by index": {func(m *machine) {
			m.lib.DeviceGetHandleByIndexFunc = func(int) (nvml.Device, nvml.Return) { return nil, bad }
		}, "GPU 0", true, false},
		"handle by UUID": {func(m *machine) {
			m.lib.DeviceGetHandleByUUIDFunc = func(string) (nvml.Device, nvml.Return) { return nil, bad }
		}, "find", false, true},
		"UUID":  {func(m *machine) { m.dev.GetUUIDFunc = func() (string, nvml.Return) { return "", bad } }, "UUID", true, false},
		"name":  {func(m *machine) { m.dev.GetNameFunc = func() (string, nvml.Return) { return "", bad } }, "name", true, false},
		"VBIOS": {func(m *machine) { m.dev.GetVbiosVersionFunc = func() (string, nvml.Return) { return "", bad } }, "VBIOS", true, true},
		"memory": {func(m *machine) {
			m.dev.GetMemoryInfoFunc = func() (nvml.Memory, nvml.Return) { return nvml.Memory{}, bad }
		}, "memory", true, false},
		"protected memory": {func(m *machine) {
			m.dev.GetConfComputeMemSizeInfoFunc = func() (nvml.ConfComputeMemSizeInfo, nvml.Return) { return nvml.ConfComputeMemSizeInfo{}, bad }
		}, "protected memory", true, false},
		"persistence mode cannot be read": {func(m *machine) {
			m.dev.GetPersistenceModeFunc = func() (nvml.EnableState, nvml.Return) { return nvml.FEATURE_ENABLED, bad }
		}, "persistence mode", true, true},
		"persistence mode is off": {func(m *machine) {
			m.dev.GetPersistenceModeFunc = func() (nvml.EnableState, nvml.Return) { return nvml.FEATURE_DISABLED, nvml.SUCCESS }
		}, "persistence mode is off", false, true},
		"certificates": {func(m *machine) {
			m.dev.GetConfComputeGpuCertificateFunc = func() (nvml.ConfComputeGpuCertificate, nvml.Return) { return certificate(5), bad }
		}, "certificates", false, true},
		"certificates of no bytes": {func(m *machine) {
			m.dev.GetConfComputeGpuCertificateFunc = func() (nvml.ConfComputeGpuCertificate, nvml.Return) { return certificate(0), nvml.SUCCESS }
		}, "0 bytes", false, true},
		"certificates beyond their buffer": {func(m *machine) {
			m.dev.GetConfComputeGpuCertificateFunc = func() (nvml.ConfComputeGpuCertificate, nvml.Return) { return certificate(5121), nvml.SUCCESS }
		}, "5121 bytes", false, true},
		"report": {func(m *machine) {
			m.dev.GetConfComputeGpuAttestationReportFunc = func(r *nvml.ConfComputeGpuAttestationReport) nvml.Return {
				r.AttestationReportSize = 100
				return bad
			}
		}, "report", false, true},
		"report of no bytes": {func(m *machine) {
			m.dev.GetConfComputeGpuAttestationReportFunc = func(*nvml.ConfComputeGpuAttestationReport) nvml.Return { return nvml.SUCCESS }
		}, "0 bytes", false, true},
		"report beyond its buffer": {func(m *machine) {
			m.dev.GetConfComputeGpuAttestationReportFunc = func(r *nvml.ConfComputeGpuAttestationReport) nvml.Return {
				r.AttestationReportSize = 0xffffffff
				return nvml.SUCCESS
			}
		}, "4294967295 bytes", false, true},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine()
			c.breakIt(m)
			p := m.open(t)
			_, err := p.Inventory(t.Context())
			check(t, "inventory", err, c.inventory, c.want)
			_, err = p.Collect(t.Context(), [32]byte{}, []string{uuid})
			check(t, "collect", err, c.collect, c.want)
		})
	}
}

func check(t *testing.T, what string, err error, fails bool, want string) {
	t.Helper()
	if (err != nil) != fails {
		t.Errorf("%s: %v", what, err)
	}
	if err != nil && !strings.Contains(err.Error(), want) {
		t.Errorf("%s: %v does not name %q", what, err, want)
	}
}

func TestCollectStopsBetweenGPUs(t *testing.T) {
	m := newMachine()
	ctx, cancel := context.WithCancel(t.Context())
	m.dev.GetPersistenceModeFunc = func() (nvml.EnableState, nvml.Return) { cancel(); return nvml.FEATURE_ENABLED, nvml.SUCCESS }
	if _, err := m.open(t).Collect(ctx, [32]byte{}, []string{uuid, uuid}); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
}

func TestWedgedDriver(t *testing.T) {
	m := newMachine()
	wedged, entered := make(chan struct{}), make(chan struct{})
	m.dev.GetConfComputeGpuAttestationReportFunc = func(*nvml.ConfComputeGpuAttestationReport) nvml.Return {
		close(entered)
		<-wedged
		return nvml.ERROR_TIMEOUT
	}
	p := m.open(t)
	first := make(chan error)
	go func() {
		_, err := p.Collect(t.Context(), [32]byte{}, []string{uuid})
		first <- err
	}()
	<-entered
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := p.Inventory(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("inventory: %v", err)
	}
	if err := p.SetReady(ctx, true); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("set ready: %v", err)
	}
	close(wedged)
	if err := <-first; !errors.Is(err, nvml.ERROR_TIMEOUT) {
		t.Errorf("collect: %v", err)
	}
}

// TestHardware reads this machine's GPUs, if it has any. Nothing is set.
func TestHardware(t *testing.T) {
	if _, err := os.Stat("/proc/driver/nvidia/version"); err != nil {
		t.Skip("this machine has no NVIDIA driver")
	}
	p, err := nvidia.Open(nvml.New(), false)
	if err != nil {
		t.Fatal(err)
	}
	inv, err := p.Inventory(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", inv)
	if inv.DriverVersion == "" || len(inv.Devices) == 0 || inv.Devices[0].MemoryBytes == 0 {
		t.Errorf("incomplete inventory")
	}
	if inv.CCMode == contract.CCOff {
		if _, err := p.Collect(t.Context(), [32]byte{1}, []string{inv.Devices[0].UUID}); err == nil || !strings.Contains(err.Error(), "confidential computing is off") {
			t.Errorf("collect: %v", err)
		}
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

func TestSetReadyFails(t *testing.T) {
	m := newMachine()
	m.lib.SystemSetConfComputeGpusReadyStateFunc = func(uint32) nvml.Return { return nvml.ERROR_NO_PERMISSION }
	if err := m.open(t).SetReady(t.Context(), true); !errors.Is(err, nvml.ERROR_NO_PERMISSION) {
		t.Fatalf("got %v", err)
	}
}

func TestClose(t *testing.T) {
	m := newMachine()
	if err := m.open(t).Close(); err != nil {
		t.Fatal(err)
	}
	m.lib.ShutdownFunc = func() nvml.Return { return nvml.ERROR_UNINITIALIZED }
	if err := m.open(t).Close(); err == nil {
		t.Fatal("no error")
	}
}
