package runner

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/logs"
)

const (
	// logPace is the least time between two looks at a log: lines are passed on as
	// fast as people read, and kept in pieces that are not too small.
	logPace = 100 * time.Millisecond
	// logWait is how often a follower looks for a log that has not begun.
	logWait = 200 * time.Millisecond
)

// openLog begins what is kept of the job's output.
func (a *Agent) openLog(j *Job) error {
	if a.Logs == nil {
		return nil
	}
	var to *logs.PublicKey
	if k := j.spec.Output.LogKey; k != "" {
		var err error
		if to, err = logs.ParsePublicKey(k); err != nil {
			return err
		}
	}
	l, err := a.Logs.Create(j.id, j.plan.Output.LogBytes, to)
	if err != nil {
		return err
	}
	j.feed.keep(l)
	return nil
}

// logPatience bounds how long output waits in the holder for a full disk to have room.
// After it the newest lines are in memory alone: a full disk ends no job.
const logPatience = 15 * time.Second

// openLogLater tries again until there is room.
func (a *Agent) openLogLater(ctx context.Context, j *Job, err error) {
	err = a.untilThereIsRoom(ctx, err, func() error { return a.openLog(j) })
	if err != nil {
		a.log.ErrorContext(ctx, "no log is kept", slog.String("job", j.id), slog.Any("error", err))
	}
}

// untilThereIsRoom repeats what failed with err while the agent runs, and not for longer
// than logPatience. A job that has ended meanwhile waits for it: the holder has its
// output until then.
func (a *Agent) untilThereIsRoom(ctx context.Context, err error, f func() error) error {
	for began := time.Now(); err != nil && time.Since(began) < logPatience; err = f() {
		select {
		case <-time.After(logWait):
		case <-ctx.Done():
			return err
		}
	}
	return err
}

// pumpLog passes one stream on, in whole lines where they are not too long and
// not too slow to come.
func (a *Agent) pumpLog(ctx context.Context, j *Job, stream string) error {
	c, err := holdapi.Dial(ctx, j.runDir)
	if err != nil {
		return err
	}
	defer c.Close()
	d := &j.logs[0]
	if stream == logs.Stderr {
		d = &j.logs[1]
	}
	var held []byte // what was read and not passed on, up to d.bytes
	for {
		chunk, err := c.Logs(ctx, holdapi.Logs{Stream: stream, Offset: d.bytes, WaitMillis: pollWait.Milliseconds()})
		if err != nil {
			return errors.Join(err, a.say(ctx, j, stream, d.bytes-int64(len(held)), held))
		}
		d.add(chunk.Data)
		if stream == logs.Stdout {
			j.metrics.add(chunk.Data)
		}
		a.lookAtOutput(ctx, j, len(chunk.Data), chunk.Cut)
		held = append(held, chunk.Data...)
		ready := len(held)
		if len(chunk.Data) > 0 && !chunk.EOF {
			ready = bytes.LastIndexByte(held, '\n') + 1
			if len(held)-ready >= logs.MaxData {
				ready = len(held)
			}
		}
		if err := a.say(ctx, j, stream, d.bytes-int64(len(held)), held[:ready]); err != nil {
			return err
		}
		held = append(held[:0], held[ready:]...)
		a.sayCut(ctx, j, chunk.Cut)
		if chunk.EOF {
			return nil
		}
		select {
		case <-time.After(logPace):
		case <-j.finished:
		}
	}
}

// say keeps a piece of output and tells the watchers.
func (a *Agent) say(ctx context.Context, j *Job, stream string, offset int64, b []byte) error {
	for len(b) > 0 {
		n := min(len(b), logs.MaxData)
		e := logs.Entry{Stream: stream, Offset: offset, At: time.Now(), Data: bytes.Clone(b[:n])}
		if err := j.feed.addLog(e, func(err error, f func() error) error { return a.untilThereIsRoom(ctx, err, f) }); err != nil {
			a.log.WarnContext(ctx, "keep the log", slog.String("job", j.id), slog.Any("error", err))
		}
		b, offset = b[n:], offset+int64(n)
	}
	return nil
}

// sayCut tells the watchers that output was cut: at first, and whenever it has
// become twice as much.
func (a *Agent) sayCut(ctx context.Context, j *Job, cut int64) {
	if j.feed.cutMore(cut) {
		a.tell(ctx, j, &agentv1.WatchResponse{Event: &agentv1.WatchResponse_LogCut{LogCut: &agentv1.LogCutEvent{Bytes: cut}}})
	}
}

// ReadLog calls f with what a job printed, from the beginning of what is kept. With
// follow it waits for more until the job has ended. logs.ErrSealed says that only
// the owner of the job's log key can read it, logs.ErrNotKept that there is none.
func (a *Agent) ReadLog(ctx context.Context, id string, follow bool, f func(logs.Entry) error) error {
	for {
		feed := (*feed)(a.Feed(id))
		if feed == nil {
			break
		}
		l, closed := feed.kept()
		if l != nil {
			return l.Follow(ctx, follow, f)
		}
		if closed {
			break
		}
		// It has not begun to print.
		if !follow {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(logWait):
		}
	}
	if a.Logs == nil {
		return logs.ErrNotKept
	}
	err := a.Logs.Read(id, f)
	if row, jerr := a.Journal.Job(ctx, id); errors.Is(err, logs.ErrNotKept) && jerr == nil && len(row.Reason) > 0 && !a.printed(ctx, id) {
		// It never ran.
		return nil
	}
	return err
}

// printed reports whether a job has run.
func (a *Agent) printed(ctx context.Context, id string) bool {
	var rec record
	return a.Journal.Entry(ctx, id, "start", &rec) == nil
}
