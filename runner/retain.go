package runner

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/runner/journal"
)

const (
	// sweepEvery is how often the agent looks for records whose time is over.
	sweepEvery = time.Hour
	sweepPage  = 100
)

// keepUntil is when the record of a job that ended may be removed; zero is never.
func (j *Job) keepUntil(ended time.Time) time.Time {
	if j.plan.Evidence == nil {
		return time.Time{}
	}
	return ended.Add(time.Duration(j.plan.Evidence.RetainSeconds) * time.Second)
}

// sweeps removes records whose time is over, until ctx ends.
func (a *Agent) sweeps(ctx context.Context) {
	for {
		if err := a.sweep(ctx, time.Now()); err != nil && ctx.Err() == nil {
			a.log.WarnContext(ctx, "remove records whose time is over", slog.Any("error", err))
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(sweepEvery):
		}
	}
}

// sweep removes bundle and log of the jobs whose time was over at now. One that
// cannot be removed keeps no other.
func (a *Agent) sweep(ctx context.Context, now time.Time) error {
	var errs []error
	for after := ""; ; {
		due, err := a.Journal.Due(ctx, now, after, sweepPage)
		if err != nil || len(due) == 0 {
			return errors.Join(append(errs, err)...)
		}
		for _, id := range due {
			if err := a.forget(ctx, id); err != nil {
				errs = append(errs, fmt.Errorf("job %s: %w", id, err))
			}
			after = id
		}
	}
}

// forget removes a job's bundle and log, if the evidence log has an entry of the
// bundle: until then the bundle is the only record of the job.
func (a *Agent) forget(ctx context.Context, id string) error {
	body, err := a.Journal.Bundle(ctx, id)
	if errors.Is(err, journal.ErrNotFound) {
		return errors.New("its log stays: there is no bundle that would be logged")
	}
	if err != nil {
		return err
	}
	b, err := bundle.Parse(body)
	if err != nil {
		return err
	}
	if b.Log == nil || b.Log.Receipt == "" {
		return errors.New("its record stays: the evidence log has no entry of it")
	}
	// The log first: what is left over after a crash is found again by its bundle.
	if a.Logs != nil {
		if err := a.Logs.Remove(id); err != nil {
			return err
		}
	}
	if err := a.Journal.RemoveBundle(ctx, id); err != nil {
		return err
	}
	a.log.InfoContext(ctx, "the time of a record is over: bundle and log are removed", slog.String("job", id))
	return nil
}
