package daemon_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/pki"
	"github.com/coffer-run/coffer/internal/loopback"
)

func newPKI(t *testing.T, ids ...[2]string) string {
	t.Helper()
	dir := t.TempDir()
	if err := pki.Create(dir); err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		if err := pki.Issue(dir, id[0], id[1]); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// serve runs a server that answers with who asked, and waits until it answers.
func serve(t *testing.T, id daemon.TLS, handler http.Handler) (addr string, stop func() error) {
	t.Helper()
	cfg, err := id.Server()
	if err != nil {
		t.Fatal(err)
	}
	return serveWith(t, cfg, handler)
}

func serveWith(t *testing.T, cfg *tls.Config, handler http.Handler) (addr string, stop func() error) {
	t.Helper()
	addr = loopback.Addr(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- daemon.Serve(ctx, addr, cfg, handler, slog.New(slog.DiscardHandler)) }()
	for range 12000 {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	return addr, func() error { cancel(); return <-done }
}

func whoami() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		role, name, err := daemon.Identity(r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusForbidden)
			return
		}
		_, _ = io.WriteString(w, r.Proto+" "+role+"/"+name)
	})
}

func get(c *http.Client, u string) (string, error) {
	resp, err := c.Get(u)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

func TestServeTellsCallersApart(t *testing.T) {
	dir := newPKI(t, [2]string{"broker", "broker"}, [2]string{"owner", "alice"}, [2]string{"agent", "node-1"})
	addr, stop := serve(t, pki.Files(dir, "broker", "broker"), whoami())
	for _, id := range [][2]string{{"owner", "alice"}, {"agent", "node-1"}} {
		c, err := pki.Files(dir, id[0], id[1]).HTTPClient(daemon.RoleBroker)
		if err != nil {
			t.Fatal(err)
		}
		got, err := get(c, "https://"+addr+"/x")
		if want := "HTTP/2.0 " + id[0] + "/" + id[1]; err != nil || got != want {
			t.Errorf("%v: got %q, %v; want %q", id, got, err, want)
		}
		if got, err := get(c, "https://"+addr+daemon.Health); err != nil || got != "ok\n" {
			t.Errorf("health: %q, %v", got, err)
		}
	}
	if err := stop(); err != nil {
		t.Errorf("stop: %v", err)
	}
}

func TestServeRefusesWrongPeers(t *testing.T) {
	dir := newPKI(t, [2]string{"broker", "broker"}, [2]string{"agent", "node-1"})
	other := newPKI(t, [2]string{"agent", "node-1"})
	addr, stop := serve(t, pki.Files(dir, "broker", "broker"), whoami())
	defer stop()
	good, err := pki.Files(dir, "agent", "node-1").Client(daemon.RoleBroker)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := dial(addr, good); err != nil {
		t.Fatalf("control: %v", err)
	}
	for name, change := range map[string]func(*tls.Config){
		"no client certificate":      func(c *tls.Config) { c.Certificates = nil },
		"certificate of another ca":  func(c *tls.Config) { c.Certificates = otherCert(t, other) },
		"tls 1.2":                    func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 },
		"server name we do not have": func(c *tls.Config) { c.ServerName = "broker.example.org" },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := good.Clone()
			change(cfg)
			if got, err := dial(addr, cfg); err == nil {
				t.Errorf("got through: %q", got)
			}
		})
	}
}

// dial sends one request and so waits for the server's view of the handshake.
func dial(addr string, cfg *tls.Config) (string, error) {
	tr := &http.Transport{TLSClientConfig: cfg, ForceAttemptHTTP2: true}
	defer tr.CloseIdleConnections()
	return get(&http.Client{Transport: tr, Timeout: 5 * time.Second}, "https://"+addr+"/")
}

func otherCert(t *testing.T, dir string) []tls.Certificate {
	f := pki.Files(dir, "agent", "node-1")
	c, err := tls.LoadX509KeyPair(f.Cert, f.Key)
	if err != nil {
		t.Fatal(err)
	}
	return []tls.Certificate{c}
}

func TestClientRefusesServerInAnotherRole(t *testing.T) {
	dir := newPKI(t, [2]string{"agent", "node-1"}, [2]string{"owner", "alice"})
	addr, stop := serve(t, pki.Files(dir, "agent", "node-1"), whoami())
	defer stop()
	cfg, err := pki.Files(dir, "owner", "alice").Client(daemon.RoleBroker)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := dial(addr, cfg); err == nil || !strings.Contains(err.Error(), "want the role broker") {
		t.Errorf("an agent passed for the broker: %v", err)
	}
	if _, err := pki.Files(dir, "owner", "alice").Client("owner"); err == nil {
		t.Error("client of a role that serves nothing was made")
	}
}

// TestTrustDomains has two authorities in one file, each of its own trust domain:
// only the comparison of the domains stands between them.
func TestTrustDomains(t *testing.T) {
	dirs := map[string]string{}
	var both []byte
	for _, domain := range []string{"a.example", "b.example"} {
		dir := t.TempDir()
		if err := pki.CreateFor(dir, domain); err != nil {
			t.Fatal(err)
		}
		for _, role := range []string{"broker", "agent"} {
			if err := pki.Issue(dir, role, "x"); err != nil {
				t.Fatal(err)
			}
		}
		ca, err := os.ReadFile(filepath.Join(dir, pki.CAFile))
		if err != nil {
			t.Fatal(err)
		}
		both = append(both, ca...)
		dirs[domain] = dir
	}
	file := filepath.Join(t.TempDir(), "both.pem")
	if err := os.WriteFile(file, both, 0o600); err != nil {
		t.Fatal(err)
	}
	files := func(domain, role string) daemon.TLS {
		id := pki.Files(dirs[domain], role, "x")
		id.CA = file
		return id
	}
	for kind, server := range map[string]func(daemon.TLS) (*tls.Config, error){"mutual": daemon.TLS.Server, "for people": daemon.TLS.ServerForPeople} {
		cfg, err := server(files("a.example", "broker"))
		if err != nil {
			t.Fatal(err)
		}
		addr, stop := serveWith(t, cfg, whoami())
		for _, tc := range []struct {
			name, certificate, expects string
			ok                         bool
		}{
			{"both of one domain", "a.example", "a.example", true},
			{"a client of another domain, which expects the server's", "b.example", "a.example", false},
			{"a server of another domain than the client expects", "a.example", "b.example", false},
		} {
			client, err := files(tc.expects, "agent").Client(daemon.RoleBroker)
			if err != nil {
				t.Fatal(err)
			}
			id := files(tc.certificate, "agent")
			cert, err := tls.LoadX509KeyPair(id.Cert, id.Key)
			if err != nil {
				t.Fatal(err)
			}
			client.Certificates = []tls.Certificate{cert}
			if got, err := dial(addr, client); (err == nil) != tc.ok {
				t.Errorf("%s, %s: %q, %v", kind, tc.name, got, err)
			}
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
	}
}

func TestServePortInUse(t *testing.T) {
	dir := newPKI(t, [2]string{"broker", "broker"})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cfg, err := pki.Files(dir, "broker", "broker").Server()
	if err != nil {
		t.Fatal(err)
	}
	err = daemon.Serve(t.Context(), l.Addr().String(), cfg, whoami(), slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "address "+l.Addr().String()+" is in use: is another stack up?") {
		t.Errorf("got %v", err)
	}
}

// buffer is a log that a test reads while the server writes to it.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func TestPanicsAreLogged(t *testing.T) {
	dir := newPKI(t, [2]string{"broker", "broker"}, [2]string{"agent", "node-1"})
	cfg, err := pki.Files(dir, "broker", "broker").Server()
	if err != nil {
		t.Fatal(err)
	}
	log, addr := &buffer{}, loopback.Addr(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- daemon.Serve(ctx, addr, cfg, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("out of its depth") }), daemon.Logger(log, "test"))
	}()
	client, err := pki.Files(dir, "agent", "node-1").Client(daemon.RoleBroker)
	if err != nil {
		t.Fatal(err)
	}
	for range 12000 {
		if c, err := net.Dial("tcp", addr); err == nil {
			// A handshake that comes to nothing.
			_, _ = c.Write([]byte("GET / HTTP/1.0\r\n\r\n"))
			_ = c.Close()
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	if _, err := dial(addr, client); err == nil {
		t.Error("a panic was answered")
	}
	for range 12000 {
		if strings.Contains(log.String(), "out of its depth") {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if s := log.String(); !strings.Contains(s, "out of its depth") || !strings.Contains(s, `"level":"ERROR"`) || !strings.Contains(s, `"daemon":"test"`) {
		t.Errorf("log: %s", s)
	}
	if s := log.String(); strings.Contains(s, "handshake") {
		t.Errorf("handshakes fill the log: %s", s)
	}
	if err := daemon.Serve(t.Context(), addr, cfg, whoami(), nil); err == nil {
		t.Error("served without a logger")
	}
}

func TestKeyForOthersToRead(t *testing.T) {
	dir := newPKI(t, [2]string{"broker", "broker"})
	id := pki.Files(dir, "broker", "broker")
	for _, mode := range []os.FileMode{0o640, 0o604, 0o660, 0o610} {
		if err := os.Chmod(id.Key, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := id.Server(); err == nil || !strings.Contains(err.Error(), "chmod 600") {
			t.Errorf("%v: %v", mode, err)
		}
		if _, err := id.Client(daemon.RoleBroker); err == nil {
			t.Errorf("%v: client made", mode)
		}
	}
	if err := os.Chmod(id.Key, 0o400); err != nil {
		t.Fatal(err)
	}
	if _, err := id.Server(); err != nil {
		t.Error(err)
	}
}

func TestServeRefusesToServeWithoutMutualTLS(t *testing.T) {
	for name, cfg := range map[string]*tls.Config{"nil": nil, "no client certificates": {MinVersion: tls.VersionTLS13}} {
		if err := daemon.Serve(t.Context(), "127.0.0.1:0", cfg, whoami(), slog.New(slog.DiscardHandler)); err == nil {
			t.Errorf("%s: served", name)
		}
	}
}

func TestServeStopEndsStreams(t *testing.T) {
	dir := newPKI(t, [2]string{"agent", "node-1"}, [2]string{"owner", "alice"})
	entered := make(chan struct{})
	addr, stop := serve(t, pki.Files(dir, "agent", "node-1"), http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		close(entered)
		<-r.Context().Done()
	}))
	c, err := pki.Files(dir, "owner", "alice").HTTPClient(daemon.RoleAgent)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = get(c, "https://"+addr+"/") }()
	<-entered
	start := time.Now()
	if err := stop(); err != nil {
		t.Error(err)
	}
	if d := time.Since(start); d > daemon.StopGrace+30*time.Second {
		t.Errorf("stop took %v", d)
	}
}

func TestParseIdentity(t *testing.T) {
	for _, tc := range []struct{ uri, domain, role, name string }{
		{"spiffe://coffer.local/agent/node-1", "coffer.local", "agent", "node-1"},
		{"spiffe://example.org/owner/a.b", "example.org", "owner", "a.b"},
		{uri: "spiffe://coffer.local/root/node-1"},
		{uri: "spiffe://coffer.local/agent"},
		{uri: "spiffe://coffer.local/agent/"},
		{uri: "spiffe://coffer.local/agent/node-1/x"},
		{uri: "spiffe://coffer.local/agent/Node"},
		{uri: "spiffe://coffer.local/agent/node-1?x"},
		{uri: "spiffe://coffer.local/agent/node-1#x"},
		{uri: "spiffe://coffer.local:1/agent/node-1"},
		{uri: "spiffe://x@coffer.local/agent/node-1"},
		{uri: "spiffe:///agent/node-1"},
		{uri: "spiffe://Coffer.local/agent/node-1"},
		{uri: "https://coffer.local/agent/node-1"},
		{uri: "spiffe://coffer.local//agent/node-1"},
		{uri: "spiffe://coffer.local/agent/node%2d1"},
		{uri: "spiffe:agent/node-1"},
	} {
		u, err := url.Parse(tc.uri)
		if err != nil {
			t.Fatal(err)
		}
		domain, role, name, err := daemon.ParseIdentity(u)
		if (err == nil) != (tc.role != "") || (err == nil && (domain != tc.domain || role != tc.role || name != tc.name)) {
			t.Errorf("%s: got %q, %q, %q, %v", tc.uri, domain, role, name, err)
		}
	}
}

func TestIdentityWithoutCertificate(t *testing.T) {
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := daemon.Identity(r); err == nil {
		t.Error("plain request has an identity")
	}
	r.TLS = &tls.ConnectionState{}
	if _, _, err := daemon.Identity(r); err == nil {
		t.Error("unverified connection has an identity")
	}
}

func TestReadConfig(t *testing.T) {
	type config struct {
		Listen string `json:"listen"`
	}
	for name, tc := range map[string]struct {
		text string
		ok   bool
	}{
		"good":          {`{"listen":"127.0.0.1:1"}`, true},
		"unknown field": {`{"listen":"127.0.0.1:1","lissten":"x"}`, false},
		"two values":    {`{} {}`, false},
		"not json":      {`listen = 1`, false},
		"empty":         {``, false},
		"too large":     {`{"listen":"` + strings.Repeat("x", daemon.MaxConfig) + `"}`, false},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "c.json")
			if err := os.WriteFile(path, []byte(tc.text), 0o600); err != nil {
				t.Fatal(err)
			}
			var c config
			err := daemon.ReadConfig(path, &c)
			if (err == nil) != tc.ok {
				t.Errorf("got %v", err)
			}
			if err != nil && !strings.Contains(err.Error(), path) {
				t.Errorf("%v does not name the file", err)
			}
		})
	}
	if err := daemon.ReadConfig(filepath.Join(t.TempDir(), "none"), &config{}); err == nil {
		t.Error("missing file is a configuration")
	}
}

func TestConfigFlag(t *testing.T) {
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"--config", "f"}, "f"},
		{[]string{"--config", "f", "more"}, ""},
		{nil, ""},
		{[]string{"--other"}, ""},
	} {
		got, err := daemon.ConfigFlag("x", tc.args, io.Discard)
		if got != tc.want || (err == nil) != (tc.want != "") {
			t.Errorf("%v: got %q, %v", tc.args, got, err)
		}
	}
}

type coded struct{ error }

func (coded) ExitCode() int { return 3 }

func TestExitCode(t *testing.T) {
	for name, tc := range map[string]struct {
		err  error
		code int
		text string
	}{
		"success": {nil, 0, ""},
		"help":    {flag.ErrHelp, 0, ""},
		"failure": {errors.New("open x"), 1, "tool: open x\n"},
		"chosen":  {coded{errors.New("refused")}, 3, "tool: refused\n"},
	} {
		t.Run(name, func(t *testing.T) {
			var stderr bytes.Buffer
			code := daemon.ExitCode(func(_ context.Context, args []string, _ io.Reader, _, _ io.Writer) error {
				if len(args) != 1 || args[0] != "arg" {
					t.Errorf("args %q", args)
				}
				return tc.err
			}, []string{"/bin/tool", "arg"}, nil, io.Discard, &stderr)
			if code != tc.code || stderr.String() != tc.text {
				t.Errorf("got %d, %q", code, stderr.String())
			}
		})
	}
}
