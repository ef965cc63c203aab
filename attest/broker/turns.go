package broker

import (
	"context"
	"fmt"
	"runtime"
)

// turns lets as many releases compute at once as there are processors, first come,
// first served. Go gives each of many goroutines 10 ms of a processor at a time: a
// release of 3 ms that is interrupted would wait for a slice of every other one,
// while those that came later pass it. Nothing that waits for others, as a key store
// or the database, is done in a turn.
type turns chan struct{}

func newTurns() turns { return make(turns, runtime.GOMAXPROCS(0)) }

// do waits for a turn and calls f. It is ErrUnavailable if ctx ends first.
func (t turns) do(ctx context.Context, f func() error) error {
	select {
	case t <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("%w: wait for other releases: %w", ErrUnavailable, ctx.Err())
	}
	defer func() { <-t }()
	return f()
}
