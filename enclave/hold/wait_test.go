package hold_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/enclave/keys"
)

// waiting starts a holder that waits for a job, and returns the other end of its
// socket.
func waiting(t *testing.T, regions string) (*holder, *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	theirs, f := os.NewFile(uintptr(fds[1]), "theirs"), os.NewFile(uintptr(fds[0]), "ours")
	conn, err := net.FileConn(f)
	must(t, errors.Join(err, f.Close()))
	t.Cleanup(func() { _ = conn.Close() })
	h := launch(t, theirs, func(*holder) []string { return []string{holdapi.WaitArg, "--regions", regions} })
	must(t, theirs.Close())
	return h, conn.(*net.UnixConn)
}

// has lists what a process has open, its standard descriptors and the runtime's
// left out.
func (h *holder) has() []string {
	h.t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", h.cmd.Process.Pid)
	es, err := os.ReadDir(dir)
	must(h.t, err)
	var out []string
	for _, e := range es {
		to, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil || len(e.Name()) == 1 && e.Name() <= "2" || strings.HasPrefix(to, "anon_inode:") || strings.HasPrefix(to, "/sys/fs/cgroup/") {
			continue
		}
		out = append(out, to)
	}
	slices.Sort(out)
	return out
}

const waitingRegion = "/memfd:coffer-region (deleted)"

// locked is what the kernel has locked of a process's memory in regions, in KiB.
func (h *holder) locked() (kib int) {
	h.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", h.cmd.Process.Pid))
	must(h.t, err)
	in := false
	for line := range strings.Lines(string(b)) {
		if name, _, _ := strings.Cut(line, " "); !strings.HasSuffix(name, ":") {
			in = strings.Contains(line, waitingRegion)
		}
		var n int
		if _, err := fmt.Sscanf(line, "Locked: %d kB", &n); in && err == nil {
			kib += n
		}
	}
	return kib
}

func TestHolderThatWaited(t *testing.T) {
	h, conn := waiting(t, "4194304,2097152")
	// It makes nothing before it is told to: what it touches is charged to the
	// control group that it is in by then.
	var socket []string
	h.until("the holder to have its socket and nothing else", func() bool {
		socket = h.has()
		return len(socket) == 1 && strings.HasPrefix(socket[0], "socket:")
	})
	if n := h.locked(); n != 0 {
		t.Errorf("before it began it has %d KiB", n)
	}
	must(t, holdapi.Begin.Say(conn))
	must(t, holdapi.Ready.Await(conn))
	if got := h.has(); !slices.Equal(got, []string{waitingRegion, waitingRegion, socket[0]}) {
		t.Errorf("while it waits it has %q", got)
	}
	if n := h.locked(); n != 6<<10 {
		t.Errorf("%d KiB of its regions are locked", n)
	}
	if es, err := os.ReadDir(h.run); err != nil || len(es) != 0 {
		t.Errorf("it has no job and made %v, %v", es, err)
	}
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	must(t, err)
	job := holdapi.Job{Args: h.args(), Log: log, Procs: h.procs}
	must(t, holdapi.GiveJob(conn, job))
	h.attach()
	if h.hi.JobID != jobID || h.hi.Pid != h.cmd.Process.Pid {
		t.Errorf("it calls itself %+v", h.hi)
	}
	if err := holdapi.GiveJob(conn, job); err == nil {
		t.Error("it was given a second job")
	}
	if slices.Contains(h.has(), socket[0]) {
		t.Error("it still has the socket")
	}

	files := map[string][]byte{"a": pattern(5<<20 + 3), "b": pattern(2<<20 - 9), "c": pattern(100)}
	key := keys.GenerateDataKey()
	dir, digest := sealed(t, key, "asset", files)
	must(t, h.c.Input(t.Context(), holdapi.Input{Name: "in", Asset: "asset", Digest: digest}, dir))
	must(t, h.c.Settle(t.Context()))
	must(t, h.c.Settle(t.Context()))
	must(t, h.deliver(key, "asset"))
	if d, err := h.c.Decrypt(t.Context()); err != nil || d.Files != 3 {
		t.Fatalf("%+v %v", d, err)
	}
	h.trace().start()
	h.waitStarted()
	for name, want := range files {
		if got, err := os.ReadFile(h.path("inputs/in", name)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	if st, err := h.c.Finish(t.Context()); err != nil || !st.Scrubbed || st.RegionBytes != 0 {
		t.Errorf("finish: %+v %v", st, err)
	}
	if n := h.locked(); n != 0 {
		t.Errorf("%d KiB are left in the end", n)
	}
	must(t, h.c.Exit(t.Context()))
	must(t, h.cmd.Wait())
	said, err := os.ReadFile(log.Name())
	if err != nil || !strings.Contains(string(said), `"taken":7340026`) || strings.Contains(h.log.String(), jobID) {
		t.Errorf("the job's log has:\n%s\nand the holder's own, %v:\n%s", said, err, h.log)
	}
}

// Whoever speaks to a holder that waits is who started it. What is not the protocol
// ends it all the same.
func TestHolderThatWaitsEnds(t *testing.T) {
	begun := func(f func(*holder, *net.UnixConn)) func(*holder, *net.UnixConn) {
		return func(h *holder, c *net.UnixConn) {
			must(h.t, holdapi.Begin.Say(c))
			must(h.t, holdapi.Ready.Await(c))
			f(h, c)
		}
	}
	send := func(b string, fds ...int) func(*holder, *net.UnixConn) {
		return begun(func(h *holder, c *net.UnixConn) {
			_, _, err := c.WriteMsgUnix([]byte(b), unix.UnixRights(fds...), nil)
			must(h.t, err)
		})
	}
	hangUp := func(_ *holder, c *net.UnixConn) { _ = c.Close() }
	for name, c := range map[string]struct {
		do   func(*holder, *net.UnixConn)
		well bool // it had nothing to do, which is no error
	}{
		"the other end is closed at once":       {hangUp, true},
		"the other end is closed":               {begun(hangUp), true},
		"it is told to end":                     {begun(func(h *holder, _ *net.UnixConn) { must(t, h.cmd.Process.Signal(syscall.SIGTERM)) }), false},
		"another word than begin":               {func(_ *holder, c *net.UnixConn) { must(t, holdapi.Ready.Say(c)) }, false},
		"a job that is none":                    {send("x", 1, 2), false},
		"a job with an unknown field":           {send(`{"args":[],"x":1}`, 1, 2), false},
		"a job without descriptors":             {send(`{"args":[]}`), false},
		"a job with one too many":               {send(`{"args":[]}`, 1, 2, 2), false},
		"a job with arguments that are refused": {send(`{"args":["--job","j"]}`, 1, 2), false},
	} {
		t.Run(name, func(t *testing.T) {
			h, conn := waiting(t, "1048576")
			c.do(h, conn)
			if err := h.cmd.Wait(); (err == nil) != c.well {
				t.Errorf("it ended with %v", err)
			}
			if es, err := os.ReadDir(h.run); err != nil || len(es) != 0 {
				t.Errorf("it left %v, %v", es, err)
			}
		})
	}
	for _, args := range [][]string{{}, {"--regions", ""}, {"--regions", "0"}, {"--regions", "1,x"}, {"--regions", strings.Repeat("1,", 64) + "1"}, {"--regions", "1", "--near-node", "-1"}, {"--regions", "1", "x"}} {
		h := launch(t, nil, func(*holder) []string { return append([]string{holdapi.WaitArg}, args...) })
		if err := h.cmd.Wait(); err == nil {
			t.Errorf("%q: it ended well", args)
		}
	}
}

func TestWordsBetweenAgentAndHolder(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "end")
		ends[i], err = net.FileConn(f)
		must(t, errors.Join(err, f.Close()))
	}
	a, b := ends[0].(*net.UnixConn), ends[1].(*net.UnixConn)
	must(t, holdapi.Begin.Say(a))
	must(t, holdapi.Begin.Await(b))
	must(t, holdapi.Ready.Say(a))
	if err := holdapi.Begin.Await(b); err == nil {
		t.Error("ready passed for begin")
	}
	if err := holdapi.GiveJob(a, holdapi.Job{Args: []string{strings.Repeat("x", holdapi.MaxMessage)}, Log: os.Stdin, Procs: os.Stdin}); err == nil {
		t.Error("a job was sent that is longer than a message")
	}
	must(t, a.Close())
	if _, err := holdapi.AwaitJob(b); !errors.Is(err, io.EOF) {
		t.Errorf("closed: %v", err)
	}
	must(t, b.Close())
}
