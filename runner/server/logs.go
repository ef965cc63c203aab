package server

import (
	"context"
	"errors"

	"connectrpc.com/connect"

	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/logs"
)

// sealedPiece bounds the bytes of a sealed segment in one message.
const sealedPiece = 1 << 20

// Logs sends what a job printed: while it runs, and after it, from what is kept.
func (s *server) Logs(ctx context.Context, r *connect.Request[agentv1.LogsRequest], out *connect.ServerStream[agentv1.LogsResponse]) error {
	q := r.Msg
	if q.GetStdoutOffset() < 0 || q.GetStderrOffset() < 0 {
		return connect.NewError(connect.CodeInvalidArgument, errors.New("offset: want 0 or more"))
	}
	if err := s.readable(ctx, q.GetId()); err != nil {
		return err
	}
	after := map[string]int64{logs.Stdout: q.GetStdoutOffset(), logs.Stderr: q.GetStderrOffset()}
	err := s.agent.ReadLog(ctx, q.GetId(), q.GetFollow(), func(e logs.Entry) error {
		if skip := after[e.Stream] - e.Offset; skip > 0 {
			if skip >= int64(len(e.Data)) {
				return nil
			}
			e.Data, e.Offset = e.Data[skip:], e.Offset+skip
		}
		return out.Send(&agentv1.LogsResponse{Log: &agentv1.LogEvent{Stream: e.Stream, Data: e.Data, Offset: e.Offset}, TimeUnixNano: e.At.UnixNano()})
	})
	if errors.Is(err, logs.ErrSealed) {
		return s.sealed(q.GetId(), out)
	}
	if errors.Is(err, logs.ErrNotKept) {
		return connect.NewError(connect.CodeNotFound, err)
	}
	if errors.Is(err, logs.ErrCut) {
		return connect.NewError(connect.CodeDataLoss, err)
	}
	return err
}

// sealed sends a log that the agent cannot open.
func (s *server) sealed(id string, out *connect.ServerStream[agentv1.LogsResponse]) error {
	numbers, err := s.agent.Logs.Segments(id)
	if err != nil {
		return err
	}
	for _, n := range numbers {
		b, err := s.agent.Logs.Segment(id, n)
		if err != nil {
			return err
		}
		for len(b) > 0 {
			k := min(len(b), sealedPiece)
			if err := out.Send(&agentv1.LogsResponse{Sealed: b[:k], Segment: int32(n)}); err != nil { //nolint:gosec // a small number
				return err
			}
			b = b[k:]
		}
	}
	return nil
}
