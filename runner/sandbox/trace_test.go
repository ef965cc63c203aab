package sandbox

import (
	bin "encoding/binary"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	pb "gvisor.dev/gvisor/pkg/sentry/seccheck/points/points_go_proto"

	"github.com/coffer-run/coffer/attest/plan"
)

// traced is what a receiver got.
type traced struct {
	kinds map[pb.MessageType]int
	// programs and files are their paths, calls the numbers of raw calls.
	programs, files []string
	calls           []uint64
	lost            uint32
}

// receiver takes a trace on a socket of its own, and returns what had come when it ended.
func receiver(t *testing.T) (sock string, end <-chan traced) {
	t.Helper()
	sock = filepath.Join(t.TempDir(), "t.sock")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: sock, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	out := make(chan traced, 1)
	go func() {
		c, err := l.AcceptUnix()
		if err != nil {
			return
		}
		defer c.Close()
		buf := make([]byte, 1<<20)
		n, _ := c.Read(buf)
		_, _ = c.Write(buf[:n]) // the handshake
		got := traced{kinds: map[pb.MessageType]int{}}
		read := func(b []byte, m proto.Message) {
			if err := proto.Unmarshal(b, m); err != nil {
				t.Errorf("%T: %v", m, err)
			}
		}
		for {
			n, err := c.Read(buf)
			if err != nil || n < 8 {
				break
			}
			kind := pb.MessageType(bin.LittleEndian.Uint16(buf[2:]))
			got.kinds[kind]++
			got.lost = max(got.lost, bin.LittleEndian.Uint32(buf[4:]))
			switch body := buf[8:n]; kind {
			case pb.MessageType_MESSAGE_SENTRY_EXEC:
				var m pb.ExecveInfo
				read(body, &m)
				got.programs = append(got.programs, m.BinaryPath)
			case pb.MessageType_MESSAGE_SYSCALL_OPEN:
				var m pb.Open
				read(body, &m)
				where := m.FdPath
				if m.Fd == unix.AT_FDCWD {
					where = m.ContextData.GetCwd()
				}
				got.files = append(got.files, where+" "+m.Pathname)
			case pb.MessageType_MESSAGE_SYSCALL_RAW:
				var m pb.Syscall
				read(body, &m)
				got.calls = append(got.calls, m.Sysno)
			default:
			}
		}
		out <- got
	}()
	return sock, out
}

// tracedJob runs a script of Python to its end.
func (n *Node) tracedJob(t *testing.T, id, script string) traced {
	t.Helper()
	sock, end := receiver(t)
	j := n.testJobOf(t, id, func(r *Request) { r.TraceSocket = sock }, "/usr/bin/python3", "-c", script)
	if err := j.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if code, err := ExitCode(<-j.Exited()); err != nil || code != 0 {
		t.Fatalf("exit code %d, %v: %s", code, err, <-j.stdout)
	}
	select {
	case got := <-end:
		return got
	case <-time.After(time.Minute):
		t.Fatal("the trace does not end")
	}
	return traced{}
}

// Nothing that a job can choose, as a name, an argument, a variable or a way to call, keeps
// from the trace what rules look for. What is too long for it is counted.
func TestAJobsNameHidesNothing(t *testing.T) {
	n := startContainerd(t)
	n.cfg.Opens = true
	config, err := trace("", true)
	if err != nil {
		t.Fatal(err)
	}
	n.profile.Trace = plan.Sum(config)

	got := n.tracedJob(t, "named", `
import ctypes, os, socket, sys
sys.stderr = sys.stdout
libc = ctypes.CDLL(None, use_errno=True)
call = libc.syscall
assert libc.prctl(15, b"\xff\xfe", 0, 0, 0) == 0
s = socket.socket()
s.settimeout(1)
s.connect_ex(("192.0.2.1", 443))
libc.ptrace(16, 12345, 0, 0)
call(310, os.getpid(), None, 0, None, 0, 0)
call(311, os.getpid(), None, 0, None, 0, 0)
call(438, 99, 0, 0)
assert call(425, 8, ctypes.create_string_buffer(120)) == -1 and ctypes.get_errno() == 38, "io_uring_setup works"
assert call(304, -100, None, 0) == -1 and ctypes.get_errno() != 14, "open_by_handle_at works"

def run(f):
    if (p := os.fork()) == 0:
        try: f()
        except OSError as e: print(e, flush=True)
        os._exit(9)
    assert os.waitpid(p, 0)[1] == 0
python = "/usr/bin/python3"
rest = ["-c", "pass"]
run(lambda: os.execv(python, [b"\xff"] + rest))
run(lambda: os.execve(python, ["env"] + rest, {b"\xff": b"\xfe"}))
run(lambda: os.execv(python, ["long"] + rest + ["x" * 120000] * 4))
os.symlink(python, b"/tmp/\xff")
run(lambda: os.execv(b"/tmp/\xff", ["link"] + rest))
os.chdir("/tmp")
run(lambda: os.execv(b"\xff", ["link"] + rest))
program = open(python, "rb").read()
for name in (b"\xff" * 200, b"a/b"):
    fd = os.memfd_create(name, 0)
    os.write(fd, program)
    run(lambda: os.execv("/proc/self/fd/%d" % fd, ["memory"] + rest))
    # execveat(fd, "", ..., AT_EMPTY_PATH)
    argv = (ctypes.c_char_p * 4)(b"memory", b"-c", b"pass", None)
    run(lambda: call(322, fd, b"", argv, (ctypes.c_char_p * 1)(None), 0x1000))
    os.close(fd)
folder = os.open("/proc/self/fdinfo", os.O_RDONLY | os.O_DIRECTORY)
fd = os.memfd_create("c", 0)
os.write(fd, program)
os.dup2(fd, 7)
run(lambda: call(322, folder, b"../fd/7", argv, (ctypes.c_char_p * 1)(None), 0))

def attempt(f):
    try: f()
    except OSError: pass
attempt(lambda: os.open(b"/\xff/../etc/shadow", 0))
os.mkdir(b"/tmp/\xfe")
os.chdir(b"/tmp/\xfe")
attempt(lambda: os.open("../../etc/shadow", 0))
call(85, b"/creat\xff", 0)
how = (ctypes.c_uint64 * 3)(0, 0, 0)
call(437, -100, b"openat2\xff", how, 24)
root = os.open("/etc", os.O_RDONLY | os.O_DIRECTORY)
call(437, root, b"shadow", how, 24)
call(437, root, b"/../shadow-below", (ctypes.c_uint64 * 3)(0, 0, 0x10), 24)
call(2, b"/" + b"\xff" * 4000, 0)
os.execv(python, ["python3", "-c", "pass"])
`)
	for kind, want := range map[pb.MessageType]int{
		pb.MessageType_MESSAGE_CONTAINER_START: 1, pb.MessageType_MESSAGE_SYSCALL_SOCKET: 1, pb.MessageType_MESSAGE_SYSCALL_CONNECT: 1, pb.MessageType_MESSAGE_SYSCALL_PTRACE: 1,
		pb.MessageType_MESSAGE_SENTRY_CLONE: 9, pb.MessageType_MESSAGE_SENTRY_TASK_EXIT: 10,
	} {
		if got.kinds[kind] < want {
			t.Errorf("%d messages of the kind %s, want %d", got.kinds[kind], kind, want)
		}
	}
	python := slices.ContainsFunc(got.programs, func(p string) bool { return strings.HasPrefix(p, "/usr/bin/python3") })
	memory := "/memfd:" + strings.Repeat("\uFFFDff", 200) + " (deleted)"
	if n := len(got.programs); n != 11 || !python || got.programs[5] != memory || !strings.HasPrefix(got.programs[6], "/dev/fd/") || got.programs[7] != "/memfd:a/b (deleted)" ||
		!strings.HasPrefix(got.programs[9], "/dev/fd/") || !strings.HasSuffix(got.programs[9], "/../fd/7") {
		t.Errorf("%d programs: %q", n, got.programs)
	}
	if want := []uint64{unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_PIDFD_GETFD}; !slices.Equal(got.calls, want) {
		t.Errorf("calls %v, want %v", got.calls, want)
	}
	for _, want := range []string{
		"/tmp /\uFFFDff/../etc/shadow", "/tmp/\uFFFDfe ../../etc/shadow", "/tmp/\uFFFDfe /creat\uFFFDff", "/tmp/\uFFFDfe openat2\uFFFDff", "/etc shadow", "/etc ./shadow-below",
		"/tmp/\uFFFDfe /" + strings.Repeat("\uFFFDff", 4000),
	} {
		if !slices.Contains(got.files, want) {
			t.Errorf("no open of %.100q", want)
		}
	}
	if got.lost != 0 {
		t.Errorf("%d messages are lost", got.lost)
	}

	// A working folder that is longer than any message: its open is lost, and counted.
	got = n.tracedJob(t, "deep", `
import os
os.chdir("/tmp")
for i in range(600):
    os.mkdir("x" * 255)
    os.chdir("x" * 255)
try: os.open("f", os.O_RDONLY)
except OSError: pass
`)
	if got.lost == 0 {
		t.Error("nothing is lost")
	}
}
