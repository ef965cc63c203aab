// Package host starts plugins and speaks to them.
//
// Trusted: the SHA-256 checksum that the caller gives for a plugin's binary.
// Checked: that exactly those bytes are what runs, that the plugin speaks the
// contract over mutual TLS, that every call ends in time, and, through
// plugins/contract, the form of every answer. Not checked: what a plugin does
// with the rights of its process, which are the host's.
package host

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/coffer-run/coffer/plugins/contract"
)

const (
	// DefaultStart bounds a plugin's start.
	DefaultStart = 10 * time.Second
	// DefaultCall bounds one call.
	DefaultCall = 30 * time.Second
	// maxBinary bounds a plugin's binary, in bytes.
	maxBinary = 256 << 20
	highFD    = 64
)

var (
	// ErrChecksum means that no checksum was given, or that the binary has another.
	ErrChecksum = errors.New("plugin checksum")
	// ErrDied means that the plugin's process is gone. A GPU plugin is not started
	// again by itself: the caller decides what its death means.
	ErrDied = errors.New("plugin died")
	// ErrTimeout means that the plugin did not answer in time.
	ErrTimeout = errors.New("plugin did not answer in time")
)

// Config says which plugin to start.
type Config struct {
	Path string `json:"path"`
	// SHA256 is the checksum of the binary at Path, in lower-case hex.
	SHA256 string   `json:"sha256"`
	Args   []string `json:"args,omitempty"`
}

// Options say how. The zero value of each is its default.
type Options struct {
	// SocketDir is where the plugin's socket gets a folder of its own, which is
	// removed again. Empty means the system's folder for temporary files.
	SocketDir string
	// Env is the plugin's whole environment, but for the handshake.
	Env []string
	// Start and Call bound the start and each call.
	Start, Call time.Duration
	// BackOff is how long a key store plugin stays down after its first death.
	BackOff time.Duration
	Log     *slog.Logger
}

// process is a running plugin.
type process struct {
	client *plugin.Client
	end    context.CancelFunc
	// ended is closed before the process is told to end.
	ended    <-chan struct{}
	lifeline *os.File
	dir      string
	call     time.Duration
}

// GPU is a running GPU plugin. It is safe for concurrent use.
type GPU struct {
	*process
	gpu contract.GPU
}

var _ contract.GPU = (*GPU)(nil)

// StartGPU starts a GPU plugin whose binary has the configured checksum.
func StartGPU(ctx context.Context, cfg Config, o Options) (*GPU, error) {
	p, gpu, err := start[contract.GPU](ctx, cfg, o, contract.GPUName, &contract.GPUPlugin{})
	if err != nil {
		return nil, err
	}
	return &GPU{process: p, gpu: gpu}, nil
}

// start starts a plugin whose binary has the configured checksum and returns
// what it serves under kind.
func start[T any](ctx context.Context, cfg Config, o Options, kind string, wire plugin.Plugin) (_ *process, served T, err error) {
	fail := func(err error) (*process, T, error) {
		var none T
		return nil, none, fmt.Errorf("start plugin %s: %w", filepath.Base(cfg.Path), err)
	}
	if o.Start == 0 {
		o.Start = DefaultStart
	}
	if o.Call == 0 {
		o.Call = DefaultCall
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	binary, sum, err := pin(cfg)
	if err != nil {
		return fail(err)
	}
	defer binary.Close() //nolint:errcheck // a memory file
	dead, alive, err := os.Pipe()
	if err != nil {
		return fail(err)
	}
	defer dead.Close() //nolint:errcheck // the plugin has its own
	defer func() {
		if err != nil {
			_ = alive.Close()
		}
	}()

	// A plugin that is killed leaves its socket behind.
	dir, err := os.MkdirTemp(o.SocketDir, kind+"-plugin-")
	if err != nil {
		return fail(err)
	}
	defer func() {
		if err != nil {
			_ = os.RemoveAll(dir)
		}
	}()

	// The process lives until Close; while it starts, ctx ends it too.
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, end)
	defer stop()
	cmd := exec.CommandContext(life, fmt.Sprintf("/proc/self/fd/%d", binary.Fd()), cfg.Args...) // #nosec G204 -- pinned by checksum
	cmd.Args[0] = cfg.Path
	cmd.ExtraFiles = []*os.File{dead}
	cmd.Env = append(append([]string{}, o.Env...), contract.LifelineEnv+"="+strconv.Itoa(3), plugin.EnvUnixSocketDir+"="+dir)
	log := &stderrLog{log: o.Log.With("plugin", filepath.Base(cfg.Path))}
	client := plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig:  contract.Handshake(),
		Plugins:          plugin.PluginSet{kind: wire},
		Cmd:              cmd,
		SecureConfig:     &plugin.SecureConfig{Checksum: sum, Hash: sha256.New()},
		AutoMTLS:         true,
		AllowedProtocols: []plugin.Protocol{plugin.ProtocolGRPC},
		StartTimeout:     o.Start,
		SkipHostEnv:      true,
		Stderr:           log,
		Logger:           hclog.NewNullLogger(),
	})
	defer func() {
		if err != nil {
			end()
			client.Kill()
		}
	}()
	rpc, err := client.Client()
	if err != nil {
		// Kill waits until everything that the plugin said was read.
		client.Kill()
		return fail(fmt.Errorf("%w%s", errors.Join(err, ctx.Err()), log.said()))
	}
	raw, err := rpc.Dispense(kind)
	if err != nil {
		return fail(err)
	}
	served, ok := raw.(T)
	if !ok {
		return fail(fmt.Errorf("it serves a %T", raw))
	}
	return &process{client: client, end: end, ended: life.Done(), lifeline: alive, dir: dir, call: o.Call}, served, nil
}

// pin copies the binary into memory that nobody can write to any more and checks
// the copy, so that what was checked is what runs, whatever happens at Path.
func pin(cfg Config) (_ *os.File, sum []byte, err error) {
	if cfg.SHA256 == "" {
		return nil, nil, fmt.Errorf("%w: none is configured", ErrChecksum)
	}
	want, err := hex.DecodeString(cfg.SHA256)
	if err != nil || len(want) != sha256.Size {
		return nil, nil, fmt.Errorf("%w: %.80q: want %d hex digits", ErrChecksum, cfg.SHA256, 2*sha256.Size)
	}
	src, err := os.Open(cfg.Path)
	if err != nil {
		return nil, nil, err
	}
	defer src.Close() //nolint:errcheck // read only
	fd, err := unix.MemfdCreate(filepath.Base(cfg.Path), unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) {
		// Kernels before 6.3 know no MFD_EXEC and make every memory file executable.
		fd, err = unix.MemfdCreate(filepath.Base(cfg.Path), unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("memory for the binary: %w", err)
	}
	// Away from the low numbers, which in the child are the plugin's own: the
	// child opens the binary by number after it has taken its descriptors over.
	high, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, highFD) // #nosec G115 -- a descriptor
	_ = unix.Close(fd)
	if err != nil {
		return nil, nil, fmt.Errorf("memory for the binary: %w", err)
	}
	f := os.NewFile(uintptr(high), cfg.Path) // #nosec G115 -- a descriptor
	defer func() {
		if err != nil {
			_ = f.Close()
		}
	}()
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(f, h), io.LimitReader(src, maxBinary+1))
	if err != nil {
		return nil, nil, fmt.Errorf("read binary: %w", err)
	}
	if n > maxBinary {
		return nil, nil, fmt.Errorf("read binary: more than %d bytes", maxBinary)
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL); err != nil {
		return nil, nil, fmt.Errorf("seal the binary: %w", err)
	}
	if got := h.Sum(nil); subtle.ConstantTimeCompare(got, want) != 1 {
		return nil, nil, fmt.Errorf("%w: %s has %x, configured is %s", ErrChecksum, cfg.Path, got, cfg.SHA256)
	}
	return f, want, nil
}

// Command returns a command that runs the binary of cfg once, if it has the
// configured checksum. The caller closes the binary when the command has started.
func Command(ctx context.Context, cfg Config) (*exec.Cmd, io.Closer, error) {
	binary, _, err := pin(cfg)
	if err != nil {
		return nil, nil, fmt.Errorf("start %s: %w", filepath.Base(cfg.Path), err)
	}
	cmd := exec.CommandContext(ctx, fmt.Sprintf("/proc/self/fd/%d", binary.Fd()), cfg.Args...) // #nosec G204 -- pinned by checksum
	cmd.Args[0], cmd.Env = cfg.Path, []string{}
	return cmd, binary, nil
}

// Checksum returns the checksum of the binary at path in the configuration's form.
func Checksum(path string) (string, error) {
	f, err := os.Open(path) // #nosec G304 -- the caller names the binary
	if err != nil {
		return "", err
	}
	defer f.Close() //nolint:errcheck // read only
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// Inventory asks the plugin for the machine's GPUs.
func (g *GPU) Inventory(ctx context.Context) (*contract.Inventory, error) {
	return bounded(ctx, g.process, func(ctx context.Context) (*contract.Inventory, error) { return g.gpu.Inventory(ctx) })
}

// Collect asks the plugin for evidence.
func (g *GPU) Collect(ctx context.Context, nonce [contract.NonceSize]byte, uuids []string) ([]contract.Evidence, error) {
	return bounded(ctx, g.process, func(ctx context.Context) ([]contract.Evidence, error) { return g.gpu.Collect(ctx, nonce, uuids) })
}

// SetReady tells the driver, through the plugin, whether GPUs may take work.
func (g *GPU) SetReady(ctx context.Context, ready bool) error {
	_, err := bounded(ctx, g.process, func(ctx context.Context) (struct{}, error) { return struct{}{}, g.gpu.SetReady(ctx, ready) })
	return err
}

// State asks the plugin how the driver and the named GPUs stand.
func (g *GPU) State(ctx context.Context, uuids []string) (*contract.State, error) {
	return bounded(ctx, g.process, func(ctx context.Context) (*contract.State, error) { return g.gpu.State(ctx, uuids) })
}

// Prepare makes settings for the named GPUs, through the plugin.
func (g *GPU) Prepare(ctx context.Context, uuids []string, s contract.Settings) error {
	_, err := bounded(ctx, g.process, func(ctx context.Context) (struct{}, error) { return struct{}{}, g.gpu.Prepare(ctx, uuids, s) })
	return err
}

// Clear resets the named GPUs, through the plugin.
func (g *GPU) Clear(ctx context.Context, uuids []string) error {
	_, err := bounded(ctx, g.process, func(ctx context.Context) (struct{}, error) { return struct{}{}, g.gpu.Clear(ctx, uuids) })
	return err
}

// bounded runs one call and names what went wrong with the plugin itself.
func bounded[T any](ctx context.Context, p *process, call func(context.Context) (T, error)) (T, error) {
	var none T
	limited, cancel := context.WithTimeout(ctx, p.call)
	defer cancel()
	v, err := call(limited)
	switch {
	case err == nil:
		return v, nil
	case ctx.Err() != nil:
		return none, fmt.Errorf("%w: %w", ctx.Err(), err)
	case limited.Err() != nil, status.Code(err) == codes.DeadlineExceeded:
		// The plugin has the same deadline and may notice it a moment before: the
		// caller's, if that is the earlier one.
		bound, _ := limited.Deadline()
		if callers, ok := ctx.Deadline(); ok && !callers.After(bound) {
			return none, fmt.Errorf("%w: %w", context.DeadlineExceeded, err)
		}
		return none, fmt.Errorf("%w (%s): %w", ErrTimeout, p.call, err)
	case status.Code(err) == codes.Unavailable || p.client.Exited() || closed(p.ended):
		// Who ended it because of another call may have closed the connection before it is gone.
		return none, fmt.Errorf("%w: %w", ErrDied, err)
	default:
		return none, err
	}
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// Close ends the plugin's process. A plugin has no state to save, so it is not
// asked; one that hangs is ended like any other.
func (p *process) Close() error {
	p.end()
	p.client.Kill()
	return errors.Join(p.lifeline.Close(), os.RemoveAll(p.dir))
}
