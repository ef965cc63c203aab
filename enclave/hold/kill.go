package hold

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxProcs bounds what is read of a list of processes, in bytes.
	maxProcs = 1 << 20
	// killLimit is how long the processes of a killed job may take to be gone.
	killLimit = 10 * time.Second
	killPause = 5 * time.Millisecond
)

// killGroup kills every process that is in the job's control group but this one,
// and returns when none is left. procs is the group's cgroup.procs, opened by the
// agent when it made the group: a descriptor names the same group for as long as
// it is open, whatever happens to the agent. The list works under both versions
// of control groups; cgroup.kill is version 2's alone, and would kill the holder.
func killGroup(ctx context.Context, procs *os.File) error {
	ctx, cancel := context.WithTimeout(ctx, killLimit)
	defer cancel()
	for {
		left, err := othersIn(procs)
		if err != nil || len(left) == 0 {
			return err
		}
		for _, pid := range left {
			if err := killMember(procs, pid); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("kill the job's processes: %d are still there after %s", len(left), killLimit)
		case <-time.After(killPause):
		}
	}
}

// killMember kills pid if it is in the group. The number may be another process's
// once a process has ended, so it is looked up again when a descriptor holds it.
func killMember(procs *os.File, pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("kill process %d of the job: %w", pid, err)
	}
	defer unix.Close(fd)
	left, err := othersIn(procs)
	if err != nil {
		return err
	}
	if !slices.Contains(left, pid) {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d of the job: %w", pid, err)
	}
	return nil
}

// othersIn lists the processes of a group without this one. A group that was
// removed has none (ENODEV).
func othersIn(procs *os.File) ([]int, error) {
	b := make([]byte, 0, 4<<10)
	for {
		if len(b) == cap(b) {
			if len(b) >= maxProcs {
				return nil, fmt.Errorf("list the job's processes: more than %d bytes", maxProcs)
			}
			b = slices.Grow(b, len(b))
		}
		n, err := procs.ReadAt(b[len(b):cap(b)], int64(len(b)))
		b = b[:len(b)+n]
		if errors.Is(err, io.EOF) {
			break
		}
		if errors.Is(err, unix.ENODEV) {
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("list the job's processes: %w", err)
		}
	}
	var out []int
	for line := range bytes.Lines(b) {
		pid, err := strconv.Atoi(string(bytes.TrimSpace(line)))
		if err != nil || pid <= 0 {
			// 0 is a process of a PID namespace outside this one: nobody here can end it.
			return nil, fmt.Errorf("list the job's processes: line %.20q", line)
		}
		if pid != os.Getpid() {
			out = append(out, pid)
		}
	}
	return out, nil
}
