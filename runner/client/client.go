// Package client asks a node agent what a scheduler asks: for room, to take jobs, what became of
// them, and for their evidence (docs/scheduler.md).
//
// It repeats calls that got no answer, and streams go on where they broke. That is safe because Submit
// needs an idempotency key and everything else may be asked twice. Trusted: the authority whose
// certificates it is given. Checked: that the peer's certificate is an agent's. Not checked: what the agent says of
// jobs; their bundles are for that (coffer-verify).
package client

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"strconv"
	"time"

	"connectrpc.com/connect"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/internal/daemon"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/api/agent/v1/agentv1connect"
)

const (
	// DefaultPatience is for how long a call is repeated unless Options says otherwise: an agent that is
	// replaced is back sooner.
	DefaultPatience = time.Minute
	// firstPause is the pause before the first repetition; each later one is twice as long, up to maxPause.
	firstPause = 100 * time.Millisecond
	maxPause   = 5 * time.Second
	// maxAnswer bounds an answer, in bytes: a bundle in its envelope.
	maxAnswer = bundle.MaxSize + 1<<20
	// maxAttempts bounds the attempts that Wait follows.
	maxAttempts = 1000
)

// Options say which agent is asked, and who asks.
type Options struct {
	// URL is the agent's, such as https://node:7443.
	URL string
	// CA is the file with the authority of the agent's certificate, in PEM.
	CA string
	// Cert and Key are files with the caller's certificate and its key, in PEM, or empty
	// where Token is set.
	Cert, Key string
	// Token returns the caller's bearer token. It is asked before each request.
	Token func(context.Context) (string, error)
	// Patience is for how long a call is repeated and a stream may fail without bringing
	// anything; 0 is DefaultPatience.
	Patience time.Duration
}

// Client asks one agent. Its methods may be called concurrently.
type Client struct {
	agent    agentv1connect.AgentServiceClient
	http     *http.Client
	patience time.Duration
}

// New returns a client that has not connected yet.
func New(o Options) (*Client, error) {
	if o.URL == "" || o.CA == "" {
		return nil, errors.New("agent client: want the agent's URL and the authority of its certificate")
	}
	if (o.Token != nil) == (o.Cert != "" || o.Key != "") {
		return nil, errors.New("agent client: want either a certificate with its key or a token")
	}
	if o.Patience < 0 {
		return nil, errors.New("agent client: patience is negative")
	}
	var h *http.Client
	var err error
	if o.Token != nil {
		if h, err = daemon.HTTPClientForPeople(o.CA, daemon.RoleAgent); err == nil {
			h.Transport = bearer{h.Transport, o.Token}
		}
	} else {
		h, err = daemon.TLS{Cert: o.Cert, Key: o.Key, CA: o.CA}.HTTPClient(daemon.RoleAgent)
	}
	if err != nil {
		return nil, fmt.Errorf("agent client: %w", err)
	}
	c := &Client{agent: agentv1connect.NewAgentServiceClient(h, o.URL, connect.WithReadMaxBytes(maxAnswer)), http: h, patience: o.Patience}
	if c.patience == 0 {
		c.patience = DefaultPatience
	}
	return c, nil
}

// Close closes the connections that are idle.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// bearer sends a token with every request.
type bearer struct {
	next  http.RoundTripper
	token func(context.Context) (string, error)
}

func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	token, err := b.token(r.Context())
	if err != nil {
		return nil, fmt.Errorf("token: %w", err)
	}
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+token)
	return b.next.RoundTrip(r)
}

// CloseIdleConnections lets http.Client reach the connections.
func (b bearer) CloseIdleConnections() { (&http.Client{Transport: b.next}).CloseIdleConnections() }

// Temporary reports whether an error says that the same call may succeed later, and
// how long the agent asks to wait, 0 where it does not say.
func Temporary(err error) (time.Duration, bool) {
	var ce *connect.Error
	if !errors.As(err, &ce) {
		return 0, false
	}
	if !connect.IsWireError(err) {
		// No answer came, or half of one: these are the codes that connect gives to what
		// broke. The others say that who calls has given up, what an HTTP status meant, or that the
		// answer is larger than this client reads.
		switch ce.Code() {
		case connect.CodeUnavailable, connect.CodeUnknown, connect.CodeInternal, connect.CodeInvalidArgument:
			return 0, true
		default:
			return 0, false
		}
	}
	switch ce.Code() {
	case connect.CodeUnavailable, connect.CodeResourceExhausted:
		n, err := strconv.Atoi(ce.Meta().Get("Retry-After"))
		if err != nil || n < 0 {
			return 0, true
		}
		return time.Duration(min(n, 3600)) * time.Second, true
	default:
		return 0, false
	}
}

// tries are the attempts of one call, or of a stream since it last brought something.
type tries struct {
	until time.Time
	pause time.Duration
}

func (c *Client) tries() *tries { return &tries{time.Now().Add(c.patience), firstPause} }

// again waits for the next attempt, and returns the error of the last one where there
// is none.
func (t *tries) again(ctx context.Context, err error) error {
	asked, ok := Temporary(err)
	wait := max(t.pause, asked)
	if !ok || ctx.Err() != nil || time.Now().Add(wait).After(t.until) {
		return err
	}
	t.pause = min(2*t.pause, maxPause)
	select {
	case <-ctx.Done():
		return err
	case <-time.After(wait):
		return nil
	}
}

// call makes a call until it is answered.
func call[Req, Res any](ctx context.Context, c *Client, doing string, f func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error), req *Req) (*Res, error) {
	for t := c.tries(); ; {
		res, err := f(ctx, connect.NewRequest(req))
		if err == nil {
			return res.Msg, nil
		}
		if err := t.again(ctx, err); err != nil {
			return nil, fmt.Errorf("%s: %w", doing, err)
		}
	}
}

// Capacity asks what the node has and what is left of it.
func (c *Client) Capacity(ctx context.Context) (*agentv1.CapacityResponse, error) {
	return call(ctx, c, "ask for capacity", c.agent.Capacity, &agentv1.CapacityRequest{})
}

// Plan asks for a job file's plan and its digest, without submitting it.
func (c *Client) Plan(ctx context.Context, file []byte) (*agentv1.PlanResponse, error) {
	return call(ctx, c, "plan job", c.agent.Plan, &agentv1.PlanRequest{JobFile: file})
}

// Submit gives the node a job file. The same key with the same file is the same job,
// however often it is sent; key must not be empty, since a call may be repeated. With another
// file it fails with connect.CodeAlreadyExists.
func (c *Client) Submit(ctx context.Context, file []byte, key string) (*agentv1.Job, error) {
	if key == "" {
		return nil, errors.New("submit job: want an idempotency key: without one a call that is repeated would be another job")
	}
	res, err := call(ctx, c, "submit job", c.agent.Submit, &agentv1.SubmitRequest{JobFile: file, IdempotencyKey: key})
	return res.GetJob(), err
}

// Get asks for one job.
func (c *Client) Get(ctx context.Context, id string) (*agentv1.Job, error) {
	res, err := call(ctx, c, "ask for job "+id, c.agent.Get, &agentv1.GetRequest{Id: id})
	return res.GetJob(), err
}

// Cancel tells a job to end, and does not wait until it has.
func (c *Client) Cancel(ctx context.Context, id string) (*agentv1.Job, error) {
	res, err := call(ctx, c, "cancel job "+id, c.agent.Cancel, &agentv1.CancelRequest{Id: id})
	return res.GetJob(), err
}

// Bundle fetches the evidence of a job that has ended.
func (c *Client) Bundle(ctx context.Context, id string) ([]byte, error) {
	res, err := call(ctx, c, "fetch evidence of job "+id, c.agent.Bundle, &agentv1.BundleRequest{Id: id})
	return res.GetBundle(), err
}

// List goes through the jobs in one state, or through all if state is empty, the
// newest first. It ends with the first error.
func (c *Client) List(ctx context.Context, state string) iter.Seq2[*agentv1.Job, error] {
	return func(yield func(*agentv1.Job, error) bool) {
		for token := ""; ; {
			res, err := call(ctx, c, "list jobs", c.agent.List, &agentv1.ListRequest{PageToken: token, State: state})
			if err != nil {
				yield(nil, err)
				return
			}
			for _, j := range res.GetJobs() {
				if !yield(j, nil) {
					return
				}
			}
			next := res.GetNextPageToken()
			if next == "" {
				return
			}
			if next == token {
				yield(nil, errors.New("list jobs: the agent repeats a page"))
				return
			}
			token = next
		}
	}
}
