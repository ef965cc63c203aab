package stack

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMountsUnder(t *testing.T) {
	const info = `22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 22 0:33 / /var/lib/coffer/a rw - tmpfs tmpfs rw
41 40 0:34 / /var/lib/coffer/a/deep\040er rw - fuse coffer rw
42 22 0:35 / /var/lib/coffer-other rw - tmpfs tmpfs rw
43 22 0:36 / /run/coffer/01234567/jobs/x rw - tmpfs tmpfs rw
44 22 0:37 / /var/lib/coffer/a rw - tmpfs tmpfs rw
short line
`
	for _, tc := range []struct {
		name string
		dirs []string
		want []string
	}{
		{"deepest first, stacked mounts last come first", []string{"/var/lib/coffer"}, []string{"/var/lib/coffer/a/deep er", "/var/lib/coffer/a", "/var/lib/coffer/a"}},
		{"two folders", []string{"/var/lib/coffer/a/deep er", "/run/coffer/01234567"}, []string{"/run/coffer/01234567/jobs/x", "/var/lib/coffer/a/deep er"}},
		{"a name that only begins alike", []string{"/var/lib/cof"}, []string{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := mountsUnder(info, tc.dirs...); !reflect.DeepEqual(got, tc.want) {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

func TestUnescapeMount(t *testing.T) {
	for in, want := range map[string]string{
		"/a":          "/a",
		`/a\040b`:     "/a b",
		`/a\134040`:   `/a\040`,
		`/a\0`:        `/a\0`,
		`/a\999\011b`: "/a\\999\tb",
	} {
		if got := unescapeMount(in); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}

func TestSwapAreas(t *testing.T) {
	if got := swapAreas("Filename\t\t\tType\n"); len(got) != 0 {
		t.Errorf("no swap: %q", got)
	}
	if got := swapAreas("Filename\tType\n/dev/sda2 partition 1 0 -2\n/swap file 1 0 -3\n"); !reflect.DeepEqual(got, []string{"/dev/sda2", "/swap"}) {
		t.Errorf("two areas: %q", got)
	}
}

func TestListenInode(t *testing.T) {
	const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1D11 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0
   1: 0100007F:1D12 0100007F:A000 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 0
`
	if got := listenInode(table, 7441); got != "4711" {
		t.Errorf("listener: %q", got)
	}
	if got := listenInode(table, 7442); got != "" {
		t.Errorf("a connection is not a listener: %q", got)
	}
}

func TestSmallParsers(t *testing.T) {
	if got := chosen("always within_size [advise] never\n"); got != "advise" {
		t.Errorf("chosen: %q", got)
	}
	for in, want := range map[string][2]int{"6.18.44-fc": {6, 18}, "6.9": {6, 9}, "weird": {0, 0}} {
		if a, b := kernelVersion(in); a != want[0] || b != want[1] {
			t.Errorf("kernelVersion(%q) = %d, %d", in, a, b)
		}
	}
	for in, want := range map[int64]string{5: "5 B", 2 << 30: "2.0 GiB", 1536: "1.5 KiB"} {
		if got := Bytes(in); got != want {
			t.Errorf("Bytes(%d) = %q, want %q", in, got, want)
		}
	}
	if n, ok := memField([]byte("MemTotal: 5 kB\nMemAvailable:   16 kB\n"), "MemAvailable"); !ok || n != 16<<10 {
		t.Errorf("memField: %d, %v", n, ok)
	}
}

func TestLayoutSocketsFit(t *testing.T) {
	l, err := NewLayout("/" + strings.Repeat("very-long-folder-name/", 20))
	if err != nil {
		t.Fatal(err)
	}
	// sockaddr_un has 108 bytes, the last one for the terminating zero.
	longest := filepath.Join(l.Jobs(), "01JD3V8QW0000000000000000A", "holder.sock")
	if len(longest) > 107 {
		t.Errorf("%s has %d bytes", longest, len(longest))
	}
}

func TestProcessIsNamedByItsStart(t *testing.T) {
	c := exec.Command("sleep", "300")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	t.Cleanup(func() { _ = c.Process.Kill() })
	start, err := startTime(c.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	other := process{Name: "sleep", PID: c.Process.Pid, Start: start + 1}
	if other.alive() {
		t.Error("a process with another start time counts as alive")
	}
	if err := other.signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
		t.Fatal("a reused pid was hit")
	case <-time.After(50 * time.Millisecond):
	}
	p := process{Name: "sleep", PID: c.Process.Pid, Start: start}
	if err := p.stop(t.Context(), time.Second); err != nil {
		t.Fatal(err)
	}
	<-ended
	if p.alive() {
		t.Error("alive after stop")
	}
	if err := p.stop(t.Context(), time.Second); err != nil {
		t.Errorf("stopping again: %v", err)
	}
	for _, pid := range []int{0, 1, -1} {
		if (process{PID: pid}).alive() {
			t.Errorf("pid %d counts as ours", pid)
		}
	}
}

func TestStopKillsWhatIgnoresTheTermSignal(t *testing.T) {
	c := exec.Command("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done")
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	go func() { _ = c.Wait() }()
	start, err := startTime(c.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	p := process{Name: "sh", PID: c.Process.Pid, Start: start}
	if err := p.stop(t.Context(), 50*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if p.alive() {
		t.Error("still alive")
	}
}

func TestForeignFolders(t *testing.T) {
	need(t, os.Geteuid() == 0, "down needs root")
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "thesis.tex"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := NewLayout(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.claim(); err == nil {
		t.Error("claimed a folder with something else in it")
	}
	var none *NoStackError
	if err := Down(context.Background(), dir, true, nil); !errors.As(err, &none) {
		t.Errorf("purge of a folder that holds no stack: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "thesis.tex")); err != nil {
		t.Errorf("purge removed something else: %v", err)
	}
	if err := Down(context.Background(), filepath.Join(dir, "none"), false, nil); !errors.As(err, &none) {
		t.Errorf("down of nothing: %v", err)
	}
}

// TestFoldersOfOthers holds a stack that another user could have made up, down to
// the program that `restart` runs and the processes that `down` ends.
func TestFoldersOfOthers(t *testing.T) {
	need(t, os.Geteuid() == 0, "giving folders away needs root")
	for name, tc := range map[string]struct {
		change func(dir string) error
		ok     bool
	}{
		"root's":                  {func(string) error { return nil }, true},
		"for all to read":         {func(dir string) error { return os.Chmod(dir, 0o755) }, true},
		"of another user":         {func(dir string) error { return os.Chown(dir, 65534, 0) }, false},
		"writable to its group":   {func(dir string) error { return os.Chmod(dir, 0o770) }, false},
		"writable to all":         {func(dir string) error { return os.Chmod(dir, 0o777) }, false},
		"writable to all, sticky": {func(dir string) error { return os.Chmod(dir, 0o777|os.ModeSticky) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := NewLayout(filepath.Join(t.TempDir(), "stack"))
			if err != nil {
				t.Fatal(err)
			}
			if err := l.claim(); err != nil {
				t.Fatal(err)
			}
			if err := tc.change(l.Dir); err != nil {
				t.Fatal(err)
			}
			check := func(what string, err error) {
				t.Helper()
				if ok := err == nil; ok != tc.ok {
					t.Errorf("%s: %v", what, err)
				}
			}
			check("claim an empty folder", l.claim())
			if err := writeJSON(l.infoFile(), info{Version: infoVersion, Bin: "/tmp/evil"}); err != nil {
				t.Fatal(err)
			}
			boot, err := bootID()
			if err != nil {
				t.Fatal(err)
			}
			if err := l.writeRecord(record{Version: recordVersion, Boot: boot}); err != nil {
				t.Fatal(err)
			}
			check("claim", l.claim())
			_, err = l.readInfo()
			check("info", err)
			_, err = l.readRecord()
			check("record", err)
			_, err = OpenEndpoint(l.Dir)
			check("endpoint", err)
			if ok := l.checkUp().Outcome == OK; ok != tc.ok {
				t.Errorf("finding: %+v", l.checkUp())
			}
			if !tc.ok {
				check("down", Down(t.Context(), l.Dir, false, nil))
				check("purge", Down(t.Context(), l.Dir, true, nil))
				_, err = Restart(t.Context(), l.Dir, nil, nil)
				check("restart", err)
			}
		})
	}
}

func TestRecordOfAnotherBoot(t *testing.T) {
	l, err := NewLayout(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	self, err := startTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	boot, err := bootID()
	if err != nil {
		t.Fatal(err)
	}
	ps := []process{{Name: "cofferd", PID: os.Getpid(), Start: self}}
	if err := l.writeRecord(record{Version: recordVersion, Boot: boot, Processes: ps}); err != nil {
		t.Fatal(err)
	}
	if f := l.checkUp(); f.Outcome != Fail {
		t.Errorf("same boot: %+v", f)
	}
	if err := l.writeRecord(record{Version: recordVersion, Boot: "another", Processes: ps}); err != nil {
		t.Fatal(err)
	}
	if f := l.checkUp(); f.Outcome != OK {
		t.Errorf("another boot: %+v", f)
	}
	if err := os.WriteFile(l.recordFile(), []byte(`{"version":"x"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if f := l.checkUp(); f.Outcome != Fail {
		t.Errorf("unknown version: %+v", f)
	}
}

func TestLockIsExclusive(t *testing.T) {
	l, err := NewLayout(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	unlock, err := l.lock()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.lock(); err == nil {
		t.Error("locked twice")
	}
	unlock()
	again, err := l.lock()
	if err != nil {
		t.Fatalf("lock after unlock: %v", err)
	}
	again()
}

func TestOnceMakesAnewWhatWasInterrupted(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "d")
	half := errors.New("interrupted")
	if err := once(dir, func() error {
		if err := os.WriteFile(filepath.Join(dir, "half"), nil, 0o600); err != nil {
			return err
		}
		return half
	}); !errors.Is(err, half) {
		t.Fatal(err)
	}
	calls := 0
	for range 2 {
		if err := once(dir, func() error { calls++; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if calls != 1 {
		t.Errorf("made %d times", calls)
	}
	if _, err := os.Stat(filepath.Join(dir, "half")); err == nil {
		t.Error("the interrupted one is still there")
	}
}

func TestPreflightNamesEveryFailure(t *testing.T) {
	l, err := NewLayout(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", t.TempDir())
	err = failures(thisMachine().preflight(l, tools{binDir: t.TempDir()}, Ports{Verifier: 1, Broker: 2, Agent: 3}))
	var pre *PreflightError
	if !errors.As(err, &pre) {
		t.Fatalf("got %v", err)
	}
	for _, want := range []string{"cofferd", "coffer-gpu-nvidia", "swtpm", "containerd", "runsc", "make deps"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not named in %q", want, err)
		}
	}
}
