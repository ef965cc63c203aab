package snp_test

import (
	"crypto/x509"
	"math/big"
	"slices"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/snp"
)

func TestRevocation(t *testing.T) {
	v := simulation(t, anchor.Genoa)
	vcek, askDER, ark := v.Chip().Certificates()
	ask, err := x509.ParseCertificate(askDER)
	if err != nil {
		t.Fatal(err)
	}
	r := report(t, v.Chip(), simulate.SNPOptions{})
	at := time.Now()
	list := func(v *simulate.Vendor, from time.Time, serials ...*big.Int) []byte {
		der, err := v.CRL(from, serials...)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	current := at.Add(-time.Hour)
	flipped := list(v, current)
	flipped[len(flipped)-1] ^= 1
	tests := []struct {
		name    string
		crl     []byte
		outcome check.Outcome
	}{
		{"none", nil, check.NotChecked},
		{"empty", list(v, current), check.Pass},
		{"of others", list(v, current, big.NewInt(7)), check.Pass},
		{"of the issuer", list(v, current, big.NewInt(7), ask.SerialNumber), check.Fail},
		{"stale", list(v, at.AddDate(0, -2, 0)), check.Fail},
		{"of the future", list(v, at.Add(time.Hour)), check.Fail},
		{"of another root of the same name", list(simulation(t, "another"), current), check.Fail},
		{"changed", flipped, check.Fail},
		{"over the limit", slices.Concat(list(v, current), make([]byte, 64<<10)), check.Fail},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for where, ev := range map[string]snp.Evidence{
				"beside the table": {Report: r, Chain: [][]byte{vcek, askDER, ark}, CRL: tt.crl},
				"in the table": {Report: r, Chain: [][]byte{vcek, askDER, ark}, Certificates: simulate.Table(
					simulate.Entry{GUID: simulate.VCEKGUID, DER: vcek}, simulate.Entry{GUID: simulate.CRLGUID, DER: tt.crl})},
			} {
				if where == "in the table" && (tt.crl == nil || len(tt.crl) > 64<<10) {
					continue
				}
				res := snp.Appraise(ev, snp.Want{ReportData: data}, v.Anchors(), at)
				i := slices.IndexFunc(res.Checks, func(c check.Check) bool { return c.ID == snp.CheckCRL })
				want := tt.outcome
				if where == "in the table" && want == check.Pass {
					// Whoever shows the evidence chose the list.
					want = check.NotChecked
				}
				if i < 0 || res.Checks[i].Outcome != want {
					t.Errorf("%s: %+v", where, res.Checks)
				}
				if res.Genuine() != (tt.outcome != check.Fail) {
					t.Errorf("%s: genuine is %v", where, res.Genuine())
				}
			}
		})
	}
}
