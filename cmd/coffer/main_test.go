package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"

	"github.com/coffer-run/coffer/internal/loopback"
	"github.com/coffer-run/coffer/internal/stack"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"coffer": main})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(e *testscript.Env) error {
			e.Setenv("COFFER_DIR", e.WorkDir+"/stack")
			e.Setenv("NONE", e.WorkDir+"/none")
			e.Setenv("COFFER_SESSIONS", e.WorkDir+"/sessions")
			coffer, err := exec.LookPath("coffer")
			if err != nil {
				return err
			}
			e.Setenv("COFFER_BIN", os.Getenv("COFFER_BIN"))
			e.Setenv("COFFER_TOOLS", os.Getenv("COFFER_TOOLS"))
			e.Defer(func() {
				if os.Geteuid() == 0 {
					// A script that failed half-way leaves nothing either.
					_ = stack.Down(context.Background(), e.WorkDir+"/stack", true, nil)
				}
			})
			// For scripts that empty PATH.
			e.Setenv("COFFER", coffer)
			return nil
		},
		Condition: func(cond string) (bool, error) {
			switch cond {
			case "root":
				return os.Geteuid() == 0, nil
			case "stack":
				ok := os.Geteuid() == 0 && os.Getenv("COFFER_BIN") != "" && os.Getenv("COFFER_TOOLS") != ""
				if !ok && os.Getenv("CI") == "true" {
					return false, errors.New("starting a stack needs root, COFFER_BIN and COFFER_TOOLS")
				}
				return ok, nil
			}
			return false, nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			// exits CODE runs the command in the arguments after it and wants that exit code.
			"exits": exits,
			// freebase VAR sets VAR to the first of free ports that nobody else has.
			"freebase": freebase,
			// killdaemon NAME kills a daemon of the stack and waits for its end.
			"killdaemon": killdaemon,
			// started NAME waits until a daemon of the stack has been started.
			"started": started,
			// clean wants no process, mount, cgroup or socket of the stack.
			"clean": cleanStack,
			// tinyimage FILE NAME... writes an archive of images of one small layer.
			"tinyimage": tinyImage,
			// occupy VAR listens on a port whose two successors are free and sets VAR to it.
			"occupy": occupy,
		},
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
	})
}

func tinyImage(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: tinyimage FILE NAME...")
	}
	all := map[name.Tag]v1.Image{}
	for _, n := range args[1:] {
		tag, err := name.NewTag(n)
		ts.Check(err)
		img, err := random.Image(1024, 1)
		ts.Check(err)
		c, err := img.ConfigFile()
		ts.Check(err)
		c.OS, c.Architecture = "linux", runtime.GOARCH
		all[tag], err = mutate.ConfigFile(img, c)
		ts.Check(err)
	}
	ts.Check(tarball.MultiWriteToFile(ts.MkAbs(args[0]), all))
}

func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND [ARG]...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	if err != nil {
		var coded interface{ ExitCode() int }
		if !errors.As(err, &coded) {
			ts.Fatalf("%v", err)
		}
		got = coded.ExitCode()
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

func occupy(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: occupy VAR")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Defer(func() { _ = l.Close() })
	addr, ok := l.Addr().(*net.TCPAddr)
	if !ok {
		ts.Fatalf("listener has address %v", l.Addr())
	}
	if _, err := stack.PortsFrom(addr.Port); err != nil {
		ts.Fatalf("%v", err)
	}
	ts.Setenv(args[0], strconv.Itoa(addr.Port))
}

func freebase(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: freebase VAR")
	}
	base, release, err := loopback.Lend()
	ts.Check(err)
	ts.Defer(release)
	ts.Setenv(args[0], strconv.Itoa(base))
}

// daemonPID reads a daemon's pid from the stack's record.
func daemonPID(ts *testscript.TestScript, name string) int {
	b, err := os.ReadFile(ts.MkAbs("stack/run.json"))
	if err != nil {
		return 0
	}
	var rec struct {
		Processes []struct {
			Name string
			PID  int
		}
	}
	ts.Check(json.Unmarshal(b, &rec))
	for _, p := range rec.Processes {
		if p.Name == name {
			return p.PID
		}
	}
	return 0
}

func until(ts *testscript.TestScript, what string, ok func() bool) {
	for range 6000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	ts.Fatalf("waited too long for %s", what)
}

func killdaemon(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: killdaemon NAME")
	}
	pid := daemonPID(ts, args[0])
	if pid <= 1 {
		ts.Fatalf("no daemon %s", args[0])
	}
	ts.Check(syscall.Kill(pid, syscall.SIGKILL))
	until(ts, args[0]+" to end", func() bool { return syscall.Kill(pid, 0) != nil || zombie(pid) })
}

func zombie(pid int) bool {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	return err != nil || strings.Contains(string(b), ") Z ")
}

func started(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: started NAME")
	}
	until(ts, args[0], func() bool { return daemonPID(ts, args[0]) > 1 })
}

func cleanStack(ts *testscript.TestScript, _ bool, _ []string) {
	l, err := stack.NewLayout(ts.MkAbs("stack"))
	ts.Check(err)
	left, err := l.Traces()
	ts.Check(err)
	if len(left) > 0 {
		ts.Fatalf("left behind: %s", strings.Join(left, "; "))
	}
}

// TestHelp wants a sentence and an example of every command that does something.
func TestHelp(t *testing.T) {
	c := &cli{stdout: io.Discard, stderr: io.Discard}
	seen := 0
	var look func(*cobra.Command)
	look = func(cmd *cobra.Command) {
		for _, sub := range cmd.Commands() {
			look(sub)
		}
		if cmd.HasSubCommands() {
			return
		}
		seen++
		if cmd.Short == "" || !strings.Contains(cmd.Example, cmd.CommandPath()) {
			t.Errorf("%s: %q, example %q", cmd.CommandPath(), cmd.Short, cmd.Example)
		}
	}
	look(c.root())
	if seen < 40 {
		t.Errorf("%d commands", seen)
	}
}
