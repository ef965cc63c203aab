package verifier_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/azure"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/composite"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/simulate/vectortest"
	"github.com/coffer-run/coffer/attest/verifier"
	"github.com/coffer-run/coffer/attest/vtpm/vtpmtest"
)

// alone returns one device of each kind, which answer three values of a relying
// party's choice.
func (w *world) alone() verifier.Devices {
	w.t.Helper()
	data, nonce, extra := [64]byte{1, 2, 3}, [32]byte{4, 5}, []byte("party's nonce")
	report, err := w.vendor.Chip().Report(data, simulate.SNPOptions{})
	if err != nil {
		w.t.Fatal(err)
	}
	g := w.vendor.GPUs()[0]
	gpu, err := g.Report(nonce, simulate.GPUOptions{})
	if err != nil {
		w.t.Fatal(err)
	}
	quote, signature, err := w.tpm.Quote(extra, nil, 0, 7)
	if err != nil {
		w.t.Fatal(err)
	}
	return verifier.Devices{
		Policy: "party",
		SNP:    &verifier.SNPDevice{SNP: evidence.SNP{Report: report, Certificates: w.vendor.Chip().CertTable()}},
		TPM:    &evidence.TPM{AKPublic: w.tpm.AKPublic, AKCredential: w.akCred, Quote: quote, Signature: signature, PCRs: w.tpm.PCRs(0, 7)},
		GPUs:   []evidence.GPU{{UUID: g.UUID(), Report: gpu, Chain: g.ChainPEM(), DriverVersion: g.DriverVersion(), VBIOSVersion: g.VBIOSVersion()}},
		Named:  composite.Alone{SNPReportData: &data, TPMExtraData: extra, GPUNonce: &nonce},
	}
}

// party adds a policy for devices by themselves: of a quote without an agent's
// log there is no event log to demand.
func (w *world) party() *world {
	p := w.policy
	tpm := *p.TPM
	tpm.Require = slices.DeleteFunc(slices.Clone(tpm.Require), func(id string) bool { return id == "tpm.event-log" })
	p.Name, p.TPM = "party", &tpm
	// Rules that ship want a word on who measured, which only an agent's log has.
	standard, err := policy.StandardRules()
	if err != nil {
		w.t.Fatal(err)
	}
	p.Rules = map[string]string{}
	for name, text := range standard {
		p.Rules[name] = strings.Replace(text, " tpm_self_measured,\n", "\n", 1)
	}
	only := p
	only.Name, only.GPU, only.TPM = "snp-only", nil, nil
	w.v = w.verifier(func(o *verifier.Options) { o.Policies = append(o.Policies, p, only) })
	return w
}

func (w *world) checkDevices(d verifier.Devices) (string, verifier.DevicesResult) {
	w.t.Helper()
	token, r, err := w.v.CheckDevices(context.Background(), d, "party.test")
	if err != nil {
		w.t.Fatal(err)
	}
	keys, err := receipt.ParseKeys(verifierID, w.v.JWKS())
	if err != nil {
		w.t.Fatal(err)
	}
	var signed verifier.DevicesResult
	if err := keys.Open(verifier.TypeDevices, token, &signed); err != nil {
		w.t.Fatal(err)
	}
	return token, r
}

func failedIn(r verifier.DevicesResult) []string {
	ids := []string{}
	for _, c := range (receipt.Result{Submods: r.Submods, Checks: r.Checks}).AllChecks().Failed() {
		if !slices.Contains(ids, c.ID) {
			ids = append(ids, c.ID)
		}
	}
	return ids
}

// Every device by itself, and all together, is affirmed by a policy and found
// genuine without one.
func TestDevicesByThemselves(t *testing.T) {
	w := newWorld(t).party()
	for situation, row := range map[string]struct {
		keep    func(d *verifier.Devices)
		submods []string
	}{
		"all":      {func(*verifier.Devices) {}, []string{"cpu0", "gpu0", "tpm0"}},
		"a report": {func(d *verifier.Devices) { d.TPM, d.GPUs, d.Named.TPMExtraData, d.Named.GPUNonce = nil, nil, nil, nil }, []string{"cpu0"}},
		"a quote":  {func(d *verifier.Devices) { d.SNP, d.GPUs, d.Named.SNPReportData, d.Named.GPUNonce = nil, nil, nil, nil }, []string{"tpm0"}},
		"a GPU": {func(d *verifier.Devices) {
			d.SNP, d.TPM, d.Named.SNPReportData, d.Named.TPMExtraData = nil, nil, nil, nil
		}, []string{"gpu0"}},
		"a bare VEK": {func(d *verifier.Devices) {
			d.TPM, d.GPUs, d.Named.TPMExtraData, d.Named.GPUNonce = nil, nil, nil, nil
			vcek, ask, ark := w.vendor.Chip().Certificates()
			d.SNP.Certificates, d.SNP.Chain = nil, [][]byte{vcek, ask, ark}
		}, []string{"cpu0"}},
	} {
		for policyName, want := range map[string]receipt.Tier{"party": receipt.Affirming, "": receipt.None} {
			d := w.alone()
			row.keep(&d)
			d.Policy = policyName
			_, r := w.checkDevices(d)
			if f := failedIn(r); len(f) > 0 {
				t.Fatalf("%s under %q: failed %v", situation, policyName, f)
			}
			var names []string
			for name, s := range r.Submods {
				names = append(names, name)
				if s.Status != want {
					t.Errorf("%s under %q: %s is %s", situation, policyName, name, s.Status)
				}
			}
			if slices.Sort(names); !slices.Equal(names, row.submods) {
				t.Errorf("%s: submodules %v", situation, names)
			}
			if !r.Simulated || r.Audience != "party.test" {
				t.Errorf("%s: %+v", situation, r)
			}
			if d.SNP != nil && r.Named.SNPReportData != hex.EncodeToString(d.Named.SNPReportData[:]) || d.SNP == nil && r.Named.SNPReportData != "" {
				t.Errorf("%s: named %+v", situation, r.Named)
			}
		}
	}
}

// Each row is one departure, and the check that it fails.
func TestDevicesAreRefused(t *testing.T) {
	w := newWorld(t).party()
	for situation, row := range map[string]struct {
		attack func(d *verifier.Devices)
		by     string
	}{
		"a report for something else":             {func(d *verifier.Devices) { d.Named.SNPReportData[63] = 1 }, "snp.report-data"},
		"a quote for something else":              {func(d *verifier.Devices) { d.Named.TPMExtraData = []byte("party's other") }, "tpm.extra-data"},
		"a quote for the first half of the nonce": {func(d *verifier.Devices) { d.Named.TPMExtraData = append(d.Named.TPMExtraData, 0) }, "tpm.extra-data"},
		"a GPU for something else":                {func(d *verifier.Devices) { d.Named.GPUNonce[0]++ }, "gpu.nonce"},
		"one bit of the report":                   {func(d *verifier.Devices) { d.SNP.Report[0x90] ^= 1 }, "snp.signature"},
		"one bit of the GPU's report":             {func(d *verifier.Devices) { d.GPUs[0].Report[200] ^= 1 }, "gpu.signature"},
		"one bit of a PCR":                        {func(d *verifier.Devices) { d.TPM.PCRs[7][0] ^= 1 }, "tpm.pcr-digest"},
		"a key that nobody vouches for":           {func(d *verifier.Devices) { d.TPM.AKCredential = "" }, "tpm.ak-credential"},
		"another simulation's report": {func(d *verifier.Devices) {
			d.SNP.Report, _ = w.other.Chip().Report(*d.Named.SNPReportData, simulate.SNPOptions{})
			d.SNP.Certificates = w.other.Chip().CertTable()
		}, "snp.chain"},
		"a GPU twice": {func(d *verifier.Devices) { d.GPUs = append(d.GPUs, d.GPUs[0]) }, "gpu.distinct"},
		"two GPUs": {func(d *verifier.Devices) {
			g := w.vendor.GPUs()[1]
			b, _ := g.Report(*d.Named.GPUNonce, simulate.GPUOptions{})
			d.GPUs = append(d.GPUs, evidence.GPU{UUID: g.UUID(), Report: b, Chain: g.ChainPEM(), DriverVersion: g.DriverVersion(), VBIOSVersion: g.VBIOSVersion()})
		}, "policy.gpu.several"},
		"a debugged guest": {func(d *verifier.Devices) {
			d.SNP.Report, _ = w.vendor.Chip().Report(*d.Named.SNPReportData, simulate.SNPOptions{Debug: true})
		}, "policy.snp.debug"},
		"a policy that there is not":         {func(d *verifier.Devices) { d.Policy = "none" }, "policy.known"},
		"a policy that wants an agent's log": {func(d *verifier.Devices) { d.Policy = "simulation" }, "policy.tpm.require"},
	} {
		d := w.alone()
		row.attack(&d)
		_, r := w.checkDevices(d)
		if f := failedIn(r); !slices.Contains(f, row.by) {
			t.Errorf("%s: failed %v, want %s", situation, f, row.by)
		}
		for name, s := range r.Submods {
			if s.Status == receipt.Affirming && slices.ContainsFunc(s.Checks.Failed(), func(check.Check) bool { return true }) {
				t.Errorf("%s: %s affirms with a failed check", situation, name)
			}
		}
	}

	// A device of which a policy says nothing is not accepted by it.
	d := w.alone()
	d.Policy = "snp-only"
	_, r := w.checkDevices(d)
	if r.Submods["cpu0"].Status != receipt.Affirming || r.Submods["gpu0"].Status != receipt.None || r.Submods["tpm0"].Status != receipt.None {
		t.Errorf("under a policy for SNP alone: %s, %s, %s", r.Submods["cpu0"].Status, r.Submods["gpu0"].Status, r.Submods["tpm0"].Status)
	}
}

func TestDevicesMalformed(t *testing.T) {
	w := newWorld(t).party()
	for situation, spoil := range map[string]func(d *verifier.Devices){
		"no device":                        func(d *verifier.Devices) { *d = verifier.Devices{} },
		"a report, and nothing named":      func(d *verifier.Devices) { d.Named.SNPReportData = nil },
		"a quote, and nothing named":       func(d *verifier.Devices) { d.Named.TPMExtraData = nil },
		"a quote, and no bytes named":      func(d *verifier.Devices) { d.Named.TPMExtraData = []byte{} },
		"more than a quote can hold":       func(d *verifier.Devices) { d.Named.TPMExtraData = make([]byte, 65) },
		"a GPU, and nothing named":         func(d *verifier.Devices) { d.Named.GPUNonce = nil },
		"report data of no report":         func(d *verifier.Devices) { d.SNP = nil },
		"extra data of no quote":           func(d *verifier.Devices) { d.TPM = nil },
		"a nonce of no GPU":                func(d *verifier.Devices) { d.GPUs = nil },
		"a PCR of another bank":            func(d *verifier.Devices) { d.TPM.PCRs[7] = make([]byte, 48) },
		"a PCR that there is not":          func(d *verifier.Devices) { d.TPM.PCRs[24] = make([]byte, 32) },
		"more GPUs than an envelope holds": func(d *verifier.Devices) { d.GPUs = make([]evidence.GPU, evidence.MaxGPUs+1) },
		"a log without end":                func(d *verifier.Devices) { d.TPM.TCGLog = make([]byte, evidence.MaxPart+1) },
		"two reports":                      func(d *verifier.Devices) { d.SNP.HCLReport = []byte{1} },
		"certificates in two ways":         func(d *verifier.Devices) { d.SNP.Chain = [][]byte{{1}} },
		"certificates that are none":       func(d *verifier.Devices) { d.SNP.Certificates, d.SNP.Chain = nil, [][]byte{{1}} },
		"certificates without end":         func(d *verifier.Devices) { d.SNP.Certificates, d.SNP.Chain = nil, make([][]byte, 4) },
		"a policy without end":             func(d *verifier.Devices) { d.Policy = strings.Repeat("p", 300) },
	} {
		d := w.alone()
		spoil(&d)
		if token, _, err := w.v.CheckDevices(context.Background(), d, "party.test"); !errors.Is(err, verifier.ErrMalformed) || token != "" {
			t.Errorf("%s: %v", situation, err)
		}
	}
	if _, _, err := w.v.CheckDevices(context.Background(), w.alone(), ""); !errors.Is(err, verifier.ErrMalformed) {
		t.Errorf("no audience: %v", err)
	}
}

// Of a result that a broker takes, with job, plan and session key, the type alone
// is changed, and nobody takes it.
func TestDeviceResultsReleaseNothing(t *testing.T) {
	w := newWorld(t)
	token, r := w.attester().collect().appraise()
	if _, err := w.relyingParty(token); err != nil {
		t.Fatal(err)
	}
	same, err := w.signer.Sign(receipt.TypeResult, r)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.relyingParty(same); err != nil {
		t.Fatalf("the same claims as a result: %v", err)
	}
	other, err := w.signer.Sign(verifier.TypeDevices, r)
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.relyingParty(other)
	var refusal *check.Refusal
	if !errors.As(err, &refusal) || len(refusal.Checks) != 1 || refusal.Checks[0].ID != "result.signature" || !strings.Contains(refusal.Checks[0].Found, verifier.TypeDevices) {
		t.Errorf("the same claims as a check of devices: %v", err)
	}
	if _, err := w.v.Endorsements(other); err == nil {
		t.Error("endorsements of a result that is none")
	}
}

// genuinely asks a verifier with the vendors' anchors about real evidence.
func genuinely(t *testing.T, at time.Time, anchors anchor.Set, d verifier.Devices) verifier.DevicesResult {
	t.Helper()
	p, err := policy.Named("cpu-only")
	if err != nil {
		t.Fatal(err)
	}
	v, err := verifier.New(verifier.Options{
		ID: verifierID, Anchors: anchors, Policies: []policy.Policy{p}, Signer: newSigner(t, verifierID), NonceKeys: [][]byte{make([]byte, 32)},
		Clock: func() time.Time { return at }, Build: "test",
	})
	if err != nil {
		t.Fatal(err)
	}
	_, r, err := v.CheckDevices(context.Background(), d, "party.test")
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// Evidence of real devices, as their tools hand it out, is genuine under the
// vendors' anchors, and not one bit further than what was named.
func TestRealDevicesByThemselves(t *testing.T) {
	now := time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)
	genuine := func(name string, r verifier.DevicesResult) {
		t.Helper()
		if f := failedIn(r); len(f) > 0 || r.Simulated {
			t.Errorf("%s: failed %v, simulated %v", name, f, r.Simulated)
		}
		for sub, s := range r.Submods {
			if s.Status != receipt.None {
				t.Errorf("%s: %s is %s", name, sub, s.Status)
			}
		}
	}
	count := 0
	for _, v := range vectortest.All(t, "snp-vcek", "snp-vlek") {
		at, dir := now, path.Dir(v.Report)
		if v.Kind == "snp-vlek" {
			at = time.Date(2025, 6, 1, 0, 0, 0, 0, time.UTC)
		}
		report := vectortest.Read(t, v.Report)
		data := [64]byte(report[0x50:])
		d := verifier.Devices{SNP: &verifier.SNPDevice{SNP: evidence.SNP{Report: report}}, Named: composite.Alone{SNPReportData: &data}}
		for _, f := range []string{"vek", "ask", "ark"} {
			d.SNP.Chain = append(d.SNP.Chain, vectortest.ReadPEM(t, dir+"/"+f+".pem"))
		}
		genuine(v.Name, genuinely(t, at, anchor.Vendor(), d))
		count++
		data[0] ^= 1
		if f := failedIn(genuinely(t, at, anchor.Vendor(), d)); !slices.Equal(f, []string{"snp.report-data"}) {
			t.Errorf("%s for something else: failed %v", v.Name, f)
		}
	}
	for _, v := range vectortest.All(t, "nvidia-gpu") {
		if v.Name != "h100-550.90.07-complete" && v.Name != "h100-580.159.03" {
			continue
		}
		b, err := hex.DecodeString(v.Nonce)
		if err != nil {
			t.Fatal(err)
		}
		nonce := [32]byte(b)
		d := verifier.Devices{
			GPUs:  []evidence.GPU{{Report: vectortest.Read(t, v.Report), Chain: vectortest.Read(t, v.Chain), DriverVersion: v.Driver, VBIOSVersion: v.VBIOS}},
			Named: composite.Alone{GPUNonce: &nonce},
		}
		genuine(v.Name, genuinely(t, now, anchor.Vendor(), d))
		count++
		nonce[31] ^= 1
		if f := failedIn(genuinely(t, now, anchor.Vendor(), d)); !slices.Equal(f, []string{"gpu.nonce"}) {
			t.Errorf("%s for something else: failed %v", v.Name, f)
		}
	}
	for _, v := range vectortest.All(t, "azure-hcl+tpm-quote") {
		d, anchors := azureDevices(t, v)
		genuine(v.Name, genuinely(t, now, anchors, d))
		count++
		spoiled := d
		spoiled.Named.TPMExtraData = append(slices.Clone(d.Named.TPMExtraData), 0)
		if f := failedIn(genuinely(t, now, anchors, spoiled)); !slices.Equal(f, []string{"hcl.binding", "tpm.extra-data"}) {
			t.Errorf("%s for something else: failed %v", v.Name, f)
		}
		if f := failedIn(genuinely(t, now, anchor.Vendor(), d)); !slices.Contains(f, "hcl.paravisor") {
			t.Errorf("%s, no paravisor trusted: failed %v", v.Name, f)
		}
		// The report without its quote speaks of what the caller names, or of nothing.
		alone := verifier.Devices{SNP: d.SNP}
		h, err := azure.Parse(d.SNP.HCLReport)
		if err != nil {
			t.Fatal(err)
		}
		data := h.ReportData()
		alone.Named.SNPReportData = &data
		genuine(v.Name+" without its quote", genuinely(t, now, anchors, alone))
		data[0] ^= 1
		if f := failedIn(genuinely(t, now, anchors, alone)); !slices.Equal(f, []string{"hcl.report-data", "hcl.binding"}) {
			t.Errorf("%s without its quote, for other claims: failed %v", v.Name, f)
		}
	}
	t.Logf("vectors of devices by themselves: %d verified", count)
}

func azureDevices(t *testing.T, v vectortest.Vector) (verifier.Devices, anchor.Set) {
	t.Helper()
	dir, chain := path.Dir(v.Report), "snp/genoa-v3-vcek"
	if strings.Contains(v.Name, "milan") {
		chain = "snp/milan-v2-vcek"
	}
	hcl := vectortest.Read(t, v.Report)
	r, err := azure.Parse(hcl)
	if err != nil {
		t.Fatal(err)
	}
	quote := vectortest.Read(t, dir+"/quote.bin")
	attest, err := tpm2.Unmarshal[tpm2.TPMSAttest](quote)
	if err != nil {
		t.Fatal(err)
	}
	d := verifier.Devices{
		SNP: &verifier.SNPDevice{
			SNP:   evidence.SNP{HCLReport: hcl},
			Chain: [][]byte{vectortest.ReadPEM(t, dir+"/vcek.pem"), vectortest.ReadPEM(t, chain+"/ask.pem"), vectortest.ReadPEM(t, chain+"/ark.pem")},
		},
		TPM:   &evidence.TPM{AKPublic: vtpmtest.AKPublicRSA(r.AK), Quote: quote, Signature: vtpmtest.RSASignature(vectortest.Read(t, dir+"/quote.sig")), PCRs: map[int][]byte{}},
		Named: composite.Alone{TPMExtraData: attest.ExtraData.Buffer},
	}
	var pcrs []string
	if err := json.Unmarshal(vectortest.Read(t, dir+"/pcrs.sha256.json"), &pcrs); err != nil {
		t.Fatal(err)
	}
	for i, text := range pcrs {
		if d.TPM.PCRs[i], err = hex.DecodeString(text); err != nil {
			t.Fatal(err)
		}
	}
	anchors, err := anchor.Vendor().WithParavisors(anchor.IDKeyDigest(r.SNP[0xE0:0x110]))
	if err != nil {
		t.Fatal(err)
	}
	return d, anchors
}

// Whatever is changed in what devices signed, it is not accepted, and whatever is
// changed in what comes beside it is a result or an error.
func FuzzCheckDevices(f *testing.F) {
	w := newWorld(f).party()
	good := w.alone()
	vcek, ask, ark := w.vendor.Chip().Certificates()
	for kind := range uint8(9) {
		f.Add(kind, uint32(0), uint16(0), []byte{})
		f.Add(kind, uint32(90), uint16(1), []byte{0xff})
		f.Add(kind, uint32(0), uint16(0xffff), []byte{})
	}
	f.Fuzz(func(t *testing.T, kind uint8, at uint32, drop uint16, insert []byte) {
		d, quote := good, *good.TPM
		d.SNP = &verifier.SNPDevice{SNP: evidence.SNP{Report: good.SNP.Report}, Chain: [][]byte{vcek, ask, ark}}
		d.TPM, d.GPUs = &quote, slices.Clone(good.GPUs)
		signed := []*[]byte{&d.SNP.Report, &d.GPUs[0].Report, &d.TPM.Quote, &d.Named.TPMExtraData}
		beside := []*[]byte{&d.SNP.Chain[0], &d.GPUs[0].Chain, &d.TPM.Signature, &d.TPM.AKPublic, &d.SNP.HCLReport}
		part := slices.Concat(signed, beside)[int(kind)%9]
		was := *part
		from := int(at) % (len(was) + 1)
		*part = slices.Concat(was[:from], insert, was[min(from+int(drop), len(was)):])
		same := bytes.Equal(*part, was)
		// The others have nothing to say on it, and take their time.
		d.Policy = ""
		switch int(kind) % 9 {
		case 0, 4, 8:
			d.TPM, d.Named.TPMExtraData, d.GPUs, d.Named.GPUNonce = nil, nil, nil, nil
		case 1, 5:
			d.TPM, d.Named.TPMExtraData, d.SNP, d.Named.SNPReportData = nil, nil, nil, nil
		default:
			d.SNP, d.Named.SNPReportData, d.GPUs, d.Named.GPUNonce = nil, nil, nil, nil
		}
		_, r, err := w.v.CheckDevices(context.Background(), d, "party.test")
		if err != nil {
			if same || !errors.Is(err, verifier.ErrMalformed) {
				t.Fatal(err)
			}
			return
		}
		if refused := len(failedIn(r)) > 0; refused && same || !refused && !same && int(kind)%9 < len(signed) {
			t.Errorf("refused is %v, changed is %v: %v", refused, !same, failedIn(r))
		}
	})
}
