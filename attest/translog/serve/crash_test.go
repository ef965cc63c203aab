package serve

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// childVariable tells the test binary to be the process that is killed.
const childVariable = "COFFER_TEST_LOG_CHILD"

// child is a sequencer over Entries entries that kills itself when it has come to
// Step for the Nth time, or runs until it is killed.
type child struct {
	Dir, Key, Step string
	Nth, Entries   int
}

func TestMain(m *testing.M) {
	arg := os.Getenv(childVariable)
	if arg == "" {
		os.Exit(m.Run())
	}
	if err := beChild(arg); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func beChild(arg string) error {
	var c child
	if err := json.Unmarshal([]byte(arg), &c); err != nil {
		return err
	}
	var t testing.T
	l, err := New(Config{Dir: c.Dir, Broker: broker, Key: c.Key, Source: newMemory(&t, c.Entries), Client: &http.Client{}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	seen := 0
	l.reached = func(step string) {
		if step != c.Step {
			return
		}
		if seen++; seen == c.Nth {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	return l.Run(context.Background())
}

// die runs a child until it is killed: by itself, or after a time.
func die(t *testing.T, c child, after time.Duration) {
	t.Helper()
	arg, err := json.Marshal(c)
	check(t, err)
	exe, err := os.Executable()
	check(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, exe)
	cmd.Env = append(os.Environ(), childVariable+"="+string(arg))
	check(t, cmd.Start())
	if after > 0 {
		time.Sleep(after)
		check(t, cmd.Process.Kill())
	}
	err = cmd.Wait()
	st, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !ok || !st.Signaled() || st.Signal() != syscall.SIGKILL || ctx.Err() != nil {
		t.Fatalf("the child was not killed: %v", err)
	}
}

// survives lets a new sequencer go on where a killed one left the folder, and asks
// only whether the log is whole.
func survives(t *testing.T, dir, key string, entries int) {
	t.Helper()
	m := newMemory(t, entries)
	c := config(t, m)
	c.Dir, c.Key = dir, key
	l := open(t, c)
	stop := start(t, l)
	check(t, audit(t, l, published(t, l, entries)))
	check(t, stop())
	size, err := os.ReadFile(dir + "/.state/treeState")
	check(t, err)
	var state struct{ Size uint64 }
	check(t, json.Unmarshal(size, &state))
	if state.Size != uint64(entries) {
		t.Errorf("the tree has %d entries, want %d", state.Size, entries)
	}
}

func TestKilledAtEachStep(t *testing.T) {
	for _, step := range []string{"before add", "after add", "after integration"} {
		for _, nth := range []int{1, 2, 5} {
			t.Run(step+" "+strconv.Itoa(nth), func(t *testing.T) {
				t.Parallel()
				c := config(t, newMemory(t, 0))
				die(t, child{Dir: c.Dir, Key: c.Key, Step: step, Nth: nth, Entries: 300}, 0)
				survives(t, c.Dir, c.Key, 301)
			})
		}
	}
}

// TestKilledAtAnyTime kills one log's sequencers again and again, wherever they
// are: in the middle of a write, of a rename, of signing.
func TestKilledAtAnyTime(t *testing.T) {
	c := config(t, newMemory(t, 0))
	entries := 0
	for i := range 12 {
		entries += 40
		die(t, child{Dir: c.Dir, Key: c.Key, Entries: entries}, time.Duration(20+11*i)*time.Millisecond)
	}
	survives(t, c.Dir, c.Key, entries)
}
