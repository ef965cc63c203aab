package hold

import (
	"path"
	"strings"

	pb "gvisor.dev/gvisor/pkg/sentry/seccheck/points/points_go_proto"
)

// groups are the job's thread groups, which is what people call processes, by the number
// that the runtime gives them. A process is called after its program: the name that the
// kernel has for it is the job's to choose.
type groups map[int32]*group

type group struct {
	program string
	tasks   int
}

// maxGroups bounds how many are known by name. Those beyond it have none.
const maxGroups = 1 << 16

// startGroups begins with the job's first program.
func startGroups(m *pb.Start) groups {
	program := ""
	if args := m.GetArgs(); len(args) > 0 {
		program = path.Base(args[0])
	}
	return groups{m.GetContextData().GetThreadGroupId(): {program: program, tasks: 1}}
}

func (g groups) clone(m *pb.CloneInfo) {
	from, to := m.GetContextData().GetThreadGroupId(), m.GetCreatedThreadGroupId()
	if from != to {
		if g == nil || len(g) >= maxGroups {
			return
		}
		g[to] = &group{tasks: 1}
		if parent := g[from]; parent != nil {
			g[to].program = parent.program
		}
	} else if own := g[to]; own != nil {
		own.tasks++
	}
}

func (g groups) exec(m *pb.ExecveInfo) {
	if own := g[m.GetContextData().GetThreadGroupId()]; own != nil {
		own.program = path.Base(m.GetBinaryPath())
	}
}

func (g groups) exit(m *pb.TaskExit) {
	id := m.GetContextData().GetThreadGroupId()
	if own := g[id]; own != nil {
		if own.tasks--; own.tasks <= 0 {
			delete(g, id)
		}
	}
}

// programPath returns the path of a program as rules match it. Of one in memory the runtime
// gives the name, which may have slashes, and of one that was asked for below an open folder
// the descriptor and what was asked: there are no folders above either for dots to lead to.
func programPath(p string) string {
	for _, above := range []string{"/memfd:", "/dev/fd/"} {
		if rest, ok := strings.CutPrefix(p, above); ok {
			return above + strings.TrimPrefix(path.Clean("/"+rest), "/")
		}
	}
	return p
}

// program returns the name of the program that a message is of; empty if the trace has
// not shown it, as of an operator's.
func (t *trace) program(c *pb.ContextData) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if own := t.groups[c.GetThreadGroupId()]; own != nil && !c.GetIsExecSession() {
		return own.program
	}
	return ""
}
