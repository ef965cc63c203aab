package stack

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/internal/daemon/pki"
)

// Names under which the parts of the stack know each other.
const (
	VerifierID = "verifier.simulated.coffer.local"
	BrokerID   = "broker.coffer.local"
	NodeName   = "node-1"
	// Namespace is the containerd namespace of jobs and their images.
	Namespace = "coffer"
)

// DefaultDir is where a stack keeps its state unless told otherwise.
const DefaultDir = "/var/lib/coffer"

// DefaultPortBase is the verifier's port; broker, agent and issuer take the next.
const DefaultPortBase = 7441

// runRoot holds sockets and other things that do not outlive a boot. Socket
// paths stay under the 108 bytes of sockaddr_un because a stack is known there
// by eight digits.
const runRoot = "/run/coffer"

// Layout says where a stack keeps things.
type Layout struct {
	// Dir is absolute and holds what outlives `down`.
	Dir string
	// ID is the first eight hex digits of the SHA-256 of Dir.
	ID string
	// Run holds sockets and per-job folders.
	Run string
}

// NewLayout returns the layout of the stack in dir.
func NewLayout(dir string) (Layout, error) {
	if dir == "" {
		return Layout{}, errors.New("no stack directory given")
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return Layout{}, fmt.Errorf("stack directory %s: %w", dir, err)
	}
	sum := sha256.Sum256([]byte(abs))
	id := hex.EncodeToString(sum[:4])
	return Layout{Dir: abs, ID: id, Run: filepath.Join(runRoot, id)}, nil
}

func (l Layout) path(elem ...string) string {
	return filepath.Join(append([]string{l.Dir}, elem...)...)
}

func (l Layout) run(elem ...string) string {
	return filepath.Join(append([]string{l.Run}, elem...)...)
}

// Log returns the log file of the named daemon.
func (l Layout) Log(name string) string { return l.path("log", name+".log") }

// Cgroup is the cgroup under which the agent puts everything of its jobs.
func (l Layout) Cgroup() string { return "/coffer-" + l.ID }

// Jobs is where the agent keeps its per-job run folders.
func (l Layout) Jobs() string { return l.run("jobs") }

// Ports are the loopback ports of the stack's services.
type Ports struct {
	Verifier int `json:"verifier"`
	Broker   int `json:"broker"`
	Agent    int `json:"agent"`
	Issuer   int `json:"issuer"`
}

// PortsFrom returns the four ports from base on.
func PortsFrom(base int) (Ports, error) {
	if base < 1 || base > 65532 {
		return Ports{}, fmt.Errorf("port base %d: want 1 to 65532", base)
	}
	return Ports{Verifier: base, Broker: base + 1, Agent: base + 2, Issuer: base + 3}, nil
}

func (p Ports) named() []namedPort {
	return []namedPort{{"verifier", p.Verifier}, {"broker", p.Broker}, {"agent", p.Agent}, {"issuer", p.Issuer}}
}

type namedPort struct {
	name string
	port int
}

// infoVersion is the only version of stack.json there is.
const infoVersion = "coffer.run/stack/v1"

// info is stack.json: what a client or a later `down` must know of the stack in
// a folder. It also marks the folder as one that --purge may remove.
type info struct {
	Version string `json:"version"`
	Ports   Ports  `json:"ports"`
	Bin     string `json:"bin"`
	Tools   string `json:"tools"`
}

func (l Layout) infoFile() string { return l.path("stack.json") }

// trusted refuses a folder that others own or may write to: what stands in it
// is run, and signalled, by root. A folder that does not exist is trusted.
func (l Layout) trusted() error {
	fi, err := os.Stat(l.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("stack directory: %w", err)
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	switch {
	case !fi.IsDir() || !ok:
		return fmt.Errorf("%s is not a folder: choose another with --dir", l.Dir)
	// Who is not root endangers nobody but himself.
	case st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return fmt.Errorf("%s belongs to user %d, who could make root run anything: choose a folder of root's with --dir", l.Dir, st.Uid)
	case fi.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("%s has mode %v, so that others could make root run anything: choose another folder with --dir, or `chmod go-w` it if nobody has written to it yet", l.Dir, fi.Mode().Perm())
	}
	return nil
}

func (l Layout) readInfo() (info, error) {
	if err := l.trusted(); err != nil {
		return info{}, err
	}
	var i info
	if err := readJSON(l.infoFile(), &i); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return info{}, &NoStackError{Dir: l.Dir}
		}
		return info{}, err
	}
	if i.Version != infoVersion {
		return info{}, fmt.Errorf("%s has version %.40q: want %q", l.infoFile(), i.Version, infoVersion)
	}
	return i, nil
}

// NoStackError says that a folder holds no stack.
type NoStackError struct{ Dir string }

func (e *NoStackError) Error() string {
	return fmt.Sprintf("no stack in %s: start one with `coffer up --dir %s`, or name another with --dir", e.Dir, e.Dir)
}

const maxJSON = 1 << 20

func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := plan.Decode(b, maxJSON, v); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}

// Endpoint is what a client needs to speak to a stack.
type Endpoint struct {
	layout Layout
	ports  Ports
}

// OpenEndpoint returns the endpoint of the stack in dir, up or not.
func OpenEndpoint(dir string) (Endpoint, error) {
	l, err := NewLayout(dir)
	if err != nil {
		return Endpoint{}, err
	}
	i, err := l.readInfo()
	if err != nil {
		return Endpoint{}, err
	}
	return Endpoint{layout: l, ports: i.Ports}, nil
}

// Dir returns the state folder of the stack.
func (e Endpoint) Dir() string { return e.layout.Dir }

// Emulator returns the socket of the emulated devices.
func (e Endpoint) Emulator() string { return e.layout.emulatorSocket() }

// Verifier returns the verifier's base URL.
func (e Endpoint) Verifier() string { return baseURL(e.ports.Verifier) }

// Broker returns the broker's base URL.
func (e Endpoint) Broker() string { return baseURL(e.ports.Broker) }

// Issuer returns the OpenID provider's URL, by which its tokens name it.
func (e Endpoint) Issuer() string { return baseURL(e.ports.Issuer) }

// CA returns the file of the authority whose certificates the services have.
func (e Endpoint) CA() string { return e.layout.path("pki", pki.CAFile) }

// Agent returns the node agent's base URL.
func (e Endpoint) Agent() string { return baseURL(e.ports.Agent) }

func baseURL(port int) string { return fmt.Sprintf("https://127.0.0.1:%d", port) }
