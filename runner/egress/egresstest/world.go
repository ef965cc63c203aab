// Package egresstest is a world of network namespaces for tests: a node with its
// uplink, and behind it servers on public-looking addresses. Nothing in it is
// connected to anything else.
package egresstest

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/runner/egress/netns"
)

// Addresses of the world. They look public, and lead nowhere else.
var (
	Node     = netip.MustParseAddr("44.1.0.1")
	Server   = netip.MustParseAddr("44.1.0.2")
	Other    = netip.MustParseAddr("44.1.0.3")
	Private  = netip.MustParseAddr("10.9.0.2")
	Metadata = netip.MustParseAddr("169.254.169.254")
	ServerV6 = netip.MustParseAddr("2a00:1::2")
)

// Names that the world's resolver knows, and what it says of them.
var Names = map[string][]netip.Addr{
	"allowed.example.com":  {Server},
	"metrics.example.com":  {Server},
	"second.example.com":   {Other},
	"unlisted.example.com": {Server},
	"private.example.com":  {Private},
	"metadata.example.com": {Metadata},
	"loopback.example.com": {netip.MustParseAddr("127.0.0.1")},
	"node.example.com":     {Node},
	"mixed.example.com":    {Server, Private},
	"mapped.example.com":   {netip.MustParseAddr("::ffff:10.9.0.2")},
	"ula.example.com":      {netip.MustParseAddr("fd00:ec2::254")},
	"closed.example.com":   {netip.MustParseAddr("44.1.0.4")}, // nobody is there
}

// World is two namespaces and what listens in the second one.
type World struct {
	// Uplink is the file of the node's namespace, where gateways connect from.
	Uplink string
	// Resolver answers for Names.
	Resolver netip.AddrPort
	// CA has the certificate of every server, in PEM.
	CA []byte

	mu      sync.Mutex // guards what follows
	asked   []string
	reached []string
	strange []string
}

// New makes a world that ends with the test. It needs root.
func New(t testing.TB) *World {
	t.Helper()
	dir := t.TempDir()
	w := &World{Uplink: filepath.Join(dir, "node"), Resolver: netip.AddrPortFrom(Server, 53)}
	outside := filepath.Join(dir, "outside")
	for _, ns := range []string{w.Uplink, outside} {
		must(t, netns.New(ns))
		t.Cleanup(func() { must(t, netns.Drop(ns)) })
	}
	must(t, netns.Inside(w.Uplink, func() error {
		f, err := os.Open(outside)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "up"}, PeerName: "world", PeerNamespace: netlink.NsFd(int(f.Fd()))}); err != nil {
			return err
		}
		if err := w.sniff(t, "up"); err != nil {
			return err
		}
		return errors.Join(up("lo"), up("up", Node.String()+"/16", "10.9.0.1/24", "169.254.169.1/16", "2a00:1::1/64"))
	}))
	must(t, netns.Inside(outside, func() error {
		if err := errors.Join(up("lo"), up("world", Server.String()+"/16", Other.String()+"/16", Private.String()+"/24", Metadata.String()+"/16", ServerV6.String()+"/64")); err != nil {
			return err
		}
		return w.serve(t)
	}))
	return w
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func up(name string, addrs ...string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			return err
		}
		if addr.IP.To4() == nil {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("%s: %w", a, err)
		}
	}
	return netlink.LinkSetUp(link)
}

// Asked are the names that the resolver was asked for.
func (w *World) Asked() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]string{}, w.asked...)
}

// Reached are the sockets that somebody connected or sent to, the resolver aside.
func (w *World) Reached() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]string{}, w.reached...)
}

// Strange are packets on the node's uplink that do not come from the node or the
// world: a job's own.
func (w *World) Strange() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]string{}, w.strange...)
}

func (w *World) note(list *[]string, s string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	*list = append(*list, s)
}

// serve listens in this thread's namespace: TLS on 443 of every address, which
// answers a POST and echoes everything else; a resolver; and on some more ports, only to see who comes.
func (w *World) serve(t testing.TB) error {
	cert, err := w.certificate()
	if err != nil {
		return err
	}
	for _, a := range []netip.Addr{Server, Other, Private, Metadata} {
		l, err := net.Listen("tcp", netip.AddrPortFrom(a, 443).String())
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		go w.echo(l, &tls.Config{Certificates: []tls.Certificate{cert}}) //nolint:gosec // a test's server
	}
	for _, at := range []string{"44.1.0.2:80", "44.1.0.2:22", "[2a00:1::2]:443"} {
		l, err := net.Listen("tcp", at)
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		go w.echo(l, nil)
	}
	p, err := net.ListenPacket("udp", w.Resolver.String())
	if err != nil {
		return err
	}
	s := &dns.Server{PacketConn: p, Handler: dns.HandlerFunc(w.answer)}
	t.Cleanup(func() { p.Close() })
	go func() { _ = s.ActivateAndServe() }()
	for _, at := range []string{"44.1.0.2:443", "44.1.0.3:53"} {
		p, err := net.ListenPacket("udp", at)
		if err != nil {
			return err
		}
		t.Cleanup(func() { p.Close() })
		go func() {
			b := make([]byte, 2048)
			for {
				if _, _, err := p.ReadFrom(b); err != nil {
					return
				}
				w.note(&w.reached, "udp "+at)
			}
		}()
	}
	return nil
}

func (w *World) echo(l net.Listener, c *tls.Config) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		w.note(&w.reached, "tcp "+l.Addr().String())
		go func() {
			defer conn.Close()
			if c != nil {
				conn = tls.Server(conn, c)
			}
			r := bufio.NewReader(conn)
			if head, _ := r.Peek(5); string(head) == "POST " {
				if req, err := http.ReadRequest(r); err == nil {
					_, _ = io.Copy(io.Discard, req.Body)
					_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
				}
				return
			}
			_, _ = io.Copy(conn, r)
		}()
	}
}

func (w *World) answer(rw dns.ResponseWriter, q *dns.Msg) {
	m := new(dns.Msg)
	m.SetReply(q)
	name := strings.TrimSuffix(strings.ToLower(q.Question[0].Name), ".")
	w.note(&w.asked, name)
	known, ok := Names[name]
	if !ok {
		m.Rcode = dns.RcodeNameError
	}
	for _, a := range known {
		h := dns.RR_Header{Name: q.Question[0].Name, Class: dns.ClassINET, Ttl: 1}
		switch q.Question[0].Qtype {
		case dns.TypeA:
			if a.Is4() {
				h.Rrtype = dns.TypeA
				m.Answer = append(m.Answer, &dns.A{Hdr: h, A: a.AsSlice()})
			}
		case dns.TypeAAAA:
			if a.Is6() {
				h.Rrtype = dns.TypeAAAA
				m.Answer = append(m.Answer, &dns.AAAA{Hdr: h, AAAA: a.AsSlice()})
			}
		}
	}
	_ = rw.WriteMsg(m)
}

func (w *World) certificate() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "egresstest"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		DNSNames: []string{"*.example.com"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		return tls.Certificate{}, err
	}
	w.CA = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// sniff records packets on a link of this thread's namespace whose source is
// neither the node's nor the world's.
func (w *World) sniff(t testing.TB, name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	all := uint16(unix.ETH_P_ALL)<<8 | uint16(unix.ETH_P_ALL)>>8 // network byte order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(all))
	if err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Attrs().Index}); err != nil {
		return errors.Join(err, unix.Close(fd))
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}); err != nil {
		return errors.Join(err, unix.Close(fd))
	}
	stop, done := make(chan struct{}), make(chan struct{})
	t.Cleanup(func() {
		close(stop)
		<-done
	})
	go func() {
		defer close(done)
		defer unix.Close(fd)
		b := make([]byte, 4096)
		for {
			select {
			case <-stop:
				return
			default:
			}
			n, _, err := unix.Recvfrom(fd, b, 0)
			if err != nil || n < 34 {
				continue
			}
			if bytes.Equal(b[12:14], []byte{8, 0}) {
				src := netip.AddrFrom4([4]byte(b[26:30]))
				if b[26] != 44 && src != Private && src != Metadata && src.String() != "10.9.0.1" && src.String() != "169.254.169.1" {
					w.note(&w.strange, src.String())
				}
			}
		}
	}()
	return nil
}
