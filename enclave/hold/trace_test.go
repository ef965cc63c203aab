package hold

import (
	"encoding/binary"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	pb "gvisor.dev/gvisor/pkg/sentry/seccheck/points/points_go_proto"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
)

const testGrace = 50 * time.Millisecond

func packet(t testing.TB, kind pb.MessageType, m proto.Message) []byte {
	t.Helper()
	body, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	b := binary.LittleEndian.AppendUint16(nil, traceHeaderSize)
	b = binary.LittleEndian.AppendUint16(b, uint16(kind))
	return append(binary.LittleEndian.AppendUint32(b, 0), body...)
}

// dialTrace connects as a sandbox does.
func dialTrace(t *testing.T, path string) *net.UnixConn {
	t.Helper()
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	hs, err := proto.Marshal(&pb.Handshake{Version: 1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write(hs); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	return conn
}

func TestTraceEnds(t *testing.T) {
	start := packet(t, pb.MessageType_MESSAGE_CONTAINER_START, &pb.Start{Id: "c"})
	clone := packet(t, pb.MessageType_MESSAGE_SENTRY_CLONE, &pb.CloneInfo{})
	exit := packet(t, pb.MessageType_MESSAGE_SENTRY_TASK_EXIT, &pb.TaskExit{})
	session := packet(t, pb.MessageType_MESSAGE_SENTRY_EXEC, &pb.ExecveInfo{ContextData: &pb.ContextData{IsExecSession: true}})
	for name, c := range map[string]struct {
		packets [][]byte
		finish  bool
		lost    bool
	}{
		"before the start":                    {nil, false, false},
		"while the job runs":                  {[][]byte{start}, false, true},
		"while a child runs":                  {[][]byte{start, clone, exit}, false, true},
		"with the last task":                  {[][]byte{start, clone, exit, exit}, false, false},
		"and the agent says the job is over":  {[][]byte{start}, true, false},
		"after a task that none had started":  {[][]byte{exit, start}, false, true},
		"with the last task that was counted": {[][]byte{start, clone, session, exit, exit}, false, true},
		"after a start that was not complete": {[][]byte{start[:7]}, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			events := newEventLog(time.Now)
			path := filepath.Join(t.TempDir(), "t.sock")
			grace := testGrace
			if c.finish {
				grace = time.Minute
			}
			tr, err := listenTrace(path, events, nil, grace, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			defer tr.finish()
			conn := dialTrace(t, path)
			for _, p := range c.packets {
				if _, err := conn.Write(p); err != nil {
					t.Fatal(err)
				}
			}
			if err := conn.Close(); err != nil {
				t.Fatal(err)
			}
			switch {
			case c.finish:
				tr.finish()
			case c.lost:
				select {
				case <-tr.lost:
				case <-time.After(time.Minute):
				}
			default:
				time.Sleep(6 * testGrace)
			}
			var s holdapi.Status
			tr.status(&s)
			if s.TraceLost != c.lost {
				t.Errorf("lost: %v, want %v", s.TraceLost, c.lost)
			}
			if evs := events.after(t.Context(), 0, 0); (len(evs) > 0 && evs[len(evs)-1].Kind == "trace-lost") != c.lost {
				t.Errorf("events: %+v", evs)
			}
		})
	}
}

// lost sets the count of messages that the runtime could not send.
func lost(b []byte, n uint32) []byte {
	binary.LittleEndian.PutUint32(b[4:], n)
	return b
}

// A message that is missing, whatever was in it, is a trace that is lost: no input opens
// any more, and the rules are told.
func TestAGapLosesTheTrace(t *testing.T) {
	start := func() []byte { return packet(t, pb.MessageType_MESSAGE_CONTAINER_START, &pb.Start{}) }
	notice := func() []byte { return packet(t, pb.MessageType_MESSAGE_UNKNOWN, &pb.Start{}) }
	long := "/dev/shm/" + strings.Repeat("x", maxPath)
	watched, err := newOpens([]string{"/dev/shm/**"})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		packets [][]byte
		dropped int64
		lost    bool
	}{
		"none":                                  {[][]byte{start(), notice()}, 0, false},
		"before the start, and no start":        {[][]byte{lost(notice(), 2)}, 2, false},
		"before the start":                      {[][]byte{lost(notice(), 2), start()}, 2, true},
		"that the start tells of":               {[][]byte{lost(start(), 1)}, 1, true},
		"that nothing follows but the notice":   {[][]byte{start(), lost(notice(), 1)}, 1, true},
		"told twice":                            {[][]byte{start(), lost(notice(), 1), lost(notice(), 3), lost(notice(), 2)}, 3, true},
		"a packet without a header":             {[][]byte{start(), {1, 2, 3}}, 1, true},
		"a message that cannot be read":         {[][]byte{start(), append(packet(t, pb.MessageType_MESSAGE_SENTRY_EXEC, &pb.ExecveInfo{}), 0xff)}, 1, true},
		"text that was not escaped":             {[][]byte{start(), append(packet(t, pb.MessageType_MESSAGE_SENTRY_EXEC, &pb.ExecveInfo{}), 0x12, 1, 0xff)}, 1, true},
		"a program whose path is too long":      {[][]byte{start(), packet(t, pb.MessageType_MESSAGE_SENTRY_EXEC, &pb.ExecveInfo{BinaryPath: long})}, 1, true},
		"a watched file whose path is too long": {[][]byte{start(), packet(t, pb.MessageType_MESSAGE_SYSCALL_OPEN, &pb.Open{Pathname: long})}, 1, true},
		"another file whose path is too long":   {[][]byte{start(), packet(t, pb.MessageType_MESSAGE_SYSCALL_OPEN, &pb.Open{Pathname: "/tmp" + long})}, 0, false},
		"what came, and what did not, both":     {[][]byte{start(), {1}, lost(notice(), 2)}, 3, true},
	} {
		t.Run(name, func(t *testing.T) {
			tr := &trace{started: make(chan struct{}), finished: make(chan struct{}), lost: make(chan struct{}), opens: watched,
				events: newEventLog(time.Now), conn: new(net.UnixConn)}
			for _, p := range c.packets {
				if tr.message(p) != nil {
					tr.drop(1)
				}
			}
			var s holdapi.Status
			tr.status(&s)
			if s.Dropped != c.dropped || s.TraceLost != c.lost {
				t.Errorf("%d messages, lost: %t", s.Dropped, s.TraceLost)
			}
			told := 0
			for _, e := range tr.events.list {
				if e.Kind == "trace-lost" {
					told++
				}
			}
			if (told == 1) != c.lost || told > 1 {
				t.Errorf("told %d times: %+v", told, tr.events.list)
			}
			if isClosed(tr.started) && (tr.waitStart(nil, time.Millisecond) != nil) != c.lost {
				t.Error("what is not watched whole reads, or what is does not")
			}
		})
	}
}

// What the sandbox had sent when the agent said that the job is over counts.
func TestWhatHasComeIsRead(t *testing.T) {
	events := newEventLog(time.Now)
	path := filepath.Join(t.TempDir(), "t.sock")
	tr, err := listenTrace(path, events, nil, testGrace, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	conn := dialTrace(t, path)
	for _, p := range [][]byte{packet(t, pb.MessageType_MESSAGE_CONTAINER_START, &pb.Start{}), packet(t, pb.MessageType_MESSAGE_SYSCALL_PTRACE, &pb.Ptrace{})} {
		if _, err := conn.Write(p); err != nil {
			t.Fatal(err)
		}
	}
	tr.finish()
	if list := events.after(t.Context(), 0, 0); len(list) != 2 || list[1].Kind != "ptrace" {
		t.Errorf("%+v", list)
	}
}

func TestLookingIntoAProcess(t *testing.T) {
	tr := &trace{started: make(chan struct{}), finished: make(chan struct{}), lost: make(chan struct{}), events: newEventLog(time.Now)}
	for call, want := range map[uint64]string{
		unix.SYS_PROCESS_VM_READV: "process_vm_readv of 7", unix.SYS_PROCESS_VM_WRITEV: "process_vm_writev of 7", unix.SYS_PIDFD_GETFD: "pidfd_getfd of 7", unix.SYS_GETPID: "",
	} {
		tr.events = newEventLog(time.Now)
		if err := tr.message(packet(t, pb.MessageType_MESSAGE_SYSCALL_RAW, &pb.Syscall{Sysno: call, Arg1: 7})); err != nil {
			t.Fatal(err)
		}
		got := ""
		for _, e := range tr.events.list {
			got += e.Detail
			if e.Kind != "ptrace" {
				t.Errorf("%+v", e)
			}
		}
		if got != want {
			t.Errorf("call %d: %q, want %q", call, got, want)
		}
	}
}

// The gate opens for a watched, running job only.
func TestGate(t *testing.T) {
	tr := &trace{started: make(chan struct{}), finished: make(chan struct{}), lost: make(chan struct{}), events: newEventLog(time.Now)}
	if err := tr.waitStart(nil, time.Millisecond); err == nil {
		t.Error("open before the start")
	}
	done := make(chan struct{})
	close(done)
	if err := tr.waitStart(done, time.Minute); err == nil {
		t.Error("open for a caller that gave up")
	}
	close(tr.started)
	if err := tr.waitStart(nil, time.Millisecond); err == nil {
		t.Error("open though nobody watches")
	}
	tr.conn = new(net.UnixConn)
	if err := tr.waitStart(nil, time.Millisecond); err != nil {
		t.Errorf("shut for a watched job: %v", err)
	}
	tr.declareLost("test")
	if err := tr.waitStart(nil, time.Millisecond); err == nil {
		t.Error("open after the trace was lost")
	}
}

func TestEventsAreBounded(t *testing.T) {
	l := newEventLog(time.Now)
	for range maxEvents {
		l.add(holdapi.Event{Kind: "exec"})
	}
	l.add(holdapi.Event{Kind: "operator-exec"})
	l.add(holdapi.Event{Kind: "checkpoint", Checkpoint: &holdapi.Checkpoint{}})
	if len(l.list) != maxEvents-reservedEvents+2 || l.dropped != reservedEvents {
		t.Errorf("%d events, %d dropped", len(l.list), l.dropped)
	}
	if got := l.after(t.Context(), uint64(len(l.list)-2), 0); len(got) != 2 || got[0].Kind != "operator-exec" || got[1].Kind != "checkpoint" {
		t.Errorf("%+v", got)
	}
	if got := l.after(t.Context(), 0, 0); len(got) != maxBatch {
		t.Errorf("a batch of %d", len(got))
	}
	if got := l.after(t.Context(), 1<<40, time.Millisecond); got != nil {
		t.Errorf("%+v", got)
	}
}

func FuzzTraceMessage(f *testing.F) {
	f.Add(packet(f, pb.MessageType_MESSAGE_CONTAINER_START, &pb.Start{Id: "c"}))
	f.Add(packet(f, pb.MessageType_MESSAGE_SENTRY_EXEC, &pb.ExecveInfo{BinaryPath: "/bin/x", ContextData: &pb.ContextData{ThreadGroupId: 1}}))
	f.Add(packet(f, pb.MessageType_MESSAGE_SYSCALL_CONNECT, &pb.Connect{Address: []byte{1, 0, '/', 'x', 0}}))
	f.Add(packet(f, pb.MessageType_MESSAGE_SYSCALL_PTRACE, &pb.Ptrace{}))
	f.Add(packet(f, pb.MessageType_MESSAGE_SENTRY_CLONE, &pb.CloneInfo{CreatedThreadGroupId: 2}))
	f.Add(packet(f, pb.MessageType_MESSAGE_SENTRY_TASK_EXIT, &pb.TaskExit{}))
	f.Add(packet(f, pb.MessageType_MESSAGE_SYSCALL_RAW, &pb.Syscall{Sysno: unix.SYS_PIDFD_GETFD}))
	f.Fuzz(func(_ *testing.T, b []byte) {
		tr := &trace{started: make(chan struct{}), finished: make(chan struct{}), lost: make(chan struct{}), events: newEventLog(time.Now)}
		_ = tr.message(b)
	})
}
