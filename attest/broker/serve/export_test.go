package serve

import (
	"context"

	"zombiezen.com/go/sqlite"
	"zombiezen.com/go/sqlite/sqlitex"

	"github.com/coffer-run/coffer/attest/broker"
)

// WriterPragma reads a setting of the connection that writes.
func WriterPragma(_ context.Context, s *Store, name string) (v string, err error) {
	w := <-s.writer.pool.free
	defer func() { s.writer.pool.free <- w }()
	return v, sqlitex.ExecuteTransient(w.conn, `PRAGMA `+name, &sqlitex.ExecOptions{ResultFunc: func(s *sqlite.Stmt) error {
		v = s.ColumnText(0)
		return nil
	}})
}

// LimitPages lets the database grow by a few pages more.
func LimitPages(_ context.Context, s *Store) error {
	w := <-s.writer.pool.free
	defer func() { s.writer.pool.free <- w }()
	return run(w.conn, `PRAGMA max_page_count = 60`)
}

// Waiting is how many updates wait for their turn.
func Waiting(s *Store) int {
	s.writer.mu.Lock()
	defer s.writer.mu.Unlock()
	return len(s.writer.queue)
}

// EndTransaction rolls back the whole transaction that t is part of, as SQLite
// does by itself when the disk fails.
func EndTransaction(_ context.Context, t broker.Tx) error {
	return t.(*tx).do(qRollback)
}

// HandlerWithin lets a test wait less than a caller may take.
var HandlerWithin = handler
