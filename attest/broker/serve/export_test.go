package serve

import (
	"context"

	"github.com/coffer-run/coffer/attest/broker"
)

// WriterPragma reads a setting of the connection that writes.
func WriterPragma(ctx context.Context, s *Store, name string) (v string, err error) {
	w := <-s.writer.pool.free
	defer func() { s.writer.pool.free <- w }()
	err = w.conn.QueryRowContext(ctx, `PRAGMA `+name).Scan(&v)
	return v, err
}

// LimitPages lets the database grow by a few pages more.
func LimitPages(ctx context.Context, s *Store) error {
	w := <-s.writer.pool.free
	defer func() { s.writer.pool.free <- w }()
	_, err := w.conn.ExecContext(ctx, `PRAGMA max_page_count = 60`)
	return err
}

// Waiting is how many updates wait for their turn.
func Waiting(s *Store) int {
	s.writer.mu.Lock()
	defer s.writer.mu.Unlock()
	return len(s.writer.queue)
}

// EndTransaction rolls back the whole transaction that t is part of, as SQLite
// does by itself when the disk fails.
func EndTransaction(ctx context.Context, t broker.Tx) error {
	_, err := t.(*tx).stmts[qRollback].ExecContext(ctx)
	return err
}

// HandlerWithin lets a test wait less than a caller may take.
var HandlerWithin = handler
