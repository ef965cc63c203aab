package serve

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/transparency-dev/tessera/api/layout"
	"github.com/transparency-dev/tessera/client"

	"github.com/coffer-run/coffer/attest/translog"
)

// Prefix is the path below which a broker serves its log.
const Prefix = "/log/"

const (
	// maxRequest bounds a request for proofs, in bytes.
	maxRequest = 32 << 10
	// maxWait bounds how long a request for proofs waits for a checkpoint.
	maxWait = 5 * time.Second
	// readTimeout and writeTimeout bound how long a caller may take to send a
	// request, and until it has the answer.
	readTimeout  = 20 * time.Second
	writeTimeout = 60 * time.Second
	// maxInWork bounds the calls of one caller that are in work at a time.
	maxInWork = 32
	// pollCheckpoint is how often a waiting request looks for a new checkpoint.
	pollCheckpoint = 10 * time.Millisecond
)

// Proofs returns inclusion proofs under one published checkpoint, for which it
// waits until ctx ends, five seconds at most; ErrNotYet says that there was none.
func (l *Log) Proofs(ctx context.Context, indices []uint64) (translog.Proofs, error) {
	if len(indices) == 0 || len(indices) > translog.MaxProofs {
		return translog.Proofs{}, fmt.Errorf("proofs for %d entries: want 1 to %d", len(indices), translog.MaxProofs)
	}
	ctx, cancel := context.WithTimeout(ctx, l.maxWait)
	defer cancel()
	raw, c, err := l.covering(ctx, slices.Max(indices))
	if err != nil {
		return translog.Proofs{}, err
	}
	b, err := client.NewProofBuilder(ctx, c.Size, l.files.ReadTile)
	if err != nil {
		return translog.Proofs{}, fmt.Errorf("prove inclusion: %w", err)
	}
	out := translog.Proofs{Checkpoint: raw}
	for _, i := range indices {
		h, err := b.InclusionProof(ctx, i)
		if err != nil {
			return translog.Proofs{}, fmt.Errorf("prove inclusion of entry %d: %w", i, err)
		}
		out.Hashes = append(out.Hashes, h)
	}
	return out, nil
}

// covering waits for a checkpoint that has entry index.
func (l *Log) covering(ctx context.Context, index uint64) ([]byte, translog.Checkpoint, error) {
	var seen []byte
	for {
		raw, err := l.files.ReadCheckpoint(ctx)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, translog.Checkpoint{}, fmt.Errorf("read checkpoint: %w", err)
		}
		if err == nil && !bytes.Equal(raw, seen) {
			seen = raw
			c, err := l.trust.Open(raw)
			if err != nil {
				return nil, translog.Checkpoint{}, err
			}
			if c.Size > index {
				return raw, c, nil
			}
		}
		select {
		case <-ctx.Done():
			return nil, translog.Checkpoint{}, fmt.Errorf("entry %d: %w", index, ErrNotYet)
		case <-time.After(pollCheckpoint):
		}
	}
}

var (
	// ErrUnknownCaller says that nobody knows who a caller is.
	ErrUnknownCaller = errors.New("who you are could not be established")
	// ErrForbidden says that a caller may not read what it asks for.
	ErrForbidden = errors.New("you may not read this part of the log")
)

// Allow says who a caller is, and whether it may read: hash tiles and proofs, which
// say nothing of what entries record, or, if whole is true, the entries of every
// job. It returns ErrUnknownCaller or ErrForbidden, possibly wrapped; every other
// error counts as no.
type Allow func(r *http.Request, whole bool) (caller string, err error)

// Handler serves the log read-only below Prefix: key, checkpoint, and tiles in the
// layout of C2SP tlog-tiles, and POST proofs.
func (l *Log) Handler(allow Allow) (http.Handler, error) {
	if allow == nil {
		return nil, errors.New("log handler needs to know who may read")
	}
	root, err := os.OpenRoot(l.c.Dir)
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	mux := http.NewServeMux()
	work := &inWork{calls: map[string]int{}}
	handle := func(pattern string, whole bool, f func(http.ResponseWriter, *http.Request)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			caller, err := allow(r, whole)
			if errors.Is(err, ErrUnknownCaller) {
				refuse(w, r, http.StatusUnauthorized, ErrUnknownCaller.Error())
				return
			}
			if err != nil {
				l.c.Log.LogAttrs(r.Context(), slog.LevelWarn, "not answered", slog.String("call", r.URL.Path), slog.String("caller", caller), slog.String("error", err.Error()))
				refuse(w, r, http.StatusForbidden, ErrForbidden.Error())
				return
			}
			if !work.begin(caller) {
				w.Header().Set("Retry-After", "1")
				refuse(w, r, http.StatusTooManyRequests, "too many of your calls are in work")
				return
			}
			defer work.end(caller)
			rc := http.NewResponseController(w)
			now := time.Now()
			// Not every ResponseWriter has deadlines; the daemon's does.
			_ = rc.SetReadDeadline(now.Add(readTimeout))
			_ = rc.SetWriteDeadline(now.Add(writeTimeout))
			r.Body = http.MaxBytesReader(w, r.Body, maxRequest)
			f(w, r)
		})
	}
	file := func(w http.ResponseWriter, path, contentType string) {
		b, err := root.ReadFile(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			http.Error(w, "no such part of the log", http.StatusNotFound)
		case err != nil:
			http.Error(w, "the log cannot be read", http.StatusInternalServerError)
		default:
			w.Header().Set("Content-Type", contentType)
			_, _ = w.Write(b)
		}
	}
	handle("GET "+Prefix+"key", false, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		_, _ = w.Write([]byte(l.publicKey + "\n"))
	})
	handle("GET "+Prefix+layout.CheckpointPath, false, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Cache-Control", "no-cache")
		file(w, layout.CheckpointPath, "text/plain; charset=utf-8")
	})
	handle("GET "+Prefix+"tile/entries/{index...}", true, func(w http.ResponseWriter, r *http.Request) {
		i, p, err := layout.ParseTileIndexPartial(r.PathValue("index"))
		if err != nil {
			http.Error(w, "no such part of the log", http.StatusNotFound)
			return
		}
		file(w, layout.EntriesPath(i, p), "application/octet-stream")
	})
	handle("GET "+Prefix+"tile/{level}/{index...}", false, func(w http.ResponseWriter, r *http.Request) {
		level, i, p, err := layout.ParseTileLevelIndexPartial(r.PathValue("level"), r.PathValue("index"))
		if err != nil {
			http.Error(w, "no such part of the log", http.StatusNotFound)
			return
		}
		file(w, layout.TilePath(level, i, p), "application/octet-stream")
	})
	handle("POST "+Prefix+"proofs", false, l.serveProofs)
	return mux, nil
}

// inWork counts the calls of each caller that are in work.
type inWork struct {
	mu    sync.Mutex
	calls map[string]int
}

func (w *inWork) begin(caller string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.calls[caller] >= maxInWork {
		return false
	}
	w.calls[caller]++
	return true
}

func (w *inWork) end(caller string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.calls[caller]--; w.calls[caller] == 0 {
		delete(w.calls, caller)
	}
}

func (l *Log) serveProofs(w http.ResponseWriter, r *http.Request) {
	var req translog.ProofRequest
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	if err := d.Decode(&req); err != nil || len(req.Indices) == 0 || len(req.Indices) > translog.MaxProofs {
		refuse(w, r, http.StatusBadRequest, fmt.Sprintf("want the indices of 1 to %d entries", translog.MaxProofs))
		return
	}
	p, err := l.Proofs(r.Context(), req.Indices)
	switch {
	case errors.Is(err, ErrNotYet):
		w.Header().Set("Retry-After", "1")
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	case err != nil:
		l.c.Log.LogAttrs(r.Context(), slog.LevelError, "not answered", slog.String("call", r.URL.Path), slog.String("error", err.Error()))
		http.Error(w, "the log cannot be read", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(p)
}

// refuse answers before the request is read.
func refuse(w http.ResponseWriter, r *http.Request, code int, text string) {
	if r.ProtoMajor == 1 {
		w.Header().Set("Connection", "close")
	}
	http.Error(w, text, code)
}
