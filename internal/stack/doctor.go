package stack

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Doctor makes the checks of Up, and those that only cost speed or hardware.
func Doctor(o Options) ([]Finding, error) {
	l, err := NewLayout(o.Dir)
	if err != nil {
		return nil, err
	}
	if i, err := l.readInfo(); err == nil && o.ToolsDir == "" {
		o.ToolsDir = i.Tools // those that the stack was begun with
	}
	m := thisMachine()
	out := m.preflight(l, o.tools(), o.Ports)
	for i := range out {
		// A stack that is up keeps another from starting, and is no fault.
		if out[i].Name == folderCheck && l.isUp() {
			out[i].Outcome, out[i].Advice = OK, ""
		}
	}
	return append(append(out, m.quality()...), m.checkConfidential()), nil
}

// NodeConfig returns the configuration of the agent of a stack of which something runs,
// and nothing if nothing does in dir.
func NodeConfig(dir string) (string, error) {
	l, err := NewLayout(dir)
	if err != nil {
		return "", err
	}
	if r, err := l.readRecord(); err != nil || !slices.ContainsFunc(r.Processes, process.alive) {
		// Why a record cannot be read is a finding of its own.
		return "", nil //nolint:nilerr // see above
	}
	return l.config(agentName), nil
}

// Machine makes the checks that any node's machine is to pass, whatever runs on it.
func Machine() []Finding {
	m := thisMachine()
	return append([]Finding{m.checkRoot(), m.checkMemory(), m.checkSwap(), m.checkFuse()}, m.quality()...)
}

// quality are the checks of what only costs speed, or limits.
func (m machine) quality() []Finding {
	return []Finding{m.checkMemlock(), m.checkShmemTHP(), m.checkInitOnFree(), m.checkOverlay(), m.checkCgroups(), m.checkKVM(), m.checkPassthrough(), m.checkResourceCap()}
}

// machine is where the checks look.
type machine struct {
	// root is put before every path.
	root string
	// uid is who asks, release the kernel's, memlock the limit on locked memory in bytes.
	uid     int
	release string
	memlock uint64
	// unified: the control groups are those of version 2.
	unified bool
	// free is how many bytes of a folder's disk are free.
	free func(dir string) (int64, error)
}

// thisMachine is the one that the program runs on. What cannot be asked is zero, which
// passes no check.
func thisMachine() machine {
	m := machine{uid: os.Geteuid(), free: freeBytes}
	var r unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_MEMLOCK, &r) == nil {
		m.memlock = r.Max
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.release = unix.ByteSliceToString(u.Release[:])
	}
	var st unix.Statfs_t
	m.unified = unix.Statfs(cgroupRoot, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
	return m
}

func freeBytes(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, err
	}
	return int64(st.Bavail) * st.Bsize, nil //nolint:gosec // a disk's size fits
}

// at is where a file of the machine is.
func (m machine) at(path string) string { return filepath.Join(m.root, path) }

func (m machine) checkMemlock() Finding {
	if m.memlock == unix.RLIM_INFINITY || m.hasCapability(unix.CAP_IPC_LOCK) {
		return Finding{Name: "memlock", Outcome: OK, Found: "unlimited"}
	}
	return Finding{Name: "memlock", Outcome: Warn, Found: Bytes(int64(m.memlock)), Advice: "raise it with `ulimit -l unlimited`: opened data is locked in memory"}
}

func (m machine) checkShmemTHP() Finding {
	const file = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
	b, err := os.ReadFile(m.at(file))
	if err != nil {
		return Finding{Name: "shmem huge pages", Outcome: Warn, Found: "not in this kernel", Advice: "opening large inputs is slower without"}
	}
	mode := chosen(string(b))
	switch mode {
	case "always", "within_size", "advise", "force":
		return Finding{Name: "shmem huge pages", Outcome: OK, Found: mode}
	}
	return Finding{Name: "shmem huge pages", Outcome: Warn, Found: mode, Advice: "for faster opening of large inputs: `echo advise > " + file + "`"}
}

// chosen returns the word in brackets of a kernel setting such as "a [b] c".
func chosen(s string) string {
	_, rest, ok := strings.Cut(s, "[")
	if !ok {
		return strings.TrimSpace(s)
	}
	word, _, _ := strings.Cut(rest, "]")
	return word
}

func (m machine) checkOverlay() Finding {
	b, err := os.ReadFile(m.at("/proc/filesystems"))
	if err == nil && bytes.Contains(b, []byte("\toverlay\n")) {
		return Finding{Name: "overlayfs", Outcome: OK, Found: "yes"}
	}
	return Finding{Name: "overlayfs", Outcome: Warn, Found: "not registered", Advice: "load it with `modprobe overlay`: images cannot be unpacked without"}
}

func (m machine) checkCgroups() Finding {
	if m.unified {
		return Finding{Name: "cgroups", Outcome: OK, Found: "version 2"}
	}
	for _, c := range []string{"cpu", "memory", "pids"} {
		if _, err := os.Stat(m.at(filepath.Join(cgroupRoot, c))); err != nil {
			return Finding{Name: "cgroups", Outcome: Warn, Found: "version 1 without " + c, Advice: "jobs run without that limit"}
		}
	}
	return Finding{Name: "cgroups", Outcome: OK, Found: "version 1"}
}

func (m machine) checkKVM() Finding {
	if _, err := os.Stat(m.at("/dev/kvm")); err != nil {
		return Finding{Name: "kvm", Outcome: OK, Found: "none: gVisor uses systrap"}
	}
	return Finding{Name: "kvm", Outcome: OK, Found: "present; gVisor uses systrap all the same"}
}

// FUSE passthrough came with Linux 6.9.
const passthroughMajor, passthroughMinor = 6, 9

func (m machine) checkPassthrough() Finding {
	release := m.release
	major, minor := kernelVersion(release)
	if major > passthroughMajor || (major == passthroughMajor && minor >= passthroughMinor) {
		return Finding{Name: "fuse passthrough", Outcome: OK, Found: "Linux " + release}
	}
	return Finding{Name: "fuse passthrough", Outcome: Warn, Found: "Linux " + release, Advice: "Linux 6.9 or later reads inputs at memory speed; this one reads them through the holder"}
}

func kernelVersion(release string) (major, minor int) {
	f := strings.FieldsFunc(release, func(r rune) bool { return r < '0' || r > '9' })
	if len(f) < 2 {
		return 0, 0
	}
	major, _ = strconv.Atoi(f[0])
	minor, _ = strconv.Atoi(f[1])
	return major, minor
}

func (m machine) checkResourceCap() Finding {
	if m.hasCapability(unix.CAP_SYS_RESOURCE) {
		return Finding{Name: "resource capability", Outcome: OK, Found: "yes"}
	}
	return Finding{Name: "resource capability", Outcome: Warn, Found: "CAP_SYS_RESOURCE missing", Advice: "jobs cannot raise limits above the hard ones of this shell"}
}

func (m machine) hasCapability(c int) bool {
	b, err := os.ReadFile(m.at("/proc/self/status"))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "CapEff:"); ok {
			set, err := strconv.ParseUint(strings.TrimSpace(v), 16, 64)
			return err == nil && set&(1<<uint(c)) != 0
		}
	}
	return false
}

func (m machine) checkConfidential() Finding {
	f := Finding{Name: "confidential machine", Outcome: Warn, Found: "no SEV-SNP guest device", Advice: "evidence is simulated on this machine, and everything says so"}
	if _, err := os.Stat(m.at("/dev/sev-guest")); !errors.Is(err, fs.ErrNotExist) {
		f.Found = "/dev/sev-guest is there"
		f.Advice = "`coffer up` simulates all the same: run cofferd on its own to use the hardware"
	}
	return f
}
