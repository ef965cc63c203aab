package hold

import (
	"encoding/binary"
	"log/slog"
	"net"
	"path/filepath"
	"testing"
	"time"

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
			conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
			if err != nil {
				t.Fatal(err)
			}
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
	f.Fuzz(func(_ *testing.T, b []byte) {
		tr := &trace{started: make(chan struct{}), finished: make(chan struct{}), lost: make(chan struct{}), events: newEventLog(time.Now)}
		_ = tr.message(b)
	})
}
