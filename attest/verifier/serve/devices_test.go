package serve_test

import (
	"slices"
	"testing"

	"connectrpc.com/connect"

	verifierv1 "github.com/coffer-run/coffer/attest/api/verifier/v1"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/verifier"
)

func TestCheckDevicesOverTheWire(t *testing.T) {
	f := newFixture(t)
	data, nonce := [64]byte{1}, [32]byte{2}
	report, err := f.machine.Chip.Report(data, simulate.SNPOptions{})
	if err != nil {
		t.Fatal(err)
	}
	gpu, err := f.machine.GPU.Report(nonce, simulate.GPUOptions{})
	if err != nil {
		t.Fatal(err)
	}
	extra := []byte("the party's")
	quote, signature, err := f.tpm.Quote(extra, nil, 0, 7)
	if err != nil {
		t.Fatal(err)
	}
	request := func() *verifierv1.CheckDevicesRequest {
		pcrs := map[uint32][]byte{}
		for i, v := range f.tpm.PCRs(0, 7) {
			pcrs[uint32(i)] = v //nolint:gosec // 0 and 7
		}
		return &verifierv1.CheckDevicesRequest{
			Audience: "party.test", GpuNonce: nonce[:],
			Snp:  &verifierv1.SNPDevice{Report: report, Certificates: f.machine.Chip.CertTable(), ReportData: data[:]},
			Tpm:  &verifierv1.TPMDevice{AkPublic: f.tpm.AKPublic, AkCredential: f.machine.Credential, Quote: quote, Signature: signature, Pcrs: pcrs, ExtraData: extra},
			Gpus: []*verifierv1.GPUDevice{{Report: gpu, Chain: f.machine.GPU.ChainPEM(), DriverVersion: f.machine.GPU.DriverVersion(), VbiosVersion: f.machine.GPU.VBIOSVersion(), Uuid: f.machine.GPU.UUID()}},
		}
	}
	party := f.as("relying-party")
	answer, err := party.CheckDevices(t.Context(), connect.NewRequest(request()))
	if err != nil {
		t.Fatal(err)
	}
	var r verifier.DevicesResult
	if err := f.keys(t).Open(verifier.TypeDevices, answer.Msg.GetResult(), &r); err != nil {
		t.Fatal(err)
	}
	if f := (receipt.Result{Submods: r.Submods, Checks: r.Checks}).AllChecks().Failed(); len(f) > 0 || len(r.Submods) != 3 {
		t.Errorf("%d devices, failed %+v", len(r.Submods), f)
	}
	for situation, spoil := range map[string]func(m *verifierv1.CheckDevicesRequest){
		"short report data":            func(m *verifierv1.CheckDevicesRequest) { m.Snp.ReportData = m.GetSnp().GetReportData()[:63] },
		"long report data":             func(m *verifierv1.CheckDevicesRequest) { m.Snp.ReportData = make([]byte, 65) },
		"short nonce":                  func(m *verifierv1.CheckDevicesRequest) { m.GpuNonce = m.GetGpuNonce()[:31] },
		"no report data":               func(m *verifierv1.CheckDevicesRequest) { m.Snp.ReportData = nil },
		"no nonce":                     func(m *verifierv1.CheckDevicesRequest) { m.GpuNonce = nil },
		"no extra data":                func(m *verifierv1.CheckDevicesRequest) { m.Tpm.ExtraData = nil },
		"a PCR that no TPM has":        func(m *verifierv1.CheckDevicesRequest) { m.Tpm.Pcrs[1<<31] = make([]byte, 32) },
		"a short PCR":                  func(m *verifierv1.CheckDevicesRequest) { m.Tpm.Pcrs[7] = make([]byte, 20) },
		"no device":                    func(m *verifierv1.CheckDevicesRequest) { m.Snp, m.Tpm, m.Gpus, m.GpuNonce = nil, nil, nil, nil },
		"an audience of several words": func(m *verifierv1.CheckDevicesRequest) { m.Audience = "any one" },
	} {
		m := request()
		spoil(m)
		if _, err := party.CheckDevices(t.Context(), connect.NewRequest(m)); connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("%s: %v", situation, err)
		}
	}
	for _, role := range []string{"agent", "broker", "operator", "engineer"} {
		if _, err := f.as(role).CheckDevices(t.Context(), connect.NewRequest(request())); connect.CodeOf(err) != connect.CodePermissionDenied {
			t.Errorf("%s: %v", role, err)
		}
	}
}

// Of a result for which the broker releases a key, the type alone is changed.
func TestBrokerTakesNoDeviceResult(t *testing.T) {
	f := newFixture(t)
	e, envelope := f.evidence(t, challenge(t, f.as("agent")))
	kb := f.broker(t, e)
	token := appraise(t, f.as("agent"), envelope)
	var r receipt.Result
	if err := f.keys(t).Open(receipt.TypeResult, token, &r); err != nil {
		t.Fatal(err)
	}
	other, err := f.options.Signer.Sign(verifier.TypeDevices, r)
	if err != nil {
		t.Fatal(err)
	}
	if failed := kb.release(t, e, other, r.ID); !slices.Equal(failed, []string{"result.signature"}) {
		t.Errorf("a check of devices: failed %v", failed)
	}
	if failed := kb.release(t, e, token, r.ID); failed != nil {
		t.Errorf("the result itself: failed %v", failed)
	}
}
