package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
)

// Rules names the version of the allow-list in this file. Whoever changes what a
// specification may hold changes this name, and with it every plan digest.
const Rules = "coffer.run/sandbox-rules/v5"

// RegionsMount is where a job finds the holder's socket for its inputs' memory
// (docs/formats/regions.md).
const RegionsMount = "/run/coffer"

const (
	// UID and GID are who a job runs as, inside and outside. The runtime itself is RootUID.
	UID, GID = 65532, 65532
	// openFiles stays under the hard limit of a machine without CAP_SYS_RESOURCE.
	openFiles = 1024
)

// Bind is a host folder that appears in the sandbox.
type Bind struct {
	Source   string
	Target   string
	Writable bool
}

// maskedPaths and readonlyPaths are what a container has no business reading or
// writing even where the sandbox's kernel would offer it.
var (
	maskedPaths   = []string{"/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware"}
	readonlyPaths = []string{"/proc/asound", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)

// buildSpec makes the OCI specification of a job. Everything in it is listed
// here; nothing comes from the image but its files.
func buildSpec(p plan.Plan, env []string, binds []Bind, network *Network, cgroup string) (*specs.Spec, error) {
	if (len(p.Egress) > 0) != (network != nil) {
		return nil, errors.New("a sandbox has a network if and only if its plan allows egress")
	}
	resources, err := limits(p.Resources)
	if err != nil {
		return nil, err
	}
	tmp := fmt.Sprintf("size=%d", min(p.Resources.MemoryBytes/4, 1<<30))
	s := &specs.Spec{
		Version: "1.1.0",
		Process: &specs.Process{
			User: specs.User{UID: UID, GID: GID},
			Args: p.Command,
			Env:  append([]string{"PATH=/usr/local/bin:/usr/bin:/bin", "LANG=C.UTF-8", "HOME=/tmp", "TMPDIR=/tmp", "OPENBLAS_NUM_THREADS=1"}, env...),
			Cwd:  "/",
			// An empty set, not an absent one: absent means the runtime's default.
			Capabilities:    &specs.LinuxCapabilities{Bounding: []string{}, Effective: []string{}, Inheritable: []string{}, Permitted: []string{}, Ambient: []string{}},
			NoNewPrivileges: true,
			Rlimits:         []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: openFiles, Soft: openFiles}, {Type: "RLIMIT_CORE"}},
		},
		Root:     &specs.Root{Path: "rootfs", Readonly: true},
		Hostname: "job",
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", fmt.Sprintf("size=%d", p.Resources.Shm())}},
			{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", tmp}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
		},
		Linux: &specs.Linux{
			CgroupsPath:   cgroup,
			Resources:     resources,
			MaskedPaths:   maskedPaths,
			ReadonlyPaths: readonlyPaths,
			// A network namespace of its own with --network=none leaves loopback.
			Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.MountNamespace}, {Type: specs.NetworkNamespace}},
		},
	}
	for _, b := range binds {
		opts := []string{"rbind", "nosuid", "nodev", "noexec", "ro"}
		if b.Writable {
			opts[4] = "rw"
		}
		s.Mounts = append(s.Mounts, specs.Mount{Destination: b.Target, Type: "bind", Source: b.Source, Options: opts})
	}
	mapUsers(s)
	if network != nil {
		network.enter(s)
	}
	return s, nil
}

// traceConfig is runsc's --pod-init-config: what the holder is told of.
type traceConfig struct {
	Session traceSession `json:"trace_session"`
}

type traceSession struct {
	Name   string       `json:"name"`
	Points []tracePoint `json:"points"`
	Sinks  []traceSink  `json:"sinks"`
}

type tracePoint struct {
	Name     string   `json:"name"`
	Optional []string `json:"optional_fields,omitempty"`
	Context  []string `json:"context_fields,omitempty"`
}

type traceSink struct {
	Name   string         `json:"name"`
	Config map[string]any `json:"config"`
}

// trace returns the trace configuration for a receiver at endpoint. A point that
// the runtime does not know only warns and runs untraced, so the holder requires
// container/start to arrive before it hands anything over. With opens, it is told of
// every file that is opened, and picks.
func trace(endpoint string, opens bool) ([]byte, error) {
	// No process_name: a job gives itself one. The receiver names programs by the groups of
	// their threads.
	who := []string{"time", "container_id", "group_id", "is_exec_session"}
	points := []tracePoint{
		{Name: "container/start", Context: []string{"time", "container_id", "group_id"}},
		{Name: "sentry/execve", Optional: []string{"binary_sha256"}, Context: who},
		// Clones and exits tell the end of the last task from a trace that was cut.
		{Name: "sentry/clone", Context: who},
		{Name: "sentry/task_exit", Context: who},
		{Name: "syscall/socket/enter", Context: who},
		{Name: "syscall/connect/enter", Context: who},
		{Name: "syscall/ptrace/enter", Context: who},
	}
	// Other ways to look into a process.
	for _, call := range []int{unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_PIDFD_GETFD} {
		points = append(points, rawPoint(call, who))
	}
	if opens {
		at := []string{"time", "group_id", "cwd"}
		points = append(points, tracePoint{Name: "syscall/open/enter", Context: at},
			tracePoint{Name: "syscall/creat/enter", Context: at},
			tracePoint{Name: "syscall/openat/enter", Optional: []string{"fd_path"}, Context: at},
			rawPoint(unix.SYS_OPENAT2, at)) // the sink makes an open of it
	}
	return json.Marshal(traceConfig{Session: traceSession{
		Name:   "Default",
		Points: points,
		Sinks:  []traceSink{{Name: traceSinkName, Config: map[string]any{"endpoint": endpoint}}},
	}})
}

// rawPoint is a call that the runtime has no message of its own for.
func rawPoint(call int, context []string) tracePoint {
	return tracePoint{Name: fmt.Sprintf("syscall/sysno/%d/enter", call), Context: context}
}
