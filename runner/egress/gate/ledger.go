package gate

import (
	"maps"
	"net"
	"slices"
	"sync"
	"time"
)

// Connection is one that was let through.
type Connection struct {
	// Number is the connection's, in the order in which they began.
	Number int `json:"number"`
	// Sequence rises with every change of the record.
	Sequence uint64 `json:"sequence"`
	Host     string `json:"host"`
	Port     int    `json:"port"`
	// Address is where the name led.
	Address       string `json:"address"`
	StartUnixNano int64  `json:"startUnixNano"`
	Nanos         int64  `json:"nanos"`
	// Sent and Received are bytes, TLS included.
	Sent     int64 `json:"sent"`
	Received int64 `json:"received"`
	// End is empty while the connection is open, then "closed" or why it was cut:
	// "budget", "error" or the word with which the gate was closed.
	End string `json:"end"`
}

// Denial is a connection that was refused, with how often.
type Denial struct {
	// Number is the refusal's, in the order in which they were first made.
	Number   int    `json:"number"`
	Sequence uint64 `json:"sequence"`
	// FirstUnixNano is when it was refused first.
	FirstUnixNano int64 `json:"firstUnixNano"`
	// Host is what the job asked for, at most 253 bytes of it; Port is 0 if it named none.
	Host  string `json:"host"`
	Port  int    `json:"port"`
	Rule  string `json:"rule"`
	Count int64  `json:"count"`
}

// Report is what a gate has let through and refused. Connections and Denials are
// those that changed after the sequence number that was asked for.
type Report struct {
	Pid      int    `json:"pid"`
	Sequence uint64 `json:"sequence"`
	// Closed says why the gate lets nothing through any more.
	Closed      string       `json:"closed,omitempty"`
	Connections []Connection `json:"connections"`
	Denials     []Denial     `json:"denials"`
	// Untold counts refusals beyond those that are recorded by name.
	Untold int64 `json:"untold"`
}

// maxName bounds a name that the job chose, in bytes (RFC 1035, 2.3.4).
const maxName = 253

// ledger records everything that a gate does.
type ledger struct {
	events int64

	mu      sync.Mutex // guards what follows
	why     string     // closed
	seq     uint64
	tunnels []*tunnel
	denials []*Denial
	untold  int64
	// live are the job's connections, true for those that began before the close.
	live  map[net.Conn]bool
	empty *sync.Cond
	more  chan struct{} // closed and replaced when something was recorded
}

func newLedger(events int64) *ledger {
	l := &ledger{events: events, live: map[net.Conn]bool{}, more: make(chan struct{})}
	l.empty = sync.NewCond(&l.mu)
	return l
}

// next numbers a change and wakes who waits for one. l.mu is held.
func (l *ledger) next() uint64 {
	l.seq++
	close(l.more)
	l.more = make(chan struct{})
	return l.seq
}

// enter notes a connection of the job, unless there are too many.
func (l *ledger) enter(c net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.live) >= MaxOpen {
		return false
	}
	l.live[c] = l.why == ""
	return true
}

func (l *ledger) leave(c net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.live, c)
	l.empty.Broadcast()
}

// idle waits until the job has no connection of before the close. Those that come
// after it are refused, and a job that makes them without end must not hold it up.
func (l *ledger) idle() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for slices.Contains(slices.Collect(maps.Values(l.live)), true) {
		l.empty.Wait()
	}
}

func (l *ledger) closed() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.why
}

// close lets nothing begin any more and returns the connections to cut. The first
// reason stays.
func (l *ledger) close(why string) []net.Conn {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.why == "" {
		l.why = why
		l.next()
	}
	var out []net.Conn
	for c := range l.live {
		out = append(out, c)
	}
	for _, t := range l.tunnels {
		if t.record.End == "" {
			out = append(out, t.up)
		}
	}
	return out
}

// deny records a refusal; beyond the budget of names, only that there was one.
func (l *ledger) deny(host string, port int, rule string) {
	host = host[:min(len(host), maxName)]
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, d := range l.denials {
		if d.Host == host && d.Port == port && d.Rule == rule {
			d.Count++
			d.Sequence = l.next()
			return
		}
	}
	if int64(len(l.denials)) >= l.events {
		l.untold++
		l.next()
		return
	}
	l.denials = append(l.denials, &Denial{Number: len(l.denials), Sequence: l.next(), FirstUnixNano: time.Now().UnixNano(), Host: host, Port: port, Rule: rule, Count: 1})
}

// tunnel is the record of a connection that was let through.
type tunnel struct {
	ledger *ledger
	host   string
	port   int
	up     net.Conn
	began  time.Time
	record Connection // guarded by ledger.mu
}

// full reports whether as many connections are recorded as there may be: a further
// one must not even be made.
func (l *ledger) full() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.tunnels) >= MaxConnections
}

// open records a connection, unless the gate was closed meanwhile or has recorded
// as many as it can.
func (l *ledger) open(host string, port int, up net.Conn) (*tunnel, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.why != "" || len(l.tunnels) >= MaxConnections {
		return nil, false
	}
	now := time.Now()
	t := &tunnel{ledger: l, host: host, port: port, up: up, began: now, record: Connection{
		Number: len(l.tunnels), Sequence: l.next(), Host: host, Port: port, Address: up.RemoteAddr().String(), StartUnixNano: now.UnixNano(),
	}}
	l.tunnels = append(l.tunnels, t)
	return t, true
}

func (t *tunnel) sent(n int) {
	t.ledger.mu.Lock()
	defer t.ledger.mu.Unlock()
	t.record.Sent += int64(n)
}

func (t *tunnel) received(n int) {
	t.ledger.mu.Lock()
	defer t.ledger.mu.Unlock()
	t.record.Received += int64(n)
}

func (t *tunnel) end(why string) {
	l := t.ledger
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.why != "":
		why = l.why
	case why == "":
		why = "closed"
	}
	t.record.End, t.record.Nanos, t.record.Sequence = why, time.Since(t.began).Nanoseconds(), l.next()
}

// report returns what changed after a sequence number, and a channel that is
// closed when there is more. A connection that is open is always there: its bytes
// change without a number.
func (l *ledger) report(after uint64) (Report, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := Report{Sequence: l.seq, Closed: l.why, Connections: []Connection{}, Denials: []Denial{}, Untold: l.untold}
	for _, t := range l.tunnels {
		if t.record.End == "" || t.record.Sequence > after {
			c := t.record
			if c.End == "" {
				c.Nanos = time.Since(t.began).Nanoseconds()
			}
			r.Connections = append(r.Connections, c)
		}
	}
	for _, d := range l.denials {
		if d.Sequence > after {
			r.Denials = append(r.Denials, *d)
		}
	}
	return r, l.more
}
