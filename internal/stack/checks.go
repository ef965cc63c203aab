package stack

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// Outcome is how one finding about this machine came out.
type Outcome string

const (
	// OK means that nothing needs doing.
	OK Outcome = "ok"
	// Warn means that the stack runs, but worse or with less to show for it.
	Warn Outcome = "warn"
	// Fail means that the stack does not start.
	Fail Outcome = "fail"
)

// Finding is one property of this machine that the stack cares about.
type Finding struct {
	Name    string  `json:"name"`
	Outcome Outcome `json:"outcome"`
	Found   string  `json:"found"`
	// Advice is one sentence that says what to do. Empty when OK.
	Advice string `json:"advice,omitempty"`
}

// What the embedded stack needs of a machine.
const (
	MinMemory = 2 << 30
	MinDisk   = 2 << 30
)

// ourTools come with coffer; foreignTools are built by `make deps` or come from
// Debian.
func ourTools() []string {
	return []string{"cofferd", "coffer-holder", "coffer-gateway", "coffer-verifier-simulated", "coffer-broker", "coffer-issuer", "coffer-emulator", "coffer-gpu-nvidia", keyStoreProgram}
}

func foreignTools() []string {
	return []string{"swtpm", "swtpm_setup", "swtpm_localca", "containerd", "containerd-shim-runc-v2", "runsc"}
}

// tools finds the programs that the stack runs.
type tools struct {
	binDir, toolsDir string
}

func executable(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0
}

// our returns the path of one of our binaries.
func (t tools) our(name string) string { return filepath.Join(t.binDir, name) }

// foreign returns the path of a tool: from the tools folder, or from PATH.
func (t tools) foreign(name string) (string, error) {
	if t.toolsDir != "" {
		if p := filepath.Join(t.toolsDir, name); executable(p) {
			return p, nil
		}
	}
	p, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("%s is not installed", name)
	}
	return filepath.Abs(p)
}

func (t tools) check() []Finding {
	var missing []string
	for _, n := range ourTools() {
		if !executable(t.our(n)) {
			missing = append(missing, n)
		}
	}
	out := []Finding{{Name: "binaries", Outcome: OK, Found: t.binDir}}
	if len(missing) > 0 {
		out[0] = Finding{Name: "binaries", Outcome: Fail, Found: strings.Join(missing, ", ") + " missing from " + t.binDir, Advice: "run `make build`, or say where they are with --bin"}
	}
	missing = nil
	for _, n := range foreignTools() {
		if _, err := t.foreign(n); err != nil {
			missing = append(missing, n)
		}
	}
	f := Finding{Name: "tools", Outcome: OK, Found: strings.Join(foreignTools(), ", ")}
	if len(missing) > 0 {
		f = Finding{Name: "tools", Outcome: Fail, Found: strings.Join(missing, ", ") + " not found", Advice: "run `make deps`, or say where they are with --tools"}
	}
	return append(out, f)
}

func checkRoot() Finding { return thisMachine().checkRoot() }

func (m machine) checkRoot() Finding {
	if uid := m.uid; uid != 0 {
		return Finding{Name: "root", Outcome: Fail, Found: "running as user " + strconv.Itoa(uid), Advice: "the node agent mounts and isolates: run as root"}
	}
	return Finding{Name: "root", Outcome: OK, Found: "yes"}
}

func checkPorts(p Ports) Finding {
	f := Finding{Name: "ports", Outcome: OK}
	var free, taken []string
	for _, n := range p.named() {
		addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(n.port))
		ln, err := net.Listen("tcp", addr)
		if err == nil {
			_ = ln.Close()
			free = append(free, strconv.Itoa(n.port))
			continue
		}
		s := fmt.Sprintf("%d (%s)", n.port, n.name)
		if !errors.Is(err, syscall.EADDRINUSE) {
			s += ": " + err.Error()
		} else if who := listener(n.port); who != "" {
			s += ", by " + who
		}
		taken = append(taken, s)
	}
	f.Found = strings.Join(free, ", ") + " free"
	if len(taken) > 0 {
		f.Outcome, f.Found = Fail, "in use: "+strings.Join(taken, "; ")
		f.Advice = "another stack may be up: stop it with `coffer down`, or choose other ports with --port-base"
	}
	return f
}

// listener names the process that listens on a local TCP port, if it can be seen.
func listener(port int) string {
	inode := ""
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		b, err := os.ReadFile(table)
		if err != nil {
			continue
		}
		if inode = listenInode(string(b), port); inode != "" {
			break
		}
	}
	if inode == "" {
		return ""
	}
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return ""
	}
	for _, l := range links {
		if t, err := os.Readlink(l); err == nil && t == "socket:["+inode+"]" {
			pid := strings.Split(l, "/")[2]
			comm, err := os.ReadFile(filepath.Join("/proc", pid, "comm"))
			if err != nil {
				return "pid " + pid
			}
			return fmt.Sprintf("%s (pid %s)", strings.TrimSpace(string(comm)), pid)
		}
	}
	return ""
}

// listenInode finds the socket inode of a listener in a proc_net_tcp(5) table.
func listenInode(table string, port int) string {
	const listenState = "0A"
	suffix := fmt.Sprintf(":%04X", port)
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		if len(f) > 9 && f[3] == listenState && strings.HasSuffix(f[1], suffix) {
			return f[9]
		}
	}
	return ""
}

// memField reads one field of /proc/meminfo, in bytes.
func memField(meminfo []byte, name string) (int64, bool) {
	for line := range bytes.Lines(meminfo) {
		f := strings.Fields(string(line))
		if len(f) >= 2 && f[0] == name+":" {
			n, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				return 0, false
			}
			if len(f) == 3 && f[2] == "kB" {
				n <<= 10
			}
			return n, true
		}
	}
	return 0, false
}

func (m machine) checkMemory() Finding {
	b, err := os.ReadFile(m.at("/proc/meminfo"))
	if err != nil {
		return Finding{Name: "memory", Outcome: Fail, Found: err.Error(), Advice: "coffer needs /proc"}
	}
	n, ok := memField(b, "MemAvailable")
	if !ok {
		return Finding{Name: "memory", Outcome: Fail, Found: "unknown", Advice: "/proc/meminfo has no MemAvailable"}
	}
	if n < MinMemory {
		return Finding{Name: "memory", Outcome: Fail, Found: Bytes(n) + " free", Advice: "free some: " + Bytes(MinMemory) + " are needed"}
	}
	return Finding{Name: "memory", Outcome: OK, Found: Bytes(n) + " free"}
}

func (m machine) checkDisk(dir string) Finding {
	at := dir
	for {
		if _, err := os.Stat(at); err == nil || at == "/" {
			break
		}
		at = filepath.Dir(at)
	}
	n, err := m.free(at)
	if err != nil {
		return Finding{Name: "disk", Outcome: Fail, Found: err.Error(), Advice: "choose another folder with --dir"}
	}
	if n < MinDisk {
		return Finding{Name: "disk", Outcome: Fail, Found: Bytes(n) + " free at " + at, Advice: "free some, or choose another folder with --dir: " + Bytes(MinDisk) + " are needed"}
	}
	return Finding{Name: "disk", Outcome: OK, Found: Bytes(n) + " free at " + at}
}

func (m machine) checkSwap() Finding {
	b, err := os.ReadFile(m.at("/proc/swaps"))
	if errors.Is(err, fs.ErrNotExist) {
		return Finding{Name: "swap", Outcome: OK, Found: "none in this kernel"}
	}
	if err != nil {
		return Finding{Name: "swap", Outcome: Fail, Found: err.Error(), Advice: "coffer needs /proc"}
	}
	if areas := swapAreas(string(b)); len(areas) > 0 {
		return Finding{Name: "swap", Outcome: Fail, Found: "on: " + strings.Join(areas, ", "), Advice: "opened data must never reach a disk: run `swapoff -a`"}
	}
	return Finding{Name: "swap", Outcome: OK, Found: "off"}
}

func swapAreas(swaps string) []string {
	var out []string
	for i, line := range strings.Split(swaps, "\n") {
		if f := strings.Fields(line); i > 0 && len(f) > 0 {
			out = append(out, f[0])
		}
	}
	return out
}

func (m machine) checkFuse() Finding {
	f, err := os.OpenFile(m.at("/dev/fuse"), os.O_RDWR, 0)
	if err != nil {
		return Finding{Name: "fuse", Outcome: Fail, Found: err.Error(), Advice: "load the fuse module: `modprobe fuse`"}
	}
	_ = f.Close()
	return Finding{Name: "fuse", Outcome: OK, Found: "/dev/fuse opens"}
}

// folderCheck is the name of the finding about the stack's folder.
const folderCheck = "folder"

// checkUp finds a stack that already runs in the same folder.
func (l Layout) checkUp() Finding {
	r, err := l.readRecord()
	if err != nil {
		return Finding{Name: folderCheck, Outcome: Fail, Found: err.Error(), Advice: "repair or remove what is named, or choose another folder with --dir"}
	}
	var alive, dead []string
	for _, p := range r.Processes {
		if p.alive() {
			alive = append(alive, fmt.Sprintf("%s (pid %d)", p.Name, p.PID))
		} else {
			dead = append(dead, p.Name)
		}
	}
	f := Finding{Name: folderCheck, Outcome: OK, Found: l.Dir}
	if len(alive) > 0 {
		f = Finding{
			Name: folderCheck, Outcome: Fail, Found: "a stack is up in " + l.Dir + " already: " + strings.Join(alive, ", "),
			Advice: "use it, or stop it with `coffer down --dir " + l.Dir + "`",
		}
		if len(dead) > 0 {
			f.Found += "; ended: " + strings.Join(dead, ", ")
			f.Advice = "start again what ended with `coffer restart --dir " + l.Dir + "`, or stop the rest with `coffer down --dir " + l.Dir + "`"
		}
	}
	return f
}

// isUp reports whether every daemon of a stack in the folder runs.
func (l Layout) isUp() bool {
	r, err := l.readRecord()
	return err == nil && len(r.Processes) > 0 && !slices.ContainsFunc(r.Processes, func(p process) bool { return !p.alive() })
}

// preflight makes the checks without which nothing is started.
func (m machine) preflight(l Layout, t tools, p Ports) []Finding {
	out := []Finding{m.checkRoot(), l.checkUp()}
	out = append(out, t.check()...)
	// A stack that is up in this folder explains its ports being taken.
	if out[1].Outcome == OK {
		out = append(out, checkPorts(p))
	}
	return append(out, l.checkKeyStores(), m.checkMemory(), m.checkDisk(l.Dir), m.checkSwap(), m.checkFuse())
}

// PreflightError lists what keeps the stack from starting.
type PreflightError struct{ Findings []Finding }

func (e *PreflightError) Error() string {
	parts := make([]string, len(e.Findings))
	for i, f := range e.Findings {
		parts[i] = fmt.Sprintf("%s: %s (%s)", f.Name, f.Found, f.Advice)
	}
	return "cannot start: " + strings.Join(parts, "; ")
}

func failures(fs []Finding) error {
	var bad []Finding
	for _, f := range fs {
		if f.Outcome != OK && f.Outcome != Warn {
			bad = append(bad, f)
		}
	}
	if len(bad) == 0 {
		return nil
	}
	return &PreflightError{Findings: bad}
}

// Bytes formats n in binary units.
func Bytes(n int64) string {
	const units = "KMGTPE"
	if n < 1<<10 {
		return fmt.Sprintf("%d B", n)
	}
	v, i := float64(n)/(1<<10), 0
	for v >= 1<<10 && i < len(units)-1 {
		v /= 1 << 10
		i++
	}
	return fmt.Sprintf("%.1f %ciB", v, units[i])
}
