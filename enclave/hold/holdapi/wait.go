package holdapi

import (
	"encoding/json"
	"errors"
	"fmt"
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
	b := make([]byte, MaxMessage)
	n, files, err := Receive(c, b, 2)
	if err != nil {
		return Job{}, fmt.Errorf("wait for a job: %w", err)
	}
	defer func() {
		if err != nil {
			closeAll(files)
		}
	}()
	var w waitingJob
	if len(files) != 2 {
		return Job{}, fmt.Errorf("wait for a job: %d descriptors, want 2", len(files))
	}
	if err := plan.Decode(b[:n], MaxMessage, &w); err != nil {
		return Job{}, fmt.Errorf("wait for a job: %w", err)
	}
	return Job{w.Args, files[0], files[1]}, nil
}
