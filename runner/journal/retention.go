package journal

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"
)

// ErrRemoved is ErrNotFound of a record that was there.
var ErrRemoved = fmt.Errorf("it was removed when the time was over for which its job file asked to retain it: %w", ErrNotFound)

// Due returns up to limit jobs whose record may be removed at a time, in the order
// of their ids from the first after one on.
func (j *Journal) Due(ctx context.Context, now time.Time, after string, limit int) ([]string, error) {
	rows, err := j.read.QueryContext(ctx, "SELECT job FROM retention WHERE removed = 0 AND until <= ? AND job > ? ORDER BY job LIMIT ?", now.UnixNano(), after, limit)
	if err != nil {
		return nil, fmt.Errorf("read journal: %w", err)
	}
	defer rows.Close()
	var out []string
	for rows.Next() {
		var id string
		if err := rows.Scan(&id); err != nil {
			return nil, fmt.Errorf("read journal: %w", err)
		}
		out = append(out, id)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read journal: %w", err)
	}
	return out, nil
}

// RemoveBundle removes the bundle of a job that has an end to its retention, and
// notes that it was there.
func (j *Journal) RemoveBundle(ctx context.Context, id string) error {
	tx, err := j.db.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("remove bundle of job %s: %w", id, err)
	}
	defer tx.Rollback() //nolint:errcheck // no effect after a commit
	if err := j.update(ctx, tx, id, "UPDATE retention SET removed = 1 WHERE job = ? AND removed = 0", id); err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, "DELETE FROM bundles WHERE job = ?", id); err != nil {
		return fmt.Errorf("remove bundle of job %s: %w", id, err)
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("remove bundle of job %s: %w", id, err)
	}
	return nil
}

// noBundle says why a job has no bundle.
func (j *Journal) noBundle(ctx context.Context, id string) error {
	var removed bool
	err := j.read.QueryRowContext(ctx, "SELECT removed FROM retention WHERE job = ?", id).Scan(&removed)
	switch {
	case err == nil && removed:
		return ErrRemoved
	case err == nil || errors.Is(err, sql.ErrNoRows):
		return ErrNotFound
	}
	return fmt.Errorf("read journal: %w", err)
}
