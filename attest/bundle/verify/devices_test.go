package verify_test

import (
	"slices"
	"testing"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

// A plan that requires the driver's word has it in its record, or the record is false.
func TestDevicesRequired(t *testing.T) {
	l := newLab(t)
	on := &bundle.Devices{
		Launch: &bundle.DeviceState{CCMode: "on", Ready: true, GPUs: []bundle.DeviceUsage{}}, End: &bundle.DeviceState{CCMode: "on", GPUs: []bundle.DeviceUsage{}}, Cleared: true,
	}
	atTheEnd := *on
	atTheEnd.Launch = nil
	for name, c := range map[string]struct {
		cc      string
		devices *bundle.Devices
		failed  bool
	}{
		"required, and there":           {plan.CCRequired, on, false},
		"required, and nothing there":   {plan.CCRequired, nil, true},
		"required, and no launch there": {plan.CCRequired, &atTheEnd, true},
		"on, and nothing there":         {plan.CCOn, nil, false},
		"not asked for":                 {"", nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			j := newJob(t, l, bundletest.Options{CC: c.cc})
			edit(bundle.AgentPart, func(a *bundle.Agent) { a.Devices = c.devices })(t, j)
			var failed []string
			for _, g := range verify.Verify(build(t, j), pinned(t, l)).Groups {
				for _, k := range g.Checks {
					if k.Outcome == check.Fail {
						failed = append(failed, k.ID)
					}
				}
			}
			if c.failed != slices.Equal(failed, []string{"devices.required"}) || !c.failed && len(failed) > 0 {
				t.Errorf("failed: %v", failed)
			}
		})
	}
}

func TestDevices(t *testing.T) {
	l := newLab(t)
	for name, c := range map[string]struct {
		change func(*bundle.Devices)
		failed string
	}{
		"as it should be":          {func(*bundle.Devices) {}, ""},
		"not cleared":              {func(d *bundle.Devices) { d.Cleared = false }, "devices.cleared"},
		"nobody asked at the end":  {func(d *bundle.Devices) { d.End = nil }, "devices.cleared"},
		"DevTools mode":            {func(d *bundle.Devices) { d.Launch.CCMode = "devtools" }, "devices.launch"},
		"not ready, and used":      {func(d *bundle.Devices) { d.Launch.Ready = false }, "devices.launch"},
		"confidential mode is off": {func(d *bundle.Devices) { d.Launch.CCMode = "off" }, "devices.launch"},
	} {
		t.Run(name, func(t *testing.T) {
			j := newJob(t, l, bundletest.Options{})
			edit(bundle.AgentPart, func(a *bundle.Agent) {
				a.Devices = &bundle.Devices{
					Launch: &bundle.DeviceState{CCMode: "on", Ready: true, GPUs: []bundle.DeviceUsage{}}, End: &bundle.DeviceState{CCMode: "on", GPUs: []bundle.DeviceUsage{}}, Cleared: true,
				}
				c.change(a.Devices)
			})(t, j)
			var failed []string
			for _, g := range verify.Verify(build(t, j), pinned(t, l)).Groups {
				for _, k := range g.Checks {
					if k.Outcome == check.Fail {
						failed = append(failed, k.ID)
					}
				}
			}
			if c.failed == "" && len(failed) > 0 || c.failed != "" && (len(failed) != 1 || failed[0] != c.failed) {
				t.Errorf("failed: %v, want %q", failed, c.failed)
			}
		})
	}
}
