package serve

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"sync"
)

const (
	qRead      = `BEGIN`
	qWrite     = `BEGIN IMMEDIATE`
	qCommit    = `COMMIT`
	qRollback  = `ROLLBACK`
	qSavepoint = `SAVEPOINT member`
	qKeep      = `RELEASE member`
	qUndo      = `ROLLBACK TO member`

	// maxTogether bounds the updates of one transaction, so that the first does
	// not wait long for its answer.
	maxTogether = 32
)

// session is one connection with the statements prepared on it. It is in no
// transaction while nobody has it.
type session struct {
	conn  *sql.Conn
	stmts map[string]*sql.Stmt
}

// exec runs one of the statements above to its end.
func (s *session) exec(ctx context.Context, q string) error {
	_, err := s.stmts[q].ExecContext(ctx)
	return err
}

// discard closes the connection, by which SQLite rolls back what is open on it
// (sqlite.org/c3ref/close.html).
func (s *session) discard() {
	_ = s.conn.Raw(func(any) error { return driver.ErrBadConn }) // closes it, and returns this
	_ = s.conn.Close()
	s.conn, s.stmts = nil, nil
}

// pool is sessions over one database, opened when they are first needed.
type pool struct {
	db      *sql.DB
	queries []string
	free    chan *session
}

// take waits for a session and begins a transaction on it.
func (p *pool) take(ctx context.Context, begin string) (*session, error) {
	var s *session
	select {
	case s = <-p.free:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	err := p.ready(ctx, s)
	if err == nil {
		err = s.exec(ctx, begin)
	}
	if err != nil {
		// A wait that ctx ended may have begun the transaction all the same.
		if s.conn != nil {
			s.discard()
		}
		p.free <- s
		return nil, fmt.Errorf("begin: %w", err)
	}
	return s, nil
}

func (p *pool) ready(ctx context.Context, s *session) error {
	if s.conn != nil {
		return nil
	}
	conn, err := p.db.Conn(ctx)
	if err != nil {
		return err
	}
	s.conn, s.stmts = conn, make(map[string]*sql.Stmt, len(p.queries))
	for _, q := range p.queries {
		if s.stmts[q], err = conn.PrepareContext(ctx, q); err != nil {
			return fmt.Errorf("prepare %q: %w", q, err)
		}
	}
	return nil
}

// give ends the transaction by how and gives the session back.
func (p *pool) give(ctx context.Context, s *session, how string) error {
	err := s.exec(context.WithoutCancel(ctx), how)
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
	return p.give(ctx, s, qRollback)
}

// close waits until no session is in use.
func (p *pool) close() error {
	var errs []error
	for range cap(p.free) {
		s := <-p.free
		if s.conn != nil {
			errs = append(errs, s.conn.Close())
		}
		// Left for whoever comes late: the database says that it is closed.
		defer func() { p.free <- &session{} }()
	}
	return errors.Join(append(errs, p.db.Close())...)
}

// view runs f on one state of the database.
func (p *pool) view(ctx context.Context, f func(context.Context, *tx) error) error {
	s, err := p.take(ctx, qRead)
	if err != nil {
		return err
	}
	// A transaction that only read has nothing to lose, however it ends.
	defer func() { _ = p.give(ctx, s, qRollback) }()
	if err := f(ctx, &tx{stmts: s.stmts}); err != nil {
		return err
	}
	return ctx.Err()
}

// writer runs updates one after the other. Those that wait for their turn while
// another runs are committed together with it: each is a savepoint of one
// transaction (sqlite.org/lang_savepoint.html), is undone alone if it fails, and
// is answered after the commit, which all of them share with its sync to disk.
type writer struct {
	pool *pool

	mu    sync.Mutex // guards what follows
	busy  bool       // somebody has the turn
	queue []chan struct{}

	open *together // of whoever has the turn
}

// together is the updates of one transaction.
type together struct {
	s *session
	// shared is whether each is in a savepoint. An update that nobody waits
	// behind goes without, and alone.
	shared bool
	count  int
	// lost is why the transaction cannot be committed.
	lost error
	// done is closed once err says how the commit went.
	done chan struct{}
	err  error
}

// turn waits until the caller may update. Turns are in the order of asking.
func (w *writer) turn(ctx context.Context) error {
	w.mu.Lock()
	if !w.busy {
		w.busy = true
		w.mu.Unlock()
		return nil
	}
	mine := make(chan struct{}, 1)
	w.queue = append(w.queue, mine)
	w.mu.Unlock()
	select {
	case <-mine:
		return nil
	case <-ctx.Done():
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, c := range w.queue {
		if c == mine {
			w.queue = append(w.queue[:i], w.queue[i+1:]...)
			return ctx.Err()
		}
	}
	// The turn came meanwhile: it is taken, because nobody else has it.
	return nil
}

// pass gives the turn to the next, with t if the next is to join it. It reports
// whether there is one that joins; without a t nobody need be there.
func (w *writer) pass(t *together) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.queue) == 0 {
		w.busy = t != nil
		return false
	}
	w.open = t
	w.queue[0] <- struct{}{}
	w.queue = w.queue[1:]
	return true
}

func (w *writer) waited() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.queue) > 0
}

// update implements Store.Update.
func (w *writer) update(ctx context.Context, f func(context.Context, *tx) error) (err error) {
	if err := w.turn(ctx); err != nil {
		return err
	}
	t := w.open
	w.open = nil
	if t == nil {
		s, err := w.pool.take(ctx, qWrite)
		if err != nil {
			w.pass(nil)
			return err
		}
		t = &together{s: s, shared: w.waited(), done: make(chan struct{})}
	}
	// Deferred, because f may panic: the turn must go on, and others' updates with it.
	err = errors.New("update did not return")
	defer func() {
		w.finish(ctx, t, err)
		// Whatever f found may have been another's update that was not to be.
		if t.err != nil && (t.shared || err == nil) {
			err = fmt.Errorf("commit: %w", t.err)
		}
	}()
	return t.run(ctx, f)
}

func (t *together) run(ctx context.Context, f func(context.Context, *tx) error) error {
	t.count++
	if t.shared {
		if err := t.s.exec(context.WithoutCancel(ctx), qSavepoint); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := f(ctx, &tx{stmts: t.s.stmts}); err != nil {
		return err
	}
	return ctx.Err()
}

// finish keeps or undoes what one update did, and returns once the transaction
// that it is part of is over: committed by this caller or by a later one.
func (w *writer) finish(ctx context.Context, t *together, failed error) {
	ctx = context.WithoutCancel(ctx)
	switch {
	case !t.shared:
		t.lost = failed
	case failed != nil:
		t.lost = errors.Join(t.s.exec(ctx, qUndo), t.s.exec(ctx, qKeep))
	default:
		// A statement that found the disk full or broken may have ended the whole
		// transaction (sqlite.org/lang_transaction.html, section 3): then there is
		// no savepoint to release.
		t.lost = t.s.exec(ctx, qKeep)
	}
	if t.shared && t.lost == nil && t.count < maxTogether && w.pass(t) {
		<-t.done
		return
	}
	if t.err = t.lost; t.err == nil {
		t.err = w.pool.give(ctx, t.s, qCommit)
	} else {
		_ = w.pool.give(ctx, t.s, qRollback) // or by closing the connection
	}
	close(t.done)
	w.pass(nil)
}
