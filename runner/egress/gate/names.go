package gate

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"

	"github.com/coffer-run/coffer/attest/plan"
)

const (
	// lookupTimeout bounds one question to the resolver.
	lookupTimeout = 5 * time.Second
	// remember is how long the addresses of a name are kept: the job sees the ones
	// that the gate connects to.
	remember = 30 * time.Second
	// maxQuestions bounds the questions that are answered at one time; more are
	// dropped, as a lost packet is.
	maxQuestions = 64
	// maxAddresses bounds the addresses of one name that are tried.
	maxAddresses = 8
)

// refused are addresses that no destination may have: not public
// (the special-purpose registries of RFC 6890), or the metadata service of a cloud.
var refused = prefixes(
	"0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24",
	"192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
	"168.63.129.16/32", // Azure's WireServer, on a public address
	// Of IPv6 only 2000::/3 is public (RFC 4291); these parts of it are not, or carry
	// an IPv4 address that would have to be looked at (Teredo, 6to4).
	"2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",
)

var publicV6 = netip.MustParsePrefix("2000::/3")

func prefixes(s ...string) []netip.Prefix {
	out := make([]netip.Prefix, 0, len(s))
	for _, p := range s {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

// public reports whether a destination may have an address.
func public(a netip.Addr) bool {
	a = a.Unmap()
	if !a.IsValid() || a.Is6() && !publicV6.Contains(a) {
		return false
	}
	return !slices.ContainsFunc(refused, func(p netip.Prefix) bool { return p.Contains(a) })
}

// lookup asks the given resolvers, one after the other, or the node's.
func lookup(resolvers []netip.AddrPort) func(context.Context, string) ([]netip.Addr, error) {
	r := &net.Resolver{PreferGo: true}
	if len(resolvers) > 0 {
		next := 0
		var mu sync.Mutex
		r.Dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
			mu.Lock()
			at := resolvers[next%len(resolvers)]
			next++
			mu.Unlock()
			var d net.Dialer
			return d.DialContext(ctx, network, at.String())
		}
	}
	return func(ctx context.Context, host string) ([]netip.Addr, error) {
		// The final dot keeps search domains out.
		return r.LookupNetIP(ctx, "ip", host+".")
	}
}

// OwnAddresses are those of the network namespace of this thread.
func OwnAddresses() ([]netip.Addr, error) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list own addresses: %w", err)
	}
	var out []netip.Addr
	for _, a := range all {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			out = append(out, p.Addr().Unmap())
		}
	}
	return out, nil
}

// resolve returns the addresses of a listed name, IPv4 first, or the rule that
// refuses it. One address that may not be refuses the name: whoever answers for it
// mixes what is public with what is not.
func (g *Gate) resolve(host string) ([]netip.Addr, string) {
	ctx, cancel := context.WithTimeout(g.ctx, lookupTimeout)
	defer cancel()
	found, err := g.lookup(ctx, host)
	if err != nil || len(found) == 0 {
		g.log.Info("name not resolved", "host", host, "error", err)
		return nil, RuleResolve
	}
	own, err := g.own()
	if err != nil {
		g.log.Warn("own addresses", "error", err)
		return nil, RuleRange
	}
	out := make([]netip.Addr, 0, len(found))
	for _, a := range found {
		a = a.Unmap()
		if !public(a) || slices.Contains(own, a) || slices.Contains(g.cfg.Node, a) {
			return nil, RuleRange
		}
		out = append(out, a)
	}
	slices.SortStableFunc(out, func(a, b netip.Addr) int { return a.BitLen() - b.BitLen() })
	return out[:min(len(out), maxAddresses)], ""
}

// names remembers what was resolved.
type names struct {
	resolve func(string) ([]netip.Addr, string)
	mu      sync.Mutex // guards known; held while a name is resolved, so that each is asked for once
	known   map[string]known
}

type known struct {
	addrs []netip.Addr
	rule  string
	until time.Time
}

func newNames(resolve func(string) ([]netip.Addr, string)) *names {
	return &names{resolve: resolve, known: map[string]known{}}
}

// get returns the addresses of a name that the plan lists.
func (n *names) get(host string) ([]netip.Addr, string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if k, ok := n.known[host]; ok && time.Now().Before(k.until) {
		return k.addrs, k.rule
	}
	addrs, rule := n.resolve(host)
	k := known{addrs, rule, time.Now().Add(remember)}
	if rule == RuleResolve {
		k.until = time.Now().Add(time.Second)
	}
	n.known[host] = k
	return addrs, rule
}

// ServeDNS answers for the names that the plan lists, and for nothing else: no
// question of the job's leaves the gate.
func (g *Gate) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	select {
	case g.questions <- struct{}{}:
		defer func() { <-g.questions }()
	default:
		return
	}
	m := new(dns.Msg)
	m.SetReply(q)
	m.RecursionAvailable = true
	if len(q.Question) != 1 {
		m.Rcode = dns.RcodeFormatError
		_ = w.WriteMsg(m)
		return
	}
	host := strings.ToLower(strings.TrimSuffix(q.Question[0].Name, "."))
	switch {
	case g.ledger.closed() != "":
		m.Rcode = dns.RcodeRefused
	case q.Question[0].Qclass != dns.ClassINET || !g.listed(host):
		g.ledger.deny(host, 53, RuleDNS)
		m.Rcode = dns.RcodeRefused
	case q.Question[0].Qtype == dns.TypeA:
		addrs, rule := g.names.get(host)
		if rule != "" {
			g.ledger.deny(host, 53, rule)
			m.Rcode = dns.RcodeServerFailure
			break
		}
		for _, a := range addrs {
			if a.Is4() {
				m.Answer = append(m.Answer, &dns.A{
					Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: uint32(remember.Seconds())}, A: a.AsSlice(),
				})
			}
		}
	default:
		// Any other record of a listed name: there is none.
	}
	_ = w.WriteMsg(m)
}

func (g *Gate) listed(host string) bool {
	return slices.ContainsFunc(g.cfg.Destinations, func(d plan.Egress) bool { return d.Host == host })
}
