package runner

import (
	"encoding/json"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/runner/holder"
	"github.com/coffer-run/coffer/runner/rules"
)

// printed answers as the holder of a job that has printed a line and ended, if it started.
func printed(c net.Conn, started bool) {
	defer c.Close()
	buf := make([]byte, holdapi.MaxMessage)
	for {
		n, err := c.Read(buf)
		if err != nil || n == 0 {
			return
		}
		var q holdapi.Request
		if json.Unmarshal(buf[:n], &q) != nil {
			return
		}
		status := &holdapi.Status{Started: started}
		res := holdapi.Response{Hello: &holdapi.Hello{JobID: "job", Pid: os.Getpid()}, Status: status, Events: &holdapi.EventsResult{}}
		if q.Op == holdapi.OpEvents && started && q.Events.After == 0 {
			res.Events.Events = []holdapi.Event{{Sequence: 1, UnixNano: 9, Kind: bundle.EventContainerStart}}
		}
		if q.Op == holdapi.OpLogs {
			res.Logs = &holdapi.LogChunk{EOF: true}
			if q.Logs.Stream == "stdout" && q.Logs.Offset == 0 {
				res.Logs = &holdapi.LogChunk{Data: []byte("line 0\n")}
			}
		}
		b, err := json.Marshal(res)
		if err != nil {
			return
		}
		if _, err := c.Write(b); err != nil {
			return
		}
	}
}

// holderThatPrinted gives a job such a holder.
func holderThatPrinted(t *testing.T, j *Job, started bool) {
	t.Helper()
	j.runDir = t.TempDir()
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: filepath.Join(j.runDir, holdapi.SocketName), Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go printed(c, started)
		}
	}()
	if j.holder, err = holder.Attach(t.Context(), j.runDir, "job"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = j.holder.Detach() })
}

// What a job printed is in its record also where no agent, or not this one, could follow
// it: its disk was full when the job started, or the job is taken up only to be ended.
func TestWhatNobodyFollowedIsInTheRecord(t *testing.T) {
	for name, started := range map[string]bool{"it started": true, "it did not": false} {
		t.Run(name, func(t *testing.T) {
			jnl := journalWithJob(t)
			j := newJob("job", "user/ada")
			j.feed, j.cancel = newFeed("job", jnl), func(error) {}
			holderThatPrinted(t, j, started)
			shipped, err := rules.Parse(rules.Default)
			if err != nil {
				t.Fatal(err)
			}
			a := &Agent{Deps: Deps{Journal: jnl, Rules: shipped}, log: slog.New(slog.DiscardHandler), ctx: t.Context()}
			if _, err := a.finish(t.Context(), j); err != nil {
				t.Fatal(err)
			}
			want := int64(0)
			if started {
				want = 7
			}
			if got := j.logs[0].stream(); got.Bytes != want || j.pumped != started {
				t.Errorf("%d bytes, want %d; followed: %t", got.Bytes, want, j.pumped)
			}
		})
	}
}
