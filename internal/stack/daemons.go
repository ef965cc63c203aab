package stack

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
	"github.com/coffer-run/coffer/internal/daemon/pki"
	"github.com/coffer-run/coffer/internal/emulate/boot"
	"github.com/coffer-run/coffer/internal/emulate/server"
	"github.com/coffer-run/coffer/internal/emulate/swtpm"
)

// Names of the daemons, which are those of their logs too.
const (
	swtpmName      = "swtpm"
	emulatorName   = "coffer-emulator"
	containerdName = "containerd"
	verifierName   = "coffer-verifier"
	brokerName     = "coffer-broker"
	issuerName     = "coffer-issuer"
	agentName      = "cofferd"
)

// identity is one name in the stack.
type identity struct{ role, name string }

func identities() []identity {
	return []identity{
		{daemon.RoleAgent, NodeName},
		{daemon.RoleVerifier, "verifier"},
		{daemon.RoleBroker, "broker"},
		{daemon.RoleIssuer, "issuer"},
		{daemon.RoleOwner, "owner"},
		{daemon.RoleEngineer, "engineer"},
		{daemon.RoleAuditor, "auditor"},
		{daemon.RoleOperator, "operator"},
		{daemon.RoleScheduler, "scheduler"},
	}
}

func identityOf(role string) (identity, error) {
	for _, i := range identities() {
		if i.role == role {
			return i, nil
		}
	}
	return identity{}, fmt.Errorf("the stack has no identity of role %.40q", role)
}

func (l Layout) tls(role string) (daemon.TLS, error) {
	i, err := identityOf(role)
	if err != nil {
		return daemon.TLS{}, err
	}
	return pki.Files(l.path("pki"), i.role, i.name), nil
}

// HTTPClient returns a client of the service in role server, as the stack's
// identity of the given role.
func (e Endpoint) HTTPClient(role, server string) (*http.Client, error) {
	t, err := e.layout.tls(role)
	if err != nil {
		return nil, err
	}
	return t.HTTPClient(server)
}

func (s *starter) identities(context.Context) (string, error) {
	err := once(s.path("pki"), func() error {
		if err := pki.Create(s.path("pki")); err != nil {
			return err
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	for _, i := range identities() {
		if err := s.issue(i); err != nil {
			return "", err
		}
	}
	return strconv.Itoa(len(identities())) + " identities", nil
}

// renewBefore is how long before its end a certificate is issued anew, at `up`.
const renewBefore = 30 * 24 * time.Hour

// issue makes an identity unless it has one that lasts.
func (s *starter) issue(i identity) error {
	files := pki.Files(s.path("pki"), i.role, i.name)
	cert, err := tls.LoadX509KeyPair(files.Cert, files.Key)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return fmt.Errorf("identity %s: %w", files.Cert, err)
	case time.Until(cert.Leaf.NotAfter) > renewBefore:
		return nil
	default:
		if err := os.Remove(files.Cert); err != nil {
			return err
		}
	}
	return pki.Issue(s.path("pki"), i.role, i.name)
}

// devices mints the simulation: the roots that its verifier accepts and the
// devices that the emulator plays.
func (s *starter) devices(context.Context) (string, error) {
	err := once(s.path("simulation"), func() error {
		return simulate.Mint(s.path("simulation"), simulate.Options{GPUs: emulatedGPUs})
	})
	return fmt.Sprintf("SEV-SNP chip and %d H100, simulated", emulatedGPUs), err
}

// emulatedGPUs is how many GPUs the emulated machine has: Hopper's confidential
// mode is for one GPU at a time.
const emulatedGPUs = 1

// tpmState makes the software TPM and hands its maker's certificate to the
// simulation's roots.
func (s *starter) tpmState(ctx context.Context) (string, error) {
	ca, err := swtpm.Provision(ctx, s.path("tpm"))
	if err != nil {
		return "", err
	}
	root := s.path("simulation", simulate.EKRootFile)
	if err := os.MkdirAll(s.path("simulation", "roots", "tpm"), 0o700); err != nil {
		return "", err
	}
	if err := keyfile.Write(s.firmwareLog(), boot.Log()); err != nil {
		return "", err
	}
	return "software TPM and measured boot, simulated", keyfile.Write(root, ca)
}

// service is a daemon of the stack and how to see that it is ready.
type service struct {
	name string
	argv []string
	// socket is removed before the start: a killed daemon leaves its own, which
	// would look like a ready one.
	socket string
	probe  func(context.Context) error
}

func (l Layout) tpmSocket() string      { return l.run("tpm.sock") }
func (l Layout) emulatorSocket() string { return l.run("emulator.sock") }

// services returns the daemons in the order in which they start.
func (l Layout) services(t tools, p Ports) ([]service, error) {
	tpm, err := t.foreign("swtpm")
	if err != nil {
		return nil, err
	}
	ctrd, err := t.foreign("containerd")
	if err != nil {
		return nil, err
	}
	ours := func(name, binary, socket string, probe func(context.Context) error) service {
		return service{name, []string{t.our(binary), "--config", l.config(name)}, socket, probe}
	}
	return []service{
		{swtpmName, append([]string{tpm}, swtpm.Args(l.path("tpm"), l.tpmSocket())[1:]...), l.tpmSocket(), l.booted},
		ours(emulatorName, "coffer-emulator", l.emulatorSocket(), socketAnswers(l.emulatorSocket())),
		{containerdName, []string{ctrd, "--config", l.path("config", "containerd.toml")}, l.containerdSocket(), l.containerdAnswers},
		ours(verifierName, "coffer-verifier-simulated", "", l.healthy(daemon.RoleVerifier, p.Verifier)),
		ours(issuerName, "coffer-issuer", "", l.healthy(daemon.RoleIssuer, p.Issuer)),
		ours(brokerName, "coffer-broker", "", l.healthy(daemon.RoleBroker, p.Broker)),
		ours(agentName, "cofferd", "", l.healthy(daemon.RoleAgent, p.Agent)),
	}, nil
}

func socketAnswers(path string) func(context.Context) error {
	return func(ctx context.Context) error {
		var d net.Dialer
		c, err := d.DialContext(ctx, "unix", path)
		if err != nil {
			return err
		}
		return c.Close()
	}
}

// healthy asks a service whether it serves, as the stack's operator.
func (l Layout) healthy(role string, port int) func(context.Context) error {
	return func(ctx context.Context) error {
		t, err := l.tls(daemon.RoleOperator)
		if err != nil {
			return err
		}
		h, err := t.HTTPClient(role)
		if err != nil {
			return err
		}
		defer h.CloseIdleConnections()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, baseURL(port)+daemon.Health, http.NoBody)
		if err != nil {
			return err
		}
		res, err := h.Do(req)
		if err != nil {
			return err
		}
		defer func() { _ = res.Body.Close() }()
		_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, 1<<10))
		if res.StatusCode != http.StatusOK {
			return fmt.Errorf("health: %s", res.Status)
		}
		return nil
	}
}

func (l Layout) config(name string) string { return l.path("config", name+".json") }

func listen(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

// The configuration files below are strict JSON: a field that its daemon does
// not know keeps it from starting.

type verifierConfig struct {
	Listen        string     `json:"listen"`
	TLS           daemon.TLS `json:"tls"`
	ID            string     `json:"id"`
	KeyFile       string     `json:"keyFile"`
	NonceKeyFile  string     `json:"nonceKeyFile"`
	SimulationDir string     `json:"simulationDir"`
}

type brokerConfig struct {
	Listen           string           `json:"listen"`
	TLS              daemon.TLS       `json:"tls"`
	ID               string           `json:"id"`
	KeyFile          string           `json:"keyFile"`
	KEKFile          string           `json:"kekFile,omitempty"`
	DefaultKeyStore  string           `json:"defaultKeyStore,omitempty"`
	KeyStores        []brokerKeyStore `json:"keyStores,omitempty"`
	OwnerWrapKeyFile string           `json:"ownerWrapKeyFile"`
	DB               string           `json:"db"`
	Log              brokerLog        `json:"log"`
	Verifiers        []brokerVerifier `json:"verifiers"`
	Simulation       bool             `json:"simulation"`
	Access           brokerAccess     `json:"access"`
}

type brokerLog struct {
	Dir       string          `json:"dir"`
	KeyFile   string          `json:"keyFile"`
	Witnesses []brokerWitness `json:"witnesses,omitempty"`
}

type brokerVerifier struct {
	ID       string `json:"id"`
	JWKSFile string `json:"jwksFile"`
}

type agentConfig struct {
	Listen      string       `json:"listen"`
	TLS         daemon.TLS   `json:"tls"`
	Node        string       `json:"node"`
	StateDir    string       `json:"stateDir"`
	RunDir      string       `json:"runDir"`
	Cgroup      string       `json:"cgroup"`
	Containerd  string       `json:"containerd"`
	Runsc       string       `json:"runsc"`
	Shim        string       `json:"shim"`
	Holder      string       `json:"holder"`
	GPUPlugin   agentPlugin  `json:"gpuPlugin"`
	TSM         string       `json:"tsm"`
	TPM         string       `json:"tpm"`
	FirmwareLog string       `json:"firmwareLog"`
	Verifier    agentPeer    `json:"verifier"`
	Broker      agentPeer    `json:"broker"`
	ImageStore  string       `json:"imageStore"`
	Access      *agentAccess `json:"access"`
	Egress      agentEgress  `json:"egress"`
	Images      agentImages  `json:"images"`
	Alerts      agentAlerts  `json:"alerts"`
}

type agentAlerts struct {
	File string `json:"file"`
}

type agentEgress struct {
	Gateway string `json:"gateway"`
}

type agentPlugin struct {
	Path   string   `json:"path"`
	SHA256 string   `json:"sha256"`
	Args   []string `json:"args"`
}

type agentPeer struct {
	URL      string `json:"url"`
	ID       string `json:"id"`
	KeysFile string `json:"keysFile"`
}

func (s *starter) configure(context.Context) (string, error) {
	runsc, err := s.tools.foreign("runsc")
	if err != nil {
		return "", err
	}
	shim, err := s.tools.foreign("containerd-shim-runc-v2")
	if err != nil {
		return "", err
	}
	plugin := s.tools.our("coffer-gpu-nvidia")
	sum, err := fileSHA256(plugin)
	if err != nil {
		return "", err
	}
	ids := map[string]daemon.TLS{}
	for _, role := range []string{daemon.RoleVerifier, daemon.RoleBroker, daemon.RoleAgent, daemon.RoleIssuer} {
		if ids[role], err = s.tls(role); err != nil {
			return "", err
		}
	}
	rules, err := s.access()
	if err != nil {
		return "", err
	}
	store, err := imageStore()
	if err != nil {
		return "", err
	}
	p := s.o.Ports
	broker := brokerConfig{
		Listen: listen(p.Broker), TLS: ids[daemon.RoleBroker], ID: BrokerID,
		KeyFile: s.path("broker", "key.pem"), OwnerWrapKeyFile: s.path("broker", "owner-wrap.key"),
		DB:         s.database(),
		Log:        brokerLog{Dir: s.path("broker", "log"), KeyFile: s.path("broker", "log.key")},
		Verifiers:  []brokerVerifier{{VerifierID, s.path("verifier", "jwks.json")}},
		Simulation: true,
		Access:     rules,
	}
	if err := s.setKeyStores(s.tools, &broker); err != nil {
		return "", err
	}
	if err := s.setWitnesses(&broker); err != nil {
		return "", err
	}
	configs := map[string]any{
		emulatorName: server.Config{
			SimulationDir: s.path("simulation"),
			Socket:        s.emulatorSocket(),
			GPUs:          emulatedGPUs,
			Faults:        s.o.Faults,
		},
		verifierName: verifierConfig{
			Listen: listen(p.Verifier), TLS: ids[daemon.RoleVerifier], ID: VerifierID,
			KeyFile: s.path("verifier", "key.pem"), NonceKeyFile: s.path("verifier", "nonce.key"),
			SimulationDir: s.path("simulation"),
		},
		brokerName: broker,
		issuerName: issuerConfig{
			Listen: listen(p.Issuer), URL: baseURL(p.Issuer), TLS: ids[daemon.RoleIssuer],
			KeyFile: s.path("issuer", "key.pem"), PeopleFile: s.peopleFile(),
		},
		agentName: agentConfig{
			Listen: listen(p.Agent), TLS: ids[daemon.RoleAgent], Node: NodeName,
			StateDir: s.path("agent"), RunDir: s.Run, Cgroup: s.Cgroup(),
			Containerd: s.containerdSocket(), Runsc: runsc, Shim: shim, Holder: s.tools.our("coffer-holder"),
			GPUPlugin: agentPlugin{Path: plugin, SHA256: sum, Args: []string{"--emulated", s.emulatorSocket()}},
			TSM:       "emulated:" + s.emulatorSocket(),
			TPM:       s.tpmSocket(), FirmwareLog: s.firmwareLog(),
			Verifier:   agentPeer{URL: baseURL(p.Verifier), ID: VerifierID, KeysFile: s.path("verifier", "jwks.json")},
			Broker:     agentPeer{URL: baseURL(p.Broker), ID: BrokerID, KeysFile: s.path("broker", "jwks.json")},
			ImageStore: store,
			Images:     s.agentImages(),
			Access:     s.agentAccess(),
			Egress:     agentEgress{Gateway: s.tools.our("coffer-gateway")},
			Alerts:     agentAlerts{File: s.path("agent", "alerts.jsonl")},
		},
	}
	for name, c := range configs {
		if err := writeJSON(s.config(name), c); err != nil {
			return "", err
		}
	}
	toml, err := s.containerdConfig()
	if err != nil {
		return "", err
	}
	if err := keyfile.Write(s.path("config", "containerd.toml"), []byte(toml)); err != nil {
		return "", err
	}
	return s.path("config"), nil
}

func fileSHA256(path string) (string, error) {
	f, err := os.Open(path) // #nosec G304 -- the operator names the folder
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// Restart starts again the daemons of a stack that have ended, and stops and
// starts the named ones. A broker takes over the key stores that the stack has by
// then. Restart returns what it started.
func Restart(ctx context.Context, dir string, names []string, progress func(Step)) ([]string, error) {
	l, err := NewLayout(dir)
	if err != nil {
		return nil, err
	}
	if f := checkRoot(); f.Outcome != OK {
		return nil, failures([]Finding{f})
	}
	i, err := l.readInfo()
	if err != nil {
		return nil, err
	}
	unlock, err := l.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	rec, err := l.readRecord()
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(rec.Processes, process.alive) {
		return nil, fmt.Errorf("no stack is up in %s: start it with `coffer up --dir %s`", l.Dir, l.Dir)
	}
	t := tools{binDir: i.Bin, toolsDir: i.Tools}
	all, err := l.services(t, i.Ports)
	if err != nil {
		return nil, err
	}
	todo, err := restartSet(all, rec, names)
	if err != nil {
		return nil, err
	}
	s := &starter{Layout: l, o: Options{Ports: i.Ports, ToolsDir: i.Tools, Progress: progress}, tools: t, rec: rec}
	s.env = s.environment()
	// Before anything is stopped: with a key store that cannot be read, all stays.
	if slices.Contains(todo, brokerName) {
		if err := l.takeKeyStores(t); err != nil {
			return nil, err
		}
	}
	for _, name := range slices.Backward(todo) {
		if k := s.find(name); k >= 0 && s.rec.Processes[k].alive() {
			if err := tell(ctx, progress, step{name, func(ctx context.Context) (string, error) {
				return "stopped", s.rec.Processes[k].stop(ctx, Grace)
			}}); err != nil {
				return nil, err
			}
		}
	}
	for _, v := range all {
		if !slices.Contains(todo, v.name) {
			continue
		}
		if err := tell(ctx, progress, step{v.name, func(ctx context.Context) (string, error) { return s.launch(ctx, v) }}); err != nil {
			return nil, err
		}
	}
	return todo, nil
}

// restartSet returns the daemons to start again, in their order.
func restartSet(all []service, rec record, names []string) ([]string, error) {
	want := map[string]bool{}
	for _, n := range names {
		if !slices.ContainsFunc(all, func(v service) bool { return v.name == n }) {
			known := make([]string, len(all))
			for i, v := range all {
				known[i] = v.name
			}
			return nil, fmt.Errorf("no daemon %.40q in a stack: want one of %s", n, strings.Join(known, ", "))
		}
		want[n] = true
	}
	for _, v := range all {
		if !slices.ContainsFunc(rec.Processes, func(p process) bool { return p.Name == v.name && p.alive() }) {
			want[v.name] = true
		}
	}
	// A TPM that starts again has the boot's PCRs, to which only a starting agent
	// adds its own.
	if want[swtpmName] {
		want[agentName] = true
	}
	var out []string
	for _, v := range all {
		if want[v.name] {
			out = append(out, v.name)
		}
	}
	return out, nil
}

func (s *starter) find(name string) int {
	return slices.IndexFunc(s.rec.Processes, func(p process) bool { return p.Name == name })
}

// launch starts a daemon, records it in the place of one that it follows, and
// waits until it is ready.
func (s *starter) launch(ctx context.Context, v service) (string, error) {
	if v.socket != "" {
		if err := os.Remove(v.socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	r, err := s.spawn(v, s.env)
	if err != nil {
		return "", err
	}
	s.started = append(s.started, r)
	if k := s.find(v.name); k >= 0 {
		s.rec.Processes[k] = r.process
	} else {
		s.rec.Processes = append(s.rec.Processes, r.process)
	}
	if err := s.writeRecord(s.rec); err != nil {
		return "", errors.Join(err, r.signal(unix.SIGKILL))
	}
	if err := r.ready(ctx, v.probe); err != nil {
		return "", err
	}
	return fmt.Sprintf("pid %d", r.PID), nil
}
