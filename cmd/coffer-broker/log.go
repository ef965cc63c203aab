package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"time"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/broker/serve"
	"github.com/coffer-run/coffer/attest/translog"
	logserve "github.com/coffer-run/coffer/attest/translog/serve"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
)

// Log says where the evidence log's Merkle tree is kept. Dir and KeyFile are
// required.
type Log struct {
	// Dir is a folder for the tree alone, made at the first start. What it has is
	// made from DB and can be made again.
	Dir string `json:"dir"`
	// KeyFile holds the Ed25519 key that signs checkpoints (C2SP signed-note),
	// mode 0600.
	KeyFile string `json:"keyFile"`
	// Witnesses are asked to cosign each checkpoint.
	Witnesses []LogWitness `json:"witnesses,omitempty"`
}

// LogWitness is one witness: its verifier key (C2SP signed-note) and the prefix of
// its add-checkpoint.
type LogWitness struct {
	Key string `json:"key"`
	URL string `json:"url"`
}

// KBS turns on the Confidential Containers KBS protocol. Its clients come without a
// certificate, so that the port then takes callers without one; the broker's own
// calls and the log refuse them.
type KBS struct {
	// VerifierURL appraises the clients' evidence (docs/formats/kbs.md).
	VerifierURL string `json:"verifierUrl"`
}

// outbox is the broker's store, seen by the log's sequencer: it reads what is
// committed, and is woken by each commit.
type outbox struct {
	broker.Store
	wake func()
}

// Update implements broker.Store.
func (o *outbox) Update(ctx context.Context, f func(context.Context, broker.Tx) error) error {
	err := o.Store.Update(ctx, f)
	if err == nil {
		o.wake()
	}
	return err
}

// LogEntries implements the log's Source.
func (o *outbox) LogEntries(ctx context.Context, from uint64, limit int) (l []translog.Entry, err error) {
	err = o.View(ctx, func(ctx context.Context, r broker.Reader) error {
		l, err = r.Entries(ctx, "", from, limit)
		return err
	})
	return l, err
}

// openLog returns the store as the broker is to use it, and the log over it.
func openLog(c Config, store broker.Store, log *slog.Logger) (*outbox, *logserve.Log, error) {
	if c.Log.Dir == "" || c.Log.KeyFile == "" {
		return nil, nil, errors.New("log.dir and log.keyFile are required")
	}
	if err := os.MkdirAll(c.Log.Dir, 0o700); err != nil {
		return nil, nil, fmt.Errorf("evidence log: %w", err)
	}
	key, err := keyfile.ReadNote(c.Log.KeyFile)
	if err != nil {
		return nil, nil, err
	}
	logserve.LibraryLog(log)
	o := &outbox{Store: store}
	cfg := logserve.Config{Dir: c.Log.Dir, Broker: c.ID, Key: key, Source: o, Client: &http.Client{}, Log: log}
	for _, w := range c.Log.Witnesses {
		cfg.Witnesses = append(cfg.Witnesses, logserve.Witness{Key: w.Key, URL: w.URL})
	}
	l, err := logserve.New(cfg)
	if err != nil {
		return nil, nil, err
	}
	o.wake = l.Wake
	return o, l, nil
}

// sequence runs the log's sequencer until the returned function is called, once it
// has compared database and tree. A database that lacks what the log has is an error,
// and fail is called if it comes to lack it later: in an old copy, grants that were
// used or revoked are good again. To be unable to compare them is an error too. When
// only the tree is damaged, and when the sequencer ends later for another reason, the
// broker goes on: releases are logged in the database, and the tree can be mended
// without it.
func sequence(ctx context.Context, l *logserve.Log, log *slog.Logger, fail context.CancelCauseFunc) (stop func(), err error) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	var ended error
	go func() {
		defer close(done)
		if ended = l.Run(ctx); errors.Is(ended, logserve.ErrOldDatabase) {
			log.LogAttrs(ctx, slog.LevelError, "the database is not the one that was logged: nothing is answered any more", slog.String("error", ended.Error()))
			fail(ended)
		} else if ended != nil {
			log.LogAttrs(ctx, slog.LevelError, "the evidence log's tree grows no more; releases go on", slog.String("error", ended.Error()))
		}
	}()
	select {
	case <-l.Opened():
	case <-done:
		if errors.Is(ended, logserve.ErrOldDatabase) || !errors.Is(ended, logserve.ErrDiverged) {
			defer cancel()
			return nil, cmp.Or(ended, ctx.Err())
		}
	}
	return func() {
		cancel()
		<-done
	}, nil
}

// mayReadLog lets everyone who may ask the broker anything read what proves
// inclusion, and auditors the entries of all jobs if the access policies let them;
// owners and agents get a job's from the broker itself.
func mayReadLog(who func(*http.Request) (broker.Actor, error), access broker.Authorizer) logserve.Allow {
	return func(r *http.Request, whole bool) (string, error) {
		a, err := who(r)
		if err != nil || a.Role == "" || a.Name == "" {
			return "", logserve.ErrUnknownCaller
		}
		action := broker.ActionInfo
		if whole {
			action = broker.ActionReadLog
		}
		if !broker.MayEver(a.Role, action) {
			return a.String(), logserve.ErrForbidden
		}
		if err := access.Authorize(r.Context(), broker.Access{Principal: a, Action: action, Time: time.Now()}); err != nil {
			return a.String(), fmt.Errorf("%w: %w", logserve.ErrForbidden, err)
		}
		return a.String(), nil
	}
}

// beside serves the log beside the broker, and the KBS protocol if it is configured.
func beside(c Config, l *logserve.Log, allow logserve.Allow, b *broker.Broker, log *slog.Logger, handler http.Handler) (http.Handler, error) {
	h, err := l.Handler(allow)
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.Handle(logserve.Prefix, h)
	mux.Handle("/", handler)
	if c.KBS == nil {
		return mux, nil
	}
	if c.KBS.VerifierURL == "" {
		return nil, errors.New("kbs.verifierUrl is required")
	}
	client, err := c.TLS.HTTPClient(daemon.RoleVerifier)
	if err != nil {
		return nil, err
	}
	k, err := serve.KBSHandler(serve.KBSOptions{Broker: b, Verifier: serve.KBSClient{URL: c.KBS.VerifierURL, HTTP: client}, Log: log, Now: time.Now})
	if err != nil {
		return nil, err
	}
	mux.Handle(serve.KBSPrefix, k)
	return mux, nil
}
