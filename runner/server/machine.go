package server

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// machine returns the cores, in thousandths, and the memory, in bytes.
func machine() (cpuMillis int32, memory int64, err error) {
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return 0, 0, fmt.Errorf("read machine size: %w", err)
	}
	return int32(runtime.NumCPU()) * 1000, int64(si.Totalram) * int64(si.Unit), nil //nolint:gosec // a machine's size fits
}
