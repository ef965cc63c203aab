package contract_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/coffer-run/coffer/plugins/contract"
	"github.com/coffer-run/coffer/plugins/contract/contracttest"
	gpuv1 "github.com/coffer-run/coffer/plugins/contract/gpu/v1"
)

// fake is a plugin whose answers are given.
type fake struct {
	inventory contract.Inventory
	evidence  func(nonce [32]byte, uuids []string) []contract.Evidence
	err       error
	state     contract.State
	settings  contract.Settings
}

func (f *fake) Inventory(context.Context) (*contract.Inventory, error) { return &f.inventory, f.err }
func (f *fake) SetReady(_ context.Context, ready bool) error {
	f.inventory.Ready = ready
	return f.err
}

func (f *fake) Collect(ctx context.Context, nonce [32]byte, uuids []string) ([]contract.Evidence, error) {
	return f.evidence(nonce, uuids), errors.Join(f.err, ctx.Err())
}

func (f *fake) State(_ context.Context, uuids []string) (*contract.State, error) {
	out := f.state
	out.CCMode, out.Ready, out.DriverVersion = f.inventory.CCMode, f.inventory.Ready, f.inventory.DriverVersion
	if len(out.Devices) == 0 {
		for _, u := range uuids {
			if u != "a" && u != "b" {
				return nil, errors.New("no such GPU")
			}
			out.Devices = append(out.Devices, contract.DeviceState{UUID: u, ProtectedBytes: 1, UnprotectedBytes: f.settings.UnprotectedBytes})
		}
	}
	out.AttackerAdvantage = f.settings.MaxAttackerAdvantage
	return &out, f.err
}

func (f *fake) Prepare(_ context.Context, _ []string, s contract.Settings) error {
	if f.inventory.Ready {
		return errors.New("ready")
	}
	f.settings = s
	return f.err
}

func (f *fake) Clear(_ context.Context, uuids []string) error {
	if uuids[0] != "a" {
		return errors.New("no such GPU")
	}
	return f.err
}

func wellBehaved() *fake {
	return &fake{
		inventory: contract.Inventory{DriverVersion: "1", CCMode: contract.CCOn, Devices: []contract.Device{device("a"), device("b")}},
		evidence: func(nonce [32]byte, uuids []string) (out []contract.Evidence) {
			for _, u := range uuids {
				if u != "a" && u != "b" {
					return nil
				}
				out = append(out, contract.Evidence{UUID: u, Report: append(make([]byte, 4), nonce[:]...), Chain: []byte("chain"), DriverVersion: "1", VBIOSVersion: "1"})
			}
			return out
		},
	}
}

func device(uuid string) contract.Device {
	return contract.Device{UUID: uuid, Name: "fake", VBIOSVersion: "1", MemoryBytes: 1}
}

func TestConformance(t *testing.T) { contracttest.Run(t, contracttest.Served(t, wellBehaved())) }

func TestInventoriesThatAreRefused(t *testing.T) {
	long := strings.Repeat("x", contract.MaxText+1)
	for name, change := range map[string]func(*contract.Inventory){
		"a state of confidential computing not known": func(i *contract.Inventory) { i.CCMode = "very on" },
		"no state of confidential computing":          func(i *contract.Inventory) { i.CCMode = "" },
		"no driver version":                           func(i *contract.Inventory) { i.DriverVersion = "" },
		"a driver version too long":                   func(i *contract.Inventory) { i.DriverVersion = long },
		"control characters in a name":                func(i *contract.Inventory) { i.Devices[0].Name = "fake\x1b[2J" },
		"no VBIOS version":                            func(i *contract.Inventory) { i.Devices[0].VBIOSVersion = "" },
		"no UUID":                                     func(i *contract.Inventory) { i.Devices[0].UUID = "" },
		"the same GPU twice":                          func(i *contract.Inventory) { i.Devices[1].UUID = "a" },
		"negative memory":                             func(i *contract.Inventory) { i.Devices[0].MemoryBytes = -1 },
		"negative protected memory":                   func(i *contract.Inventory) { i.Devices[0].ProtectedMemoryBytes = -1 },
		"more GPUs than a machine has": func(i *contract.Inventory) {
			for c := range contract.MaxGPUs {
				i.Devices = append(i.Devices, device(string(rune('c'+c))))
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := wellBehaved()
			change(&f.inventory)
			if inv, err := contracttest.Served(t, f).Inventory(t.Context()); err == nil {
				t.Errorf("accepted %+v", inv)
			}
		})
	}
	t.Run("but none at all is no error", func(t *testing.T) {
		f := wellBehaved()
		f.inventory.Devices = nil
		if inv, err := contracttest.Served(t, f).Inventory(t.Context()); err != nil || len(inv.Devices) != 0 {
			t.Errorf("got %+v, %v", inv, err)
		}
	})
}

func TestEvidenceThatIsRefused(t *testing.T) {
	for name, change := range map[string]func([]contract.Evidence) []contract.Evidence{
		"of another GPU":   func(e []contract.Evidence) []contract.Evidence { e[0].UUID = "c"; return e },
		"in another order": func(e []contract.Evidence) []contract.Evidence { e[0], e[1] = e[1], e[0]; return e },
		"of fewer GPUs":    func(e []contract.Evidence) []contract.Evidence { return e[:1] },
		"of more GPUs":     func(e []contract.Evidence) []contract.Evidence { return append(e, e[0]) },
		"no report":        func(e []contract.Evidence) []contract.Evidence { e[1].Report = nil; return e },
		"a report too long": func(e []contract.Evidence) []contract.Evidence {
			e[1].Report = make([]byte, contract.MaxReport+1)
			return e
		},
		"no certificates": func(e []contract.Evidence) []contract.Evidence { e[1].Chain = nil; return e },
		"certificates too long": func(e []contract.Evidence) []contract.Evidence {
			e[1].Chain = make([]byte, contract.MaxChain+1)
			return e
		},
		"no driver version": func(e []contract.Evidence) []contract.Evidence { e[1].DriverVersion = ""; return e },
		"no VBIOS version":  func(e []contract.Evidence) []contract.Evidence { e[1].VBIOSVersion = ""; return e },
		"more than a message holds": func(e []contract.Evidence) []contract.Evidence {
			e[0].Report = make([]byte, contract.MaxMessage+1)
			return e
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := wellBehaved()
			good := f.evidence
			f.evidence = func(n [32]byte, u []string) []contract.Evidence { return change(good(n, u)) }
			if evs, err := contracttest.Served(t, f).Collect(t.Context(), [32]byte{}, []string{"a", "b"}); err == nil {
				t.Errorf("accepted %d", len(evs))
			}
		})
	}
}

func TestStatesThatAreRefused(t *testing.T) {
	for name, change := range map[string]func(*fake){
		"a state of confidential computing not known": func(f *fake) { f.inventory.CCMode = "very on" },
		"no driver":              func(f *fake) { f.inventory.DriverVersion = "" },
		"of another GPU":         func(f *fake) { f.state.Devices = []contract.DeviceState{{UUID: "a"}, {UUID: "c"}} },
		"in another order":       func(f *fake) { f.state.Devices = []contract.DeviceState{{UUID: "b"}, {UUID: "a"}} },
		"of fewer GPUs":          func(f *fake) { f.state.Devices = []contract.DeviceState{{UUID: "a"}} },
		"less than no memory":    func(f *fake) { f.state.Devices = []contract.DeviceState{{UUID: "a", UsedBytes: -1}, {UUID: "b"}} },
		"a node that cannot be":  func(f *fake) { f.state.Devices = []contract.DeviceState{{UUID: "a"}, {UUID: "b", NearNode: -1}} },
		"less than no processes": func(f *fake) { f.state.Devices = []contract.DeviceState{{UUID: "a"}, {UUID: "b", Processes: -1}} },
	} {
		t.Run(name, func(t *testing.T) {
			f := wellBehaved()
			change(f)
			if st, err := contracttest.Served(t, f).State(t.Context(), []string{"a", "b"}); err == nil {
				t.Errorf("accepted %+v", st)
			}
		})
	}
}

func TestErrorsKeepTheirText(t *testing.T) {
	f := wellBehaved()
	f.err = errors.New("the driver said no")
	g := contracttest.Served(t, f)
	_, inventory := g.Inventory(t.Context())
	_, collect := g.Collect(t.Context(), [32]byte{}, []string{"a"})
	_, state := g.State(t.Context(), []string{"a"})
	prepare := g.Prepare(t.Context(), []string{"a"}, contract.Settings{UnprotectedBytes: 1024, MaxAttackerAdvantage: 50})
	for _, err := range []error{inventory, collect, state, prepare, g.Clear(t.Context(), []string{"a"}), g.SetReady(t.Context(), true)} {
		if err == nil || !strings.Contains(err.Error(), "the driver said no") {
			t.Errorf("got %v", err)
		}
	}
}

// TestPluginSideChecks is a host that does not keep the contract.
func TestPluginSideChecks(t *testing.T) {
	r := &registrar{}
	contract.RegisterGPU(r, wellBehaved())
	s, ok := r.impl.(gpuv1.GPUServiceServer)
	if !ok {
		t.Fatalf("registered a %T", r.impl)
	}
	for name, req := range map[string]*gpuv1.CollectRequest{
		"a nonce of 31 bytes": {Nonce: make([]byte, 31), Uuids: []string{"a"}},
		"a nonce of 33 bytes": {Nonce: make([]byte, 33), Uuids: []string{"a"}},
		"no GPU":              {Nonce: make([]byte, 32)},
		"the same GPU twice":  {Nonce: make([]byte, 32), Uuids: []string{"a", "a"}},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := s.Collect(t.Context(), req); status.Code(err) != codes.InvalidArgument {
				t.Errorf("got %v", err)
			}
		})
	}
}

type registrar struct{ impl any }

func (r *registrar) RegisterService(_ *grpc.ServiceDesc, impl any) { r.impl = impl }

func TestPluginWithoutImplementation(t *testing.T) {
	if err := (&contract.GPUPlugin{}).GRPCServer(nil, grpc.NewServer()); err == nil {
		t.Error("served nothing")
	}
}
