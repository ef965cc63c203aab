package runner

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/coffer-run/coffer/runner/journal"
)

// firstInsist and lastInsist bound the pause between two tries, which doubles.
const firstInsist, lastInsist = 100 * time.Millisecond, 5 * time.Second

// insist tries to give a job its last word until the journal has it: on a full disk,
// a job that has ended must not stay one that runs. The end of the agent ends the
// tries; the next one concludes the job.
func (a *Agent) insist(ctx context.Context, j *Job, write func() error) error {
	for pause := firstInsist; ; pause = min(2*pause, lastInsist) {
		err := write()
		if err == nil || errors.Is(err, journal.ErrConflict) || errors.Is(err, journal.ErrNotFound) {
			return err
		}
		a.log.WarnContext(ctx, "the end of a job waits for the journal", slog.String("job", j.id), slog.Any("error", err), slog.Duration("retry", pause))
		select {
		case <-a.ctx.Done():
			return err
		case <-time.After(pause):
		}
	}
}

// settleFor bounds how long a job that has ended waits for its last events to be written.
const settleFor = time.Minute

// settleEvents writes what a full disk kept out of the journal. How the job ended is in
// there; this is how it came to that.
func (a *Agent) settleEvents(ctx context.Context, j *Job) {
	began := time.Now()
	for pause := firstInsist; ; pause = min(2*pause, lastInsist) {
		err := j.feed.settle(ctx)
		if err == nil {
			return
		}
		if time.Since(began) > settleFor {
			a.log.ErrorContext(ctx, "the journal lacks events", slog.String("job", j.id), slog.Any("error", err))
			return
		}
		select {
		case <-a.ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}
