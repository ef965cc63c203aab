// Package sink sends what a sandbox does to whoever watches it, and says what it could not send.
//
// It is a sink of gVisor's trace sessions (gvisor.dev/gvisor/pkg/sentry/seccheck) beside the one called "remote", speaks that one's
// protocol (pkg/sentry/seccheck/sinks/remote/wire), and differs from it in this:
//
//   - Text that is not UTF-8 is sent, escaped (escape). "remote" drops such a message, and does not count it.
//   - A message that is lost is told of even if none follows it.
//   - openat2 is sent as an open: gVisor has no message of its own for it.
//   - A program's arguments and its environment are not sent. Nothing reads them, secrets lie in them, and without them
//     no message is longer than its paths.
//
// Trusted: gVisor, which says what the job did. The text in it is the job's.
package sink

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"gvisor.dev/gvisor/pkg/context"
	"gvisor.dev/gvisor/pkg/fd"
	"gvisor.dev/gvisor/pkg/sentry/seccheck"
	pb "gvisor.dev/gvisor/pkg/sentry/seccheck/points/points_go_proto"
	"gvisor.dev/gvisor/pkg/sentry/seccheck/sinks/remote/wire"
)

// Name is what a trace session calls this sink. Its only setting is "endpoint", the path of a unix socket of packets.
const Name = "coffer"

const (
	// retries, firstWait and longestWait bound how long a task waits for a reader that does not keep up: 0.12 s.
	retries     = 20
	firstWait   = 25 * time.Microsecond
	longestWait = 10 * time.Millisecond
	// exitWait bounds how long the end of a task waits until what was lost is told.
	exitWait = 2 * time.Second
	// buffer is how many bytes wait in the socket, the kernel's own records of them included.
	buffer = 4 << 20
	// maxMessage is what a reader must be ready for, in bytes.
	maxMessage = 128 << 10
)

// Opened reads the arguments of an openat2(2) of the task that a context is of.
type Opened func(context.Context, *pb.Syscall) *pb.Open

// Register makes the sink known. It is called once, before runsc begins.
func Register(opened Opened) {
	seccheck.RegisterSink(seccheck.SinkDesc{Name: Name, Setup: setup, New: func(_ map[string]any, endpoint *fd.FD) (seccheck.Sink, error) {
		return open(endpoint, opened)
	}})
}

// setup connects, outside of the sandbox.
func setup(config map[string]any) (*os.File, error) {
	remote, ok := seccheck.Sinks["remote"]
	if !ok {
		return nil, errors.New("connect trace: this gVisor has no sink whose protocol is known")
	}
	f, err := remote.Setup(config)
	if err != nil {
		return nil, fmt.Errorf("connect trace: %w", err)
	}
	// Without the right to more than the machine's usual size it stays at that: less waits, and what is lost is counted.
	_ = unix.SetsockoptInt(int(f.Fd()), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, buffer)
	// Fd made it blocking.
	if err := unix.SetNonblock(int(f.Fd()), true); err != nil {
		return nil, errors.Join(fmt.Errorf("connect trace: %w", err), f.Close())
	}
	return f, nil
}

// open takes what setup connected, inside of the sandbox.
func open(endpoint *fd.FD, opened Opened) (*sink, error) {
	if endpoint == nil {
		return nil, errors.New("open trace: no connection")
	}
	return &sink{out: endpoint, opened: opened}, nil
}

type sink struct {
	out    *fd.FD
	opened Opened
	// lost counts messages that were not sent, told those of them that the reader knows of.
	lost, told atomic.Uint32
	// telling: a goroutine sees to it that told becomes lost.
	telling atomic.Bool
}

// Name implements seccheck.Sink.
func (*sink) Name() string { return Name }

// Status implements seccheck.Sink.
func (s *sink) Status() seccheck.SinkStatus {
	return seccheck.SinkStatus{DroppedCount: uint64(s.lost.Load())}
}

// Stop implements seccheck.Sink. A task may still be sending: it fails to.
func (s *sink) Stop() { _ = s.out.Close() }

// send never fails towards the job: what cannot be sent is counted, and the count is told.
func (s *sink) send(kind pb.MessageType, m proto.Message) {
	body, err := marshal(m)
	if err == nil {
		err = s.write(kind, body)
	}
	if err == nil {
		return
	}
	s.lost.Add(1)
	if s.telling.CompareAndSwap(false, true) {
		go s.keepTelling()
	}
}

// keepTelling ends when the reader knows all, or is gone.
func (s *sink) keepTelling() {
	for s.tell(0) == nil {
		s.telling.Store(false)
		// What was lost until then found a goroutine that was telling.
		if s.told.Load() == s.lost.Load() || !s.telling.CompareAndSwap(false, true) {
			return
		}
	}
}

// write sends one packet, whose header carries the count of those that were lost.
func (s *sink) write(kind pb.MessageType, body []byte) error {
	if len(body) > maxMessage {
		return fmt.Errorf("a message of %d bytes", len(body))
	}
	wait := firstWait
	for i := 0; ; i++ {
		lost := s.lost.Load()
		head := binary.LittleEndian.AppendUint16(nil, wire.HeaderStructSize)
		head = binary.LittleEndian.AppendUint16(head, uint16(kind))
		head = binary.LittleEndian.AppendUint32(head, lost)
		_, err := unix.Writev(s.out.FD(), [][]byte{head, body})
		if err == nil {
			for told := s.told.Load(); lost > told && !s.told.CompareAndSwap(told, lost); told = s.told.Load() {
			}
			return nil
		}
		if !errors.Is(err, unix.EAGAIN) || i >= retries {
			return err
		}
		time.Sleep(wait)
		wait = min(2*wait, longestWait)
	}
}

// tell sends empty messages until one has carried the count of those that were lost, for at most limit, or with none
// until the reader is gone.
func (s *sink) tell(limit time.Duration) error {
	for began := time.Now(); s.told.Load() != s.lost.Load(); {
		err := s.write(pb.MessageType_MESSAGE_UNKNOWN, nil)
		if err != nil && (!errors.Is(err, unix.EAGAIN) || limit > 0 && time.Since(began) > limit) {
			return err
		}
	}
	return nil
}

// marshal writes a message, with its text escaped where it must be.
func marshal(m proto.Message) ([]byte, error) {
	out, err := proto.Marshal(m)
	if err == nil && !bytes.Contains(out, []byte(mark)) {
		return out, nil
	}
	escapeText(m.ProtoReflect())
	return proto.Marshal(m)
}

// Clone implements seccheck.Sink.
func (s *sink) Clone(_ context.Context, _ seccheck.FieldSet, m *pb.CloneInfo) error {
	s.send(pb.MessageType_MESSAGE_SENTRY_CLONE, m)
	return nil
}

// Execve implements seccheck.Sink.
func (s *sink) Execve(_ context.Context, _ seccheck.FieldSet, m *pb.ExecveInfo) error {
	m.Argv, m.Env = nil, nil
	s.send(pb.MessageType_MESSAGE_SENTRY_EXEC, m)
	return nil
}

// ExitNotifyParent implements seccheck.Sink.
func (s *sink) ExitNotifyParent(_ context.Context, _ seccheck.FieldSet, m *pb.ExitNotifyParentInfo) error {
	s.send(pb.MessageType_MESSAGE_SENTRY_EXIT_NOTIFY_PARENT, m)
	return nil
}

// TaskExit implements seccheck.Sink. After the last task's there is nobody left to tell what was lost.
func (s *sink) TaskExit(_ context.Context, _ seccheck.FieldSet, m *pb.TaskExit) error {
	s.send(pb.MessageType_MESSAGE_SENTRY_TASK_EXIT, m)
	_ = s.tell(exitWait)
	return nil
}

// Mmap implements seccheck.Sink.
func (s *sink) Mmap(_ context.Context, _ seccheck.FieldSet, m *pb.MmapInfo) error {
	s.send(pb.MessageType_MESSAGE_SENTRY_MMAP, m)
	return nil
}

// ContainerStart implements seccheck.Sink. Of the arguments the program's name is left.
func (s *sink) ContainerStart(_ context.Context, _ seccheck.FieldSet, m *pb.Start) error {
	m.Args, m.Env = m.Args[:min(1, len(m.Args))], nil
	s.send(pb.MessageType_MESSAGE_CONTAINER_START, m)
	return nil
}

// Syscall implements seccheck.Sink.
func (s *sink) Syscall(_ context.Context, _ seccheck.FieldSet, _ *pb.ContextData, kind pb.MessageType, m proto.Message) error {
	s.send(kind, m)
	return nil
}

// RawSyscall implements seccheck.Sink.
func (s *sink) RawSyscall(ctx context.Context, _ seccheck.FieldSet, m *pb.Syscall) error {
	if m.Sysno == unix.SYS_OPENAT2 {
		s.send(pb.MessageType_MESSAGE_SYSCALL_OPEN, s.opened(ctx, m))
		return nil
	}
	s.send(pb.MessageType_MESSAGE_SYSCALL_RAW, m)
	return nil
}
