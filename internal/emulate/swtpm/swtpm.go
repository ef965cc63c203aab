// Package swtpm makes and runs the software TPM of the embedded stack: a real
// TPM 2.0 whose maker is a certificate authority of the stack's own.
package swtpm

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// Files of a provisioned TPM, under its state folder.
const (
	caDir    = "localca"
	stateDir = "state"
	// signKey and issuer are the authority's key and certificate under caDir.
	signKey = "signkey.pem"
	issuer  = "issuercert.pem"
	// mark is written last: a folder without it is not a provisioned TPM.
	mark = "provisioned"
)

// Provision makes a new TPM under dir with an endorsement key certificate signed
// by a new authority, and returns the authority's certificate as PEM: the trust
// anchor under which the TPM's evidence is `simulated`. A folder that Provision
// has finished is left as it is; a half-made one is made anew.
func Provision(ctx context.Context, dir string) (caPEM []byte, err error) {
	// swtpm_setup and swtpm_localca read paths from their configuration and run
	// elsewhere than here.
	dir, err = filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("provision software TPM: %w", err)
	}
	if _, err := os.Stat(filepath.Join(dir, mark)); err == nil {
		return authority(dir)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("provision software TPM: %w", err)
	}
	for _, sub := range []string{caDir, stateDir} {
		p := filepath.Join(dir, sub)
		if err := os.RemoveAll(p); err != nil {
			return nil, fmt.Errorf("provision software TPM: %w", err)
		}
		if err := os.MkdirAll(p, 0o700); err != nil {
			return nil, fmt.Errorf("provision software TPM: %w", err)
		}
	}
	conf, err := configure(ctx, dir)
	if err != nil {
		return nil, fmt.Errorf("provision software TPM: %w", err)
	}
	if err := mintAuthority(filepath.Join(dir, caDir)); err != nil {
		return nil, fmt.Errorf("provision software TPM: %w", err)
	}
	// The RSA-2048 key by the default template gets NV index 0x01c00002; the ECC
	// key that swtpm_setup makes beside it is P-384 at 0x01c00016.
	cmd := exec.CommandContext(ctx, "swtpm_setup", "--tpm2", "--tpmstate", filepath.Join(dir, stateDir), // #nosec G204 -- fixed program
		"--create-ek-cert", "--pcr-banks", "sha256", "--config", conf, "--overwrite")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("provision software TPM: swtpm_setup: %w: %s", err, tail(out.Bytes()))
	}
	caPEM, err = authority(dir)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, mark), nil, 0o600); err != nil {
		return nil, fmt.Errorf("provision software TPM: %w", err)
	}
	return caPEM, nil
}

// configure writes swtpm_setup's and swtpm_localca's configuration so that
// nothing is read from or written to the machine's own.
func configure(ctx context.Context, dir string) (string, error) {
	ca := filepath.Join(dir, caDir)
	localca, err := exec.LookPath("swtpm_localca")
	if err != nil {
		return "", fmt.Errorf("swtpm_localca is not installed: %w", err)
	}
	files := map[string]string{
		"swtpm-localca.conf": "statedir = " + ca + "\n" +
			"signingkey = " + filepath.Join(ca, signKey) + "\n" +
			"issuercert = " + filepath.Join(ca, issuer) + "\n" +
			"certserial = " + filepath.Join(ca, "certserial") + "\n",
		"swtpm-localca.options": "--tpm-manufacturer id:00000000\n--tpm-model simulated\n--tpm-version id:00000000\n" +
			"--platform-manufacturer simulated\n--platform-model simulated\n--platform-version 0\n",
		"swtpm_setup.conf": "create_certs_tool = " + localca + "\n" +
			"create_certs_tool_config = " + filepath.Join(ca, "swtpm-localca.conf") + "\n" +
			"create_certs_tool_options = " + filepath.Join(ca, "swtpm-localca.options") + "\n" +
			"active_pcr_banks = sha256\n",
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(ca, name), []byte(text), 0o600); err != nil {
			return "", err
		}
	}
	return filepath.Join(ca, "swtpm_setup.conf"), ctx.Err()
}

// mintAuthority makes the authority before swtpm_localca can: its own has an
// intermediate, which the TPM does not keep and which could not be presented.
func mintAuthority(ca string) error {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		return err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "coffer simulated TPM maker " + serial.Text(36)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(10, 0, 0),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(ca, signKey), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600),
		os.WriteFile(filepath.Join(ca, issuer), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
}

// authority returns the certificate under which the endorsement keys are signed.
func authority(dir string) ([]byte, error) {
	b, err := os.ReadFile(filepath.Join(dir, caDir, issuer)) // #nosec G304 -- the stack's own folder
	if err != nil {
		return nil, fmt.Errorf("software TPM authority: %w", err)
	}
	return b, nil
}

// Args returns the command line that runs the TPM provisioned under dir,
// answering on the unix socket at path. Each start is a reset of the TPM.
func Args(dir, socket string) []string {
	return []string{
		"swtpm", "socket", "--tpm2", "--tpmstate", "dir=" + filepath.Join(dir, stateDir) + ",mode=0600",
		"--server", "type=unixio,path=" + socket + ",mode=0600", "--flags", "not-need-init,startup-clear",
		// No log: swtpm's has a line for every command at every level.
		"--log", "file=-",
	}
}

// tail keeps what a person needs of a tool's output.
func tail(b []byte) []byte {
	b = bytes.TrimSpace(b)
	if len(b) > 2000 {
		b = b[len(b)-2000:]
	}
	return b
}
