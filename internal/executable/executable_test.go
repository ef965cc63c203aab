package executable_test

import (
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/coffer-run/coffer/internal/executable"
)

func TestWriteWhileOthersStart(t *testing.T) {
	done := make(chan struct{})
	var others sync.WaitGroup
	defer others.Wait()
	defer close(done)
	for range 4 {
		others.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
					_ = exec.Command("/bin/true").Run()
				}
			}
		})
	}
	path := filepath.Join(t.TempDir(), "program")
	for i := range 100 {
		if err := executable.Write(path, []byte("#!/bin/sh\n")); err != nil {
			t.Fatal(err)
		}
		if err := exec.CommandContext(t.Context(), path).Run(); err != nil {
			t.Fatalf("after %d times: %v", i, err)
		}
	}
}
