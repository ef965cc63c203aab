package serve

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/coffer-run/coffer/attest/endorse"
)

// The vendors' services.
const (
	// DefaultKDS is AMD's key distribution service (document 57230).
	DefaultKDS = "https://kdsintf.amd.com/"
	// DefaultRIM is NVIDIA's service of reference integrity manifests.
	DefaultRIM = "https://rim.attestation.nvidia.com/v1/rim/"
	// DefaultOCSP is NVIDIA's responder for device and manifest certificates.
	DefaultOCSP = "https://ocsp.ndis.nvidia.com/"
)

const (
	attempts       = 3
	attemptTimeout = 4 * time.Second
	firstPause     = 250 * time.Millisecond
	// openAfter failures in a row a host is left alone, at first for
	// firstOpen, then for twice as long each time.
	openAfter = 3
	firstOpen = 10 * time.Second
	maxOpen   = 10 * time.Minute
	// burst and perMinute bound the requests to one host. Evidence names chips,
	// and is not yet verified when the certificate of its chip is looked for.
	burst     = 64
	perMinute = 120
	// callerBurst and callerPerMinute bound the answers that are fetched on one
	// caller's account: a machine that was never seen needs about ten, and one
	// whose evidence names chips without end must leave requests for the others.
	callerBurst     = 24
	callerPerMinute = 30
	// maxCallers bounds the callers that are told apart.
	maxCallers = 4096
	// answerOverhead is what the JSON around a manifest may add.
	answerOverhead = 64 << 10
)

// ClientOptions say where the services are; what is empty is the vendor's.
type ClientOptions struct {
	KDS, RIM, OCSP string
	// Roots verify the services' TLS certificates; nil means the system's.
	Roots *x509.CertPool
}

// Client asks the vendors' services over HTTPS, one request after the other for
// each answer: bounded, redirected nowhere, and not at all while a service fails.
// It may be used by many at once.
type Client struct {
	kds, rim, ocsp *url.URL
	http           *http.Client

	mu      sync.Mutex
	hosts   map[string]*host   // guarded by mu, and so is what it points to
	callers map[string]*bucket // guarded by mu, and so is what it points to
}

// host is the circuit to one host: closed while failures are few, open until a
// time, and then tried by one request.
type host struct {
	failures int
	last     error
	open     time.Duration
	until    time.Time
	trying   bool

	bucket
}

// bucket holds the requests that may be made at once. It fills with time.
type bucket struct {
	tokens float64
	filled time.Time
}

func (b *bucket) fill(now time.Time, size, perMinute float64) {
	b.tokens = min(size, b.tokens+now.Sub(b.filled).Minutes()*perMinute)
	b.filled = now
}

// take takes one request out, if one is there.
func (b *bucket) take() bool {
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

// NewClient returns a client. Services are asked over HTTPS only.
func NewClient(o ClientOptions) (*Client, error) {
	c := &Client{hosts: map[string]*host{}, callers: map[string]*bucket{}}
	for _, s := range []struct {
		name, given, vendors string
		to                   **url.URL
	}{{"kds", o.KDS, DefaultKDS, &c.kds}, {"rim", o.RIM, DefaultRIM, &c.rim}, {"ocsp", o.OCSP, DefaultOCSP, &c.ocsp}} {
		if s.given == "" {
			s.given = s.vendors
		}
		u, err := url.Parse(s.given)
		if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || !strings.HasSuffix(u.Path, "/") {
			return nil, fmt.Errorf("address of service %s %.120q: want https://HOST/PATH/", s.name, s.given)
		}
		*s.to = u
	}
	c.http = &http.Client{
		Transport: &http.Transport{
			Proxy:                  http.ProxyFromEnvironment,
			DialContext:            (&net.Dialer{Timeout: attemptTimeout}).DialContext,
			TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: o.Roots},
			TLSHandshakeTimeout:    attemptTimeout,
			ResponseHeaderTimeout:  attemptTimeout,
			MaxResponseHeaderBytes: 32 << 10,
			MaxConnsPerHost:        8,
			MaxIdleConnsPerHost:    4,
			IdleConnTimeout:        time.Minute,
			ForceAttemptHTTP2:      true,
			// A body that inflates is a body without a bound.
			DisableCompression: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return c, nil
}

// Close ends idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// failure is of one attempt.
type failure struct {
	err error
	// wait is what the service asks for before the next attempt.
	wait time.Duration
	// final means that another attempt is no use.
	final bool
}

// Fetch implements endorse.Fetcher.
func (c *Client) Fetch(ctx context.Context, r endorse.Request) ([]byte, error) {
	u, err := c.address(r)
	if err != nil {
		return nil, err
	}
	if err := c.charge(endorse.CallerOf(ctx)); err != nil {
		return nil, fmt.Errorf("%w: %w", endorse.ErrOutage, err)
	}
	pause := firstPause
	var last *failure
	for n := 1; ; n++ {
		if err := c.enter(u.Host); err != nil {
			if last != nil {
				err = fmt.Errorf("%s: %w", u.Host, last.err)
			}
			return nil, fmt.Errorf("%w: %w", endorse.ErrOutage, err)
		}
		b, f := c.attempt(ctx, u, r)
		c.leave(ctx, u.Host, f)
		last = f
		switch {
		case f == nil:
			return b, nil
		case f.final && errors.Is(f.err, endorse.ErrUnknown):
			return nil, f.err
		case f.final || n == attempts || ctx.Err() != nil:
			return nil, fmt.Errorf("%w: %s: %w", endorse.ErrOutage, u.Host, f.err)
		}
		// Full jitter, so that replicas that failed together do not come back
		// together.
		wait := max(f.wait, rand.N(pause)) // #nosec G404 -- no secret
		pause *= 2
		if d, ok := ctx.Deadline(); ok && time.Until(d) < wait {
			return nil, fmt.Errorf("%w: %s: %w", endorse.ErrOutage, u.Host, f.err)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %s: %w", endorse.ErrOutage, u.Host, errors.Join(f.err, ctx.Err()))
		}
	}
}

// address returns where to ask. Keys are made from evidence, so nothing of them
// may lead elsewhere.
func (c *Client) address(r endorse.Request) (*url.URL, error) {
	var u url.URL
	switch r.Key.Kind {
	case endorse.VEK, endorse.Chain, endorse.CRL:
		u = *c.kds
		path, query, _ := strings.Cut(r.Key.ID, "?")
		u.Path += path
		u.RawQuery = query
	case endorse.RIM:
		u = *c.rim
		u.Path += r.Key.ID
	case endorse.OCSP:
		u = *c.ocsp
	default:
		return nil, fmt.Errorf("no service has %.40q", string(r.Key.Kind))
	}
	if strings.Contains(r.Key.ID, "..") || strings.ContainsAny(r.Key.ID, "#\\ %") || (r.Key.Kind == endorse.VEK && strings.HasPrefix(r.Key.ID, "vlek/")) {
		// AMD hands out VLEKs to the cloud providers that they are of.
		return nil, fmt.Errorf("%w: no service hands out %s", endorse.ErrUnknown, r.Key)
	}
	return &u, nil
}

func (c *Client) attempt(ctx context.Context, u *url.URL, r endorse.Request) ([]byte, *failure) {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	method, body := http.MethodGet, io.Reader(http.NoBody)
	if r.Body != nil {
		method, body = http.MethodPost, bytes.NewReader(r.Body)
	}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return nil, &failure{err: err, final: true}
	}
	req.Header.Set("User-Agent", "coffer")
	if r.Body != nil {
		req.Header.Set("Content-Type", "application/ocsp-request")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, &failure{err: err}
	}
	defer func() { _ = resp.Body.Close() }()
	switch s := resp.StatusCode; {
	case s == http.StatusOK:
	case s == http.StatusTooManyRequests || s == http.StatusServiceUnavailable:
		return nil, &failure{err: errors.New("answered " + resp.Status), wait: retryAfter(resp.Header.Get("Retry-After"))}
	case s >= 500 || s == http.StatusRequestTimeout:
		return nil, &failure{err: errors.New("answered " + resp.Status)}
	case s == http.StatusNotFound || s == http.StatusBadRequest || s == http.StatusGone:
		return nil, &failure{err: fmt.Errorf("%w: %s answered %s about %s", endorse.ErrUnknown, u.Host, resp.Status, r.Key), final: true}
	default:
		// A redirection among them: endorsements come from where they are asked for.
		return nil, &failure{err: errors.New("answered " + resp.Status), final: true}
	}
	limit := r.Key.Kind.MaxSize()
	if r.Key.Kind == endorse.RIM {
		limit = limit/3*4 + answerOverhead
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, int64(limit)+1))
	if err != nil {
		return nil, &failure{err: err}
	}
	if len(b) > limit {
		return nil, &failure{err: fmt.Errorf("answered with more than %d bytes", limit), final: true}
	}
	if r.Key.Kind == endorse.RIM {
		id, xml, err := endorse.UnwrapRIM(b)
		if err != nil {
			return nil, &failure{err: err, final: true}
		}
		if id != "" && id != r.Key.ID {
			return nil, &failure{err: fmt.Errorf("answered with manifest %.80q for %s", id, r.Key.ID), final: true}
		}
		return xml, nil
	}
	return b, nil
}

// retryAfter reads the header (RFC 9110, section 10.2.3).
func retryAfter(v string) time.Duration {
	if s, err := strconv.Atoi(v); err == nil {
		return min(max(0, time.Duration(min(s, 3600))*time.Second), maxOpen)
	}
	if t, err := http.ParseTime(v); err == nil {
		return min(max(0, time.Until(t)), maxOpen)
	}
	return 0
}

// charge puts one fetch on a caller's account, or says why not. Fetches of
// nobody's are bounded by host alone.
func (c *Client) charge(caller string) error {
	if caller == "" {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	b := c.callers[caller]
	if b == nil {
		if len(c.callers) >= maxCallers {
			// An account that is full again says nothing.
			for name, b := range c.callers {
				if b.fill(now, callerBurst, callerPerMinute); b.tokens == callerBurst {
					delete(c.callers, name)
				}
			}
		}
		if len(c.callers) >= maxCallers {
			return fmt.Errorf("more than %d callers ask for endorsements at once", maxCallers)
		}
		b = &bucket{tokens: callerBurst, filled: now}
		c.callers[caller] = b
	}
	b.fill(now, callerBurst, callerPerMinute)
	if !b.take() {
		return fmt.Errorf("the evidence of %.120q asks for too much that is not held: at most %d endorsements a minute are fetched for one caller", caller, callerPerMinute)
	}
	return nil
}

// enter lets a request through to a host, or says why not.
func (c *Client) enter(name string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	h := c.hosts[name]
	if h == nil {
		h = &host{bucket: bucket{tokens: burst, filled: now}}
		c.hosts[name] = h
	}
	if !h.until.IsZero() && (now.Before(h.until) || h.trying) {
		return fmt.Errorf("%s is left alone until %s: %w", name, h.until.UTC().Format(time.RFC3339), h.last)
	}
	h.fill(now, burst, perMinute)
	if !h.take() {
		return fmt.Errorf("%s is asked too much: at most %d requests a minute are made", name, perMinute)
	}
	h.trying = !h.until.IsZero()
	return nil
}

// leave notes how a request went. The caller's own hurry is no fault of the host.
func (c *Client) leave(ctx context.Context, name string, f *failure) {
	c.mu.Lock()
	defer c.mu.Unlock()
	h := c.hosts[name]
	h.trying = false
	if f == nil || errors.Is(f.err, endorse.ErrUnknown) {
		h.failures, h.last, h.open, h.until = 0, nil, 0, time.Time{}
		return
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return
	}
	h.failures++
	h.last = f.err
	if h.failures < openAfter && f.wait == 0 {
		return
	}
	h.open = min(max(h.open*2, firstOpen), maxOpen)
	if f.wait > 0 {
		// The service says itself when it wants to be asked again.
		h.until = time.Now().Add(f.wait)
		return
	}
	h.until = time.Now().Add(h.open + rand.N(h.open/4)) // #nosec G404 -- no secret
}
