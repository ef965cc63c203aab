package runner

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/journal"
)

// recordEntry is where the journal has a job's record before the evidence log has it.
const recordEntry = "record"

// keepRecord keeps a record that is about to be logged. There is one record of a job: an
// agent that comes after this one logs it, and makes no other.
func (a *Agent) keepRecord(ctx context.Context, j *Job, end journal.Job, unlogged []byte) {
	err := a.insist(ctx, j, func() error {
		// Where a full disk kept the end from being recorded, the next agent would know of another.
		if err := a.recordEnd(j, end); errors.Is(err, unix.ENOSPC) {
			return err
		}
		return a.Journal.Keep(ctx, j.id, recordEntry, unlogged)
	})
	if err != nil {
		a.log.ErrorContext(ctx, "keep the record", slog.String("job", j.id), slog.Any("error", err))
	}
}

// recordEnd records how the job ended, once.
func (a *Agent) recordEnd(j *Job, end journal.Job) error {
	if j.endRecorded {
		return nil
	}
	err := a.Values.conclude(j.id, j.digest, end)
	j.endRecorded = err == nil
	return err
}

// keptRecord returns the record that an agent before this one made of the job, if it is of
// this job and of this end; nil if there is none.
func (a *Agent) keptRecord(ctx context.Context, j *Job, end journal.Job) ([]byte, bundle.Statement) {
	var kept []byte
	err := a.Journal.Entry(ctx, j.id, recordEntry, &kept)
	if errors.Is(err, journal.ErrNotFound) {
		return nil, bundle.Statement{}
	}
	var st bundle.Statement
	if err == nil {
		st, err = recordOf(kept, j, end)
	}
	if err != nil {
		a.log.WarnContext(ctx, "the record that was kept is not used", slog.String("job", j.id), slog.Any("error", err))
		return nil, bundle.Statement{}
	}
	return kept, st
}

// recordOf reads a record that was kept: the journal decides nothing, so it must be one of
// this job, its plan and its end.
func recordOf(kept []byte, j *Job, end journal.Job) (bundle.Statement, error) {
	b, err := bundle.Parse(kept)
	if err != nil {
		return bundle.Statement{}, err
	}
	st, err := bundle.ParseStatement(b.Statement)
	if err != nil {
		return bundle.Statement{}, err
	}
	o := st.Outcome
	switch {
	case st.JobID != j.id || st.PlanDigest != j.digest:
		return bundle.Statement{}, fmt.Errorf("it is of job %.40q, plan %s", st.JobID, st.PlanDigest)
	case o.State != bundle.State(end.State) || o.Reason != end.Reason || o.ExitCode != end.ExitCode || o.Stage != bundle.Stage(end.Stage):
		return bundle.Statement{}, fmt.Errorf("it ends %s %s at %s with code %d, the job %s %s at %s with code %d", o.State, o.Reason, o.Stage, o.ExitCode, end.State, end.Reason, end.Stage, end.ExitCode)
	}
	return st, nil
}

// logRecord has the evidence log take the record and returns it with the log's word. To
// log it again changes nothing. With an error it returns the record without that word,
// which verification says.
func (a *Agent) logRecord(ctx context.Context, j *Job, unlogged []byte) ([]byte, error) {
	b, err := bundle.Parse(unlogged)
	if err != nil {
		return nil, err
	}
	token, entries, err := a.Broker.LogBundle(ctx, j.id, plan.Sum(b.Statement))
	if err != nil {
		return unlogged, fmt.Errorf("log bundle: %w", err)
	}
	logged := bundle.Log{Receipt: token, Entries: entries}
	// Without them verification says that they are not there yet.
	if p, err := a.Broker.Proofs(ctx, entries); err != nil {
		a.log.WarnContext(ctx, "no proofs in the bundle", slog.String("job", j.id), slog.Any("error", err))
	} else {
		logged.Checkpoint, logged.Proofs = p.Checkpoint, p.Hashes
	}
	return b.WithLog(logged)
}
