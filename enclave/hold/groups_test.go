package hold

import (
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	pb "gvisor.dev/gvisor/pkg/sentry/seccheck/points/points_go_proto"
)

// A process is named after its program, whatever it calls itself.
func TestProcessesAreNamedAfterTheirPrograms(t *testing.T) {
	tr := &trace{started: make(chan struct{}), finished: make(chan struct{}), lost: make(chan struct{}), events: newEventLog(time.Now)}
	of := func(group int32) *pb.ContextData {
		return &pb.ContextData{ThreadGroupId: group, ProcessName: "python3-by-its-own-word"}
	}
	send := func(kind pb.MessageType, m proto.Message) {
		t.Helper()
		if err := tr.message(packet(t, kind, m)); err != nil {
			t.Fatal(err)
		}
	}
	clone := func(from, to int32) {
		send(pb.MessageType_MESSAGE_SENTRY_CLONE, &pb.CloneInfo{CreatedThreadGroupId: to, ContextData: of(from)})
	}
	exit := func(group int32) {
		send(pb.MessageType_MESSAGE_SENTRY_TASK_EXIT, &pb.TaskExit{ContextData: of(group)})
	}
	connectedAs := func(group int32, want string) {
		t.Helper()
		send(pb.MessageType_MESSAGE_SYSCALL_CONNECT, &pb.Connect{Address: []byte{2, 0, 0, 80, 10, 1, 2, 3}, ContextData: of(group)})
		if got := tr.events.list[len(tr.events.list)-1]; got.Kind != "connect" || got.Process != want {
			t.Errorf("group %d: %+v, want the process %q", group, got, want)
		}
	}
	clone(1, 9) // before the start there is nothing to know
	send(pb.MessageType_MESSAGE_CONTAINER_START, &pb.Start{Args: []string{"/usr/bin/python3", "train.py"}, ContextData: of(1)})
	connectedAs(1, "python3")
	connectedAs(9, "")
	clone(1, 1) // a thread
	clone(1, 2)
	connectedAs(2, "python3")
	send(pb.MessageType_MESSAGE_SENTRY_EXEC, &pb.ExecveInfo{BinaryPath: "/usr/bin/curl", ContextData: of(2)})
	connectedAs(2, "curl")
	connectedAs(1, "python3")
	clone(2, 3)
	exit(2)
	connectedAs(2, "")
	connectedAs(3, "curl")
	exit(1) // of two threads
	connectedAs(1, "python3")
	exit(1)
	connectedAs(1, "")
	operator := of(3)
	operator.IsExecSession = true
	send(pb.MessageType_MESSAGE_SYSCALL_CONNECT, &pb.Connect{ContextData: operator})
	if got := tr.events.list[len(tr.events.list)-1]; got.Process != "" {
		t.Errorf("an operator's program counts as the job's: %+v", got)
	}
	for i := range int32(2 * maxGroups) {
		clone(3, i+10)
	}
	if len(tr.groups) != maxGroups {
		t.Errorf("%d processes are remembered, want %d at most", len(tr.groups), maxGroups)
	}
}

// A rule for programs in memory sees one however it is named.
func TestPathsOfPrograms(t *testing.T) {
	for in, want := range map[string]string{
		"/usr/bin/python3":                         "/usr/bin/python3",
		"/memfd:tool (deleted)":                    "/memfd:tool (deleted)",
		"/memfd:a/b (deleted)":                     "/memfd:a/b (deleted)",
		"/memfd:a/../../usr/bin/python3 (deleted)": "/memfd:usr/bin/python3 (deleted)",
		"/memfd:\uFFFDff/.. (deleted)":             "/memfd:\uFFFDff/.. (deleted)",
		"/memfd:..":                                "/memfd:",
		"/dev/fd/4":                                "/dev/fd/4",
		"/dev/fd/4/7":                              "/dev/fd/4/7",
		"/dev/fd/4/../../../../usr/bin/python3":    "/dev/fd/usr/bin/python3",
		"/dev/fdx/../y":                            "/dev/fdx/../y",
		"":                                         "",
	} {
		if got := programPath(in); got != want {
			t.Errorf("%s becomes %s, want %s", in, got, want)
		}
	}
}
