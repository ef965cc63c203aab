package client

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"connectrpc.com/connect"

	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
)

// stream reads one stream to its end, and opens another where it breaks. open is asked
// again for every attempt; got returns false to stop.
func stream[Res any](ctx context.Context, c *Client, open func(context.Context) (*connect.ServerStreamForClient[Res], error), got func(*Res) bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for t := c.tries(); ; {
		s, err := open(ctx)
		if err == nil {
			for s.Receive() {
				t = c.tries()
				if !got(s.Msg()) {
					cancel()
					_ = s.Close()
					return nil
				}
			}
			err = s.Err()
			_ = s.Close()
		}
		if err == nil {
			return nil
		}
		if err := t.again(ctx, err); err != nil {
			return err
		}
	}
}

// Watch goes through the events of a job after a sequence number, 0 for all, each once
// and in order, and ends without an error once the job has ended. A stream that breaks goes
// on where it was; who starts anew passes the sequence of the last event it has seen.
func (c *Client) Watch(ctx context.Context, id string, after uint64) iter.Seq2[*agentv1.WatchResponse, error] {
	return func(yield func(*agentv1.WatchResponse, error) bool) {
		last, going, printed := after, true, map[string]int64{}
		err := stream(ctx, c, func(ctx context.Context) (*connect.ServerStreamForClient[agentv1.WatchResponse], error) {
			return c.agent.Watch(ctx, connect.NewRequest(&agentv1.WatchRequest{Id: id, AfterSequence: last}))
		}, func(e *agentv1.WatchResponse) bool {
			if e.GetSequence() <= last {
				return true
			}
			last = e.GetSequence()
			// An agent that was restarted numbers lines anew.
			if l := e.GetLog(); l != nil {
				if seen := printed[l.GetStream()] - l.GetOffset(); seen > 0 {
					if seen >= int64(len(l.GetData())) {
						return true
					}
					l.Data, l.Offset = l.GetData()[seen:], l.GetOffset()+seen
				}
				printed[l.GetStream()] = l.GetOffset() + int64(len(l.GetData()))
			}
			going = yield(e, nil)
			return going
		})
		if err != nil && going {
			yield(nil, fmt.Errorf("watch job %s: %w", id, err))
		}
	}
}

// Wait waits until a job, and every attempt that follows it, has ended, and returns the
// last attempt.
func (c *Client) Wait(ctx context.Context, id string) (*agentv1.Job, error) {
	for range maxAttempts {
		for _, err := range c.Watch(ctx, id, 0) {
			if err != nil {
				return nil, err
			}
		}
		j, err := c.Get(ctx, id)
		switch {
		case err != nil:
			return nil, err
		case j.GetEndedUnix() == 0:
			return nil, fmt.Errorf("wait for job %s: its events have ended, and it is %s", id, j.GetState())
		case j.GetRetriedAs() == "":
			return j, nil
		}
		id = j.GetRetriedAs()
	}
	return nil, fmt.Errorf("wait for job %s: more than %d attempts", id, maxAttempts)
}

// ErrSealed is that of a log whose lines the agent cannot open: it is sealed to a key
// that the job file names. Commands open it (docs/formats/logs.md).
var ErrSealed = errors.New("the log is sealed to the job's log key")

// Logs goes through what a job printed, in pieces, from the given offsets of its streams
// on. It ends where the log ends; with follow, when the job has ended.
func (c *Client) Logs(ctx context.Context, id string, stdout, stderr int64, follow bool) iter.Seq2[*agentv1.LogEvent, error] {
	return func(yield func(*agentv1.LogEvent, error) bool) {
		going, sealed := true, false
		err := stream(ctx, c, func(ctx context.Context) (*connect.ServerStreamForClient[agentv1.LogsResponse], error) {
			return c.agent.Logs(ctx, connect.NewRequest(&agentv1.LogsRequest{Id: id, StdoutOffset: stdout, StderrOffset: stderr, Follow: follow}))
		}, func(r *agentv1.LogsResponse) bool {
			l := r.GetLog()
			if l == nil {
				sealed = true
				return false
			}
			if end := l.GetOffset() + int64(len(l.GetData())); l.GetStream() == "stderr" {
				stderr = max(stderr, end)
			} else {
				stdout = max(stdout, end)
			}
			going = yield(l, nil)
			return going
		})
		if sealed {
			err = ErrSealed
		}
		if err != nil && going {
			yield(nil, fmt.Errorf("read log of job %s: %w", id, err))
		}
	}
}
