// Package gate is what stands between one job and the network: a proxy for TLS
// connections to names that the job's plan lists, and a name server for them.
//
// Trusted: the configuration, the node's resolver and the system's network stack.
// Checked: the name and port of every connection against the plan; that the TLS
// ClientHello asks for that very name and hides no other; that the name leads to
// no address of the node, of a private network or of a metadata service; what is
// sent, against the budgets. Not checked: what goes through a connection. It is
// TLS between the job and the destination, which the gate cannot read, and a
// destination that serves several names at one address can be asked for another
// one inside. Not trusted: every byte from the job and from the destination.
//
// A gate holds no secret and links nothing that does.
package gate

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/coffer-run/coffer/attest/plan"
)

const (
	// MaxOpen bounds the connections of a job at one time, MaxConnections those of
	// its whole life: every one of them is recorded.
	MaxOpen        = 64
	MaxConnections = 10_000

	// maxHead bounds a CONNECT request, in bytes.
	maxHead = 16 << 10
	// headTimeout is how long a job may take for its request and its ClientHello.
	headTimeout = 15 * time.Second
	// dialTimeout bounds the way to a destination.
	dialTimeout = 10 * time.Second
	// chunk is the most that is read at once, in bytes.
	chunk = 64 << 10
	// burst is the most that a rate lets through at once, in bytes.
	burst = 64 << 10
	// unacked closes a connection whose other side takes no bytes: a sandbox that is
	// killed says no farewell.
	unacked = 10 * time.Second
)

// Rules by which a connection is refused.
const (
	RuleMethod      = "not-connect"
	RuleRequest     = "bad-request"
	RuleAddress     = "address-literal"
	RuleNotListed   = "not-listed"
	RuleResolve     = "not-resolved"
	RuleRange       = "address-range"
	RuleNoTLS       = "not-tls"
	RuleNoName      = "no-server-name"
	RuleOtherName   = "other-server-name"
	RuleHidden      = "encrypted-hello"
	RuleBudget      = "budget"
	RuleConnections = "too-many-connections"
	RuleDNS         = "dns-not-listed"
	RuleClosed      = "closed"
	RuleUnreachable = "unreachable"
)

// Config is what a gate lets through. The zero value lets nothing through.
type Config struct {
	Destinations []plan.Egress `json:"destinations"`
	// MaxBytes and BytesPerSecond bound what is sent to all destinations together.
	MaxBytes       int64 `json:"maxBytes"`
	BytesPerSecond int64 `json:"bytesPerSecond"`
	// Events is how many refusals are recorded by name.
	Events int64 `json:"events"`
	// Resolvers answer for names; without any, those of the node do.
	Resolvers []netip.AddrPort `json:"resolvers,omitempty"`
	// Node are addresses of the node besides those of the namespace that connections
	// begin in, when the gate was made.
	Node []netip.Addr `json:"node,omitempty"`
	// Closed is not empty if nothing may go through, and says why.
	Closed string `json:"closed,omitempty"`
}

// Gate is one job's. Its methods may be called concurrently.
type Gate struct {
	cfg    Config
	log    *slog.Logger
	lookup func(ctx context.Context, host string) ([]netip.Addr, error)
	own    func() ([]netip.Addr, error)
	ledger *ledger
	names  *names
	all    *budget
	each   map[string]*budget
	wg     sync.WaitGroup
	// questions bounds the name server's work at one time.
	questions chan struct{}
	ctx       context.Context //nolint:containedctx // ends with Close
	cancel    context.CancelFunc
}

// New returns a gate for cfg.
func New(cfg Config, log *slog.Logger) (*Gate, error) {
	if log == nil {
		return nil, errors.New("open gate: no logger")
	}
	if cfg.Closed == "" && (len(cfg.Destinations) == 0 || cfg.MaxBytes <= 0 || cfg.BytesPerSecond <= 0 || cfg.Events < 0) {
		return nil, errors.New("open gate: destinations and budgets are missing")
	}
	g := &Gate{cfg: cfg, log: log, own: OwnAddresses, lookup: lookup(cfg.Resolvers), ledger: newLedger(cfg.Events), each: map[string]*budget{}, questions: make(chan struct{}, maxQuestions)}
	g.ctx, g.cancel = context.WithCancel(context.Background())
	g.all = newBudget(cfg.MaxBytes, cfg.BytesPerSecond)
	for _, d := range cfg.Destinations {
		g.each[key(d.Host, d.Port)] = newBudget(d.MaxBytes, d.BytesPerSecond)
	}
	g.names = newNames(g.resolve)
	if cfg.Closed != "" {
		g.Close(cfg.Closed)
	}
	return g, nil
}

func key(host string, port int) string { return net.JoinHostPort(host, strconv.Itoa(port)) }

// Serve accepts the job's connections until the listener is closed, and returns
// when the last of them has ended.
func (g *Gate) Serve(l net.Listener) error {
	defer g.wg.Wait()
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		if !g.ledger.enter(c) {
			g.ledger.deny("", 0, RuleConnections)
			_ = c.Close()
			continue
		}
		g.wg.Go(func() {
			defer g.ledger.leave(c)
			g.serve(c)
		})
	}
}

// Close ends every connection and lets nothing through any more. It returns when
// all have ended.
func (g *Gate) Close(why string) {
	for _, c := range g.ledger.close(why) {
		_ = c.Close()
	}
	g.cancel()
	g.ledger.idle()
}

// serve is one connection of the job, from its request to its end.
func (g *Gate) serve(job net.Conn) {
	defer job.Close()
	if err := tune(job); err != nil {
		return
	}
	if err := job.SetDeadline(time.Now().Add(headTimeout)); err != nil {
		return
	}
	head := &io.LimitedReader{R: job, N: maxHead}
	r := bufio.NewReaderSize(head, 4<<10)
	host, port, rule := request(r)
	if rule == "" {
		rule = g.permitted(host, port)
	}
	var to []netip.Addr
	if rule == "" {
		to, rule = g.names.get(host)
	}
	if rule != "" {
		g.ledger.deny(host, port, rule)
		refuse(job, host, port, rule)
		return
	}
	if _, err := io.WriteString(job, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		return
	}
	head.N = math.MaxInt64
	hello, rule := readHello(r, host)
	if rule != "" {
		g.ledger.deny(host, port, rule)
		_, _ = job.Write(alert) // the job's TLS library says what it means
		return
	}
	up, err := dial(g.ctx, to, port)
	if err != nil {
		g.log.Info("destination not reached", "host", host, "port", port, "error", err)
		g.ledger.deny(host, port, RuleUnreachable)
		return
	}
	defer up.Close()
	if err := job.SetDeadline(time.Time{}); err != nil {
		return
	}
	t, ok := g.ledger.open(host, port, up)
	if !ok {
		g.ledger.deny(host, port, RuleConnections)
		return
	}
	t.end(g.pipe(t, job, io.MultiReader(hello, r), up, g.each[key(host, port)]))
}

// pipe carries bytes both ways and says why it ended.
func (g *Gate) pipe(t *tunnel, job net.Conn, from io.Reader, up net.Conn, b *budget) string {
	ctx, cancel := context.WithCancel(g.ctx)
	down := make(chan struct{})
	go func() {
		defer close(down)
		defer cancel()
		buf := make([]byte, chunk)
		for {
			n, err := up.Read(buf)
			if n > 0 {
				t.received(n)
				if _, err := job.Write(buf[:n]); err != nil {
					_ = up.Close()
					return
				}
			}
			if err != nil {
				halfClose(job)
				return
			}
		}
	}()
	why := g.send(ctx, t, from, up, b)
	if why == "" {
		halfClose(up)
	} else {
		_, _ = up.Close(), job.Close()
	}
	<-down
	cancel()
	return why
}

// send carries what the job says, as far and as fast as the budgets allow.
func (g *Gate) send(ctx context.Context, t *tunnel, from io.Reader, up net.Conn, b *budget) string {
	buf := make([]byte, min(chunk, g.all.step, b.step))
	for {
		n, err := from.Read(buf)
		if n > 0 {
			may := g.all.take(b, n)
			if may > 0 {
				// A rate that is waited for after the other side is gone is waited for in vain.
				if g.all.rate.WaitN(ctx, may) != nil || b.rate.WaitN(ctx, may) != nil {
					return ""
				}
				t.sent(may)
				if _, err := up.Write(buf[:may]); err != nil {
					return "error"
				}
			}
			if may < n {
				g.ledger.deny(t.host, t.port, RuleBudget)
				return RuleBudget
			}
		}
		if errors.Is(err, io.EOF) {
			return ""
		}
		if err != nil {
			return "error"
		}
	}
}

// request reads a CONNECT request, and returns the name and port that it asks for,
// or the rule that refuses it.
func request(r *bufio.Reader) (host string, port int, rule string) {
	req, err := http.ReadRequest(r)
	if err != nil {
		return "", 0, RuleRequest
	}
	if req.Method != http.MethodConnect {
		host = strings.ToLower(req.URL.Hostname())
		port, _ = strconv.Atoi(req.URL.Port()) //nolint:errcheck // for the record: without a port, 0
		return host, port, RuleMethod
	}
	name, p, err := net.SplitHostPort(req.RequestURI)
	if err != nil {
		return "", 0, RuleRequest
	}
	n, err := strconv.ParseUint(p, 10, 16)
	if err != nil || n == 0 {
		return "", 0, RuleRequest
	}
	return strings.ToLower(name), int(n), ""
}

// permitted is the rule that keeps a job from a name and port, or none.
func (g *Gate) permitted(host string, port int) string {
	b := g.each[key(host, port)]
	switch {
	case g.ledger.closed() != "":
		return RuleClosed
	case isAddress(host):
		return RuleAddress
	case b == nil:
		return RuleNotListed
	case g.ledger.full():
		return RuleConnections
	case g.all.left() <= 0 || b.left() <= 0:
		return RuleBudget
	}
	return ""
}

func isAddress(host string) bool {
	_, err := netip.ParseAddr(host)
	return err == nil
}

// hints tell whoever reads a job's output what to do.
var hints = map[string]string{
	RuleNotListed:   "list it under egress in the job file; `coffer egress propose` writes the change",
	RuleAddress:     "name the destination: addresses cannot be approved",
	RuleMethod:      "use TLS: the gateway tunnels https:// only",
	RuleBudget:      "the plan's maxBytes or egressBytes is used up",
	RuleRange:       "the name leads to a private, local or reserved address",
	RuleResolve:     "the node's resolver has no address for it",
	RuleClosed:      "the job's network was closed; `coffer status` says why",
	RuleConnections: "close connections that are no longer needed",
}

// refuse answers a request in the same way whatever the reason.
func refuse(w io.Writer, host string, port int, rule string) {
	body := fmt.Sprintf("coffer: egress refused\ndestination: %s\nrule: %s\nhint: %s\n", strconv.QuoteToASCII(key(host, port)), rule, hints[rule])
	_, _ = fmt.Fprintf(w, "HTTP/1.1 403 Egress refused by coffer: %s\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", rule, len(body), body)
}

// alert is a TLS record with the fatal alert access_denied (RFC 8446, 6.2).
var alert = []byte{21, 3, 1, 0, 2, 2, 49}

func dial(ctx context.Context, to []netip.Addr, port int) (net.Conn, error) {
	var errs []error
	d := net.Dialer{Timeout: dialTimeout}
	for _, a := range to {
		c, err := d.DialContext(ctx, "tcp", netip.AddrPortFrom(a, uint16(port)).String())
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if err := tune(c); err != nil {
			errs = append(errs, err, c.Close())
			continue
		}
		return c, nil
	}
	return nil, errors.Join(errs...)
}

// tune makes a connection notice that its other side is gone.
func tune(c net.Conn) error {
	t, ok := c.(*net.TCPConn)
	if !ok {
		return fmt.Errorf("connection %T: want TCP", c)
	}
	if err := t.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: 2 * time.Second, Interval: time.Second, Count: 3}); err != nil {
		return err
	}
	raw, err := t.SyscallConn()
	if err != nil {
		return err
	}
	var set error
	err = raw.Control(func(fd uintptr) {
		set = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(unacked.Milliseconds()))
	})
	return errors.Join(err, set)
}

func halfClose(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.CloseWrite()
	}
}

// budget is how much more may be sent, and how fast.
type budget struct {
	mu   sync.Mutex // guards rest
	rest int64
	rate *rate.Limiter
	step int
}

func newBudget(bytes, perSecond int64) *budget {
	step := int(max(1, min(perSecond, burst)))
	return &budget{rest: bytes, rate: rate.NewLimiter(rate.Limit(perSecond), step), step: step}
}

func (b *budget) left() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.rest
}

// take takes up to n bytes from b and from other alike and says how many. What was
// taken is spent, whether or not it arrives. b is the job's, other the
// destination's: the order in which they are locked.
func (b *budget) take(other *budget, n int) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	other.mu.Lock()
	defer other.mu.Unlock()
	may := max(0, min(int64(n), b.rest, other.rest))
	b.rest -= may
	other.rest -= may
	return int(may)
}
