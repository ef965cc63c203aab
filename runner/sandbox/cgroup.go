package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/coffer-run/coffer/attest/plan"
)

const (
	cgroupRoot = "/sys/fs/cgroup"
	sysBlock   = "/sys/block"
)

// Cgroup is one job's control group. The runtime joins it as it stands, and so
// does the job's holder: its regions count against the job.
type Cgroup struct {
	path    string
	unified bool
}

// cpuPeriod is the CFS period in microseconds (kernel default).
const cpuPeriod = 100_000

func limits(r plan.Resources) (*specs.LinuxResources, error) {
	on, err := disks(sysBlock)
	if err != nil {
		return nil, err
	}
	io, err := blockIO(r.IO, on)
	if err != nil {
		return nil, err
	}
	quota, period := r.CPUMillis*cpuPeriod/1000, uint64(cpuPeriod)
	// Memory and swap together at most the memory: no swap. What is swapped lies
	// on a disk that belongs to the adversary.
	return &specs.LinuxResources{
		CPU:     &specs.LinuxCPU{Quota: &quota, Period: &period},
		Memory:  &specs.LinuxMemory{Limit: &r.MemoryBytes, Swap: &r.MemoryBytes},
		Pids:    &specs.LinuxPids{Limit: &r.Pids},
		BlockIO: io,
	}, nil
}

// CreateCgroup makes the group at path below the root of every hierarchy, with
// the limits of r. The process limit is the job's threads in the sandbox; the
// group itself is given room for the runtime's and the holder's own.
func CreateCgroup(path string, r plan.Resources) (*Cgroup, error) {
	res, err := limits(r)
	if err != nil {
		return nil, fmt.Errorf("create cgroup %s: %w", path, err)
	}
	room := r.Pids + runtimeTasks
	res.Pids.Limit = &room
	return createCgroup(path, res)
}

func createCgroup(path string, res *specs.LinuxResources) (_ *Cgroup, err error) {
	c := &Cgroup{path: path, unified: cgroups.Mode() == cgroups.Unified}
	if err := swapAccounted(c.unified); err != nil {
		return nil, fmt.Errorf("create cgroup %s: %w", path, err)
	}
	if c.unified {
		_, err = cgroup2.NewManager(cgroupRoot, path, cgroup2.ToResources(res))
	} else {
		_, err = cgroup1.New(cgroup1.StaticPath(path), res)
	}
	if err == nil {
		if err = ioHolds(cgroupRoot, path, c.unified, res.BlockIO); err != nil {
			err = errors.Join(err, c.Remove())
		}
	}
	if err != nil {
		return nil, fmt.Errorf("create cgroup %s: %w", path, err)
	}
	return c, nil
}

// swapAccounted makes sure that the limit on swap holds: a version 1 kernel can
// lack it, and then the machine may have no swap at all.
func swapAccounted(unified bool) error {
	if unified {
		return nil
	}
	if _, err := os.Stat(cgroupRoot + "/memory/memory.memsw.limit_in_bytes"); err == nil {
		return nil
	}
	on, err := SwapOn()
	if err != nil {
		return err
	}
	if on {
		return errors.New("this kernel cannot keep a group out of swap, and swap is on: swapoff -a")
	}
	return nil
}

// runtimeTasks is room for the threads of runsc, its gofer and the holder.
const runtimeTasks = 512

// OpenCgroup returns the group at path.
func OpenCgroup(path string) *Cgroup {
	return &Cgroup{path: path, unified: cgroups.Mode() == cgroups.Unified}
}

// Add moves a process into the group.
func (c *Cgroup) Add(pid int) error {
	if pid <= 0 {
		return fmt.Errorf("add process %d to cgroup %s: not a process", pid, c.path)
	}
	var err error
	if c.unified {
		var m *cgroup2.Manager
		if m, err = cgroup2.Load(c.path); err == nil {
			err = m.AddProc(uint64(pid))
		}
	} else {
		var g cgroup1.Cgroup
		if g, err = cgroup1.Load(cgroup1.StaticPath(c.path)); err == nil {
			err = g.Add(cgroup1.Process{Pid: pid})
		}
	}
	if err != nil {
		return fmt.Errorf("add process %d to cgroup %s: %w", pid, c.path, err)
	}
	return nil
}

// Procs opens the group's list of processes for reading. Under version 1 each
// hierarchy has one; the one for processes is meant.
func (c *Cgroup) Procs() (*os.File, error) {
	at := filepath.Join(cgroupRoot, c.path)
	if !c.unified {
		at = filepath.Join(cgroupRoot, string(cgroup1.Pids), c.path)
	}
	f, err := os.Open(filepath.Join(at, "cgroup.procs"))
	if err != nil {
		return nil, fmt.Errorf("list processes of cgroup %s: %w", c.path, err)
	}
	return f, nil
}

// Remove kills what is left in the group and deletes it. A group that is gone
// already is no error.
func (c *Cgroup) Remove() error {
	var err error
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		c.kill()
		if err = c.delete(); err == nil || time.Now().After(deadline) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("remove cgroup %s: %w", c.path, err)
	}
	return nil
}

func (c *Cgroup) delete() error {
	if c.unified {
		m, err := cgroup2.Load(c.path)
		if err != nil {
			return err
		}
		if err := m.Delete(); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
	g, err := cgroup1.Load(cgroup1.StaticPath(c.path))
	if errors.Is(err, cgroup1.ErrCgroupDeleted) {
		return nil
	}
	if err != nil {
		return err
	}
	return g.Delete()
}

func (c *Cgroup) kill() {
	var pids []int
	if c.unified {
		if m, err := cgroup2.Load(c.path); err == nil {
			procs, _ := m.Procs(true) //nolint:errcheck // the deletion reports what is left
			for _, p := range procs {
				pids = append(pids, int(p)) //nolint:gosec // a pid fits
			}
		}
	} else if g, err := cgroup1.Load(cgroup1.StaticPath(c.path)); err == nil {
		procs, _ := g.Processes(cgroup1.Pids, true) //nolint:errcheck // the deletion reports what is left
		for _, p := range procs {
			pids = append(pids, p.Pid)
		}
	}
	for _, p := range pids {
		if p != os.Getpid() {
			_ = syscall.Kill(p, syscall.SIGKILL)
		}
	}
}

// JobCgroup is the path of a job's group below the agent's.
func JobCgroup(parent, job string) string {
	return strings.TrimSuffix(parent, "/") + "/" + strings.ToLower(job)
}
