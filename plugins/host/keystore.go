package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/coffer-run/coffer/plugins/contract/keystore"
)

const (
	// DefaultBackOff is how long a key store plugin that died stays down at first.
	// It doubles with every death without an answer between, up to MaxBackOff.
	DefaultBackOff = 100 * time.Millisecond
	// MaxBackOff bounds the time that a plugin stays down.
	MaxBackOff = 30 * time.Second
)

// KeyStore is a key store plugin that is kept running: one that died, or was
// ended because it did not answer in time, is started again by the next call
// after its back-off. Calls before that fail at once with ErrDied. What was being
// asked when it died fails; nothing is asked twice. It is safe for concurrent use.
type KeyStore struct {
	cfg Config
	o   Options

	// life ends with Close, and every start with it.
	life context.Context
	end  context.CancelFunc

	// mu guards what follows. It is never held over a call or a start.
	mu       sync.Mutex
	running  *running
	starting *attempt
	failures int
	notYet   time.Time
	why      error
	closed   bool
	probing  bool
}

type running struct {
	*process
	store keystore.Store
}

// attempt is a start under way, which outlives the caller that asked for it.
// Its results are there once done is closed.
type attempt struct {
	done chan struct{}
	r    *running
	err  error
}

var _ keystore.AttestedStore = (*KeyStore)(nil)

// StartKeyStore starts a key store plugin whose binary has the configured
// checksum. A plugin that cannot be started for the first time is an error.
func StartKeyStore(ctx context.Context, cfg Config, o Options) (*KeyStore, error) {
	if o.BackOff == 0 {
		o.BackOff = DefaultBackOff
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	k := &KeyStore{cfg: cfg, o: o}
	k.life, k.end = context.WithCancel(context.WithoutCancel(ctx))
	if _, err := k.acquire(ctx); err != nil {
		return nil, errors.Join(err, k.Close())
	}
	return k, nil
}

// acquire returns the running plugin, and starts it if there is none and its
// back-off is over.
func (k *KeyStore) acquire(ctx context.Context) (*running, error) {
	k.mu.Lock()
	wait := time.Until(k.notYet)
	switch {
	case k.closed:
		k.mu.Unlock()
		return nil, fmt.Errorf("%w: it was closed", ErrDied)
	case k.running != nil:
		defer k.mu.Unlock()
		return k.running, nil
	case k.starting == nil && wait > 0:
		defer k.mu.Unlock()
		return nil, fmt.Errorf("%w: it is started again in %s: %w", ErrDied, wait.Round(time.Millisecond), k.why)
	case k.starting == nil:
		k.starting = &attempt{done: make(chan struct{})}
		go k.start(k.starting)
	}
	a := k.starting
	k.mu.Unlock()
	select {
	case <-a.done:
		return a.r, a.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (k *KeyStore) start(a *attempt) {
	defer close(a.done)
	p, store, err := start[keystore.Store](k.life, k.cfg, k.o, keystore.PluginName, &keystore.Plugin{})
	k.mu.Lock()
	defer k.mu.Unlock()
	k.starting = nil
	switch {
	case err != nil:
		a.err = err
		k.down(err)
	case k.closed:
		a.err = errors.Join(fmt.Errorf("%w: it was closed", ErrDied), p.Close())
	default:
		a.r = &running{process: p, store: store}
		k.running = a.r
	}
}

// failed ends r, unless another call has seen to it.
func (k *KeyStore) failed(r *running, why error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.running != r || k.closed {
		return
	}
	k.running = nil
	k.down(why)
	// Ending a process takes up to seconds, and nobody waits for its result.
	go func() { _ = r.Close() }()
}

// down sets when the next process may be started. The caller holds mu.
func (k *KeyStore) down(why error) {
	wait := min(k.o.BackOff<<min(k.failures, 20), MaxBackOff)
	k.failures++
	k.why, k.notYet = why, time.Now().Add(wait)
	k.o.Log.LogAttrs(k.life, slog.LevelError, "key store plugin is down", slog.Any("error", why), slog.Duration("for", wait))
}

// probe asks r for its health, within r's own limit, after a caller gave up before
// that was over: callers in a hurry end no plugin that is only slow, and keep none
// that hangs.
func (k *KeyStore) probe(r *running) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.probing || k.running != r {
		return
	}
	k.probing = true
	go func() {
		_, err := bounded(k.life, r.process, func(ctx context.Context) (struct{}, error) {
			return struct{}{}, r.store.Health(ctx)
		})
		k.mu.Lock()
		k.probing = false
		k.mu.Unlock()
		if errors.Is(err, ErrDied) || errors.Is(err, ErrTimeout) {
			k.failed(r, err)
		}
	}()
}

// asked runs one call on k's plugin.
func asked[T any](ctx context.Context, k *KeyStore, call func(context.Context, keystore.Store) (T, error)) (T, error) {
	r, err := k.acquire(ctx)
	if err != nil {
		var none T
		return none, err
	}
	v, err := bounded(ctx, r.process, func(ctx context.Context) (T, error) { return call(ctx, r.store) })
	switch {
	case errors.Is(err, ErrDied), errors.Is(err, ErrTimeout):
		k.failed(r, err)
	case ctx.Err() != nil, errors.Is(err, context.DeadlineExceeded):
		k.probe(r)
	default:
		// It answered, be it with an error.
		k.mu.Lock()
		if k.running == r {
			k.failures = 0
		}
		k.mu.Unlock()
	}
	return v, err
}

// Info asks the store what it is.
func (k *KeyStore) Info(ctx context.Context) (*keystore.Info, error) {
	return asked(ctx, k, func(ctx context.Context, s keystore.Store) (*keystore.Info, error) { return s.Info(ctx) })
}

// Wrap asks the store to encrypt key.
func (k *KeyStore) Wrap(ctx context.Context, keyID string, key *keystore.DataKey, associated []byte) (*keystore.Wrapped, error) {
	return asked(ctx, k, func(ctx context.Context, s keystore.Store) (*keystore.Wrapped, error) {
		return s.Wrap(ctx, keyID, key, associated)
	})
}

// Unwrap asks the store to decrypt a data key.
func (k *KeyStore) Unwrap(ctx context.Context, w *keystore.Wrapped, associated []byte) (*keystore.DataKey, error) {
	return asked(ctx, k, func(ctx context.Context, s keystore.Store) (*keystore.DataKey, error) {
		return s.Unwrap(ctx, w, associated)
	})
}

// Challenge asks the store for a challenge. A plugin that asks for no attestation
// answers with an error.
func (k *KeyStore) Challenge(ctx context.Context) ([]byte, error) {
	return asked(ctx, k, func(ctx context.Context, s keystore.Store) ([]byte, error) {
		a, ok := s.(keystore.AttestedStore)
		if !ok {
			return nil, errors.New("the store cannot be told what its caller is")
		}
		return a.Challenge(ctx)
	})
}

// UnwrapFor asks the store to decrypt a data key for a caller that proves what it is.
func (k *KeyStore) UnwrapFor(ctx context.Context, w *keystore.Wrapped, associated []byte, p keystore.Proof) (*keystore.Sealed, error) {
	return asked(ctx, k, func(ctx context.Context, s keystore.Store) (*keystore.Sealed, error) {
		a, ok := s.(keystore.AttestedStore)
		if !ok {
			return nil, errors.New("the store cannot be told what its caller is")
		}
		return a.UnwrapFor(ctx, w, associated, p)
	})
}

// Rewrap asks the store for the same data key under the newest version.
func (k *KeyStore) Rewrap(ctx context.Context, w *keystore.Wrapped, associated []byte) (*keystore.Wrapped, error) {
	return asked(ctx, k, func(ctx context.Context, s keystore.Store) (*keystore.Wrapped, error) {
		return s.Rewrap(ctx, w, associated)
	})
}

// Health asks the store's backend for a sign of life.
func (k *KeyStore) Health(ctx context.Context) error {
	_, err := asked(ctx, k, func(ctx context.Context, s keystore.Store) (struct{}, error) { return struct{}{}, s.Health(ctx) })
	return err
}

// Close ends the plugin's process for good.
func (k *KeyStore) Close() error {
	k.mu.Lock()
	r := k.running
	k.running, k.closed = nil, true
	k.mu.Unlock()
	k.end()
	if r == nil {
		return nil
	}
	return r.Close()
}
