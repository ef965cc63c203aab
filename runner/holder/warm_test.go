package holder

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/internal/executable"
)

// program is a holder's binary that does something else.
func program(t *testing.T, does string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("a network namespace needs root")
		}
		t.Skip("a network namespace needs root")
	}
	path := filepath.Join(t.TempDir(), "program")
	if err := executable.Write(path, []byte("#!/bin/sh\n"+does+"\n")); err != nil {
		t.Fatal(err)
	}
	return path
}

func nowhere(int) error { return nil }

func startWarm(t *testing.T, does string) *Warm {
	t.Helper()
	w, err := StartWarm(WarmConfig{Path: program(t, does), Log: filepath.Join(t.TempDir(), "log"), Regions: []int64{1, 2}, NearNode: 3, Join: nowhere})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.End)
	return w
}

func gone(t *testing.T, w *Warm) {
	t.Helper()
	select {
	case <-w.Lost():
	case <-time.After(time.Minute):
		t.Error("its process is still there")
	}
}

// A holder gets the descriptors that it is to have, whatever its agent was started
// with, and nothing of its agent's environment.
func TestWhatAHolderIsStartedWith(t *testing.T) {
	stray, err := unix.Open("/dev/null", unix.O_RDONLY, 0) // not closed by exec
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(stray)
	t.Setenv("COFFER_STRAY", "1")
	out := filepath.Join(t.TempDir(), "out")
	w := startWarm(t, `word=$(dd bs=100 count=1 <&3 2>/dev/null); { echo "$word $*"; for f in /proc/$$/fd/*; do readlink $f; done; tr '\0' '\n' </proc/$$/environ; readlink /proc/self/cwd; } >`+out+`.part; mv `+out+`.part `+out+`; printf ready >&3; sleep 60`)
	select {
	case <-w.Ready():
	case <-time.After(time.Minute):
		t.Fatal("it did not get ready")
	}
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	said := string(b)
	if !strings.HasPrefix(said, "begin wait --regions 1,2 --near-node 3\n") || !strings.HasSuffix(said, "\n/\n") {
		t.Errorf("it was started as\n%s", said)
	}
	if strings.Count(said, "socket:") != 1 || strings.Count(said, "/dev/null\n") != 1 || strings.Contains(said, "COFFER_STRAY") {
		t.Errorf("it has\n%s", said)
	}
	w.End()
	gone(t, w)
}

// Whatever a holder that waited does in place of becoming the job's, no process of
// it is left, and the error says so.
func TestHolderThatIsOfNoUse(t *testing.T) {
	for name, does := range map[string]string{
		"it has died":             "exit 0",
		"it dies when it is told": "dd bs=100 count=1 <&3 >/dev/null 2>&1; dd bs=100000 count=1 <&3 >/dev/null 2>&1",
		"it never answers":        "exec sleep 60",
	} {
		t.Run(name, func(t *testing.T) {
			w := startWarm(t, does)
			if does == "exit 0" {
				gone(t, w)
			}
			patience := time.Minute
			if name == "it never answers" {
				patience = time.Second
			}
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			joined := 0
			h, err := Start(ctx, Config{
				Path: "/does/not/exist", RunDir: t.TempDir(), JobID: "j", Warm: w,
				Join: func(pid int) error { joined = pid; return nil }, Procs: func() (*os.File, error) { return os.Open("/dev/null") },
			})
			if h != nil || err == nil {
				t.Fatalf("it was taken for the job's: %v", err)
			}
			gone(t, w)
			if err := unix.Kill(w.cmd.Process.Pid, 0); !errors.Is(err, unix.ESRCH) {
				t.Errorf("its process is there: %v", err)
			}
			if does != "exit 0" && joined != w.cmd.Process.Pid {
				t.Errorf("process %d joined the job's group", joined)
			}
		})
	}
	// Another process is there first, and has keys of its own.
	w, dir := startWarm(t, "exec sleep 60"), t.TempDir()
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: filepath.Join(dir, holdapi.SocketName), Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, err = Start(t.Context(), Config{RunDir: dir, JobID: "j", Warm: w, Join: nowhere, Procs: func() (*os.File, error) { return os.Open("/dev/null") }})
	if !errors.Is(err, errStranger) {
		t.Errorf("another process passed for the holder: %v", err)
	}
	gone(t, w)
	w = startWarm(t, "exec sleep 60")
	if _, err := Start(t.Context(), Config{RunDir: filepath.Join(t.TempDir(), "none"), Warm: w}); err == nil {
		t.Error("it started without a run folder")
	}
	gone(t, w)
	if _, err := StartWarm(WarmConfig{Path: program(t, "exec sleep 60"), Log: filepath.Join(t.TempDir(), "log"), Join: func(int) error { return errors.New("no group") }}); err == nil {
		t.Error("it started outside its group")
	}
}
