// Package executable writes files that are executed right after.
//
// Linux refuses to execute a file that anyone has open for writing (ETXTBSY).
// A child that another goroutine forks in that moment has the descriptor too,
// until it executes its own program (golang.org/issue/22315).
package executable

import (
	"os"
	"syscall"
)

// Write writes a program to path, with mode 0700, while this process starts no
// other: the file can be executed when Write returns.
func Write(path string, content []byte) error {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	return os.WriteFile(path, content, 0o700) // #nosec G306 -- a program
}
