// Command coffer-gateway is one job's way to the network: it lets TLS connections
// through to the names that the job's plan lists. The agent starts one for each job
// with egress, as a user without rights, and hands it its sockets.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/egress/gate"
)

// Descriptors that the agent hands over (runner/egress).
const (
	proxyFD = 3 + iota
	dnsFD
	controlFD
)

// maxConfig bounds the configuration on standard input, in bytes.
const maxConfig = 256 << 10

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := run(ctx, os.Args[1:], os.Stdin, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "coffer-gateway:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdin io.Reader, stderr io.Writer) error {
	fs := flag.NewFlagSet("coffer-gateway", flag.ContinueOnError)
	fs.SetOutput(stderr)
	uid := fs.Int("uid", 0, "user and group `id` to run as")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *uid <= 0 || fs.NArg() > 0 {
		return errors.New("usage: coffer-gateway --uid ID < CONFIG, with its sockets as descriptors 3, 4 and 5; the agent starts it")
	}
	if err := drop(*uid); err != nil {
		return err
	}
	b, err := io.ReadAll(io.LimitReader(stdin, maxConfig+1))
	if err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	var cfg gate.Config
	if err := plan.Decode(b, maxConfig, &cfg); err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	proxy, err := listener(proxyFD, "proxy")
	if err != nil {
		return err
	}
	control, err := listener(controlFD, "control")
	if err != nil {
		return err
	}
	f := os.NewFile(dnsFD, "dns")
	packets, err := net.FilePacketConn(f)
	if err != nil {
		return fmt.Errorf("descriptor %d: %w", dnsFD, err)
	}
	if err := f.Close(); err != nil {
		return err
	}
	g, err := gate.New(cfg, slog.New(slog.NewJSONHandler(stderr, nil)))
	if err != nil {
		return err
	}
	names := &dns.Server{PacketConn: packets, Handler: g}
	answers := &http.Server{Handler: g.Control(), ReadHeaderTimeout: 5 * time.Second}
	failed := make(chan error, 3)
	go func() { failed <- g.Serve(proxy) }() //nolint:contextcheck // connections end with Close
	go func() { failed <- names.ActivateAndServe() }()
	go func() { failed <- answers.Serve(control) }()
	select {
	case err = <-failed:
	case <-ctx.Done():
		err = nil
	}
	g.Close("gateway-ended")
	return err
}

// drop gives up root's rights, and every way back to them.
func drop(uid int) error {
	// A process attribute of each thread.
	if _, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0); errno != 0 {
		return fmt.Errorf("set no_new_privs: %w", errno)
	}
	if err := errors.Join(syscall.Setgroups(nil), syscall.Setgid(uid), syscall.Setuid(uid)); err != nil {
		return fmt.Errorf("become user %d: %w", uid, err)
	}
	return nil
}

func listener(fd uintptr, name string) (net.Listener, error) {
	f := os.NewFile(fd, name)
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("descriptor %d: %w", fd, err)
	}
	return l, f.Close()
}
