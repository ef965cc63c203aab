package doctor

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-configfs-tsm/configfs/configfsi"

	verifierv1 "github.com/coffer-run/coffer/attest/api/verifier/v1"
	"github.com/coffer-run/coffer/attest/api/verifier/v1/verifierv1connect"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/pki"
	"github.com/coffer-run/coffer/internal/executable"
	"github.com/coffer-run/coffer/internal/stack"
	"github.com/coffer-run/coffer/plugins/contract"
	"github.com/coffer-run/coffer/plugins/host"
)

// kernel is configfs-tsm whose entries have one provider.
type kernel struct {
	configfsi.Client
	provider string
	removed  *int
}

func (k kernel) MkdirTemp(dir, _ string) (string, error) { return dir + "/1", nil }
func (k kernel) ReadFile(string) ([]byte, error)         { return []byte(k.provider), nil }
func (k kernel) RemoveAll(string) error                  { *k.removed++; return nil }

// keySet makes the keys of a service.
func keySet(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := receipt.NewSigner("verifier.test", key)
	if err != nil {
		t.Fatal(err)
	}
	jwks, err := signer.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	return jwks
}

type verifierService struct {
	verifierv1connect.UnimplementedVerifierServiceHandler
	jwks *[]byte
}

func (v verifierService) Keys(context.Context, *connect.Request[verifierv1.KeysRequest]) (*connect.Response[verifierv1.KeysResponse], error) {
	return connect.NewResponse(&verifierv1.KeysResponse{Jwks: *v.jwks}), nil
}

// world is a node on which nothing is wrong.
type world struct {
	c       Config
	m       Machine
	inv     contract.Inventory
	free    int64
	memory  bool
	right   bool
	jwks    []byte
	removed int
	kernel  string
	runsc   string
	sink    string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	dir := t.TempDir()
	w := &world{
		free: 8 << 30, memory: true, right: true, jwks: keySet(t), kernel: "sev_guest\n", runsc: "550.90.12\n580.65.06", sink: "coffer",
		inv: contract.Inventory{DriverVersion: "580.65.06", CCMode: contract.CCOn, Devices: []contract.Device{{UUID: "GPU-1", Name: "NVIDIA H100", Persistent: true}}},
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	p := filepath.Join(dir, "pki")
	must(pki.Create(p))
	for _, role := range []string{daemon.RoleAgent, daemon.RoleVerifier, daemon.RoleBroker} {
		must(pki.Issue(p, role, role))
	}
	serve := func(role string) *httptest.Server {
		files := pki.Files(p, role, role)
		cfg, err := files.Server()
		must(err)
		mux := http.NewServeMux()
		mux.HandleFunc("GET "+daemon.Health, func(http.ResponseWriter, *http.Request) {})
		mux.Handle(verifierv1connect.NewVerifierServiceHandler(verifierService{jwks: &w.jwks}))
		s := httptest.NewUnstartedServer(mux)
		s.TLS = cfg
		s.StartTLS()
		t.Cleanup(s.Close)
		return s
	}
	keys := filepath.Join(dir, "keys.json")
	must(os.WriteFile(keys, w.jwks, 0o600))
	socket, err := net.Listen("unix", filepath.Join(dir, "c.sock"))
	must(err)
	t.Cleanup(func() { _ = socket.Close() })
	registry := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v2/" {
			http.NotFound(rw, r)
			return
		}
		rw.Header().Set("WWW-Authenticate", `Bearer realm="https://x/token"`)
		rw.WriteHeader(http.StatusUnauthorized)
	}))
	t.Cleanup(registry.Close)
	w.c = Config{
		TLS: pki.Files(p, daemon.RoleAgent, daemon.RoleAgent), StateDir: dir, RunDir: dir, Containerd: filepath.Join(dir, "c.sock"),
		TSM: "configfs", TPM: "/dev/null", ImageStore: "tmpfs", GPUSpecs: []string{dir},
		Verifier: Service{serve(daemon.RoleVerifier).URL, keys}, Broker: Service{serve(daemon.RoleBroker).URL, keys},
	}
	w.c.Images.Registries = []string{strings.TrimPrefix(registry.URL, "http://")}
	w.c.Runsc = filepath.Join(dir, "runsc")
	w.m = Machine{
		GPUs:         func(context.Context, host.Config) (*contract.Inventory, error) { return &w.inv, nil },
		TSM:          func() (configfsi.Client, error) { return kernel{provider: w.kernel, removed: &w.removed}, nil },
		Synchronised: func() (bool, error) { return w.right, nil },
		Now:          time.Now,
		Free:         func(string) (int64, error) { return w.free, nil },
		OnMemory:     func(string) (bool, error) { return w.memory, nil },
		Registries:   http.DefaultTransport,
	}
	return w
}

// look returns the findings by name.
func (w *world) look(t *testing.T) map[string]stack.Finding {
	t.Helper()
	if err := executable.Write(w.c.Runsc, []byte("#!/bin/sh\n[ $1 = nvproxy ] || exec echo 'Name: "+w.sink+"'\nprintf '"+w.runsc+"'\n")); err != nil {
		t.Fatal(err)
	}
	out := map[string]stack.Finding{}
	for _, f := range Node(t.Context(), w.c, w.m, filepath.Join(w.c.StateDir, "none")) {
		if (f.Advice == "") != (f.Outcome == stack.OK) || f.Found == "" {
			t.Errorf("%+v", f)
		}
		name, _, _ := strings.Cut(f.Name, " 127.")
		out[name] = f
	}
	return out
}

// TestFindings breaks one thing of a node at a time: the check that is about it says
// so, and no other does.
func TestFindings(t *testing.T) {
	no := errors.New("it is not there")
	for name, row := range map[string]struct {
		breakIt func(t *testing.T, w *world)
		check   string
		want    stack.Outcome
		found   string
	}{
		"a clock that nobody sets":      {func(_ *testing.T, w *world) { w.right = false }, "clock", stack.Warn, "not synchronised"},
		"a clock that nobody can ask":   {func(_ *testing.T, w *world) { w.m.Synchronised = func() (bool, error) { return true, no } }, "clock", stack.Fail, no.Error()},
		"a full disk":                   {func(_ *testing.T, w *world) { w.free = 1 << 20 }, "state folder", stack.Fail, "1.0 MiB"},
		"no state folder":               {func(_ *testing.T, w *world) { w.m.Free = func(string) (int64, error) { return 0, no } }, "state folder", stack.Fail, no.Error()},
		"a run folder on a disk":        {func(_ *testing.T, w *world) { w.memory = false }, "run folder", stack.Warn, "on a disk"},
		"no run folder":                 {func(_ *testing.T, w *world) { w.m.OnMemory = func(string) (bool, error) { return true, no } }, "run folder", stack.Fail, no.Error()},
		"images on a disk":              {func(_ *testing.T, w *world) { w.c.ImageStore = "disk" }, "image store", stack.Warn, "disk"},
		"no TPM":                        {func(_ *testing.T, w *world) { w.c.TPM = "/dev/none" }, "tpm", stack.Fail, "/dev/none"},
		"a TPM that is a file":          {func(_ *testing.T, w *world) { w.c.TPM = w.c.Runsc }, "tpm", stack.Fail, "no device"},
		"a TPM that is a simulator's":   {func(_ *testing.T, w *world) { w.c.TPM = w.c.Containerd }, "tpm", stack.Warn, "simulator"},
		"no configfs-tsm":               {func(_ *testing.T, w *world) { w.m.TSM = func() (configfsi.Client, error) { return nil, no } }, "processor's report", stack.Fail, no.Error()},
		"a guest of another kind":       {func(_ *testing.T, w *world) { w.kernel = "tdx_guest" }, "processor's report", stack.Fail, "tdx_guest"},
		"an emulated processor":         {func(_ *testing.T, w *world) { w.c.TSM = "emulated:" + w.c.Containerd }, "processor's report", stack.Warn, "emulated"},
		"an emulator that is gone":      {func(_ *testing.T, w *world) { w.c.TSM = "emulated:/none" }, "processor's report", stack.Fail, "/none"},
		"no containerd":                 {func(_ *testing.T, w *world) { w.c.Containerd = "/none" }, "containerd", stack.Fail, "/none"},
		"a plugin that does not start":  {func(_ *testing.T, w *world) { w.m.GPUs = inventory }, "gpu plugin", stack.Fail, "checksum"},
		"no GPU":                        {func(_ *testing.T, w *world) { w.inv.Devices = nil }, "gpu", stack.Warn, "none"},
		"an emulated GPU":               {func(_ *testing.T, w *world) { w.inv.Simulated = true }, "gpu", stack.Warn, "H100"},
		"confidential mode is off":      {func(_ *testing.T, w *world) { w.inv.CCMode = contract.CCOff }, "gpu cc mode", stack.Fail, "off"},
		"DevTools mode":                 {func(_ *testing.T, w *world) { w.inv.CCMode = contract.CCDevtools }, "gpu cc mode", stack.Fail, "devtools"},
		"persistence mode is off":       {func(_ *testing.T, w *world) { w.inv.Devices[0].Persistent = false }, "gpu persistence", stack.Fail, "GPU-1"},
		"a driver nvproxy knows not":    {func(_ *testing.T, w *world) { w.inv.DriverVersion = "580.65.07" }, "gpu in the sandbox", stack.Fail, "580.65.07"},
		"a driver that is only like it": {func(_ *testing.T, w *world) { w.inv.DriverVersion = "580.65" }, "gpu in the sandbox", stack.Fail, "580.65"},
		"no devices for sandboxes":      {func(_ *testing.T, w *world) { w.c.GPUSpecs = nil }, "gpu in the sandbox", stack.Warn, "nvproxy knows"},
		"neither devices nor driver":    {func(_ *testing.T, w *world) { w.c.GPUSpecs, w.runsc = nil, "" }, "gpu in the sandbox", stack.Warn, "does not know"},
		"no runsc":                      {func(_ *testing.T, w *world) { w.runsc = "'; exit 1; echo '" }, "gpu in the sandbox", stack.Fail, "exit status 1"},
		"gVisor as others build it":     {func(_ *testing.T, w *world) { w.sink = "remote" }, "trace of jobs", stack.Fail, "no trace sink"},
		"no verifier":                   {func(_ *testing.T, w *world) { w.c.Verifier.URL = "https://127.0.0.1:1" }, "verifier", stack.Fail, "refused"},
		"a broker in its place":         {func(_ *testing.T, w *world) { w.c.Verifier.URL = w.c.Broker.URL }, "verifier", stack.Fail, "role"},
		"a verifier with other keys":    {func(t *testing.T, w *world) { w.jwks = keySet(t) }, "verifier", stack.Fail, "none of its keys"},
		"keys that are none":            {func(_ *testing.T, w *world) { w.jwks = []byte("{") }, "verifier", stack.Fail, "none of its keys"},
		"no configured keys":            {func(_ *testing.T, w *world) { w.c.Verifier.KeysFile = "/none" }, "verifier", stack.Fail, "/none"},
		"a clock behind the verifier's": {func(_ *testing.T, w *world) {
			w.m.Now = func() time.Time { return time.Now().Add(-receipt.Leeway - 3*time.Second) }
		}, "verifier", stack.Fail, "its clock says"},
		"no broker":                  {func(_ *testing.T, w *world) { w.c.Broker.URL = "https://127.0.0.1:1" }, "broker", stack.Fail, "refused"},
		"a verifier in its place":    {func(_ *testing.T, w *world) { w.c.Broker.URL = w.c.Verifier.URL }, "broker", stack.Fail, "role"},
		"no keys of the broker's":    {func(_ *testing.T, w *world) { w.c.Broker.KeysFile = "/none" }, "broker", stack.Fail, "/none"},
		"a certificate that is gone": {func(_ *testing.T, w *world) { w.c.TLS.Cert = "/none" }, "broker", stack.Fail, "/none"},
		"no registry":                {func(_ *testing.T, w *world) { w.c.Images.Registries = []string{"127.0.0.1:1"} }, "registry", stack.Fail, "refused"},
		"a name that is none":        {func(_ *testing.T, w *world) { w.c.Images.Registries = []string{"127.0.0.1/x y"} }, "registry", stack.Fail, "registries must be valid"},
		"no registries":              {func(_ *testing.T, w *world) { w.c.Images.Registries = nil }, "registry", stack.OK, "none"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			for _, f := range w.look(t) {
				// The verifier's folder of reference values is another machine's.
				if f.Outcome != stack.OK && f.Name != "gpu reference values" {
					t.Fatalf("before: %+v", f)
				}
			}
			if w.removed != 1 {
				t.Errorf("%d entries of configfs were removed", w.removed)
			}
			row.breakIt(t, w)
			for check, f := range w.look(t) {
				if check == row.check {
					if f.Outcome != row.want || !strings.Contains(f.Found, row.found) {
						t.Errorf("%+v, want %s with %q", f, row.want, row.found)
					}
				} else if f.Outcome == stack.Fail && name != "a certificate that is gone" {
					t.Errorf("besides: %+v", f)
				}
			}
		})
	}
}

// A configuration that this package cannot read is no node without problems.
func TestReadConfig(t *testing.T) {
	file := filepath.Join(t.TempDir(), "cofferd.json")
	for content, want := range map[string]bool{`{"tpm": "/dev/tpmrm0", "queues": []}`: true, `{"tpm": 1}`: false, ``: false} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := ReadConfig(file)
		if (err == nil) != want || want && c.TPM != "/dev/tpmrm0" {
			t.Errorf("%q: %+v, %v", content, c, err)
		}
	}
	if _, err := ReadConfig(file + "x"); err == nil {
		t.Error("a file that is not there was read")
	}
}
