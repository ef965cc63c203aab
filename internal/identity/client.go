package identity

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"net/url"
)

// Configured is an issuer in a daemon's configuration file.
type Configured struct {
	Issuer
	// Embedded is whether it has a certificate of this stack's authority, in the
	// role issuer, and not one of the system's authorities.
	Embedded bool `json:"embedded,omitempty"`
}

// hosts sends requests to embedded issuers over the stack's own certificates, and
// all others over the system's.
type hosts struct {
	embedded map[string]bool
	stack    http.RoundTripper
	system   http.RoundTripper
}

// RoundTrip implements http.RoundTripper.
func (h hosts) RoundTrip(r *http.Request) (*http.Response, error) {
	if h.embedded[r.URL.Host] {
		return h.stack.RoundTrip(r)
	}
	return h.system.RoundTrip(r)
}

// Client returns a client that asks issuers for their keys, and the issuers for New.
// own is a client of servers in the role issuer under the stack's authority.
func Client(own *http.Client, issuers []Configured) (*http.Client, []Issuer, error) {
	if own == nil || own.Transport == nil {
		return nil, nil, errors.New("identity: no client of embedded issuers")
	}
	h := hosts{
		embedded: map[string]bool{}, stack: own.Transport,
		system: &http.Transport{Proxy: http.ProxyFromEnvironment, ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12}},
	}
	var out []Issuer
	for _, i := range issuers {
		if i.Embedded {
			u, err := url.Parse(i.URL)
			if err != nil {
				return nil, nil, fmt.Errorf("issuer %.120q: %w", i.URL, err)
			}
			h.embedded[u.Host] = true
		}
		out = append(out, i.Issuer)
	}
	return &http.Client{Transport: h, CheckRedirect: func(*http.Request, []*http.Request) error { return errors.New("refusing to follow a redirect") }}, out, nil
}
