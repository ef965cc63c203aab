package netns

import (
	"errors"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// The process's first thread outlives whatever ran on it, and would keep the namespace that
// it was in.
func TestFirstThreadStays(t *testing.T) {
	failed := errors.New("f failed")
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 100 {
				if err := onThread(func() error {
					if unix.Gettid() == unix.Getpid() {
						t.Error("f runs on the first thread")
					}
					return failed
				}); !errors.Is(err, failed) {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
}
