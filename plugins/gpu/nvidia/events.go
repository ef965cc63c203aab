package nvidia

import (
	"fmt"

	"github.com/NVIDIA/go-nvml/pkg/nvml"

	"github.com/coffer-run/coffer/plugins/contract"
)

// fault is what the driver told of one device's critical errors.
type fault struct{ count, last uint64 }

// maxEvents bounds the events of one look: a device that fails all the time must not
// keep the driver busy. What is left is heard at the next.
const maxEvents = 256

// listen asks the driver for the critical errors of all devices (nvml.h,
// nvmlEventTypeXidCriticalError). A driver that knows no events tells of none.
func (p *Plugin) listen() error {
	n, ret := p.lib.DeviceGetCount()
	if ret != nvml.SUCCESS || n == 0 {
		// Whoever asks for the devices hears why.
		return nil
	}
	set, ret := p.lib.EventSetCreate()
	if ret == nvml.ERROR_NOT_SUPPORTED || ret == nvml.ERROR_FUNCTION_NOT_FOUND {
		return nil
	}
	if err := failed("set of events", ret); err != nil {
		return err
	}
	for i := range min(n, contract.MaxGPUs) {
		d, ret := p.lib.DeviceGetHandleByIndex(i)
		if ret != nvml.SUCCESS {
			continue
		}
		if ret := d.RegisterEvents(nvml.EventTypeXidCriticalError, set); ret != nvml.SUCCESS && ret != nvml.ERROR_NOT_SUPPORTED {
			_ = set.Free()
			return failed(fmt.Sprintf("events of GPU %d", i), ret)
		}
	}
	p.events = set
	return nil
}

// unlisten lets go of the events, as the driver asks before it is closed.
func (p *Plugin) unlisten() error {
	if p.events == nil {
		return nil
	}
	set := p.events
	p.events = nil
	return failed("free the set of events", set.Free())
}

// hear counts what the driver has to tell. It does not wait.
func (p *Plugin) hear() error {
	if p.events == nil {
		return nil
	}
	for range maxEvents {
		e, ret := p.events.Wait(0)
		if ret == nvml.ERROR_TIMEOUT {
			return nil
		}
		if err := failed("events", ret); err != nil {
			return err
		}
		if e.EventType&nvml.EventTypeXidCriticalError == 0 || e.Device == nil {
			continue
		}
		uuid, ret := e.Device.GetUUID()
		if err := failed("UUID of a GPU that failed", ret); err != nil {
			return err
		}
		p.faults[uuid] = fault{p.faults[uuid].count + 1, e.EventData}
	}
	return nil
}
