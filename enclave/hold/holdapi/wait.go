package holdapi

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
)

// A holder can be started before there is a job for it, to make memory ready. It
// then has one end of a SOCK_SEQPACKET socket pair, which has no name, and belongs
// to whoever has the other. On it the holder is told to begin, once it is in the
// control group that is to be charged for the memory; it says when the memory is
// there; and it is told of its job, once, in one packet with two descriptors. When
// the other end is closed before, the holder ends.

// MaxWarmRegions bounds the regions that a holder makes ready before it has a job.
const MaxWarmRegions = 64

// WaitArg is the first argument of a holder that waits for a job. WaitFD is its
// end of the socket pair.
const (
	WaitArg = "wait"
	WaitFD  = 3
)

// waitingJob is the packet by which a holder is told of its job.
type waitingJob struct {
	// Args are the arguments that another holder is started with, without --procs.
	Args []string `json:"args"`
}

// Job is what a holder that waited is told. The descriptors are its own.
type Job struct {
	Args []string
	// Log takes what the holder says; Procs is as for another holder.
	Log, Procs *os.File
}

// Word is a packet that says one thing.
type Word string

// Begin is said to the holder, Ready by it.
const (
	Begin Word = "begin"
	Ready Word = "ready"
)

// Say says a word.
func (w Word) Say(c *net.UnixConn) error {
	if _, err := c.Write([]byte(w)); err != nil {
		return fmt.Errorf("say %s: %w", w, err)
	}
	return nil
}

// Await returns nil once the other end has said this, and an error if it says
// anything else. io.EOF means that it is closed.
func (w Word) Await(c *net.UnixConn) error {
	b := make([]byte, len(w)+1)
	n, err := c.Read(b)
	if err == nil && Word(b[:n]) != w {
		err = errors.New("it said something else")
	}
	if err != nil {
		return fmt.Errorf("wait for the word %s: %w", w, err)
	}
	return nil
}

// GiveJob tells a holder that waits of its job.
func GiveJob(c *net.UnixConn, j Job) error {
	b, err := json.Marshal(waitingJob{j.Args})
	if err != nil {
		return fmt.Errorf("give holder its job: %w", err)
	}
	if len(b) > MaxMessage {
		return fmt.Errorf("give holder its job: %d bytes: at most %d", len(b), MaxMessage)
	}
	if _, _, err := c.WriteMsgUnix(b, unix.UnixRights(int(j.Log.Fd()), int(j.Procs.Fd())), nil); err != nil {
		return fmt.Errorf("give holder its job: %w", err)
	}
	return nil
}

// AwaitJob waits to be told of a job. io.EOF means that there will be none.
func AwaitJob(c *net.UnixConn) (_ Job, err error) {
	b := make([]byte, MaxMessage+1)
	oob := make([]byte, unix.CmsgSpace(3*4))
	n, oobn, flags, _, err := c.ReadMsgUnix(b, oob)
	if err != nil {
		return Job{}, fmt.Errorf("wait for a job: %w", err)
	}
	files, err := Descriptors(oob[:oobn])
	defer func() {
		if err != nil {
			for _, f := range files {
				_ = f.Close()
			}
		}
	}()
	if err != nil {
		return Job{}, fmt.Errorf("wait for a job: %w", err)
	}
	if n == 0 && len(files) == 0 {
		return Job{}, fmt.Errorf("wait for a job: %w", io.EOF)
	}
	var w waitingJob
	if n > MaxMessage || flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 || len(files) != 2 {
		return Job{}, fmt.Errorf("wait for a job: %d bytes with %d descriptors: want at most %d, and 2", n, len(files), MaxMessage)
	}
	if err := plan.Decode(b[:n], MaxMessage, &w); err != nil {
		return Job{}, fmt.Errorf("wait for a job: %w", err)
	}
	return Job{w.Args, files[0], files[1]}, nil
}

// Descriptors returns those that came with a packet. They are the caller's, also
// after an error.
func Descriptors(oob []byte) ([]*os.File, error) {
	ms, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var out []*os.File
	for _, m := range ms {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return out, err
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			out = append(out, os.NewFile(uintptr(fd), "received"))
		}
	}
	return out, nil
}
