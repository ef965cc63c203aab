package composite_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/azure/azuretest"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/composite"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/policy/rego"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/vtpm"
	"github.com/coffer-run/coffer/attest/vtpm/vtpmtest"
)

// parts are minted once: RSA keys take seconds.
var parts = sync.OnceValues(func() (struct {
	vendor *simulate.Vendor
	tpm    *vtpmtest.TPM
	other  *vtpmtest.TPM
}, error) {
	var p struct {
		vendor *simulate.Vendor
		tpm    *vtpmtest.TPM
		other  *vtpmtest.TPM
	}
	var errs [3]error
	p.vendor, errs[0] = simulate.New(simulate.Options{GPUs: 2, Fast: true})
	p.tpm, errs[1] = vtpmtest.NewRSA(time.Now())
	p.other, errs[2] = vtpmtest.NewRSA(time.Now())
	return p, errors.Join(errs[:]...)
})

var idKey = [48]byte{1: 0xc0, 47: 0xfe}

// machine is a confidential machine of Azure's kind with one GPU. Its fields say
// where an attacker departs from an honest one.
type machine struct {
	t      *testing.T
	now    time.Time
	vendor *simulate.Vendor
	tpm    *vtpmtest.TPM
	other  *vtpmtest.TPM
	trust  composite.Trust
	e      evidence.Envelope
	claims []byte
	idKey  [48]byte
	vmpl   uint32
	gpus   int
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	p, err := parts()
	if err != nil {
		t.Fatal(err)
	}
	anchors, err := p.vendor.Anchors().WithParavisors(idKey)
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{t: t, now: time.Now(), vendor: p.vendor, tpm: p.tpm, other: p.other, trust: composite.Trust{Anchors: anchors}, idKey: idKey, gpus: 1}
	m.claims = m.claimsOf(p.tpm)
	m.e = evidence.Envelope{
		Version: evidence.Version, VerifierID: "verifier", Nonce: "a nonce of more than 16 bytes", JobID: "job-1", Plan: []byte("plan"), Sandbox: []byte("sandbox"),
		RecipientKey: []byte("recipient"), SessionKey: []byte("session"), TPM: &evidence.TPM{AKPublic: p.tpm.AKPublic},
	}
	return m
}

func (m *machine) claimsOf(tpm *vtpmtest.TPM) []byte {
	m.t.Helper()
	ak, ok := tpm.AK().(*rsa.PublicKey)
	if !ok {
		m.t.Fatal("not an RSA key")
	}
	b, err := azuretest.Claims(ak)
	if err != nil {
		m.t.Fatal(err)
	}
	return b
}

func (m *machine) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

// collect gathers GPUs, then the quote.
func (m *machine) collect() *machine {
	m.t.Helper()
	b, err := m.e.Challenge().Bind()
	m.must(err)
	m.e.GPUs = nil
	for _, g := range m.vendor.GPUs()[:m.gpus] {
		r, err := g.Report(b.GPUNonce(), simulate.GPUOptions{})
		m.must(err)
		m.e.GPUs = append(m.e.GPUs, evidence.GPU{UUID: g.UUID(), Report: r, Chain: g.ChainPEM(), DriverVersion: g.DriverVersion(), VBIOSVersion: g.VBIOSVersion()})
	}
	x := b.TPMExtraData(m.e.Devices())
	m.quote(m.tpm, x[:])
	return m
}

func (m *machine) quote(tpm *vtpmtest.TPM, extra []byte) {
	m.t.Helper()
	var err error
	m.e.TPM.Quote, m.e.TPM.Signature, err = tpm.Quote(extra, nil, 0, 7, vtpm.AgentPCR)
	m.must(err)
	m.e.TPM.PCRs = tpm.PCRs(0, 7, vtpm.AgentPCR)
	m.e.TPM.EventLog, err = vtpm.EncodeLog(tpm.Events)
	m.must(err)
}

// hcl has the paravisor make its report, which it does before any job.
func (m *machine) hcl() *machine {
	m.t.Helper()
	m.e.SNP = &evidence.SNP{HCLReport: azuretest.Report(m.report(hashed(m.claims)), m.claims), Certificates: m.vendor.Chip().CertTable()}
	return m
}

func hashed(claims []byte) (out [64]byte) {
	sum := sha256.Sum256(claims)
	copy(out[:], sum[:])
	return out
}

func (m *machine) report(data [64]byte) []byte {
	m.t.Helper()
	r, err := m.vendor.Chip().Report(data, simulate.SNPOptions{VMPL: m.vmpl, Edit: func(r []byte) { copy(r[0xE0:], m.idKey[:]) }})
	m.must(err)
	return r
}

// plain has the guest itself make the report, over all the rest.
func (m *machine) plain() *machine {
	m.t.Helper()
	b, err := m.e.Challenge().Bind()
	m.must(err)
	var quote, log, firmware []byte
	if m.e.TPM != nil {
		quote, log, firmware = m.e.TPM.Quote, m.e.TPM.EventLog, m.e.TPM.TCGLog
	}
	m.e.SNP = &evidence.SNP{Report: m.report(b.SNPReportData(m.e.Devices(), quote, log, firmware)), Certificates: m.vendor.Chip().CertTable()}
	return m
}

func (m *machine) appraise() *composite.Appraisal {
	m.t.Helper()
	s, err := composite.Open(&m.e)
	m.must(err)
	return s.Appraise(context.Background(), m.trust, m.now)
}

func failed(a *composite.Appraisal) []string {
	var ids []string
	add := func(l check.List) {
		for _, c := range l.Failed() {
			ids = append(ids, c.ID)
		}
	}
	add(a.Checks)
	for _, d := range a.Devices() {
		add(d.Checks)
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

func name(tpm *vtpmtest.TPM) string {
	sum := sha256.Sum256(tpm.AKPublic)
	return "000b" + hex.EncodeToString(sum[:])
}

func TestAzureMachine(t *testing.T) {
	m := newMachine(t).collect().hcl()
	a := m.appraise()
	if f := failed(a); f != nil {
		t.Fatalf("failed %v", f)
	}
	if !a.CPU.Genuine() || !a.TPM.Genuine() || !a.GPUs[0].Genuine() || !a.Simulated() || !a.TPM.Simulated {
		t.Errorf("%+v", a)
	}
	if a.TPM.Claims["tpm.trust-class"] != string(anchor.HCLVMPL0) || a.TPM.Claims["tpm.ak-by"] != vtpm.AKByPlatform || a.CPU.Claims["hcl.secure-boot"] != true {
		t.Errorf("%+v %+v", a.TPM.Claims, a.CPU.Claims)
	}

	// A policy that takes such TPMs accepts it, and one that does not refuses.
	p, err := policy.Named("simulation")
	m.must(err)
	tpm := *p.TPM
	p.TPM = &tpm
	ids := func() (out []string) {
		compiled, err := rego.Compile(p)
		m.must(err)
		l := a.Decide(compiled, 1)
		for _, d := range a.Devices() {
			l = append(l, d.Accepted...)
		}
		for _, c := range l.Failed() {
			out = append(out, c.ID)
		}
		return out
	}
	if got := ids(); !slices.Equal(got, []string{"policy.tpm.trust-class"}) {
		t.Errorf("failed %v", got)
	}
	tpm.Classes = []anchor.Class{anchor.HCLVMPL0}
	if got := ids(); got != nil {
		t.Errorf("failed %v", got)
	}
	tpm.Require = append(slices.Clone(tpm.Require), "tpm.tcg-log")
	if got := ids(); !slices.Equal(got, []string{"policy.tpm.require"}) {
		t.Errorf("without a firmware log that is required: failed %v", got)
	}
}

// One departure a row from the machine above.
func TestAzureAttacks(t *testing.T) {
	noAK := []string{"hcl.binding", "tpm.ak-credential"}
	for _, row := range []struct {
		situation string
		attack    func(m *machine)
		by        string
		also      []string
	}{
		{"claims changed after the report was made", func(m *machine) {
			report := m.report(hashed(m.claims))
			m.collect().hcl()
			m.e.SNP.HCLReport = azuretest.Report(report, bytes.Replace(m.claims, []byte("true"), []byte("null"), 1))
		}, "snp.report-data", noAK},
		{"other key in the claims, and a quote by it", func(m *machine) {
			report := m.report(hashed(m.claims))
			m.tpm, m.e.TPM.AKPublic = m.other, m.other.AKPublic
			m.collect().hcl()
			m.e.SNP.HCLReport = azuretest.Report(report, m.claimsOf(m.other))
		}, "snp.report-data", noAK},
		{"quote by another key", func(m *machine) {
			m.tpm, m.e.TPM.AKPublic = m.other, m.other.AKPublic
			m.collect().hcl()
		}, "hcl.binding", noAK},
		{"quote by another key that is pinned", func(m *machine) {
			var err error
			m.trust.Anchors, err = m.trust.Anchors.WithAKs(anchor.Discrete, name(m.other))
			m.must(err)
			m.tpm, m.e.TPM.AKPublic = m.other, m.other.AKPublic
			m.collect().hcl()
		}, "hcl.binding", noAK},
		{"quote by another key that has a credential", func(m *machine) {
			m.tpm, m.e.TPM.AKPublic = m.other, m.other.AKPublic
			m.credential(m.other)
			m.collect().hcl()
		}, "hcl.binding", nil},
		{"guest of the attacker's, with claims of its making", func(m *machine) {
			m.idKey = [48]byte{1}
			m.collect().hcl()
		}, "hcl.paravisor", noAK},
		{"guest that nobody signed", func(m *machine) {
			m.idKey = [48]byte{}
			m.collect().hcl()
		}, "hcl.paravisor", noAK},
		{"no paravisor trusted", func(m *machine) {
			m.trust.Anchors = m.vendor.Anchors()
			m.collect().hcl()
		}, "hcl.paravisor", noAK},
		{"report from inside the paravisor", func(m *machine) {
			m.vmpl = 2
			m.collect().hcl()
		}, "hcl.paravisor", noAK},
		{"no quote", func(m *machine) {
			m.collect().hcl()
			m.e.TPM = nil
		}, "hcl.binding", []string{"gpu.nonce"}},
		{"quote of another job", func(m *machine) {
			m.collect().hcl()
			m.e.JobID = "job-2"
		}, "tpm.extra-data", []string{"hcl.binding", "gpu.nonce"}},
		{"quote over nothing", func(m *machine) {
			m.collect().hcl()
			m.quote(m.tpm, nil)
		}, "tpm.extra-data", []string{"hcl.binding"}},
		{"quote signed by another key", func(m *machine) {
			m.collect().hcl()
			var err error
			m.e.TPM.Signature, err = m.other.Sign(m.e.TPM.Quote)
			m.must(err)
		}, "tpm.signature", []string{"hcl.binding"}},
		{"report of another simulation", func(m *machine) {
			v, err := simulate.New(simulate.Options{Fast: true})
			m.must(err)
			m.vendor = v
			m.gpus = 0
			m.collect().hcl()
		}, "snp.chain", noAK},
		{"one bit of the report", func(m *machine) {
			m.collect().hcl()
			m.e.SNP.HCLReport[32+0x90] ^= 1
		}, "snp.signature", noAK},
		{"one bit of the header", func(m *machine) {
			m.collect().hcl()
			m.e.SNP.HCLReport[0] ^= 1
		}, "hcl.parse", []string{"tpm.ak-credential"}},
		{"the report alone, as one of the guest's own", func(m *machine) {
			m.collect().hcl()
			m.e.SNP = &evidence.SNP{Report: m.e.SNP.HCLReport[32 : 32+1184], Certificates: m.e.SNP.Certificates}
		}, "snp.report-data", []string{"tpm.ak-credential"}},
		{"a guest's own report, as a paravisor's", func(m *machine) {
			m.collect().plain()
			m.e.SNP = &evidence.SNP{HCLReport: azuretest.Report(m.e.SNP.Report, m.claims), Certificates: m.e.SNP.Certificates}
		}, "snp.report-data", noAK},
	} {
		t.Run(row.situation, func(t *testing.T) {
			m := newMachine(t)
			row.attack(m)
			a := m.appraise()
			ids := failed(a)
			if !slices.Contains(ids, row.by) {
				t.Fatalf("failed %v, want %s", ids, row.by)
			}
			for _, id := range ids {
				if id != row.by && !slices.Contains(row.also, id) {
					t.Errorf("also failed %s: the row does not isolate %s", id, row.by)
				}
			}
			if a.CPU.Genuine() && a.TPM.Genuine() {
				t.Error("CPU and TPM are genuine")
			}
		})
	}
}

func (m *machine) credential(tpm *vtpmtest.TPM) {
	m.t.Helper()
	anchors, err := m.trust.Anchors.WithEKRoots(anchor.Discrete, tpm.Root)
	m.must(err)
	e, err := vtpm.BeginEnrolment(tpm.EKChain, tpm.AKPublic, anchors, m.now)
	m.must(err)
	k, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	m.must(err)
	s, err := receipt.NewSigner("verifier", k)
	m.must(err)
	jwks, err := s.JWKS()
	m.must(err)
	m.trust.CredentialKeys, err = receipt.ParseKeys("verifier", jwks)
	m.must(err)
	m.e.TPM.AKCredential, err = s.Sign(vtpm.TypeCredential, vtpm.Credential{
		Issuer: "verifier", ID: "1", IssuedAt: m.now.Unix(), Expires: m.now.Add(time.Hour).Unix(), AKName: e.AKName, EKDigest: e.EKDigest, Class: string(e.Class),
	})
	m.must(err)
}

// A key that is pinned by name needs neither a credential nor a paravisor.
func TestPinnedKey(t *testing.T) {
	m := newMachine(t).collect().plain()
	if got := failed(m.appraise()); !slices.Equal(got, []string{"tpm.ak-credential"}) {
		t.Fatalf("key that nobody pinned: failed %v", got)
	}
	var err error
	m.trust.Anchors, err = m.vendor.Anchors().WithAKs(anchor.Discrete, name(m.tpm))
	m.must(err)
	a := m.appraise()
	if f := failed(a); f != nil {
		t.Fatalf("failed %v", f)
	}
	if c := a.TPM.Claims; c["tpm.trust-class"] != string(anchor.Discrete) || c["tpm.ak-by"] != vtpm.AKByPin || !a.TPM.Simulated {
		t.Errorf("%+v", c)
	}

	// Its numbers under other attributes are another key.
	pub, err := tpm2.Unmarshal[tpm2.TPMTPublic](m.tpm.AKPublic)
	m.must(err)
	pub.ObjectAttributes.NoDA = false
	m.e.TPM.AKPublic = tpm2.Marshal(pub)
	m.collect().plain()
	if got := failed(m.appraise()); !slices.Equal(got, []string{"tpm.ak-credential"}) {
		t.Errorf("other attributes: failed %v", got)
	}

	// A credential that does not hold is not made up for by the pin.
	m = newMachine(t)
	m.trust.Anchors, err = m.vendor.Anchors().WithAKs(anchor.Discrete, name(m.tpm))
	m.must(err)
	m.e.TPM.AKCredential = "credential"
	m.collect().plain()
	if got := failed(m.appraise()); !slices.Equal(got, []string{"tpm.ak-credential"}) {
		t.Errorf("broken credential: failed %v", got)
	}
}

// The CPU signs for the firmware's log too.
func TestFirmwareLogIsBound(t *testing.T) {
	for situation, spoil := range map[string]func(*evidence.TPM){
		"log taken out":                  func(e *evidence.TPM) { e.TCGLog = nil },
		"log exchanged":                  func(e *evidence.TPM) { e.TCGLog = []byte("other") },
		"the logs exchanged":             func(e *evidence.TPM) { e.TCGLog, e.EventLog = e.EventLog, e.TCGLog },
		"one log's end moved to another": func(e *evidence.TPM) { e.EventLog, e.TCGLog = append(e.EventLog, e.TCGLog[0]), e.TCGLog[1:] },
	} {
		m := newMachine(t)
		m.gpus = 0
		m.collect()
		m.e.TPM.TCGLog = []byte("a firmware log")
		m.plain()
		if got := failed(m.appraise()); slices.Contains(got, "snp.report-data") {
			t.Fatalf("the log itself: failed %v", got)
		}
		spoil(m.e.TPM)
		if got := failed(m.appraise()); !slices.Contains(got, "snp.report-data") {
			t.Errorf("%s: failed %v", situation, got)
		}
	}
}

func TestDistinct(t *testing.T) {
	m := newMachine(t)
	m.gpus = 2
	m.collect().plain()
	if got := outcome(m.appraise().Checks, "gpu.distinct"); got != check.Pass {
		t.Errorf("two GPUs: %q", got)
	}
	for situation, again := range map[string]func(g []evidence.GPU){
		"the same":                     func(g []evidence.GPU) { g[1] = g[0] },
		"the same under another name":  func(g []evidence.GPU) { g[1], g[1].UUID = g[0], "other" },
		"another under the same name":  func(g []evidence.GPU) { g[1].UUID = g[0].UUID },
		"two without a name":           func(g []evidence.GPU) { g[0].UUID, g[1].UUID = "", "" },
		"the same chain, other report": func(g []evidence.GPU) { g[1].Chain = g[0].Chain },
	} {
		m.collect()
		again(m.e.GPUs)
		if got := outcome(m.appraise().Checks, "gpu.distinct"); got != check.Fail {
			t.Errorf("%s: %q", situation, got)
		}
	}
	m.e.GPUs = m.e.GPUs[:1]
	if got := outcome(m.appraise().Checks, "gpu.distinct"); got != "" {
		t.Errorf("one GPU: %q", got)
	}
}

func outcome(l check.List, id string) check.Outcome {
	i := slices.IndexFunc(l, func(c check.Check) bool { return c.ID == id })
	if i < 0 {
		return ""
	}
	return l[i].Outcome
}

func TestZeroTrustTrustsNothing(t *testing.T) {
	m := newMachine(t).collect().hcl()
	m.trust = composite.Trust{}
	for _, d := range m.appraise().Devices() {
		if d.Genuine() {
			t.Errorf("%s is genuine", d.Name)
		}
	}
	var none *composite.Device
	if none.Genuine() || (&composite.Device{}).Genuine() {
		t.Error("no device is genuine")
	}
}

func TestOpenRefuses(t *testing.T) {
	for situation, spoil := range map[string]func(*evidence.Envelope){
		"no nonce":                  func(e *evidence.Envelope) { e.Nonce = "" },
		"no verifier":               func(e *evidence.Envelope) { e.VerifierID = "" },
		"no job":                    func(e *evidence.Envelope) { e.JobID = "" },
		"no session key":            func(e *evidence.Envelope) { e.SessionKey = nil },
		"failure of another source": func(e *evidence.Envelope) { e.Failures = []evidence.Failure{{Source: "tdx"}} },
		"failure of no source":      func(e *evidence.Envelope) { e.Failures = []evidence.Failure{{Message: "m"}} },
	} {
		m := newMachine(t)
		spoil(&m.e)
		if _, err := composite.Open(&m.e); err == nil {
			t.Errorf("%s: opened", situation)
		}
	}

	// What failed to collect is refused by a policy, whatever else is there.
	m := newMachine(t).collect().hcl()
	m.e.Failures = []evidence.Failure{{Source: "gpu", Message: "first"}, {Source: "gpu", Message: "second"}}
	if got := m.appraise().Evidence(1).Failures["gpu"]; got != "first; second" {
		t.Errorf("failures %q", got)
	}
}

// A clock that is wrong refuses, and in neither direction is anything let through.
func TestClock(t *testing.T) {
	m := newMachine(t)
	m.collect().plain()
	for situation, row := range map[string]struct {
		years int
		fails []string
	}{
		"years back":    {-10, []string{"gpu.chain-validity", "snp.chain-validity"}},
		"years forward": {60, []string{"snp.chain-validity"}},
	} {
		m.now = time.Now().AddDate(row.years, 0, 0)
		for _, want := range row.fails {
			if got := failed(m.appraise()); !slices.Contains(got, want) {
				t.Errorf("%s: failed %v, want %s", situation, got, want)
			}
		}
	}
}
