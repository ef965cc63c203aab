package sandbox

import (
	bin "encoding/binary"
	"net"
	"path/filepath"
	"testing"
	"time"

	pb "gvisor.dev/gvisor/pkg/sentry/seccheck/points/points_go_proto"
)

// receiver takes a trace on a socket of its own, and returns how many messages of each
// kind had come when it ended.
func receiver(t *testing.T) (sock string, kinds <-chan map[pb.MessageType]int) {
	t.Helper()
	sock = filepath.Join(t.TempDir(), "t.sock")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: sock, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	out := make(chan map[pb.MessageType]int, 1)
	go func() {
		c, err := l.AcceptUnix()
		if err != nil {
			return
		}
		defer c.Close()
		buf := make([]byte, 1<<20)
		n, _ := c.Read(buf)
		_, _ = c.Write(buf[:n]) // the handshake
		got := map[pb.MessageType]int{}
		for {
			n, err := c.Read(buf)
			if err != nil || n < 8 {
				break
			}
			got[pb.MessageType(bin.LittleEndian.Uint16(buf[2:]))]++
		}
		out <- got
	}()
	return sock, out
}

// The runtime sends nothing of what it cannot encode, and counts that nowhere: text of a
// job's making that is no UTF-8 must be in no message that does not need it.
func TestAJobsNameHidesNothing(t *testing.T) {
	n := startContainerd(t)
	sock, kinds := receiver(t)
	j := n.testJobOf(t, "named", func(r *Request) { r.TraceSocket = sock }, "/usr/bin/python3", "-c", `
import ctypes, os, socket
assert ctypes.CDLL(None).prctl(15, b"\xff\xfe", 0, 0, 0) == 0
s = socket.socket()
s.settimeout(1)
s.connect_ex(("192.0.2.1", 443))
ctypes.CDLL(None).ptrace(16, 12345, 0, 0)
if (p := os.fork()) == 0:
    os._exit(0)
os.waitpid(p, 0)
os.execv("/usr/bin/python3", ["python3", "-c", "pass"])
`)
	if err := j.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if code, err := ExitCode(<-j.Exited()); err != nil || code != 0 {
		t.Fatalf("exit code %d, %v", code, err)
	}
	select {
	case got := <-kinds:
		for kind, want := range map[pb.MessageType]int{
			pb.MessageType_MESSAGE_CONTAINER_START: 1, pb.MessageType_MESSAGE_SYSCALL_SOCKET: 1, pb.MessageType_MESSAGE_SYSCALL_CONNECT: 1, pb.MessageType_MESSAGE_SYSCALL_PTRACE: 1,
			pb.MessageType_MESSAGE_SENTRY_CLONE: 1, pb.MessageType_MESSAGE_SENTRY_TASK_EXIT: 2, pb.MessageType_MESSAGE_SENTRY_EXEC: 1,
		} {
			if got[kind] < want {
				t.Errorf("%d messages of the kind %s, want %d", got[kind], kind, want)
			}
		}
		t.Log(got)
	case <-time.After(time.Minute):
		t.Fatal("the trace does not end")
	}
}
