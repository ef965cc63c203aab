package sink

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"gvisor.dev/gvisor/pkg/context"
	"gvisor.dev/gvisor/pkg/fd"
	"gvisor.dev/gvisor/pkg/sentry/seccheck"
	pb "gvisor.dev/gvisor/pkg/sentry/seccheck/points/points_go_proto"
)

func TestEscape(t *testing.T) {
	for name, c := range map[string]struct{ in, want string }{
		"plain text":             {"/usr/bin/python3", "/usr/bin/python3"},
		"text of another kind":   {"/tmp/größe\\xff%ff\n", "/tmp/größe\\xff%ff\n"},
		"one byte":               {"/tmp/\xff", "/tmp/�ff"},
		"half a character":       {"/tmp/\xc3/x", "/tmp/�c3/x"},
		"a surrogate":            {"\xed\xa0\x80", "�ed�a0�80"},
		"too long a form of '/'": {"a\xc0\xafb", "a�c0�afb"},
		"the mark itself":        {"/tmp/�ff", "/tmp/�ef�bf�bdff"},
		"nothing":                {"", ""},
	} {
		if got := escape(c.in); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// unescape is escape backwards.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); {
		if !strings.HasPrefix(s[i:], mark) {
			b.WriteByte(s[i])
			i++
			continue
		}
		const digits = "0123456789abcdef"
		b.WriteByte(byte(strings.IndexByte(digits, s[i+3])<<4 | strings.IndexByte(digits, s[i+4])))
		i += 5
	}
	return b.String()
}

func FuzzEscape(f *testing.F) {
	for _, s := range []string{"/usr/bin/x", "/tmp/\xff\xfe", "�", "\xef\xbf", "\xed\xa0\x80"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		e := escape(s)
		if !utf8.ValidString(e) || len(e) > 5*len(s) || strings.Count(e, "/") != strings.Count(s, "/") {
			t.Errorf("%q becomes %q", s, e)
		}
		// What leads back to one text only is the form of no other.
		if back := unescape(e); back != s {
			t.Errorf("%q becomes %q, which is %q", s, e, back)
		}
	})
}

func TestMarshalEscapesEveryText(t *testing.T) {
	args := []string{"a", "\xff", "�"}
	for name, m := range map[string]proto.Message{
		"a text":                  &pb.ExecveInfo{BinaryPath: "/tmp/\xff"},
		"a mark":                  &pb.ExecveInfo{BinaryPath: "/tmp/�"},
		"a text within a message": &pb.Open{Pathname: "x", ContextData: &pb.ContextData{Cwd: "/\xff"}},
		"a list":                  &pb.Start{Args: args},
	} {
		out, err := marshal(m)
		if err != nil || bytes.Contains(out, []byte{0xff}) {
			t.Errorf("%s: %q, %v", name, out, err)
		}
		back := m.ProtoReflect().New().Interface()
		if err := proto.Unmarshal(out, back); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if !proto.Equal(m, back) || !bytes.Contains(out, []byte(mark)) {
			t.Errorf("%s: %v", name, back)
		}
	}
	// The kernel starts the program with it.
	if !slices.Equal(args, []string{"a", "\xff", "�"}) {
		t.Errorf("the caller's list is %q", args)
	}
}

// pair is a sink and its reader's end.
func pair(t *testing.T) (*sink, int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	s, err := open(fd.New(fds[0]), func(_ context.Context, m *pb.Syscall) *pb.Open { return &pb.Open{Sysno: m.Sysno, Pathname: "/\xff"} })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Stop()
		_ = unix.Close(fds[1])
	})
	return s, fds[1]
}

// next reads a packet, waiting for it.
func next(t *testing.T, reader int) (kind pb.MessageType, lost uint32, body []byte) {
	t.Helper()
	buf := make([]byte, maxMessage+100)
	for began := time.Now(); time.Since(began) < time.Minute; time.Sleep(time.Millisecond) {
		n, err := unix.Read(reader, buf)
		if errors.Is(err, unix.EAGAIN) {
			continue
		}
		if err != nil || n < 8 || binary.LittleEndian.Uint16(buf) != 8 {
			t.Fatalf("%d bytes: %v", n, err)
		}
		return pb.MessageType(binary.LittleEndian.Uint16(buf[2:])), binary.LittleEndian.Uint32(buf[4:]), buf[8:n]
	}
	t.Fatal("nothing comes")
	return 0, 0, nil
}

func TestArgumentsStayBehind(t *testing.T) {
	s, reader := pair(t)
	long := strings.Repeat("secret", 100_000)
	if err := s.Execve(nil, seccheck.FieldSet{}, &pb.ExecveInfo{BinaryPath: "/tmp/\xff", Argv: []string{"\xff", long}, Env: []string{"K=\xff", long}}); err != nil {
		t.Fatal(err)
	}
	kind, lost, body := next(t, reader)
	var m pb.ExecveInfo
	if err := proto.Unmarshal(body, &m); err != nil || kind != pb.MessageType_MESSAGE_SENTRY_EXEC || lost != 0 || m.BinaryPath != "/tmp/�ff" || len(m.Argv)+len(m.Env) > 0 {
		t.Errorf("%v, %d lost: %v, %v", kind, lost, &m, err)
	}
	if err := s.ContainerStart(nil, seccheck.FieldSet{}, &pb.Start{Id: "c", Args: []string{"python3", long}, Env: []string{long}}); err != nil {
		t.Fatal(err)
	}
	_, lost, body = next(t, reader)
	var start pb.Start
	if err := proto.Unmarshal(body, &start); err != nil || lost != 0 || !slices.Equal(start.Args, []string{"python3"}) || len(start.Env) > 0 {
		t.Errorf("%d lost: %v, %v", lost, &start, err)
	}
}

// gVisor has no message of its own for openat2.
func TestOpenat2IsAnOpen(t *testing.T) {
	s, reader := pair(t)
	for call, want := range map[uint64]pb.MessageType{unix.SYS_OPENAT2: pb.MessageType_MESSAGE_SYSCALL_OPEN, unix.SYS_PROCESS_VM_READV: pb.MessageType_MESSAGE_SYSCALL_RAW} {
		if err := s.RawSyscall(nil, seccheck.FieldSet{}, &pb.Syscall{Sysno: call}); err != nil {
			t.Fatal(err)
		}
		kind, _, body := next(t, reader)
		if kind != want || bytes.Contains(body, []byte("/�ff")) != (want == pb.MessageType_MESSAGE_SYSCALL_OPEN) {
			t.Errorf("call %d: %v %q", call, kind, body)
		}
	}
}

func TestNoSinkWithoutAConnection(t *testing.T) {
	if s, err := open(nil, nil); err == nil {
		t.Errorf("%+v", s)
	}
}

// A reader learns of what was lost although nothing follows it.
func TestALossIsTold(t *testing.T) {
	s, reader := pair(t)
	if err := s.Syscall(nil, seccheck.FieldSet{}, nil, pb.MessageType_MESSAGE_SYSCALL_OPEN, &pb.Open{Pathname: strings.Repeat("x", maxMessage+1)}); err != nil {
		t.Fatal(err)
	}
	if kind, lost, body := next(t, reader); kind != pb.MessageType_MESSAGE_UNKNOWN || lost != 1 || len(body) != 0 {
		t.Errorf("%v, %d lost, %q", kind, lost, body)
	}
	// Nor is one missed that is lost while others are told of.
	const more = 1000
	for range more {
		go s.send(pb.MessageType_MESSAGE_SYSCALL_OPEN, &pb.Open{Pathname: strings.Repeat("x", maxMessage+1)})
	}
	for told := uint32(0); told < 1+more; {
		_, told, _ = next(t, reader)
	}
	if s.Status().DroppedCount != 1+more {
		t.Errorf("%+v", s.Status())
	}
}

// A reader that stands still loses messages, which are counted, and learns of all of them
// once it goes on, the end of the task waiting for that.
func TestAReaderThatStandsStill(t *testing.T) {
	s, reader := pair(t)
	sent := 0
	for ; s.lost.Load() == 0; sent++ {
		began := time.Now()
		s.send(pb.MessageType_MESSAGE_SENTRY_CLONE, &pb.CloneInfo{})
		if s.lost.Load() == 0 && time.Since(began) > time.Minute {
			t.Fatal("a task waits without bound")
		}
	}
	exited := make(chan error)
	go func() { exited <- s.TaskExit(nil, seccheck.FieldSet{}, &pb.TaskExit{}) }()
	came, last := 0, uint32(0)
	for last != s.lost.Load() || came+int(last) < sent+1 {
		kind, lost, _ := next(t, reader)
		if kind != pb.MessageType_MESSAGE_UNKNOWN {
			came++
		}
		last = lost
	}
	if err := <-exited; err != nil || came+int(last) != sent+1 {
		t.Errorf("%d of %d came, %d are lost: %v", came, sent+1, last, err)
	}
}

// A job does not wait for a reader that is gone.
func TestAReaderThatIsGone(t *testing.T) {
	s, reader := pair(t)
	if err := unix.Shutdown(reader, unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	for range 1000 {
		if err := s.TaskExit(nil, seccheck.FieldSet{}, &pb.TaskExit{}); err != nil {
			t.Fatal(err)
		}
	}
	if took := time.Since(began); took > 30*time.Second || s.lost.Load() != 1000 {
		t.Errorf("%d lost, %s", s.lost.Load(), took)
	}
}
