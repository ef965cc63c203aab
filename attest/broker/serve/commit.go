package serve

import (
	"context"
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

// view runs f on one state of the database.
func (p *pool) view(ctx context.Context, f func(context.Context, *tx) error) error {
	s, err := p.take(ctx, qRead)
	if err != nil {
		return err
	}
	// A transaction that only read has nothing to lose, however it ends.
	defer func() { _ = p.give(s, qRollback) }()
	if err := f(ctx, &tx{s}); err != nil {
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

// peek runs f on the connection that writes, if nobody has the turn, and reports
// whether it did. What that connection has cached is up to date, where one that reads
// fetches anew every page that changed.
func (w *writer) peek(ctx context.Context, f func(context.Context, *tx) error) (bool, error) {
	w.mu.Lock()
	busy := w.busy
	w.busy = true
	w.mu.Unlock()
	if busy {
		return false, nil
	}
	defer w.pass(nil)
	return true, w.pool.view(ctx, f)
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
		w.finish(t, err)
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
		if err := t.s.do(qSavepoint); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := f(ctx, &tx{t.s}); err != nil {
		return err
	}
	return ctx.Err()
}

// finish keeps or undoes what one update did, and returns once the transaction
// that it is part of is over: committed by this caller or by a later one.
func (w *writer) finish(t *together, failed error) {
	switch {
	case !t.shared:
		t.lost = failed
	case failed != nil:
		t.lost = errors.Join(t.s.do(qUndo), t.s.do(qKeep))
	default:
		// A statement that found the disk full or broken may have ended the whole
		// transaction (sqlite.org/lang_transaction.html, section 3): then there is
		// no savepoint to release.
		t.lost = t.s.do(qKeep)
	}
	if t.shared && t.lost == nil && t.count < maxTogether && w.pass(t) {
		<-t.done
		return
	}
	if t.err = t.lost; t.err == nil {
		t.err = w.pool.give(t.s, qCommit)
	} else {
		_ = w.pool.give(t.s, qRollback) // or by closing the connection
	}
	close(t.done)
	w.pass(nil)
}
