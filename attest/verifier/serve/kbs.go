package serve

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"time"

	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/verifier"
)

// KBSPath answers a broker's POST of the evidence of a guest of the Confidential
// Containers KBS protocol with {"token"}: a signed result, which may refuse.
const KBSPath = "/kbs/appraise"

// kbs appraises for brokers. Like calls of the API it takes its turn once the
// request was read.
func (g *gate) kbs(v *verifier.Verifier) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, verifier.MaxKBSRequest))
		if err != nil {
			unread(w, r)
			http.Error(w, "no request of at most 2 MiB", http.StatusBadRequest)
			return
		}
		c, start := callerOf(r.Context()), time.Now()
		ctx, cancel := context.WithTimeout(r.Context(), callTimeout)
		defer cancel()
		g.metrics.working.Inc()
		token, result, err := g.appraiseKBS(ctx, v, b)
		g.metrics.working.Dec()
		if err != nil {
			wire := wireError(err)
			g.metrics.call(KBSPath, c.role, wire, time.Since(start))
			g.log.LogAttrs(ctx, slog.LevelWarn, "not answered", slog.String("call", KBSPath), slog.String("caller", c.String()), slog.String("error", err.Error()))
			http.Error(w, wire.Message(), kbsStatus(err))
			return
		}
		g.metrics.call(KBSPath, c.role, nil, time.Since(start))
		as := receipt.Result{IssuedAt: result.IssuedAt, Submods: result.Submods}
		g.metrics.result(KBSPath, c.role, as)
		failed := failedIDs(as)
		g.log.LogAttrs(ctx, slog.LevelInfo, "appraised", slog.String("call", KBSPath), slog.String("caller", c.String()), slog.Duration("took", time.Since(start)),
			slog.String("session", result.Session), slog.String("tee", result.TEE), slog.String("initData", string(result.InitData)), slog.String("result", result.ID),
			slog.String("audience", result.Audience), slog.Bool("simulated", result.Simulated), slog.Bool("accepted", len(failed) == 0), slog.Any("failed", failed))
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]string{"token": token})
	})
}

func (g *gate) appraiseKBS(ctx context.Context, v *verifier.Verifier, b []byte) (string, receipt.KBSResult, error) {
	select {
	case g.turns <- struct{}{}:
		defer func() { <-g.turns }()
	case <-ctx.Done():
		return "", receipt.KBSResult{}, errors.Join(verifier.ErrBusy, ctx.Err())
	}
	return v.AppraiseKBS(ctx, b)
}

// kbsStatus tells what is wrong with the request from what a later try may not see.
func kbsStatus(err error) int {
	switch {
	case errors.Is(err, verifier.ErrMalformed):
		return http.StatusBadRequest
	case errors.Is(err, verifier.ErrBusy), errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}
