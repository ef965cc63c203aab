package hold

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	pb "gvisor.dev/gvisor/pkg/sentry/seccheck/points/points_go_proto"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
)

const (
	// traceVersion is the version of gVisor's remote sink protocol
	// (pkg/sentry/seccheck/sinks/remote/wire): a handshake each way, then packets
	// of an 8-byte little-endian header and a protobuf message. The sandbox speaks it by
	// tools/gvisor/sink, whose text is always UTF-8: what is not is escaped there.
	traceVersion = 1
	// maxTrace bounds one packet; the sandbox sends half of it at most.
	maxTrace        = 256 << 10
	traceHeaderSize = 8
	handshakeWait   = 5 * time.Second
)

// looksInto are the calls by which a process looks into another, ptrace aside.
var looksInto = map[uint64]string{
	unix.SYS_PROCESS_VM_READV:  "process_vm_readv",
	unix.SYS_PROCESS_VM_WRITEV: "process_vm_writev",
	unix.SYS_PIDFD_GETFD:       "pidfd_getfd",
}

// trace receives what the sandbox says about the job.
type trace struct {
	l      *net.UnixListener
	events *eventLog
	log    *slog.Logger
	grace  time.Duration
	opens  opens
	wg     sync.WaitGroup

	// started is closed once a container/start arrived, finished when the job is
	// over, lost when the trace was lost before that.
	started, finished, lost chan struct{}

	mu   sync.Mutex
	conn *net.UnixConn
	// tasks counts those that the trace has shown to live since the start; ended
	// is set when none is left. An operator's exec makes tasks that no clone
	// shows: from then on the count proves nothing.
	tasks     int64
	ended     bool
	uncounted bool
	execs     int64
	groups    groups
	// unsent are messages that the runtime says it could not send, unread those that came
	// and could not be read.
	unsent, unread int64
}

func listenTrace(path string, events *eventLog, watched opens, grace time.Duration, log *slog.Logger) (*trace, error) {
	l, err := listen(path)
	if err != nil {
		return nil, fmt.Errorf("listen for the trace: %w", err)
	}
	t := &trace{l: l, events: events, opens: watched, log: log, grace: grace,
		started: make(chan struct{}), finished: make(chan struct{}), lost: make(chan struct{})}
	t.wg.Go(t.accept)
	return t, nil
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// finish says that the job is over: from now on a closing trace is no loss.
func (t *trace) finish() {
	t.mu.Lock()
	if !isClosed(t.finished) {
		close(t.finished)
	}
	conn := t.conn
	t.mu.Unlock()
	_ = t.l.Close()
	if conn != nil {
		// What has come is still read.
		_ = conn.CloseRead()
	}
	t.wg.Wait()
}

func (t *trace) status(s *holdapi.Status) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s.Started, s.TraceLost = isClosed(t.started), isClosed(t.lost)
	s.Execs, s.Dropped = t.execs, t.unsent+t.unread
}

// accept allows one trace at a time, and none after a job has started: a second
// start would be another job's.
func (t *trace) accept() {
	for {
		c, err := t.l.AcceptUnix()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				t.log.Error("trace listener ended", "error", err)
				t.declareLost("listener ended")
			}
			return
		}
		t.mu.Lock()
		refuse := t.conn != nil || isClosed(t.started) || isClosed(t.finished)
		if !refuse {
			t.conn = c
		}
		t.mu.Unlock()
		if refuse {
			t.log.Warn("trace connection refused: there is or was one")
			_ = c.Close()
			continue
		}
		t.wg.Go(func() { t.serve(c) })
	}
}

func (t *trace) serve(c *net.UnixConn) {
	err := t.receive(c)
	_ = c.Close()
	t.mu.Lock()
	t.conn = nil
	ended := t.ended && !t.uncounted
	t.mu.Unlock()
	if !isClosed(t.started) || isClosed(t.finished) || ended {
		return
	}
	// A sandbox that is killed closes its trace before the agent can say that the
	// job is over.
	timer := time.NewTimer(t.grace)
	defer timer.Stop()
	select {
	case <-t.finished:
	case <-timer.C:
		t.declareLost(fmt.Sprint(err))
	}
}

func (t *trace) declareLost(why string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if isClosed(t.lost) || isClosed(t.finished) {
		return
	}
	close(t.lost)
	t.events.add(holdapi.Event{Kind: "trace-lost", Detail: why})
}

// gone says that a trace was there, and is not, while the job may be running.
func (t *trace) gone() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return isClosed(t.lost) || isClosed(t.started) && t.conn == nil
}

func (t *trace) receive(c *net.UnixConn) error {
	buf := make([]byte, maxTrace)
	if err := c.SetDeadline(time.Now().Add(handshakeWait)); err != nil {
		return err
	}
	n, _, _, _, err := c.ReadMsgUnix(buf, nil)
	if err != nil {
		return fmt.Errorf("trace handshake: %w", err)
	}
	var hs pb.Handshake
	if err := proto.Unmarshal(buf[:n], &hs); err != nil {
		return fmt.Errorf("trace handshake: %w", err)
	}
	if hs.Version != traceVersion {
		return fmt.Errorf("trace handshake: version %d, want %d", hs.Version, traceVersion)
	}
	out, err := proto.Marshal(&pb.Handshake{Version: traceVersion})
	if err != nil {
		return fmt.Errorf("trace handshake: %w", err)
	}
	if _, err := c.Write(out); err != nil {
		return fmt.Errorf("trace handshake: %w", err)
	}
	if err := c.SetDeadline(time.Time{}); err != nil {
		return err
	}
	for {
		n, _, flags, _, err := c.ReadMsgUnix(buf, nil)
		if err != nil {
			return err
		}
		if n == 0 {
			return errors.New("the sandbox closed the trace")
		}
		if flags&unix.MSG_TRUNC != 0 {
			t.drop(1)
			continue
		}
		if err := t.message(buf[:n]); err != nil {
			t.log.Warn("trace message", "error", err)
			t.drop(1)
		}
	}
}

func (t *trace) drop(n int64) {
	t.mu.Lock()
	t.unread += n
	t.mu.Unlock()
	t.gap()
}

// gap declares the trace lost once a message of a job that has started is missing: what
// the job did then, nobody knows.
func (t *trace) gap() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !isClosed(t.started) || isClosed(t.lost) || t.unsent+t.unread == 0 {
		return
	}
	close(t.lost)
	t.events.add(holdapi.Event{Kind: "trace-lost", Detail: fmt.Sprintf("%d messages that the runtime could not send, %d that could not be read", t.unsent, t.unread)})
}

// message handles one packet. Kinds that are not named here are watched for
// nothing and skipped.
func (t *trace) message(b []byte) error {
	if len(b) < traceHeaderSize {
		return fmt.Errorf("packet of %d bytes", len(b))
	}
	head := int(binary.LittleEndian.Uint16(b))
	kind := pb.MessageType(binary.LittleEndian.Uint16(b[2:]))
	if head < traceHeaderSize || head > len(b) {
		return fmt.Errorf("packet header of %d bytes", head)
	}
	t.mu.Lock()
	t.unsent = max(t.unsent, int64(binary.LittleEndian.Uint32(b[4:])))
	t.mu.Unlock()
	defer t.gap()
	body := b[head:]
	switch kind {
	case pb.MessageType_MESSAGE_CONTAINER_START:
		var m pb.Start
		if err := proto.Unmarshal(body, &m); err != nil {
			return fmt.Errorf("container/start: %w", err)
		}
		t.events.add(holdapi.Event{Kind: "container-start", Detail: m.Id, UnixNano: m.ContextData.GetTimeNs()})
		t.mu.Lock()
		t.tasks, t.ended, t.groups = 1, false, startGroups(&m)
		if !isClosed(t.started) {
			close(t.started)
		}
		t.mu.Unlock()
	case pb.MessageType_MESSAGE_SENTRY_CLONE:
		var m pb.CloneInfo
		if err := proto.Unmarshal(body, &m); err != nil {
			return fmt.Errorf("sentry/clone: %w", err)
		}
		t.session(m.ContextData, "a new task")
		t.count(1, func(g groups) { g.clone(&m) })
	case pb.MessageType_MESSAGE_SENTRY_TASK_EXIT:
		var m pb.TaskExit
		if err := proto.Unmarshal(body, &m); err != nil {
			return fmt.Errorf("sentry/task_exit: %w", err)
		}
		t.session(m.ContextData, "the end of a task")
		t.count(-1, func(g groups) { g.exit(&m) })
	case pb.MessageType_MESSAGE_SENTRY_EXEC:
		var m pb.ExecveInfo
		if err := proto.Unmarshal(body, &m); err != nil {
			return fmt.Errorf("sentry/execve: %w", err)
		}
		e := holdapi.Event{Kind: "exec", Detail: programPath(m.BinaryPath), Process: t.program(m.ContextData), UnixNano: m.ContextData.GetTimeNs()}
		if len(m.BinarySha256) > 0 {
			e.Digest = "sha256:" + hex.EncodeToString(m.BinarySha256)
		}
		session := m.ContextData.GetIsExecSession()
		if session {
			e.Kind = "operator-exec"
		}
		t.mu.Lock()
		t.execs++
		t.uncounted = t.uncounted || session
		t.groups.exec(&m)
		t.mu.Unlock()
		t.events.add(e)
		if len(m.BinaryPath) > maxPath {
			return fmt.Errorf("sentry/execve: a path of %d bytes", len(m.BinaryPath))
		}
	case pb.MessageType_MESSAGE_SYSCALL_OPEN:
		var m pb.Open
		if err := proto.Unmarshal(body, &m); err != nil {
			return fmt.Errorf("syscall/open: %w", err)
		}
		if p, watched := t.opens.look(&m); watched {
			if len(p) > maxPath {
				return fmt.Errorf("syscall/open: a path of %d bytes", len(p))
			}
			t.events.add(holdapi.Event{Kind: "open", Detail: p, Process: t.program(m.ContextData), UnixNano: m.ContextData.GetTimeNs()})
		}
	case pb.MessageType_MESSAGE_SYSCALL_CONNECT:
		var m pb.Connect
		if err := proto.Unmarshal(body, &m); err != nil {
			return fmt.Errorf("syscall/connect: %w", err)
		}
		t.events.add(holdapi.Event{Kind: "connect", Detail: sockaddr(m.Address), Process: t.program(m.ContextData), UnixNano: m.ContextData.GetTimeNs()})
	case pb.MessageType_MESSAGE_SYSCALL_PTRACE:
		var m pb.Ptrace
		if err := proto.Unmarshal(body, &m); err != nil {
			return fmt.Errorf("syscall/ptrace: %w", err)
		}
		t.events.add(holdapi.Event{Kind: "ptrace", Detail: fmt.Sprintf("request %d on pid %d", m.Request, m.Pid), Process: t.program(m.ContextData), UnixNano: m.ContextData.GetTimeNs()})
	case pb.MessageType_MESSAGE_SYSCALL_RAW:
		var m pb.Syscall
		if err := proto.Unmarshal(body, &m); err != nil {
			return fmt.Errorf("syscall: %w", err)
		}
		if call, does := looksInto[m.Sysno]; does {
			t.events.add(holdapi.Event{Kind: "ptrace", Detail: fmt.Sprintf("%s of %d", call, int32(m.Arg1)), Process: t.program(m.ContextData), UnixNano: m.ContextData.GetTimeNs()}) //nolint:gosec // a process, or a descriptor of one, is an int
		}
	default:
	}
	return nil
}

// session records tasks that an operator put into the sandbox from outside. Their
// first program needs no execve that a trace could show, so whatever else shows
// such a task counts.
func (t *trace) session(c *pb.ContextData, what string) {
	if !c.GetIsExecSession() {
		return
	}
	t.mu.Lock()
	t.uncounted = true
	t.mu.Unlock()
	t.events.add(holdapi.Event{Kind: "operator-exec", Detail: what, Process: t.program(c), UnixNano: c.GetTimeNs()})
}

// count follows the living tasks, so that the end of the last one is told from a
// trace that was cut.
func (t *trace) count(n int64, note func(groups)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	note(t.groups)
	t.tasks += n
	t.ended = t.tasks <= 0
}

// sockaddr reads a struct sockaddr as the job gave it.
func sockaddr(b []byte) string {
	if len(b) < 2 {
		return "unknown address"
	}
	family := binary.LittleEndian.Uint16(b)
	switch {
	case family == unix.AF_UNIX:
		p := b[2:]
		for i, c := range p {
			if c == 0 && i > 0 {
				p = p[:i]
				break
			}
		}
		return fmt.Sprintf("unix:%q", p)
	case family == unix.AF_INET && len(b) >= 8:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), binary.BigEndian.Uint16(b[2:])).String()
	case family == unix.AF_INET6 && len(b) >= 24:
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[8:24])), binary.BigEndian.Uint16(b[2:])).String()
	}
	return fmt.Sprintf("address family %d", family)
}

// waitStart returns nil once the job has started and is watched. It is what
// stands between every path under inputs/ and the plaintext.
func (t *trace) waitStart(done <-chan struct{}, limit time.Duration) error {
	if !isClosed(t.started) {
		timer := time.NewTimer(limit)
		defer timer.Stop()
		select {
		case <-t.started:
		case <-t.finished:
			return errors.New("the job is over")
		case <-done:
			return os.ErrDeadlineExceeded
		case <-timer.C:
			return fmt.Errorf("the trace has shown no container start within %s", limit)
		}
	}
	if isClosed(t.finished) {
		return errors.New("the job is over")
	}
	if t.gone() {
		return errors.New("the trace is lost")
	}
	return nil
}
