// Package issuer is the embedded stack's OpenID provider: people of a file sign
// in with a password, by the device flow (RFC 8628), and get ID tokens.
//
// Trusted: the file of people, the signing key and the clock. Checked: passwords
// (bcrypt, with a limit on attempts), codes, that a device code and a refresh
// token serve once, and that a person is still in the file. Not done: several
// factors, sign-in at a browser for other clients, and state that outlives the
// process: who was signed in signs in again. A site with an identity provider
// uses that one.
package issuer

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"html/template"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"
)

const (
	// ClientID is the command line towards the broker, NodeClientID the command line
	// towards nodes. Tokens for the one are none for the other: a node that is sent a
	// token must not be able to use it at the broker.
	ClientID     = "coffer"
	NodeClientID = "coffer-node"
	// Algorithm is what tokens are signed with.
	Algorithm = "ES384"
	// GroupsClaim is the claim with a person's groups.
	GroupsClaim = "groups"

	// TokenLifetime is that of an ID token, SessionLifetime how long after the
	// sign-in it can be renewed.
	TokenLifetime   = 10 * time.Minute
	SessionLifetime = 12 * time.Hour
	// codeLifetime is how long a person may take to sign in, pollInterval how
	// often the command line may ask meanwhile.
	codeLifetime = 5 * time.Minute
	pollInterval = time.Second
	// maxBody bounds a request, in bytes.
	maxBody = 16 << 10

	devicePath    = "/device"
	discoveryPath = "/.well-known/openid-configuration"
	keysPath      = "/keys"
	tokenPath     = "/token"
	codePath      = "/device_authorization"
)

// Options are what New needs. All are required.
type Options struct {
	// URL is the issuer's, https://HOST:PORT without a path.
	URL string
	// Key signs tokens: P-384.
	Key    *ecdsa.PrivateKey
	People *People
	Now    func() time.Time
	Log    *slog.Logger
}

// New returns the provider's handler.
func New(o Options) (http.Handler, error) {
	u, err := url.Parse(o.URL)
	switch {
	case err != nil || u.Scheme != "https" || u.Host == "" || u.Path != "" || u.RawQuery != "" || u.User != nil:
		return nil, fmt.Errorf("issuer %.120q: want https://HOST:PORT", o.URL)
	case o.Key == nil || o.Key.Curve.Params().BitSize != 384:
		return nil, errors.New("issuer: want a P-384 key")
	case o.People == nil || o.Now == nil || o.Log == nil:
		return nil, errors.New("issuer needs people, a clock and a logger")
	}
	public, err := o.Key.PublicKey.Bytes()
	if err != nil {
		return nil, fmt.Errorf("issuer: %w", err)
	}
	id := sha256.Sum256(public)
	s := newStorage(o.People, o.Now, signingKey{o.Key, base64.RawURLEncoding.EncodeToString(id[:12])})
	config := &op.Config{
		GrantTypeRefreshToken: true,
		SupportedScopes:       []string{oidc.ScopeOpenID, oidc.ScopeOfflineAccess},
		DeviceAuthorization:   op.DeviceAuthorizationConfig{Lifetime: codeLifetime, PollInterval: pollInterval, UserFormPath: devicePath, UserCode: op.UserCodeBase20},
	}
	if _, err := rand.Read(config.CryptoKey[:]); err != nil {
		return nil, err
	}
	provider, err := op.NewProvider(config, s, op.StaticIssuer(o.URL), op.WithLogger(o.Log), op.WithCORSOptions(nil),
		op.WithCustomTokenEndpoint(op.NewEndpoint(tokenPath)), op.WithCustomDeviceAuthorizationEndpoint(op.NewEndpoint(codePath)), op.WithCustomKeysEndpoint(op.NewEndpoint(keysPath)))
	if err != nil {
		return nil, fmt.Errorf("issuer: %w", err)
	}
	// The provider can do more than is used here: what is not listed is not there.
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+discoveryPath, func(w http.ResponseWriter, _ *http.Request) { op.Discover(w, discovery(o.URL)) })
	mux.Handle("GET "+keysPath, provider)
	mux.Handle("POST "+codePath, form(provider, func(f url.Values) bool { return known(f.Get("client_id")) }))
	mux.Handle("POST "+tokenPath, form(provider, func(f url.Values) bool {
		g := f.Get("grant_type")
		return known(f.Get("client_id")) && (g == string(oidc.GrantTypeDeviceCode) || g == string(oidc.GrantTypeRefreshToken))
	}))
	d := &device{storage: s, log: o.Log}
	mux.HandleFunc("GET "+devicePath, d.show)
	mux.Handle("POST "+devicePath, form(http.HandlerFunc(d.decide), func(url.Values) bool { return true }))
	return mux, nil
}

func discovery(issuer string) *oidc.DiscoveryConfiguration {
	return &oidc.DiscoveryConfiguration{
		Issuer: issuer, TokenEndpoint: issuer + tokenPath, DeviceAuthorizationEndpoint: issuer + codePath, JwksURI: issuer + keysPath,
		ScopesSupported:                  []string{oidc.ScopeOpenID, oidc.ScopeOfflineAccess},
		GrantTypesSupported:              []oidc.GrantType{oidc.GrantTypeDeviceCode, oidc.GrantTypeRefreshToken},
		SubjectTypesSupported:            []string{"public"},
		IDTokenSigningAlgValuesSupported: []string{Algorithm}, TokenEndpointAuthMethodsSupported: []oidc.AuthMethod{oidc.AuthMethodNone},
		ClaimsSupported: []string{"iss", "sub", "aud", "exp", "iat", "auth_time", "amr", GroupsClaim},
	}
}

// form lets small forms through in which no field stands twice and accept
// holds.
func form(next http.Handler, accept func(url.Values) bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		ok := r.ParseForm() == nil && r.URL.RawQuery == "" && r.Header.Get("Authorization") == ""
		for _, v := range r.PostForm {
			ok = ok && len(v) == 1
		}
		if !ok || !accept(r.PostForm) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusBadRequest)
			_, _ = w.Write([]byte(`{"error":"invalid_request"}` + "\n"))
			return
		}
		next.ServeHTTP(w, r)
	})
}

// device is the page on which a person lets the command line in.
type device struct {
	storage *storage
	log     *slog.Logger
}

var page = template.Must(template.New("device").Parse(`<!DOCTYPE html>
<html lang="en">
<title>coffer: sign in</title>
<h1>Sign in to coffer</h1>
{{with .Message}}<p><strong>{{.}}</strong></p>
{{end}}{{if .Form}}<p>Let the command line that shows this code act for you. If you have not started it yourself, close this page.</p>
<form method="post" action="/device" autocomplete="off">
<p><label>Code <input name="user_code" value="{{.Code}}" required></label></p>
<p><label>Name <input name="username" required autofocus></label></p>
<p><label>Password <input name="password" type="password" required></label></p>
<p><button name="action" value="allow">Sign in</button> <button name="action" value="deny">Refuse</button></p>
</form>
{{end}}</html>
`))

func (d *device) render(w http.ResponseWriter, status int, message, code string, withForm bool) {
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", "default-src 'none'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = page.Execute(w, struct {
		Message, Code string
		Form          bool
	}{message, code, withForm})
}

func (d *device) show(w http.ResponseWriter, r *http.Request) {
	code := r.URL.Query().Get("user_code")
	if len(code) > 32 {
		code = ""
	}
	d.render(w, http.StatusOK, "", code, true)
}

// decide takes the form. Whoever does not know a password learns nothing about
// codes.
func (d *device) decide(w http.ResponseWriter, r *http.Request) {
	code, name := strings.ToUpper(strings.TrimSpace(r.PostForm.Get("user_code"))), r.PostForm.Get("username")
	action := r.PostForm.Get("action")
	if action != "allow" && action != "deny" || len(code) > 32 || len(name) > maxName {
		d.render(w, http.StatusBadRequest, "That was not this form.", "", true)
		return
	}
	err := d.storage.people.check(r.Context(), name, r.PostForm.Get("password"), d.storage.now())
	if errors.Is(err, errTooMany) {
		d.log.LogAttrs(r.Context(), slog.LevelWarn, "sign-in not tried: too many attempts", slog.String("user", name))
		d.render(w, http.StatusTooManyRequests, "Too many attempts. Wait a minute.", code, true)
		return
	}
	if err != nil {
		d.log.LogAttrs(r.Context(), slog.LevelWarn, "sign-in failed", slog.String("user", name))
		d.render(w, http.StatusForbidden, "Name or password is wrong.", code, true)
		return
	}
	if err := d.storage.decide(code, name, action == "allow"); err != nil {
		d.render(w, http.StatusNotFound, "Nobody waits for this code. It may have expired.", "", true)
		return
	}
	d.log.LogAttrs(r.Context(), slog.LevelInfo, "sign-in", slog.String("user", name), slog.String("action", action))
	if action == "deny" {
		d.render(w, http.StatusOK, "Refused. You can close this page.", "", false)
		return
	}
	d.render(w, http.StatusOK, "Signed in. You can close this page.", "", false)
}

// signingKey implements op.SigningKey and, as publicKey, op.Key.
type signingKey struct {
	key *ecdsa.PrivateKey
	id  string
}

func (k signingKey) SignatureAlgorithm() jose.SignatureAlgorithm { return jose.ES384 }
func (k signingKey) Key() any                                    { return k.key }
func (k signingKey) ID() string                                  { return k.id }

type publicKey struct{ signingKey }

func (k publicKey) Algorithm() jose.SignatureAlgorithm { return jose.ES384 }
func (k publicKey) Use() string                        { return "sig" }
func (k publicKey) Key() any                           { return &k.key.PublicKey }

// known reports whether id is one of the clients.
func known(id string) bool { return id == ClientID || id == NodeClientID }

// client is the command line: public, by device code and refresh token alone.
type client struct{ id string }

func (c client) GetID() string                      { return c.id }
func (client) RedirectURIs() []string               { return nil }
func (client) PostLogoutRedirectURIs() []string     { return nil }
func (client) ApplicationType() op.ApplicationType  { return op.ApplicationTypeNative }
func (client) AuthMethod() oidc.AuthMethod          { return oidc.AuthMethodNone }
func (client) ResponseTypes() []oidc.ResponseType   { return nil }
func (client) LoginURL(string) string               { return "" }
func (client) AccessTokenType() op.AccessTokenType  { return op.AccessTokenTypeBearer }
func (client) IDTokenLifetime() time.Duration       { return TokenLifetime }
func (client) DevMode() bool                        { return false }
func (client) IsScopeAllowed(scope string) bool     { return scope == oidc.ScopeOfflineAccess }
func (client) IDTokenUserinfoClaimsAssertion() bool { return true }
func (client) ClockSkew() time.Duration             { return 0 }
func (client) GrantTypes() []oidc.GrantType {
	return []oidc.GrantType{oidc.GrantTypeDeviceCode, oidc.GrantTypeRefreshToken}
}

func (client) RestrictAdditionalIdTokenScopes() func([]string) []string {
	return func(s []string) []string { return s }
}

func (client) RestrictAdditionalAccessTokenScopes() func([]string) []string {
	return func(s []string) []string { return s }
}

// session is one sign-in: what refresh tokens stand for.
type session struct {
	user   string
	client string
	at     time.Time
	scopes []string
}

// GetAMR and what follows implement op.RefreshTokenRequest.
func (s *session) GetAMR() []string                 { return []string{"pwd"} }
func (s *session) GetAudience() []string            { return []string{s.client} }
func (s *session) GetAuthTime() time.Time           { return s.at }
func (s *session) GetClientID() string              { return s.client }
func (s *session) GetScopes() []string              { return slices.Clone(s.scopes) }
func (s *session) GetSubject() string               { return s.user }
func (s *session) SetCurrentScopes(scopes []string) { s.scopes = scopes }

var _ interface {
	op.Storage
	op.DeviceAuthorizationStorage
	op.CanSetUserinfoFromRequest
} = (*storage)(nil)

var errUnused = errors.New("this provider does not do that")

// What follows is of flows that have no address here.

func (s *storage) CreateAuthRequest(context.Context, *oidc.AuthRequest, string) (op.AuthRequest, error) {
	return nil, errUnused
}

func (s *storage) AuthRequestByID(context.Context, string) (op.AuthRequest, error) {
	return nil, errUnused
}

func (s *storage) AuthRequestByCode(context.Context, string) (op.AuthRequest, error) {
	return nil, errUnused
}
func (s *storage) SaveAuthCode(context.Context, string, string) error     { return errUnused }
func (s *storage) DeleteAuthRequest(context.Context, string) error        { return errUnused }
func (s *storage) TerminateSession(context.Context, string, string) error { return errUnused }
func (s *storage) RevokeToken(context.Context, string, string, string) *oidc.Error {
	return oidc.ErrInvalidRequest()
}

func (s *storage) GetRefreshTokenInfo(context.Context, string, string) (userID, tokenID string, err error) {
	return "", "", op.ErrInvalidRefreshToken
}

func (s *storage) AuthorizeClientIDSecret(context.Context, string, string) error { return errUnused }
func (s *storage) SetUserinfoFromToken(context.Context, *oidc.UserInfo, string, string, string) error {
	return errUnused
}

func (s *storage) SetIntrospectionFromToken(context.Context, *oidc.IntrospectionResponse, string, string, string) error {
	return errUnused
}

func (s *storage) GetPrivateClaimsFromScopes(context.Context, string, string, []string) (map[string]any, error) {
	return nil, errUnused
}

func (s *storage) GetKeyByIDAndClientID(context.Context, string, string) (*jose.JSONWebKey, error) {
	return nil, errUnused
}

func (s *storage) ValidateJWTProfileScopes(context.Context, string, []string) ([]string, error) {
	return nil, errUnused
}
