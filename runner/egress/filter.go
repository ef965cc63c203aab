package egress

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
)

const tableName = "coffer"

// rule is one rule of the filter, as data. A field that is zero matches anything.
type rule struct {
	name   string
	chain  string
	l3     byte // NFPROTO
	l4     byte // IPPROTO
	port   uint16
	paired bool // between the job's and the gateway's address only
	accept bool
}

// Chains. Both drop what no rule accepts, and so does a third, for packets from one
// link to another, which has no rule at all.
const (
	fromJob = "from-job"
	toJob   = "to-job"
	across  = "across"
)

// rules are the filter of every gateway's namespace. What is dropped is told apart
// to be counted.
var rules = []rule{
	{name: "proxy", chain: fromJob, l3: unix.NFPROTO_IPV4, l4: unix.IPPROTO_TCP, port: proxyPort, paired: true, accept: true},
	{name: "names", chain: fromJob, l3: unix.NFPROTO_IPV4, l4: unix.IPPROTO_UDP, port: dnsPort, paired: true, accept: true},
	{name: "ipv6", chain: fromJob, l3: unix.NFPROTO_IPV6},
	{name: "tcp", chain: fromJob, l4: unix.IPPROTO_TCP},
	{name: "udp", chain: fromJob, l4: unix.IPPROTO_UDP},
	{name: "icmp", chain: fromJob, l4: unix.IPPROTO_ICMP},
	{name: "other", chain: fromJob},
	{name: "proxy", chain: toJob, l3: unix.NFPROTO_IPV4, l4: unix.IPPROTO_TCP, port: proxyPort, paired: true, accept: true},
	{name: "names", chain: toJob, l3: unix.NFPROTO_IPV4, l4: unix.IPPROTO_UDP, port: dnsPort, paired: true, accept: true},
	{name: "to-job", chain: toJob},
}

// FilterDigest is the digest of the filter's rules in words, one a line: it is part
// of the sandbox profile.
func FilterDigest() plan.Digest {
	var b strings.Builder
	for _, c := range []string{fromJob, toJob, across} {
		fmt.Fprintf(&b, "chain %s policy drop\n", c)
	}
	for _, r := range rules {
		fmt.Fprintf(&b, "rule %s %s l3 %d l4 %d port %d paired %t accept %t\n", r.chain, r.name, r.l3, r.l4, r.port, r.paired, r.accept)
	}
	fmt.Fprintf(&b, "job %s gateway %s\n", jobAddr, gatewayAddr)
	return plan.Sum([]byte(b.String()))
}

func ifname(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

func equal(data []byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data} }

func field(base expr.PayloadBase, offset, size uint32) expr.Any {
	return &expr.Payload{DestRegister: 1, Base: base, Offset: offset, Len: size}
}

// exprs are a rule in the kernel's terms.
func (r rule) exprs() []expr.Any {
	link, local, remote, portAt := expr.MetaKeyIIFNAME, gatewayAddr, jobAddr, uint32(2) // destination port
	source, dest := remote, local
	if r.chain == toJob {
		link, portAt = expr.MetaKeyOIFNAME, 0 // source port
		source, dest = local, remote
	}
	out := []expr.Any{&expr.Meta{Key: link, Register: 1}, equal(ifname(gatewayLink))}
	if r.l3 != 0 {
		out = append(out, &expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, equal([]byte{r.l3}))
	}
	if r.paired {
		for _, a := range []struct {
			offset uint32 // in the IPv4 header (RFC 791)
			addr   netip.Addr
		}{{12, source}, {16, dest}} {
			out = append(out, field(expr.PayloadBaseNetworkHeader, a.offset, 4), equal(a.addr.AsSlice()))
		}
	}
	if r.l4 != 0 {
		out = append(out, &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, equal([]byte{r.l4}))
	}
	if r.port != 0 {
		out = append(out, field(expr.PayloadBaseTransportHeader, portAt, 2), equal(binaryutil.BigEndian.PutUint16(r.port)))
	}
	verdict := expr.VerdictDrop
	if r.accept {
		verdict = expr.VerdictAccept
	}
	return append(out, &expr.Counter{}, &expr.Verdict{Kind: verdict})
}

type chainOf struct {
	hook     *nftables.ChainHook
	priority *nftables.ChainPriority
}

var chains = map[string]chainOf{
	// Before anything else looks at a packet.
	fromJob: {nftables.ChainHookPrerouting, nftables.ChainPriorityRaw},
	toJob:   {nftables.ChainHookOutput, nftables.ChainPriorityFilter},
	across:  {nftables.ChainHookForward, nftables.ChainPriorityFilter},
}

// netfilter is a connection to the packet filter of the namespace at path.
func netfilter(path string, f func(*nftables.Conn) error) error {
	ns, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("packet filter: %w", err)
	}
	defer ns.Close()
	c, err := nftables.New(nftables.WithNetNSFd(int(ns.Fd())))
	if err != nil {
		return fmt.Errorf("packet filter: %w", err)
	}
	return f(c)
}

// setFilter fills the filter of a new namespace.
func setFilter(path string) error {
	return netfilter(path, func(c *nftables.Conn) error {
		table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: tableName})
		drop := nftables.ChainPolicyDrop
		made := map[string]*nftables.Chain{}
		for name, of := range chains {
			made[name] = c.AddChain(&nftables.Chain{Name: name, Table: table, Type: nftables.ChainTypeFilter, Hooknum: of.hook, Priority: of.priority, Policy: &drop})
		}
		for _, r := range rules {
			c.AddRule(&nftables.Rule{Table: table, Chain: made[r.chain], Exprs: r.exprs()})
		}
		if err := c.Flush(); err != nil {
			return fmt.Errorf("set packet filter: %w", err)
		}
		return nil
	})
}

// Dropped counts packets of the job that the filter dropped, by rule.
type Dropped map[string]int64

// readFilter returns how many packets each dropping rule has dropped. A filter that
// is not the one that setFilter made is an error that says what differs.
func readFilter(path string) (Dropped, error) {
	out := Dropped{}
	err := netfilter(path, func(c *nftables.Conn) error {
		tables, err := c.ListTables()
		if err != nil {
			return fmt.Errorf("read packet filter: %w", err)
		}
		if len(tables) != 1 || tables[0].Name != tableName || tables[0].Family != nftables.TableFamilyINet || tables[0].Flags != 0 {
			return fmt.Errorf("the packet filter has %d tables: %w", len(tables), errChanged)
		}
		found, err := c.ListChains()
		if err != nil {
			return fmt.Errorf("read packet filter: %w", err)
		}
		if len(found) != len(chains) {
			return fmt.Errorf("the packet filter has %d chains: %w", len(found), errChanged)
		}
		for _, ch := range found {
			want, ok := chains[ch.Name]
			if !ok || ch.Policy == nil || *ch.Policy != nftables.ChainPolicyDrop || ch.Hooknum == nil || *ch.Hooknum != *want.hook || ch.Priority == nil || *ch.Priority != *want.priority {
				return fmt.Errorf("chain %.40q of the packet filter: %w", ch.Name, errChanged)
			}
			if err := out.count(c, ch); err != nil {
				return err
			}
		}
		return nil
	})
	return out, err
}

var errChanged = errors.New("it is not as the agent set it")

// count compares a chain's rules with what they should be and reads their counters.
func (d Dropped) count(c *nftables.Conn, ch *nftables.Chain) error {
	got, err := c.GetRules(ch.Table, ch)
	if err != nil {
		return fmt.Errorf("read packet filter: %w", err)
	}
	var want []rule
	for _, r := range rules {
		if r.chain == ch.Name {
			want = append(want, r)
		}
	}
	if len(got) != len(want) {
		return fmt.Errorf("chain %s of the packet filter has %d rules, want %d: %w", ch.Name, len(got), len(want), errChanged)
	}
	for i, r := range want {
		packets := int64(0)
		for _, e := range got[i].Exprs {
			if n, ok := e.(*expr.Counter); ok {
				packets = int64(n.Packets)
				*n = expr.Counter{}
			}
		}
		if !reflect.DeepEqual(r.exprs(), got[i].Exprs) {
			return fmt.Errorf("rule %s of the packet filter: %w", r.name, errChanged)
		}
		if !r.accept {
			d[r.name] += packets
		}
	}
	return nil
}
