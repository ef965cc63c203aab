// Package remote calls the two services outside the node: the verifier, which
// judges the node's evidence, and the broker, which holds the wrapped keys.
//
// Trusted: the public keys that the node was configured with. Checked: every
// result and receipt against them. Not trusted: what a service says without a
// signature; it decides nothing here.
package remote

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"connectrpc.com/connect"

	"github.com/coffer-run/coffer/attest/api/refusal"
)

// Timeouts of one call, and how long a service may be away before a job fails.
const (
	callTimeout = 10 * time.Second
	// Patience is how long an absent service is asked again.
	Patience = 30 * time.Second
	// maxPause bounds the pause between two tries.
	maxPause = 2 * time.Second
	// maxAnswer bounds one answer, in bytes. The entries of a job are the largest.
	maxAnswer = 64 << 20
)

// Unavailable means that a service could not be reached or could not answer.
// Asking later may succeed. It is never a pass.
type Unavailable struct {
	// Service is "verifier" or "broker".
	Service string
	Err     error
}

// Error says which service is away.
func (u *Unavailable) Error() string { return fmt.Sprintf("%s is unavailable: %v", u.Service, u.Err) }

// Unwrap returns the cause.
func (u *Unavailable) Unwrap() error { return u.Err }

// Service says how to reach one service.
type Service struct {
	URL  string
	ID   string
	HTTP *http.Client
	// JWKS are the service's public keys.
	JWKS []byte
}

func (s Service) validate(name string) error {
	if s.URL == "" || s.ID == "" || s.HTTP == nil || len(s.JWKS) == 0 {
		return fmt.Errorf("%s needs a URL, an id, a client and its public keys", name)
	}
	return nil
}

// once calls f with a bounded time and sorts its error: a refusal, an absent
// service, or a defect.
func once[T any](ctx context.Context, service, what string, f func(context.Context) (T, error)) (T, error) {
	bounded, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	v, err := f(bounded)
	if err == nil {
		return v, nil
	}
	var zero T
	if ctx.Err() != nil {
		return zero, fmt.Errorf("%s: %w", what, context.Cause(ctx))
	}
	if r, ok := refusal.Decode(err); ok {
		return zero, r
	}
	if away(err) {
		return zero, &Unavailable{Service: service, Err: fmt.Errorf("%s: %w", what, err)}
	}
	var answer *connect.Error
	if errors.As(err, &answer) {
		return zero, &answerError{what, answer}
	}
	return zero, fmt.Errorf("%s: %w", what, err)
}

// answerError is a service's answer, without the protocol's word before its text.
type answerError struct {
	what string
	err  *connect.Error
}

func (e *answerError) Error() string { return e.what + ": " + e.err.Message() }
func (e *answerError) Unwrap() error { return e.err }

// away tells a service that does not answer, or that died in the middle of its
// answer, from one that answers what nobody expects.
func away(err error) bool {
	switch connect.CodeOf(err) {
	case connect.CodeUnavailable, connect.CodeDeadlineExceeded, connect.CodeResourceExhausted, connect.CodeAborted, connect.CodeCanceled:
		return true
	case connect.CodeUnknown, connect.CodeInternal, connect.CodeInvalidArgument:
		// What connect calls half an answer. Of a whole one it is the service's own word.
		var ce *connect.Error
		return errors.As(err, &ce) && !connect.IsWireError(err)
	default:
		return false
	}
}

// persist repeats a call that may be repeated while its service is away, for at
// most Patience.
func persist[T any](ctx context.Context, service, what string, f func(context.Context) (T, error)) (T, error) {
	deadline := time.Now().Add(Patience)
	for pause := 50 * time.Millisecond; ; pause = min(2*pause, maxPause) {
		v, err := once(ctx, service, what, f)
		var away *Unavailable
		if !errors.As(err, &away) || ctx.Err() != nil || time.Now().Add(pause).After(deadline) {
			return v, err
		}
		select {
		case <-ctx.Done():
			return v, err
		case <-time.After(pause):
		}
	}
}
