package evidence_test

import (
	"encoding/json"
	"testing"

	"github.com/coffer-run/coffer/attest/evidence"
)

func TestParseBoundsEveryPart(t *testing.T) {
	large := make([]byte, evidence.MaxPart+1)
	for situation, row := range map[string]struct {
		e  evidence.Envelope
		ok bool
	}{
		"empty":                    {evidence.Envelope{}, true},
		"firmware log":             {evidence.Envelope{TPM: &evidence.TPM{TCGLog: large[1:]}}, true},
		"firmware log too large":   {evidence.Envelope{TPM: &evidence.TPM{TCGLog: large}}, false},
		"event log too large":      {evidence.Envelope{TPM: &evidence.TPM{EventLog: large}}, false},
		"paravisor's report":       {evidence.Envelope{SNP: &evidence.SNP{HCLReport: large[1:]}}, true},
		"paravisor's too large":    {evidence.Envelope{SNP: &evidence.SNP{HCLReport: large}}, false},
		"two reports":              {evidence.Envelope{SNP: &evidence.SNP{Report: large[:1], HCLReport: large[:1]}}, false},
		"PCR that there is not":    {evidence.Envelope{TPM: &evidence.TPM{PCRs: map[int][]byte{24: large[:32]}}}, false},
		"PCR of another bank":      {evidence.Envelope{TPM: &evidence.TPM{PCRs: map[int][]byte{0: large[:20]}}}, false},
		"more GPUs than there are": {evidence.Envelope{GPUs: make([]evidence.GPU, evidence.MaxGPUs+1)}, false},
	} {
		row.e.Version = evidence.Version
		b, err := json.Marshal(row.e)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := evidence.Parse(b); (err == nil) != row.ok {
			t.Errorf("%s: %v", situation, err)
		}
	}
}
