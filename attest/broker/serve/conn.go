package serve

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"zombiezen.com/go/sqlite"
	"zombiezen.com/go/sqlite/sqlitex"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/plan"
)

// session is one connection with the statements prepared on it. It is in no
// transaction while nobody has it.
type session struct {
	conn  *sqlite.Conn
	stmts map[string]*sqlite.Stmt
}

// do runs one of the statements without parameters to its end.
func (s *session) do(q string) error {
	_, err := s.stmts[q].Step()
	return err
}

// discard closes the connection, by which SQLite rolls back what is open on it
// (sqlite.org/c3ref/close.html).
func (s *session) discard() {
	_ = s.conn.Close()
	s.conn, s.stmts = nil, nil
}

// open connects to the database at path, runs pragmas and prepares queries.
func (s *session) open(path string, pragmas, queries []string) (err error) {
	// Not OpenURI: the path may have any letters.
	s.conn, err = sqlite.OpenConn(path, sqlite.OpenReadWrite)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			s.discard()
		}
	}()
	s.conn.SetBusyTimeout(busyTimeout)
	for _, p := range pragmas {
		if err := run(s.conn, "PRAGMA "+p); err != nil {
			return fmt.Errorf("pragma %s: %w", p, err)
		}
	}
	s.stmts = make(map[string]*sqlite.Stmt, len(queries))
	for _, q := range queries {
		if s.stmts[q], err = s.conn.Prepare(q); err != nil {
			return err
		}
	}
	return nil
}

// run runs one statement to its end.
func run(conn *sqlite.Conn, q string) error { return sqlitex.ExecuteTransient(conn, q, nil) }

// pool is sessions over one database, opened when they are first needed.
type pool struct {
	path             string
	pragmas, queries []string
	free             chan *session
	closed           atomic.Bool
}

func newPool(path string, conns int, queries, pragmas []string) *pool {
	p := &pool{path: path, pragmas: pragmas, queries: queries, free: make(chan *session, conns)}
	for range conns {
		p.free <- &session{}
	}
	return p
}

// take waits for a session and begins a transaction on it.
func (p *pool) take(ctx context.Context, begin string) (*session, error) {
	var s *session
	select {
	case s = <-p.free:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if err := p.begin(ctx, s, begin); err != nil {
		p.free <- s
		return nil, fmt.Errorf("begin: %w", err)
	}
	return s, nil
}

// begin begins a transaction. It waits for another process's lock itself, because
// SQLite would not see that ctx ends.
func (p *pool) begin(ctx context.Context, s *session, how string) error {
	if p.closed.Load() {
		return errors.New("database is closed")
	}
	if s.conn == nil {
		if err := s.open(p.path, p.pragmas, p.queries); err != nil {
			return err
		}
	}
	s.conn.SetBusyTimeout(0)
	defer s.conn.SetBusyTimeout(busyTimeout)
	until := time.Now().Add(busyTimeout)
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		err := s.do(how)
		if sqlite.ErrCode(err).ToPrimary() != sqlite.ResultBusy || time.Now().After(until) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
}

// give ends the transaction by how and gives the session back.
func (p *pool) give(s *session, how string) error {
	err := s.do(how)
	if err != nil {
		s.discard()
	}
	p.free <- s
	return err
}

// check opens one session, so that what is wrong with the database shows.
func (p *pool) check(ctx context.Context, begin string) error {
	s, err := p.take(ctx, begin)
	if err != nil {
		return err
	}
	return p.give(s, qRollback)
}

// close waits until no session is in use.
func (p *pool) close() error {
	p.closed.Store(true)
	var errs []error
	for range cap(p.free) {
		s := <-p.free
		if s.conn != nil {
			errs = append(errs, s.conn.Close())
		}
		// Left for whoever comes late, who finds the pool closed.
		defer func() { p.free <- &session{} }()
	}
	return errors.Join(errs...)
}

// tx is the statements of a session in a transaction. Each runs to its end, a
// matter of microseconds: SQLite answers an interrupted one by undoing the whole
// transaction (sqlite.org/c3ref/interrupt.html), which others may share. Whether
// the caller is still there is asked between them.
type tx struct{ *session }

// row is the first row of an answer. Its Scan must be called.
type row struct {
	stmt *sqlite.Stmt
	err  error
}

// row runs a query that has one row, or none, which Scan reports as
// broker.ErrNotFound.
func (t *tx) row(ctx context.Context, q string, args ...any) row {
	stmt, err := t.bound(ctx, q, args)
	if err != nil {
		return row{err: err}
	}
	switch more, err := stmt.Step(); {
	case err != nil:
		return row{err: mapped(err)}
	case !more:
		return row{err: broker.ErrNotFound}
	}
	return row{stmt: stmt}
}

// Scan reads the row's columns into what dest points to, and is done with it.
func (r row) Scan(dest ...any) error {
	if r.err != nil {
		return r.err
	}
	return errors.Join(columns{r.stmt}.Scan(dest...), r.stmt.Reset())
}

// exec runs a statement that changes one row.
func (t *tx) exec(ctx context.Context, q string, args ...any) error {
	stmt, err := t.bound(ctx, q, args)
	if err != nil {
		return err
	}
	if _, err := stmt.Step(); err != nil {
		return mapped(err)
	}
	if n := t.conn.Changes(); n != 1 {
		return fmt.Errorf("%w: %d rows changed", broker.ErrNotFound, n)
	}
	return nil
}

func list[T any](ctx context.Context, t *tx, scan func(scanner) (T, error), q string, args ...any) (out []T, err error) {
	stmt, err := t.bound(ctx, q, args)
	if err != nil {
		return nil, err
	}
	for {
		more, err := stmt.Step()
		if err != nil {
			return nil, mapped(err)
		}
		if !more {
			return out, nil
		}
		v, err := scan(columns{stmt})
		if err != nil {
			return nil, errors.Join(err, stmt.Reset())
		}
		out = append(out, v)
	}
}

// bound returns a statement that is ready to run. All its parameters are bound
// anew, so that none is left from the last time.
func (t *tx) bound(ctx context.Context, q string, args []any) (*sqlite.Stmt, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	stmt := t.stmts[q]
	if err := stmt.Reset(); err != nil {
		return nil, err
	}
	if n := stmt.BindParamCount(); n != len(args) {
		return nil, fmt.Errorf("%d values for %d parameters of %q", len(args), n, q)
	}
	for i, a := range args {
		if err := bind(stmt, i+1, a); err != nil {
			return nil, err
		}
	}
	return stmt, nil
}

func bind(stmt *sqlite.Stmt, i int, arg any) error {
	switch a := arg.(type) {
	case string:
		stmt.BindText(i, a)
	case int:
		stmt.BindInt64(i, int64(a))
	case int64:
		stmt.BindInt64(i, a)
	case bool:
		stmt.BindBool(i, a)
	case []byte:
		if a == nil {
			stmt.BindNull(i)
			return nil
		}
		stmt.BindBytes(i, a)
	case instant:
		if a.t.IsZero() {
			stmt.BindNull(i)
			return nil
		}
		stmt.BindInt64(i, a.t.Unix())
	case jsonText:
		b, err := json.Marshal(a.v)
		if err != nil {
			return err
		}
		stmt.BindText(i, string(b))
	default:
		return fmt.Errorf("parameter %d is a %T", i, arg)
	}
	return nil
}

type scanner interface{ Scan(dest ...any) error }

// columns are those of the row that a statement is at.
type columns struct{ stmt *sqlite.Stmt }

// Scan copies every column. A value of another type than what is to hold it is an
// error, NULL too: SQLite itself would make one of the other.
func (c columns) Scan(dest ...any) error {
	if n := c.stmt.ColumnCount(); n != len(dest) {
		return fmt.Errorf("%d columns for %d values", n, len(dest))
	}
	for i, d := range dest {
		if err := c.scan(i, d); err != nil {
			return fmt.Errorf("column %d: %w", i, err)
		}
	}
	return nil
}

func (c columns) scan(i int, dest any) (err error) {
	switch d := dest.(type) {
	case *string:
		*d, err = c.text(i)
	case *plan.Digest:
		var s string
		s, err = c.text(i)
		*d = plan.Digest(s)
	case *broker.Kind:
		var s string
		s, err = c.text(i)
		*d = broker.Kind(s)
	case *broker.RevocationKind:
		var s string
		s, err = c.text(i)
		*d = broker.RevocationKind(s)
	case *int64:
		*d, err = c.integer(i)
	case *int:
		var n int64
		n, err = c.integer(i)
		*d = int(n)
	case *uint64:
		var n int64
		if n, err = c.integer(i); n < 0 {
			return fmt.Errorf("holds %d", n)
		}
		*d = uint64(n)
	case *bool:
		var n int64
		if n, err = c.integer(i); n != 0 && n != 1 {
			return fmt.Errorf("holds %d", n)
		}
		*d = n == 1
	case *[]byte:
		if err := c.is(i, sqlite.TypeBlob); err != nil {
			return err
		}
		*d = make([]byte, c.stmt.ColumnLen(i))
		c.stmt.ColumnBytes(i, *d)
	case instant:
		*d.t = time.Time{}
		if c.stmt.ColumnIsNull(i) {
			return nil
		}
		var n int64
		if n, err = c.integer(i); err == nil {
			*d.t = time.Unix(n, 0).UTC()
		}
	case jsonText:
		var s string
		if s, err = c.text(i); err == nil {
			err = json.Unmarshal([]byte(s), d.v)
		}
	default:
		return fmt.Errorf("is read into a %T", dest)
	}
	return err
}

func (c columns) is(i int, want sqlite.ColumnType) error {
	if got := c.stmt.ColumnType(i); got != want {
		return fmt.Errorf("holds %v, want %v", got, want)
	}
	return nil
}

func (c columns) text(i int) (string, error) {
	if err := c.is(i, sqlite.TypeText); err != nil {
		return "", err
	}
	return c.stmt.ColumnText(i), nil
}

func (c columns) integer(i int) (int64, error) {
	if err := c.is(i, sqlite.TypeInteger); err != nil {
		return 0, err
	}
	return c.stmt.ColumnInt64(i), nil
}

// jsonText keeps a list or a small document in a column of its own.
type jsonText struct{ v any }

// instant is a time in seconds since 1970, the zero time as NULL.
type instant struct{ t *time.Time }

// blob keeps nil from becoming NULL.
func blob(b []byte) []byte { return append([]byte{}, b...) }

// mapped turns what a broker reacts to into its sentinels.
func mapped(err error) error {
	code := sqlite.ErrCode(err)
	if code == sqlite.ResultConstraintPrimaryKey || code == sqlite.ResultConstraintUnique || code == sqlite.ResultConstraintRowID {
		return broker.ErrExists
	}
	return err
}
