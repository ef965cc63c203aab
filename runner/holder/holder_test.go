package holder

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/coffer-run/coffer/internal/executable"
)

// A job that is told to end while its holder starts is cancelled, and no failure:
// the error must say that the context was.
func TestCancelledWhileItStarts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("root is needed: a holder gets a network namespace")
	}
	dir := t.TempDir()
	mute := filepath.Join(dir, "mute")
	if err := executable.Write(mute, []byte("#!/bin/sh\nexec sleep 60\n")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	_, err := Start(ctx, Config{
		Path: mute, RunDir: dir, JobID: "01JD3V8QK5W2M7N4P6R8S0T1V3",
		Join:  func(int) error { cancel(); return nil },
		Procs: func() (*os.File, error) { return os.Open(os.DevNull) },
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}
