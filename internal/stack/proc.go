package stack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// stackVariable marks in its environment every process that belongs to a stack.
// Children inherit it, so that `down` finds what a killed daemon left behind.
const stackVariable = "COFFER_STACK"

// process names one process for good: a pid alone may be reused.
type process struct {
	Name string `json:"name"`
	PID  int    `json:"pid"`
	// Start is the process's start time in clock ticks since boot
	// (proc(5), /proc/PID/stat field 22).
	Start uint64 `json:"start"`
}

// startTime returns field 22 of /proc/PID/stat, and fs.ErrNotExist for a
// process that is gone or a zombie.
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		if errors.Is(err, syscall.ESRCH) {
			return 0, fs.ErrNotExist
		}
		return 0, err
	}
	// The command name stands in parentheses and may itself hold any byte.
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return 0, fmt.Errorf("parse /proc/%d/stat: no command name", pid)
	}
	f := strings.Fields(string(b[i+1:]))
	if len(f) < 20 {
		return 0, fmt.Errorf("parse /proc/%d/stat: %d fields", pid, len(f))
	}
	if f[0] == "Z" || f[0] == "X" {
		return 0, fs.ErrNotExist
	}
	return strconv.ParseUint(f[19], 10, 64)
}

func (p process) alive() bool {
	if p.PID <= 1 {
		return false
	}
	s, err := startTime(p.PID)
	return err == nil && s == p.Start
}

// signal sends s to exactly this process: the pidfd is opened first and the
// start time checked after, so that a reused pid is never hit.
func (p process) signal(s unix.Signal) error {
	if p.PID <= 1 {
		return nil
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err != nil {
		if errors.Is(err, unix.ESRCH) {
			return nil
		}
		return fmt.Errorf("open process %d: %w", p.PID, err)
	}
	defer func() { _ = unix.Close(fd) }()
	if !p.alive() {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, s, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signal %s (%d): %w", p.Name, p.PID, err)
	}
	return nil
}

const pollEvery = 10 * time.Millisecond

// wait returns once the process is gone, or false when ctx ends first.
func (p process) wait(ctx context.Context) bool {
	t := time.NewTicker(pollEvery)
	defer t.Stop()
	for p.alive() {
		select {
		case <-ctx.Done():
			return false
		case <-t.C:
		}
	}
	return true
}

// Grace is how long a daemon has to end after SIGTERM.
const Grace = 10 * time.Second

// stop ends the process: SIGTERM, after grace SIGKILL.
func (p process) stop(ctx context.Context, grace time.Duration) error {
	if !p.alive() {
		return nil
	}
	if err := p.signal(unix.SIGTERM); err != nil {
		return err
	}
	gctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	if p.wait(gctx) {
		return nil
	}
	if err := p.signal(unix.SIGKILL); err != nil {
		return err
	}
	kctx, kcancel := context.WithTimeout(ctx, 5*time.Second)
	defer kcancel()
	if !p.wait(kctx) {
		return fmt.Errorf("%s (pid %d) does not end after SIGKILL", p.Name, p.PID)
	}
	return nil
}

// running is a started daemon. The channel is closed once it has ended while
// `up` still watches.
type running struct {
	process
	ended chan struct{}
	log   string
	from  int64
}

// spawn starts d in a session of its own, so that no terminal signal reaches
// it, with its output appended to its log.
func (l Layout) spawn(d service, env []string) (*running, error) {
	log, err := os.OpenFile(l.Log(d.name), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", d.name, err)
	}
	defer func() { _ = log.Close() }()
	from, err := log.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", d.name, err)
	}
	// No CommandContext: a daemon outlives the command that starts it.
	cmd := exec.Command(d.argv[0], d.argv[1:]...)
	cmd.Env = env
	cmd.Dir = l.Dir
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", d.name, err)
	}
	r := &running{process: process{Name: d.name, PID: cmd.Process.Pid}, ended: make(chan struct{}), log: l.Log(d.name), from: from}
	// A child that has ended is a zombie until the goroutine below reaps it,
	// so its stat file can still be read here.
	r.Start, err = childStart(r.PID)
	go func() {
		_ = cmd.Wait()
		close(r.ended)
	}()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", d.name, err)
	}
	return r, nil
}

func childStart(pid int) (uint64, error) {
	s, err := startTime(pid)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	return s, err
}

// Lines and bytes of a log that are shown when a daemon does not come up.
const (
	tailLines = 12
	tailBytes = 4 << 10
)

// tail returns the last lines that a daemon wrote since it was started.
func (r *running) tail() string {
	f, err := os.Open(r.log)
	if err != nil {
		return ""
	}
	defer func() { _ = f.Close() }()
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return ""
	}
	from := max(r.from, end-tailBytes)
	b := make([]byte, end-from)
	if _, err := f.ReadAt(b, from); err != nil && !errors.Is(err, io.EOF) {
		return ""
	}
	lines := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	if len(lines) > tailLines {
		lines = lines[len(lines)-tailLines:]
	}
	return strings.Join(lines, "\n")
}

// DaemonError says that a daemon did not come up, with the end of its log.
type DaemonError struct {
	Name string
	Err  error
	Log  string
	Tail string
}

func (e *DaemonError) Error() string {
	return fmt.Sprintf("%s did not come up: %v (log: %s)", e.Name, e.Err, e.Log)
}

func (e *DaemonError) Unwrap() error { return e.Err }

// ReadyTimeout is how long a daemon has to become ready.
const ReadyTimeout = 30 * time.Second

// ready polls probe until it succeeds, the daemon ends, or time is up.
func (r *running) ready(ctx context.Context, probe func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, ReadyTimeout)
	defer cancel()
	t := time.NewTicker(pollEvery)
	defer t.Stop()
	var last error
	for {
		pctx, pcancel := context.WithTimeout(ctx, 2*time.Second)
		err := probe(pctx)
		pcancel()
		if err == nil {
			return nil
		}
		if ctx.Err() == nil {
			last = err
		}
		select {
		case <-r.ended:
			return &DaemonError{Name: r.Name, Err: errors.New("it ended at once"), Log: r.log, Tail: r.tail()}
		case <-ctx.Done():
			if errors.Is(context.Cause(ctx), context.Canceled) {
				return ctx.Err()
			}
			return &DaemonError{Name: r.Name, Err: fmt.Errorf("not ready after %s: %w", ReadyTimeout, last), Log: r.log, Tail: r.tail()}
		case <-t.C:
		}
	}
}

// leftovers returns the processes that carry the stack's mark, and those in its
// cgroups, except this one.
func (l Layout) leftovers() ([]process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	mark := []byte(stackVariable + "=" + l.ID)
	var out []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid <= 1 || pid == os.Getpid() {
			continue
		}
		// A process that ends meanwhile, or a kernel thread, has nothing to read.
		if !hasVariable(pid, mark) && !inCgroup(pid, l.Cgroup()) {
			continue
		}
		start, err := startTime(pid)
		if err != nil {
			continue
		}
		name, err := os.ReadFile(filepath.Join("/proc", e.Name(), "comm"))
		if err != nil {
			continue
		}
		out = append(out, process{Name: strings.TrimSpace(string(name)), PID: pid, Start: start})
	}
	return out, nil
}

func hasVariable(pid int, variable []byte) bool {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "environ"))
	if err != nil {
		return false
	}
	for v := range bytes.SplitSeq(b, []byte{0}) {
		if bytes.Equal(v, variable) {
			return true
		}
	}
	return false
}

func inCgroup(pid int, group string) bool {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cgroup"))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		// hierarchy-ID:controllers:path (cgroups(7)).
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) == 3 && (f[2] == group || strings.HasPrefix(f[2], group+"/")) {
			return true
		}
	}
	return false
}

// killLeftovers ends what still carries the stack's mark. Processes may start
// others while they are being ended, so it looks again until none is left.
func (l Layout) killLeftovers(ctx context.Context) (int, error) {
	const rounds = 10
	killed := 0
	for range rounds {
		ps, err := l.leftovers()
		if err != nil || len(ps) == 0 {
			return killed, err
		}
		for _, p := range ps {
			if err := p.signal(unix.SIGKILL); err != nil {
				return killed, err
			}
		}
		wctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		for _, p := range ps {
			if p.wait(wctx) {
				killed++
			}
		}
		cancel()
	}
	ps, err := l.leftovers()
	if err != nil || len(ps) == 0 {
		return killed, err
	}
	return killed, fmt.Errorf("%d processes of this stack do not end, %s (pid %d) among them", len(ps), ps[0].Name, ps[0].PID)
}
