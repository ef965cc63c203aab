package pki_test

import (
	"crypto/tls"
	"crypto/x509"
	"net/url"
	"os"
	"path/filepath"
	"testing"

	"github.com/coffer-run/coffer/internal/daemon/pki"
)

func TestIssue(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	if err := pki.Issue(dir, "agent", "node-1"); err == nil {
		t.Error("issued without an authority")
	}
	if err := pki.Create(dir); err != nil {
		t.Fatal(err)
	}
	if err := pki.Create(dir); err == nil {
		t.Error("second authority over the first")
	}
	for _, id := range [][2]string{{"agent", "node-1"}, {"owner", "alice"}} {
		if err := pki.Issue(dir, id[0], id[1]); err != nil {
			t.Fatal(err)
		}
		if err := pki.Issue(dir, id[0], id[1]); err == nil {
			t.Errorf("%v issued twice", id)
		}
		cert := leaf(t, dir, id[0], id[1])
		server := id[0] == "agent"
		if want := "spiffe://coffer.local/" + id[0] + "/" + id[1]; len(cert.URIs) != 1 || cert.URIs[0].String() != want {
			t.Errorf("names %v, want %s", cert.URIs, want)
		}
		roots := x509.NewCertPool()
		pem, err := os.ReadFile(filepath.Join(dir, pki.CAFile))
		if err != nil || !roots.AppendCertsFromPEM(pem) {
			t.Fatal("no authority", err)
		}
		if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
			t.Errorf("%v as a client: %v", id, err)
		}
		_, err = cert.Verify(x509.VerifyOptions{Roots: roots, DNSName: "127.0.0.1"})
		if (err == nil) != server {
			t.Errorf("%v as a server: %v", id, err)
		}
	}
	for _, id := range [][2]string{{"root", "x"}, {"agent", ""}, {"agent", "../x"}, {"agent", "a/b"}} {
		if err := pki.Issue(dir, id[0], id[1]); err == nil {
			t.Errorf("%v issued", id)
		}
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 6 {
		t.Errorf("files %v", files)
	}
	for _, f := range files {
		if info, err := f.Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", f.Name(), info.Mode(), err)
		}
	}
}

func TestIssueAfterInterruption(t *testing.T) {
	dir := t.TempDir()
	if err := pki.Create(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "agent-a.key"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := pki.Issue(dir, "agent", "a"); err != nil {
		t.Fatal(err)
	}
	leaf(t, dir, "agent", "a")
}

func TestAuthorityIsConstrained(t *testing.T) {
	dir := t.TempDir()
	if err := pki.Create(dir); err != nil {
		t.Fatal(err)
	}
	ca, err := tls.LoadX509KeyPair(filepath.Join(dir, pki.CAFile), filepath.Join(dir, pki.CAKeyFile))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.Leaf)
	if err := pki.Issue(dir, "agent", "a"); err != nil {
		t.Fatal(err)
	}
	good := leaf(t, dir, "agent", "a")
	for name, change := range map[string]func(*x509.Certificate){
		"control":    func(*x509.Certificate) {},
		"other host": func(c *x509.Certificate) { c.DNSNames = []string{"example.org"} },
		"other trust domain": func(c *x509.Certificate) {
			c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/agent/a"}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			tmpl := *good
			change(&tmpl)
			der, err := x509.CreateCertificate(nil, &tmpl, ca.Leaf, good.PublicKey, ca.PrivateKey)
			if err != nil {
				t.Fatal(err)
			}
			c, err := x509.ParseCertificate(der)
			if err != nil {
				t.Fatal(err)
			}
			_, err = c.Verify(x509.VerifyOptions{Roots: roots})
			if (err == nil) != (name == "control") {
				t.Errorf("got %v", err)
			}
		})
	}
}

func leaf(t *testing.T, dir, role, name string) *x509.Certificate {
	t.Helper()
	f := pki.Files(dir, role, name)
	c, err := tls.LoadX509KeyPair(f.Cert, f.Key)
	if err != nil {
		t.Fatal(err)
	}
	return c.Leaf
}
