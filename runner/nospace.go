package runner

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/runner/journal"
)

// NoSpace reports whether something failed for want of room: on a disk or for a quota of
// the agent's, in the journal, at a job's holder or at containerd.
func NoSpace(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || journal.Full(err)
}

// room returns an error if a folder takes no file for want of room: a program that ended
// for it cannot have written why.
func room(dir string) error {
	f, err := os.CreateTemp(dir, "room-")
	if err == nil {
		_, err = f.Write(make([]byte, os.Getpagesize()))
		err = errors.Join(err, f.Close(), os.Remove(f.Name()))
	}
	if !NoSpace(err) {
		return nil
	}
	return err
}
