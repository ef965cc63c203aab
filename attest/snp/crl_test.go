package snp_test

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
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
	with := func(o simulate.CRLOptions) []byte {
		der, err := v.CRLWith(current, o)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	critical := func(arcs ...int) pkix.Extension {
		return pkix.Extension{Id: asn1.ObjectIdentifier(arcs), Critical: true, Value: []byte{0x30, 0}}
	}
	root, err := x509.ParseCertificate(ark)
	if err != nil {
		t.Fatal(err)
	}
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
		{"of the chip's key by its serial number", list(v, current, big.NewInt(0)), check.Fail},
		{"of the root key", list(v, current, root.SerialNumber), check.Fail},
		{"by the issuer of VCEKs", with(simulate.CRLOptions{ByASK: true}), check.Fail},
		// Issuing distribution point: of some certificates only (RFC 5280, 5.2.5).
		{"of user certificates only", with(simulate.CRLOptions{Edit: func(l *x509.RevocationList) { l.ExtraExtensions = append(l.ExtraExtensions, critical(2, 5, 29, 28)) }}), check.Fail},
		// Delta list: of changes only (RFC 5280, 5.2.4).
		{"of what changed only", with(simulate.CRLOptions{Edit: func(l *x509.RevocationList) { l.ExtraExtensions = append(l.ExtraExtensions, critical(2, 5, 29, 27)) }}), check.Fail},
		// Certificate issuer: the entry is about another's certificate (RFC 5280, 5.3.3).
		{"with a critical extension in an entry", with(simulate.CRLOptions{Revoked: []*big.Int{big.NewInt(7)}, Edit: func(l *x509.RevocationList) {
			l.RevokedCertificateEntries[0].ExtraExtensions = append(l.RevokedCertificateEntries[0].ExtraExtensions, critical(2, 5, 29, 29))
		}}), check.Fail},
		{"of the issuer, on hold", with(simulate.CRLOptions{Revoked: []*big.Int{ask.SerialNumber}, Edit: func(l *x509.RevocationList) { l.RevokedCertificateEntries[0].ReasonCode = 6 }}), check.Fail},
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

// A list that names the issuer of VLEKs refuses these, and one that names that of
// VCEKs does not.
func TestRevokedIssuerOfVLEKs(t *testing.T) {
	v := simulation(t, anchor.Genoa)
	chip, err := v.NewChip()
	if err != nil {
		t.Fatal(err)
	}
	if err := chip.LoadVLEK(); err != nil {
		t.Fatal(err)
	}
	_, askDER, _ := chip.Certificates()
	ask, err := x509.ParseCertificate(askDER)
	if err != nil {
		t.Fatal(err)
	}
	asvk, err := x509.ParseCertificate(chip.ASVK())
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name    string
		revoked *big.Int
		ok      bool
	}{{"its own", asvk.SerialNumber, false}, {"that of VCEKs", ask.SerialNumber, true}} {
		crl, err := v.CRL(time.Now().Add(-time.Hour), row.revoked)
		if err != nil {
			t.Fatal(err)
		}
		ev := snp.Evidence{Report: report(t, chip, simulate.SNPOptions{VLEK: true}), Certificates: chip.CertTable(), CRL: crl}
		res := snp.Appraise(ev, snp.Want{ReportData: data}, v.Anchors(), time.Now())
		if res.Genuine() != row.ok {
			t.Errorf("revoked %s: %v", row.name, res.Checks.Failed())
		}
		if !row.ok {
			onlyFails(t, res, snp.CheckCRL)
		}
	}
}
