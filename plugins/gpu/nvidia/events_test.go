package nvidia_test

import (
	"slices"
	"testing"

	"github.com/NVIDIA/go-nvml/pkg/nvml"

	"github.com/coffer-run/coffer/plugins/gpu/nvidia"
)

// What the driver tells of is counted once, per device, and nothing else is.
func TestCriticalErrors(t *testing.T) {
	m := newMachine()
	var asked uint64
	m.dev.RegisterEventsFunc = func(kinds uint64, _ nvml.EventSet) nvml.Return { asked = kinds; return nvml.SUCCESS }
	p := m.open(t)
	if asked != nvml.EventTypeXidCriticalError {
		t.Errorf("asked for events %#x", asked)
	}
	xid := func(n uint64) nvml.EventData {
		return nvml.EventData{Device: m.dev, EventType: nvml.EventTypeXidCriticalError, EventData: n}
	}
	for i, row := range []struct {
		told         []nvml.EventData
		faults, last uint64
	}{
		{nil, 0, 0},
		{[]nvml.EventData{xid(79)}, 1, 79},
		{nil, 1, 79},
		{[]nvml.EventData{{Device: m.dev, EventType: nvml.EventTypePState, EventData: 3}, {EventType: nvml.EventTypeXidCriticalError}}, 1, 79},
		{[]nvml.EventData{xid(48), xid(63)}, 3, 63},
	} {
		m.told = row.told
		st, err := p.State(t.Context(), []string{uuid})
		if err != nil {
			t.Fatal(err)
		}
		if d := st.Devices[0]; d.Faults != row.faults || d.LastFault != row.last || st.DriverVersion != "580.65.06" {
			t.Errorf("look %d: %+v of %s", i, d, st.DriverVersion)
		}
	}
	if err := p.Close(); err != nil || !slices.Contains(m.calls, "free") {
		t.Errorf("closed with %v, calls %q", err, m.calls)
	}
}

// A driver without events has none. One whose events fail is no driver to rely on.
func TestEventsThatFail(t *testing.T) {
	for name, row := range map[string]struct {
		breakIt     func(*machine)
		open, state bool
	}{
		"no events in the driver": {func(m *machine) {
			m.lib.EventSetCreateFunc = func() (nvml.EventSet, nvml.Return) { return nil, nvml.ERROR_NOT_SUPPORTED }
		}, true, true},
		"no events of the device": {func(m *machine) {
			m.dev.RegisterEventsFunc = func(uint64, nvml.EventSet) nvml.Return { return nvml.ERROR_NOT_SUPPORTED }
		}, true, true},
		"no set": {func(m *machine) {
			m.lib.EventSetCreateFunc = func() (nvml.EventSet, nvml.Return) { return nil, nvml.ERROR_UNKNOWN }
		}, false, false},
		"no registration": {func(m *machine) {
			m.dev.RegisterEventsFunc = func(uint64, nvml.EventSet) nvml.Return { return nvml.ERROR_UNKNOWN }
		}, false, false},
		"a GPU that is lost": {func(m *machine) {
			m.events.WaitFunc = func(uint32) (nvml.EventData, nvml.Return) { return nvml.EventData{}, nvml.ERROR_GPU_IS_LOST }
		}, true, false},
		"no driver version": {func(m *machine) {
			m.lib.SystemGetDriverVersionFunc = func() (string, nvml.Return) { return "", nvml.ERROR_UNKNOWN }
		}, true, false},
		"more than anybody hears": {func(m *machine) {
			m.events.WaitFunc = func(uint32) (nvml.EventData, nvml.Return) {
				return nvml.EventData{Device: m.dev, EventType: nvml.EventTypeXidCriticalError, EventData: 1}, nvml.SUCCESS
			}
		}, true, true},
	} {
		m := newMachine()
		row.breakIt(m)
		p, err := nvidia.Open(resettable{m.lib, m}, false)
		if (err == nil) != row.open {
			t.Errorf("%s: open: %v", name, err)
		}
		if err != nil {
			continue
		}
		if _, err := p.State(t.Context(), []string{uuid}); (err == nil) != row.state {
			t.Errorf("%s: state: %v", name, err)
		}
	}
}

// NVML is closed for a reset on the bus, and so are its events; they are heard again
// afterwards.
func TestEventsAfterAReset(t *testing.T) {
	m := newMachine()
	registered := 0
	m.dev.RegisterEventsFunc = func(uint64, nvml.EventSet) nvml.Return { registered++; return nvml.SUCCESS }
	closed := 0
	m.lib.ShutdownFunc = func() nvml.Return {
		if closed++; !slices.Contains(m.calls, "free") {
			t.Error("NVML is closed with a set of events")
		}
		return nvml.SUCCESS
	}
	p, err := nvidia.Open(m.lib, false)
	if err != nil {
		t.Fatal(err)
	}
	m.dev.GetPciInfoFunc = func() (nvml.PciInfo, nvml.Return) {
		var info nvml.PciInfo
		copy(info.BusId[:], "00000000:FF:1F.7")
		return info, nvml.SUCCESS
	}
	if err := p.Clear(t.Context(), []string{uuid}); err == nil {
		t.Error("a function that is not there was reset")
	}
	m.told = []nvml.EventData{{Device: m.dev, EventType: nvml.EventTypeXidCriticalError, EventData: 79}}
	st, err := p.State(t.Context(), []string{uuid})
	if err != nil || st.Devices[0].Faults != 1 || closed != 1 || registered != 2 {
		t.Errorf("%+v, %v: closed %d times, registered %d times", st, err, closed, registered)
	}
}
