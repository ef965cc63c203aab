package deptest

import (
	"os"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
)

const root = "../.."

func TestRules(t *testing.T) {
	g, err := Load(t.Context(), root)
	if err != nil {
		t.Errorf("the graph is not whole: %v", err)
	}
	for _, r := range Rules() {
		for _, b := range r.Check(g) {
			t.Error(b)
		}
	}
}

func TestSources(t *testing.T) {
	sources, err := ParseTree(os.DirFS(root))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range PackageComments(sources) {
		t.Error(s)
	}
	for _, s := range UnixOnly(sources, "enclave") {
		t.Errorf("%s (what holds keys or touches devices speaks to no network)", s)
	}
}

// Each rule must be able to fail: a rule whose patterns match nothing would
// pass for ever.
func TestRulesCanFail(t *testing.T) {
	tests := map[string]struct {
		graph Graph
		chain string
	}{
		"attest imports the runner": {
			Graph{"./attest/plan": {"./runner/run"}}, "./attest/plan -> ./runner/run",
		},
		"attest imports an internal helper": {
			Graph{"./attest/broker/serve": {"./internal/daemon"}}, "./attest/broker/serve -> ./internal/daemon",
		},
		"a judge reads files": {
			Graph{"./attest/snp": {"os"}}, "./attest/snp -> os",
		},
		"a judge opens a database": {
			Graph{"./attest/broker": {"database/sql"}}, "./attest/broker -> database/sql",
		},
		"a judge opens SQLite": {
			Graph{"./attest/broker": {"zombiezen.com/go/sqlite"}}, "./attest/broker -> zombiezen.com/go/sqlite",
		},
		"a judge imports a server": {
			Graph{"./attest/bundle/verify": {"./attest/broker/serve"}}, "./attest/bundle/verify -> ./attest/broker/serve",
		},
		"a judge links the virtual vendor": {
			Graph{"./attest/verifier": {"./attest/x"}, "./attest/x": {"./attest/simulate"}}, "./attest/verifier -> ./attest/x -> ./attest/simulate",
		},
		"a judge makes simulation anchors": {
			Graph{"./attest/verifier": {"./attest/internal/anchorset"}}, "./attest/verifier -> ./attest/internal/anchorset",
		},
		"a program forges evidence": {
			Graph{"./cmd/coffer-verify": {"./attest/vtpm/vtpmtest"}}, "./cmd/coffer-verify -> ./attest/vtpm/vtpmtest",
		},
		"the enclave imports a plugin host": {
			Graph{"./enclave/collect": {"./plugins/host"}}, "./enclave/collect -> ./plugins/host",
		},
		"the enclave links http through another module": {
			Graph{"./enclave/hold": {"example.org/lib"}, "example.org/lib": {"net/http"}}, "./enclave/hold -> example.org/lib -> net/http",
		},
		"the agent runs a policy's rules": {
			Graph{"./cmd/cofferd": {"./attest/policy"}, "./attest/policy": {"github.com/open-policy-agent/opa/v1/topdown"}},
			"./cmd/cofferd -> ./attest/policy -> github.com/open-policy-agent/opa/v1/topdown",
		},
		"a verifier runs rules without their limits": {
			Graph{"./attest/verifier": {"github.com/open-policy-agent/opa/v1/topdown"}}, "./attest/verifier -> github.com/open-policy-agent/opa/v1/topdown",
		},
		"the offline verifier has a client beside that of OPA": {
			Graph{
				"./cmd/coffer-verify":                         {"github.com/open-policy-agent/opa/v1/topdown", "example.org/lib"},
				"github.com/open-policy-agent/opa/v1/topdown": {"net/http"}, "example.org/lib": {"net/http"},
			}, "./cmd/coffer-verify -> example.org/lib -> net/http",
		},
		"the runner links the verifier": {
			Graph{"./runner/run": {"./attest/verifier"}}, "./runner/run -> ./attest/verifier",
		},
		"the runner imports a program": {
			Graph{"./runner/run": {"./cmd/coffer/ui"}}, "./runner/run -> ./cmd/coffer/ui",
		},
		"a plugin imports the runner": {
			Graph{"./plugins/gpu/nvidia": {"./runner/run"}}, "./plugins/gpu/nvidia -> ./runner/run",
		},
		"the agent links the seal code": {
			Graph{"./cmd/cofferd": {"./runner/run"}, "./runner/run": {"./enclave/seal"}}, "./cmd/cofferd -> ./runner/run -> ./enclave/seal",
		},
		"the holder imports the daemon set-up": {
			Graph{"./cmd/coffer-holder": {"./internal/daemon"}}, "./cmd/coffer-holder -> ./internal/daemon",
		},
		"the holder links tls": {
			Graph{"./cmd/coffer-holder": {"crypto/tls"}}, "./cmd/coffer-holder -> crypto/tls",
		},
		"the gateway links the runner": {
			Graph{"./cmd/coffer-gateway": {"./runner/egress"}}, "./cmd/coffer-gateway -> ./runner/egress",
		},
		"the broker parses evidence": {
			Graph{"./cmd/coffer-broker": {"./attest/broker"}, "./attest/broker": {"./attest/evidence"}}, "./cmd/coffer-broker -> ./attest/broker -> ./attest/evidence",
		},
		"what attests for the broker has its keys": {
			Graph{"./cmd/coffer-attest": {"./internal/keystore"}}, "./cmd/coffer-attest -> ./internal/keystore",
		},
		"the verifier has the broker's rules": {
			Graph{"./cmd/coffer-verifier-simulated": {"./attest/broker"}}, "./cmd/coffer-verifier-simulated -> ./attest/broker",
		},
		"the production verifier can load simulation roots": {
			Graph{"./cmd/coffer-verifier": {"./attest/simulate"}}, "./cmd/coffer-verifier -> ./attest/simulate",
		},
		"the offline verifier links the enclave": {
			Graph{"./cmd/coffer-verify": {"./enclave/seal"}}, "./cmd/coffer-verify -> ./enclave/seal",
		},
		"the offline verifier can ask the network": {
			Graph{"./cmd/coffer-verify": {"./attest/snp"}, "./attest/snp": {"net/http"}}, "./cmd/coffer-verify -> ./attest/snp -> net/http",
		},
		"another program links NVIDIA's library": {
			Graph{"./cmd/cofferd": {"github.com/NVIDIA/go-nvml/pkg/nvml"}}, "./cmd/cofferd -> github.com/NVIDIA/go-nvml/pkg/nvml",
		},
		"the broker links a token's library": {
			Graph{"./cmd/coffer-broker": {"github.com/miekg/pkcs11"}}, "./cmd/coffer-broker -> github.com/miekg/pkcs11",
		},
		"the broker links a key store's client": {
			Graph{"./cmd/coffer-broker": {"github.com/hashicorp/vault/api"}}, "./cmd/coffer-broker -> github.com/hashicorp/vault/api",
		},
		"the command line reads object stores": {
			Graph{"./cmd/coffer": {"./runner/source/object"}, "./runner/source/object": {"gocloud.dev/blob/s3blob"}},
			"./cmd/coffer -> ./runner/source/object -> gocloud.dev/blob/s3blob",
		},
		"Kubernetes in the runner": {
			Graph{"./runner/server": {"k8s.io/client-go/rest"}}, "./runner/server -> k8s.io/client-go/rest",
		},
	}
	tested := map[string]bool{}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			found := false
			for _, r := range Rules() {
				for _, b := range r.Check(tt.graph) {
					if strings.Join(b.Chain, " -> ") == tt.chain {
						found, tested[r.Why] = true, true
					}
				}
			}
			if !found {
				t.Errorf("no rule found %s", tt.chain)
			}
		})
	}
	for _, r := range Rules() {
		if !tested[r.Why] {
			t.Errorf("no graph breaks the rule: %s", r.Why)
		}
	}
}

func TestRulesAllowWhatTheyMust(t *testing.T) {
	g := Graph{
		"./attest/broker/serve":   {"./attest/broker", "net/http", "zombiezen.com/go/sqlite"},
		"./attest/simulate":       {"os", "./attest/anchor"},
		"./enclave/hold":          {"net", "os", "./attest/plan"},
		"./runner/run":            {"./enclave/hold/holdapi", "./plugins/host", "net/http"},
		"./plugins/gpu/nvidia":    {"./plugins/contract", "github.com/NVIDIA/go-nvml/pkg/nvml"},
		"./cmd/coffer-verify":     {"./attest/bundle/verify", "./attest/simulate", "os", "net"},
		"./cmd/coffer-verifier":   {"./attest/verifier/serve", "./internal/daemon"},
		"./attest/verifier/serve": {"./attest/verifier", "net/http"},
	}
	for _, r := range Rules() {
		for _, b := range r.Check(g) {
			t.Error(b)
		}
	}
}

func TestSourceRulesCanFail(t *testing.T) {
	tests := map[string]struct {
		file string
		want string
	}{
		"tcp by literal":             {`import "net"; func f() { net.Dial("tcp", "x") }`, "literal network"},
		"network by variable":        {`import "net"; func f(n string) { net.Listen(n, "x") }`, "literal network"},
		"network by dialer":          {`import ("context"; "net"); func f(c context.Context) { var d net.Dialer; d.DialContext(c, "tcp", "x") }`, "literal network"},
		"typed dial":                 {`import "net"; func f() { net.DialTCP("tcp", nil, nil) }`, "only unix sockets"},
		"lookup":                     {`import "net"; func f() { net.LookupHost("x") }`, "only unix sockets"},
		"renamed import":             {`import n "net"; func f() { n.Dial("udp", "x") }`, "literal network"},
		"raw socket":                 {`import "golang.org/x/sys/unix"; func f() { unix.Socket(unix.AF_INET, 1, 0) }`, "AF_INET"},
		"address of another family":  {`import "golang.org/x/sys/unix"; func f() { _ = unix.Connect(3, &unix.SockaddrInet4{Port: 1}) }`, "SockaddrInet4"},
		"a word that begins as unix": {`import "net"; func f() { net.Dial("unix4", "x") }`, "literal network"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			sources, err := ParseTree(fstest.MapFS{"enclave/x/x.go": {Data: []byte("package x\n" + tt.file)}})
			if err != nil {
				t.Fatal(err)
			}
			if got := UnixOnly(sources, "enclave"); !strings.Contains(strings.Join(got, "\n"), tt.want) {
				t.Errorf("found %q, want %q", got, tt.want)
			}
		})
	}
	t.Run("unix sockets pass", func(t *testing.T) {
		sources, err := ParseTree(fstest.MapFS{
			"enclave/x/x.go":      {Data: []byte(`package x; import ("context"; "net"); func f(c context.Context) { net.Dial("unix", "x"); var d net.Dialer; d.DialContext(c, "unixpacket", "x"); net.ListenUnix("unix", nil) }`)},
			"runner/y/y.go":       {Data: []byte(`package y; import "net"; func f() { net.Dial("tcp", "x") }`)},
			"enclave/x/x_test.go": {Data: []byte(`package x; import "net"; func g() { net.Dial("tcp", "x") }`)},
		})
		if err != nil {
			t.Fatal(err)
		}
		if got := UnixOnly(sources, "enclave"); len(got) > 0 {
			t.Errorf("found %q", got)
		}
	})
	t.Run("package comments", func(t *testing.T) {
		sources, err := ParseTree(fstest.MapFS{
			"none/a.go":      {Data: []byte("package none\n")},
			"two/a.go":       {Data: []byte("// Package two is one.\npackage two\n")},
			"two/b.go":       {Data: []byte("// Package two is two.\npackage two\n")},
			"named/a.go":     {Data: []byte("// Something else.\npackage named\n")},
			"good/a.go":      {Data: []byte("// Package good is good.\npackage good\n")},
			"good/b.go":      {Data: []byte("package good\n")},
			"generated/a.go": {Data: []byte("// Code generated by x. DO NOT EDIT.\n\npackage generated\n")},
			"tools/a.go":     {Data: []byte("package tools\n")},
		})
		if err != nil {
			t.Fatal(err)
		}
		var dirs []string
		for _, s := range PackageComments(sources) {
			dir, _, _ := strings.Cut(s, ":")
			dirs = append(dirs, dir)
		}
		if want := []string{"named", "none", "two"}; !slices.Equal(dirs, want) {
			t.Errorf("found %q, want %q", dirs, want)
		}
	})
}
