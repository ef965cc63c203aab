// Package doctor looks at what jobs of a node would fail on, before one is queued.
//
// Trusted: the configuration of the node's agent. Checked: that what it names is there
// and answers. Not checked: whether evidence would be affirmed; `coffer plan` asks that.
package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-configfs-tsm/configfs/configfsi"
	"github.com/google/go-configfs-tsm/configfs/linuxtsm"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"golang.org/x/sys/unix"

	verifierv1 "github.com/coffer-run/coffer/attest/api/verifier/v1"
	"github.com/coffer-run/coffer/attest/api/verifier/v1/verifierv1connect"
	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/endorse/serve"
	"github.com/coffer-run/coffer/attest/nvgpu"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/stack"
	"github.com/coffer-run/coffer/plugins/contract"
	"github.com/coffer-run/coffer/plugins/host"
)

// askTimeout bounds each question to another program or machine.
const askTimeout = 10 * time.Second

// Config is what doctor reads of the configuration of a node's agent, cofferd. Other
// fields of it are the agent's affair.
type Config struct {
	TLS        daemon.TLS  `json:"tls"`
	StateDir   string      `json:"stateDir"`
	RunDir     string      `json:"runDir"`
	Containerd string      `json:"containerd"`
	Runsc      string      `json:"runsc"`
	GPUPlugin  host.Config `json:"gpuPlugin"`
	TSM        string      `json:"tsm"`
	TPM        string      `json:"tpm"`
	Verifier   Service     `json:"verifier"`
	Broker     Service     `json:"broker"`
	ImageStore string      `json:"imageStore"`
	GPUSpecs   []string    `json:"gpuSpecs"`
	Images     struct {
		Registries []string `json:"registries"`
	} `json:"images"`
}

// Service is one that the agent calls, and the file with its public keys.
type Service struct {
	URL      string `json:"url"`
	KeysFile string `json:"keysFile"`
}

// ReadConfig reads the configuration of an agent.
func ReadConfig(path string) (c Config, err error) {
	f, err := os.Open(path) // #nosec G304 -- the operator names the file
	if err != nil {
		return c, fmt.Errorf("read configuration: %w", err)
	}
	defer f.Close() //nolint:errcheck // read only
	if err := json.NewDecoder(io.LimitReader(f, daemon.MaxConfig)).Decode(&c); err != nil {
		return c, fmt.Errorf("configuration %s: %w", path, err)
	}
	return c, nil
}

// Machine is what the checks ask that no configuration says.
type Machine struct {
	// GPUs asks the configured plugin.
	GPUs func(context.Context, host.Config) (*contract.Inventory, error)
	// TSM is the kernel's interface for reports.
	TSM func() (configfsi.Client, error)
	// Synchronised reports whether the kernel takes its clock to be right.
	Synchronised func() (bool, error)
	Now          func() time.Time
	// Free is how many bytes are free where a folder lies, OnMemory whether that is
	// memory.
	Free     func(dir string) (int64, error)
	OnMemory func(dir string) (bool, error)
	// Registries is how registries are reached.
	Registries http.RoundTripper
}

// This is the machine that the program runs on.
func This() Machine {
	return Machine{
		GPUs: inventory, TSM: linuxtsm.MakeClient, Synchronised: synchronised, Now: time.Now, Free: free, OnMemory: onMemory, Registries: remote.DefaultTransport,
	}
}

// Node makes the checks of a node's configuration. endorsements is the verifier's folder of
// them, which may be another machine's.
func Node(ctx context.Context, c Config, m Machine, endorsements string) []stack.Finding {
	out := []stack.Finding{m.clock(), m.disk(c.StateDir), m.runDir(c.RunDir), images(c.ImageStore), m.tpm(c.TPM), m.tsm(c.TSM), containerd(ctx, c.Containerd), trace(ctx, c.Runsc)}
	out = append(out, m.gpus(ctx, c, endorsements)...)
	out = append(out, m.verifier(ctx, c), broker(ctx, c))
	return append(out, m.registries(ctx, c.Images.Registries)...)
}

func ok(name, found string) stack.Finding {
	return stack.Finding{Name: name, Outcome: stack.OK, Found: found}
}

func warn(name, found, advice string) stack.Finding {
	return stack.Finding{Name: name, Outcome: stack.Warn, Found: found, Advice: advice}
}

func fail(name, found, advice string) stack.Finding {
	return stack.Finding{Name: name, Outcome: stack.Fail, Found: found, Advice: advice}
}

// clock says whether something keeps the clock right (adjtimex(2)). How far it is from
// the verifier's is that check's affair.
func (m Machine) clock() stack.Finding {
	const name = "clock"
	right, err := m.Synchronised()
	switch {
	case err != nil:
		return fail(name, err.Error(), "the kernel must say whether its clock is right")
	case !right:
		return warn(name, "not synchronised", "start a time service: results and leases are refused when clocks differ by more than "+receipt.Leeway.String())
	}
	return ok(name, "synchronised")
}

func synchronised() (bool, error) {
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	return state != unix.TIME_ERROR && t.Status&unix.STA_UNSYNC == 0, err
}

// disk asks for room for the journal, logs and what waits there.
func (m Machine) disk(dir string) stack.Finding {
	const name = "state folder"
	n, err := m.Free(dir)
	switch {
	case err != nil:
		return fail(name, err.Error(), "make the folder that stateDir names, on a disk that lasts")
	case n < stack.MinDisk:
		return fail(name, stack.Bytes(n)+" free at "+dir, "free some: "+stack.Bytes(stack.MinDisk)+" are needed for the journal, logs and checkpoints")
	}
	return ok(name, stack.Bytes(n)+" free at "+dir)
}

func free(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("%s: %w", dir, err)
	}
	return int64(st.Bavail) * st.Bsize, nil //nolint:gosec // a disk's size fits
}

// runDir must be on memory: jobs' sockets and mounts lie there.
func (m Machine) runDir(dir string) stack.Finding {
	const name = "run folder"
	memory, err := m.OnMemory(dir)
	switch {
	case err != nil:
		return fail(name, err.Error(), "make the folder that runDir names, below /run")
	case !memory:
		return warn(name, dir+" is on a disk", "set runDir to a folder on tmpfs, such as one below /run: nothing in it is to outlive the boot")
	}
	return ok(name, dir+", on memory")
}

func onMemory(dir string) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return false, fmt.Errorf("%s: %w", dir, err)
	}
	return st.Type == unix.TMPFS_MAGIC || st.Type == unix.RAMFS_MAGIC, nil
}

func images(store string) stack.Finding {
	if store == "tmpfs" {
		return ok("image store", "in memory")
	}
	return warn("image store", fmt.Sprintf("%.40q", store), "jobs under the policy production are refused unless imageStore is tmpfs: whoever controls the disk can change images there")
}

// tpm asks whether the TPM is there. It is not spoken to: a simulator's socket is for
// one program at a time.
func (m Machine) tpm(path string) stack.Finding {
	const name = "tpm"
	st, err := os.Stat(path)
	switch {
	case err != nil:
		return fail(name, err.Error(), "give the machine a TPM 2.0, and set tpm to its resource manager, /dev/tpmrm0")
	case st.Mode()&os.ModeSocket != 0:
		return warn(name, path+", a simulator", "evidence is simulated on this machine, and everything says so")
	case st.Mode()&os.ModeCharDevice == 0:
		return fail(name, path+" is no device", "set tpm to the TPM's resource manager, /dev/tpmrm0")
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0) // #nosec G304 -- the operator names it
	if err != nil {
		return fail(name, err.Error(), "let the agent's user open it, and no other program hold it: /dev/tpmrm0 shares, /dev/tpm0 does not")
	}
	return ok(name, path+" opens"+closed(f))
}

func closed(f io.Closer) string {
	if err := f.Close(); err != nil {
		return ": " + err.Error()
	}
	return ""
}

const (
	emulatedPrefix = "emulated:"
	// snpProvider is what the kernel's sev-guest driver calls itself
	// (Documentation/ABI/testing/configfs-tsm).
	snpProvider = "sev_guest"
	tsmReports  = "/sys/kernel/config/tsm/report"
)

// tsm asks whether the kernel gives reports of the processor.
func (m Machine) tsm(how string) stack.Finding {
	const name = "processor's report"
	if socket, is := strings.CutPrefix(how, emulatedPrefix); is {
		if _, err := os.Stat(socket); err != nil {
			return fail(name, err.Error(), "start the emulator: coffer up")
		}
		return warn(name, "emulated", "evidence is simulated on this machine, and everything says so")
	}
	if how == "paravisor" {
		return ok(name, "in the TPM, by the paravisor")
	}
	const advice = "boot an SEV-SNP guest with configfs-tsm (Linux 6.7) and the module sev-guest; docs/operations.md has the order"
	client, err := m.TSM()
	if err != nil {
		return fail(name, err.Error(), advice)
	}
	entry, err := client.MkdirTemp(tsmReports, "doctor")
	if err != nil {
		return fail(name, err.Error(), advice)
	}
	provider, err := client.ReadFile(filepath.Join(entry, "provider"))
	if err = errors.Join(err, client.RemoveAll(entry)); err != nil {
		return fail(name, err.Error(), advice)
	}
	if p := strings.TrimSpace(string(provider)); p != snpProvider {
		return fail(name, fmt.Sprintf("the provider is %.40q, want %q", p, snpProvider), advice)
	}
	return ok(name, snpProvider)
}

func containerd(ctx context.Context, socket string) stack.Finding {
	const name = "containerd"
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return fail(name, err.Error(), "start containerd, or set containerd to its socket")
	}
	return ok(name, socket+" answers"+closed(c))
}

// inventory starts the plugin for one question.
func inventory(ctx context.Context, c host.Config) (*contract.Inventory, error) {
	g, err := host.StartGPU(ctx, c, host.Options{})
	if err != nil {
		return nil, err
	}
	inv, err := g.Inventory(ctx)
	return inv, errors.Join(err, g.Close())
}

// gpus holds the driver against what the sandbox knows and what the verifier has
// reference values of, and the GPUs against what evidence needs.
func (m Machine) gpus(ctx context.Context, c Config, endorsements string) []stack.Finding {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	inv, err := m.GPUs(ctx, c.GPUPlugin)
	if err != nil {
		return []stack.Finding{fail("gpu plugin", err.Error(), "the agent does not start without its plugin: look at gpuPlugin, its checksum, and whether the driver is loaded")}
	}
	if len(inv.Devices) == 0 {
		return []stack.Finding{warn("gpu", "none", "jobs that ask for GPUs are refused here")}
	}
	of := fmt.Sprintf("%d x %s, driver %s", len(inv.Devices), inv.Devices[0].Name, inv.DriverVersion)
	out := []stack.Finding{ok("gpu", of)}
	if inv.Simulated {
		out[0] = warn("gpu", of, "evidence is simulated on this machine, and everything says so")
	}
	mode := ok("gpu cc mode", string(inv.CCMode))
	if inv.CCMode != contract.CCOn {
		mode = fail("gpu cc mode", string(inv.CCMode), "set confidential computing on with NVIDIA's gpu-admin-tools, and DevTools mode off, on the host: otherwise there is no evidence")
	}
	persistent := ok("gpu persistence", "on")
	for _, d := range inv.Devices {
		if !d.Persistent {
			persistent = fail("gpu persistence", "off for "+d.UUID, "start nvidia-persistenced before anything else uses the GPU: in confidential mode a GPU that was let go does not come back")
		}
	}
	return append(out, mode, persistent, sandboxDriver(ctx, c, inv.DriverVersion), m.references(endorsements, inv.DriverVersion))
}

// sandboxDriver asks the runtime which drivers its nvproxy knows: it knows each version's
// interface by itself, and one that is near is none.
func sandboxDriver(ctx context.Context, c Config, driver string) stack.Finding {
	const name = "gpu in the sandbox"
	known, err := exec.CommandContext(ctx, c.Runsc, "nvproxy", "list-supported-drivers").Output() // #nosec G204 -- the configured runtime
	if err != nil {
		return fail(name, fmt.Sprintf("ask %s which drivers it knows: %s", c.Runsc, err), "set runsc to the runtime of `make deps`")
	}
	knows := slices.Contains(strings.Fields(string(known)), driver)
	switch {
	case len(c.GPUSpecs) == 0 && knows:
		return warn(name, "no device: gpuSpecs is not set; nvproxy knows the driver", "run nvidia-ctk cdi generate and set gpuSpecs to its folder; until then evidence is collected and jobs get no GPU device")
	case len(c.GPUSpecs) == 0:
		return warn(name, "no device: gpuSpecs is not set; nvproxy does not know driver "+driver, "install a driver of `runsc nvproxy list-supported-drivers` before gpuSpecs is set; until then jobs get no GPU device")
	case !knows:
		return fail(name, "nvproxy does not know driver "+driver, "install a driver of `runsc nvproxy list-supported-drivers`, or a runtime that knows this one")
	}
	return ok(name, "nvproxy knows driver "+driver)
}

// references asks whether the verifier has reference values of the driver. Those of the
// VBIOS are named by what only a report says.
func (m Machine) references(folder, driver string) stack.Finding {
	const name = "gpu reference values"
	id := nvgpu.DriverRIM(&nvgpu.Report{DriverVersion: driver})
	f, err := serve.OpenFolder(folder, nil)
	if err != nil {
		return warn(name, id+": "+err.Error(), "name the verifier's folder with --endorsements, or ask where the verifier is: policies that want reference values refuse without")
	}
	for _, h := range f.Library().All() {
		if h.Key.Kind == endorse.RIM && h.Key.ID == id && h.ValidAt(m.Now()) {
			return ok(name, id)
		}
	}
	return warn(name, id+" is not there, or not valid now", "import it with `coffer endorsements import`, or install a driver that NVIDIA publishes reference values of: policies that want them refuse")
}

// healthy asks a service whether it serves, and how late it is there.
func healthy(ctx context.Context, t daemon.TLS, role, url string) (*http.Client, time.Time, error) {
	h, err := t.HTTPClient(role)
	if err != nil {
		return nil, time.Time{}, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(url, "/")+daemon.Health, http.NoBody)
	if err != nil {
		return nil, time.Time{}, err
	}
	resp, err := h.Do(req)
	if err != nil {
		return nil, time.Time{}, err
	}
	defer resp.Body.Close() //nolint:errcheck // read only
	if resp.StatusCode != http.StatusOK {
		return nil, time.Time{}, fmt.Errorf("%s answers %s", url, resp.Status)
	}
	at, err := http.ParseTime(resp.Header.Get("Date"))
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("%s does not say what time it is there: %w", url, err)
	}
	return h, at, nil
}

// verifier asks whether it serves, whether results of its present keys count here, and
// whether its clock and this one agree.
func (m Machine) verifier(ctx context.Context, c Config) stack.Finding {
	const name = "verifier"
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	h, at, err := healthy(ctx, c.TLS, daemon.RoleVerifier, c.Verifier.URL)
	if err != nil {
		return fail(name, err.Error(), "nothing is attested without it: look at verifier.url, the node's certificate, and whether it runs")
	}
	now := m.Now()
	// The answer is in whole seconds.
	if off := now.Sub(at).Abs(); off > receipt.Leeway+time.Second {
		return fail(name, fmt.Sprintf("its clock says %s, this one %s", at.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339)), "set the clocks: results are refused when they differ by more than "+receipt.Leeway.String())
	}
	published, err := verifierv1connect.NewVerifierServiceClient(h, c.Verifier.URL).Keys(ctx, connect.NewRequest(&verifierv1.KeysRequest{}))
	if err != nil {
		return fail(name, err.Error(), "it answers, and not this node: is the node's certificate for the role agent?")
	}
	configured, err := os.ReadFile(c.Verifier.KeysFile)
	if err != nil {
		return fail(name, err.Error(), "set verifier.keysFile to the verifier's public keys")
	}
	if shares, err := shareKey(configured, published.Msg.GetJwks()); err != nil || !shares {
		return fail(name, fmt.Sprintf("none of its keys is in %s", c.Verifier.KeysFile)+because(err), "its results do not count here: get its keys, from somebody whom you trust, and put them into that file")
	}
	return ok(name, c.Verifier.URL+" answers, with keys that count here")
}

func because(err error) string {
	if err == nil {
		return ""
	}
	return ": " + err.Error()
}

// shareKey reports whether two key sets (RFC 7517) have a key in common.
func shareKey(a, b []byte) (bool, error) {
	var sets [2]jose.JSONWebKeySet
	for i, raw := range [][]byte{a, b} {
		if err := json.Unmarshal(raw, &sets[i]); err != nil {
			return false, fmt.Errorf("read keys: %w", err)
		}
	}
	for _, k := range sets[0].Keys {
		want, err := k.MarshalJSON()
		if err != nil {
			return false, fmt.Errorf("read keys: %w", err)
		}
		for _, o := range sets[1].Keys {
			if got, err := o.MarshalJSON(); err == nil && string(got) == string(want) {
				return true, nil
			}
		}
	}
	return false, nil
}

func broker(ctx context.Context, c Config) stack.Finding {
	const name = "broker"
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if _, _, err := healthy(ctx, c.TLS, daemon.RoleBroker, c.Broker.URL); err != nil {
		return fail(name, err.Error(), "no job gets a key without it: look at broker.url, the node's certificate, and whether it runs")
	}
	if _, err := os.Stat(c.Broker.KeysFile); err != nil {
		return fail(name, err.Error(), "set broker.keysFile to the broker's public keys")
	}
	return ok(name, c.Broker.URL+" answers")
}

func (m Machine) ping(ctx context.Context, registry string) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	reg, err := name.NewRegistry(registry)
	if err != nil {
		return err
	}
	_, err = transport.Ping(ctx, reg, m.Registries)
	return err
}

// registries asks each for the version of its interface (OCI distribution
// specification, end-1); one that wants a password answers too.
func (m Machine) registries(ctx context.Context, hosts []string) []stack.Finding {
	if len(hosts) == 0 {
		return []stack.Finding{ok("registry", "none: images are imported")}
	}
	var out []stack.Finding
	for _, h := range hosts {
		what := "registry " + h
		if err := m.ping(ctx, h); err != nil {
			out = append(out, fail(what, err.Error(), "images that are not in the node's store yet cannot be fetched from it: look at images.registries and the network"))
			continue
		}
		out = append(out, ok(what, "answers"))
	}
	return out
}
