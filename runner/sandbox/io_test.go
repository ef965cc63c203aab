package sandbox

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup2"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/coffer-run/coffer/attest/plan"
)

func write(t *testing.T, text string, names ...string) {
	t.Helper()
	path := filepath.Join(names...)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
		t.Fatal(err)
	}
}

func TestDisks(t *testing.T) {
	dir := t.TempDir()
	for name, d := range map[string][2]string{"loop0": {"0", "7:0"}, "nvme0n1": {"1000215216", "259:0"}, "vda": {"41943040", "254:0"}} {
		write(t, d[0]+"\n", dir, name, "size")
		write(t, d[1]+"\n", dir, name, "dev")
	}
	got, err := disks(dir)
	if err != nil || !slices.Equal(got, []string{"259:0", "254:0"}) {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := disks(filepath.Join(dir, "none")); err == nil {
		t.Error("a machine that does not say which disks it has is believed to have none")
	}
	if _, err := blockIO(plan.IO{ReadsPerSecond: 1}, nil); err == nil {
		t.Error("a limit on no disk is a limit")
	}
	if io, err := blockIO(plan.IO{}, nil); io != nil || err != nil {
		t.Errorf("no limit is %v, %v", io, err)
	}
}

// Both layouts of control groups, as files: version 2 ran nowhere else.
func TestIOLimitsOfBothVersions(t *testing.T) {
	io, err := blockIO(plan.IO{ReadBytesPerSecond: 4 << 20, WriteBytesPerSecond: 1 << 20, ReadsPerSecond: 50, WritesPerSecond: 60}, []string{"254:0", "259:16"})
	if err != nil {
		t.Fatal(err)
	}
	var written []string
	for _, e := range cgroup2.ToResources(&specs.LinuxResources{BlockIO: io}).IO.Max {
		written = append(written, e.String()) // as it goes into io.max
	}
	slices.Sort(written)
	want := []string{"254:0 rbps=4194304", "254:0 riops=50", "254:0 wbps=1048576", "254:0 wiops=60", "259:16 rbps=4194304", "259:16 riops=50", "259:16 wbps=1048576", "259:16 wiops=60"}
	if !slices.Equal(written, want) {
		t.Errorf("version 2 is told %q, want %q", written, want)
	}

	const v2 = "254:0 rbps=4194304 wbps=1048576 riops=50 wiops=60\n259:16 rbps=4194304 wbps=1048576 riops=50 wiops=60\n"
	v1 := map[string]string{
		"read_bps_device": "254:0 4194304\n259:16 4194304\n", "write_bps_device": "254:0 1048576\n259:16 1048576\n",
		"read_iops_device": "254:0 50\n259:16 50\n", "write_iops_device": "254:0 60\n259:16 60\n",
	}
	for name, row := range map[string]struct {
		unified bool
		change  func(string) string // of what the kernel shows
		holds   bool
	}{
		"version 1":                    {false, nil, true},
		"version 2":                    {true, nil, true},
		"version 1, one disk is out":   {false, func(s string) string { return strings.ReplaceAll(s, "259:16 50\n", "") }, false},
		"version 2, one disk is out":   {true, func(s string) string { return strings.ReplaceAll(s, "259:16", "259:32") }, false},
		"version 1, another rate":      {false, func(s string) string { return strings.ReplaceAll(s, "254:0 1048576", "254:0 10485760") }, false},
		"version 2, no rate":           {true, func(s string) string { return strings.Replace(s, "wiops=60", "wiops=max", 1) }, false},
		"version 2, the other's rate":  {true, func(s string) string { return strings.Replace(s, "riops=50 wiops=60", "riops=60 wiops=50", 1) }, false},
		"version 1, nothing was taken": {false, func(string) string { return "" }, false},
		"version 2, nothing was taken": {true, func(string) string { return "" }, false},
	} {
		t.Run(name, func(t *testing.T) {
			root, shows := t.TempDir(), func(s string) string { return s }
			if row.change != nil {
				shows = row.change
			}
			if row.unified {
				write(t, shows(v2), root, "jobs", "one", "io.max")
			} else {
				for f, s := range v1 {
					write(t, shows(s), root, "blkio", "jobs", "one", "blkio.throttle."+f)
				}
			}
			if err := ioHolds(root, "/jobs/one", row.unified, io); (err == nil) != row.holds {
				t.Errorf("holds: %v, want %v", err, row.holds)
			}
			if err := ioHolds(root, "/jobs/other", row.unified, io); err == nil {
				t.Error("a group without the files holds")
			}
		})
	}
}

// On this kernel: what a process in the group reads from the disk takes its time.
func TestIOLimitSlowsReads(t *testing.T) {
	need(t)
	if cgroups.Mode() == cgroups.Unified {
		t.Skip("this machine has control groups of version 2; TestIOLimitsOfBothVersions looks at those")
	}
	file := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(file, make([]byte, 512<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	r := plan.Resources{CPUMillis: 1000, MemoryBytes: 64 << 20, Pids: 8, MaxSeconds: 9}
	read := func(name string) time.Duration {
		cg, err := CreateCgroup(testCgroup+"-io/"+name, r)
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := errors.Join(cg.Remove(), OpenCgroup(testCgroup+"-io").Remove()); err != nil {
				t.Error(err)
			}
		}()
		// It waits until it is in the group.
		cmd := exec.Command("/bin/sh", "-c", `kill -STOP $$; exec dd if="$0" of=/dev/null bs=64k iflag=direct status=none`, file)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if err := cg.Add(cmd.Process.Pid); err != nil {
			t.Fatal(err)
		}
		var st syscall.WaitStatus
		if _, err := syscall.Wait4(cmd.Process.Pid, &st, syscall.WUNTRACED, nil); err != nil || !st.Stopped() {
			t.Fatalf("%v, %v", st, err)
		}
		began := time.Now()
		if err := cmd.Process.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Fatal(err)
		}
		return time.Since(began)
	}
	// Whatever else the disk has to do.
	free := min(read("free"), read("free"), read("free"))
	r.IO.ReadBytesPerSecond = 1 << 20
	if slow := read("slow"); slow < 400*time.Millisecond || slow < 2*free {
		t.Errorf("512 KiB at 1 MiB/s took %s, and %s without a limit", slow, free)
	}
}
