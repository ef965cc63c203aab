package sandbox

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// leastShares is the smallest weight of a group's processes for a core
// (cpu.shares), and its equivalent under version 2.
const leastShares = 2

// CreateReserveCgroup makes the group of a process that makes memory ready while
// it has no job: of at most memory bytes, and on cores that no job's group wants.
func CreateReserveCgroup(path string, memory int64) (*Cgroup, error) {
	shares, pids := uint64(leastShares), int64(runtimeTasks)
	return createCgroup(path, &specs.LinuxResources{
		CPU: &specs.LinuxCPU{Shares: &shares}, Memory: &specs.LinuxMemory{Limit: &memory, Swap: &memory}, Pids: &specs.LinuxPids{Limit: &pids},
	})
}

// MemoryUsage is what is charged to the group, in bytes. Memory stays charged to
// the group whose process touched it first, also when that process has moved on.
func (c *Cgroup) MemoryUsage() (int64, error) {
	at := filepath.Join(cgroupRoot, string(cgroup1.Memory), c.path, "memory.usage_in_bytes")
	if c.unified {
		at = filepath.Join(cgroupRoot, c.path, "memory.current")
	}
	b, err := os.ReadFile(at)
	if err != nil {
		return 0, fmt.Errorf("memory of cgroup %s: %w", c.path, err)
	}
	n, err := strconv.ParseInt(string(bytes.TrimSpace(b)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("memory of cgroup %s: %w", c.path, err)
	}
	return n, nil
}

// LowerMemory makes the group's bound on memory limit bytes, without swap.
func (c *Cgroup) LowerMemory(limit int64) error {
	if limit <= 0 {
		return fmt.Errorf("bound memory of cgroup %s: to %d bytes", c.path, limit)
	}
	res := &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit, Swap: &limit}}
	var err error
	if c.unified {
		var m *cgroup2.Manager
		if m, err = cgroup2.Load(c.path); err == nil {
			err = m.Update(cgroup2.ToResources(res))
		}
	} else {
		var g cgroup1.Cgroup
		if g, err = cgroup1.Load(cgroup1.StaticPath(c.path)); err == nil {
			err = g.Update(res)
		}
	}
	if err != nil {
		return fmt.Errorf("bound memory of cgroup %s: %w", c.path, err)
	}
	return nil
}
