package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/identity"
	"github.com/coffer-run/coffer/runner/server"
)

// provider is an OpenID provider with one key.
type provider struct {
	*httptest.Server
	key  *ecdsa.PrivateKey
	down bool
}

func newProvider(t *testing.T) *provider {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p := &provider{key: key}
	p.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case p.down:
			http.Error(w, "down", http.StatusServiceUnavailable)
		case r.URL.Path == "/keys":
			_ = json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: &key.PublicKey, KeyID: "k", Algorithm: "ES256", Use: "sig"}}})
		default:
			_ = json.NewEncoder(w).Encode(map[string]any{"issuer": p.URL, "jwks_uri": p.URL + "/keys", "authorization_endpoint": p.URL, "token_endpoint": p.URL})
		}
	}))
	t.Cleanup(p.Close)
	return p
}

// token signs claims, changed as change says.
func (p *provider) token(t *testing.T, change func(map[string]any)) string {
	t.Helper()
	now := time.Now()
	claims := map[string]any{"iss": p.URL, "aud": "coffer-node", "sub": "ada", "iat": now.Unix(), "exp": now.Add(time.Minute).Unix(), "groups": []string{"engineers", "choir"}}
	if change != nil {
		change(claims)
	}
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: p.key}, (&jose.SignerOptions{}).WithHeader("kid", "k"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	jws, err := s.Sign(b)
	if err != nil {
		t.Fatal(err)
	}
	out, err := jws.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (p *provider) callers(t *testing.T) *callers {
	t.Helper()
	v, err := identity.New([]identity.Issuer{{URL: p.URL, Audience: "coffer-node", Algorithms: []string{"ES256"}}}, p.Client(), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	return &callers{&Access{Roles: map[string]string{"engineers": "engineer", "auditors": "auditor", "team": "engineer"}}, v}
}

func TestCallersWithTokens(t *testing.T) {
	p, stranger := newProvider(t), newProvider(t)
	k := p.callers(t)
	set := func(name string, v any) func(map[string]any) {
		return func(c map[string]any) { c[name] = v }
	}
	unsigned := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + "." + strings.Split(p.token(t, nil), ".")[1] + "."
	for name, row := range map[string]struct {
		token string
		check string // the one that refuses
		roles string
	}{
		"a person":                       {p.token(t, nil), "", "engineer"},
		"two groups of one role":         {p.token(t, set("groups", []string{"team", "auditors", "engineers"})), "", "engineer auditor"},
		"no group that means anything":   {p.token(t, set("groups", []string{"choir"})), "", ""},
		"a group that is called a role":  {p.token(t, set("groups", []string{"agent", "scheduler", "operator"})), "", ""},
		"a token for the broker":         {p.token(t, set("aud", "coffer")), "token.audience", ""},
		"a token for both":               {p.token(t, set("aud", []string{"coffer", "coffer-node"})), "token.audience", ""},
		"a token given to another party": {p.token(t, set("azp", "coffer")), "token.audience", ""},
		"another issuer":                 {stranger.token(t, nil), "token.issuer", ""},
		"another's key":                  {stranger.token(t, set("iss", p.URL)), "token.signature", ""},
		"unsigned":                       {unsigned, "token.algorithm", ""},
		"expired":                        {p.token(t, set("exp", time.Now().Add(-time.Hour).Unix())), "token.expired", ""},
		"for later":                      {p.token(t, set("nbf", time.Now().Add(time.Hour).Unix())), "token.not-yet-valid", ""},
		"a name like a certificate's":    {p.token(t, set("sub", "engineer/ada")), "token.name", ""},
		"nothing":                        {"x", "token.malformed", ""},
	} {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/", http.NoBody)
		r.Header.Set("Authorization", "Bearer "+row.token)
		c, err := k.identify(r)
		var refused *check.Refusal
		switch {
		case row.check == "" && (err != nil || c.Principal != "user/ada" || strings.Join(c.Roles, " ") != row.roles):
			t.Errorf("%s: %+v %v", name, c, err)
		case row.check != "" && (!errors.As(err, &refused) || len(refused.Checks) != 1 || refused.Checks[0].ID != row.check || c.Principal != ""):
			t.Errorf("%s: %+v, %v, want %s", name, c, err, row.check)
		}
	}
	r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/", http.NoBody)
	if c, err := k.identify(r); err == nil {
		t.Errorf("without anything: %+v", c)
	}
	r.Header.Set("Authorization", "Bearer "+p.token(t, nil))
	r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{{}}}
	var refused *check.Refusal
	if _, err := k.identify(r); !errors.As(err, &refused) || refused.Checks[0].ID != "caller.identity" {
		t.Errorf("a token beside a certificate: %v", err)
	}
	r.TLS = nil
	if c, err := (&callers{}).identify(r); err == nil {
		t.Errorf("a node that takes no tokens: %+v", c)
	}
	p.down = true
	if _, err := p.callers(t).identify(r); !errors.Is(err, server.ErrUnavailable) {
		t.Errorf("without the issuer's keys: %v", err)
	}
}

func TestAccessIsRefused(t *testing.T) {
	issuers := []identity.Configured{{}}
	for name, a := range map[string]*Access{
		"no issuer":        {Roles: map[string]string{"g": "engineer"}},
		"no roles":         {Issuers: issuers},
		"a machine's role": {Issuers: issuers, Roles: map[string]string{"g": daemon.RoleAgent}},
		"a scheduler":      {Issuers: issuers, Roles: map[string]string{"g": daemon.RoleScheduler}},
		"no such role":     {Issuers: issuers, Roles: map[string]string{"g": "king"}},
		"no group":         {Issuers: issuers, Roles: map[string]string{"": "engineer"}},
	} {
		c := valid()
		c.Access = a
		if err := c.validate(); err == nil || !strings.Contains(err.Error(), "access") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if slices.Contains(peopleRoles, daemon.RoleAgent) || slices.Contains(peopleRoles, daemon.RoleScheduler) {
		t.Error("a group makes somebody a machine")
	}
}
