package main

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/spf13/cobra"
	"github.com/zalando/go-keyring"
	"golang.org/x/oauth2"
	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
	"github.com/coffer-run/coffer/internal/issuer"
	"github.com/coffer-run/coffer/internal/stack"
)

const (
	userVariable     = "COFFER_USER"
	sessionsVariable = "COFFER_SESSIONS"
	// keyringService is the name under which the user's keyring has the sessions.
	keyringService = "coffer"
	// renewBefore is how much of a token must be left for a call to begin.
	renewBefore = time.Minute
	// loginTimeout bounds a sign-in that nobody answers.
	loginTimeout = 10 * time.Minute
)

// session is one signed-in person. The tokens are as good as the person.
type session struct {
	Issuer  string    `json:"issuer"`
	Client  string    `json:"client"`
	ID      string    `json:"idToken"`
	Refresh string    `json:"refreshToken,omitempty"`
	Expires time.Time `json:"expires"`
	Groups  []string  `json:"groups,omitempty"`
}

// sessions are those at one stack, by name.
type sessions struct {
	// Current is who signed in last.
	Current string             `json:"current"`
	People  map[string]session `json:"people"`
	// Nodes are sessions at nodes, whose tokens are none for the broker.
	CurrentNode string             `json:"currentNode,omitempty"`
	Nodes       map[string]session `json:"nodes,omitempty"`
}

// at returns the sessions at nodes, or at the broker, and who signed in there last.
func (s *sessions) at(node bool) (people map[string]session, current *string) {
	if !node {
		return s.People, &s.Current
	}
	if s.Nodes == nil {
		s.Nodes = map[string]session{}
	}
	return s.Nodes, &s.CurrentNode
}

// sessionStore keeps the sessions at one stack: in the user's keyring if there
// is one, in a file that only the user can read otherwise.
type sessionStore struct {
	account string
	file    string
	keyring bool
}

func openSessions(e stack.Endpoint) (*sessionStore, error) {
	folder := os.Getenv(sessionsVariable)
	// Without a session bus the keyring's library would start one.
	ring := folder == "" && os.Getenv("DBUS_SESSION_BUS_ADDRESS") != ""
	if folder == "" {
		config, err := os.UserConfigDir()
		if err != nil {
			return nil, fmt.Errorf("find a place for sessions: %w; name one with %s", err, sessionsVariable)
		}
		folder = filepath.Join(config, "coffer", "sessions")
	}
	sum := sha256.Sum256([]byte(e.Dir()))
	s := &sessionStore{account: e.Dir(), file: filepath.Join(folder, hex.EncodeToString(sum[:8])+".json")}
	if ring {
		_, err := keyring.Get(keyringService, s.account)
		s.keyring = err == nil || errors.Is(err, keyring.ErrNotFound)
	}
	return s, nil
}

// lock lets one command at a time read and replace the sessions: a refresh token
// that is used twice ends its session.
func (s *sessionStore) lock() (unlock func(), err error) {
	if err := os.MkdirAll(filepath.Dir(s.file), 0o700); err != nil {
		return nil, fmt.Errorf("sessions: %w", err)
	}
	f, err := os.OpenFile(s.file+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("sessions: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("lock sessions: %w", err)
	}
	return func() { _ = f.Close() }, nil
}

func (s *sessionStore) load() (sessions, error) {
	out := sessions{People: map[string]session{}}
	var b []byte
	if s.keyring {
		text, err := keyring.Get(keyringService, s.account)
		if errors.Is(err, keyring.ErrNotFound) {
			return out, nil
		}
		if err != nil {
			return out, fmt.Errorf("sessions in the keyring: %w", err)
		}
		b = []byte(text)
	} else {
		var err error
		if b, err = keyfile.Read(s.file); errors.Is(err, fs.ErrNotExist) {
			return out, nil
		} else if err != nil {
			return out, err
		}
	}
	if err := json.Unmarshal(b, &out); err != nil || out.People == nil {
		return out, errors.Join(errors.New("sessions cannot be read: run `coffer logout --all`"), err)
	}
	return out, nil
}

func (s *sessionStore) save(v sessions) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if s.keyring {
		return keyring.Set(keyringService, s.account, string(b))
	}
	return keyfile.Write(s.file, b)
}

func (s *sessionStore) clear() error {
	if s.keyring {
		if err := keyring.Delete(keyringService, s.account); err != nil && !errors.Is(err, keyring.ErrNotFound) {
			return err
		}
	}
	if err := os.Remove(s.file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// provider is an OpenID provider that a person signs in at.
type provider struct {
	*oidc.Provider
	http   *http.Client
	config oauth2.Config
}

// provider asks an issuer where its addresses are. The stack's own has a
// certificate of the stack's authority, in its own role.
func (c *cli) provider(ctx context.Context, e stack.Endpoint, issuerURL, client string) (*provider, error) {
	h := &http.Client{Transport: &http.Transport{Proxy: http.ProxyFromEnvironment, ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12}}}
	if issuerURL == e.Issuer() {
		var err error
		if h, err = daemon.HTTPClientForPeople(e.CA(), daemon.RoleIssuer); err != nil {
			return nil, err
		}
	}
	h.CheckRedirect = func(*http.Request, []*http.Request) error { return errors.New("refusing to follow a redirect") }
	c.clients = append(c.clients, h)
	p, err := oidc.NewProvider(oidc.ClientContext(ctx, h), issuerURL)
	if err != nil {
		return nil, fmt.Errorf("issuer %s: %w", issuerURL, err)
	}
	endpoint := p.Endpoint()
	endpoint.AuthStyle = oauth2.AuthStyleInParams
	return &provider{p, h, oauth2.Config{ClientID: client, Endpoint: endpoint, Scopes: []string{oidc.ScopeOpenID, oidc.ScopeOfflineAccess}}}, nil
}

// session reads what a provider handed out. The broker checks it again.
func (p *provider) session(ctx context.Context, issuerURL string, t *oauth2.Token) (name string, out session, err error) {
	raw, _ := t.Extra("id_token").(string)
	id, err := p.Verifier(&oidc.Config{ClientID: p.config.ClientID}).Verify(oidc.ClientContext(ctx, p.http), raw)
	if err != nil {
		return "", session{}, fmt.Errorf("issuer %s: its token: %w", issuerURL, err)
	}
	var claims struct {
		Groups []string `json:"groups"`
	}
	// Other issuers name groups otherwise; they are only shown here.
	_ = id.Claims(&claims)
	return id.Subject, session{Issuer: issuerURL, Client: p.config.ClientID, ID: raw, Refresh: t.RefreshToken, Expires: id.Expiry, Groups: claims.Groups}, nil
}

func (c *cli) loginCmd() *cobra.Command {
	var issuerURL, client, passwordFile string
	var node bool
	cmd := &cobra.Command{
		Use:   "login",
		Short: "Sign in, so that commands to the broker are yours",
		Long: `login signs you in at an OpenID provider by the device flow: it shows an address
and a code, and waits until you have signed in there with a browser. The token
goes into your keyring, or, where there is none, into a file that only you can
read. Commands that speak to the broker then act for you; who signed in last is
the default, and --user names another.

With --node you sign in at the node agent instead: commands to it then act for you
in place of the stack's certificates. A token for nodes is none for the broker,
so that a node cannot act for you there.

At the stack's own issuer --user and --password-file sign in without a browser:
the command fills in the form itself.`,
		Example: "  coffer login\n  coffer login --issuer https://id.example.org --client coffer\n  coffer login --user alice --password-file /var/lib/coffer/people/alice.password",
		Args:    exactly(),
	}
	cmd.Flags().StringVar(&issuerURL, "issuer", "", "`URL` of the OpenID provider (default: the stack's own)")
	cmd.Flags().StringVar(&client, "client", "", "client `id` of coffer there (default: "+issuer.ClientID+", with --node "+issuer.NodeClientID+")")
	cmd.Flags().BoolVar(&node, "node", false, "sign in at the node agent")
	cmd.Flags().StringVar(&passwordFile, "password-file", "", "`file` with the password of --user; the stack's own issuer only")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		e, err := stack.OpenEndpoint(c.dir)
		if err != nil {
			return err
		}
		if issuerURL == "" {
			issuerURL = e.Issuer()
		}
		if client == "" {
			client = issuer.ClientID
			if node {
				client = issuer.NodeClientID
			}
		}
		var password string
		switch {
		case passwordFile == "":
		case c.user == "":
			return usagef(cmd, "say whose password it is with --user")
		case issuerURL != e.Issuer():
			return usagef(cmd, "--password-file: only the stack's own issuer takes a password from here")
		default:
			b, err := keyfile.Read(passwordFile)
			if err != nil {
				return err
			}
			password = strings.TrimRight(string(b), "\r\n")
		}
		return c.login(cmd.Context(), e, issuerURL, client, password, node)
	}
	return cmd
}

func (c *cli) login(ctx context.Context, e stack.Endpoint, issuerURL, client, password string, node bool) error {
	ctx, cancel := context.WithTimeout(ctx, loginTimeout)
	defer cancel()
	p, err := c.provider(ctx, e, issuerURL, client)
	if err != nil {
		return err
	}
	ctx = context.WithValue(ctx, oauth2.HTTPClient, p.http)
	code, err := p.config.DeviceAuth(ctx)
	if err != nil {
		return fmt.Errorf("issuer %s: %w", issuerURL, err)
	}
	if password != "" {
		if err := p.fillIn(ctx, issuerURL, code.UserCode, c.user, password); err != nil {
			return &exitError{code: exitRefused, text: fmt.Sprintf("sign in %s: %s", c.user, err), err: err}
		}
	} else {
		_, _ = fmt.Fprintf(c.stdout, "To sign in open %s\nand enter the code %s\n", clean(code.VerificationURI), clean(code.UserCode))
	}
	token, err := p.config.DeviceAccessToken(ctx, code)
	var denied *oauth2.RetrieveError
	if errors.As(err, &denied) {
		return &exitError{code: exitRefused, text: "sign in: " + clean(denied.ErrorCode), err: err}
	}
	if err != nil {
		return fmt.Errorf("issuer %s: %w", issuerURL, err)
	}
	name, s, err := p.session(ctx, issuerURL, token)
	if err != nil {
		return err
	}
	store, err := openSessions(e)
	if err != nil {
		return err
	}
	unlock, err := store.lock()
	if err != nil {
		return err
	}
	defer unlock()
	all, err := store.load()
	if err != nil {
		return err
	}
	people, current := all.at(node)
	*current, people[name] = name, s
	if err := store.save(all); err != nil {
		return fmt.Errorf("keep the session: %w", err)
	}
	_, err = fmt.Fprintf(c.stdout, "signed in as %s\n", clean(name))
	return err
}

// fillIn posts the form of the stack's own issuer, as a browser would.
func (p *provider) fillIn(ctx context.Context, issuerURL, code, user, password string) error {
	form := url.Values{"user_code": {code}, "username": {user}, "password": {password}, "action": {"allow"}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, issuerURL+"/device", strings.NewReader(form.Encode()))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	res, err := p.http.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	switch res.StatusCode {
	case http.StatusOK:
		return nil
	case http.StatusForbidden:
		return errors.New("name or password is wrong")
	case http.StatusTooManyRequests:
		return errors.New("too many attempts: wait a minute")
	}
	return fmt.Errorf("the issuer answers %s", res.Status)
}

// signedIn returns who acts at the broker, with a token that lasts, or "" if nobody
// signed in.
func (c *cli) signedIn(ctx context.Context, e stack.Endpoint) (name, token string, err error) {
	return c.signedInAt(ctx, e, false)
}

// signedInAt is signedIn at nodes or at the broker.
func (c *cli) signedInAt(ctx context.Context, e stack.Endpoint, node bool) (name, token string, err error) {
	store, err := openSessions(e)
	if err != nil {
		return "", "", err
	}
	all, err := store.load()
	if err != nil {
		return "", "", err
	}
	if people, _ := all.at(node); len(people) == 0 && (c.user == "" || node) {
		return "", "", nil
	}
	unlock, err := store.lock()
	if err != nil {
		return "", "", err
	}
	defer unlock()
	if all, err = store.load(); err != nil {
		return "", "", err
	}
	people, current := all.at(node)
	name = *current
	if c.user != "" {
		name = c.user
	}
	if name == "" {
		return "", "", nil
	}
	s, ok := people[name]
	if !ok && node {
		return "", "", nil
	}
	if !ok {
		return "", "", &exitError{code: exitRefused, text: fmt.Sprintf("%s is not signed in: run `coffer login --user %s`", clean(name), clean(name))}
	}
	if time.Until(s.Expires) > renewBefore {
		return name, s.ID, nil
	}
	again := &exitError{code: exitRefused, text: fmt.Sprintf("the session of %s has ended: run `coffer login`", clean(name))}
	if s.Refresh == "" {
		return "", "", again
	}
	p, err := c.provider(ctx, e, s.Issuer, s.Client)
	if err != nil {
		return "", "", err
	}
	fresh, err := p.config.TokenSource(context.WithValue(ctx, oauth2.HTTPClient, p.http), &oauth2.Token{RefreshToken: s.Refresh}).Token()
	var denied *oauth2.RetrieveError
	if errors.As(err, &denied) {
		again.err = err
		return "", "", again
	}
	if err != nil {
		return "", "", fmt.Errorf("renew the session of %s: %w", clean(name), err)
	}
	as, s, err := p.session(ctx, s.Issuer, fresh)
	if err != nil {
		return "", "", err
	}
	if as != name {
		return "", "", fmt.Errorf("issuer %s renewed the session of %s with a token of %s", s.Issuer, clean(name), clean(as))
	}
	people[name] = s
	if err := store.save(all); err != nil {
		return "", "", fmt.Errorf("keep the session: %w", err)
	}
	return name, s.ID, nil
}

// atNodes reports whether somebody signed in at nodes for whom commands act.
func (c *cli) atNodes(e stack.Endpoint) (bool, error) {
	store, err := openSessions(e)
	if err != nil {
		return false, err
	}
	all, err := store.load()
	if err != nil {
		return false, err
	}
	people, current := all.at(true)
	name := *current
	if c.user != "" {
		name = c.user
	}
	_, ok := people[name]
	return ok, nil
}

// nodeBearer sends a token for nodes with every request. It is fetched with the
// first one, in whose time it may have to be renewed.
type nodeBearer struct {
	next  http.RoundTripper
	token func(context.Context) (string, error)

	once sync.Once
	sent bearer
	err  error
}

// RoundTrip implements http.RoundTripper.
func (b *nodeBearer) RoundTrip(r *http.Request) (*http.Response, error) {
	b.once.Do(func() {
		var token string
		token, b.err = b.token(r.Context())
		b.sent = bearer{b.next, token}
	})
	if b.err != nil {
		return nil, b.err
	}
	return b.sent.RoundTrip(r)
}

// CloseIdleConnections lets http.Client reach those of the transport below.
func (b *nodeBearer) CloseIdleConnections() {
	if t, ok := b.next.(interface{ CloseIdleConnections() }); ok {
		t.CloseIdleConnections()
	}
}

// bearer sends a token with every request.
type bearer struct {
	next  http.RoundTripper
	token string
}

// RoundTrip implements http.RoundTripper.
func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+b.token)
	return b.next.RoundTrip(r)
}

// CloseIdleConnections lets http.Client reach those of the transport below.
func (b bearer) CloseIdleConnections() {
	if t, ok := b.next.(interface{ CloseIdleConnections() }); ok {
		t.CloseIdleConnections()
	}
}

func (c *cli) logoutCmd() *cobra.Command {
	var everyone bool
	cmd := &cobra.Command{
		Use:     "logout",
		Short:   "Forget the session of --user, or of who signed in last",
		Example: "  coffer logout\n  coffer logout --user alice\n  coffer logout --all",
		Args:    exactly(),
	}
	cmd.Flags().BoolVar(&everyone, "all", false, "forget every session at this stack")
	cmd.RunE = func(*cobra.Command, []string) error {
		e, err := stack.OpenEndpoint(c.dir)
		if err != nil {
			return err
		}
		store, err := openSessions(e)
		if err != nil {
			return err
		}
		unlock, err := store.lock()
		if err != nil {
			return err
		}
		defer unlock()
		if everyone {
			return store.clear()
		}
		all, err := store.load()
		if err != nil {
			return err
		}
		name := c.user
		if name == "" {
			name = all.Current
		}
		_, ok := all.People[name]
		if _, at := all.Nodes[name]; !ok && !at {
			return &exitError{code: exitFailed, text: "nobody of that name is signed in"}
		}
		delete(all.People, name)
		if all.Current == name {
			all.Current = ""
		}
		delete(all.Nodes, name)
		if all.CurrentNode == name {
			all.CurrentNode = ""
		}
		return store.save(all)
	}
	return cmd
}

func (c *cli) whoamiCmd() *cobra.Command {
	return &cobra.Command{
		Use:     "whoami",
		Short:   "Say for whom commands to the broker act",
		Example: "  coffer whoami",
		Args:    exactly(),
		RunE: func(*cobra.Command, []string) error {
			e, err := stack.OpenEndpoint(c.dir)
			if err != nil {
				return err
			}
			store, err := openSessions(e)
			if err != nil {
				return err
			}
			all, err := store.load()
			if err != nil {
				return err
			}
			rows := [][]string{{"NAME", "GROUPS", "TOKEN UNTIL", "ISSUER"}}
			for _, name := range slices.Sorted(maps.Keys(all.People)) {
				s, mark := all.People[name], ""
				if name == all.Current && c.user == "" || name == c.user {
					mark = " *"
				}
				rows = append(rows, []string{name + mark, strings.Join(s.Groups, ","), clock(s.Expires.Unix()), s.Issuer})
			}
			for _, name := range slices.Sorted(maps.Keys(all.Nodes)) {
				s, mark := all.Nodes[name], " at nodes"
				if name == all.CurrentNode && c.user == "" || name == c.user {
					mark += " *"
				}
				rows = append(rows, []string{name + mark, strings.Join(s.Groups, ","), clock(s.Expires.Unix()), s.Issuer})
			}
			if len(rows) == 1 {
				_, err = fmt.Fprintln(c.stdout, "nobody is signed in: commands use the stack's certificates")
				return err
			}
			return table(c.stdout, rows...)
		},
	}
}
