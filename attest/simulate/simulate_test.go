package simulate_test

import (
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/simulate"
)

func TestMintAndLoad(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "simulation")
	if err := simulate.Mint(dir, simulate.Options{GPUs: 2, Fast: true}); err != nil {
		t.Fatal(err)
	}
	if err := simulate.Mint(dir, simulate.Options{}); err == nil {
		t.Error("minted over an existing simulation")
	}
	set, err := simulate.LoadRoots(dir)
	if err != nil {
		t.Fatal(err)
	}
	if !set.Simulated() || set.Empty() {
		t.Error("loaded roots do not say that they are simulated")
	}
	chip, gpus, err := simulate.LoadDevices(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(gpus) != 2 || gpus[0].UUID() == gpus[1].UUID() {
		t.Errorf("loaded %d GPUs", len(gpus))
	}
	_, _, ark := chip.Certificates()
	if !set.ARK(chip.Product(), ark) {
		t.Error("the chip's root is not among the roots")
	}
	if r, err := chip.Report([64]byte{1}, simulate.SNPOptions{}); err != nil || len(r) != simulate.ReportSize {
		t.Errorf("report of %d bytes: %v", len(r), err)
	}
	if _, err := gpus[0].Report([32]byte{1}, simulate.GPUOptions{}); err != nil {
		t.Error(err)
	}
	err = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		b, err := os.ReadFile(path)
		if strings.Contains(path, "/roots/") && strings.Contains(string(b), "PRIVATE") {
			t.Errorf("%s holds a key", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func TestLoadRefusesWhatIsNotThere(t *testing.T) {
	if _, err := simulate.LoadRoots(t.TempDir()); err == nil {
		t.Error("loaded roots from an empty folder")
	}
	if _, _, err := simulate.LoadDevices(t.TempDir()); err == nil {
		t.Error("loaded devices from an empty folder")
	}
}

func TestChainHasTheHardwaresForm(t *testing.T) {
	v, err := simulate.New(simulate.Options{Fast: true})
	if err != nil {
		t.Fatal(err)
	}
	var certs []*x509.Certificate
	for rest := v.GPUs()[0].ChainPEM(); len(rest) > 0; {
		var b *pem.Block
		b, rest = pem.Decode(rest)
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		certs = append(certs, c)
	}
	if len(certs) != 5 {
		t.Fatalf("%d certificates, want 5", len(certs))
	}
	if !v.Anchors().NVIDIADeviceRoot(certs[4].Raw) {
		t.Error("the chain does not end in the minted root")
	}
}
