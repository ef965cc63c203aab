package holder

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
)

// WarmConfig says what to start before there is a job.
type WarmConfig struct {
	// Path is the holder's binary, Log the file that takes what it says until it has
	// a job.
	Path, Log string
	// Regions are the sizes of the regions that it makes ready, in bytes.
	Regions []int64
	// NearNode is 1 more than the number of the memory node for them; 0: any.
	NearNode int
	// Join puts the process into a cgroup of its own, before it has the memory.
	Join func(pid int) error
}

// Warm is a holder process that belongs to no job yet and makes memory ready. It
// has a nameless socket to this process and ends with that.
type Warm struct {
	*process
	conn  *net.UnixConn
	ready chan struct{}
}

// StartWarm starts one. It holds nothing of anybody's.
func StartWarm(c WarmConfig) (_ *Warm, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("start a holder that waits: %w", err)
		}
	}()
	log, err := os.OpenFile(c.Log, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	ours, theirs, err := socketpair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	sizes := make([]string, 0, len(c.Regions))
	for _, n := range c.Regions {
		sizes = append(sizes, strconv.FormatInt(n, 10))
	}
	p, err := launch(c.Path, []string{holdapi.WaitArg, "--regions", strings.Join(sizes, ","), "--near-node", strconv.Itoa(c.NearNode)}, "/", log, theirs)
	if err != nil {
		return nil, errors.Join(err, ours.Close())
	}
	if err = c.Join(p.cmd.Process.Pid); err == nil {
		err = holdapi.Begin.Say(ours)
	}
	if err != nil {
		p.kill()
		return nil, errors.Join(err, ours.Close())
	}
	w := &Warm{process: p, conn: ours, ready: make(chan struct{})}
	go func() {
		if holdapi.Ready.Await(ours) == nil {
			close(w.ready)
		}
	}()
	return w, nil
}

// socketpair returns two ends of a connection without a name.
func socketpair() (ours *net.UnixConn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	theirs = os.NewFile(uintptr(fds[1]), "holder")
	f := os.NewFile(uintptr(fds[0]), "agent")
	conn, err := net.FileConn(f)
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return conn.(*net.UnixConn), theirs, nil
}

// Ready is closed once all memory is there.
func (w *Warm) Ready() <-chan struct{} { return w.ready }

// Lost is closed when the process is gone.
func (w *Warm) Lost() <-chan struct{} { return w.exited }

// End ends a holder that has no job. When it has returned, the memory is free.
func (w *Warm) End() {
	_ = w.conn.Close()
	w.kill()
}
