package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"tags.cncf.io/container-device-interface/pkg/cdi"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

// GPUs says how GPUs come into sandboxes. A node without it runs jobs with GPUs
// without their devices: the GPUs' evidence is collected outside the sandbox.
type GPUs struct {
	// Driver is the version of the machine's driver.
	Driver string
	// SpecDirs hold the machine's CDI specifications, as nvidia-ctk generates them.
	SpecDirs []string
}

// gpuKind is the CDI kind of NVIDIA's GPUs.
const gpuKind = "nvidia.com/gpu"

// gpuCapabilities are what the runtime lets a job ask of the driver: to compute, and
// NVML, and neither graphics nor video.
const gpuCapabilities = "compute,utility"

var gpuFlags = []string{"--nvproxy", "--nvproxy-allowed-driver-capabilities=" + gpuCapabilities}

// gpuDevices are the device nodes that computing needs. nvidia-modeset, nvidia-caps
// and /dev/dri, which CDI specifications list too, are left out.
var gpuDevices = regexp.MustCompile(`^/dev/(nvidia[0-9]{1,3}|nvidiactl|nvidia-uvm)$`)

// gpuFolders are where the driver's libraries and programs may appear in a sandbox.
var gpuFolders = []string{"/usr/bin/", "/usr/lib/", "/usr/lib64/", "/usr/local/nvidia/"}

// supportedDrivers asks the runtime which drivers it knows. It knows each version's
// interface by itself: one that is near is none.
func supportedDrivers(ctx context.Context, runsc string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, runsc, "nvproxy", "list-supported-drivers").Output() //nolint:gosec // the configured runtime
	if err != nil {
		return nil, fmt.Errorf("ask %s which GPU drivers it supports: %w", runsc, err)
	}
	return strings.Fields(string(out)), nil
}

// openGPUs fixes the profile of sandboxes with GPUs.
func (n *Node) openGPUs(ctx context.Context) (err error) {
	if n.cfg.GPUs == nil {
		return nil
	}
	if n.drivers, err = supportedDrivers(ctx, n.cfg.Runsc); err != nil {
		return err
	}
	n.profile.GPU = &plan.GPUProfile{Driver: n.cfg.GPUs.Driver, Flags: gpuFlags}
	return nil
}

// CheckGPUs refuses a plan with GPUs whose driver the runtime does not know. It is
// asked before anything is attested.
func (n *Node) CheckGPUs(p plan.Plan) error {
	if p.Resources.GPUs == 0 || n.cfg.GPUs == nil || slices.Contains(n.drivers, n.cfg.GPUs.Driver) {
		return nil
	}
	var l check.List
	l.Fail("sandbox.gpu-driver", "one of "+strings.Join(n.drivers, ", "), fmt.Sprintf("%.80q", n.cfg.GPUs.Driver),
		"install a driver that this runtime's nvproxy knows, or a runtime that knows this driver: runsc nvproxy list-supported-drivers")
	return check.Refuse("sandbox", l)
}

// enter puts devices into a specification: of what the machine's CDI specifications
// have, the device nodes that computing needs, the driver's files, for reading, and
// nothing else. Their hooks would run as root on the machine, and do not run.
func (g *GPUs) enter(s *specs.Spec, uuids []string) error {
	cache, err := cdi.NewCache(cdi.WithSpecDirs(g.SpecDirs...), cdi.WithAutoRefresh(false))
	if err != nil {
		return fmt.Errorf("read CDI specifications: %w", err)
	}
	names := make([]string, 0, len(uuids))
	for _, u := range uuids {
		names = append(names, gpuKind+"="+u)
	}
	found := &specs.Spec{Version: s.Version, Process: &specs.Process{User: s.Process.User}, Linux: &specs.Linux{}}
	if missing, err := cache.InjectDevices(found, names...); err != nil {
		return fmt.Errorf("find GPUs %v in the CDI specifications of %v: missing %v: %w", uuids, g.SpecDirs, missing, err)
	}
	gpus := 0
	for _, d := range found.Linux.Devices {
		if !gpuDevices.MatchString(d.Path) || d.Type != "c" {
			continue
		}
		if d.Path != "/dev/nvidiactl" && d.Path != "/dev/nvidia-uvm" {
			gpus++
		}
		s.Linux.Devices = append(s.Linux.Devices, d)
		major, minor := d.Major, d.Minor
		s.Linux.Resources.Devices = append(s.Linux.Resources.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: &major, Minor: &minor, Access: "rw"})
	}
	// One for all would give a job the GPUs of others.
	if gpus != len(uuids) {
		return fmt.Errorf("the CDI specifications have %d device nodes for %d GPUs: want one each", gpus, len(uuids))
	}
	for _, m := range found.Mounts {
		if m.Type != "bind" && m.Type != "" && !slices.Contains(m.Options, "bind") && !slices.Contains(m.Options, "rbind") {
			continue
		}
		if !inGPUFolder(m.Destination) || !inGPUFolder(m.Source) {
			continue
		}
		s.Mounts = append(s.Mounts, specs.Mount{Destination: m.Destination, Type: "bind", Source: m.Source, Options: []string{"bind", "nosuid", "nodev", "ro"}})
	}
	s.Process.Env = append([]string{"NVIDIA_VISIBLE_DEVICES=void", "NVIDIA_DRIVER_CAPABILITIES=" + gpuCapabilities}, s.Process.Env...)
	return nil
}

func inGPUFolder(p string) bool {
	return path.Clean(p) == p && slices.ContainsFunc(gpuFolders, func(f string) bool { return strings.HasPrefix(p, f) })
}

// enterGPUs does so for a request, if this node brings GPUs into sandboxes.
func (n *Node) enterGPUs(s *specs.Spec, r Request) error {
	if err := n.CheckGPUs(r.Plan); err != nil {
		return err
	}
	if n.cfg.GPUs == nil || r.Plan.Resources.GPUs == 0 {
		return nil
	}
	if len(r.GPUs) != r.Plan.Resources.GPUs {
		return errors.New("create sandbox: other GPUs than the plan asks for")
	}
	return n.cfg.GPUs.enter(s, r.GPUs)
}
