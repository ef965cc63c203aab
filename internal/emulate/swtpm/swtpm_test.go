package swtpm

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func needSWTPM(t *testing.T) {
	t.Helper()
	for _, tool := range []string{"swtpm", "swtpm_setup", "swtpm_localca"} {
		if _, err := exec.LookPath(tool); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatalf("%s is not installed", tool)
			}
			t.Skipf("%s is not installed", tool)
		}
	}
}

func TestProvision(t *testing.T) {
	needSWTPM(t)
	before, _ := os.ReadDir("/var/lib/swtpm-localca")
	dir := filepath.Join(t.TempDir(), "tpm")

	first, err := Provision(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	block, rest := pem.Decode(first)
	if block == nil || len(rest) > 0 {
		t.Fatalf("not one certificate: %s", first)
	}
	ca, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if !ca.IsCA || !strings.Contains(ca.Subject.CommonName, "simulated") || ca.CheckSignatureFrom(ca) != nil {
		t.Errorf("%s is not a self-signed authority that says what it is", ca.Subject)
	}

	again, err := Provision(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first, again) {
		t.Error("a second Provision made another TPM")
	}
	after, _ := os.ReadDir("/var/lib/swtpm-localca")
	if len(before) != len(after) {
		t.Error("the machine's own authority folder was written to")
	}

	if err := os.Remove(filepath.Join(dir, mark)); err != nil {
		t.Fatal(err)
	}
	anew, err := Provision(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(first, anew) {
		t.Error("a half-made TPM was kept")
	}
}

func TestProvisionSaysWhatFailed(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if _, err := Provision(t.Context(), t.TempDir()); err == nil {
		t.Fatal("provisioned without swtpm_setup")
	}
}
