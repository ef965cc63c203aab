package sandbox

import (
	_ "embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/egress"
	"github.com/coffer-run/coffer/runner/egress/egresstest"
	"github.com/coffer-run/coffer/runner/egress/gate"
	"github.com/coffer-run/coffer/runner/egress/netns"
)

var update = flag.Bool("update", false, "write the table in docs/egress.md from this run")

//go:embed testdata/bypass.py
var bypass string

// attempt is one way past the gateway, and what stands in it.
type attempt struct {
	name    string // as bypass.py names it
	attempt string
	out     string // how it ends, in the job's eyes
	stopped string // what stops it, for people
	rule    string // under which the gateway records it
}

var attempts = []attempt{
	{"control", "control: TLS to a listed name, through the proxy", "reached", "nothing: it is allowed", ""},
	{"control: name", "control: asking for a listed name's address", "1 answers", "nothing: it is allowed", ""},
	{"direct", "connects to a server's address itself", "ENETUNREACH", "no route in the sandbox; behind it the filter, and no route at all", ""},
	{"direct: IPv6", "the same by IPv6", "ENETUNREACH", "no IPv6 address; IPv6 is off in the gateway's namespace", ""},
	{"direct: UDP", "QUIC or any UDP to a server", "ENETUNREACH", "no route", ""},
	{"direct: metadata", "connects to a cloud's metadata address", "ENETUNREACH", "no route", ""},
	{"raw: packet", "opens a packet socket", "EPERM", "no capabilities in the sandbox", ""},
	{"raw: IP", "opens a raw IP socket", "EPERM", "no capabilities in the sandbox", ""},
	{"raw: ICMP", "opens a raw ICMP socket", "EPERM", "no capabilities in the sandbox", ""},
	{"route", "adds a route", "ENOTTY", "the sandbox's kernel has no such call", ""},
	{"address", "asks the proxy for an address", "403 address-literal", "the proxy takes names only", gate.RuleAddress},
	{"address: number", "the address written as one number", "403 not-listed", "it is no name of the plan", gate.RuleNotListed},
	{"address: IPv6", "asks the proxy for an IPv6 address", "403 address-literal", "the proxy takes names only", gate.RuleAddress},
	{"unlisted", "asks the proxy for a name that is not in the plan", "403 not-listed", "the plan's list", gate.RuleNotListed},
	{"port", "asks for a listed name at another port", "403 not-listed", "the plan's list", gate.RuleNotListed},
	{"dot", "asks for a listed name with a final dot", "403 not-listed", "names are compared as written", gate.RuleNotListed},
	{"plain", "sends a plain HTTP request through the proxy", "403 not-connect", "TLS tunnels only", gate.RuleMethod},
	{"not TLS", "speaks SSH in a tunnel to a listed name", "alert 49", "the first bytes must be a ClientHello", gate.RuleNoTLS},
	{"no name", "sends a ClientHello without a server name", "alert 49", "the server name must be there", gate.RuleNoName},
	{"other name", "asks the proxy for a listed name and the server for another", "alert 49", "both must be equal", gate.RuleOtherName},
	{"split", "control: a ClientHello for the listed name, one byte a packet", "reached", "nothing: it is allowed", ""},
	{"split: records", "control: the same in TLS records of three bytes", "reached", "nothing: it is allowed", ""},
	{"split: other name", "a ClientHello for another name, one byte a packet", "alert 49", "the hello is put together before it is looked at", gate.RuleOtherName},
	{"split: records, other name", "the same in TLS records of three bytes", "alert 49", "the hello is put together before it is looked at", gate.RuleOtherName},
	{"ECH", "hides the name with Encrypted Client Hello", "alert 49", "the extension is refused", gate.RuleHidden},
	{"ESNI", "hides the name with the older encrypted SNI", "alert 49", "the extension is refused", gate.RuleHidden},
	{"two names", "sends two server names", "alert 49", "a repeated extension is refused", gate.RuleNoTLS},
	{"leads: private", "a listed name that leads to a private address", "403 address-range", "addresses are looked at after the name is resolved", gate.RuleRange},
	{"leads: metadata", "a listed name that leads to the metadata service", "403 address-range", "as above", gate.RuleRange},
	{"leads: loopback", "a listed name that leads to loopback", "403 address-range", "as above", gate.RuleRange},
	{"leads: node", "a listed name that leads to the node itself", "403 address-range", "the node's own addresses are refused", gate.RuleRange},
	{"leads: mixed", "a listed name with a public and a private address", "403 address-range", "one refused address refuses the name", gate.RuleRange},
	{"leads: mapped", "a listed name with a private address mapped into IPv6", "403 address-range", "mapped addresses are unmapped first", gate.RuleRange},
	{"leads: ula", "a listed name that leads to a private IPv6 address", "403 address-range", "of IPv6, only public unicast is allowed", gate.RuleRange},
	{"DNS: tunnel", "asks for data as a name below its own domain", "REFUSED", "listed names only; no question is passed on", gate.RuleDNS},
	{"DNS: below a listed name", "asks for data as a name below a listed one", "REFUSED", "listed names only", gate.RuleDNS},
	{"DNS: TXT", "asks for a listed name's TXT record", "0 answers", "addresses only; no question is passed on", ""},
	{"DNS: elsewhere", "asks another name server", "ENETUNREACH", "no route", ""},
	{"gateway: another port", "connects to the gateway at another port", "silence", "the filter", ""},
	{"gateway: DNS by TCP", "connects to the gateway's name server by TCP", "silence", "the filter", ""},
	{"gateway: through itself", "asks the proxy for the gateway's own address", "403 address-literal", "the proxy takes names only", gate.RuleAddress},
	{"gateway: by name", "asks the proxy for localhost", "403 not-listed", "the plan's list", gate.RuleNotListed},
	{"job: its address", "connects to another job at the address that all jobs have", "ECONNREFUSED", "it is the job's own address; the other's namespace is another one", ""},
	{"job: next address", "connects to the address where a next job might be", "ENETUNREACH", "no route", ""},
	{"job: through the gateway", "asks the proxy for another job", "403 address-literal", "the proxy takes names only", gate.RuleAddress},
	{"budget", "sends more than maxBytes to a listed name", "cut", "the connection is cut at the last byte that is allowed", gate.RuleBudget},
	{"budget: again", "connects again when the budget is spent", "403 budget", "nothing is left", gate.RuleBudget},
}

const spendable = 1 << 20

func gateway(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "coffer-gateway")
	cmd := exec.Command("go", "build", "-o", path, "../../cmd/coffer-gateway")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the gateway: %v\n%s", err, out)
	}
	return path
}

// open gives a job's run directory a gateway into a world.
func openGateway(t *testing.T, c egress.Config, dir string, p plan.Plan) *egress.Gateway {
	t.Helper()
	pid := 0
	t.Cleanup(func() {
		if pid != 0 {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		if err := egress.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	g, err := c.Open(t.Context(), dir, p, func(n int) error { pid = n; return nil })
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// Every row is an attempt from inside a sandbox with egress. The world outside sees
// what was let through and nothing else.
func TestBypass(t *testing.T) {
	n := startContainerd(t)
	w := egresstest.New(t)
	cfg := egress.Config{Gateway: gateway(t), Uplink: w.Uplink, Resolvers: []netip.AddrPort{w.Resolver}}
	profile, err := cfg.Profile()
	if err != nil {
		t.Fatal(err)
	}
	n.profile.Egress = profile
	digest, err := n.profile.Digest()
	if err != nil {
		t.Fatal(err)
	}
	var listed []plan.Egress
	for _, name := range []string{"allowed", "private", "metadata", "loopback", "node", "mixed", "mapped", "ula"} {
		listed = append(listed, plan.Egress{Host: name + ".example.com", Port: 443, MaxBytes: 1 << 20, BytesPerSecond: 64 << 20})
	}
	listed = append(listed, plan.Egress{Host: "second.example.com", Port: 443, MaxBytes: spendable, BytesPerSecond: 64 << 20})
	var g *egress.Gateway
	j := n.testJobOf(t, "bypass", func(r *Request) {
		r.Plan.SandboxProfile, r.Plan.Egress = digest, listed
		r.Plan.Output.EgressBytes, r.Plan.Output.EgressBytesPerSecond, r.Plan.Output.EgressEvents = 8<<20, 64<<20, 100
		g = openGateway(t, cfg, r.RunDir, r.Plan)
		r.Network = &Network{Namespace: egress.Namespace(r.RunDir), Resolver: egress.Resolver(r.RunDir), Proxy: egress.Proxy()}
	}, "/usr/bin/python3", "-c", bypass)
	// Another job, which listens for visitors.
	visited := otherJob(t, cfg, j.plan)

	sb, err := plan.ParseSandbox(j.Description())
	if err != nil {
		t.Fatal(err)
	}
	if want, got := sb.Network(j.plan); want != got {
		t.Errorf("the description says network %q, want %q", got, want)
	}
	if err := errors.Join(j.Recheck(t.Context(), j.plan), g.Recheck()); err != nil {
		t.Fatal(err)
	}
	if err := j.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	out := <-j.stdout
	if code, err := ExitCode(<-j.Exited()); err != nil || code != 0 {
		t.Fatalf("exit code %d, %v, after\n%s", code, err, out)
	}
	got := map[string]string{}
	for line := range strings.Lines(out) {
		var a struct{ Name, Out string }
		if err := json.Unmarshal([]byte(line), &a); err != nil {
			t.Fatalf("%v in %q", err, line)
		}
		got[a.Name] = a.Out
	}
	r, err := g.Report(t.Context(), 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	recorded := map[string]int64{}
	for _, d := range r.Denials {
		recorded[d.Rule] += d.Count
	}
	wanted := map[string]int64{}
	for _, a := range attempts {
		if got[a.name] != a.out {
			t.Errorf("%s: it ended in %q, want %q", a.attempt, got[a.name], a.out)
		}
		if a.rule != "" {
			wanted[a.rule]++
		}
		delete(got, a.name)
	}
	if len(got) > 0 {
		t.Errorf("attempts without a row: %v", got)
	}
	for rule, count := range wanted {
		if recorded[rule] != count {
			t.Errorf("the gateway recorded %d under %s, want %d", recorded[rule], rule, count)
		}
	}
	if len(recorded) != len(wanted) {
		t.Errorf("the gateway recorded %v, want %v", recorded, wanted)
	}
	checkWorld(t, w, r)
	if visited() {
		t.Error("the other job had a visitor")
	}
	dropped, err := g.Dropped()
	if err != nil || dropped["tcp"] == 0 {
		t.Errorf("the filter dropped %v, %v", dropped, err)
	}
	document(t)
}

// checkWorld holds what the world saw against the gateway's record.
func checkWorld(t *testing.T, w *egresstest.World, r gate.Report) {
	t.Helper()
	// Three controls, and the one that spends.
	want := []string{"tcp 44.1.0.2:443", "tcp 44.1.0.2:443", "tcp 44.1.0.2:443", "tcp 44.1.0.3:443"}
	if got := slices.Sorted(slices.Values(w.Reached())); !slices.Equal(got, want) {
		t.Errorf("the world was reached at %v, want %v", got, want)
	}
	if len(r.Connections) != len(want) {
		t.Errorf("%d connections are recorded, want %d", len(r.Connections), len(want))
	}
	for _, c := range r.Connections {
		if c.Host == "second.example.com" && (c.Sent != spendable || c.End != "budget") {
			t.Errorf("of a budget of %d bytes, %d were sent: %s", spendable, c.Sent, c.End)
		}
	}
	if s := w.Strange(); len(s) > 0 {
		t.Errorf("packets from %v are on the uplink", s)
	}
	for _, name := range w.Asked() {
		if _, known := egresstest.Names[name]; !known || name == "unlisted.example.com" {
			t.Errorf("the resolver was asked for %s", name)
		}
	}
}

func otherJob(t *testing.T, cfg egress.Config, p plan.Plan) (visited func() bool) {
	t.Helper()
	dir := t.TempDir()
	openGateway(t, cfg, dir, p)
	came := make(chan struct{}, 1)
	if err := netns.Inside(egress.Namespace(dir), func() error {
		l, err := net.Listen("tcp", "10.77.0.2:7000")
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			if c, err := l.Accept(); err == nil {
				c.Close()
				came <- struct{}{}
			}
		}()
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return func() bool {
		select {
		case <-came:
			return true
		default:
			return false
		}
	}
}

const (
	tableBegin = "<!-- written by go test ./runner/sandbox -run TestBypass -update -->\n"
	tableEnd   = "<!-- end -->\n"
)

// document holds the table in docs/egress.md against the attempts.
func document(t *testing.T) {
	t.Helper()
	if t.Failed() {
		return
	}
	var b strings.Builder
	b.WriteString(tableBegin + "| the job | what it sees | what stops it | recorded as |\n|---|---|---|---|\n")
	for _, a := range attempts {
		rule := "-"
		if a.rule != "" {
			rule = "`" + a.rule + "`"
		}
		fmt.Fprintf(&b, "| %s | `%s` | %s | %s |\n", a.attempt, a.out, a.stopped, rule)
	}
	const doc = "../../docs/egress.md"
	text, err := os.ReadFile(doc)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok1 := strings.Cut(string(text), tableBegin)
	old, after, ok2 := strings.Cut(rest, tableEnd)
	if !ok1 || !ok2 {
		t.Fatal("docs/egress.md has no place for the table")
	}
	if tableBegin+old == b.String() {
		return
	}
	if !*update {
		t.Error("docs/egress.md is not what this run shows; go test ./runner/sandbox -run TestBypass -update writes it")
		return
	}
	if err := os.WriteFile(doc, []byte(before+b.String()+tableEnd+after), 0o644); err != nil {
		t.Fatal(err)
	}
}

// A sandbox whose plan allows no egress gets no network, and one whose plan allows it
// gets none from a node that offers none.
func TestNetworkIsThePlans(t *testing.T) {
	n := &Node{}
	none := plan.Plan{}
	some := plan.Plan{Egress: []plan.Egress{{Host: "a.example.com", Port: 443, MaxBytes: 1, BytesPerSecond: 1}}}
	if f, err := n.flags(none); err != nil || !slices.Contains(f, noNetwork) {
		t.Errorf("without egress: %v, %v", f, err)
	}
	if f, err := n.flags(some); err == nil {
		t.Errorf("a node without a network gives %v", f)
	}
	n.profile.Egress = &plan.EgressProfile{Flag: egress.SandboxFlag}
	if f, err := n.flags(some); err != nil || slices.Contains(f, noNetwork) || !slices.Contains(f, egress.SandboxFlag) {
		t.Errorf("with egress: %v, %v", f, err)
	}
	if f, err := n.flags(none); err != nil || !slices.Contains(f, noNetwork) || slices.Contains(f, egress.SandboxFlag) {
		t.Errorf("without egress, on a node that offers it: %v, %v", f, err)
	}
	if _, err := buildSpec(some, nil, nil, nil, ""); err == nil {
		t.Error("a plan with egress makes a sandbox without a network")
	}
	if _, err := buildSpec(none, nil, nil, &Network{Namespace: "/x"}, ""); err == nil {
		t.Error("a plan without egress makes a sandbox with a network")
	}
}
