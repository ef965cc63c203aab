package runner

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/runner/journal"
)

// journalWithJob has one job that waits, with the id job.
func journalWithJob(t *testing.T) *journal.Journal {
	t.Helper()
	jnl, err := journal.Open(filepath.Join(t.TempDir(), "journal.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = jnl.Close() })
	if _, _, err := jnl.Submit(t.Context(), journal.Job{ID: "job", Name: "n", JobFile: []byte("f"), Plan: []byte("p"), State: journal.Queued, Submitted: time.Now()}); err != nil {
		t.Fatal(err)
	}
	return jnl
}

// An agent that takes up a job finds the countersignatures that the one before it got, and
// tells watchers of those alone that they do not know.
func TestCountersignaturesAreToldOnce(t *testing.T) {
	jnl := journalWithJob(t)
	a := &Agent{Deps: Deps{Journal: jnl}}
	for _, sealed := range []uint64{2, 3} {
		j := newJob("job", "user/ada")
		j.feed = newFeed("job", jnl)
		if err := a.replay(t.Context(), j); err != nil {
			t.Fatal(err)
		}
		for n := j.seen + 1; n <= sealed; n++ {
			a.tell(t.Context(), j, checkpointEvent(holdapi.Checkpoint{Sequence: n}, false))
		}
		// The broker answers for all but the newest.
		for n := range sealed - 1 {
			a.anchored(t.Context(), j, holdapi.Checkpoint{Sequence: n + 1})
		}
	}
	j := newJob("job", "user/ada")
	j.feed = newFeed("job", jnl)
	if err := a.replay(t.Context(), j); err != nil {
		t.Fatal(err)
	}
	var sealed, anchored []uint64
	events, _, _ := j.feed.after(0)
	for _, e := range events {
		if c := e.GetCheckpoint(); c.GetAnchored() {
			anchored = append(anchored, c.GetSequence())
		} else {
			sealed = append(sealed, c.GetSequence())
		}
	}
	if !slices.Equal(sealed, []uint64{1, 2, 3}) || !slices.Equal(anchored, []uint64{1, 2}) {
		t.Errorf("sealed %v, countersigned %v", sealed, anchored)
	}
}

// A job that is told to end while what an earlier start made of it is taken away ends for
// that reason, and all of it is taken away.
func TestToldToEndWhileItBeginsAgain(t *testing.T) {
	away := errors.New("containerd does not answer")
	for name, tt := range map[string]struct{ told, fails, want error }{
		"nobody tells it": {nil, nil, nil},
		"it is cancelled": {errCancelled, nil, errCancelled},
		"its gang failed": {fmt.Errorf("%w: job b", errGang), nil, errGang},
		"it stays":        {nil, away, away},
		"both":            {errCancelled, away, away},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			whole := false
			err := undisturbed(ctx, time.Minute, func(clean context.Context) error {
				if tt.told != nil {
					cancel(tt.told)
				}
				whole = clean.Err() == nil
				return tt.fails
			})
			if !errors.Is(err, tt.want) || !whole {
				t.Errorf("%v, undisturbed: %t", err, whole)
			}
		})
	}
}

// Whatever a cancelled call made of it, a job that is told to end says why it was.
func TestToldToEndIsTheReason(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errCancelled)
	a := &Agent{Deps: Deps{Log: slog.New(slog.DiscardHandler)}}
	a.log = a.Log
	for _, err := range []error{context.Canceled, fmt.Errorf("admit: %w", context.Canceled), errors.Join(errors.New("forget job"), context.Canceled)} {
		if end := a.outcome(ctx, newJob("a", "user/ada"), cause(ctx, err)); end.State != journal.Cancelled || end.Reason != "cancelled" {
			t.Errorf("%v: %s, %s", err, end.State, end.Reason)
		}
	}
}

// An agent can be killed between a start and the note of it: the job has started if its trace
// says so, and one that only came to its start has not.
func TestStartThatNobodyNoted(t *testing.T) {
	for name, tt := range map[string]struct {
		at      bundle.Stage
		started bool
		want    bool
	}{
		"the trace has its start":      {bundle.StageStart, true, true},
		"the trace has none":           {bundle.StageStart, false, false},
		"it had not come to its start": {bundle.StageDecrypt, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			jnl := journalWithJob(t)
			j := newJob("job", "user/ada")
			j.at, j.record.Releases = tt.at, []string{"released"}
			j.timeline = []bundle.Step{{Stage: bundle.StageDecrypt, StartUnixNano: 5, Nanos: 2, Outcome: bundle.StepDone}}
			holderThatPrinted(t, j, tt.started)
			a := &Agent{Deps: Deps{Journal: jnl}, log: slog.New(slog.DiscardHandler)}
			got, err := a.hadStarted(t.Context(), j)
			if err != nil || got != tt.want || j.started() != tt.want {
				t.Fatalf("started: %t, in its timeline: %t, %v", got, j.started(), err)
			}
			if tt.want && j.began() != time.Unix(0, 9) {
				t.Errorf("it began at %s", j.began())
			}
			var noted record
			if err := jnl.Entry(t.Context(), "job", string(bundle.StageStart), &noted); tt.want != (err == nil) || tt.want && len(noted.Releases) != 1 {
				t.Errorf("noted: %+v, %v", noted, err)
			}
			select {
			case <-j.gang.ready:
				if !tt.want {
					t.Error("its gang was told")
				}
			default:
				if tt.want {
					t.Error("its gang was not told")
				}
			}
		})
	}
}
