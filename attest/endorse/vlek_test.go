package endorse_test

import (
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"slices"
	"testing"
	"testing/fstest"
	"time"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/snp"
)

// The issuers of VCEKs and of VLEKs have a list each, at AMD's service and in a
// folder. A report that a VLEK signed is held against its own and no other.
func TestVLEKsHaveTheirOwnList(t *testing.T) {
	w := newWorld(t)
	chip, err := w.v.NewChip()
	if err != nil {
		t.Fatal(err)
	}
	if err := chip.LoadVLEK(); err != nil {
		t.Fatal(err)
	}
	asvk, err := x509.ParseCertificate(chip.ASVK())
	if err != nil {
		t.Fatal(err)
	}
	list := func(revoked ...*big.Int) []byte {
		t.Helper()
		b, err := w.v.CRL(w.now.Add(-time.Hour), revoked...)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	good, bad := list(), list(asvk.SerialNumber)
	vcek, vlek := endorse.CRLKey(chip.Product(), snp.VCEK), endorse.CRLKey(chip.Product(), snp.VLEK)
	_, _, ark := chip.Certificates()
	chain := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: chip.ASVK()}), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ark})...)
	w.services.Set(endorse.ChainKey(chip.Product(), snp.VLEK), chain)
	for _, row := range []struct {
		situation string
		lists     map[endorse.Key][]byte
		outcome   check.Outcome
	}{
		{"both lists are good", map[endorse.Key][]byte{vcek: good, vlek: good}, check.Pass},
		{"the list of VLEKs alone", map[endorse.Key][]byte{vlek: good}, check.Pass},
		{"the list of VLEKs names the issuer", map[endorse.Key][]byte{vcek: good, vlek: bad}, check.Fail},
		{"only the list of VCEKs is there", map[endorse.Key][]byte{vcek: good}, check.Fail},
	} {
		lib := endorse.NewLibrary()
		services := endorse.Fetcher(nil)
		for k, b := range row.lists {
			i, err := endorse.Parse(endorse.CRL, k.ID, b)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := lib.Add(i, w.now); err != nil {
				t.Fatal(err)
			}
		}
		w.services.Set(vcek, row.lists[vcek])
		w.services.Set(vlek, row.lists[vlek])
		for where, c := range map[string]*endorse.Cache{
			"held":    w.cache(endorse.Options{Store: lib, Fetch: services}),
			"fetched": w.cache(endorse.Options{Store: endorse.NewLibrary(), Fetch: w.services}),
		} {
			r, err := chip.Report(data, simulate.SNPOptions{VLEK: true})
			if err != nil {
				t.Fatal(err)
			}
			// The chain is the cloud provider's to hand out, in the table.
			res := c.AppraiseSNP(t.Context(), snp.Evidence{Report: r, Certificates: chip.CertTable()}, snp.Want{ReportData: data}, w.v.Anchors(), w.now)
			n := slices.IndexFunc(res.Checks, func(k check.Check) bool { return k.ID == snp.CheckCRL })
			if n < 0 || res.Checks[n].Outcome != row.outcome {
				t.Errorf("%s, %s: %+v", row.situation, where, res.Checks)
			}
		}
	}
}

func TestVLEKListsInFolders(t *testing.T) {
	w := newWorld(t)
	b, err := w.v.CRL(w.now.Add(-time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	product := w.v.Chip().Product()
	for name, want := range map[string]endorse.Key{
		"vcek/v1/Genoa/crl": endorse.CRLKey(product, snp.VCEK), "genoa.crl": endorse.CRLKey(product, snp.VCEK),
		"vlek/v1/Genoa/crl": endorse.CRLKey(product, snp.VLEK), "Genoa-VLEK.crl": endorse.CRLKey(product, snp.VLEK),
	} {
		items, err := endorse.Recognize(name, b)
		if err != nil || len(items) != 1 || items[0].Key != want {
			t.Errorf("%s: %+v, %v", name, items, err)
		}
	}
	lib, files := endorse.NewLibrary(), fstest.MapFS{}
	for _, s := range []snp.Signer{snp.VCEK, snp.VLEK} {
		i, err := endorse.Parse(endorse.CRL, endorse.CRLKey(product, s).ID, b)
		if err != nil {
			t.Fatal(err)
		}
		files[endorse.Path(i)] = &fstest.MapFile{Data: b, Mode: 0o644}
	}
	if problems, err := lib.Load(files, nil); err != nil || len(problems) > 0 {
		t.Fatal(problems, err)
	}
	// One content, two endorsements.
	if all := lib.All(); len(all) != 2 || all[0].Digest != all[1].Digest || all[0].Key == all[1].Key {
		t.Errorf("held %+v", all)
	}
	if _, err := endorse.Parse(endorse.CRL, "vlek/v1/Milan/crl", b); err == nil {
		t.Error("the list of another product")
	}
}
