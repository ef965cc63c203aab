package hold

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// mclOnFault locks pages as they appear, not all that could (mlockall(2)).
const mclOnFault = 4

// Harden keeps this process's memory out of core dumps, swap and the reach of
// others of its user, and its files to itself. It is called before there is a key.
func Harden() error {
	unix.Umask(0o077)
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid core dumps and tracing: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | mclOnFault); err != nil {
		return fmt.Errorf("lock memory (CAP_IPC_LOCK or RLIMIT_MEMLOCK is missing): %w", err)
	}
	return nil
}
