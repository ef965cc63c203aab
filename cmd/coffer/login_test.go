package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/zalando/go-keyring"

	"github.com/coffer-run/coffer/attest/api/broker/v1/brokerv1connect"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
	"github.com/coffer-run/coffer/internal/daemon/pki"
	"github.com/coffer-run/coffer/internal/identity"
	"github.com/coffer-run/coffer/internal/issuer"
	"github.com/coffer-run/coffer/internal/loopback"
)

// signInStack is a folder of a stack with a real issuer, and a broker that says
// who calls.
type signInStack struct {
	*fakeStack
	callers []string
	now     func() time.Time
}

const testPassword = "correct horse battery"

func newSignInStack(t *testing.T) *signInStack {
	t.Helper()
	t.Setenv(sessionsVariable, filepath.Join(t.TempDir(), "sessions"))
	s := &signInStack{fakeStack: &fakeStack{t: t, dir: t.TempDir()}, now: time.Now}
	dir := filepath.Join(s.dir, "pki")
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ok(pki.Create(dir))
	for _, id := range [][2]string{{"issuer", "issuer"}, {"broker", "broker"}, {"owner", "owner"}} {
		ok(pki.Issue(dir, id[0], id[1]))
	}
	hash, err := issuer.HashPassword(testPassword)
	ok(err)
	b, err := issuer.EncodePeople([]issuer.Person{{Name: "alice", Groups: []string{"weights-approvers"}, Hash: hash}, {Name: "bob", Groups: []string{}, Hash: hash}})
	ok(err)
	people, err := issuer.ParsePeople(b)
	ok(err)
	ok(keyfile.CreateP384(filepath.Join(s.dir, "issuer.key")))
	key, err := keyfile.ReadP384(filepath.Join(s.dir, "issuer.key"))
	ok(err)
	ok(keyfile.Write(filepath.Join(s.dir, "password"), []byte(testPassword+"\n")))
	ok(keyfile.Write(filepath.Join(s.dir, "wrong"), []byte("wrong\n")))

	serve := func(role string, port int, h http.Handler) {
		cfg, err := pki.Files(dir, role, role).ServerForPeople()
		ok(err)
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		addr := fmt.Sprintf("127.0.0.1:%d", port)
		go func() { done <- daemon.Serve(ctx, addr, cfg, h, slog.New(slog.DiscardHandler)) }()
		t.Cleanup(func() { cancel(); ok(<-done) })
		for range 12000 {
			if c, err := net.Dial("tcp", addr); err == nil {
				_ = c.Close()
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	issuerPort := loopback.Base(t)
	brokerPort := issuerPort + 1
	url := fmt.Sprintf("https://127.0.0.1:%d", issuerPort)
	h, err := issuer.New(issuer.Options{URL: url, Key: key, People: people, Now: func() time.Time { return s.now() }, Log: slog.New(slog.DiscardHandler)})
	ok(err)
	serve("issuer", issuerPort, h)
	client, err := daemon.HTTPClientForPeople(filepath.Join(dir, pki.CAFile), daemon.RoleIssuer)
	ok(err)
	t.Cleanup(client.CloseIdleConnections)
	verifier, err := identity.New([]identity.Issuer{{URL: url, Audience: issuer.ClientID, Algorithms: []string{issuer.Algorithm}}}, client, time.Now)
	ok(err)
	_, broker := brokerv1connect.NewBrokerServiceHandler(&fakeBroker{})
	serve("broker", brokerPort, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token, err := identity.Bearer(r)
		who := "nobody"
		if role, name, cerr := daemon.Identity(r); cerr == nil {
			who = role + "/" + name
		} else if p, verr := verifier.Verify(r.Context(), token); err == nil && verr == nil {
			who = "user/" + p.Name
		}
		s.callers = append(s.callers, who)
		broker.ServeHTTP(w, r)
	}))
	info := fmt.Sprintf(`{"version":"coffer.run/stack/v1","ports":{"verifier":1,"broker":%d,"agent":2,"issuer":%d},"bin":"","tools":""}`, brokerPort, issuerPort)
	ok(os.WriteFile(filepath.Join(s.dir, "stack.json"), []byte(info), 0o600))
	return s
}

func (s *signInStack) file(name string) string { return filepath.Join(s.dir, name) }

// caller runs a command that asks the broker, and returns who the broker saw.
func (s *signInStack) caller(args ...string) string {
	s.t.Helper()
	s.callers = nil
	s.coffer(s.t.Context(), append([]string{"assets", "ls"}, args...)...).want(s.t, 0)
	return strings.Join(s.callers, " ")
}

func TestLogin(t *testing.T) {
	s := newSignInStack(t)
	if got := s.caller(); got != "owner/owner" {
		t.Errorf("before anyone signed in: %s", got)
	}
	s.coffer(t.Context(), "whoami").want(t, 0, "nobody is signed in")
	s.coffer(t.Context(), "login", "--user", "alice", "--password-file", s.file("wrong")).want(t, exitRefused, "name or password is wrong")
	s.coffer(t.Context(), "login", "--user", "mallory", "--password-file", s.file("password")).want(t, exitRefused, "name or password is wrong")
	s.coffer(t.Context(), "login", "--password-file", s.file("password")).want(t, exitUsage, "--user")
	s.coffer(t.Context(), "login", "--user", "alice", "--issuer", "https://id.example.org", "--password-file", s.file("password")).want(t, exitUsage, "own issuer")
	if got := s.caller(); got != "owner/owner" {
		t.Errorf("after failed sign-ins: %s", got)
	}

	s.coffer(t.Context(), "login", "--user", "alice", "--password-file", s.file("password")).want(t, 0, "signed in as alice")
	s.coffer(t.Context(), "login", "--user", "bob", "--password-file", s.file("password")).want(t, 0, "signed in as bob")
	if got := s.caller(); got != "user/bob" {
		t.Errorf("who signed in last: %s", got)
	}
	if got := s.caller("--user", "alice"); got != "user/alice" {
		t.Errorf("--user alice: %s", got)
	}
	s.coffer(t.Context(), "assets", "ls", "--user", "carol").want(t, exitRefused, "carol is not signed in")
	r := s.coffer(t.Context(), "whoami")
	r.want(t, 0, "alice", "bob *", "weights-approvers")
	if strings.Contains(r.stdout, "eyJ") {
		t.Error("whoami shows a token")
	}

	entries, err := os.ReadDir(os.Getenv(sessionsVariable))
	if err != nil || len(entries) == 0 {
		t.Fatal(entries, err)
	}
	for _, e := range entries {
		if i, err := e.Info(); err != nil || i.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", e.Name(), i.Mode(), err)
		}
	}
	s.coffer(t.Context(), "logout").want(t, 0)
	s.coffer(t.Context(), "logout").want(t, exitFailed, "nobody of that name")
	if got := s.caller("--user", "alice"); got != "user/alice" {
		t.Errorf("alice after bob left: %s", got)
	}
	s.coffer(t.Context(), "logout", "--all").want(t, 0)
	s.coffer(t.Context(), "assets", "ls", "--user", "alice").want(t, exitRefused, "alice is not signed in")
}

// change edits the session file.
func (s *signInStack) change(f func(*sessions)) {
	s.t.Helper()
	files, err := filepath.Glob(filepath.Join(os.Getenv(sessionsVariable), "*.json"))
	if err != nil || len(files) != 1 {
		s.t.Fatal(files, err)
	}
	b, err := os.ReadFile(files[0])
	if err != nil {
		s.t.Fatal(err)
	}
	var all sessions
	if err := json.Unmarshal(b, &all); err != nil {
		s.t.Fatal(err)
	}
	f(&all)
	if b, err = json.Marshal(all); err == nil {
		err = os.WriteFile(files[0], b, 0o600)
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

func TestSessionsAreRenewed(t *testing.T) {
	s := newSignInStack(t)
	s.coffer(t.Context(), "login", "--user", "alice", "--password-file", s.file("password")).want(t, 0)
	var before sessions
	s.change(func(all *sessions) {
		one := all.People["alice"]
		one.Expires, one.ID = time.Now(), "gone"
		all.People["alice"] = one
		before = *all
	})
	if got := s.caller(); got != "user/alice" {
		t.Errorf("renewed: %s", got)
	}
	s.change(func(all *sessions) {
		if got := all.People["alice"]; got.Refresh == before.People["alice"].Refresh || time.Until(got.Expires) < 5*time.Minute {
			t.Errorf("kept %+v", got)
		}
		// A copy of the old one is used: the session is over for both.
		one := before.People["alice"]
		all.People["alice"] = one
	})
	s.coffer(t.Context(), "assets", "ls").want(t, exitRefused, "session of alice has ended")
}

func TestDeviceFlowWithoutPassword(t *testing.T) {
	s := newSignInStack(t)
	ctx, cancel := context.WithCancel(t.Context())
	shown := make(chan string, 1)
	s.seen = func(text string) {
		if strings.Contains(text, "enter the code") {
			select {
			case shown <- text:
			default:
			}
			cancel()
		}
	}
	r := s.coffer(ctx, "login")
	r.want(t, exitUnknown, "interrupted")
	text := <-shown
	if !strings.Contains(text, "/device\n") || !strings.Contains(text, "enter the code ") {
		t.Errorf("shown: %s", text)
	}
	if !errors.Is(r.err, context.Canceled) {
		t.Error(r.err)
	}
}

func TestSessionFileForOthersToRead(t *testing.T) {
	s := newSignInStack(t)
	s.coffer(t.Context(), "login", "--user", "alice", "--password-file", s.file("password")).want(t, 0)
	files, _ := filepath.Glob(filepath.Join(os.Getenv(sessionsVariable), "*.json"))
	if err := os.Chmod(files[0], 0o644); err != nil {
		t.Fatal(err)
	}
	s.coffer(t.Context(), "assets", "ls").want(t, exitFailed, "chmod 600")
}

// Where there is a keyring the tokens go there; where it fails, into a file.
func TestSessionsInTheKeyring(t *testing.T) {
	for name, works := range map[string]bool{"a keyring": true, "a keyring that fails": false} {
		t.Run(name, func(t *testing.T) {
			s := newSignInStack(t)
			config := t.TempDir()
			t.Setenv(sessionsVariable, "")
			t.Setenv("XDG_CONFIG_HOME", config)
			t.Setenv("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nonexistent")
			keyring.MockInit()
			if !works {
				keyring.MockInitWithError(errors.New("locked"))
			}
			s.coffer(t.Context(), "login", "--user", "alice", "--password-file", s.file("password")).want(t, 0)
			if got := s.caller(); got != "user/alice" {
				t.Errorf("caller %s", got)
			}
			files, err := filepath.Glob(filepath.Join(config, "coffer", "sessions", "*.json"))
			if err != nil || (len(files) == 0) != works {
				t.Errorf("files %v, %v", files, err)
			}
			s.coffer(t.Context(), "logout", "--all").want(t, 0)
			if got := s.caller(); got != "owner/owner" {
				t.Errorf("after logout: %s", got)
			}
		})
	}
}
