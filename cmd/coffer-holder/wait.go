package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/enclave/dma"
	"github.com/coffer-run/coffer/enclave/hold"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
)

// wait makes memory ready until this process is told of its job. It returns the
// job's arguments.
func wait(ctx context.Context, args []string, log *slog.Logger) ([]string, *dma.Reserve, error) {
	var sizes []int64
	fs := flag.NewFlagSet("coffer-holder wait", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	near := fs.Int("near-node", 0, "1 more than the number of the memory node for the memory, 0: any")
	fs.Func("regions", "sizes of the regions to make ready, in bytes: N,...", func(s string) error {
		for n := range strings.SplitSeq(s, ",") {
			size, err := strconv.ParseInt(n, 10, 64)
			if err != nil {
				return err
			}
			sizes = append(sizes, size)
		}
		return nil
	})
	if err := fs.Parse(args); err != nil {
		return nil, nil, fmt.Errorf("parse flags: %w", err)
	}
	if fs.NArg() > 0 || len(sizes) == 0 || len(sizes) > holdapi.MaxWarmRegions || *near < 0 {
		return nil, nil, fmt.Errorf("want --regions with 1 to %d sizes, and --near-node, which is not negative", holdapi.MaxWarmRegions)
	}
	f := os.NewFile(holdapi.WaitFD, "job")
	conn, err := net.FileConn(f)
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, nil, fmt.Errorf("descriptor %d: %w", holdapi.WaitFD, err)
	}
	defer conn.Close()
	c, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, nil, fmt.Errorf("descriptor %d is no unix socket", holdapi.WaitFD)
	}
	job, reserve, err := hold.Await(ctx, c, sizes, *near, log)
	if err != nil {
		return nil, nil, err
	}
	out, err := become(job)
	if err != nil {
		return nil, nil, errors.Join(err, reserve.Close())
	}
	return out, reserve, nil
}

// become has what this process says go where its job's does, and returns its
// arguments.
func become(job holdapi.Job) ([]string, error) {
	defer job.Log.Close()
	for _, std := range []*os.File{os.Stdout, os.Stderr} {
		if err := unix.Dup3(int(job.Log.Fd()), int(std.Fd()), 0); err != nil {
			return nil, errors.Join(fmt.Errorf("take the job's log: %w", err), job.Procs.Close())
		}
	}
	// The number is handed on, and with it the descriptor.
	procs, err := unix.FcntlInt(job.Procs.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err := errors.Join(err, job.Procs.Close()); err != nil {
		return nil, fmt.Errorf("take the list of the job's processes: %w", err)
	}
	return append(job.Args, "--procs", strconv.Itoa(procs)), nil
}
