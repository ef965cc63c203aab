// Command coffer-holder holds one job's keys and plaintext: the agent starts one
// for each job and speaks to it over a unix socket. With "wait" it is started
// before there is a job, makes memory ready, and is told of its job later.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/enclave/dma"
	"github.com/coffer-run/coffer/enclave/hold"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr); err != nil {
		stop()
		os.Exit(1)
	}
}

// run reports its error to stderr itself, as every line that the holder says.
func run(ctx context.Context, args []string, _ io.Reader, _, stderr io.Writer) (err error) {
	log := slog.New(slog.NewJSONHandler(stderr, nil))
	defer func() {
		if err != nil {
			log.ErrorContext(ctx, "holder ended", "error", err)
		}
	}()
	if err := hold.Harden(); err != nil {
		return err
	}
	var reserve *dma.Reserve
	if len(args) > 0 && args[0] == holdapi.WaitArg {
		args, reserve, err = wait(ctx, args[1:], log)
		if errors.Is(err, io.EOF) {
			log.InfoContext(ctx, "there is no job for this holder")
			return nil
		}
		if err != nil {
			return err
		}
	}
	cfg, cores, err := parse(args)
	if err != nil {
		return errors.Join(err, reserve.Close())
	}
	runtime.GOMAXPROCS(cores)
	cfg.Reserve = reserve
	cfg.Log = log.With("job", cfg.JobID)
	// The FUSE library writes to the log package.
	slog.SetDefault(cfg.Log)
	h, err := hold.Create(ctx, cfg)
	if err != nil {
		return err
	}
	return h.Serve(ctx)
}

// parse returns what the holder is told, and how many cores it may use at once.
func parse(args []string) (cfg hold.Config, cores int, err error) {
	fs := flag.NewFlagSet("coffer-holder", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&cfg.RunDir, "run", "", "run folder of the job, mode 0700")
	fs.StringVar(&cfg.JobID, "job", "", "job id")
	uid := fs.Uint("uid", 0, "user of the job")
	gid := fs.Uint("gid", 0, "group of the job")
	fs.Int64Var(&cfg.LogBytes, "log-bytes", 0, "bytes of log to keep")
	fs.Int64Var(&cfg.LogRate, "log-rate", 0, "bytes of log to keep of each second, 0: the default")
	fs.Func("metrics", "numbers that the job may report: VALUES,PER SECOND,NAME...", func(s string) (err error) {
		cfg.Metrics, err = hold.ParseMetrics(s)
		return err
	})
	procs := fs.Int("procs", 0, "descriptor of cgroup.procs of the job's control group, which this process is in")
	fs.Int64Var(&cfg.RegionBytes, "region-bytes", 0, "bytes of memory to decrypt inputs into, 0: as many as they have")
	fs.IntVar(&cores, "cores", 0, "how many cores to use at once")
	fs.IntVar(&cfg.NearNode, "near-node", 0, "1 more than the number of the memory node for inputs, 0: any")
	fs.Func("watch-open", "pattern of the paths whose opening is told; may be repeated", func(glob string) error {
		cfg.WatchOpen = append(cfg.WatchOpen, glob)
		return nil
	})
	if err := fs.Parse(args); err != nil {
		return hold.Config{}, 0, fmt.Errorf("parse flags: %w", err)
	}
	const maxID = 1<<32 - 2
	switch {
	case fs.NArg() > 0:
		return hold.Config{}, 0, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	case cfg.RunDir == "" || cfg.JobID == "" || cfg.LogBytes <= 0:
		return hold.Config{}, 0, errors.New("--run, --job and --log-bytes are required")
	case cores <= 0:
		return hold.Config{}, 0, errors.New("--cores must be one or more")
	case *procs <= int(os.Stderr.Fd()):
		return hold.Config{}, 0, errors.New("--procs must name a descriptor that was handed over")
	case cfg.RegionBytes < 0 || cfg.LogRate < 0 || cfg.NearNode < 0:
		return hold.Config{}, 0, errors.New("--region-bytes, --log-rate or --near-node is negative")
	case *uid == 0 || *gid == 0 || *uid > maxID || *gid > maxID:
		return hold.Config{}, 0, errors.New("--uid and --gid must name a user that is not root")
	}
	cfg.UID, cfg.GID = uint32(*uid), uint32(*gid)
	unix.CloseOnExec(*procs)
	cfg.Procs = os.NewFile(uintptr(*procs), "cgroup.procs")
	return cfg, cores, nil
}
