package nvidia

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/NVIDIA/go-nvml/pkg/nvml"

	"github.com/coffer-run/coffer/plugins/contract"
)

// idleBytes is what a GPU that nobody uses may have in use, beyond what the driver
// reserves.
const idleBytes = 64 << 20

// Resetter is what an nvml.Interface may implement whose devices are not on the
// PCI bus.
type Resetter interface {
	// Reset forgets what a device holds.
	Reset(uuid string) error
}

// State reads how the driver and the named GPUs stand.
func (p *Plugin) State(ctx context.Context, uuids []string) (*contract.State, error) {
	release, err := p.take(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	return p.state(ctx, uuids)
}

// state is called with p.slot held.
func (p *Plugin) state(ctx context.Context, uuids []string) (*contract.State, error) {
	mode, err := p.ccMode()
	if err != nil {
		return nil, err
	}
	driver, ret := p.lib.SystemGetDriverVersion()
	if err := failed("driver version", ret); err != nil {
		return nil, err
	}
	if err := p.hear(); err != nil {
		return nil, err
	}
	out := &contract.State{CCMode: mode, DriverVersion: driver}
	cc := mode == contract.CCOn || mode == contract.CCDevtools
	if cc {
		accepting, ret := p.lib.SystemGetConfComputeGpusReadyState()
		if err := failed("GPU ready state", ret); err != nil {
			return nil, err
		}
		out.Ready = accepting == nvml.CC_ACCEPTING_CLIENT_REQUESTS_TRUE
		rotation, ret := p.lib.SystemGetConfComputeKeyRotationThresholdInfo()
		switch ret {
		case nvml.SUCCESS:
			out.AttackerAdvantage = rotation.AttackerAdvantage
		case nvml.ERROR_NOT_SUPPORTED, nvml.ERROR_FUNCTION_NOT_FOUND:
			// Drivers before R550 change no keys.
		default:
			return nil, failed("key rotation", ret)
		}
	}
	for _, uuid := range uuids {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		d, ret := p.lib.DeviceGetHandleByUUID(uuid)
		if err := failed("find GPU "+uuid, ret); err != nil {
			return nil, err
		}
		s, err := deviceState(d, uuid, cc)
		if err != nil {
			return nil, fmt.Errorf("GPU %s: %w", uuid, err)
		}
		s.Faults, s.LastFault = p.faults[uuid].count, p.faults[uuid].last
		out.Devices = append(out.Devices, s)
	}
	return out, nil
}

func deviceState(d nvml.Device, uuid string, cc bool) (contract.DeviceState, error) {
	out := contract.DeviceState{UUID: uuid}
	// The second version keeps apart what the driver reserves (nvmlMemory_v2_t).
	m, ret := d.GetMemoryInfo_v2()
	if err := failed("memory", ret); err != nil {
		return out, err
	}
	out.UsedBytes = int64(m.Used) // #nosec G115 -- bytes of one GPU
	running, ret := d.GetComputeRunningProcesses()
	if err := failed("processes", ret); err != nil {
		return out, err
	}
	out.Processes = len(running)
	info, ret := d.GetPciInfo()
	if err := failed("place on the bus", ret); err != nil {
		return out, err
	}
	out.NearNode = nearNode("/sys", pciName(info.BusId[:]))
	if cc {
		s, ret := d.GetConfComputeMemSizeInfo()
		if err := failed("protected memory", ret); err != nil {
			return out, err
		}
		out.ProtectedBytes = int64(s.ProtectedMemSizeKib) << 10     // #nosec G115 -- bytes of one GPU
		out.UnprotectedBytes = int64(s.UnprotectedMemSizeKib) << 10 // #nosec G115 -- bytes of one GPU
	}
	return out, nil
}

// Prepare sets the memory for staged copies and the threshold for changing keys,
// and reads both back. The driver refuses the second while GPUs are ready
// (nvml.h, NVML_ERROR_INVALID_STATE).
func (p *Plugin) Prepare(ctx context.Context, uuids []string, set contract.Settings) error {
	if err := set.Check(); err != nil {
		return err
	}
	release, err := p.take(ctx)
	if err != nil {
		return err
	}
	defer release()
	before, err := p.state(ctx, uuids)
	if err != nil {
		return err
	}
	if before.CCMode != contract.CCOn {
		return fmt.Errorf("prepare: confidential computing is %s", before.CCMode)
	}
	if before.Ready {
		return errors.New("prepare: the GPUs take work already")
	}
	for _, uuid := range uuids {
		d, ret := p.lib.DeviceGetHandleByUUID(uuid)
		if err := failed("find GPU "+uuid, ret); err != nil {
			return err
		}
		kib := uint64(set.UnprotectedBytes) >> 10 // #nosec G115 -- checked above
		if err := failed("memory for staged copies of GPU "+uuid, d.SetConfComputeUnprotectedMemSize(kib)); err != nil {
			return err
		}
	}
	rotation := nvml.ConfComputeSetKeyRotationThresholdInfo{MaxAttackerAdvantage: set.MaxAttackerAdvantage}
	rotation.Version = nvml.STRUCT_VERSION(rotation, 1)
	if err := failed("key rotation", p.lib.SystemSetConfComputeKeyRotationThresholdInfo(rotation)); err != nil {
		return err
	}
	after, err := p.state(ctx, uuids)
	if err != nil {
		return err
	}
	if after.AttackerAdvantage == 0 || after.AttackerAdvantage > set.MaxAttackerAdvantage {
		return fmt.Errorf("prepare: keys change at 2^%d, 2^%d was asked", after.AttackerAdvantage, set.MaxAttackerAdvantage)
	}
	for _, d := range after.Devices {
		if d.UnprotectedBytes < set.UnprotectedBytes {
			return fmt.Errorf("prepare: GPU %s has %d bytes for staged copies, %d were asked", d.UUID, d.UnprotectedBytes, set.UnprotectedBytes)
		}
	}
	return nil
}

// Clear resets the named GPUs through their PCI function, with NVML shut down
// meanwhile, and sees that nobody holds anything afterwards.
func (p *Plugin) Clear(ctx context.Context, uuids []string) error {
	release, err := p.take(ctx)
	if err != nil {
		return err
	}
	defer release()
	before, err := p.state(ctx, uuids)
	if err != nil {
		return err
	}
	var at []string
	for i, d := range before.Devices {
		if d.Processes > 0 {
			return fmt.Errorf("clear: GPU %s has %d processes", d.UUID, d.Processes)
		}
		h, ret := p.lib.DeviceGetHandleByUUID(uuids[i])
		if err := failed("find GPU "+d.UUID, ret); err != nil {
			return err
		}
		info, ret := h.GetPciInfo()
		if err := failed("place on the bus of GPU "+d.UUID, ret); err != nil {
			return err
		}
		at = append(at, pciName(info.BusId[:]))
	}
	if r, ok := p.lib.(Resetter); ok {
		for _, u := range uuids {
			if err := r.Reset(u); err != nil {
				return fmt.Errorf("clear: %w", err)
			}
		}
	} else if err := p.resetOnBus(at); err != nil {
		return err
	}
	after, err := p.state(ctx, uuids)
	if err != nil {
		return err
	}
	for _, d := range after.Devices {
		if d.Processes > 0 || d.UsedBytes > idleBytes {
			return fmt.Errorf("clear: GPU %s has %d processes and %d bytes in use after its reset", d.UUID, d.Processes, d.UsedBytes)
		}
	}
	return nil
}

// resetOnBus writes to each function's reset file (sysfs-bus-pci), which must not
// be in use: NVML lets go of its devices first.
func (p *Plugin) resetOnBus(at []string) error {
	if err := errors.Join(p.unlisten(), failed("close NVML", p.lib.Shutdown())); err != nil {
		return err
	}
	var err error
	for _, name := range at {
		if !pciForm.MatchString(name) {
			err = errors.Join(err, fmt.Errorf("clear: %.40q is no PCI function", name))
			continue
		}
		if werr := os.WriteFile("/sys/bus/pci/devices/"+name+"/reset", []byte("1"), 0); werr != nil {
			err = errors.Join(err, fmt.Errorf("clear: reset: %w", werr))
		}
	}
	if ierr := failed("open NVML", p.lib.Init()); ierr != nil {
		return errors.Join(err, ierr)
	}
	return errors.Join(err, p.listen())
}

// nearNode is 1 more than the memory node of a PCI function (sysfs-bus-pci,
// numa_node), and 0 where there is none: it is a hint.
func nearNode(sys, name string) int {
	if !pciForm.MatchString(name) {
		return 0
	}
	b, err := os.ReadFile(filepath.Join(sys, "bus/pci/devices", name, "numa_node")) // #nosec G304 -- a name of the form above
	if err != nil {
		return 0
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || n < 0 {
		return 0
	}
	return n + 1
}

var pciForm = regexp.MustCompile(`^[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$`)

// pciName makes the kernel's name of NVML's, which has eight digits of domain.
func pciName(id []byte) string {
	var b strings.Builder
	for _, c := range id {
		if c == 0 {
			break
		}
		b.WriteByte(c)
	}
	s := strings.ToLower(b.String())
	if domain, rest, ok := strings.Cut(s, ":"); ok && len(domain) == 8 && strings.HasPrefix(domain, "0000") {
		return domain[4:] + ":" + rest
	}
	return s
}
