package serve_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/broker/serve"
)

func names(t *testing.T, s *serve.Store) map[string]bool {
	t.Helper()
	out := map[string]bool{}
	if err := s.View(t.Context(), func(ctx context.Context, r broker.Reader) error {
		all, err := r.Assets(ctx, 1000)
		for _, a := range all {
			out[a.Name] = true
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	return out
}

// together runs fs as updates that all wait behind one that is held until they
// do, and returns what each returned.
func together(t *testing.T, s *serve.Store, ctxs []context.Context, fs []func(context.Context, broker.Tx) error) []error {
	t.Helper()
	errs := make([]error, len(fs))
	started, free := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.Update(t.Context(), func(context.Context, broker.Tx) error {
			close(started)
			<-free
			return nil
		}); err != nil {
			t.Error(err)
		}
	})
	<-started
	for i, f := range fs {
		wg.Go(func() {
			defer func() {
				if p := recover(); p != nil {
					errs[i] = fmt.Errorf("panic: %v", p)
				}
			}()
			errs[i] = s.Update(ctxs[i], f)
		})
		// Turns are in the order of asking.
		for serve.Waiting(s) <= i {
			runtime.Gosched()
		}
	}
	close(free)
	wg.Wait()
	return errs
}

func insert(name string, size int) func(context.Context, broker.Tx) error {
	return func(ctx context.Context, tx broker.Tx) error {
		return tx.InsertAsset(ctx, broker.Asset{Name: name, Wrapped: make([]byte, size)})
	}
}

func all(ctx context.Context, n int) []context.Context {
	out := make([]context.Context, n)
	for i := range out {
		out[i] = ctx
	}
	return out
}

// TestUpdatesShareACommit: what fails among updates that commit together is
// undone alone, and nobody sees or is told of any before the commit.
func TestUpdatesShareACommit(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "broker.db"))
	refused := errors.New("refused")
	cancelled, cancel := context.WithCancel(t.Context())
	ctxs := all(t.Context(), 7)
	ctxs[3] = cancelled
	shared := false
	errs := together(t, s, ctxs, []func(context.Context, broker.Tx) error{
		insert("a", 1),
		func(ctx context.Context, tx broker.Tx) error {
			return errors.Join(insert("refused", 1)(ctx, tx), refused)
		},
		func(ctx context.Context, tx broker.Tx) error {
			if err := insert("panics", 1)(ctx, tx); err != nil {
				t.Error(err)
			}
			panic("no")
		},
		func(ctx context.Context, tx broker.Tx) error {
			err := insert("cancelled", 1)(ctx, tx)
			cancel()
			return err
		},
		func(ctx context.Context, tx broker.Tx) error {
			if _, err := tx.Asset(ctx, "a"); err != nil {
				t.Errorf("the update before is not seen: %v", err)
			}
			shared = !names(t, s)["a"]
			for _, gone := range []string{"refused", "panics", "cancelled"} {
				if _, err := tx.Asset(ctx, gone); !errors.Is(err, broker.ErrNotFound) {
					t.Errorf("%s: %v", gone, err)
				}
			}
			return nil
		},
		insert("a", 1),
		insert("b", 1),
	})
	if !shared {
		t.Error("an update was committed before one that waited with it")
	}
	if errs[0] != nil || errs[4] != nil || errs[6] != nil {
		t.Errorf("updates beside others that fail: %v", errs)
	}
	if !errors.Is(errs[1], refused) || errs[2] == nil || !errors.Is(errs[3], context.Canceled) || !errors.Is(errs[5], broker.ErrExists) {
		t.Errorf("updates that fail: %v", errs)
	}
	if got := names(t, s); len(got) != 2 || !got["a"] || !got["b"] {
		t.Errorf("stored: %v", got)
	}
}

// TestSharedCommitIsLost: when what one update does ends the transaction of
// several, each is told, also the one whose refusal rests on what is gone.
func TestSharedCommitIsLost(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "broker.db"))
	errs := together(t, s, all(t.Context(), 4), []func(context.Context, broker.Tx) error{
		insert("a", 1),
		insert("a", 1),
		serve.EndTransaction,
		insert("b", 1),
	})
	if errs[0] == nil || errs[1] == nil || errs[2] == nil || errors.Is(errs[1], broker.ErrExists) {
		t.Errorf("updates of a lost transaction: %v", errs)
	}
	if errs[3] != nil {
		t.Errorf("the next update: %v", errs[3])
	}
	if got := names(t, s); got["a"] || !got["b"] {
		t.Errorf("stored: %v", got)
	}
	if err := s.Update(t.Context(), insert("a", 1)); err != nil {
		t.Errorf("after that: %v", err)
	}
}

// TestSharedCommitsOnAFullDisk: whoever is told that an update is stored finds
// it, and nobody else does.
func TestSharedCommitsOnAFullDisk(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "broker.db"))
	if err := serve.LimitPages(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	var fs []func(context.Context, broker.Tx) error
	for i := range 24 {
		fs = append(fs, insert(fmt.Sprint(i), 100+40_000*(i%3)))
	}
	errs := together(t, s, all(t.Context(), len(fs)), fs)
	got := names(t, s)
	stored := 0
	for i, err := range errs {
		if got[fmt.Sprint(i)] != (err == nil) {
			t.Errorf("update %d returned %v, stored: %v", i, err, got[fmt.Sprint(i)])
		}
		if err == nil {
			stored++
		}
	}
	if stored == 0 || stored == len(fs) {
		t.Errorf("%d of %d updates stored: the disk was to fill up in between", stored, len(fs))
	}
}

// TestWaitingUpdateIsCancelled: who gives up waiting leaves the others their turn.
func TestWaitingUpdateIsCancelled(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "broker.db"))
	cancelled, cancel := context.WithCancel(t.Context())
	started, free := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		_ = s.Update(t.Context(), func(context.Context, broker.Tx) error { close(started); <-free; return nil })
	})
	<-started
	gone := make(chan error, 1)
	go func() { gone <- s.Update(cancelled, insert("gone", 1)) }()
	for serve.Waiting(s) < 1 {
		runtime.Gosched()
	}
	wg.Go(func() {
		if err := s.Update(t.Context(), insert("after", 1)); err != nil {
			t.Error(err)
		}
	})
	for serve.Waiting(s) < 2 {
		runtime.Gosched()
	}
	cancel()
	if err := <-gone; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	close(free)
	wg.Wait()
	if got := names(t, s); got["gone"] || !got["after"] {
		t.Errorf("stored: %v", got)
	}
}

// TestPeek: what is committed is seen whether somebody updates meanwhile or not, and
// whatever the one who looks does, others can update after it.
func TestPeek(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "broker.db"))
	sees := func(name string) bool {
		var err error
		if peeked := s.Peek(t.Context(), func(ctx context.Context, r broker.Reader) error {
			_, err = r.Asset(ctx, name)
			return nil
		}); peeked != nil || err != nil && !errors.Is(err, broker.ErrNotFound) {
			t.Errorf("%s: %v, %v", name, peeked, err)
		}
		return err == nil
	}
	if err := s.Update(t.Context(), insert("a", 1)); err != nil {
		t.Fatal(err)
	}
	if !sees("a") || sees("b") {
		t.Error("does not see what is committed")
	}
	if err := s.Update(t.Context(), func(ctx context.Context, tx broker.Tx) error {
		if err := insert("b", 1)(ctx, tx); err != nil {
			return err
		}
		if !sees("a") || sees("b") {
			t.Error("an update is seen before its commit")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if !sees("b") {
		t.Error("an update is not seen after its commit")
	}
	refused := errors.New("refused")
	if err := s.Peek(t.Context(), func(context.Context, broker.Reader) error { return refused }); !errors.Is(err, refused) {
		t.Errorf("refused: %v", err)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Peek(cancelled, func(context.Context, broker.Reader) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	func() {
		defer func() { _ = recover() }()
		_ = s.Peek(t.Context(), func(context.Context, broker.Reader) error { panic("no") })
	}()
	if err := s.Update(t.Context(), insert("c", 1)); err != nil || !sees("c") {
		t.Errorf("after what fails: %v", err)
	}
}
