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

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/coffer-run/coffer/internal/daemon/keyfile"
)

// EmbeddedTrustDomain is the SPIFFE trust domain of the embedded stack. Elsewhere a
// program's own certificate says which is its own, and no other is spoken to.
const EmbeddedTrustDomain = "coffer.local"

// Roles that an identity may have.
const (
	RoleOwner     = "owner"
	RoleEngineer  = "engineer"
	RoleApprover  = "approver"
	RoleOperator  = "operator"
	RoleAuditor   = "auditor"
	RoleScheduler = "scheduler"
	RoleAgent     = "agent"
	RoleVerifier  = "verifier"
	// RoleRelyingParty asks a verifier about evidence, and has nothing else of
	// coffer's.
	RoleRelyingParty = "relying-party"
	RoleBroker       = "broker"
	RoleIssuer       = "issuer"
)

// Roles returns every role.
func Roles() []string {
	return []string{RoleOwner, RoleEngineer, RoleApprover, RoleOperator, RoleAuditor, RoleScheduler, RoleAgent, RoleVerifier, RoleRelyingParty, RoleBroker, RoleIssuer}
}

// Serves reports whether identities of a role answer on a port.
func Serves(role string) bool {
	return role == RoleAgent || role == RoleVerifier || role == RoleBroker || role == RoleIssuer
}

var nameForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$`)

// IdentityURI returns the SPIFFE name of an identity in a trust domain.
func IdentityURI(domain, role, name string) (*url.URL, error) {
	td, err := spiffeid.TrustDomainFromString(domain)
	if err != nil || td.Name() != domain {
		return nil, fmt.Errorf("trust domain %.120q: want a name such as example.org", domain)
	}
	if !slices.Contains(Roles(), role) {
		return nil, fmt.Errorf("identity role %.40q: want one of %s", role, strings.Join(Roles(), ", "))
	}
	if !nameForm.MatchString(name) {
		return nil, fmt.Errorf("identity name %.80q: want lower-case letters, digits, '-' and '.', at most 63", name)
	}
	return &url.URL{Scheme: "spiffe", Host: domain, Path: "/" + role + "/" + name}, nil
}

// ParseIdentity reads spiffe://DOMAIN/ROLE/NAME, in that exact form.
func ParseIdentity(u *url.URL) (domain, role, name string, err error) {
	// The SPIFFE ID specification, section 2: no port, user name, query,
	// fragment, escape or empty segment.
	id, err := spiffeid.FromURI(u)
	if err != nil {
		return "", "", "", fmt.Errorf("identity %.120q: %w", u.String(), err)
	}
	domain = id.TrustDomain().Name()
	role, name, ok := strings.Cut(strings.TrimPrefix(id.Path(), "/"), "/")
	if !ok {
		return "", "", "", fmt.Errorf("identity %.120q: want spiffe://%s/ROLE/NAME", u.String(), domain)
	}
	want, err := IdentityURI(domain, role, name)
	if err != nil {
		return "", "", "", err
	}
	if u.String() != want.String() {
		return "", "", "", fmt.Errorf("identity %.120q: want %s", u.String(), want)
	}
	return domain, role, name, nil
}

// certIdentity reads the one identity of a certificate (SPIFFE X.509-SVID,
// section 2: exactly one URI SAN).
func certIdentity(c *x509.Certificate) (domain, role, name string, err error) {
	if len(c.URIs) != 1 {
		return "", "", "", fmt.Errorf("certificate has %d URI names, want exactly one", len(c.URIs))
	}
	return ParseIdentity(c.URIs[0])
}

// ofDomain refuses a peer of another trust domain: roles and names of another mean
// nothing here, whoever signed them.
func ofDomain(cs tls.ConnectionState, own string) error {
	domain, role, name, err := certIdentity(cs.PeerCertificates[0])
	if err != nil {
		return err
	}
	if domain != own {
		return fmt.Errorf("identity %s/%s is of the trust domain %s, want %s", role, name, domain, own)
	}
	return nil
}

// HasCertificate reports whether the sender of a request showed a client
// certificate. Only with ServerForPeople can it be otherwise.
func HasCertificate(r *http.Request) bool { return r.TLS != nil && len(r.TLS.PeerCertificates) > 0 }

// Identity returns who sent a request, from its verified client certificate.
func Identity(r *http.Request) (role, name string, err error) {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 || len(r.TLS.VerifiedChains[0]) == 0 {
		return "", "", errors.New("request came without a verified client certificate")
	}
	// Its trust domain was compared when the connection was made.
	_, role, name, err = certIdentity(r.TLS.VerifiedChains[0][0])
	return role, name, err
}

// SPIFFEID returns who sent a request by the whole name, "spiffe://DOMAIN/ROLE/NAME".
func SPIFFEID(r *http.Request) (string, error) {
	if _, _, err := Identity(r); err != nil {
		return "", err
	}
	return r.TLS.VerifiedChains[0][0].URIs[0].String(), nil
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
	cert, pool, domain, err := t.load()
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
			if len(cs.PeerCertificates) == 0 {
				return errors.New("no client certificate")
			}
			return ofDomain(cs, domain)
		},
	}, nil
}

// ServerForPeople is Server for callers who may come without a certificate,
// because they bring a token. A certificate that is shown must hold. The handler
// has to establish who calls: Identity alone is an error without a certificate.
func (t TLS) ServerForPeople() (*tls.Config, error) {
	cfg, err := t.Server()
	if err != nil {
		return nil, err
	}
	cfg.ClientAuth = tls.VerifyClientCertIfGiven
	shown := cfg.VerifyConnection
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		if len(cs.PeerCertificates) == 0 {
			return nil
		}
		return shown(cs)
	}
	return cfg, nil
}

// Client returns the configuration of a client of servers in serverRole. A
// certificate under CA alone is not enough: an agent must not pass for the
// broker on the broker's port.
func (t TLS) Client(serverRole string) (*tls.Config, error) {
	if !Serves(serverRole) {
		return nil, fmt.Errorf("client of role %.40q: no such server", serverRole)
	}
	cert, pool, domain, err := t.load()
	if err != nil {
		return nil, err
	}
	cfg := clientOf(serverRole, pool)
	anyDomain := cfg.VerifyConnection
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		if err := ofDomain(cs, domain); err != nil {
			return err
		}
		return anyDomain(cs)
	}
	cfg.Certificates = []tls.Certificate{cert}
	return cfg, nil
}

// clientOf takes a server of any trust domain that the pool vouches for: a pool is
// one domain's (SPIFFE Trust Domain and Bundle, section 4).
func clientOf(serverRole string, pool *x509.CertPool) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		RootCAs:    pool,
		NextProtos: []string{"h2", "http/1.1"},
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, role, name, err := certIdentity(cs.PeerCertificates[0])
			if err != nil {
				return err
			}
			if role != serverRole {
				return fmt.Errorf("server is %s/%s, want the role %s", role, name, serverRole)
			}
			return nil
		},
	}
}

// HTTPClient returns an HTTP/2 client of servers in serverRole. It has no
// timeout of its own: calls carry theirs in their context.
func (t TLS) HTTPClient(serverRole string) (*http.Client, error) {
	cfg, err := t.Client(serverRole)
	if err != nil {
		return nil, err
	}
	return httpClient(cfg), nil
}

// HTTPClientForPeople is an HTTP client of servers in serverRole under the
// authority in the file ca. It shows no certificate: its user brings a token.
func HTTPClientForPeople(ca, serverRole string) (*http.Client, error) {
	if !Serves(serverRole) {
		return nil, fmt.Errorf("client of role %.40q: no such server", serverRole)
	}
	pool, err := loadCA(ca)
	if err != nil {
		return nil, err
	}
	return httpClient(clientOf(serverRole, pool)), nil
}

func httpClient(cfg *tls.Config) *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			TLSClientConfig:     cfg,
			ForceAttemptHTTP2:   true,
			TLSHandshakeTimeout: headerTimeout,
			IdleConnTimeout:     idleTimeout,
		},
		// No service of ours redirects: following one would take a request elsewhere.
		CheckRedirect: func(*http.Request, []*http.Request) error { return errors.New("refusing to follow a redirect") },
	}
}

func loadCA(file string) (*x509.CertPool, error) {
	ca, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read certificate authority: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("certificate authority %s holds no certificate", file)
	}
	return pool, nil
}

// load reads the files, and the trust domain of the certificate.
func (t TLS) load() (_ tls.Certificate, _ *x509.CertPool, domain string, err error) {
	if t.CA == "" || t.Cert == "" || t.Key == "" {
		return tls.Certificate{}, nil, "", errors.New("tls needs ca, cert and key files")
	}
	pool, err := loadCA(t.CA)
	if err != nil {
		return tls.Certificate{}, nil, "", err
	}
	certPEM, err := os.ReadFile(t.Cert)
	if err != nil {
		return tls.Certificate{}, nil, "", fmt.Errorf("load identity: %w", err)
	}
	keyPEM, err := keyfile.Read(t.Key)
	if err != nil {
		return tls.Certificate{}, nil, "", fmt.Errorf("load identity %s: %w", t.Cert, err)
	}
	defer clear(keyPEM)
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return tls.Certificate{}, nil, "", fmt.Errorf("load identity %s: %w", t.Cert, err)
	}
	if domain, _, _, err = certIdentity(cert.Leaf); err != nil {
		return tls.Certificate{}, nil, "", fmt.Errorf("load identity %s: %w", t.Cert, err)
	}
	return cert, pool, domain, nil
}
