package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/coffer-run/coffer/attest/broker"
)

// disabledEvery is how often key stores are asked for keys that their owners
// disabled, of running jobs whose assets' policies say that they stop then.
const disabledEvery = 2 * time.Second

// watching stops such jobs until stop. A store that does not answer is logged once
// until it answers again.
func watching(ctx context.Context, b *broker.Broker, log *slog.Logger) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		said := false
		for {
			jobs, err := b.StopDisabled(ctx)
			switch {
			case ctx.Err() != nil:
				return
			case err != nil && !said:
				log.LogAttrs(ctx, slog.LevelError, "cannot tell whether keys of running jobs are disabled", slog.Any("error", err))
			case len(jobs) > 0:
				log.LogAttrs(ctx, slog.LevelWarn, "jobs are told to stop: a key was disabled", slog.Any("jobs", jobs))
			}
			said = err != nil
			select {
			case <-time.After(disabledEvery):
			case <-ctx.Done():
				return
			}
		}
	}()
	return func() {
		cancel()
		<-done
	}
}
