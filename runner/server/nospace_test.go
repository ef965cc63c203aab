package server

import (
	"errors"
	"fmt"
	"testing"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
)

// Who submits a job to a node with a full disk is told to come back.
func TestNoSpaceIsForLater(t *testing.T) {
	var got *connect.Error
	err := coded(fmt.Errorf("keep submission: %w", unix.ENOSPC))
	if !errors.As(err, &got) || got.Code() != connect.CodeResourceExhausted || got.Meta().Get("Retry-After") != retryFull {
		t.Errorf("%v", err)
	}
	if err := coded(fmt.Errorf("keep submission: %w", unix.EIO)); connect.CodeOf(err) == connect.CodeResourceExhausted {
		t.Errorf("%v", err)
	}
}
