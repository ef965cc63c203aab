// Package daemon is what every server process of coffer shares: mutual TLS,
// who a caller is, strict configuration, a bounded HTTPS server and a main.
//
// Trusted: the certificate authority named in the configuration. Checked: TLS
// 1.3, the peer's chain, its single SPIFFE name, and, by clients, the role of
// the server they reach. Not checked: what a role may do, and, with
// ServerForPeople, who a caller without a certificate is; each service decides.
package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/printable"
)

const (
	// MaxConfig bounds a configuration file, in bytes.
	MaxConfig = 1 << 20
	// maxHeader bounds the headers of one request, in bytes.
	maxHeader = 16 << 10
	// headerTimeout bounds the TLS handshake and the reading of headers.
	headerTimeout = 10 * time.Second
	// idleTimeout closes connections that nobody uses.
	idleTimeout = 2 * time.Minute
	// stallTimeout closes a connection whose peer takes no bytes. There is no
	// timeout on a whole response: logs and watches stream for as long as a job runs.
	stallTimeout = 30 * time.Second
	// streamsPerConn bounds concurrent requests on one connection.
	streamsPerConn = 64
	// StopGrace is how long requests may take to end before they are cancelled.
	StopGrace = 2 * time.Second
	// stopLimit is when the server closes connections that did not end.
	stopLimit = 5 * time.Second
)

// Health is the path that answers 200 once a daemon serves.
const Health = "/healthz"

// ReadConfig reads strict JSON from path into v: unknown fields are errors.
func ReadConfig(path string, v any) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, MaxConfig+1))
	if err != nil {
		return fmt.Errorf("read configuration %s: %w", path, err)
	}
	if err := plan.Decode(b, MaxConfig, v); err != nil {
		return fmt.Errorf("configuration %s: %w", path, err)
	}
	return nil
}

// ConfigFlag returns the value of --config, the only flag that a daemon takes.
func ConfigFlag(name string, args []string, stderr io.Writer) (string, error) {
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(stderr)
	path := fs.String("config", "", "configuration `file` (JSON)")
	if err := fs.Parse(args); err != nil {
		return "", err
	}
	if *path == "" || fs.NArg() > 0 {
		return "", fmt.Errorf("usage: %s --config FILE", name)
	}
	return *path, nil
}

// Logger returns the JSON logger that daemons use.
func Logger(w io.Writer, name string) *slog.Logger {
	return slog.New(slog.NewJSONHandler(w, nil)).With("daemon", name)
}

// Serve answers HTTPS on addr until ctx ends, then lets requests finish for
// StopGrace, cancels what is left and returns nil. It answers GET /healthz
// itself: call it once the handler is ready. A handler that panics is reported
// to log.
func Serve(ctx context.Context, addr string, tlsConfig *tls.Config, handler http.Handler, log *slog.Logger) error {
	if log == nil {
		return errors.New("serve: no logger")
	}
	if tlsConfig == nil || tlsConfig.ClientCAs == nil || tlsConfig.ClientAuth != tls.RequireAndVerifyClientCert && tlsConfig.ClientAuth != tls.VerifyClientCertIfGiven {
		return errors.New("serve: refusing to serve without verifying client certificates")
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", addr)
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("address %s is in use: is another stack up? stop it, or choose another port: %w", addr, err)
	}
	if err != nil {
		return fmt.Errorf("listen on %s: %w", addr, err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+Health, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		_, _ = io.WriteString(w, "ok\n")
	})
	mux.Handle("/", handler)

	// Requests outlive ctx by StopGrace: an answer that is already paid for
	// still goes out when the daemon is told to stop.
	requests, cancelRequests := context.WithCancel(context.WithoutCancel(ctx))
	defer cancelRequests()
	srv := &http.Server{
		Handler:           mux,
		TLSConfig:         tlsConfig,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		BaseContext:       func(net.Listener) context.Context { return requests },
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: streamsPerConn, SendPingTimeout: stallTimeout, WriteByteTimeout: stallTimeout},
		ErrorLog:          slog.NewLogLogger(serverLog{log.Handler()}, slog.LevelError),
	}
	failed := make(chan error, 1)
	go func() { failed <- srv.ServeTLS(l, "", "") }()
	select {
	case err := <-failed:
		return fmt.Errorf("serve %s: %w", addr, err)
	case <-ctx.Done():
	}
	grace := time.AfterFunc(StopGrace, cancelRequests)
	defer grace.Stop()
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopLimit)
	defer cancel()
	if err := srv.Shutdown(stop); err != nil {
		_ = srv.Close()
	}
	if err := <-failed; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve %s: %w", addr, err)
	}
	return nil
}

// serverLog takes what net/http has to say, a panic's stack among it. Handshakes
// that fail are the peer's affair, and could flood the log.
type serverLog struct{ slog.Handler }

func (l serverLog) Handle(ctx context.Context, r slog.Record) error {
	if strings.HasPrefix(r.Message, "http: TLS handshake error") {
		return nil
	}
	return l.Handler.Handle(ctx, r)
}

// Main runs a command with the process's arguments and streams, cancels its
// context on SIGINT or SIGTERM (a second one kills), prints its error and exits.
// An error with an ExitCode() int method chooses the exit code, which is 1
// otherwise; flag.ErrHelp exits 0.
func Main(run func(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error) {
	os.Exit(exitCode(run, os.Args, os.Stdin, os.Stdout, os.Stderr))
}

func exitCode(run func(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error, argv []string, stdin io.Reader, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)
	err := run(ctx, argv[1:], stdin, stdout, stderr)
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if text := err.Error(); text != "" {
		_, _ = fmt.Fprintf(stderr, "%s: %s\n", filepath.Base(argv[0]), printable.Text(text))
	}
	var coded interface{ ExitCode() int }
	if errors.As(err, &coded) {
		return coded.ExitCode()
	}
	return 1
}
