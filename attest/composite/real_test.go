package composite_test

import (
	"context"
	"crypto/rsa"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/azure"
	"github.com/coffer-run/coffer/attest/composite"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/simulate/vectortest"
	"github.com/coffer-run/coffer/attest/vtpm"
	"github.com/coffer-run/coffer/attest/vtpm/vtpmtest"
)

// table is a GHCB certificate table of VCEK, ASK and ARK.
func table(ders ...[]byte) []byte {
	guids := []string{"63da758de6644564adc5f4b93be8accd", "4ab7b379bbac4fe4a02f05aef327c782", "c0b406a4a803495297433fb6014cd0ae"}
	head, body := []byte{}, []byte{}
	at := (len(ders) + 1) * 24
	for i, der := range ders {
		guid, _ := hex.DecodeString(guids[i])
		head = append(head, guid...)
		head = binary.LittleEndian.AppendUint32(head, uint32(at+len(body)))
		head = binary.LittleEndian.AppendUint32(head, uint32(len(der)))
		body = append(body, der...)
	}
	return slices.Concat(head, make([]byte, 24), body)
}

// Real machines of Azure, whose quotes were made for another verifier: whatever
// does not depend on the job holds.
func TestRealAzureMachines(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, v := range vectortest.All(t, "azure-hcl+tpm-quote") {
		dir := path.Dir(v.Report)
		chain := "snp/genoa-v3-vcek"
		if strings.Contains(v.Name, "milan") {
			chain = "snp/milan-v2-vcek"
		}
		hcl := vectortest.Read(t, v.Report)
		r, err := azure.Parse(hcl)
		if err != nil {
			t.Fatal(err)
		}
		log, err := vtpm.EncodeLog(nil)
		if err != nil {
			t.Fatal(err)
		}
		e := evidence.Envelope{
			Version: evidence.Version, VerifierID: "verifier", Nonce: "a nonce of more than 16 bytes", JobID: "job-1", Plan: []byte("plan"), Sandbox: []byte("sandbox"),
			RecipientKey: []byte("recipient"), SessionKey: []byte("session"),
			SNP: &evidence.SNP{HCLReport: hcl, Certificates: table(vectortest.ReadPEM(t, dir+"/vcek.pem"), vectortest.ReadPEM(t, chain+"/ask.pem"), vectortest.ReadPEM(t, chain+"/ark.pem"))},
			TPM: &evidence.TPM{
				AKPublic: vtpmtest.AKPublicRSA(r.AK), Quote: vectortest.Read(t, dir+"/quote.bin"), Signature: vtpmtest.RSASignature(vectortest.Read(t, dir+"/quote.sig")),
				PCRs: map[int][]byte{}, EventLog: log,
			},
		}
		var pcrs []string
		if err := json.Unmarshal(vectortest.Read(t, dir+"/pcrs.sha256.json"), &pcrs); err != nil {
			t.Fatal(err)
		}
		for i, text := range pcrs {
			if e.TPM.PCRs[i], err = hex.DecodeString(text); err != nil {
				t.Fatal(err)
			}
		}
		appraise := func(anchors anchor.Set) *composite.Appraisal {
			s, err := composite.Open(&e)
			if err != nil {
				t.Fatal(err)
			}
			return s.Appraise(context.Background(), composite.Trust{Anchors: anchors}, now)
		}
		// The SHA-384 of the key under which both machines' paravisors are signed.
		anchors, err := anchor.Vendor().WithParavisors(anchor.IDKeyDigest(r.SNP[0xE0:0x110]))
		if err != nil {
			t.Fatal(err)
		}
		rest := []string{"hcl.binding", "tpm.event-log", "tpm.extra-data"}
		a := appraise(anchors)
		if got := failed(a); !slices.Equal(got, rest) {
			t.Fatalf("%s: failed %v", v.Name, got)
		}
		if a.Simulated() || a.TPM.Claims["tpm.trust-class"] != string(anchor.HCLVMPL0) || a.CPU.Claims["snp.vmpl"] != 0 {
			t.Errorf("%s: %+v", v.Name, a.TPM.Claims)
		}
		t.Logf("vectors of Azure machines: %s verified", v.Name)
		if got := failed(appraise(anchor.Vendor())); !slices.Contains(got, "hcl.paravisor") || !slices.Contains(got, "tpm.ak-credential") {
			t.Errorf("%s: no paravisor trusted: failed %v", v.Name, got)
		}
		m := newMachine(t)
		key, _ := m.other.AK().(*rsa.PublicKey)
		e.TPM.AKPublic = vtpmtest.AKPublicRSA(key)
		if got := failed(appraise(anchors)); !slices.Contains(got, "tpm.ak-credential") || !slices.Contains(got, "tpm.signature") {
			t.Errorf("%s: another key: failed %v", v.Name, got)
		}
	}
}
