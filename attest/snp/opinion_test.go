package snp_test

import (
	"encoding/binary"
	"testing"
	"time"

	"github.com/google/go-sev-guest/abi"
	spb "github.com/google/go-sev-guest/proto/sevsnp"
	"github.com/google/go-sev-guest/verify"
	"github.com/google/go-sev-guest/verify/trust"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/snp"
)

// opinion is what another verifier thinks of evidence. chain roots it.
func opinion(t *testing.T, report []byte, chain [][]byte, product string, at time.Time) error {
	t.Helper()
	p, err := abi.ReportToProto(report)
	if err != nil {
		return err
	}
	root := trust.AMDRootCertsProduct(product)
	if err := root.Decode(chain[1], chain[2]); err != nil {
		t.Fatal(err)
	}
	return verify.SnpAttestation(&spb.Attestation{
		Report:           p,
		CertificateChain: &spb.CertificateChain{VcekCert: chain[0], AskCert: chain[1], ArkCert: chain[2]},
		Product:          map[string]*spb.SevProduct{"Milan": {Name: spb.SevProduct_SEV_PRODUCT_MILAN}, "Genoa": {Name: spb.SevProduct_SEV_PRODUCT_GENOA}}[product],
	}, &verify.Options{DisableCertFetching: true, Now: at, TrustedRoots: map[string][]*trust.AMDRootCerts{product: {root}}})
}

// Where go-sev-guest can judge, on Milan and Genoa, it agrees: about the
// hardware's evidence, and about the simulation's, whose form it takes for the
// hardware's.
func TestAnotherVerifierAgrees(t *testing.T) {
	all := vectors(t)
	for name, product := range map[string]string{"milan-v2-vcek": "Milan", "genoa-v3-vcek": "Genoa"} {
		v := all[name]
		if err := opinion(t, v.ev.Report, v.ev.Chain, product, v.at); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	plain := simulation(t, "another")
	vcek, ask, ark := plain.Chip().Certificates()
	chain := [][]byte{vcek, ask, ark}
	good := report(t, plain.Chip(), simulate.SNPOptions{})
	if err := opinion(t, good, chain, "Genoa", time.Now()); err != nil {
		t.Errorf("simulated: %v", err)
	}
	forged := report(t, plain.Chip(), simulate.SNPOptions{EditSigned: func(r []byte) []byte { r[0x90] ^= 1; return r }})
	if err := opinion(t, forged, chain, "Genoa", time.Now()); err == nil {
		t.Error("forged: accepted")
	}
	table := plain.Chip().CertTable()
	var parsed abi.CertTable
	if err := parsed.Unmarshal(table); err != nil {
		t.Fatal(err)
	}
	if got, err := parsed.GetByGUIDString(abi.VcekGUID); err != nil || string(got) != string(vcek) {
		t.Errorf("certificate table: %v", err)
	}
}

// The reasons for judging here ourselves. When this test fails, the other
// library has caught up.
func TestAnotherVerifierCannotJudge(t *testing.T) {
	v := vectors(t)["turin-v5-vcek"]
	if _, err := abi.ReportToProto(v.ev.Report); err != nil {
		t.Logf("Turin: %v", err)
	} else if err := opinion(t, v.ev.Report, v.ev.Chain, string(anchor.Turin), v.at); err == nil {
		t.Error("Turin is accepted")
	} else {
		t.Logf("Turin: %v", err)
	}
	b := simulation(t, anchor.Genoa).Chip().CertTable()
	binary.LittleEndian.PutUint32(b[16:], 0xFFFFFF00)
	binary.LittleEndian.PutUint32(b[20:], 0x200)
	func() {
		defer func() {
			if recover() == nil {
				t.Error("a certificate table whose offset wraps around does not panic")
			}
		}()
		var parsed abi.CertTable
		_ = parsed.Unmarshal(b)
	}()
	r := report(t, simulation(t, anchor.Genoa).Chip(), simulate.SNPOptions{})
	onlyFails(t, snp.Appraise(snp.Evidence{Report: r, Certificates: b}, snp.Want{ReportData: data}, simulation(t, anchor.Genoa).Anchors(), time.Now()), snp.CheckChain)
}
