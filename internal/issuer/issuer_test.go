package issuer_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/oauth2"

	"github.com/coffer-run/coffer/internal/identity"
	"github.com/coffer-run/coffer/internal/issuer"
)

const password = "correct horse battery"

// hash is made once: bcrypt is slow on purpose.
var hash = sync.OnceValue(func() string {
	h, err := issuer.HashPassword(password)
	if err != nil {
		panic(err)
	}
	return h
})

type world struct {
	t      *testing.T
	server *httptest.Server
	config oauth2.Config
	ahead  atomic.Int64
	ctx    context.Context
}

func (w *world) now() time.Time { return time.Now().Add(time.Duration(w.ahead.Load())) }

func newWorld(t *testing.T) *world {
	t.Helper()
	file, err := issuer.EncodePeople([]issuer.Person{{Name: "alice", Groups: []string{"weights-approvers"}, Hash: hash()}, {Name: "bob", Groups: []string{}, Hash: hash()}})
	if err != nil {
		t.Fatal(err)
	}
	people, err := issuer.ParsePeople(file)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, server: httptest.NewUnstartedServer(nil)}
	w.server.StartTLS()
	t.Cleanup(w.server.Close)
	h, err := issuer.New(issuer.Options{URL: w.server.URL, Key: key, People: people, Now: w.now, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	w.server.Config.Handler = h
	w.config = oauth2.Config{ClientID: issuer.ClientID, Scopes: []string{"openid", "offline_access"}, Endpoint: oauth2.Endpoint{
		DeviceAuthURL: w.server.URL + "/device_authorization", TokenURL: w.server.URL + "/token", AuthStyle: oauth2.AuthStyleInParams,
	}}
	w.ctx = context.WithValue(t.Context(), oauth2.HTTPClient, w.server.Client())
	return w
}

// submit posts the form of the device page.
func (w *world) submit(code, name, pass, action string) (int, string) {
	w.t.Helper()
	res, err := w.server.Client().PostForm(w.server.URL+"/device", url.Values{"user_code": {code}, "username": {name}, "password": {pass}, "action": {action}})
	if err != nil {
		w.t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return res.StatusCode, string(b)
}

func (w *world) begin() *oauth2.DeviceAuthResponse {
	w.t.Helper()
	d, err := w.config.DeviceAuth(w.ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	return d
}

// poll asks for a token once.
func (w *world) poll(values url.Values) (*oauth2.Token, string) {
	w.t.Helper()
	values.Set("client_id", issuer.ClientID)
	res, err := w.server.Client().PostForm(w.server.URL+"/token", values)
	if err != nil {
		w.t.Fatal(err)
	}
	defer res.Body.Close()
	var out struct {
		Error   string `json:"error"`
		ID      string `json:"id_token"`
		Refresh string `json:"refresh_token"`
	}
	if err := json.NewDecoder(res.Body).Decode(&out); err != nil {
		w.t.Fatal(err)
	}
	return &oauth2.Token{AccessToken: out.ID, RefreshToken: out.Refresh}, out.Error
}

func device(d *oauth2.DeviceAuthResponse) url.Values {
	return url.Values{"grant_type": {"urn:ietf:params:oauth:grant-type:device_code"}, "device_code": {d.DeviceCode}}
}

func renew(t *oauth2.Token) url.Values {
	return url.Values{"grant_type": {"refresh_token"}, "refresh_token": {t.RefreshToken}}
}

// who is whom the broker's own check finds in a token.
func (w *world) who(token string) (identity.Person, error) {
	w.t.Helper()
	v, err := identity.New([]identity.Issuer{{URL: w.server.URL, Audience: issuer.ClientID, Algorithms: []string{issuer.Algorithm}}}, w.server.Client(), w.now)
	if err != nil {
		w.t.Fatal(err)
	}
	return v.Verify(w.t.Context(), token)
}

func TestDeviceFlow(t *testing.T) {
	w := newWorld(t)
	d := w.begin()
	if !strings.HasPrefix(d.VerificationURIComplete, w.server.URL+"/device?user_code=") || d.Interval != 1 {
		t.Errorf("%+v", d)
	}
	if _, e := w.poll(device(d)); e != "authorization_pending" {
		t.Errorf("before: %q", e)
	}
	for name, tc := range map[string]struct{ code, name, pass string }{
		"wrong password":    {d.UserCode, "alice", "wrong"},
		"no password":       {d.UserCode, "alice", ""},
		"nobody":            {d.UserCode, "mallory", password},
		"another's code":    {"AAAA-AAAA", "alice", password},
		"no code":           {"", "alice", password},
		"a name with paths": {d.UserCode, "../alice", password},
	} {
		if status, _ := w.submit(tc.code, tc.name, tc.pass, "allow"); status == http.StatusOK {
			t.Errorf("%s: signed in", name)
		}
	}
	if _, e := w.poll(device(d)); e != "authorization_pending" {
		t.Errorf("after failures: %q", e)
	}
	if status, text := w.submit(strings.ToLower(d.UserCode), "alice", password, "allow"); status != http.StatusOK || !strings.Contains(text, "Signed in") {
		t.Fatalf("%d %s", status, text)
	}
	if status, _ := w.submit(d.UserCode, "bob", password, "allow"); status == http.StatusOK {
		t.Error("a code that is decided was taken over")
	}
	token, err := w.config.DeviceAccessToken(w.ctx, d)
	if err != nil {
		t.Fatal(err)
	}
	raw, _ := token.Extra("id_token").(string)
	p, err := w.who(raw)
	if err != nil || p.Name != "alice" || !slices.Equal(p.Groups, []string{"weights-approvers"}) || p.Assurance != 1 || p.SignedIn.IsZero() {
		t.Errorf("%+v, %v", p, err)
	}
	if got, e := w.poll(device(d)); e != "access_denied" || got.AccessToken != "" {
		t.Errorf("the device code served twice: %q", e)
	}
	w.ahead.Store(int64(issuer.TokenLifetime + time.Minute))
	if _, err := w.who(raw); err == nil {
		t.Error("the token does not end")
	}
}

func TestRefuseAndExpire(t *testing.T) {
	w := newWorld(t)
	d := w.begin()
	if status, text := w.submit(d.UserCode, "alice", password, "deny"); status != http.StatusOK || !strings.Contains(text, "Refused") {
		t.Fatalf("%d %s", status, text)
	}
	if _, e := w.poll(device(d)); e != "access_denied" {
		t.Errorf("refused: %q", e)
	}
	d = w.begin()
	w.ahead.Store(int64(6 * time.Minute))
	if status, _ := w.submit(d.UserCode, "alice", password, "allow"); status == http.StatusOK {
		t.Error("signed in under an expired code")
	}
	if _, e := w.poll(device(d)); e != "access_denied" {
		t.Errorf("expired: %q", e)
	}
}

func (w *world) signIn(name string) *oauth2.Token {
	w.t.Helper()
	d := w.begin()
	if status, text := w.submit(d.UserCode, name, password, "allow"); status != http.StatusOK {
		w.t.Fatal(text)
	}
	token, e := w.poll(device(d))
	if e != "" || token.RefreshToken == "" {
		w.t.Fatal(e)
	}
	return token
}

func TestRefreshTokensRotate(t *testing.T) {
	w := newWorld(t)
	first, other := w.signIn("alice"), w.signIn("alice")
	second, e := w.poll(renew(first))
	if e != "" || second.RefreshToken == first.RefreshToken {
		t.Fatalf("%q", e)
	}
	p, err := w.who(second.AccessToken)
	if err != nil || p.Name != "alice" || len(p.Groups) != 1 {
		t.Errorf("%+v, %v", p, err)
	}
	if _, e := w.poll(renew(first)); e != "invalid_grant" {
		t.Errorf("a used refresh token: %q", e)
	}
	if _, e := w.poll(renew(second)); e != "invalid_grant" {
		t.Errorf("the session goes on after its token was copied: %q", e)
	}
	if _, e := w.poll(renew(other)); e != "" {
		t.Errorf("another session ended too: %q", e)
	}
	third := w.signIn("alice")
	w.ahead.Store(int64(issuer.SessionLifetime + time.Minute))
	if _, e := w.poll(renew(third)); e != "invalid_grant" {
		t.Errorf("a session without end: %q", e)
	}
}

// Of two who use one refresh token at once, at most one gets anything.
func TestRefreshRace(t *testing.T) {
	w := newWorld(t)
	token := w.signIn("alice")
	var got atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, e := w.poll(renew(token)); e == "" {
				got.Add(1)
			}
		})
	}
	wg.Wait()
	if got.Load() > 1 {
		t.Errorf("%d tokens for one", got.Load())
	}
}

func TestTooManyAttempts(t *testing.T) {
	w := newWorld(t)
	d := w.begin()
	for range 5 {
		if status, _ := w.submit(d.UserCode, "alice", "wrong", "allow"); status != http.StatusForbidden {
			t.Fatalf("status %d", status)
		}
	}
	if status, _ := w.submit(d.UserCode, "alice", password, "allow"); status != http.StatusTooManyRequests {
		t.Errorf("a sixth attempt: %d", status)
	}
	if status, _ := w.submit(d.UserCode, "bob", password, "deny"); status != http.StatusOK {
		t.Errorf("bob pays for alice: %d", status)
	}
	w.ahead.Store(int64(time.Minute))
	if status, _ := w.submit(w.begin().UserCode, "alice", password, "allow"); status != http.StatusOK {
		t.Errorf("a minute later: %d", status)
	}
}

func TestWhatIsNotThere(t *testing.T) {
	w := newWorld(t)
	for _, path := range []string{"/authorize", "/userinfo", "/oauth/introspect", "/revoke", "/end_session", "/callback", "/authorize/callback", "/ready", "/"} {
		res, err := w.server.Client().Get(w.server.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %s", path, res.Status)
		}
	}
	for name, body := range map[string]string{
		"another grant type": "client_id=coffer&grant_type=client_credentials",
		"another client":     "client_id=x&grant_type=refresh_token&refresh_token=y",
		"a password":         "client_id=coffer&grant_type=password&username=alice&password=x",
		"a field twice":      "client_id=coffer&grant_type=refresh_token&refresh_token=x&refresh_token=y",
		"no form":            "%zz",
		"nothing":            "",
		"a large form":       "client_id=coffer&grant_type=refresh_token&refresh_token=" + strings.Repeat("x", 32<<10),
	} {
		res, err := w.server.Client().Post(w.server.URL+"/token", "application/x-www-form-urlencoded", strings.NewReader(body))
		if err != nil {
			t.Fatal(name, err)
		}
		res.Body.Close()
		if res.StatusCode != http.StatusBadRequest {
			t.Errorf("%s: %s", name, res.Status)
		}
	}
}

func TestPage(t *testing.T) {
	w := newWorld(t)
	res, err := w.server.Client().Get(w.server.URL + "/device?user_code=" + url.QueryEscape(`"><script>`))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil || strings.Contains(string(b), "<script") || !strings.Contains(res.Header.Get("Content-Security-Policy"), "default-src 'none'") {
		t.Errorf("%v %v %s", err, res.Header, b)
	}
}

func TestParsePeople(t *testing.T) {
	weak := "$2a$04$" + hash()[7:]
	for name, tc := range map[string]struct {
		people []issuer.Person
		ok     bool
	}{
		"one":           {[]issuer.Person{{Name: "alice", Hash: hash()}}, true},
		"nobody":        {nil, false},
		"a name twice":  {[]issuer.Person{{Name: "alice", Hash: hash()}, {Name: "alice", Hash: hash()}}, false},
		"no name":       {[]issuer.Person{{Hash: hash()}}, false},
		"no hash":       {[]issuer.Person{{Name: "alice"}}, false},
		"a plain text":  {[]issuer.Person{{Name: "alice", Hash: password}}, false},
		"a cheap hash":  {[]issuer.Person{{Name: "alice", Hash: weak}}, false},
		"a capital one": {[]issuer.Person{{Name: "Alice", Hash: hash()}}, false},
	} {
		b, err := issuer.EncodePeople(tc.people)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := issuer.ParsePeople(b); (err == nil) != tc.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, p := range []string{"", "short", strings.Repeat("x", 73)} {
		if _, err := issuer.HashPassword(p); err == nil {
			t.Errorf("password %q", p)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := issuer.Options{URL: "https://127.0.0.1:1", Key: p384, People: &issuer.People{}, Now: time.Now, Log: slog.New(slog.DiscardHandler)}
	if _, err := issuer.New(good); err != nil {
		t.Fatal("control:", err)
	}
	for name, change := range map[string]func(*issuer.Options){
		"http":        func(o *issuer.Options) { o.URL = "http://127.0.0.1:1" },
		"a path":      func(o *issuer.Options) { o.URL += "/x" },
		"no key":      func(o *issuer.Options) { o.Key = nil },
		"another key": func(o *issuer.Options) { o.Key = p256 },
		"nobody":      func(o *issuer.Options) { o.People = nil },
		"no clock":    func(o *issuer.Options) { o.Now = nil },
		"no logger":   func(o *issuer.Options) { o.Log = nil },
	} {
		o := good
		change(&o)
		if _, err := issuer.New(o); err == nil {
			t.Errorf("%s: made", name)
		}
	}
}
