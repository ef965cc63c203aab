package daemon

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/coffer-run/coffer/internal/daemon/keyfile"
)

// TrustDomain is the SPIFFE trust domain of every coffer identity.
const TrustDomain = "coffer.local"

// Roles that an identity may have.
const (
	RoleOwner    = "owner"
	RoleEngineer = "engineer"
	RoleAgent    = "agent"
	RoleOperator = "operator"
	RoleAuditor  = "auditor"
	RoleVerifier = "verifier"
	RoleBroker   = "broker"
)

// Roles returns every role.
func Roles() []string {
	return []string{RoleOwner, RoleEngineer, RoleAgent, RoleOperator, RoleAuditor, RoleVerifier, RoleBroker}
}

// Serves reports whether identities of a role answer on a port.
func Serves(role string) bool {
	return role == RoleAgent || role == RoleVerifier || role == RoleBroker
}

var nameForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$`)

// IdentityURI returns the SPIFFE name of an identity.
func IdentityURI(role, name string) (*url.URL, error) {
	if !slices.Contains(Roles(), role) {
		return nil, fmt.Errorf("identity role %.40q: want one of %s", role, strings.Join(Roles(), ", "))
	}
	if !nameForm.MatchString(name) {
		return nil, fmt.Errorf("identity name %.80q: want lower-case letters, digits, '-' and '.', at most 63", name)
	}
	return &url.URL{Scheme: "spiffe", Host: TrustDomain, Path: "/" + role + "/" + name}, nil
}

// ParseIdentity reads spiffe://coffer.local/ROLE/NAME, in that exact form.
func ParseIdentity(u *url.URL) (role, name string, err error) {
	role, name, ok := strings.Cut(strings.TrimPrefix(u.Path, "/"), "/")
	if !ok {
		return "", "", fmt.Errorf("identity %.120q: want spiffe://%s/ROLE/NAME", u.String(), TrustDomain)
	}
	want, err := IdentityURI(role, name)
	if err != nil {
		return "", "", err
	}
	// Comparing the text leaves no room for ports, user names, queries,
	// fragments and escapes.
	if u.String() != want.String() {
		return "", "", fmt.Errorf("identity %.120q: want %s", u.String(), want)
	}
	return role, name, nil
}

// certIdentity reads the one identity of a certificate (SPIFFE X.509-SVID,
// section 2: exactly one URI SAN).
func certIdentity(c *x509.Certificate) (role, name string, err error) {
	if len(c.URIs) != 1 {
		return "", "", fmt.Errorf("certificate has %d URI names, want exactly one", len(c.URIs))
	}
	return ParseIdentity(c.URIs[0])
}

// Identity returns who sent a request, from its verified client certificate.
func Identity(r *http.Request) (role, name string, err error) {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 || len(r.TLS.VerifiedChains[0]) == 0 {
		return "", "", errors.New("request came without a verified client certificate")
	}
	return certIdentity(r.TLS.VerifiedChains[0][0])
}

// TLS names the files of one identity: the authority that it trusts, its
// certificate and its key, all in PEM. Only its owner may read the key.
type TLS struct {
	CA   string `json:"ca"`
	Cert string `json:"cert"`
	Key  string `json:"key"`
}

// Server returns the configuration of a server that requires a client
// certificate under CA.
func (t TLS) Server() (*tls.Config, error) {
	cert, pool, err := t.load()
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{cert},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    pool,
		NextProtos:   []string{"h2", "http/1.1"},
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, _, err := certIdentity(cs.PeerCertificates[0])
			return err
		},
	}, nil
}

// Client returns the configuration of a client of servers in serverRole. A
// certificate under CA alone is not enough: an agent must not pass for the
// broker on the broker's port.
func (t TLS) Client(serverRole string) (*tls.Config, error) {
	if !Serves(serverRole) {
		return nil, fmt.Errorf("client of role %.40q: no such server", serverRole)
	}
	cert, pool, err := t.load()
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{cert},
		RootCAs:      pool,
		NextProtos:   []string{"h2", "http/1.1"},
		VerifyConnection: func(cs tls.ConnectionState) error {
			role, name, err := certIdentity(cs.PeerCertificates[0])
			if err != nil {
				return err
			}
			if role != serverRole {
				return fmt.Errorf("server is %s/%s, want a %s", role, name, serverRole)
			}
			return nil
		},
	}, nil
}

// HTTPClient returns an HTTP/2 client of servers in serverRole. It has no
// timeout of its own: calls carry theirs in their context.
func (t TLS) HTTPClient(serverRole string) (*http.Client, error) {
	cfg, err := t.Client(serverRole)
	if err != nil {
		return nil, err
	}
	return &http.Client{
		Transport: &http.Transport{
			TLSClientConfig:     cfg,
			ForceAttemptHTTP2:   true,
			TLSHandshakeTimeout: headerTimeout,
			IdleConnTimeout:     idleTimeout,
		},
		// No service of ours redirects: following one would take a request elsewhere.
		CheckRedirect: func(*http.Request, []*http.Request) error { return errors.New("refusing to follow a redirect") },
	}, nil
}

func (t TLS) load() (tls.Certificate, *x509.CertPool, error) {
	if t.CA == "" || t.Cert == "" || t.Key == "" {
		return tls.Certificate{}, nil, errors.New("tls needs ca, cert and key files")
	}
	ca, err := os.ReadFile(t.CA)
	if err != nil {
		return tls.Certificate{}, nil, fmt.Errorf("read certificate authority: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		return tls.Certificate{}, nil, fmt.Errorf("certificate authority %s holds no certificate", t.CA)
	}
	certPEM, err := os.ReadFile(t.Cert)
	if err != nil {
		return tls.Certificate{}, nil, fmt.Errorf("load identity: %w", err)
	}
	keyPEM, err := keyfile.Read(t.Key)
	if err != nil {
		return tls.Certificate{}, nil, fmt.Errorf("load identity %s: %w", t.Cert, err)
	}
	defer clear(keyPEM)
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return tls.Certificate{}, nil, fmt.Errorf("load identity %s: %w", t.Cert, err)
	}
	if _, _, err := certIdentity(cert.Leaf); err != nil {
		return tls.Certificate{}, nil, fmt.Errorf("load identity %s: %w", t.Cert, err)
	}
	return cert, pool, nil
}
