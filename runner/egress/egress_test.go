package egress

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/egress/egresstest"
	"github.com/coffer-run/coffer/runner/egress/gate"
	"github.com/coffer-run/coffer/runner/egress/netns"
)

func needRoot(t testing.TB) {
	t.Helper()
	switch {
	case testing.Short():
		t.Skip("integration tests are off (-short)")
	case os.Geteuid() != 0:
		t.Skip("root is needed")
	}
}

// job is a gateway, its job namespace, and the world that it leads to.
type job struct {
	*Gateway
	t     testing.TB
	cfg   Config
	world *egresstest.World
	dir   string
	pid   int
}

func allow(host string, port int, maxBytes int64) plan.Egress {
	return plan.Egress{Host: host, Port: port, MaxBytes: maxBytes, BytesPerSecond: 1 << 30}
}

func testPlan(e ...plan.Egress) plan.Plan {
	return plan.Plan{Egress: e, Output: plan.Output{EgressBytes: 64 << 20, EgressBytesPerSecond: 1 << 30, EgressEvents: 20}}
}

func program(t testing.TB) string {
	t.Helper()
	path, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

var buildDir string

var build = sync.OnceValues(func() (string, error) {
	path := filepath.Join(buildDir, "coffer-gateway")
	cmd := exec.Command("go", "build", "-o", path, "../../cmd/coffer-gateway")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0") // as make build does
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build the gateway: %w\n%s", err, out)
	}
	return path, nil
})

func TestMain(m *testing.M) {
	var err error
	if buildDir, err = os.MkdirTemp("", "coffer-egress-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	_ = os.RemoveAll(buildDir)
	os.Exit(code)
}

func newJob(t testing.TB, p plan.Plan) *job {
	t.Helper()
	needRoot(t)
	w := egresstest.New(t)
	j := &job{t: t, world: w, dir: t.TempDir(), cfg: Config{Gateway: program(t), Uplink: w.Uplink, Resolvers: []netip.AddrPort{w.Resolver}}}
	_, err := j.cfg.Profile()
	if err != nil {
		t.Fatal(err)
	}
	j.Gateway, err = j.cfg.Open(t.Context(), j.dir, p, func(pid int) error { j.pid = pid; return nil })
	t.Cleanup(func() {
		if j.pid != 0 {
			_ = unix.Kill(j.pid, unix.SIGKILL)
		}
		if err := errors.Join(Remove(j.dir), Remove(j.dir)); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			b, _ := os.ReadFile(filepath.Join(j.dir, logName))
			t.Logf("gateway: %s", b)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return j
}

// inside runs f in the job's namespace, with more than any sandbox has: root, and the
// link itself.
func (j *job) inside(f func() error) {
	j.t.Helper()
	if err := netns.Inside(Namespace(j.dir), f); err != nil {
		j.t.Fatal(err)
	}
}

// connect asks the proxy for a destination, and returns the tunnel or its refusal.
func (j *job) connect(target string) (net.Conn, string) {
	j.t.Helper()
	var conn net.Conn
	var said string
	j.inside(func() error {
		c, err := net.DialTimeout("tcp", "10.77.0.1:3128", 2*time.Second)
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", target, target); err != nil {
			return err
		}
		res, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: http.MethodConnect})
		if err != nil {
			return err
		}
		defer res.Body.Close()
		if res.StatusCode == http.StatusOK {
			conn = c
			return nil
		}
		b, _ := io.ReadAll(res.Body)
		said = string(b)
		return c.Close()
	})
	return conn, said
}

// secure does a TLS handshake for name in a tunnel.
func (j *job) secure(c net.Conn, name string) (*tls.Conn, error) {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(j.world.CA)
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	s := tls.Client(c, &tls.Config{ServerName: name, RootCAs: roots})
	return s, s.Handshake()
}

func (j *job) report() gate.Report {
	j.t.Helper()
	r, err := j.Report(context.Background(), 0, 0)
	if err != nil {
		j.t.Fatal(err)
	}
	return r
}

func rulesOf(r gate.Report) []string {
	var out []string
	for _, d := range r.Denials {
		out = append(out, d.Rule)
	}
	return out
}

func TestListedDestinationIsReachedAndRecorded(t *testing.T) {
	j := newJob(t, testPlan(allow("allowed.example.com", 443, 1<<20)))
	if err := j.Recheck(); err != nil {
		t.Fatalf("an untouched gateway does not pass: %v", err)
	}
	c, said := j.connect("allowed.example.com:443")
	if c == nil {
		t.Fatalf("refused: %s", said)
	}
	s, err := j.secure(c, "allowed.example.com")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 5)
	if _, err := io.ReadFull(s, b); err != nil || string(b) != "hello" {
		t.Fatalf("%q, %v", b, err)
	}
	s.Close()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		r := j.report()
		if len(r.Connections) != 1 || len(r.Denials) != 0 {
			t.Fatalf("%+v", r)
		}
		if k := r.Connections[0]; k.End == "closed" {
			if k.Host != "allowed.example.com" || k.Port != 443 || k.Address != "44.1.0.2:443" || k.Sent < 300 || k.Received < 300 {
				t.Errorf("%+v", k)
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("still open: %+v", r)
		}
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", j.pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Uid:\t65533\t65533\t65533\t65533", "CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Groups:\t \n"} {
		if !strings.Contains(string(status), want) {
			t.Errorf("the gateway's status has no %q", want)
		}
	}
}

func TestNamesThatLeadWhereNobodyMayGo(t *testing.T) {
	var all []plan.Egress
	for name := range egresstest.Names {
		all = append(all, allow(name, 443, 1<<20))
	}
	j := newJob(t, testPlan(all...))
	for _, name := range []string{"private", "metadata", "loopback", "node", "mixed", "mapped", "ula"} {
		if _, said := j.connect(name + ".example.com:443"); !strings.Contains(said, "rule: "+gate.RuleRange+"\n") {
			t.Errorf("%s: %q", name, said)
		}
	}
	if got := j.world.Reached(); len(got) != 0 {
		t.Errorf("somebody reached %v", got)
	}
}

func TestClosedGatewayCutsWhatIsOpen(t *testing.T) {
	j := newJob(t, testPlan(allow("allowed.example.com", 443, 1<<20)))
	c, _ := j.connect("allowed.example.com:443")
	s, err := j.secure(c, "allowed.example.com")
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := j.Close(t.Context(), "revoked"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Read(make([]byte, 1)); err == nil {
		t.Error("the connection is still open")
	}
	t.Logf("cut after %s", time.Since(began))
	if _, said := j.connect("allowed.example.com:443"); !strings.Contains(said, "rule: closed\n") {
		t.Errorf("after the end: %q", said)
	}
	r := j.report()
	if r.Closed != "revoked" || len(r.Connections) != 1 || r.Connections[0].End != "revoked" {
		t.Errorf("%+v", r)
	}
}

func TestGatewayOutlivesItsAgentAndIsReplacedClosed(t *testing.T) {
	j := newJob(t, testPlan(allow("allowed.example.com", 443, 1<<20)))
	c, _ := j.connect("allowed.example.com:443")
	if _, err := j.secure(c, "allowed.example.com"); err != nil {
		t.Fatal(err)
	}
	j.Detach()
	again, err := Attach(t.Context(), j.dir)
	if err != nil {
		t.Fatal(err)
	}
	if r, err := again.Report(t.Context(), 0, 0); err != nil || len(r.Connections) != 1 {
		t.Fatalf("%+v, %v", r, err)
	}
	if err := unix.Kill(j.pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	if _, err := io.ReadAll(c); err != nil && errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection outlives the gateway: %v", err)
	}
	if _, err := Attach(t.Context(), j.dir); err == nil {
		t.Fatal("attached to a dead gateway")
	}
	j.Gateway, err = j.cfg.Replace(t.Context(), j.dir, "gateway-lost", func(pid int) error { j.pid = pid; return nil })
	if err != nil {
		t.Fatal(err)
	}
	if _, said := j.connect("allowed.example.com:443"); !strings.Contains(said, "rule: closed\n") {
		t.Errorf("the new gateway said %q", said)
	}
	if err := j.Recheck(); err != nil {
		t.Error(err)
	}
}

func TestRecheckSeesWhatChanged(t *testing.T) {
	j := newJob(t, testPlan(allow("allowed.example.com", 443, 1<<20)))
	gw := filepath.Join(j.dir, gatewayNetName)
	for name, tt := range map[string]struct {
		id     string
		change func() error
		back   func() error
	}{
		"forwarding switched on": {"egress.setting", func() error {
			return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0)
		}, func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0) }},
		"another link": {"egress.links", func() error {
			if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "side"}, PeerName: "side1"}); err != nil {
				return err
			}
			l, err := netlink.LinkByName("side")
			if err != nil {
				return err
			}
			return netlink.LinkSetUp(l)
		}, func() error {
			l, err := netlink.LinkByName("side")
			if err != nil {
				return err
			}
			return netlink.LinkDel(l)
		}},
		"a rule put in": {"egress.filter", func() error {
			return netfilter(gw, func(c *nftables.Conn) error {
				all, err := c.ListChains()
				if err != nil {
					return err
				}
				for _, ch := range all {
					if ch.Name == across {
						c.AddRule(&nftables.Rule{Table: ch.Table, Chain: ch, Exprs: []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}})
					}
				}
				return c.Flush()
			})
		}, nil},
		"a table that redirects": {"egress.filter", func() error {
			return netfilter(gw, func(c *nftables.Conn) error {
				c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "nat"})
				return c.Flush()
			})
		}, nil},
		"no rules at all": {"egress.filter", func() error {
			return netfilter(gw, func(c *nftables.Conn) error {
				c.FlushRuleset()
				return c.Flush()
			})
		}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			if err := netns.Inside(gw, tt.change); err != nil {
				t.Fatal(err)
			}
			err := j.Recheck()
			var r *check.Refusal
			if !errors.As(err, &r) || len(r.Checks) != 1 || r.Checks[0].ID != tt.id {
				t.Errorf("got %v, want %s alone", err, tt.id)
			}
			back := tt.back
			if back == nil {
				back = func() error {
					err := netfilter(gw, func(c *nftables.Conn) error {
						c.FlushRuleset()
						return c.Flush()
					})
					return errors.Join(err, setFilter(gw))
				}
			}
			if err := netns.Inside(gw, back); err != nil {
				t.Fatal(err)
			}
			if err := j.Recheck(); err != nil {
				t.Errorf("put back, it still does not pass: %v", err)
			}
		})
	}
}

// Whoever has broken out of the sandbox's kernel has the link itself.
func TestOnTheLinkNothingButTheProxyAnswers(t *testing.T) {
	j := newJob(t, testPlan(allow("allowed.example.com", 443, 1<<20)))
	j.inside(func() error {
		link, err := netlink.LinkByName(jobLink)
		if err != nil {
			return err
		}
		// A route, another address, IPv6: all that the sandbox was not given.
		v6, err := netlink.ParseAddr("fd77::2/64")
		if err != nil {
			return err
		}
		v6.Flags = unix.IFA_F_NODAD
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("0"), 0); err != nil {
			return err
		}
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", []byte("0"), 0); err != nil {
			return err
		}
		spoofed, err := netlink.ParseAddr("44.1.0.9/32")
		if err != nil {
			return err
		}
		_, all, _ := net.ParseCIDR("0.0.0.0/0")
		return errors.Join(netlink.AddrAdd(link, v6), netlink.AddrAdd(link, spoofed),
			netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: all, Gw: net.IPv4(10, 77, 0, 1)}),
			netlink.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, Family: unix.AF_INET6, State: netlink.NUD_PERMANENT, IP: net.ParseIP("fd77::1"), HardwareAddr: gatewayMAC}))
	})
	try := func(network, from, to string) func() error {
		return func() error {
			d := net.Dialer{Timeout: 300 * time.Millisecond}
			if from != "" {
				a := netip.MustParseAddr(from)
				if strings.HasPrefix(network, "udp") {
					d.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, 0))
				} else {
					d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(a, 0))
				}
			}
			c, err := d.Dial(network, to)
			if err != nil {
				return nil
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(200 * time.Millisecond))
			if _, err := c.Write([]byte("x")); err != nil {
				return nil
			}
			if n, _ := c.Read(make([]byte, 1)); n > 0 || network == "tcp" {
				return fmt.Errorf("%s to %s is answered", network, to)
			}
			return nil
		}
	}
	var wg sync.WaitGroup
	for _, f := range []func() error{
		try("tcp", "", "44.1.0.2:443"), try("udp", "", "44.1.0.2:53"), try("udp", "", "44.1.0.3:53"), try("tcp", "", "44.1.0.1:443"),
		try("tcp", "44.1.0.9", "44.1.0.2:443"), try("tcp", "44.1.0.9", "10.77.0.1:3128"),
		try("tcp", "", "10.77.0.1:22"), try("tcp", "", "10.77.0.1:443"), try("udp", "", "10.77.0.1:3128"), try("tcp", "", "10.77.0.1:53"),
		try("tcp", "", "[fd77::1]:3128"), try("tcp", "", "[2a00:1::2]:443"), try("tcp", "", "169.254.169.254:443"), try("tcp", "", "127.0.0.1:3128"),
	} {
		wg.Go(func() {
			if err := netns.Inside(Namespace(j.dir), f); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := j.world.Reached(); len(got) != 0 {
		t.Errorf("somebody reached %v", got)
	}
	if got := j.world.Strange(); len(got) != 0 {
		t.Errorf("the job's own packets are on the uplink: %v", got)
	}
	dropped, err := j.Dropped()
	if err != nil {
		t.Fatal(err)
	}
	// IPv6 is switched off in the namespace, and ends before the filter sees it.
	for _, kind := range []string{"tcp", "udp"} {
		if dropped[kind] == 0 {
			t.Errorf("the filter has counted no %s: %v", kind, dropped)
		}
	}
	t.Log(dropped)
}

// Without the filter the packets still lead nowhere: the gateway's namespace has one
// link and forwards nothing.
func TestWithoutAFilterThereIsNoWayOut(t *testing.T) {
	j := newJob(t, testPlan(allow("allowed.example.com", 443, 1<<20)))
	if err := netfilter(filepath.Join(j.dir, gatewayNetName), func(c *nftables.Conn) error {
		c.FlushRuleset()
		return c.Flush()
	}); err != nil {
		t.Fatal(err)
	}
	j.inside(func() error {
		link, err := netlink.LinkByName(jobLink)
		if err != nil {
			return err
		}
		_, all, _ := net.ParseCIDR("0.0.0.0/0")
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: all, Gw: net.IPv4(10, 77, 0, 1)}); err != nil {
			return err
		}
		for _, to := range []string{"44.1.0.2:443", "44.1.0.2:80", "44.1.0.1:443", "169.254.169.254:443"} {
			if c, err := net.DialTimeout("tcp", to, 200*time.Millisecond); err == nil {
				c.Close()
				return fmt.Errorf("%s is reached", to)
			}
		}
		return nil
	})
	if got := append(j.world.Reached(), j.world.Strange()...); len(got) != 0 {
		t.Errorf("on the uplink: %v", got)
	}
}

// The jobs' namespaces have the same addresses and nothing between them.
func TestJobsDoNotMeet(t *testing.T) {
	a := newJob(t, testPlan(allow("allowed.example.com", 443, 1<<20)))
	b := newJob(t, testPlan(allow("allowed.example.com", 443, 1<<20)))
	var l net.Listener
	b.inside(func() (err error) {
		l, err = net.Listen("tcp", "10.77.0.2:7000")
		return err
	})
	defer l.Close()
	came := make(chan struct{})
	go func() {
		if c, err := l.Accept(); err == nil {
			c.Close()
			close(came)
		}
	}()
	a.inside(func() error {
		if c, err := net.DialTimeout("tcp", "10.77.0.2:7000", 200*time.Millisecond); err == nil {
			c.Close()
			return errors.New("one job reaches another one's listener at their common address")
		}
		return nil
	})
	if _, said := a.connect("10.77.0.2:7000"); !strings.Contains(said, gate.RuleAddress) {
		t.Errorf("through the gateway: %q", said)
	}
	select {
	case <-came:
		t.Error("another job came")
	default:
	}
	if !slices.Contains(rulesOf(a.report()), gate.RuleAddress) || len(b.report().Denials) != 0 {
		t.Error("the refusal is in the wrong record")
	}
}
