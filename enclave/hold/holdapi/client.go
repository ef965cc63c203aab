package holdapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
)

// Codes of an Error.
const (
	CodeRefused = "refused"
	CodeInvalid = "invalid"
	CodeState   = "state"
	CodeIO      = "io"
	CodeFull    = "full"
	// CodeNoSpace is a disk, or a quota on one, that has no room left.
	CodeNoSpace = "no-space"
)

// Error is the holder's answer to an operation that it did not do.
type Error struct {
	Op      string
	Code    string
	Message string
}

func (e *Error) Error() string { return fmt.Sprintf("holder %s: %s", e.Op, e.Message) }

// Is says of an error for want of room that it is one: unix.ENOSPC.
func (e *Error) Is(target error) bool { return e.Code == CodeNoSpace && target == unix.ENOSPC }

// ErrLost means that the connection to the holder is gone. Whether the holder
// is too, a new Dial tells.
var ErrLost = errors.New("connection to the holder is lost")

// dialRetry is how often DialWait looks for the socket.
const dialRetry = 10 * time.Millisecond

// Client is one connection to a holder. Its operations queue behind each other;
// Logs and Events wait for news, so they want a Client of their own.
type Client struct {
	mu     sync.Mutex
	conn   *net.UnixConn
	broken bool
	buf    []byte
}

// Dial connects to the holder of runDir.
func Dial(ctx context.Context, runDir string) (*Client, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unixpacket", filepath.Join(runDir, SocketName))
	if err != nil {
		return nil, fmt.Errorf("connect to holder: %w", err)
	}
	return &Client{conn: c.(*net.UnixConn), buf: make([]byte, MaxMessage+1)}, nil
}

// DialWait connects to a holder that is just starting: it tries until ctx ends.
func DialWait(ctx context.Context, runDir string) (*Client, error) {
	t := time.NewTicker(dialRetry)
	defer t.Stop()
	for {
		c, err := Dial(ctx, runDir)
		if err == nil {
			return c, nil
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(err, ctx.Err())
		case <-t.C:
		}
	}
}

// PeerPid returns the process that listens at the other end, by the kernel's word.
func (c *Client) PeerPid() (int, error) {
	raw, err := c.conn.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("ask who holds the socket: %w", err)
	}
	var cred *unix.Ucred
	var gerr error
	if err := raw.Control(func(fd uintptr) { cred, gerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, fmt.Errorf("ask who holds the socket: %w", err)
	}
	if gerr != nil {
		return 0, fmt.Errorf("ask who holds the socket: %w", gerr)
	}
	return int(cred.Pid), nil
}

// Close ends the connection. The holder goes on.
func (c *Client) Close() error { return c.conn.Close() }

// Hello asks who the holder is.
func (c *Client) Hello(ctx context.Context) (Hello, error) {
	r, err := c.do(ctx, Request{Op: OpHello}, nil)
	return part(r.Hello, err)
}

// SignRelease has the session key sign a canonical release request.
func (c *Client) SignRelease(ctx context.Context, request []byte) ([]byte, error) {
	r, err := c.do(ctx, Request{Op: OpSignRelease, SignRelease: &SignRelease{Request: request}}, nil)
	s, err := part(r.SignRelease, err)
	return s.Signature, err
}

// Sign has the session key sign a canonical bundle statement.
func (c *Client) Sign(ctx context.Context, statement []byte) ([]byte, error) {
	r, err := c.do(ctx, Request{Op: OpSign, Sign: &Sign{Statement: statement}}, nil)
	s, err := part(r.Sign, err)
	return s.Signature, err
}

// Deliver hands over a wrapped data key.
func (c *Client) Deliver(ctx context.Context, d Deliver) error {
	_, err := c.do(ctx, Request{Op: OpDeliver, Deliver: &d}, nil)
	return err
}

// Lease begins a renewal and returns its challenge.
func (c *Client) Lease(ctx context.Context) (Lease, error) {
	r, err := c.do(ctx, Request{Op: OpLease}, nil)
	return part(r.Lease, err)
}

// RenewLease hands over the broker's answer to the renewal under way.
func (c *Client) RenewLease(ctx context.Context, token string) (Lease, error) {
	r, err := c.do(ctx, Request{Op: OpRenew, Renew: &Renew{Lease: token}}, nil)
	return part(r.Lease, err)
}

// Input hands over the sealed folder at path.
func (c *Client) Input(ctx context.Context, in Input, path string) error {
	return c.withDir(path, unix.O_PATH, func(f *os.File) error {
		_, err := c.do(ctx, Request{Op: OpInput, Input: &in}, f)
		return err
	})
}

// Settle says that all inputs were handed over. When it has returned, the memory
// that was made ready and that they do not need is the kernel's again.
func (c *Client) Settle(ctx context.Context) error {
	_, err := c.do(ctx, Request{Op: OpSettle}, nil)
	return err
}

// Sink hands over the folder at path, into which checkpoints are sealed.
func (c *Client) Sink(ctx context.Context, s Sink, path string) error {
	return c.withDir(path, unix.O_RDONLY, func(f *os.File) error {
		_, err := c.do(ctx, Request{Op: OpSink, Sink: &s}, f)
		return err
	})
}

// ResumeBegin asks what the plan, in canonical form, says of resuming.
func (c *Client) ResumeBegin(ctx context.Context, plan []byte) (ResumeRule, error) {
	r, err := c.do(ctx, Request{Op: OpResumeBegin, ResumeBegin: &ResumeBegin{Plan: plan}}, nil)
	return part(r.ResumeRule, err)
}

// Resume hands over the sealed checkpoint at path that the job goes on from; path
// is empty where r says that there is nothing.
func (c *Client) Resume(ctx context.Context, r Resume, path string) error {
	if r.Nothing {
		_, err := c.do(ctx, Request{Op: OpResume, Resume: &r}, nil)
		return err
	}
	return c.withDir(path, unix.O_PATH, func(f *os.File) error {
		_, err := c.do(ctx, Request{Op: OpResume, Resume: &r}, f)
		return err
	})
}

// Decrypt opens all inputs. It returns when they are in memory, or large ones on
// their way there (Decrypted.Opening).
func (c *Client) Decrypt(ctx context.Context) (Decrypted, error) {
	r, err := c.do(ctx, Request{Op: OpDecrypt}, nil)
	return part(r.Decrypt, err)
}

// Status asks how things are.
func (c *Client) Status(ctx context.Context) (Status, error) {
	r, err := c.do(ctx, Request{Op: OpStatus}, nil)
	return part(r.Status, err)
}

// Logs returns log bytes from an offset on, waiting for some.
func (c *Client) Logs(ctx context.Context, l Logs) (LogChunk, error) {
	r, err := c.do(ctx, Request{Op: OpLogs, Logs: &l}, nil)
	return part(r.Logs, err)
}

// Events returns events after a sequence number, waiting for some.
func (c *Client) Events(ctx context.Context, e Events) ([]Event, error) {
	r, err := c.do(ctx, Request{Op: OpEvents, Events: &e}, nil)
	res, err := part(r.Events, err)
	return res.Events, err
}

// Checkpoints returns every commit, in order. A Status has the last ones only.
func (c *Client) Checkpoints(ctx context.Context) ([]Checkpoint, error) {
	var out []Checkpoint
	for after := uint64(0); ; {
		es, err := c.Events(ctx, Events{After: after})
		if err != nil {
			return nil, err
		}
		if len(es) == 0 {
			return out, nil
		}
		for _, e := range es {
			if e.Checkpoint != nil {
				out = append(out, *e.Checkpoint)
			}
		}
		after = es[len(es)-1].Sequence
	}
}

// Finish closes mounts, scrubs regions, destroys data keys, and returns the
// final status. The session key lives on, for the bundle's statement, until Exit.
func (c *Client) Finish(ctx context.Context) (Status, error) {
	r, err := c.do(ctx, Request{Op: OpFinish}, nil)
	return part(r.Status, err)
}

// Exit ends the holder.
func (c *Client) Exit(ctx context.Context) error {
	_, err := c.do(ctx, Request{Op: OpExit}, nil)
	return err
}

func (c *Client) withDir(path string, mode int, f func(*os.File) error) error {
	d, err := os.OpenFile(path, mode|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return fmt.Errorf("open folder for the holder: %w", err)
	}
	defer d.Close()
	return f(d)
}

func part[T any](p *T, err error) (T, error) {
	var zero T
	if err != nil {
		return zero, err
	}
	if p == nil {
		return zero, errors.New("holder answered another question")
	}
	return *p, nil
}

func (c *Client) do(ctx context.Context, req Request, fd *os.File) (Response, error) {
	b, err := json.Marshal(req)
	if err != nil {
		return Response{}, fmt.Errorf("encode request to holder: %w", err)
	}
	if len(b) > MaxMessage {
		return Response{}, fmt.Errorf("request to holder of %d bytes: at most %d", len(b), MaxMessage)
	}
	var oob []byte
	if fd != nil {
		oob = unix.UnixRights(int(fd.Fd()))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken {
		return Response{}, ErrLost
	}
	if err := ctx.Err(); err != nil {
		return Response{}, err
	}
	// A call that is given up leaves its answer under way: the connection cannot
	// be used for another.
	stop := context.AfterFunc(ctx, func() { _ = c.conn.SetDeadline(time.Unix(1, 0)) })
	res, err := c.exchange(b, oob)
	if !stop() || err != nil {
		c.broken = true
		_ = c.conn.Close()
	}
	if err != nil {
		if cerr := ctx.Err(); cerr != nil {
			return Response{}, fmt.Errorf("holder %s: %w", req.Op, cerr)
		}
		return Response{}, fmt.Errorf("holder %s: %w: %w", req.Op, ErrLost, err)
	}
	if res.Error != "" || res.Code != "" {
		return Response{}, &Error{Op: req.Op, Code: res.Code, Message: res.Error}
	}
	return res, nil
}

func (c *Client) exchange(b, oob []byte) (Response, error) {
	if _, _, err := c.conn.WriteMsgUnix(b, oob, nil); err != nil {
		return Response{}, err
	}
	n, _, flags, _, err := c.conn.ReadMsgUnix(c.buf, nil)
	if err != nil {
		return Response{}, err
	}
	if n == 0 {
		return Response{}, errors.New("closed")
	}
	if n > MaxMessage || flags&unix.MSG_TRUNC != 0 {
		return Response{}, errors.New("answer is too long")
	}
	var res Response
	if err := plan.Decode(c.buf[:n], MaxMessage, &res); err != nil {
		return Response{}, fmt.Errorf("decode answer: %w", err)
	}
	return res, nil
}

// Folder is the name in the sink of the sealed checkpoint.
func (c Checkpoint) Folder() string { return CheckpointFolder(c.Sequence, c.Name) }

// CheckpointFolder is the name in the sink under which a commit is sealed. The
// sequence number keeps a name that is committed again from replacing anything.
func CheckpointFolder(sequence uint64, name string) string {
	return fmt.Sprintf("%06d-%s", sequence, name)
}

// Cleanup takes away what a holder that died left under runDir: mounts, sockets
// and pipes. It is no error if there is nothing.
func Cleanup(runDir string) error {
	var errs error
	for _, n := range []string{InputsName, CheckpointsName} {
		p := filepath.Join(runDir, n)
		for {
			err := unix.Unmount(p, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
			if err == nil {
				continue
			}
			// EINVAL: not a mount point (any more).
			if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
				errs = errors.Join(errs, fmt.Errorf("unmount %s: %w", p, err))
			}
			break
		}
	}
	for _, n := range []string{SocketName, TraceName, StdoutName, StderrName, InputsName, CheckpointsName, filepath.Join(RegionsDir, RegionsSocket), RegionsDir} {
		if err := os.Remove(filepath.Join(runDir, n)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = errors.Join(errs, fmt.Errorf("clean up after holder: %w", err))
		}
	}
	return errs
}
