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

// One envelope is read one way only: what another reader could take otherwise is
// no evidence.
func TestParseRefusesWhatReadsTwoWays(t *testing.T) {
	for situation, b := range map[string]string{
		"a field given twice":            `{"version":"coffer.run/evidence/v1","jobId":"a","jobId":"b"}`,
		"a field of a part given twice":  `{"version":"coffer.run/evidence/v1","snp":{"report":"AA==","report":"AQ=="}}`,
		"a PCR given twice":              `{"version":"coffer.run/evidence/v1","tpm":{"pcrs":{"0":"` + zeros + `","0":"` + zeros + `"}}}`,
		"a PCR under two spellings":      `{"version":"coffer.run/evidence/v1","tpm":{"pcrs":{"0":"` + zeros + `","00":"` + zeros + `"}}}`,
		"a field in other letters":       `{"version":"coffer.run/evidence/v1","JobId":"a"}`,
		"a field that there is not":      `{"version":"coffer.run/evidence/v1","more":1}`,
		"a field of a part that is not":  `{"version":"coffer.run/evidence/v1","tpm":{"more":1}}`,
		"a second value":                 `{"version":"coffer.run/evidence/v1"}{}`,
		"bytes after it":                 `{"version":"coffer.run/evidence/v1"} x`,
		"a text that is not UTF-8":       "{\"version\":\"coffer.run/evidence/v1\",\"jobId\":\"\xff\"}",
		"half a surrogate":               `{"version":"coffer.run/evidence/v1","jobId":"\ud800"}`,
		"base64 with a line break in it": `{"version":"coffer.run/evidence/v1","plan":"AA\n=="}`,
		"a list of bytes":                `{"version":"coffer.run/evidence/v1","plan":[0]}`,
		"nothing":                        ``,
	} {
		if _, err := evidence.Parse([]byte(b)); err == nil {
			t.Errorf("%s: accepted", situation)
		}
	}
	if _, err := evidence.Parse([]byte(`{"version":"coffer.run/evidence/v1","tpm":{"pcrs":{"0":"` + zeros + `"}}}`)); err != nil {
		t.Errorf("a PCR: %v", err)
	}
}

// zeros is a PCR.
const zeros = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
