// Package pki makes the embedded stack's certificate authority and the
// identities under it.
//
// Trusted: whoever can read the directory, which holds the authority's key.
// Checked: that nothing existing is overwritten. Not done: revocation; the
// authority serves one machine and is thrown away with it.
package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
)

const (
	caLifetime       = 10 * 365 * 24 * time.Hour
	identityLifetime = 365 * 24 * time.Hour
	// backdate allows for clocks that differ.
	backdate = 5 * time.Minute
)

// Names of the authority's files.
const (
	CAFile    = "ca.pem"
	CAKeyFile = "ca.key"
)

// Create makes a certificate authority in dir, of the embedded stack's trust domain.
// It refuses one that exists.
func Create(dir string) error { return CreateFor(dir, daemon.EmbeddedTrustDomain) }

// CreateFor makes one of another trust domain.
func CreateFor(dir, domain string) error {
	if _, err := os.Stat(filepath.Join(dir, CAFile)); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("create certificate authority: %s exists or cannot be read", filepath.Join(dir, CAFile))
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("create certificate authority: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("create certificate authority: %w", err)
	}
	now := time.Now()
	// The name constraints (RFC 5280, section 4.2.1.10) make this authority
	// useless for anything but local identities.
	tmpl := &x509.Certificate{
		Subject:                     pkix.Name{CommonName: "coffer embedded authority"},
		NotBefore:                   now.Add(-backdate),
		NotAfter:                    now.Add(caLifetime),
		KeyUsage:                    x509.KeyUsageCertSign,
		BasicConstraintsValid:       true,
		IsCA:                        true,
		MaxPathLenZero:              true,
		PermittedDNSDomainsCritical: true,
		PermittedURIDomains:         []string{domain},
		PermittedDNSDomains:         []string{"localhost"},
		PermittedIPRanges:           []*net.IPNet{{IP: net.IPv4(127, 0, 0, 0).To4(), Mask: net.CIDRMask(8, 32)}},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		return fmt.Errorf("create certificate authority: %w", err)
	}
	return write(dir, CAFile, CAKeyFile, der, key)
}

// Issue makes dir/ROLE-NAME.pem and .key, a client identity, and a server
// identity for 127.0.0.1 and localhost too if the role answers on a port. It
// refuses an identity that exists.
func Issue(dir, role, name string) error {
	file := role + "-" + name
	if _, err := os.Stat(filepath.Join(dir, file+".pem")); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("issue identity: %s exists or cannot be read", filepath.Join(dir, file+".pem"))
	}
	ca, err := tls.LoadX509KeyPair(filepath.Join(dir, CAFile), filepath.Join(dir, CAKeyFile))
	if err != nil {
		return fmt.Errorf("issue identity %s: load authority: %w", file, err)
	}
	if len(ca.Leaf.PermittedURIDomains) != 1 {
		return fmt.Errorf("issue identity %s: the authority is not one that Create made", file)
	}
	uri, err := daemon.IdentityURI(ca.Leaf.PermittedURIDomains[0], role, name)
	if err != nil {
		return fmt.Errorf("issue identity: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("issue identity %s: %w", file, err)
	}
	now := time.Now()
	tmpl := &x509.Certificate{
		Subject:               pkix.Name{CommonName: file},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(identityLifetime),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	tmpl.URIs = append(tmpl.URIs, uri)
	if daemon.Serves(role) {
		tmpl.ExtKeyUsage = append(tmpl.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
		tmpl.DNSNames = []string{"localhost"}
		tmpl.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1).To4()}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.Leaf, &key.PublicKey, ca.PrivateKey)
	if err != nil {
		return fmt.Errorf("issue identity %s: %w", file, err)
	}
	return write(dir, file+".pem", file+".key", der, key)
}

// Files returns the files of an identity in dir.
func Files(dir, role, name string) daemon.TLS {
	return daemon.TLS{
		CA:   filepath.Join(dir, CAFile),
		Cert: filepath.Join(dir, role+"-"+name+".pem"),
		Key:  filepath.Join(dir, role+"-"+name+".key"),
	}
}

// write puts the key down before the certificate: an identity exists when its
// certificate does, and an interrupted one is made anew.
func write(dir, certName, keyName string, der []byte, key *ecdsa.PrivateKey) error {
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("encode %s: %w", keyName, err)
	}
	if err := keyfile.Write(filepath.Join(dir, keyName), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})); err != nil {
		return err
	}
	return keyfile.Write(filepath.Join(dir, certName), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}
