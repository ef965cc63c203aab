package object

import (
	"errors"
	"io"
	"net/http"
	"sync"
)

// lending ends the reading of a request's body when the request is answered. The
// transport would go on where a store answers before it has taken all, and Azure's
// library unmaps the memory of a part as soon as it has failed: the agent would die.
type lending struct{ http.RoundTripper }

// RoundTrip is of http.RoundTripper.
func (l lending) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Body == nil || r.Body == http.NoBody {
		return l.RoundTripper.RoundTrip(r)
	}
	body := &lent{of: r.Body, left: r.ContentLength}
	defer body.end()
	again := r.WithContext(r.Context())
	again.Body, again.GetBody = body, nil
	return l.RoundTripper.RoundTrip(again)
}

var errAnswered = errors.New("the store answered before it had taken all")

// lent is a body that can be taken back.
type lent struct {
	mu   sync.Mutex // guards what follows
	of   io.ReadCloser
	left int64 // bytes that were not read; below 0 it is not known
	over bool
}

// Read is of io.Reader.
func (l *lent) Read(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case !l.over:
	case l.left == 0:
		// The transport asks once more after the last byte.
		return 0, io.EOF
	default:
		return 0, errAnswered
	}
	n, err := l.of.Read(p)
	l.left -= int64(n)
	return n, err
}

// Close is of io.Closer.
func (l *lent) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over {
		return nil
	}
	return l.of.Close()
}

// end takes the body back. What it was made of is not touched after this returns.
func (l *lent) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.over = true
}
