package identity_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/internal/identity"
)

var noon = time.Date(2026, 3, 2, 12, 0, 0, 0, time.UTC)

// provider is an OpenID provider that answers discovery and keys.
type provider struct {
	*httptest.Server
	fetches atomic.Int64
	down    atomic.Bool
	huge    atomic.Bool

	mu   sync.Mutex
	keys []jose.JSONWebKey
	// says is the issuer that discovery names; its own URL if empty.
	says string
}

func newProvider(t testing.TB, keys ...jose.JSONWebKey) *provider {
	t.Helper()
	p := &provider{keys: keys}
	p.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		defer p.mu.Unlock()
		issuer := p.URL
		if p.says != "" {
			issuer = p.says
		}
		switch {
		case p.down.Load():
			http.Error(w, "down", http.StatusServiceUnavailable)
		case r.URL.Path == "/.well-known/openid-configuration":
			_ = json.NewEncoder(w).Encode(map[string]any{"issuer": issuer, "jwks_uri": p.URL + "/keys", "authorization_endpoint": p.URL, "token_endpoint": p.URL})
		case r.URL.Path == "/keys":
			p.fetches.Add(1)
			pad := ""
			if p.huge.Load() {
				pad = strings.Repeat("x", 1<<20)
			}
			_ = json.NewEncoder(w).Encode(map[string]any{"keys": p.keys, "pad": pad})
		default:
			http.NotFound(w, r)
		}
	}))
	t.Cleanup(p.Close)
	return p
}

func newKey(t testing.TB, kid string) (*ecdsa.PrivateKey, jose.JSONWebKey) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k, jose.JSONWebKey{Key: &k.PublicKey, KeyID: kid, Algorithm: "ES256", Use: "sig"}
}

func sign(t testing.TB, alg jose.SignatureAlgorithm, key any, kid, typ string, claims map[string]any) string {
	t.Helper()
	o := (&jose.SignerOptions{}).WithType(jose.ContentType(typ))
	if kid != "" {
		o = o.WithHeader("kid", kid)
	}
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, o)
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

type clock struct{ ns atomic.Int64 }

func newClock() *clock                   { c := &clock{}; c.ns.Store(noon.UnixNano()); return c }
func (c *clock) now() time.Time          { return time.Unix(0, c.ns.Load()).UTC() }
func (c *clock) advance(d time.Duration) { c.ns.Add(int64(d)) }

func good(issuer string) map[string]any {
	return map[string]any{
		"iss": issuer, "aud": "coffer", "sub": "alice", "groups": []string{"weights-approvers", "ml"},
		"iat": noon.Unix(), "exp": noon.Add(10 * time.Minute).Unix(), "auth_time": noon.Add(-time.Minute).Unix(), "amr": []string{"pwd"},
	}
}

func newVerifier(t testing.TB, p *provider, c *clock, change func(*identity.Issuer)) *identity.Verifier {
	t.Helper()
	i := identity.Issuer{URL: p.URL, Audience: "coffer"}
	if change != nil {
		change(&i)
	}
	v, err := identity.New([]identity.Issuer{i}, p.Client(), c.now)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func code(t *testing.T, err error) string {
	t.Helper()
	var r *check.Refusal
	if !errors.As(err, &r) || len(r.Checks) != 1 || r.Stage != "authenticate" {
		t.Fatalf("want a refusal with one check, got %v", err)
	}
	return r.Checks[0].ID
}

func TestAccepts(t *testing.T) {
	key, jwk := newKey(t, "k1")
	p := newProvider(t, jwk)
	for _, tc := range []struct {
		name   string
		config func(*identity.Issuer)
		claims map[string]any
		want   identity.Person
	}{
		{"the defaults", nil, nil, identity.Person{Name: "alice", Groups: []string{"weights-approvers", "ml"}, Assurance: 1}},
		{"several factors", nil, map[string]any{"amr": []string{"pwd", "otp", "mfa"}}, identity.Person{Name: "alice", Groups: []string{"weights-approvers", "ml"}, Assurance: 2}},
		{"hardware", nil, map[string]any{"acr": "phrh"}, identity.Person{Name: "alice", Groups: []string{"weights-approvers", "ml"}, ACR: "phrh", Assurance: 3}},
		{"a level of the configuration", func(i *identity.Issuer) { i.Assurance = map[string]int{"gold": 3} }, map[string]any{"acr": "gold"}, identity.Person{Name: "alice", Groups: []string{"weights-approvers", "ml"}, ACR: "gold", Assurance: 3}},
		{"a level that the configuration leaves out", func(i *identity.Issuer) { i.Assurance = map[string]int{"gold": 3} }, map[string]any{"acr": "phrh", "amr": nil}, identity.Person{Name: "alice", Groups: []string{"weights-approvers", "ml"}, ACR: "phrh"}},
		{"other claims", func(i *identity.Issuer) { i.NameClaim, i.GroupsClaim, i.Domain = "email_local", "roles", "example.org" }, map[string]any{"email_local": "a.b", "roles": []string{"x"}}, identity.Person{Name: "a.b@example.org", Groups: []string{"x"}, Assurance: 1}},
		{"no groups", func(i *identity.Issuer) { i.GroupsClaim = "none" }, nil, identity.Person{Name: "alice", Assurance: 1}},
		{"a clock behind by less than the skew", nil, map[string]any{"iat": noon.Add(29 * time.Second).Unix(), "nbf": noon.Add(29 * time.Second).Unix()}, identity.Person{Name: "alice", Groups: []string{"weights-approvers", "ml"}, Assurance: 1}},
		{"two audiences, for this party", nil, map[string]any{"aud": []string{"x", "coffer"}, "azp": "coffer"}, identity.Person{Name: "alice", Groups: []string{"weights-approvers", "ml"}, Assurance: 1}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := good(p.URL)
			maps.Copy(c, tc.claims)
			got, err := newVerifier(t, p, newClock(), tc.config).Verify(t.Context(), sign(t, jose.ES256, key, "k1", "JWT", c))
			if err != nil || !got.SignedIn.Equal(noon.Add(-time.Minute)) || !got.Expires.Equal(noon.Add(10*time.Minute)) {
				t.Fatalf("%+v, %v", got, err)
			}
			got.SignedIn, got.Expires = time.Time{}, time.Time{}
			if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", tc.want) {
				t.Errorf("got %+v, want %+v", got, tc.want)
			}
		})
	}
}

// Each row breaks one thing of a token that is good otherwise.
func TestRefuses(t *testing.T) {
	key, jwk := newKey(t, "k1")
	stranger, _ := newKey(t, "k1")
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p := newProvider(t, jwk, jose.JSONWebKey{Key: &rsaKey.PublicKey, KeyID: "r1", Use: "sig"}, jose.JSONWebKey{Key: &rsaKey.PublicKey, KeyID: "e1", Use: "enc"})
	pub, err := x509.MarshalPKIXPublicKey(&rsaKey.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	with := func(name string, v any) map[string]any { c := good(p.URL); c[name] = v; return c }
	without := func(name string) map[string]any { c := good(p.URL); delete(c, name); return c }
	es := func(c map[string]any) string { return sign(t, jose.ES256, key, "k1", "JWT", c) }
	b64 := base64.RawURLEncoding.EncodeToString
	control := es(good(p.URL))
	body := strings.Split(control, ".")
	v := newVerifier(t, p, newClock(), nil)
	if _, err := v.Verify(t.Context(), control); err != nil {
		t.Fatal("control:", err)
	}
	if _, err := v.Verify(t.Context(), sign(t, jose.RS256, rsaKey, "r1", "JWT", good(p.URL))); err != nil {
		t.Fatal("control, rsa:", err)
	}
	for _, tc := range []struct{ name, token, want string }{
		{"nothing", "", "token.malformed"},
		{"no token", "x.y.z", "token.malformed"},
		{"an encrypted one of five parts", control + ".a.b", "token.malformed"},
		{"too large", strings.Repeat("a", identity.MaxToken+1), "token.malformed"},
		{"unsigned, alg none", b64([]byte(`{"alg":"none"}`)) + "." + body[1] + ".", "token.algorithm"},
		{"unsigned, alg None", b64([]byte(`{"alg":"None"}`)) + "." + body[1] + ".", "token.algorithm"},
		{"the signature cut off", body[0] + "." + body[1] + ".", "token.signature"},
		{"HS256 with the public key as the secret", sign(t, jose.HS256, pub, "r1", "JWT", good(p.URL)), "token.algorithm"},
		{"an algorithm that is not configured", sign(t, jose.PS256, rsaKey, "r1", "JWT", good(p.URL)), "token.algorithm"},
		{"RS256 under the id of an EC key", sign(t, jose.RS256, rsaKey, "k1", "JWT", good(p.URL)), "token.signature"},
		{"a key for encryption", sign(t, jose.RS256, rsaKey, "e1", "JWT", good(p.URL)), "token.signature"},
		{"a stranger's key under a known id", sign(t, jose.ES256, stranger, "k1", "JWT", good(p.URL)), "token.signature"},
		{"a stranger's key under no id", sign(t, jose.ES256, stranger, "", "JWT", good(p.URL)), "token.signature"},
		{"claims of another token", body[0] + "." + b64([]byte(`{"iss":"`+p.URL+`","aud":"coffer","sub":"root","iat":1772452800,"exp":1772453400}`)) + "." + body[2], "token.signature"},
		{"another issuer", es(with("iss", "https://evil.example")), "token.issuer"},
		{"the issuer with a slash more", es(with("iss", p.URL+"/")), "token.issuer"},
		{"no issuer", es(without("iss")), "token.issuer"},
		{"another audience", es(with("aud", "other")), "token.audience"},
		{"no audience", es(without("aud")), "token.audience"},
		{"two audiences, for the other party", es(with("aud", []string{"coffer", "other"})), "token.audience"},
		{"given to another party", es(with("azp", "other")), "token.audience"},
		{"expired", es(with("exp", noon.Add(-identity.Skew).Unix())), "token.expired"},
		{"no expiry", es(without("exp")), "token.lifetime"},
		{"an expiry that is no date", es(with("exp", 1e300)), "token.lifetime"},
		{"no time of issue", es(without("iat")), "token.lifetime"},
		{"issued too long ago for any expiry", es(with("iat", noon.Add(-identity.MaxLifetime-identity.Skew).Unix())), "token.expired"},
		{"not yet valid", es(with("nbf", noon.Add(identity.Skew+time.Second).Unix())), "token.not-yet-valid"},
		{"issued in the future", es(with("iat", noon.Add(identity.Skew+time.Second).Unix())), "token.not-yet-valid"},
		{"no name", es(without("sub")), "token.name"},
		{"a name that is a number", es(with("sub", 7)), "token.malformed"},
		{"a name with a line break", es(with("sub", "alice\nroot")), "token.name"},
		{"a name like a SPIFFE path", es(with("sub", "agent/node-1")), "token.name"},
		{"groups that are one string", es(with("groups", "weights-approvers")), "token.groups"},
		{"too many groups", es(with("groups", make([]string, 1001))), "token.groups"},
		{"a logout token", sign(t, jose.ES256, key, "k1", "logout+jwt", good(p.URL)), "token.type"},
		{"an access token", sign(t, jose.ES256, key, "k1", "at+jwt", good(p.URL)), "token.type"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := v.Verify(t.Context(), tc.token)
			if got := code(t, err); got != tc.want {
				t.Errorf("%s, want %s", got, tc.want)
			}
		})
	}
	if _, err := newVerifier(t, p, newClock(), func(i *identity.Issuer) { i.Domain = "example.org" }).Verify(t.Context(), es(with("sub", "alice@other.org"))); code(t, err) != "token.name" {
		t.Error("a name brings its own domain:", err)
	}
	none, err := identity.New(nil, nil, newClock().now)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := none.Verify(t.Context(), control); code(t, err) != "token.issuer" {
		t.Error("accepted without an issuer:", err)
	}
}

func TestConfiguration(t *testing.T) {
	ok := identity.Issuer{URL: "https://id.example", Audience: "coffer"}
	for name, change := range map[string]func(*identity.Issuer){
		"control":           func(*identity.Issuer) {},
		"http":              func(i *identity.Issuer) { i.URL = "http://id.example" },
		"no url":            func(i *identity.Issuer) { i.URL = "" },
		"a query":           func(i *identity.Issuer) { i.URL += "?x=1" },
		"no audience":       func(i *identity.Issuer) { i.Audience = "" },
		"alg none":          func(i *identity.Issuer) { i.Algorithms = []string{"none"} },
		"alg HS256":         func(i *identity.Issuer) { i.Algorithms = []string{"ES256", "HS256"} },
		"assurance of 4":    func(i *identity.Issuer) { i.Assurance = map[string]int{"x": 4} },
		"a domain of space": func(i *identity.Issuer) { i.Domain = "a b" },
	} {
		i := ok
		change(&i)
		if _, err := identity.New([]identity.Issuer{i}, http.DefaultClient, newClock().now); (err == nil) != (name == "control") {
			t.Errorf("%s: %v", name, err)
		}
	}
	other := identity.Issuer{URL: "https://id2.example", Audience: "coffer"}
	if _, err := identity.New([]identity.Issuer{ok, other}, http.DefaultClient, newClock().now); err == nil {
		t.Error("two issuers give the same names")
	}
	other.Domain = "two.example"
	if _, err := identity.New([]identity.Issuer{ok, other}, http.DefaultClient, newClock().now); err != nil {
		t.Error(err)
	}
}

func TestKeysChange(t *testing.T) {
	old, oldJWK := newKey(t, "old")
	next, nextJWK := newKey(t, "next")
	p, c := newProvider(t, oldJWK), newClock()
	v := newVerifier(t, p, c, nil)
	verify := func(key *ecdsa.PrivateKey, kid string) error {
		claims := good(p.URL)
		claims["iat"], claims["exp"] = c.now().Unix(), c.now().Add(time.Minute).Unix()
		_, err := v.Verify(t.Context(), sign(t, jose.ES256, key, kid, "JWT", claims))
		return err
	}
	if err := verify(old, "old"); err != nil {
		t.Fatal(err)
	}
	p.mu.Lock()
	p.keys = []jose.JSONWebKey{oldJWK, nextJWK}
	p.mu.Unlock()
	// A flood of tokens with unknown keys makes no flood of requests.
	for i := range 50 {
		if err := verify(next, fmt.Sprint("made-up-", i)); code(t, err) != "token.signature" {
			t.Fatal(err)
		}
	}
	if n := p.fetches.Load(); n != 1 {
		t.Errorf("asked for keys %d times within a moment", n)
	}
	c.advance(11 * time.Second)
	if err := verify(next, "next"); err != nil {
		t.Error("a new key:", err)
	}
	p.mu.Lock()
	p.keys = []jose.JSONWebKey{nextJWK}
	p.mu.Unlock()
	if err := verify(old, "old"); err != nil {
		t.Error("a withdrawn key within its time:", err)
	}
	c.advance(16 * time.Minute)
	if err := verify(old, "old"); code(t, err) != "token.signature" {
		t.Error("a withdrawn key:", err)
	}
	p.down.Store(true)
	if err := verify(next, "next"); err != nil {
		t.Error("an issuer that is down, its keys being known:", err)
	}
	c.advance(16 * time.Minute)
	if err := verify(next, "next"); !errors.Is(err, identity.ErrUnavailable) {
		t.Error("an issuer that is down, its keys being old:", err)
	}
	p.down.Store(false)
	c.advance(11 * time.Second)
	if err := verify(next, "next"); err != nil {
		t.Error("an issuer that is back:", err)
	}
}

func TestIssuerThatMisbehaves(t *testing.T) {
	key, jwk := newKey(t, "k1")
	for name, change := range map[string]func(*provider){
		"names another issuer": func(p *provider) { p.says = "https://other.example" },
		"answers without end":  func(p *provider) { p.huge.Store(true) },
		"has no keys":          func(p *provider) { p.keys = nil },
		"is down":              func(p *provider) { p.down.Store(true) },
	} {
		p := newProvider(t, jwk)
		change(p)
		if _, err := newVerifier(t, p, newClock(), nil).Verify(t.Context(), sign(t, jose.ES256, key, "k1", "JWT", good(p.URL))); !errors.Is(err, identity.ErrUnavailable) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// An issuer that does not answer keeps nobody waiting whose keys are known.
func TestHangingIssuer(t *testing.T) {
	key, jwk := newKey(t, "k1")
	p, c := newProvider(t, jwk), newClock()
	v := newVerifier(t, p, c, nil)
	token := sign(t, jose.ES256, key, "k1", "JWT", good(p.URL))
	if _, err := v.Verify(t.Context(), token); err != nil {
		t.Fatal(err)
	}
	c.advance(11 * time.Second)
	p.mu.Lock()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := v.Verify(ctx, sign(t, jose.ES256, key, "unknown", "JWT", good(p.URL)))
		done <- err
	}()
	for range 100 {
		if _, err := v.Verify(t.Context(), token); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	if err := <-done; err == nil {
		t.Error("verified under an unknown key")
	}
	p.mu.Unlock()
}

func TestBearer(t *testing.T) {
	for _, tc := range []struct {
		header []string
		want   string
		ok     bool
	}{
		{nil, "", true},
		{[]string{"Bearer a.b.c"}, "a.b.c", true},
		{[]string{"bearer a.b.c"}, "a.b.c", true},
		{[]string{"Bearer "}, "", false},
		{[]string{"Bearer"}, "", false},
		{[]string{"Basic a.b.c"}, "", false},
		{[]string{"Bearer a", "Bearer b"}, "", false},
	} {
		r := httptest.NewRequest(http.MethodGet, "/", http.NoBody)
		r.Header["Authorization"] = tc.header
		if got, err := identity.Bearer(r); got != tc.want || (err == nil) != tc.ok {
			t.Errorf("%q: %q, %v", tc.header, got, err)
		}
	}
}

func FuzzVerify(f *testing.F) {
	key, jwk := newKey(f, "k1")
	p := newProvider(f, jwk)
	v := newVerifier(f, p, newClock(), nil)
	token := sign(f, jose.ES256, key, "k1", "JWT", good(p.URL))
	f.Add(token)
	f.Add(strings.Replace(token, ".", "..", 1))
	f.Fuzz(func(t *testing.T, s string) {
		if got, err := v.Verify(t.Context(), s); err == nil && s != token {
			t.Errorf("%q is of %+v", s, got)
		}
	})
}

// An issuer whose people bring whole names is believed for none that another
// issuer gives.
func TestNamesOfAnotherIssuer(t *testing.T) {
	key, jwk := newKey(t, "k1")
	mail, corp := newProvider(t, jwk), newProvider(t, jwk)
	roots := mail.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs
	roots.AddCert(corp.Certificate())
	for _, tc := range []struct{ name, want string }{
		{"eve@mail.example", ""}, {"eve", ""}, {"eve@sub.corp.example", ""}, {"alice@corp.example", "token.name"}, {"alice@CORP.example", "token.name"},
	} {
		v, err := identity.New([]identity.Issuer{
			{URL: mail.URL, Audience: "coffer", NameClaim: "email"}, {URL: corp.URL, Audience: "coffer", Domain: "corp.example"},
		}, mail.Client(), newClock().now)
		if err != nil {
			t.Fatal(err)
		}
		c := good(mail.URL)
		c["email"] = tc.name
		p, err := v.Verify(t.Context(), sign(t, jose.ES256, key, "k1", "JWT", c))
		switch {
		case tc.want == "" && (err != nil || p.Name != tc.name):
			t.Errorf("%s: %v", tc.name, err)
		case tc.want != "" && (err == nil || code(t, err) != tc.want):
			t.Errorf("%s of one issuer passes for the other's", tc.name)
		}
	}
	if _, err := identity.New([]identity.Issuer{{URL: mail.URL, Audience: "coffer", Domain: "corp.example"}, {URL: corp.URL, Audience: "coffer", Domain: "Corp.example"}}, mail.Client(), newClock().now); err == nil {
		t.Error("two issuers have one domain in other letters")
	}
}
