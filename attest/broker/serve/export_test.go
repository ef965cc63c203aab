package serve

import "context"

// WriterPragma reads a setting of the connection that writes.
func WriterPragma(ctx context.Context, s *Store, name string) (v string, err error) {
	err = s.writer.db.QueryRowContext(ctx, `PRAGMA `+name).Scan(&v)
	return v, err
}

// LimitPages lets the database grow by a few pages more.
func LimitPages(ctx context.Context, s *Store) error {
	_, err := s.writer.db.ExecContext(ctx, `PRAGMA max_page_count = 60`)
	return err
}

// HandlerWithin lets a test wait less than a caller may take.
var HandlerWithin = handler
