package stack

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMachineChecks holds a machine against each check, whole and with one thing wrong.
func TestMachineChecks(t *testing.T) {
	good := map[string]string{
		"/proc/meminfo": "MemAvailable: 8388608 kB\n", "/proc/swaps": "Filename Type\n", "/dev/fuse": "", "/proc/self/status": "Name:\tx\nCapEff:\t000001ffffffffff\n",
		"/proc/filesystems": "nodev\tproc\n\toverlay\n", "/proc/cmdline": "init_on_free=1", "/sys/kernel/mm/transparent_hugepage/shmem_enabled": "always [advise] never",
		cgroupRoot + "/cpu/x": "", cgroupRoot + "/memory/x": "", cgroupRoot + "/pids/x": "",
	}
	const gone = "\x00"
	for name, row := range map[string]struct {
		file, content string
		change        func(*machine)
		check         func(machine) Finding
		want          Outcome
		found         string
	}{
		"not root":                       {change: func(m *machine) { m.uid = 1000 }, check: machine.checkRoot, want: Fail, found: "user 1000"},
		"little memory":                  {file: "/proc/meminfo", content: "MemAvailable: 1024 kB\n", check: machine.checkMemory, want: Fail, found: "1.0 MiB"},
		"memory that nobody tells":       {file: "/proc/meminfo", content: "MemTotal: 1024 kB\n", check: machine.checkMemory, want: Fail, found: "unknown"},
		"no /proc":                       {file: "/proc/meminfo", content: gone, check: machine.checkMemory, want: Fail},
		"swap":                           {file: "/proc/swaps", content: "Filename Type\n/dev/sda2 partition\n", check: machine.checkSwap, want: Fail, found: "/dev/sda2"},
		"a kernel without swap":          {file: "/proc/swaps", content: gone, check: machine.checkSwap, want: OK},
		"no fuse":                        {file: "/dev/fuse", content: gone, check: machine.checkFuse, want: Fail},
		"a full disk":                    {change: func(m *machine) { m.free = func(string) (int64, error) { return 1 << 20, nil } }, check: func(m machine) Finding { return m.checkDisk("/") }, want: Fail, found: "1.0 MiB"},
		"a disk that nobody can ask":     {change: func(m *machine) { m.free = func(string) (int64, error) { return 0, errors.New("no") } }, check: func(m machine) Finding { return m.checkDisk("/") }, want: Fail},
		"a limit on locked memory":       {file: "/proc/self/status", content: "CapEff:\t0\n", check: machine.checkMemlock, want: Warn, found: "8.0 MiB"},
		"locked memory by a capability":  {check: machine.checkMemlock, want: OK},
		"no limit on locked memory":      {file: "/proc/self/status", content: "CapEff:\t0\n", change: func(m *machine) { m.memlock = unix.RLIM_INFINITY }, check: machine.checkMemlock, want: OK},
		"no huge pages":                  {file: "/sys/kernel/mm/transparent_hugepage/shmem_enabled", content: "always advise [never]", check: machine.checkShmemTHP, want: Warn, found: "never"},
		"a kernel without huge pages":    {file: "/sys/kernel/mm/transparent_hugepage/shmem_enabled", content: gone, check: machine.checkShmemTHP, want: Warn},
		"pages are not zeroed":           {file: "/proc/cmdline", content: "quiet", check: machine.checkInitOnFree, want: Warn},
		"no overlayfs":                   {file: "/proc/filesystems", content: "\text4\n", check: machine.checkOverlay, want: Warn},
		"a group that is missing":        {file: cgroupRoot + "/memory/x", content: gone, check: machine.checkCgroups, want: Warn, found: "without memory"},
		"control groups of version 2":    {file: cgroupRoot + "/memory/x", content: gone, change: func(m *machine) { m.unified = true }, check: machine.checkCgroups, want: OK},
		"a kernel before passthrough":    {change: func(m *machine) { m.release = "6.8.0-x" }, check: machine.checkPassthrough, want: Warn, found: "6.8.0"},
		"a kernel that says nothing":     {change: func(m *machine) { m.release = "" }, check: machine.checkPassthrough, want: Warn},
		"no capability to raise limits":  {file: "/proc/self/status", content: "CapEff:\t0\n", check: machine.checkResourceCap, want: Warn},
		"a status that is no status":     {file: "/proc/self/status", content: "CapEff:\tmany\n", check: machine.checkResourceCap, want: Warn},
		"kvm":                            {file: "/dev/kvm", content: "", check: machine.checkKVM, want: OK, found: "present"},
		"not a confidential machine":     {check: machine.checkConfidential, want: Warn, found: "no SEV-SNP"},
		"a confidential one, not in use": {file: "/dev/sev-guest", content: "", check: machine.checkConfidential, want: Warn, found: "is there"},
	} {
		t.Run(name, func(t *testing.T) {
			m := machine{root: t.TempDir(), release: "6.12.0", memlock: 8 << 20, free: func(string) (int64, error) { return 8 << 30, nil }}
			put := func(file, content string) {
				at := m.at(file)
				if err := errors.Join(os.MkdirAll(filepath.Dir(at), 0o755), os.WriteFile(at, []byte(content), 0o600)); err != nil {
					t.Fatal(err)
				}
			}
			for file, content := range good {
				if file == row.file && row.content == gone {
					continue
				}
				put(file, content)
			}
			for _, f := range append(m.quality(), m.checkRoot(), m.checkMemory(), m.checkDisk("/")) {
				if row.file == "" && f.Outcome != OK {
					t.Errorf("before: %+v", f)
				}
			}
			if row.file != "" && row.content != gone {
				put(row.file, row.content)
			}
			if row.change != nil {
				row.change(&m)
			}
			f := row.check(m)
			if f.Outcome != row.want || !strings.Contains(f.Found, row.found) || (f.Advice == "") != (f.Outcome == OK) || f.Name == "" {
				t.Errorf("%+v, want %s with %q", f, row.want, row.found)
			}
		})
	}
}
