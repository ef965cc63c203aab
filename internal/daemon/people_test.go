package daemon_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/pki"
)

// mint is a client certificate under dir's authority with the given URI names.
func mint(t *testing.T, dir string, uris ...string) tls.Certificate {
	t.Helper()
	ca, err := tls.LoadX509KeyPair(filepath.Join(dir, pki.CAFile), filepath.Join(dir, pki.CAKeyFile))
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, DNSNames: []string{"localhost"},
	}
	for _, s := range uris {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		tmpl.URIs = append(tmpl.URIs, u)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.Leaf, &key.PublicKey, ca.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// The authority signed every one of these: only their names are wrong.
func TestNamesOfCertificates(t *testing.T) {
	dir := newPKI(t, [2]string{"broker", "broker"}, [2]string{"agent", "node-1"})
	base, err := pki.Files(dir, "agent", "node-1").Client(daemon.RoleBroker)
	if err != nil {
		t.Fatal(err)
	}
	for kind, server := range map[string]func(daemon.TLS) (*tls.Config, error){"mutual": daemon.TLS.Server, "for people": daemon.TLS.ServerForPeople} {
		cfg, err := server(pki.Files(dir, "broker", "broker"))
		if err != nil {
			t.Fatal(err)
		}
		addr, stop := serveWith(t, cfg, whoami())
		for name, tc := range map[string]struct {
			uris []string
			want string
		}{
			"one name":              {[]string{"spiffe://coffer.local/agent/node-7"}, "agent/node-7"},
			"no name":               {nil, ""},
			"two names":             {[]string{"spiffe://coffer.local/agent/node-7", "spiffe://coffer.local/owner/x"}, ""},
			"one name twice":        {[]string{"spiffe://coffer.local/agent/node-7", "spiffe://coffer.local/agent/node-7"}, ""},
			"another trust domain":  {[]string{"spiffe://other.local/agent/node-7"}, ""},
			"a role that is none":   {[]string{"spiffe://coffer.local/root/node-7"}, ""},
			"not a spiffe name":     {[]string{"https://coffer.local/agent/node-7"}, ""},
			"a path segment more":   {[]string{"spiffe://coffer.local/agent/node-7/x"}, ""},
			"the trust domain only": {[]string{"spiffe://coffer.local"}, ""},
		} {
			c := base.Clone()
			c.Certificates = []tls.Certificate{mint(t, dir, tc.uris...)}
			got, err := dial(addr, c)
			if tc.want == "" && err == nil || tc.want != "" && (err != nil || !strings.HasSuffix(got, " "+tc.want)) {
				t.Errorf("%s, %s: %q, %v", kind, name, got, err)
			}
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
	}
}

func TestServerForPeople(t *testing.T) {
	dir := newPKI(t, [2]string{"broker", "broker"}, [2]string{"agent", "node-1"}, [2]string{"issuer", "issuer"})
	other := newPKI(t, [2]string{"agent", "node-1"})
	cfg, err := pki.Files(dir, "broker", "broker").ServerForPeople()
	if err != nil {
		t.Fatal(err)
	}
	addr, stop := serveWith(t, cfg, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !daemon.HasCertificate(r) {
			if _, _, err := daemon.Identity(r); err == nil {
				t.Error("an identity out of nothing")
			}
			_, _ = w.Write([]byte("nobody"))
			return
		}
		whoami().ServeHTTP(w, r)
	}))
	defer func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	}()
	ca := filepath.Join(dir, pki.CAFile)
	people, err := daemon.HTTPClientForPeople(ca, daemon.RoleBroker)
	if err != nil {
		t.Fatal(err)
	}
	defer people.CloseIdleConnections()
	if got, err := get(people, "https://"+addr+"/"); err != nil || got != "nobody" {
		t.Errorf("without a certificate: %q, %v", got, err)
	}
	agent, err := pki.Files(dir, "agent", "node-1").Client(daemon.RoleBroker)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := dial(addr, agent); err != nil || !strings.HasSuffix(got, "agent/node-1") {
		t.Errorf("with a certificate: %q, %v", got, err)
	}
	// A certificate that does not hold is not as good as none.
	foreign := agent.Clone()
	foreign.Certificates = otherCert(t, other)
	if got, err := dial(addr, foreign); err == nil {
		t.Errorf("with a foreign certificate: %q", got)
	}
	wrong, err := daemon.HTTPClientForPeople(ca, daemon.RoleIssuer)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := get(wrong, "https://"+addr+"/"); err == nil || !strings.Contains(err.Error(), "want the role issuer") {
		t.Errorf("the broker passed for the issuer: %v", err)
	}
	if _, err := daemon.HTTPClientForPeople(ca, daemon.RoleOwner); err == nil {
		t.Error("a client of a role that serves nothing")
	}
}
