package collect_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"encoding/pem"
	"errors"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/nvgpu"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/snp"
	"github.com/coffer-run/coffer/attest/vtpm"
	"github.com/coffer-run/coffer/enclave/collect"
	"github.com/coffer-run/coffer/enclave/collect/tpm"
	"github.com/coffer-run/coffer/enclave/collect/tsm"
	"github.com/coffer-run/coffer/internal/emulate"
	"github.com/coffer-run/coffer/internal/emulate/emulatetest"
	"github.com/coffer-run/coffer/internal/emulate/nvml"
	"github.com/coffer-run/coffer/internal/emulate/server"
	"github.com/coffer-run/coffer/plugins/contract"
	"github.com/coffer-run/coffer/plugins/contract/contracttest"
	"github.com/coffer-run/coffer/plugins/gpu/nvidia"
)

// overPlugin is the agent's adapter: a GPU plugin as a source of evidence.
type overPlugin struct{ gpu contract.GPU }

func (p overPlugin) Collect(ctx context.Context, nonce [32]byte, uuids []string) ([]evidence.GPU, error) {
	evs, err := p.gpu.Collect(ctx, nonce, uuids)
	if err != nil {
		return nil, err
	}
	var out []evidence.GPU
	for _, e := range evs {
		out = append(out, evidence.GPU(e))
	}
	return out, nil
}

// node is a machine whose devices are emulated below the real collectors.
type node struct {
	*collect.Collector
	vendor  *simulate.Vendor
	machine *emulatetest.TPM
	tpm     *tpm.TPM
	log     string
}

var measured = []vtpm.Event{{PCR: vtpm.AgentPCR, Name: "agent", Digest: sha256.Sum256([]byte("agent")), MeasuredBy: vtpm.MeasuredBySelf}}

func newNode(t *testing.T) *node {
	t.Helper()
	n := &node{vendor: emulatetest.Vendor(t), machine: emulatetest.NewTPM(t), log: filepath.Join(t.TempDir(), "log")}
	socket := emulatetest.Devices(t, n.vendor, server.Config{GPUs: 2})
	p, err := nvidia.Open(nvml.New(t.Context(), emulate.Dial(socket)), true)
	if err != nil {
		t.Fatal(err)
	}
	if n.tpm, err = tpm.Open(t.Context(), n.machine.Socket, tpm.Options{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = n.tpm.Close() })
	if _, err := n.tpm.Measure(t.Context(), n.log, measured); err != nil {
		t.Fatal(err)
	}
	n.Collector = &collect.Collector{
		TPM:  n.tpm,
		SNP:  tsm.New(emulate.NewTSM(emulate.Dial(socket))),
		GPUs: overPlugin{contracttest.Served(t, p)},
	}
	return n
}

func (n *node) uuids() []string {
	var out []string
	for _, g := range n.vendor.GPUs() {
		out = append(out, g.UUID())
	}
	return out
}

func request(uuids ...string) collect.Request {
	return collect.Request{
		VerifierID: "verifier", Nonce: rand.Text(), JobID: "job-" + rand.Text(), Plan: []byte(`{"plan":1}`), Sandbox: []byte(`{"sandbox":1}`),
		RecipientKey: []byte("recipient"), SessionKey: []byte("session"), AKCredential: "credential",
		Want: collect.Want{TPM: true, SNP: true, GPUs: uuids},
	}
}

// judge parses the envelope as a verifier does and holds the bindings against
// the bytes at the offsets where the devices put them.
func judge(t *testing.T, n *node, req collect.Request, env *evidence.Envelope) {
	t.Helper()
	b, err := json.Marshal(env)
	if err != nil {
		t.Fatal(err)
	}
	got, err := evidence.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Failures) > 0 || got.TPM == nil || got.SNP == nil || len(got.GPUs) != len(req.Want.GPUs) || got.JobID != req.JobID {
		t.Fatalf("failures %v, tpm %v, snp %v, %d GPUs", got.Failures, got.TPM != nil, got.SNP != nil, len(got.GPUs))
	}
	bound, err := got.Challenge().Bind()
	if err != nil {
		t.Fatal(err)
	}
	nonce := bound.GPUNonce()
	for _, g := range got.GPUs {
		if !bytes.Equal(g.Report[4:36], nonce[:]) {
			t.Errorf("GPU %s: nonce %x, want %x", g.UUID, g.Report[4:36], nonce)
		}
		certs := 0
		for rest := g.Chain; len(rest) > 0; certs++ {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil {
				break
			}
		}
		if certs != 5 || g.DriverVersion == "" || g.VBIOSVersion == "" {
			t.Errorf("GPU %s: %d certificates, driver %q, VBIOS %q", g.UUID, certs, g.DriverVersion, g.VBIOSVersion)
		}
	}
	devices := got.Devices()

	attest, err := tpm2.Unmarshal[tpm2.TPMSAttest](got.TPM.Quote)
	if err != nil {
		t.Fatal(err)
	}
	extra := bound.TPMExtraData(devices)
	if !bytes.Equal(attest.ExtraData.Buffer, extra[:]) {
		t.Errorf("TPM extra data %x, want %x", attest.ExtraData.Buffer, extra)
	}
	reportData := bound.SNPReportData(devices, got.TPM.Quote, got.TPM.EventLog)
	if len(got.SNP.Report) != 1184 || !bytes.Equal(got.SNP.Report[0x50:0x90], reportData[:]) {
		t.Errorf("SNP report of %d bytes, report data %x, want %x", len(got.SNP.Report), got.SNP.Report[0x50:0x90], reportData)
	}

	now := time.Now()
	s := snp.Appraise(snp.Evidence{Report: got.SNP.Report, Certificates: got.SNP.Certificates}, snp.Want{ReportData: reportData}, n.vendor.Anchors(), now)
	for _, f := range s.Checks.Failed() {
		t.Errorf("%s: expected %s, found %s", f.ID, f.Expected, f.Found)
	}
	for _, g := range got.GPUs {
		r := nvgpu.Appraise(nvgpu.Evidence{Report: g.Report, Chain: g.Chain, DriverVersion: g.DriverVersion, VBIOSVersion: g.VBIOSVersion}, nvgpu.Want{Nonce: nonce}, n.vendor.Anchors(), now)
		for _, f := range r.Checks.Failed() {
			t.Errorf("%s: expected %s, found %s", f.ID, f.Expected, f.Found)
		}
	}
}

func TestCollect(t *testing.T) {
	n := newNode(t)
	for name, req := range map[string]collect.Request{
		"two GPUs": request(n.uuids()...),
		"one GPU":  request(n.uuids()[0]),
		"no GPU":   request(),
	} {
		t.Run(name, func(t *testing.T) {
			env, err := n.Collect(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			judge(t, n, req, env)
		})
	}
	t.Run("eight jobs at once", func(t *testing.T) {
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				req := request(n.uuids()[0])
				env, err := n.Collect(t.Context(), req)
				if err != nil {
					t.Error(err)
					return
				}
				judge(t, n, req, env)
			})
		}
		wg.Wait()
	})
	t.Run("the TPM restarts between two jobs", func(t *testing.T) {
		n.machine.Off()
		n.machine.On(t)
		req := request(n.uuids()[0])
		env, err := n.Collect(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		if len(env.Failures) != 1 || env.Failures[0].Source != "tpm" || !strings.Contains(env.Failures[0].Message, "reset") {
			t.Errorf("failures %v", env.Failures)
		}
		if _, err := n.tpm.Measure(t.Context(), n.log, measured); err != nil {
			t.Fatal(err)
		}
		if env, err = n.Collect(t.Context(), req); err != nil {
			t.Fatal(err)
		}
		judge(t, n, req, env)
	})
	t.Run("the TPM is off", func(t *testing.T) {
		n.machine.Off()
		defer n.machine.On(t)
		env, err := n.Collect(t.Context(), request())
		if err != nil || len(env.Failures) != 1 || env.Failures[0].Source != "tpm" {
			t.Errorf("failures %v, %v", env, err)
		}
	})
}

// The rest is about the order alone: sources are stand-ins.

type fakeTPM struct{ err error }

func (f fakeTPM) AKPublic() []byte { return []byte("ak") }
func (f fakeTPM) Quote(_ context.Context, extra [32]byte) (*collect.Quote, error) {
	if f.err != nil {
		return nil, f.err
	}
	return &collect.Quote{Attest: extra[:], Signature: []byte("signature"), EventLog: []byte("log"), PCRs: map[int][]byte{14: make([]byte, 32)}}, nil
}

type fakeSNP struct{ err error }

func (f fakeSNP) Report(_ context.Context, data [64]byte) ([]byte, []byte, error) {
	return data[:], nil, f.err
}

type fakeGPUs struct {
	answer []evidence.GPU
	err    error
}

func (f fakeGPUs) Collect(context.Context, [32]byte, []string) ([]evidence.GPU, error) {
	return f.answer, f.err
}

func gpu(uuid string) evidence.GPU {
	return evidence.GPU{UUID: uuid, Report: []byte("report"), Chain: []byte("chain")}
}

func TestFailuresAreNamed(t *testing.T) {
	broken := errors.New("broken\x1b[2J\nline " + strings.Repeat("x", 4000))
	ok := fakeGPUs{answer: []evidence.GPU{gpu("a")}}
	for name, c := range map[string]struct {
		collector collect.Collector
		want      []string
	}{
		"nothing fails":                 {collect.Collector{TPM: fakeTPM{}, SNP: fakeSNP{}, GPUs: ok}, nil},
		"the TPM fails":                 {collect.Collector{TPM: fakeTPM{broken}, SNP: fakeSNP{}, GPUs: ok}, []string{"tpm"}},
		"the chip fails":                {collect.Collector{TPM: fakeTPM{}, SNP: fakeSNP{broken}, GPUs: ok}, []string{"snp"}},
		"the GPU fails":                 {collect.Collector{TPM: fakeTPM{}, SNP: fakeSNP{}, GPUs: fakeGPUs{err: broken}}, []string{"gpu"}},
		"the node has none":             {collect.Collector{}, []string{"tpm", "gpu", "snp"}},
		"no GPU answers":                {collect.Collector{TPM: fakeTPM{}, SNP: fakeSNP{}, GPUs: fakeGPUs{}}, []string{"gpu"}},
		"another GPU answers":           {collect.Collector{TPM: fakeTPM{}, SNP: fakeSNP{}, GPUs: fakeGPUs{answer: []evidence.GPU{gpu("b")}}}, []string{"gpu"}},
		"a GPU answers twice":           {collect.Collector{TPM: fakeTPM{}, SNP: fakeSNP{}, GPUs: fakeGPUs{answer: []evidence.GPU{gpu("a"), gpu("a")}}}, []string{"gpu"}},
		"a GPU answers without report":  {collect.Collector{TPM: fakeTPM{}, SNP: fakeSNP{}, GPUs: fakeGPUs{answer: []evidence.GPU{{UUID: "a", Chain: []byte("chain")}}}}, []string{"gpu"}},
		"a GPU answers and fails":       {collect.Collector{TPM: fakeTPM{}, SNP: fakeSNP{}, GPUs: fakeGPUs{answer: []evidence.GPU{gpu("a")}, err: broken}}, []string{"gpu"}},
		"everything fails at once":      {collect.Collector{TPM: fakeTPM{broken}, SNP: fakeSNP{broken}, GPUs: fakeGPUs{err: broken}}, []string{"gpu", "tpm", "snp"}},
		"a GPU without its certificate": {collect.Collector{TPM: fakeTPM{}, SNP: fakeSNP{}, GPUs: fakeGPUs{answer: []evidence.GPU{{UUID: "a", Report: []byte("r")}}}}, []string{"gpu"}},
	} {
		t.Run(name, func(t *testing.T) {
			env, err := c.collector.Collect(t.Context(), request("a"))
			if err != nil {
				t.Fatal(err)
			}
			var sources []string
			failed := map[string]bool{}
			for _, f := range env.Failures {
				sources = append(sources, f.Source)
				failed[f.Source] = true
				if f.Message == "" || len(f.Message) > 1024 || strings.ContainsAny(f.Message, "\n\x1b") {
					t.Errorf("message %q", f.Message)
				}
			}
			if strings.Join(sources, " ") != strings.Join(c.want, " ") {
				t.Errorf("failures %v, want %v", sources, c.want)
			}
			if failed["gpu"] != (len(env.GPUs) == 0) || failed["snp"] != (env.SNP == nil) || failed["tpm"] != (env.TPM == nil || env.TPM.Quote == nil) {
				t.Errorf("a failure comes with evidence, or evidence is missing in silence: %+v", env)
			}
			// What was collected binds what the envelope shows, failures or not.
			bound, err := env.Challenge().Bind()
			if err != nil {
				t.Fatal(err)
			}
			var quote, log []byte
			if env.TPM != nil {
				quote, log = env.TPM.Quote, env.TPM.EventLog
				if extra := bound.TPMExtraData(env.Devices()); quote != nil && !bytes.Equal(quote, extra[:]) {
					t.Error("the quote binds something else")
				}
			}
			if data := bound.SNPReportData(env.Devices(), quote, log); env.SNP != nil && !bytes.Equal(env.SNP.Report, data[:]) {
				t.Error("the report binds something else")
			}
			b, err := json.Marshal(env)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := evidence.Parse(b); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestRequestsThatCannotBeBound(t *testing.T) {
	c := collect.Collector{TPM: fakeTPM{}, SNP: fakeSNP{}}
	for name, change := range map[string]func(*collect.Request){
		"no verifier":        func(r *collect.Request) { r.VerifierID = "" },
		"no nonce":           func(r *collect.Request) { r.Nonce = "" },
		"no job":             func(r *collect.Request) { r.JobID = "" },
		"no recipient key":   func(r *collect.Request) { r.RecipientKey = nil },
		"no session key":     func(r *collect.Request) { r.SessionKey = nil },
		"nothing wanted":     func(r *collect.Request) { r.Want = collect.Want{} },
		"more GPUs than fit": func(r *collect.Request) { r.Want.GPUs = make([]string, evidence.MaxGPUs+1) },
	} {
		t.Run(name, func(t *testing.T) {
			req := request()
			change(&req)
			if env, err := c.Collect(t.Context(), req); err == nil {
				t.Errorf("got %+v", env)
			}
		})
	}
	t.Run("the context ended", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := c.Collect(ctx, request()); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
}
