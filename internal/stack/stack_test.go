package stack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	writing "github.com/coffer-run/coffer/internal/executable"
	"github.com/coffer-run/coffer/internal/loopback"
)

func readLoosely(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}

func listenUnix(ctx context.Context, path string) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { _ = l.Close() })
	for {
		c, err := l.Accept()
		if err != nil {
			return nil
		}
		_ = c.Close()
	}
}

// need skips a test that cannot run here, except in continuous integration,
// where it must.
func need(t *testing.T, ok bool, why string) {
	t.Helper()
	if ok {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal(why)
	}
	t.Skip(why)
}

// options returns those of a stack of played daemons over real tools.
func options(t *testing.T, binName string) Options {
	t.Helper()
	need(t, os.Geteuid() == 0, "starting a stack needs root")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(t.TempDir(), binName)
	if err := os.MkdirAll(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, n := range ourTools() {
		// A copy by link: /proc/self/exe keeps the name it was run by.
		if err := os.Link(self, filepath.Join(bin, n)); err != nil {
			b, err := os.ReadFile(self)
			if err != nil {
				t.Fatal(err)
			}
			if err := writing.Write(filepath.Join(bin, n), b); err != nil {
				t.Fatal(err)
			}
		}
	}
	p, err := PortsFrom(loopback.Base(t))
	if err != nil {
		t.Fatal(err)
	}
	o := Options{Dir: filepath.Join(t.TempDir(), "stack"), BinDir: bin, ToolsDir: os.Getenv("COFFER_TOOLS"), Ports: p}
	for _, f := range o.tools().check() {
		need(t, f.Outcome == OK, "starting a stack needs the tools: "+f.Found+"; "+f.Advice)
	}
	seed(t, o.Dir)
	o.Progress = func(s Step) {
		var d *DaemonError
		if errors.As(s.Err, &d) {
			t.Logf("%s:\n%s", d.Log, d.Tail)
		}
		if s.Done {
			t.Logf("%-20s %8s %s %v", s.Name, s.Took.Round(time.Millisecond), s.Detail, s.Err)
		}
	}
	t.Cleanup(func() {
		if err := Down(context.Background(), o.Dir, true, nil); err != nil {
			var none *NoStackError
			if !errors.As(err, &none) {
				t.Errorf("down: %v", err)
			}
		}
	})
	return o
}

func traces(t *testing.T, l Layout) []string {
	t.Helper()
	out, err := l.Traces()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// minted is a folder with devices and a TPM, which take seconds to make; the
// tests that start stacks begin with a copy.
var minted = sync.OnceValue(func() error {
	l, err := NewLayout(mintedDir)
	if err != nil {
		return err
	}
	s := &starter{Layout: l}
	for _, do := range []func(context.Context) (string, error){s.devices, s.tpmState} {
		if _, err := do(context.Background()); err != nil {
			return err
		}
	}
	return writeJSON(l.infoFile(), info{Version: infoVersion})
})

// mintedDir is made and removed by TestMain.
var mintedDir string

func seed(t *testing.T, dir string) {
	t.Helper()
	if err := minted(); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cp", "-a", mintedDir, dir).CombinedOutput(); err != nil {
		t.Fatalf("copy: %v: %s", err, out)
	}
}

func TestUpAndDown(t *testing.T) {
	o := options(t, "bin")
	l, err := NewLayout(o.Dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	o.Images = []string{tinyArchive(t, "coffer.local/tiny:latest", "coffer.local/tiny:other"), tinyArchive(t, "coffer.local/tiny:other")}
	if _, err := Up(ctx, o); err != nil {
		t.Fatalf("up: %v", err)
	}
	had := storedImages(t, l)
	if len(had) != 2 {
		t.Errorf("images %v, want two", had)
	}
	rec, err := l.readRecord()
	if err != nil {
		t.Fatal(err)
	}
	if len(rec.Processes) != 7 {
		t.Fatalf("%d daemons recorded, want 7", len(rec.Processes))
	}
	for _, p := range rec.Processes {
		if !p.alive() {
			t.Errorf("%s is not alive", p.Name)
		}
	}
	for _, pattern := range []string{"pki/*.key", "verifier/*.key", "verifier/key.pem", "broker/*.key", "broker/keystore/*", "broker/key.pem", "issuer/key.pem", "people/*", "policies/set/*", "simulation/devices/*"} {
		files, err := filepath.Glob(filepath.Join(o.Dir, pattern))
		if err != nil || len(files) == 0 {
			t.Errorf("%s: %v, %v", pattern, files, err)
		}
		for _, f := range files {
			if fi, err := os.Stat(f); err != nil || fi.Mode().Perm()&0o077 != 0 {
				t.Errorf("%s is open to others: %v, %v", f, fi.Mode(), err)
			}
		}
	}

	_, err = Up(ctx, o)
	var pre *PreflightError
	if !errors.As(err, &pre) || len(pre.Findings) != 1 || pre.Findings[0].Name != "folder" {
		t.Errorf("second up: %v, want a refusal for the folder alone", err)
	}
	other := o
	other.Dir = filepath.Join(t.TempDir(), "other")
	_, err = Up(ctx, other)
	if !errors.As(err, &pre) || len(pre.Findings) != 1 || pre.Findings[0].Name != "ports" {
		t.Errorf("up on the same ports: %v, want a refusal for the ports alone", err)
	}
	if _, err := os.Stat(other.Dir); err == nil {
		t.Error("a refused up left its folder behind")
	}

	// What a job leaves when its agent is killed: a process with the mark, one
	// in the cgroup, a mount below RUN and a named network namespace.
	leave(t, l)

	if err := Down(ctx, o.Dir, false, nil); err != nil {
		t.Fatalf("down: %v", err)
	}
	if left := traces(t, l); len(left) > 0 {
		t.Errorf("down left behind: %s", strings.Join(left, "; "))
	}
	if err := Down(ctx, o.Dir, false, nil); err != nil {
		t.Errorf("second down: %v", err)
	}
	key, err := os.ReadFile(l.keyStore("keys.json"))
	if err != nil {
		t.Fatalf("down removed state: %v", err)
	}

	o.Images = nil
	if _, err := Up(ctx, o); err != nil {
		t.Fatalf("up again: %v", err)
	}
	if has := storedImages(t, l); !maps.Equal(has, had) {
		t.Errorf("images %v, before it went down %v", has, had)
	}
	if again, err := os.ReadFile(l.keyStore("keys.json")); err != nil || !slices.Equal(key, again) {
		t.Errorf("the second up has other keys: %v", err)
	}
	if err := Down(ctx, o.Dir, true, nil); err != nil {
		t.Fatalf("down --purge: %v", err)
	}
	if _, err := os.Stat(o.Dir); err == nil {
		t.Error("purge left the folder")
	}
}

func leave(t *testing.T, l Layout) {
	t.Helper()
	sleep := func(env ...string) *exec.Cmd {
		c := exec.Command("sleep", "300")
		c.Env = env
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		go func() { _ = c.Wait() }()
		t.Cleanup(func() { _ = c.Process.Kill() })
		return c
	}
	sleep(stackVariable + "=" + l.ID)
	top := filepath.Join(cgroupRoot, "pids", l.Cgroup())
	if _, err := os.Stat(filepath.Join(cgroupRoot, "cgroup.controllers")); err == nil {
		top = filepath.Join(cgroupRoot, l.Cgroup())
	}
	group := filepath.Join(top, "job", "container")
	if err := os.MkdirAll(group, 0o755); err != nil {
		t.Fatal(err)
	}
	member := sleep()
	if err := os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte(fmt.Sprint(member.Process.Pid)), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"a", "a/in side"} {
		at := filepath.Join(l.Jobs(), d)
		if err := os.MkdirAll(at, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("tmpfs", at, "tmpfs", 0, "size=64k"); err != nil {
			t.Fatal(err)
		}
	}
	busy, err := os.Create(filepath.Join(l.Jobs(), "a/in side/busy"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = busy.Close() })
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		t.Fatal(err)
	}
	ns := filepath.Join(netnsDir, "coffer-"+l.ID+"-job")
	if err := os.WriteFile(ns, nil, 0o400); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("/proc/self/ns/net", ns, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
}

func TestUpStopsEverythingWhenOneDaemonFails(t *testing.T) {
	for _, name := range []string{emulatorName, agentName} {
		t.Run(name, func(t *testing.T) {
			o := options(t, "broken-"+name)
			l, err := NewLayout(o.Dir)
			if err != nil {
				t.Fatal(err)
			}
			_, err = Up(t.Context(), o)
			var d *DaemonError
			if !errors.As(err, &d) || d.Name != name {
				t.Fatalf("up: %v, want an error of %s", err, name)
			}
			if !strings.Contains(d.Tail, "broken on purpose") {
				t.Errorf("the log's end is not shown: %q", d.Tail)
			}
			if left := traces(t, l); len(left) > 0 {
				t.Errorf("a failed up left behind: %s", strings.Join(left, "; "))
			}
		})
	}
}

func TestUpInterrupted(t *testing.T) {
	o := options(t, "bin")
	l, err := NewLayout(o.Dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	seed(t, o.Dir)
	o.Progress = func(s Step) {
		if s.Name == verifierName {
			cancel()
		}
	}
	if _, err := Up(ctx, o); !errors.Is(err, context.Canceled) {
		t.Errorf("up: %v, want context canceled", err)
	}
	if left := traces(t, l); len(left) > 0 {
		t.Errorf("an interrupted up left behind: %s", strings.Join(left, "; "))
	}
}

func TestRestart(t *testing.T) {
	o := options(t, "bin")
	l, err := NewLayout(o.Dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	if _, err := Up(ctx, o); err != nil {
		t.Fatal(err)
	}
	pids := func() map[string]int {
		rec, err := l.readRecord()
		if err != nil {
			t.Fatal(err)
		}
		m := map[string]int{}
		for _, p := range rec.Processes {
			if !p.alive() {
				t.Errorf("%s is not alive", p.Name)
			}
			m[p.Name] = p.PID
		}
		return m
	}
	before := pids()
	if err := unix.Kill(before[brokerName], unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(time.Minute)
	for _, err := startTime(before[brokerName]); err == nil && time.Now().Before(deadline); _, err = startTime(before[brokerName]) {
		time.Sleep(pollEvery)
	}
	if _, err := Restart(ctx, o.Dir, nil, nil); err != nil {
		t.Fatalf("restart: %v", err)
	}
	after := pids()
	for name, pid := range before {
		if same := after[name] == pid; same == (name == brokerName) {
			t.Errorf("%s: pid %d before, %d after", name, pid, after[name])
		}
	}
	if _, err := Restart(ctx, o.Dir, []string{swtpmName}, nil); err != nil {
		t.Fatalf("restart swtpm: %v", err)
	}
	last := pids()
	for name, pid := range after {
		if same := last[name] == pid; same == (name == swtpmName || name == agentName) {
			t.Errorf("%s: pid %d before, %d after the TPM was restarted", name, pid, last[name])
		}
	}
	if _, err := Restart(ctx, o.Dir, []string{"nginx"}, nil); err == nil {
		t.Error("restart of an unknown daemon succeeds")
	}
	if err := Down(ctx, o.Dir, false, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := Restart(ctx, o.Dir, nil, nil); err == nil {
		t.Error("restart of a stack that is not up succeeds")
	}
}
