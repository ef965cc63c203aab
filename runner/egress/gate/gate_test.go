package gate

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	"github.com/miekg/dns"

	"github.com/coffer-run/coffer/attest/plan"
)

const good = "allowed.example.com"

// hello is what crypto/tls sends first for a configuration.
func hello(t testing.TB, cfg *tls.Config) []byte {
	t.Helper()
	a, b := net.Pipe()
	defer b.Close()
	cfg.InsecureSkipVerify = true
	go func() {
		_ = tls.Client(a, cfg).Handshake()
	}()
	defer a.Close()
	head := make([]byte, 5)
	if _, err := io.ReadFull(b, head); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, binary.BigEndian.Uint16(head[3:]))
	if _, err := io.ReadFull(b, body); err != nil {
		t.Fatal(err)
	}
	return append(head, body...)
}

// echConfig is an ECHConfigList (RFC 9849, 4) whose public name is the listed one: the
// real name is hidden behind it.
func echConfig(t testing.TB) []byte {
	t.Helper()
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pub := key.PublicKey().Bytes()
	var c []byte
	c = append(c, 7, 0, 0x20) // config id, DHKEM(X25519, HKDF-SHA256)
	c = binary.BigEndian.AppendUint16(c, uint16(len(pub)))
	c = append(c, pub...)
	c = append(c, 0, 4, 0, 1, 0, 1) // HKDF-SHA256, AES-128-GCM
	c = append(c, 64, byte(len(good)))
	c = append(c, good...)
	c = append(c, 0, 0)
	var out []byte
	out = binary.BigEndian.AppendUint16(out, uint16(len(c)+4))
	out = append(out, 0xfe, 0x0d)
	out = binary.BigEndian.AppendUint16(out, uint16(len(c)))
	return append(out, c...)
}

func TestHello(t *testing.T) {
	plain := hello(t, &tls.Config{ServerName: good})
	// The message, cut into records of n bytes.
	cut := func(b []byte, n int) []byte {
		var out []byte
		for body := b[5:]; len(body) > 0; {
			k := min(n, len(body))
			out = append(out, 22, 3, 1, byte(k>>8), byte(k))
			out = append(out, body[:k]...)
			body = body[k:]
		}
		return out
	}
	for name, tt := range map[string]struct {
		bytes []byte
		rule  string
	}{
		"the listed name":              {plain, ""},
		"TLS 1.2":                      {hello(t, &tls.Config{ServerName: good, MaxVersion: tls.VersionTLS12}), ""},
		"in records of one byte":       {cut(plain, 1), ""},
		"upper case":                   {hello(t, &tls.Config{ServerName: "ALLOWED.example.com"}), ""},
		"with data after it":           {append(bytes.Clone(plain), "early"...), ""},
		"another name":                 {hello(t, &tls.Config{ServerName: "evil.example.com"}), RuleOtherName},
		"another name in small pieces": {cut(hello(t, &tls.Config{ServerName: "evil.example.com"}), 7), RuleOtherName},
		"a name below the listed one":  {hello(t, &tls.Config{ServerName: "x." + good}), RuleOtherName},
		"no name":                      {hello(t, &tls.Config{}), RuleNoName},
		"a hidden name":                {hello(t, &tls.Config{ServerName: "evil.example.com", MinVersion: tls.VersionTLS13, EncryptedClientHelloConfigList: echConfig(t)}), RuleHidden},
		"SSH":                          {[]byte("SSH-2.0-x\r\n"), RuleNoTLS},
		"plain HTTP":                   {[]byte("GET / HTTP/1.1\r\nHost: allowed.example.com\r\n\r\n"), RuleNoTLS},
		"SSL 2":                        {append([]byte{0x80, 0x2e, 1, 0, 2}, make([]byte, 44)...), RuleNoTLS},
		"cut off":                      {plain[:len(plain)-1], RuleNoTLS},
		"nothing":                      {nil, RuleNoTLS},
		"records without end":          {bytes.Repeat([]byte{22, 3, 1, 0, 0}, maxHello), RuleNoTLS},
		"a message that is too large":  {append([]byte{22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff}, make([]byte, 1<<20)...), RuleNoTLS},
	} {
		t.Run(name, func(t *testing.T) {
			in := bytes.NewReader(tt.bytes)
			read, rule := readHello(in, good)
			if rule != tt.rule {
				t.Fatalf("rule %q, want %q", rule, tt.rule)
			}
			if rule != "" {
				return
			}
			// What was read and what was not are together what the job sent.
			got, err := io.ReadAll(io.MultiReader(read, in))
			if err != nil || !bytes.Equal(got, tt.bytes) {
				t.Errorf("%d bytes go on, want %d: %v", len(got), len(tt.bytes), err)
			}
		})
	}
}

func TestHelloIsBounded(t *testing.T) {
	// A message of nearly 64 KiB, which crypto/tls would read, in records of one byte.
	in := bytes.NewReader(append([]byte{22, 3, 1, 0, 4, 1, 0, 0xff, 0xff}, bytes.Repeat([]byte{22, 3, 1, 0, 1, 0}, 1<<16)...))
	before := in.Len()
	if _, rule := readHello(in, good); rule != RuleNoTLS || before-in.Len() > maxHello {
		t.Errorf("rule %q after %d bytes, at most %d are read", rule, before-in.Len(), maxHello)
	}
}

func TestPermitted(t *testing.T) {
	g := newGate(t, Config{Destinations: []plan.Egress{dest(good), {Host: "spent.example.com", Port: 443, BytesPerSecond: 1}}, MaxBytes: 10, BytesPerSecond: 1})
	for at, want := range map[string]string{
		good + " 443": "", good + " 444": RuleNotListed, "evil.example.com 443": RuleNotListed, "x." + good + " 443": RuleNotListed, " 443": RuleNotListed,
		"44.1.0.2 443": RuleAddress, "::1 443": RuleAddress, "fe80::1%eth0 443": RuleAddress, "spent.example.com 443": RuleBudget,
	} {
		host, port, _ := strings.Cut(at, " ")
		n, _ := strconv.Atoi(port)
		if rule := g.permitted(host, n); rule != want {
			t.Errorf("%s: %q, want %q", at, rule, want)
		}
	}
	g.all.take(g.each[key(good, 443)], 10)
	if rule := g.permitted(good, 443); rule != RuleBudget {
		t.Errorf("with the job's budget spent: %q", rule)
	}
}

func FuzzHello(f *testing.F) {
	f.Add(hello(f, &tls.Config{ServerName: good}))
	f.Add(hello(f, &tls.Config{ServerName: "evil.example.com", MinVersion: tls.VersionTLS13, EncryptedClientHelloConfigList: echConfig(f)}))
	f.Fuzz(func(t *testing.T, b []byte) {
		in := bytes.NewReader(b)
		read, rule := readHello(in, good)
		if rule != "" {
			return
		}
		got, err := io.ReadAll(io.MultiReader(read, in))
		if err != nil || !bytes.Equal(got, b) {
			t.Errorf("%d bytes go on, want %d: %v", len(got), len(b), err)
		}
	})
}

func TestRequest(t *testing.T) {
	for name, tt := range map[string]struct {
		text, host string
		port       int
		rule       string
	}{
		"a name":            {"CONNECT a.example.com:443 HTTP/1.1\r\nHost: a.example.com:443\r\n\r\n", "a.example.com", 443, ""},
		"upper case":        {"CONNECT A.Example.com:443 HTTP/1.1\r\n\r\n", "a.example.com", 443, ""},
		"another Host":      {"CONNECT a.example.com:443 HTTP/1.1\r\nHost: b.example.com:443\r\n\r\n", "a.example.com", 443, ""},
		"a GET":             {"GET http://a.example.com:81/x HTTP/1.1\r\nHost: a.example.com\r\n\r\n", "a.example.com", 81, RuleMethod},
		"no port":           {"CONNECT a.example.com HTTP/1.1\r\n\r\n", "", 0, RuleRequest},
		"port 0":            {"CONNECT a.example.com:0 HTTP/1.1\r\n\r\n", "", 0, RuleRequest},
		"a port too far":    {"CONNECT a.example.com:65979 HTTP/1.1\r\n\r\n", "", 0, RuleRequest},
		"a negative port":   {"CONNECT a.example.com:-1 HTTP/1.1\r\n\r\n", "", 0, RuleRequest},
		"a named port":      {"CONNECT a.example.com:https HTTP/1.1\r\n\r\n", "", 0, RuleRequest},
		"two requests":      {"CONNECT a.example.com:443\r\nCONNECT b.example.com:443 HTTP/1.1\r\n\r\n", "", 0, RuleRequest},
		"no request":        {"\x16\x03\x01\x00\x01", "", 0, RuleRequest},
		"headers for ever":  {"CONNECT a.example.com:443 HTTP/1.1\r\n" + strings.Repeat("X: y\r\n", maxHead), "", 0, RuleRequest},
		"a path after it":   {"CONNECT a.example.com:443/x HTTP/1.1\r\n\r\n", "", 0, RuleRequest},
		"a zero byte in it": {"CONNECT a\x00.example.com:443 HTTP/1.1\r\n\r\n", "", 0, RuleRequest},
	} {
		t.Run(name, func(t *testing.T) {
			host, port, rule := request(bufio.NewReader(io.LimitReader(strings.NewReader(tt.text), maxHead)))
			if host != tt.host || port != tt.port || rule != tt.rule {
				t.Errorf("got %q, %d, %q", host, port, rule)
			}
		})
	}
}

// What the parser lets through as a name, the plan must know letter by letter.
func FuzzRequest(f *testing.F) {
	f.Add("CONNECT allowed.example.com:443 HTTP/1.1\r\nHost: x\r\n\r\n")
	f.Add("CONNECT [::1]:443 HTTP/1.1\r\n\r\n")
	g := newGate(f, Config{Destinations: []plan.Egress{dest(good)}, MaxBytes: 1, BytesPerSecond: 1})
	f.Fuzz(func(t *testing.T, s string) {
		host, port, rule := request(bufio.NewReader(strings.NewReader(s)))
		if rule == "" && g.permitted(host, port) == "" && (host != good || port != 443) {
			t.Errorf("%q, %d is let through", host, port)
		}
	})
}

func dest(host string) plan.Egress {
	return plan.Egress{Host: host, Port: 443, MaxBytes: 1000, BytesPerSecond: 1 << 20}
}

func newGate(t testing.TB, cfg Config) *Gate {
	t.Helper()
	g, err := New(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func TestZeroConfigIsRefused(t *testing.T) {
	for name, cfg := range map[string]Config{
		"nothing":         {},
		"no destinations": {MaxBytes: 1, BytesPerSecond: 1},
		"no budget":       {Destinations: []plan.Egress{dest(good)}, BytesPerSecond: 1},
		"no rate":         {Destinations: []plan.Egress{dest(good)}, MaxBytes: 1},
	} {
		if _, err := New(cfg, slog.New(slog.DiscardHandler)); err == nil {
			t.Errorf("%s: a gate opens", name)
		}
	}
	if _, err := New(Config{Closed: "x"}, nil); err == nil {
		t.Error("a gate opens without a log")
	}
	g := newGate(t, Config{Closed: "gateway-lost"})
	if rule := g.permitted(good, 443); rule != RuleClosed {
		t.Errorf("a closed gate says %q", rule)
	}
}

func TestAddresses(t *testing.T) {
	for addr, want := range map[string]bool{
		"44.1.0.2": true, "8.8.8.8": true, "2a00:1::2": true, "2606:4700::1111": true,
		"0.0.0.0": false, "10.0.0.1": false, "100.64.0.1": false, "100.100.100.200": false, "127.0.0.1": false, "169.254.169.254": false,
		"172.16.0.1": false, "172.31.255.255": false, "172.32.0.1": true, "192.0.0.192": false, "192.0.2.1": false, "192.168.1.1": false,
		"198.18.0.1": false, "198.51.100.1": false, "203.0.113.1": false, "224.0.0.1": false, "240.0.0.1": false, "255.255.255.255": false,
		"168.63.129.16": false, "168.63.129.17": true,
		"::": false, "::1": false, "fe80::1": false, "fc00::1": false, "fd00:ec2::254": false, "ff02::1": false, "::ffff:10.0.0.1": false, "::ffff:44.1.0.2": true,
		"64:ff9b::a00:1": false, "2002:a00:1::": false, "2001::1": false, "2001:db8::1": false, "3fff::1": false, "::10.0.0.1": false, "4000::1": false,
	} {
		if got := public(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s: %t, want %t", addr, got, want)
		}
	}
	if public(netip.Addr{}) || public(netip.MustParseAddr("2a00:1::2%eth0")) {
		t.Error("no address, or one with a zone, is public")
	}
}

func TestResolve(t *testing.T) {
	server := netip.MustParseAddr("44.1.0.2")
	v6 := netip.MustParseAddr("2a00:1::2")
	for name, tt := range map[string]struct {
		found []netip.Addr
		err   error
		rule  string
		first netip.Addr
	}{
		"public":                     {[]netip.Addr{server}, nil, "", server},
		"IPv4 first":                 {[]netip.Addr{v6, server}, nil, "", server},
		"mapped and public":          {[]netip.Addr{netip.MustParseAddr("::ffff:44.1.0.2")}, nil, "", server},
		"one of two is private":      {[]netip.Addr{server, netip.MustParseAddr("10.0.0.1")}, nil, RuleRange, netip.Addr{}},
		"the node's own":             {[]netip.Addr{netip.MustParseAddr("44.1.0.1")}, nil, RuleRange, netip.Addr{}},
		"none":                       {nil, nil, RuleResolve, netip.Addr{}},
		"an error":                   {nil, errors.New("away"), RuleResolve, netip.Addr{}},
		"an error besides an answer": {[]netip.Addr{server}, errors.New("away"), RuleResolve, netip.Addr{}},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGate(t, Config{Destinations: []plan.Egress{dest(good)}, MaxBytes: 1, BytesPerSecond: 1})
			g.lookup = func(context.Context, string) ([]netip.Addr, error) { return tt.found, tt.err }
			g.own = func() ([]netip.Addr, error) { return []netip.Addr{netip.MustParseAddr("44.1.0.1")}, nil }
			addrs, rule := g.resolve(good)
			if rule != tt.rule || rule == "" && addrs[0] != tt.first {
				t.Errorf("got %v, %q", addrs, rule)
			}
		})
	}
	t.Run("the node's behind another uplink", func(t *testing.T) {
		g := newGate(t, Config{Destinations: []plan.Egress{dest(good)}, MaxBytes: 1, BytesPerSecond: 1, Node: []netip.Addr{server}})
		g.lookup = func(context.Context, string) ([]netip.Addr, error) { return []netip.Addr{server}, nil }
		g.own = func() ([]netip.Addr, error) { return nil, nil }
		if _, rule := g.resolve(good); rule != RuleRange {
			t.Errorf("rule %q", rule)
		}
	})
	t.Run("the node's own are not known", func(t *testing.T) {
		g := newGate(t, Config{Destinations: []plan.Egress{dest(good)}, MaxBytes: 1, BytesPerSecond: 1})
		g.lookup = func(context.Context, string) ([]netip.Addr, error) { return []netip.Addr{server}, nil }
		g.own = func() ([]netip.Addr, error) { return nil, errors.New("away") }
		if _, rule := g.resolve(good); rule != RuleRange {
			t.Errorf("rule %q", rule)
		}
	})
}

// A name is resolved once for a while: what the job is told and what the gate
// connects to are the same.
func TestNamesArePinned(t *testing.T) {
	asked := 0
	n := newNames(func(string) ([]netip.Addr, string) {
		asked++
		return []netip.Addr{netip.AddrFrom4([4]byte{44, 1, 0, byte(asked)})}, ""
	})
	a, _ := n.get(good)
	b, _ := n.get(good)
	if asked != 1 || a[0] != b[0] {
		t.Errorf("asked %d times, %v then %v", asked, a, b)
	}
}

type answerTo struct {
	dns.ResponseWriter
	m *dns.Msg
}

func (a *answerTo) WriteMsg(m *dns.Msg) error { a.m = m; return nil }

func TestNamesServed(t *testing.T) {
	g := newGate(t, Config{Destinations: []plan.Egress{dest(good)}, MaxBytes: 1, BytesPerSecond: 1, Events: 10})
	var asked []string
	g.lookup = func(_ context.Context, host string) ([]netip.Addr, error) {
		asked = append(asked, host)
		return []netip.Addr{netip.MustParseAddr("44.1.0.2"), netip.MustParseAddr("2a00:1::2")}, nil
	}
	for name, tt := range map[string]struct {
		name    string
		qtype   uint16
		class   uint16
		code    int
		answers int
	}{
		"a listed name":           {good + ".", dns.TypeA, dns.ClassINET, dns.RcodeSuccess, 1},
		"in upper case":           {"ALLOWED.example.com.", dns.TypeA, dns.ClassINET, dns.RcodeSuccess, 1},
		"its IPv6 address":        {good + ".", dns.TypeAAAA, dns.ClassINET, dns.RcodeSuccess, 0},
		"its text":                {good + ".", dns.TypeTXT, dns.ClassINET, dns.RcodeSuccess, 0},
		"everything of it":        {good + ".", dns.TypeANY, dns.ClassINET, dns.RcodeSuccess, 0},
		"another class":           {good + ".", dns.TypeA, dns.ClassCHAOS, dns.RcodeRefused, 0},
		"a name below it":         {"x." + good + ".", dns.TypeA, dns.ClassINET, dns.RcodeRefused, 0},
		"the name above it":       {"example.com.", dns.TypeA, dns.ClassINET, dns.RcodeRefused, 0},
		"the address as a name":   {"2.0.1.44.in-addr.arpa.", dns.TypePTR, dns.ClassINET, dns.RcodeRefused, 0},
		"the root's name servers": {".", dns.TypeNS, dns.ClassINET, dns.RcodeRefused, 0},
	} {
		t.Run(name, func(t *testing.T) {
			w := &answerTo{}
			g.ServeDNS(w, &dns.Msg{Question: []dns.Question{{Name: tt.name, Qtype: tt.qtype, Qclass: tt.class}}})
			if w.m.Rcode != tt.code || len(w.m.Answer) != tt.answers {
				t.Errorf("code %d, %d answers", w.m.Rcode, len(w.m.Answer))
			}
		})
	}
	if len(asked) != 1 || asked[0] != good {
		t.Errorf("the resolver was asked for %v", asked)
	}
	w := &answerTo{}
	g.ServeDNS(w, &dns.Msg{})
	if w.m.Rcode != dns.RcodeFormatError {
		t.Errorf("no question: code %d", w.m.Rcode)
	}
}

func TestBudgetsAreExact(t *testing.T) {
	all, one := newBudget(100, 1<<20), newBudget(60, 1<<20)
	other := newBudget(1000, 1<<20)
	if n := all.take(one, 50); n != 50 {
		t.Errorf("took %d of 50", n)
	}
	if n := all.take(one, 50); n != 10 {
		t.Errorf("took %d where 10 were left for the destination", n)
	}
	if n := all.take(other, 50); n != 40 {
		t.Errorf("took %d where 40 were left for the job", n)
	}
	if n := all.take(other, 1); n != 0 || all.left() != 0 || one.left() != 0 || other.left() != 960 {
		t.Errorf("took %d; left %d, %d, %d", n, all.left(), one.left(), other.left())
	}
}

// Names are the job's to choose: beyond the budget they are counted and not kept.
func TestRefusalsByNameAreBounded(t *testing.T) {
	l := newLedger(3)
	for i := range 10 {
		l.deny(strings.Repeat("x", i*100), 443, RuleNotListed)
	}
	l.deny("", 443, RuleNotListed)
	r, _ := l.report(0)
	if len(r.Denials) != 3 || r.Untold != 7 || r.Denials[0].Count != 2 {
		t.Errorf("%d by name, %d more, the first %d times", len(r.Denials), r.Untold, r.Denials[0].Count)
	}
	long := newLedger(1)
	long.deny(strings.Repeat("x", 10_000), 443, RuleNotListed)
	if r, _ := long.report(0); len(r.Denials[0].Host) != maxName {
		t.Errorf("a name of %d bytes is kept", len(r.Denials[0].Host))
	}
	if r, _ := l.report(r.Sequence); len(r.Denials) != 0 {
		t.Error("a report after the last change repeats it")
	}
}

func TestOnlySoManyConnectionsAtOnce(t *testing.T) {
	l := newLedger(1)
	var conns []net.Conn
	for range MaxOpen {
		a, b := net.Pipe()
		defer a.Close()
		defer b.Close()
		if !l.enter(a) {
			t.Fatal("refused too early")
		}
		conns = append(conns, a)
	}
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if l.enter(a) {
		t.Error("one too many is let in")
	}
	l.leave(conns[0])
	if !l.enter(a) {
		t.Error("refused though there is room")
	}
}

// Whoever waits for a gate to close waits for its connections, and nothing begins
// after.
func TestNothingBeginsAfterClose(t *testing.T) {
	g := newGate(t, Config{Destinations: []plan.Egress{dest(good)}, MaxBytes: 1, BytesPerSecond: 1})
	g.Close("revoked")
	g.Close("again")
	if _, ok := g.ledger.open(good, 443, nil); ok {
		t.Error("a connection that was being made is let through")
	}
	if rule := g.permitted(good, 443); rule != RuleClosed {
		t.Errorf("rule %q", rule)
	}
	r, _ := g.ledger.report(0)
	if r.Closed != "revoked" {
		t.Errorf("closed for %q: the first reason stays", r.Closed)
	}
	if _, err := dial(g.ctx, []netip.Addr{netip.MustParseAddr("44.1.0.2")}, 443); err == nil {
		t.Error("dialled after the end")
	}
}
