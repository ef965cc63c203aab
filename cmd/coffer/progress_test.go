package main

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/api/agent/v1/agentv1connect"
)

func TestLiveProgress(t *testing.T) {
	l := &live{job: "job-1", name: "demo", width: 80, height: 40}
	tell := func(second int64, list ...*agentv1.Progress) {
		l.event(&agentv1.WatchResponse{TimeUnixNano: time.Unix(second, 0).UnixNano(), Event: &agentv1.WatchResponse_Progress{Progress: &agentv1.ProgressEvent{Going: list}}})
	}
	fetch := func(bytes int64) *agentv1.Progress {
		return &agentv1.Progress{What: "fetch", Name: "data\x1b[2J", Bytes: bytes, Total: 10 << 30}
	}
	decrypt := func(bytes int64) *agentv1.Progress {
		return &agentv1.Progress{What: "decrypt", Bytes: bytes, Total: 4 << 30}
	}
	l.event(stage(1, "sandbox", "started", 0, ""))
	tell(100, fetch(1<<30))
	if s := l.text(); !strings.Contains(s, "fetching data\\u001b[2J: 1.0 GiB of 10.0 GiB\x1b") {
		t.Errorf("shown:\n%s", s)
	}
	tell(102, fetch(3<<30))
	if s := l.text(); !strings.Contains(s, "3.0 GiB of 10.0 GiB, 1.0 GiB/s, 7s left") {
		t.Errorf("shown:\n%s", s)
	}
	// A rate is that of the newest samples: here nothing came any more.
	for i := range int64(rateOver) {
		tell(103+i, fetch(3<<30), decrypt(i))
	}
	if s := l.text(); !strings.Contains(s, "3.0 GiB of 10.0 GiB, 0 B/s\x1b") || !strings.Contains(s, "decrypting: 4 B of 4.0 GiB, 1 B/s\x1b") {
		t.Errorf("shown:\n%s", s)
	}
	// A fetch that began again has no rate for now.
	tell(110, fetch(1<<20), decrypt(4<<30))
	if s := l.text(); !strings.Contains(s, "1.0 MiB of 10.0 GiB\x1b") || strings.Contains(s, "left") {
		t.Errorf("shown:\n%s", s)
	}
	tell(111)
	if s := l.text(); strings.Contains(s, "fetching") || strings.Contains(s, "decrypting") {
		t.Errorf("shown when it is over:\n%s", s)
	}
	tell(112, decrypt(1))
	l.done = true
	if s := l.text(); strings.Contains(s, "decrypting") {
		t.Errorf("shown when the job is over:\n%s", s)
	}
}

func TestWhatGoesOn(t *testing.T) {
	digest := "@sha256:" + strings.Repeat("ab", 32)
	for name, row := range map[string]struct {
		p    *agentv1.Progress
		want string
	}{
		"an image":               {&agentv1.Progress{What: "image", Name: "registry.example:5000/ml/train" + digest, Bytes: 1 << 20, Total: 4 << 20}, "fetching image train: 1.0 MiB of 4.0 MiB"},
		"an image that is there": {&agentv1.Progress{What: "image", Name: "registry.example/train" + digest, Bytes: 4 << 20, Total: 4 << 20}, "unpacking image train"},
		"a checkpoint":           {&agentv1.Progress{What: "send", Name: "#3 step-300", Bytes: 1, Total: 2}, "sending checkpoint #3 step-300: 1 B of 2 B"},
		"an input":               {&agentv1.Progress{What: "fetch", Name: "data", Bytes: 1, Total: 2}, "fetching data: 1 B of 2 B"},
		"a kind of a later node": {&agentv1.Progress{What: "zzz", Name: "x\x1b[2J", Bytes: 1, Total: 2}, "x\\u001b[2J: 1 B of 2 B"},
	} {
		var now transfers
		now.take([]*agentv1.Progress{row.p}, time.Unix(100, 0))
		if got := now[0].line(); got != row.want {
			t.Errorf("%s: %q, want %q", name, got, row.want)
		}
	}
}

// Where nothing moves on a screen, what takes long is told now and then, and what does
// not is not.
func TestProgressInLines(t *testing.T) {
	s := newFakeStack(t)
	at := func(second int64, going ...*agentv1.Progress) *agentv1.WatchResponse {
		return &agentv1.WatchResponse{TimeUnixNano: time.Unix(second, 0).UnixNano(), Event: &agentv1.WatchResponse_Progress{Progress: &agentv1.ProgressEvent{Going: going}}}
	}
	send := func(n int64) *agentv1.Progress {
		return &agentv1.Progress{What: "send", Name: "#1 a", Bytes: n << 20, Total: 100 << 20}
	}
	s.agent.jobs["job-1"] = &agentv1.Job{Id: "job-1", State: stateSucceeded, Going: []*agentv1.Progress{send(7)}}
	s.agent.events = printed(at(10, send(1)), at(11, send(2)), at(12, send(3)), at(13, send(4)), at(21, send(5)), at(22, send(6)), at(23), at(24, &agentv1.Progress{What: "decrypt", Total: 9}), at(25))
	r := s.coffer(t.Context(), "watch", "job-1")
	want := "  sending checkpoint #1 a: 3.0 MiB of 100.0 MiB, 1.0 MiB/s, 1m37s left\n  sending checkpoint #1 a: 6.0 MiB of 100.0 MiB"
	if got := r.stdout; !strings.HasPrefix(got, want) || strings.Count(got, "sending") != 2 || strings.Contains(got, "decrypting") {
		t.Errorf("told:\n%s", got)
	}
	s.coffer(t.Context(), "watch", "job-1", "-o", "json").want(t, 0, `"kind":"progress","going":[{"what":"send","name":"#1 a","bytes":1048576,"total":104857600}]`)
	if r := s.coffer(t.Context(), "events", "job-1", "-o", "json"); strings.Contains(r.stdout, "progress") {
		t.Errorf("it has not happened:\n%s", r.stdout)
	}
	s.coffer(t.Context(), "status", "job-1").want(t, 0, "going", "sending checkpoint #1 a: 7.0 MiB of 100.0 MiB")
	s.coffer(t.Context(), "status", "job-1", "-o", "json").want(t, 0, `"what": "send"`, `"bytes": 7340032`)
}

// pulling is an agent whose node fetches an image.
type pulling struct {
	agentv1connect.AgentServiceClient
	asked []string
	going func() *agentv1.Progress
}

func (p *pulling) Capacity(_ context.Context, r *connect.Request[agentv1.CapacityRequest]) (*connect.Response[agentv1.CapacityResponse], error) {
	p.asked = append(p.asked, r.Msg.GetImage())
	if p.going == nil {
		return nil, connect.NewError(connect.CodeUnavailable, errors.New("away"))
	}
	return connect.NewResponse(&agentv1.CapacityResponse{Image: p.going()}), nil
}

// Who plans or submits hears how far the image is for which the node makes them wait.
func TestWhileFetching(t *testing.T) {
	far := func() *agentv1.Progress {
		return &agentv1.Progress{What: "image", Name: "demo", Bytes: 1 << 20, Total: 2 << 20}
	}
	failed := errors.New("refused")
	for name, row := range map[string]struct {
		file  string
		takes time.Duration
		going func() *agentv1.Progress
		asked int
		told  int
	}{
		"at once":                         {smallJob, 0, far, 0, 0},
		"two seconds":                     {smallJob, 2500 * time.Millisecond, far, 2, 0},
		"a quarter of a minute":           {smallJob, 15500 * time.Millisecond, far, 15, 2},
		"nothing is fetched":              {smallJob, 15500 * time.Millisecond, func() *agentv1.Progress { return nil }, 15, 0},
		"an agent that does not say":      {smallJob, 3500 * time.Millisecond, nil, 3, 0},
		"a job file that nobody can read": {"name: [", 3500 * time.Millisecond, far, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var errs bytes.Buffer
				a := &pulling{going: row.going}
				err := (&cli{stderr: &errs}).whileFetching(t.Context(), a, []byte(row.file), func() error {
					time.Sleep(row.takes)
					return failed
				})
				if !errors.Is(err, failed) {
					t.Errorf("got %v", err)
				}
				if len(a.asked) != row.asked || strings.Count(errs.String(), "fetching image demo: 1.0 MiB of 2.0 MiB") != row.told || row.told == 0 && errs.Len() > 0 {
					t.Errorf("asked %d times, told %q", len(a.asked), errs.String())
				}
			})
		})
	}
}
