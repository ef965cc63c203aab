package verifier

import (
	"bytes"
	"encoding/json"
	"path"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/simulate/vectortest"
	"github.com/coffer-run/coffer/attest/snp"
	"github.com/coffer-run/coffer/attest/verifier/verifiertest"
)

// TestKBSRealReports takes real reports of each product and version apart as a
// guest does, and has what is put together again found genuine under AMD's roots.
func TestKBSRealReports(t *testing.T) {
	for _, v := range vectortest.All(t, "snp-vcek", "snp-vlek") {
		t.Run(v.Name, func(t *testing.T) {
			report := vectortest.Read(t, v.Report)
			leaf, at := "VCEK", time.Date(2026, 9, 1, 0, 0, 0, 0, time.UTC)
			if v.Kind == "snp-vlek" {
				// A VLEK is good for a year.
				leaf, at = "VLEK", time.Date(2025, 6, 1, 0, 0, 0, 0, time.UTC)
			}
			certs := []any{}
			for _, c := range [][2]string{{leaf, "vek"}, {"ASK", "ask"}, {"ARK", "ark"}} {
				certs = append(certs, map[string]any{"cert_type": c[0], "data": verifiertest.Octets(vectortest.ReadPEM(t, path.Dir(v.Report)+"/"+c[1]+".pem"))})
			}
			b, err := json.Marshal(map[string]any{"attestation_report": verifiertest.SEVReport(report), "cert_chain": certs})
			if err != nil {
				t.Fatal(err)
			}
			ev, err := parseKBSSNP(b)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(ev.Report, report) {
				t.Error("the report is not what it was")
			}
			if res := snp.Appraise(ev, snp.Want{ReportData: [64]byte(report[0x50:])}, anchor.Vendor(), at); !res.Genuine() || res.Simulated {
				t.Errorf("refused: %v", check.Refuse("appraise", res.Checks))
			}
		})
	}
}
