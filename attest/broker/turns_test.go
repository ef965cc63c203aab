package broker

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestTurnsAreInTheOrderOfAsking(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turns := make(turns, 1)
		var mu sync.Mutex
		var begun []int
		want := func(l ...int) {
			t.Helper()
			mu.Lock()
			defer mu.Unlock()
			if !slices.Equal(begun, l) {
				t.Errorf("%v begun, want %v", begun, l)
			}
		}
		for i := range 4 {
			go func() {
				if err := turns.do(t.Context(), func() error {
					mu.Lock()
					begun = append(begun, i)
					mu.Unlock()
					time.Sleep(time.Second)
					return nil
				}); err != nil {
					t.Error(err)
				}
			}()
			synctest.Wait()
		}
		want(0)
		// Whoever gives up leaves no turn behind.
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if err := turns.do(ctx, func() error { return nil }); !errors.Is(err, ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		time.Sleep(5 * time.Second)
		if want(0, 1, 2, 3); len(turns) != 0 {
			t.Errorf("%d turns were kept", len(turns))
		}
	})
}
