package evidence_test

import (
	"bytes"
	"encoding/json"
	"testing"

	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/plan"
)

// FuzzParse: whatever an attester sends, what is read is within its bounds, binds
// or says why not, and reads the same when it is written again.
func FuzzParse(f *testing.F) {
	full := evidence.Envelope{
		Version: evidence.Version, VerifierID: "verifier", Nonce: "a nonce of more than 16 bytes", JobID: "job", Plan: []byte("plan"), Sandbox: []byte("sandbox"),
		RecipientKey: []byte("r"), SessionKey: []byte("s"),
		TPM:      &evidence.TPM{AKPublic: []byte("ak"), Quote: []byte("q"), Signature: []byte("s"), PCRs: map[int][]byte{14: make([]byte, 32)}, EventLog: []byte("l"), TCGLog: []byte("t")},
		SNP:      &evidence.SNP{Report: []byte("r"), Certificates: []byte("c")},
		GPUs:     []evidence.GPU{{UUID: "u", Report: []byte("r"), Chain: []byte("c"), DriverVersion: "1", VBIOSVersion: "2"}},
		Failures: []evidence.Failure{{Source: "snp", Message: "m"}},
	}
	for _, e := range []evidence.Envelope{full, {Version: evidence.Version}} {
		b, err := json.Marshal(e)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := evidence.Parse(b)
		if err != nil {
			return
		}
		if len(e.GPUs) > evidence.MaxGPUs || e.TPM != nil && len(e.TPM.TCGLog) > evidence.MaxPart || e.SNP != nil && len(e.SNP.Report) > evidence.MaxPart {
			t.Fatal("over its bounds")
		}
		_, _ = e.Challenge().Bind()
		e.Devices()
		first, err := plan.Canonical(e)
		if err != nil {
			t.Fatal(err)
		}
		again, err := evidence.Parse(first)
		if err != nil {
			t.Fatal(err)
		}
		if second, err := plan.Canonical(again); err != nil || !bytes.Equal(first, second) {
			t.Fatalf("%s reads as %s, %v", first, second, err)
		}
	})
}
