package host

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-plugin"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// TestWhoseDeadline is a plugin that notices a deadline before its host does.
func TestWhoseDeadline(t *testing.T) {
	early := func(context.Context) (int, error) { return 0, status.Error(codes.DeadlineExceeded, "late") }
	hurried, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	if _, err := bounded(hurried, &process{call: 2 * time.Hour}, early); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrTimeout) {
		t.Errorf("the caller's: %v", err)
	}
	for name, ctx := range map[string]context.Context{"a patient caller": t.Context(), "a caller with more time": hurried} {
		if _, err := bounded(ctx, &process{call: time.Minute}, early); !errors.Is(err, ErrTimeout) {
			t.Errorf("the plugin's own, %s: %v", name, err)
		}
	}
}

// TestEndedUnderACall is a plugin that is ended because of one call, while another
// is under way and its process is not gone yet.
func TestEndedUnderACall(t *testing.T) {
	cut := func(context.Context) (int, error) { return 0, status.Error(codes.Canceled, "closing") }
	ended := make(chan struct{})
	p := &process{client: &plugin.Client{}, ended: ended, call: time.Minute}
	if _, err := bounded(t.Context(), p, cut); err == nil || errors.Is(err, ErrDied) {
		t.Errorf("while nobody ended it: %v", err)
	}
	close(ended)
	if _, err := bounded(t.Context(), p, cut); !errors.Is(err, ErrDied) {
		t.Errorf("after it was ended: %v", err)
	}
}

// TestKeyStoreBackOffGrows is a plugin that dies at every start: its configuration
// has no checksum.
func TestKeyStoreBackOffGrows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &KeyStore{o: Options{BackOff: 20 * time.Millisecond, Log: slog.New(slog.DiscardHandler)}}
		k.life, k.end = context.WithCancel(t.Context())
		defer k.end()
		for _, wait := range []time.Duration{0, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 10240, 20480, 30000, 30000} {
			if wait *= time.Millisecond; wait > 0 {
				time.Sleep(wait - 1)
				if _, err := k.acquire(t.Context()); !errors.Is(err, ErrDied) {
					t.Errorf("a moment before %s are over: %v", wait, err)
				}
				time.Sleep(1)
			}
			if _, err := k.acquire(t.Context()); !errors.Is(err, ErrChecksum) || errors.Is(err, ErrDied) {
				t.Errorf("after %s: not started again: %v", wait, err)
			}
		}
	})
}
