// Package nvidia is the GPU plugin for NVIDIA GPUs over NVML.
//
// Trusted: the driver behind the interface. Checked: every return code, and the
// sizes that NVML gives. Not checked: the evidence, which is for the verifier;
// confidential-computing state is reported as NVML names it and decides nothing.
package nvidia

import (
	"context"
	"errors"
	"fmt"

	"github.com/NVIDIA/go-nvml/pkg/nvml"

	"github.com/coffer-run/coffer/plugins/contract"
)

// Plugin implements contract.GPU. Only Open makes one, because a call of NVML
// before a successful Init ends the process.
type Plugin struct {
	lib       nvml.Interface
	simulated bool

	// slot is held during NVML calls: the driver takes one attestation request at
	// a time, and answers a second one with an error. Unlike a mutex it can be
	// waited for with a context, for a call into a wedged driver never returns.
	slot chan struct{}

	// What follows is used with slot held. events is nil where the driver tells of
	// none.
	events nvml.EventSet
	faults map[string]fault // by UUID
}

var _ contract.GPU = (*Plugin)(nil)

// Open initializes NVML. simulated is what the plugin says of itself; nobody
// decides by it.
func Open(lib nvml.Interface, simulated bool) (*Plugin, error) {
	if lib == nil {
		return nil, errors.New("open NVML: no library")
	}
	if ret := lib.Init(); ret != nvml.SUCCESS {
		// Not lib.ErrorString: without a library there is none to ask.
		return nil, fmt.Errorf("open NVML: %w", ret)
	}
	p := &Plugin{lib: lib, simulated: simulated, slot: make(chan struct{}, 1), faults: map[string]fault{}}
	if err := p.listen(); err != nil {
		return nil, errors.Join(err, failed("close NVML", lib.Shutdown()))
	}
	return p, nil
}

func (p *Plugin) take(ctx context.Context) (release func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	select {
	case p.slot <- struct{}{}:
		return func() { <-p.slot }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for NVML: %w", ctx.Err())
	}
}

// Close ends the use of NVML after the last call.
func (p *Plugin) Close() error {
	p.slot <- struct{}{}
	return errors.Join(p.unlisten(), failed("close NVML", p.lib.Shutdown()))
}

// failed makes an error of a return code; nil for success.
func failed(what string, ret nvml.Return) error {
	if ret == nvml.SUCCESS {
		return nil
	}
	return fmt.Errorf("%s: %w", what, ret)
}

// Inventory lists the GPUs that NVML sees.
func (p *Plugin) Inventory(ctx context.Context) (*contract.Inventory, error) {
	release, err := p.take(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	driver, ret := p.lib.SystemGetDriverVersion()
	if err := failed("driver version", ret); err != nil {
		return nil, err
	}
	mode, err := p.ccMode()
	if err != nil {
		return nil, err
	}
	inv := &contract.Inventory{DriverVersion: driver, CCMode: mode, Simulated: p.simulated}
	if mode == contract.CCOn || mode == contract.CCDevtools {
		accepting, ret := p.lib.SystemGetConfComputeGpusReadyState()
		if err := failed("GPU ready state", ret); err != nil {
			return nil, err
		}
		inv.Ready = accepting == nvml.CC_ACCEPTING_CLIENT_REQUESTS_TRUE
	}
	n, ret := p.lib.DeviceGetCount()
	if err := failed("count of GPUs", ret); err != nil {
		return nil, err
	}
	if n > contract.MaxGPUs {
		return nil, fmt.Errorf("%d GPUs, at most %d are supported", n, contract.MaxGPUs)
	}
	for i := range n {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		d, ret := p.lib.DeviceGetHandleByIndex(i)
		if err := failed(fmt.Sprintf("GPU %d", i), ret); err != nil {
			return nil, err
		}
		dev, err := device(d, mode)
		if err != nil {
			return nil, fmt.Errorf("GPU %d: %w", i, err)
		}
		inv.Devices = append(inv.Devices, dev)
	}
	return inv, nil
}

// ccMode names the machine's confidential-computing state. Devtools mode is
// named as itself: it attests, and opens the GPU's memory to debuggers.
func (p *Plugin) ccMode() (contract.CCMode, error) {
	s, ret := p.lib.SystemGetConfComputeState()
	// GPUs before Hopper and drivers before R535 have no such state.
	if ret == nvml.ERROR_NOT_SUPPORTED || ret == nvml.ERROR_FUNCTION_NOT_FOUND {
		return contract.CCOff, nil
	}
	if err := failed("confidential computing state", ret); err != nil {
		return "", err
	}
	switch {
	case s.CcFeature == nvml.CC_SYSTEM_FEATURE_DISABLED:
		return contract.CCOff, nil
	case s.CcFeature != nvml.CC_SYSTEM_FEATURE_ENABLED:
		return contract.CCUnknown, nil
	case s.DevToolsMode == nvml.CC_SYSTEM_DEVTOOLS_MODE_ON:
		return contract.CCDevtools, nil
	case s.DevToolsMode == nvml.CC_SYSTEM_DEVTOOLS_MODE_OFF:
		return contract.CCOn, nil
	default:
		return contract.CCUnknown, nil
	}
}

func device(d nvml.Device, mode contract.CCMode) (contract.Device, error) {
	var out contract.Device
	var ret nvml.Return
	if out.UUID, ret = d.GetUUID(); ret != nvml.SUCCESS {
		return out, failed("UUID", ret)
	}
	if out.Name, ret = d.GetName(); ret != nvml.SUCCESS {
		return out, failed("name", ret)
	}
	if out.VBIOSVersion, ret = d.GetVbiosVersion(); ret != nvml.SUCCESS {
		return out, failed("VBIOS version", ret)
	}
	on, ret := d.GetPersistenceMode()
	if ret != nvml.SUCCESS {
		return out, failed("persistence mode", ret)
	}
	out.Persistent = on == nvml.FEATURE_ENABLED
	m, ret := d.GetMemoryInfo()
	if ret != nvml.SUCCESS {
		return out, failed("memory", ret)
	}
	out.MemoryBytes = int64(m.Total) // #nosec G115 -- bytes of one GPU
	if mode == contract.CCOn || mode == contract.CCDevtools {
		s, ret := d.GetConfComputeMemSizeInfo()
		if ret != nvml.SUCCESS {
			return out, failed("protected memory", ret)
		}
		out.ProtectedMemoryBytes = int64(s.ProtectedMemSizeKib) << 10 // #nosec G115 -- bytes of one GPU
	}
	return out, nil
}

// Collect asks each GPU in turn.
func (p *Plugin) Collect(ctx context.Context, nonce [contract.NonceSize]byte, uuids []string) ([]contract.Evidence, error) {
	release, err := p.take(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	mode, err := p.ccMode()
	if err != nil {
		return nil, err
	}
	if mode != contract.CCOn && mode != contract.CCDevtools {
		return nil, fmt.Errorf("confidential computing is %s: no GPU can attest", mode)
	}
	driver, ret := p.lib.SystemGetDriverVersion()
	if err := failed("driver version", ret); err != nil {
		return nil, err
	}
	out := make([]contract.Evidence, 0, len(uuids))
	for _, uuid := range uuids {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		e, err := p.collect(uuid, nonce)
		if err != nil {
			return nil, fmt.Errorf("GPU %s: %w", uuid, err)
		}
		e.DriverVersion = driver
		out = append(out, e)
	}
	return out, nil
}

func (p *Plugin) collect(uuid string, nonce [contract.NonceSize]byte) (contract.Evidence, error) {
	e := contract.Evidence{UUID: uuid}
	d, ret := p.lib.DeviceGetHandleByUUID(uuid)
	if err := failed("find", ret); err != nil {
		return e, err
	}
	// Without persistence mode the driver lets go of a GPU when its last client
	// ends, and a GPU in confidential mode does not come back.
	on, ret := d.GetPersistenceMode()
	if err := failed("persistence mode", ret); err != nil {
		return e, err
	}
	if on != nvml.FEATURE_ENABLED {
		return e, errors.New("persistence mode is off: start nvidia-persistenced before anything else uses the GPU")
	}
	if e.VBIOSVersion, ret = d.GetVbiosVersion(); ret != nvml.SUCCESS {
		return e, failed("VBIOS version", ret)
	}
	cert, ret := d.GetConfComputeGpuCertificate()
	if err := failed("certificates", ret); err != nil {
		return e, err
	}
	n := cert.AttestationCertChainSize
	if n == 0 || int64(n) > int64(len(cert.AttestationCertChain)) {
		return e, fmt.Errorf("certificates: NVML gives %d bytes: want 1 to %d", n, len(cert.AttestationCertChain))
	}
	e.Chain = append([]byte{}, cert.AttestationCertChain[:n]...)
	report := nvml.ConfComputeGpuAttestationReport{Nonce: nonce}
	if err := failed("report", d.GetConfComputeGpuAttestationReport(&report)); err != nil {
		return e, err
	}
	n = report.AttestationReportSize
	if n == 0 || int64(n) > int64(len(report.AttestationReport)) {
		return e, fmt.Errorf("report: NVML gives %d bytes: want 1 to %d", n, len(report.AttestationReport))
	}
	e.Report = append([]byte{}, report.AttestationReport[:n]...)
	return e, nil
}

// SetReady lets the driver accept work, or no longer.
func (p *Plugin) SetReady(ctx context.Context, ready bool) error {
	release, err := p.take(ctx)
	if err != nil {
		return err
	}
	defer release()
	mode, err := p.ccMode()
	if err != nil {
		return err
	}
	// There is no such state without confidential computing, and devtools mode
	// is no state in which to give GPUs to a job.
	if ready && mode != contract.CCOn {
		return fmt.Errorf("set ready: confidential computing is %s", mode)
	}
	state := uint32(nvml.CC_ACCEPTING_CLIENT_REQUESTS_FALSE)
	if ready {
		state = nvml.CC_ACCEPTING_CLIENT_REQUESTS_TRUE
	}
	return failed("set ready", p.lib.SystemSetConfComputeGpusReadyState(state))
}
