package sandbox

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/coffer-run/coffer/attest/plan"
)

// cdiSpec is what nvidia-ctk writes, shortened, and what it must not bring along.
const cdiSpec = `{"cdiVersion": "0.6.0", "kind": "nvidia.com/gpu",
"containerEdits": {
  "env": ["LD_PRELOAD=/tmp/evil.so", "NVIDIA_VISIBLE_DEVICES=all"],
  "deviceNodes": [
    {"path": "/dev/nvidiactl", "type": "c", "major": 195, "minor": 255}, {"path": "/dev/nvidia-uvm", "type": "c", "major": 510},
    {"path": "/dev/nvidia-modeset", "type": "c", "major": 195, "minor": 254}, {"path": "/dev/sda", "type": "b", "major": 8}],
  "hooks": [{"hookName": "createContainer", "path": "/usr/bin/nvidia-cdi-hook", "args": ["nvidia-cdi-hook", "update-ldcache"]}],
  "mounts": [
    {"hostPath": "/usr/lib/x86_64-linux-gnu/libcuda.so.580.65.06", "containerPath": "/usr/lib/x86_64-linux-gnu/libcuda.so.580.65.06", "options": ["rw", "nosuid", "rbind"]},
    {"hostPath": "/etc/shadow", "containerPath": "/usr/lib/shadow", "options": ["ro", "bind"]},
    {"hostPath": "/usr/lib/x", "containerPath": "/inputs/data", "options": ["ro", "bind"]},
    {"hostPath": "/usr/lib/../../etc", "containerPath": "/usr/lib/etc", "options": ["ro", "bind"]},
    {"hostPath": "/run/nvidia-persistenced/socket", "containerPath": "/run/nvidia-persistenced/socket", "options": ["ro", "bind"]}]},
"devices": [
  {"name": "GPU-a", "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia0", "type": "c", "major": 195}, {"path": "/dev/dri/card1", "type": "c", "major": 226}]}},
  {"name": "GPU-b", "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia1", "type": "c", "major": 195, "minor": 1}]}},
  {"name": "GPU-none", "containerEdits": {"env": ["X=1"]}},
  {"name": "all", "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia0", "type": "c", "major": 195}, {"path": "/dev/nvidia1", "type": "c", "major": 195, "minor": 1}]}}]}`

func gpuNode(t *testing.T, driver string) *Node {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "nvidia.json"), []byte(cdiSpec), 0o600); err != nil {
		t.Fatal(err)
	}
	return &Node{cfg: Config{GPUs: &GPUs{Driver: driver, SpecDirs: []string{dir}}}, drivers: []string{"580.65.06"}, profile: plan.Profile{GPU: &plan.GPUProfile{Driver: driver, Flags: gpuFlags}}}
}

func gpuPlan(n int) plan.Plan {
	return plan.Plan{Command: []string{"/usr/bin/python3"}, Resources: plan.Resources{CPUMillis: 1000, MemoryBytes: 1 << 30, Pids: 64, GPUs: n, MaxSeconds: 60}}
}

func TestGPUsEnterASandbox(t *testing.T) {
	n, p := gpuNode(t, "580.65.06"), gpuPlan(1)
	s, err := buildSpec(p, nil, nil, nil, "/c")
	if err != nil {
		t.Fatal(err)
	}
	before := len(s.Mounts)
	if err := n.enterGPUs(s, Request{Plan: p, GPUs: []string{"GPU-a"}}); err != nil {
		t.Fatal(err)
	}
	var devices []string
	for _, d := range s.Linux.Devices {
		devices = append(devices, d.Path)
	}
	slices.Sort(devices)
	if !slices.Equal(devices, []string{"/dev/nvidia-uvm", "/dev/nvidia0", "/dev/nvidiactl"}) || len(s.Linux.Resources.Devices) != 3 {
		t.Errorf("devices %v, rules %v", devices, s.Linux.Resources.Devices)
	}
	if s.Hooks != nil {
		t.Errorf("hooks %+v would run on the machine", s.Hooks)
	}
	if added := s.Mounts[before:]; len(added) != 1 || added[0].Destination != "/usr/lib/x86_64-linux-gnu/libcuda.so.580.65.06" || !slices.Contains(added[0].Options, "ro") || slices.Contains(added[0].Options, "rw") {
		t.Errorf("mounts %+v", added)
	}
	if env := strings.Join(s.Process.Env, " "); strings.Contains(env, "LD_PRELOAD") || !strings.Contains(env, "NVIDIA_DRIVER_CAPABILITIES=compute,utility") {
		t.Errorf("environment %s", env)
	}
	flags, err := n.flags(p)
	if err != nil || !slices.Contains(flags, "--nvproxy") || !slices.Contains(flags, "--nvproxy-allowed-driver-capabilities=compute,utility") {
		t.Errorf("flags %v: %v", flags, err)
	}
	if flags, err = n.flags(gpuPlan(0)); err != nil || slices.Contains(flags, "--nvproxy") {
		t.Errorf("flags of a job without GPUs %v: %v", flags, err)
	}
}

func TestGPUsAreRefused(t *testing.T) {
	spec := func() *specs.Spec {
		s, err := buildSpec(gpuPlan(1), nil, nil, nil, "/c")
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	for name, row := range map[string]struct {
		driver string
		uuids  []string
		word   string
	}{
		"a GPU that the machine has not": {"580.65.06", []string{"GPU-x"}, "missing"},
		"every GPU under one name":       {"580.65.06", []string{"all"}, "2 device nodes for 1"},
		"a GPU without a device":         {"580.65.06", []string{"GPU-none"}, "0 device nodes for 1"},
		"more than the plan asks for":    {"580.65.06", []string{"GPU-a", "GPU-b"}, "other GPUs"},
		"none":                           {"580.65.06", nil, "other GPUs"},
		"a driver that is near":          {"580.65.07", []string{"GPU-a"}, "sandbox.gpu-driver"},
		"no driver":                      {"", []string{"GPU-a"}, "sandbox.gpu-driver"},
	} {
		t.Run(name, func(t *testing.T) {
			n := gpuNode(t, row.driver)
			s := spec()
			err := n.enterGPUs(s, Request{Plan: gpuPlan(1), GPUs: row.uuids})
			if err == nil || !strings.Contains(err.Error(), row.word) {
				t.Errorf("got %v, want %q", err, row.word)
			}
			if err := n.CheckGPUs(gpuPlan(0)); err != nil {
				t.Errorf("a job without GPUs: %v", err)
			}
		})
	}
}

// The list is the pinned runtime's own.
func TestDriversThatTheRuntimeKnows(t *testing.T) {
	tools, _ := need(t)
	list, err := supportedDrivers(t.Context(), filepath.Join(tools, "runsc"))
	if err != nil || !slices.Contains(list, "580.65.06") || slices.Contains(list, "580.65.07") {
		t.Errorf("%v: %v", list, err)
	}
	if _, err := supportedDrivers(t.Context(), "/bin/false"); err == nil {
		t.Error("a runtime that does not answer knows drivers")
	}
}
