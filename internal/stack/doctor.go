package stack

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
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
	out := preflight(l, o.tools(), o.Ports)
	for i := range out {
		// A stack that is up keeps another from starting, and is no fault.
		if out[i].Name == folderCheck && l.isUp() {
			out[i].Outcome, out[i].Advice = OK, ""
		}
	}
	return append(out, checkMemlock(), checkShmemTHP(), checkInitOnFree(), checkOverlay(), checkCgroups(), checkKVM(), checkPassthrough(), checkResourceCap(), checkConfidential()), nil
}

func checkMemlock() Finding {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &r); err != nil {
		return Finding{Name: "memlock", Outcome: Warn, Found: err.Error(), Advice: "regions may not be lockable"}
	}
	if r.Max == unix.RLIM_INFINITY || hasCapability(unix.CAP_IPC_LOCK) {
		return Finding{Name: "memlock", Outcome: OK, Found: "unlimited"}
	}
	return Finding{Name: "memlock", Outcome: Warn, Found: Bytes(int64(r.Max)), Advice: "raise it with `ulimit -l unlimited`: opened data is locked in memory"}
}

func checkShmemTHP() Finding {
	const file = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
	b, err := os.ReadFile(file)
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

func checkOverlay() Finding {
	b, err := os.ReadFile("/proc/filesystems")
	if err == nil && bytes.Contains(b, []byte("\toverlay\n")) {
		return Finding{Name: "overlayfs", Outcome: OK, Found: "yes"}
	}
	return Finding{Name: "overlayfs", Outcome: Warn, Found: "not registered", Advice: "load it with `modprobe overlay`: images cannot be unpacked without"}
}

func checkCgroups() Finding {
	var st unix.Statfs_t
	if err := unix.Statfs(cgroupRoot, &st); err != nil {
		return Finding{Name: "cgroups", Outcome: Warn, Found: err.Error(), Advice: "limits of jobs need cgroups"}
	}
	if st.Type == unix.CGROUP2_SUPER_MAGIC {
		return Finding{Name: "cgroups", Outcome: OK, Found: "version 2"}
	}
	for _, c := range []string{"cpu", "memory", "pids"} {
		if _, err := os.Stat(cgroupRoot + "/" + c); err != nil {
			return Finding{Name: "cgroups", Outcome: Warn, Found: "version 1 without " + c, Advice: "jobs run without that limit"}
		}
	}
	return Finding{Name: "cgroups", Outcome: OK, Found: "version 1"}
}

func checkKVM() Finding {
	if _, err := os.Stat("/dev/kvm"); err != nil {
		return Finding{Name: "kvm", Outcome: OK, Found: "none: gVisor uses systrap"}
	}
	return Finding{Name: "kvm", Outcome: OK, Found: "present; gVisor uses systrap all the same"}
}

// FUSE passthrough came with Linux 6.9.
const passthroughMajor, passthroughMinor = 6, 9

func checkPassthrough() Finding {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return Finding{Name: "fuse passthrough", Outcome: Warn, Found: err.Error(), Advice: "inputs are read through the holder"}
	}
	release := unix.ByteSliceToString(u.Release[:])
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

func checkResourceCap() Finding {
	if hasCapability(unix.CAP_SYS_RESOURCE) {
		return Finding{Name: "resource capability", Outcome: OK, Found: "yes"}
	}
	return Finding{Name: "resource capability", Outcome: Warn, Found: "CAP_SYS_RESOURCE missing", Advice: "jobs cannot raise limits above the hard ones of this shell"}
}

func hasCapability(c int) bool {
	b, err := os.ReadFile("/proc/self/status")
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

func checkConfidential() Finding {
	f := Finding{Name: "confidential machine", Outcome: Warn, Found: "no SEV-SNP guest device", Advice: "evidence is simulated on this machine, and everything says so"}
	if _, err := os.Stat("/dev/sev-guest"); !errors.Is(err, fs.ErrNotExist) {
		f.Found = "/dev/sev-guest is there"
		f.Advice = "`coffer up` simulates all the same: run cofferd on its own to use the hardware"
	}
	return f
}
