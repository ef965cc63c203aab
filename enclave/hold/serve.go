package hold

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
)

const (
	// maxConns bounds connections, maxFDs descriptors in one request.
	maxConns = 16
	maxFDs   = 1
)

// Serve answers on the control socket until Exit or the end of ctx. Either way
// the job is over when it returns.
func (h *Holder) Serve(ctx context.Context) error {
	defer h.session.Destroy()
	l, err := listen(h.path(holdapi.SocketName))
	if err != nil {
		_, ferr := h.finish(ctx)
		return errors.Join(fmt.Errorf("listen for the agent: %w", err), ferr)
	}
	// Waiting operations end with the holder.
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	context.AfterFunc(ctx, func() { _ = l.Close() })
	var wg sync.WaitGroup
	slots := make(chan struct{}, maxConns)
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			if ctx.Err() == nil {
				h.log.ErrorContext(ctx, "control socket", "error", err)
			}
			break
		}
		select {
		case slots <- struct{}{}:
		default:
			h.log.WarnContext(ctx, "control connection refused: too many", "limit", maxConns)
			_ = c.Close()
			continue
		}
		if err := samePeer(c); err != nil {
			h.log.WarnContext(ctx, "control connection refused", "error", err)
			_ = c.Close()
			<-slots
			continue
		}
		wg.Go(func() {
			defer func() { <-slots }()
			defer c.Close()
			unwatch := context.AfterFunc(ctx, func() {
				// What is being answered may still go out.
				_ = c.SetReadDeadline(time.Unix(1, 0))
			})
			defer unwatch()
			h.conn(ctx, c, stop)
		})
	}
	stop()
	// The job's end must not depend on the context that ended it.
	_, err = h.finish(context.WithoutCancel(ctx))
	wg.Wait()
	return err
}

// peer returns who connected, as of then.
func peer(c *net.UnixConn) (*unix.Ucred, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return nil, err
	}
	if cerr != nil {
		return nil, fmt.Errorf("peer credentials: %w", cerr)
	}
	return cred, nil
}

// samePeer wants a peer of this process's own user.
func samePeer(c *net.UnixConn) error {
	cred, err := peer(c)
	if err != nil {
		return err
	}
	if int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("peer is user %d", cred.Uid)
	}
	return nil
}

func (h *Holder) conn(ctx context.Context, c *net.UnixConn, stop func()) {
	buf := make([]byte, holdapi.MaxMessage)
	for {
		n, fds, err := holdapi.Receive(c, buf, maxFDs)
		var res holdapi.Response
		exit := false
		switch {
		case errors.Is(err, holdapi.ErrTooMuch):
			res = failed(fail(holdapi.CodeInvalid, "request is longer than %d bytes, or has more than %d descriptors", holdapi.MaxMessage, maxFDs))
		case err != nil:
			return
		default:
			res, exit = h.answer(ctx, buf[:n], fds)
		}
		for _, f := range fds {
			_ = f.Close()
		}
		out, err := json.Marshal(res)
		if err != nil || len(out) > holdapi.MaxMessage {
			h.log.ErrorContext(ctx, "answer does not fit", "bytes", len(out), "error", err)
			out = []byte(`{"error":"answer does not fit","code":"io"}`)
		}
		if _, err := c.Write(out); err != nil {
			return
		}
		if exit {
			stop()
			return
		}
	}
}

func failed(err error) holdapi.Response {
	code := holdapi.CodeIO
	var e *apiError
	if errors.As(err, &e) {
		code = e.code
	}
	if code == holdapi.CodeIO && (errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)) {
		code = holdapi.CodeNoSpace
	}
	return holdapi.Response{Error: err.Error(), Code: code}
}

// answer does one operation. A request whose parts or descriptors are not those
// of its operation is refused whole.
func (h *Holder) answer(ctx context.Context, b []byte, fds []*os.File) (res holdapi.Response, exit bool) {
	var q holdapi.Request
	if err := plan.Decode(b, holdapi.MaxMessage, &q); err != nil {
		return failed(fail(holdapi.CodeInvalid, "request: %w", err)), false
	}
	if err := checkParts(q, len(fds)); err != nil {
		return failed(err), false
	}
	var err error
	switch q.Op {
	case holdapi.OpHello:
		v := h.hello()
		res.Hello = &v
	case holdapi.OpSignRelease:
		var s []byte
		if s, err = h.signRelease(q.SignRelease.Request); err == nil {
			res.SignRelease = &holdapi.Signed{Signature: s}
		}
	case holdapi.OpSign:
		var s []byte
		if s, err = h.sign(q.Sign.Statement); err == nil {
			res.Sign = &holdapi.Signed{Signature: s}
		}
	case holdapi.OpDeliver:
		err = h.deliver(*q.Deliver)
	case holdapi.OpLease:
		v := h.lease.begin()
		res.Lease = &v
	case holdapi.OpRenew:
		var v holdapi.Lease
		if v, err = h.lease.renew(q.Renew.Lease); err == nil {
			res.Lease = &v
		}
	case holdapi.OpInput:
		var root *os.Root
		if root, err = openFolder(fds[0]); err == nil {
			err = h.input(ctx, *q.Input, root)
		}
	case holdapi.OpSettle:
		err = h.settle() //nolint:contextcheck // it ends with the job, not with the request
	case holdapi.OpSink:
		var root *os.Root
		if root, err = openFolder(fds[0]); err == nil {
			err = h.setSink(*q.Sink, root)
		}
	case holdapi.OpResumeBegin:
		var v holdapi.ResumeRule
		if v, err = h.resumeBegin(q.ResumeBegin.Plan); err == nil {
			res.ResumeRule = &v
		}
	case holdapi.OpResume:
		err = h.answerResume(ctx, *q.Resume, fds)
	case holdapi.OpResealSource:
		var root *os.Root
		if root, err = openFolder(fds[0]); err == nil {
			err = h.resealSource(*q.ResealSource, root)
		}
	case holdapi.OpReseal:
		var root *os.Root
		if root, err = openFolder(fds[0]); err == nil {
			err = h.beginReseal(*q.Reseal, root) //nolint:contextcheck // it ends with the job, not with the request
		}
	case holdapi.OpResealStatus:
		var v holdapi.ResealStatus
		if v, err = h.resealStatus(*q.ResealStatus); err == nil {
			res.Reseal = &v
		}
	case holdapi.OpDecrypt:
		var d holdapi.Decrypted
		if d, err = h.decrypt(ctx); err == nil {
			res.Decrypt = &d
		}
	case holdapi.OpStatus:
		s := h.status()
		res.Status = &s
	case holdapi.OpLogs:
		l := h.stdout
		switch q.Logs.Stream {
		case "stdout":
		case "stderr":
			l = h.stderr
		default:
			return failed(fail(holdapi.CodeInvalid, "stream %.20q: want stdout or stderr", q.Logs.Stream)), false
		}
		v := l.chunk(ctx, q.Logs.Offset, time.Duration(q.Logs.WaitMillis)*time.Millisecond)
		res.Logs = &v
	case holdapi.OpEvents:
		res.Events = &holdapi.EventsResult{Events: h.events.after(ctx, q.Events.After, time.Duration(q.Events.WaitMillis)*time.Millisecond)}
	case holdapi.OpFinish:
		var s holdapi.Status
		// A caller that goes away does not stop what it began.
		if s, err = h.finish(context.WithoutCancel(ctx)); err == nil {
			res.Status = &s
		}
	case holdapi.OpExit:
		h.mu.Lock()
		over := h.finished != nil && isClosed(h.finished)
		h.mu.Unlock()
		if !over {
			return failed(fail(holdapi.CodeState, "the job is not finished")), false
		}
		return res, true
	}
	if err != nil {
		return failed(err), false
	}
	return res, false
}

// checkParts wants exactly the part and the descriptors that an operation has.
func checkParts(q holdapi.Request, fds int) error {
	parts := map[string]bool{
		holdapi.OpSignRelease: q.SignRelease != nil, holdapi.OpSign: q.Sign != nil, holdapi.OpDeliver: q.Deliver != nil, holdapi.OpRenew: q.Renew != nil,
		holdapi.OpInput: q.Input != nil, holdapi.OpSink: q.Sink != nil, holdapi.OpLogs: q.Logs != nil, holdapi.OpEvents: q.Events != nil,
		holdapi.OpResumeBegin: q.ResumeBegin != nil, holdapi.OpResume: q.Resume != nil,
		holdapi.OpResealSource: q.ResealSource != nil, holdapi.OpReseal: q.Reseal != nil, holdapi.OpResealStatus: q.ResealStatus != nil,
	}
	want := 0
	switch q.Op {
	case holdapi.OpHello, holdapi.OpLease, holdapi.OpSettle, holdapi.OpDecrypt, holdapi.OpStatus, holdapi.OpFinish, holdapi.OpExit:
	case holdapi.OpInput, holdapi.OpSink, holdapi.OpResume, holdapi.OpResealSource, holdapi.OpReseal:
		want = 1
		if q.Resume != nil && q.Resume.Nothing {
			want = 0
		}
		fallthrough
	case holdapi.OpSignRelease, holdapi.OpSign, holdapi.OpDeliver, holdapi.OpRenew, holdapi.OpLogs, holdapi.OpEvents, holdapi.OpResumeBegin, holdapi.OpResealStatus:
		if !parts[q.Op] {
			return fail(holdapi.CodeInvalid, "%s says nothing", q.Op)
		}
	default:
		return fail(holdapi.CodeInvalid, "unknown operation %.40q", q.Op)
	}
	for op, there := range parts {
		if there && op != q.Op {
			return fail(holdapi.CodeInvalid, "%s carries a part of %s", q.Op, op)
		}
	}
	if fds != want {
		return fail(holdapi.CodeInvalid, "%s comes with %d descriptors, want %d", q.Op, fds, want)
	}
	return nil
}

// openFolder turns a received descriptor into a root that cannot be left.
func openFolder(f *os.File) (*os.Root, error) {
	root, err := os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		return nil, fail(holdapi.CodeInvalid, "descriptor is no folder: %w", err)
	}
	return root, nil
}
