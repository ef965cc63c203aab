package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"path/filepath"
	"strings"

	"connectrpc.com/connect"

	"github.com/coffer-run/coffer/attest/api/broker/v1/brokerv1connect"
	"github.com/coffer-run/coffer/attest/api/refusal"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/stack"
	"github.com/coffer-run/coffer/runner/api/agent/v1/agentv1connect"
)

// maxAnswer bounds one answer, in bytes. Bundles are the largest.
const maxAnswer = 64 << 20

// dial returns a client for one service of the stack, as the identity of the
// given role.
func (c *cli) dial(role, server string) (*http.Client, stack.Endpoint, error) {
	e, err := stack.OpenEndpoint(c.dir)
	if err != nil {
		return nil, stack.Endpoint{}, err
	}
	h, err := e.HTTPClient(role, server)
	if err != nil {
		return nil, stack.Endpoint{}, err
	}
	c.clients = append(c.clients, h)
	return h, e, nil
}

// agent returns a client of the node agent, for who signed in there, or, if nobody
// did, as the stack's identity of the given role.
func (c *cli) agent(role string) (agentv1connect.AgentServiceClient, error) {
	e, err := stack.OpenEndpoint(c.dir)
	if err != nil {
		return nil, err
	}
	signedIn, err := c.atNodes(e)
	if err != nil {
		return nil, err
	}
	var h *http.Client
	if !signedIn {
		h, _, err = c.dial(role, daemon.RoleAgent)
	} else if h, err = daemon.HTTPClientForPeople(e.CA(), daemon.RoleAgent); err == nil {
		h.Transport = &nodeBearer{next: h.Transport, token: func(ctx context.Context) (string, error) {
			_, token, err := c.signedInAt(ctx, e, true)
			return token, err
		}}
		c.clients = append(c.clients, h)
	}
	if err != nil {
		return nil, err
	}
	return agentv1connect.NewAgentServiceClient(h, e.Agent(), connect.WithReadMaxBytes(maxAnswer)), nil
}

type brokerClient = brokerv1connect.BrokerServiceClient

// broker returns a client of the broker, for who signed in, or, if nobody did, as
// the stack's owner by certificate.
func (c *cli) broker(ctx context.Context) (brokerClient, error) {
	e, err := stack.OpenEndpoint(c.dir)
	if err != nil {
		return nil, err
	}
	name, token, err := c.signedIn(ctx, e)
	if err != nil {
		return nil, err
	}
	var h *http.Client
	if name == "" {
		h, err = e.HTTPClient(daemon.RoleOwner, daemon.RoleBroker)
	} else if h, err = daemon.HTTPClientForPeople(e.CA(), daemon.RoleBroker); err == nil {
		h.Transport = bearer{h.Transport, token}
	}
	if err != nil {
		return nil, err
	}
	c.clients = append(c.clients, h)
	return brokerv1connect.NewBrokerServiceClient(h, e.Broker(), connect.WithReadMaxBytes(maxAnswer)), nil
}

// explain turns the error of a call into one sentence, what to do next, and an
// exit code. doing says what the call was for: "list assets".
func (c *cli) explain(doing, server string, err error) error {
	if err == nil {
		return nil
	}
	if r, ok := refusal.Decode(err); ok {
		return c.refused(doing, r)
	}
	var out *exitError
	if errors.As(err, &out) {
		return err
	}
	text := doing + ": " + message(err)
	var op *net.OpError
	switch connect.CodeOf(err) {
	case connect.CodeUnavailable:
		if errors.As(err, &op) && op.Op == "dial" {
			text = fmt.Sprintf("%s: no %s answers at %s: is the stack up? `coffer up --dir %s` starts it, `coffer restart` what has ended of it", doing, server, op.Addr, c.dir)
		}
		return &exitError{code: exitUnknown, text: text, err: err}
	case connect.CodeDeadlineExceeded, connect.CodeAborted, connect.CodeUnknown, connect.CodeInternal:
		return &exitError{code: exitUnknown, text: text, err: err}
	case connect.CodeCanceled:
		return &exitError{code: exitUnknown, text: doing + ": interrupted", err: err}
	case connect.CodeNotFound:
		list := "`coffer ps` lists jobs"
		if server == serverBroker {
			list = "`coffer assets ls` and `coffer grants ls` list what there is"
		}
		return &exitError{code: exitFailed, text: text + ": " + list, err: err}
	case connect.CodeInvalidArgument:
		return &exitError{code: exitUsage, text: text, err: err}
	case connect.CodePermissionDenied, connect.CodeUnauthenticated:
		return &exitError{code: exitRefused, text: text, err: err}
	default:
		return &exitError{code: exitFailed, text: text, err: err}
	}
}

// message is an error's text without the protocol's prefix. None of its lines begins
// where what coffer says does.
func message(err error) string {
	text := err.Error()
	var ce *connect.Error
	if errors.As(err, &ce) {
		text = ce.Message()
	}
	return strings.ReplaceAll(text, "\n", "\n    ")
}

func (c *cli) refused(doing string, r *check.Refusal) error {
	if err := printRefusal(c.stderr, r.Stage, r.Checks); err != nil {
		return err
	}
	return &exitError{code: exitRefused, text: doing + ": refused at " + r.Stage, err: r}
}

// printRefusal shows every failed check, what was expected, what was found and
// what to do.
func printRefusal(w io.Writer, stage string, failed check.List) error {
	what := "checks"
	if len(failed) == 1 {
		what = "check"
	}
	if _, err := fmt.Fprintf(w, "refused at %s: %d %s failed\n", clean(stage), len(failed), what); err != nil {
		return err
	}
	for _, f := range failed {
		var b strings.Builder
		fmt.Fprintf(&b, "  %s\n", clean(f.ID))
		for _, l := range [][2]string{{"expected", f.Expected}, {"found", f.Found}, {"hint", f.Hint}} {
			if l[1] != "" {
				fmt.Fprintf(&b, "    %-9s %s\n", l[0], clean(l[1]))
			}
		}
		if _, err := io.WriteString(w, b.String()); err != nil {
			return err
		}
	}
	return nil
}

// call makes one unary call and explains its error.
func call[Req, Res any](ctx context.Context, c *cli, doing, server string, f func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error), req *Req) (*Res, error) {
	res, err := f(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, c.explain(doing, server, err)
	}
	return res.Msg, nil
}

// orNoStack is why a path could not be read: err, or, if the path is of the stack, that
// there is no stack.
func (c *cli) orNoStack(path string, err error) error {
	var none *stack.NoStackError
	if _, serr := stack.OpenEndpoint(c.dir); errors.Is(err, fs.ErrNotExist) && strings.HasPrefix(path, filepath.Clean(c.dir)+"/") && errors.As(serr, &none) {
		return none
	}
	return err
}
