// Package holder starts a job's holder process and keeps watch over it. The
// holder outlives the agent; an agent that comes back attaches to it.
//
// Trusted: the holder's binary, as measured at the agent's start. No key passes
// through this package.
package holder

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
)

const (
	startTimeout = 10 * time.Second
	exitTimeout  = 10 * time.Second
	logName      = "holder.log"
	// procsFD is the first descriptor after the standard ones (exec.Cmd.ExtraFiles).
	procsFD = 3
)

// Config says what to start.
type Config struct {
	// Path is the holder's binary.
	Path string
	// RunDir is the job's run directory; it must exist and belong to the agent.
	RunDir   string
	JobID    string
	UID, GID int
	// LogBytes is the job's output budget.
	LogBytes int64
	// LogRate is the job's rate of output, in bytes a second.
	LogRate int64
	// Metrics is what of the output are numbers that people see; nil: none.
	Metrics *plan.Metrics
	// WatchOpen are patterns of the paths whose opening the holder tells of.
	WatchOpen []string
	// RegionBytes bounds the memory that inputs are decrypted into; 0: no bound.
	RegionBytes int64
	// CPUMillis is what the job may use of the processor, in thousandths of a core; 0:
	// all of it. The holder's workers are as many.
	CPUMillis int64
	// NearNode is 1 more than the number of the memory node for them; 0: any.
	NearNode int
	// Join puts the process into the job's cgroup. It is called right after the
	// start, before the holder is given anything to hold.
	Join func(pid int) error
	// Procs opens the list of the processes in that cgroup. The holder gets it, to
	// end the job when its lease is over and no agent is there.
	Procs func() (*os.File, error)
	// Warm becomes the holder; nil: Path is started.
	Warm *Warm
}

// args are the holder's, without --procs.
func (c Config) args() []string {
	out := []string{
		"--run", c.RunDir, "--job", c.JobID, "--uid", strconv.Itoa(c.UID), "--gid", strconv.Itoa(c.GID),
		"--log-bytes", strconv.FormatInt(c.LogBytes, 10), "--log-rate", strconv.FormatInt(c.LogRate, 10), "--region-bytes", strconv.FormatInt(c.RegionBytes, 10), "--near-node", strconv.Itoa(c.NearNode),
		"--cores", strconv.Itoa(cores(c.CPUMillis, runtime.NumCPU())),
	}
	if m := c.Metrics; m != nil {
		out = append(out, "--metrics", fmt.Sprintf("%d,%d,%s", m.MaxValues, m.ValuesPerSecond, strings.Join(m.Names, ",")))
	}
	for _, glob := range c.WatchOpen {
		out = append(out, "--watch-open", glob)
	}
	return out
}

// cores is how many cores of the machine's the holder of a job uses at once: the job's,
// and two at least, as in Go's own rule, so that one worker is not all there is. Go's
// runtime looks for a group's limit when it begins, which is before the holder is in the
// job's.
func cores(millis int64, machine int) int {
	if millis <= 0 {
		return machine
	}
	return int(min(int64(machine), max(2, (millis-1)/1000+1)))
}

// Holder is a running holder process.
type Holder struct {
	*holdapi.Client
	// Hello is who the holder is.
	Hello  holdapi.Hello
	runDir string
	lost   chan struct{}
	pidfd  int
}

// process is a holder's, in a session and a network namespace of its own.
type process struct {
	cmd *exec.Cmd
	// exited is closed once it is gone.
	exited chan struct{}
}

// launch starts the holder with extra as its first descriptor after the standard
// ones. It gets no other, and no environment.
func launch(path string, args []string, dir string, out, extra *os.File) (*process, error) {
	cmd := exec.Command(path, args...) //nolint:gosec,noctx // the configured holder; it must outlive the call
	cmd.ExtraFiles = []*os.File{extra}
	cmd.Env = []string{}
	cmd.Dir = dir
	cmd.Stdout, cmd.Stderr = out, out
	// A network namespace of its own has no interface that is up: the holder
	// cannot reach anything, whatever it links.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: syscall.CLONE_NEWNET}
	// This process may have been started with descriptors that its programs would
	// have too.
	if err := unix.CloseRange(procsFD, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return nil, fmt.Errorf("keep descriptors from it: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{cmd: cmd, exited: make(chan struct{})}
	go func() {
		defer close(p.exited)
		_ = cmd.Wait() // the holder's end is noticed through its pidfd
	}()
	return p, nil
}

func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.exited
}

// Start runs a holder, or tells one that waits of its job, and waits until it
// answers. On an error nothing is left running.
func Start(ctx context.Context, c Config) (_ *Holder, err error) {
	var p *process
	if c.Warm != nil {
		p = c.Warm.process
		defer c.Warm.conn.Close()
	}
	defer func() {
		if err == nil {
			return
		}
		if p != nil {
			p.kill()
		}
		err = errors.Join(fmt.Errorf("start holder: %w", err), holdapi.Cleanup(c.RunDir))
	}()
	stderr, err := os.OpenFile(filepath.Join(c.RunDir, logName), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer stderr.Close()
	procs, err := c.Procs()
	if err != nil {
		return nil, err
	}
	defer procs.Close()
	if p == nil {
		if p, err = launch(c.Path, append(c.args(), "--procs", strconv.Itoa(procsFD)), c.RunDir, stderr, procs); err != nil {
			return nil, err
		}
	}
	if err := c.Join(p.cmd.Process.Pid); err != nil {
		return nil, err
	}
	if c.Warm != nil {
		if err := holdapi.GiveJob(c.Warm.conn, holdapi.Job{Args: c.args(), Log: stderr, Procs: procs}); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		h, err := attach(ctx, c.RunDir, c.JobID, p.cmd.Process.Pid)
		if err == nil {
			return h, nil
		}
		if errors.Is(err, errStranger) {
			return nil, err
		}
		select {
		case <-p.exited:
			return nil, fmt.Errorf("it ended at once; see %s", filepath.Join(c.RunDir, logName))
		case <-ctx.Done():
			// A job that was told to end meanwhile has not failed: that must show.
			return nil, fmt.Errorf("no answer: %w", errors.Join(ctx.Err(), err))
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// errStranger means that another process answers in a holder's place.
var errStranger = errors.New("another process answers on the holder's socket")

// Attach connects to a holder that runs already and checks that it is the job's.
// Whether its keys are those that were attested is for the caller.
func Attach(ctx context.Context, runDir, jobID string) (*Holder, error) {
	return attach(ctx, runDir, jobID, 0)
}

// attach takes pid as the process that must answer, unless it is 0: whoever got
// to the socket first would otherwise have its own keys attested.
func attach(ctx context.Context, runDir, jobID string, pid int) (_ *Holder, err error) {
	client, err := holdapi.Dial(ctx, runDir)
	if err != nil {
		return nil, fmt.Errorf("attach to holder: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, client.Close())
		}
	}()
	peer, err := client.PeerPid()
	if err != nil {
		return nil, fmt.Errorf("attach to holder: %w", err)
	}
	if pid != 0 && peer != pid {
		return nil, fmt.Errorf("attach to holder: process %d, want %d: %w", peer, pid, errStranger)
	}
	hello, err := client.Hello(ctx)
	if err != nil {
		return nil, fmt.Errorf("attach to holder: %w", err)
	}
	if hello.JobID != jobID {
		return nil, fmt.Errorf("attach to holder: it holds job %q, want %q", hello.JobID, jobID)
	}
	if hello.Pid != peer {
		return nil, fmt.Errorf("attach to holder: it calls itself process %d and is %d: %w", hello.Pid, peer, errStranger)
	}
	fd, err := unix.PidfdOpen(hello.Pid, 0)
	if err != nil {
		return nil, fmt.Errorf("attach to holder: process %d: %w", hello.Pid, err)
	}
	h := &Holder{Client: client, Hello: hello, runDir: runDir, lost: make(chan struct{}), pidfd: fd}
	go h.watch()
	return h, nil
}

// watch waits for the process to end. A pidfd becomes readable then, for
// children and strangers alike (pidfd_open(2)).
func (h *Holder) watch() {
	defer close(h.lost)
	for {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(h.pidfd), Events: unix.POLLIN}}, -1) //nolint:gosec // a descriptor fits
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	_ = unix.Close(h.pidfd)
}

// Renew replaces the connection: a call that was given up leaves the old one
// useless.
func (h *Holder) Renew(ctx context.Context) error {
	client, err := holdapi.Dial(ctx, h.runDir)
	if err != nil {
		return fmt.Errorf("renew connection to holder: %w", err)
	}
	peer, err := client.PeerPid()
	if err == nil && peer != h.Hello.Pid {
		err = fmt.Errorf("process %d, want %d: %w", peer, h.Hello.Pid, errStranger)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("renew connection to holder: %w", err), client.Close())
	}
	_ = h.Client.Close()
	h.Client = client
	return nil
}

// Lost is closed when the holder's process is gone.
func (h *Holder) Lost() <-chan struct{} { return h.lost }

// End tells the holder to exit, kills it if it does not, and removes what a dead
// holder leaves behind. It is safe to call for a holder that is gone.
func (h *Holder) End(ctx context.Context, log *slog.Logger) error {
	select {
	case <-h.lost:
	default:
		exit, cancel := context.WithTimeout(ctx, exitTimeout)
		defer cancel()
		if err := h.Exit(exit); err != nil {
			log.WarnContext(ctx, "holder did not take its leave", slog.Any("error", err))
		}
		select {
		case <-h.lost:
		case <-time.After(exitTimeout):
			if err := unix.Kill(h.Hello.Pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("kill holder: %w", err)
			}
			<-h.lost
		}
	}
	return errors.Join(h.Close(), holdapi.Cleanup(h.runDir))
}

// Detach drops the connection and leaves the holder running.
func (h *Holder) Detach() error { return h.Close() }
