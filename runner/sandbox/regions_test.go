package sandbox

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// handing answers one packet on a socket in a folder for RegionsMount, with who
// came: the control group of the process that connected. The answer waits for goOn.
func handing(t *testing.T, goOn <-chan struct{}) (dir string, came <-chan string) {
	t.Helper()
	dir = t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "regions.sock")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	out := make(chan string, 1)
	go func() {
		c, err := l.AcceptUnix()
		if err != nil {
			return
		}
		defer c.Close()
		raw, err := c.SyscallConn()
		if err != nil {
			return
		}
		_ = raw.Control(func(fd uintptr) {
			cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
			if err != nil {
				out <- err.Error()
				return
			}
			f, err := os.Open(fmt.Sprintf("/proc/%d/cgroup", cred.Pid))
			if err != nil {
				out <- err.Error()
				return
			}
			defer f.Close()
			groups := ""
			for s := bufio.NewScanner(f); s.Scan(); {
				_, group, _ := strings.Cut(s.Text(), ":")
				groups += group + "\n"
			}
			out <- groups
		})
		buf := make([]byte, 100)
		n, _ := c.Read(buf)
		<-goOn
		_, _ = c.Write(buf[:n])
	}()
	return dir, out
}

// What connects for a job stands in the job's control group, by which the holder
// knows its own job's programs.
func TestASocketInAMountSeesTheJobsGroup(t *testing.T) {
	n := startContainerd(t)
	goOn := make(chan struct{})
	dir, came := handing(t, goOn)
	j := n.testJobWith(t, "test-regions", []Bind{{Source: dir, Target: RegionsMount}}, "/usr/bin/python3", "-c", `
import socket
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.connect("`+RegionsMount+`/regions.sock")
s.sendall(b"hello")
print(s.recv(100).decode())
`)
	if err := j.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	select {
	case groups := <-came:
		want := JobCgroup(testCgroup, "test-regions")
		found := false
		for line := range strings.Lines(groups) {
			hierarchy, group, _ := strings.Cut(strings.TrimSpace(line), ":")
			if hierarchy == "memory" || hierarchy == "" {
				found = found || strings.HasSuffix(group, want)
			}
		}
		if !found {
			t.Errorf("connected from\n%swant %s", groups, want)
		}
		t.Log(groups)
	case <-time.After(time.Minute):
		t.Fatal("nobody connected")
	}
	// The job's program runs, and waits.
	processesOf(t, j)
	close(goOn)
	if out := <-j.stdout; out != "hello\n" {
		t.Errorf("the job said %q", out)
	}
}
