package sandbox

import (
	"errors"
	"strings"

	"golang.org/x/sys/unix"
)

// noSpaceError is an error of containerd's, its shim's or the runtime's about a disk that
// has no room left.
type noSpaceError struct {
	error
	errno unix.Errno
}

func (e *noSpaceError) Unwrap() []error { return []error{e.error, e.errno} }

// typed gives an error of another program that speaks of a full disk the kernel's type for
// it. Over gRPC there is its text alone. Where an image's file names play that text, the
// job's reason is another one and it may be tried once more, which its plan allows anyway.
func typed(err error) error {
	for _, errno := range []unix.Errno{unix.ENOSPC, unix.EDQUOT} {
		if err != nil && !errors.Is(err, errno) && strings.Contains(err.Error(), ": "+errno.Error()) {
			return &noSpaceError{err, errno}
		}
	}
	return err
}
