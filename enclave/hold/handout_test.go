package hold_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/enclave/keys"
)

const (
	regionSocket = "COFFER_TEST_REGION_SOCKET"
	regionName   = "COFFER_TEST_REGION_NAME"
)

// TestRegionHelper is a process of the tests below: it prints what it is given.
func TestRegionHelper(t *testing.T) {
	socket := os.Getenv(regionSocket)
	if socket == "" {
		return // there is nothing to do but as a child
	}
	f, _, err := holdapi.OpenRegion(socket, os.Getenv(regionName))
	must(t, err)
	_, err = io.Copy(os.Stdout, f)
	must(t, err)
}

func (h *holder) regions() string { return h.path(holdapi.RegionsDir, holdapi.RegionsSocket) }

// opened is a holder with inputs decrypted, whose container has not started.
func opened(t *testing.T, files map[string][]byte) *holder {
	t.Helper()
	h := start(t)
	key := keys.GenerateDataKey()
	dir, digest := sealed(t, key, "a", files)
	must(t, h.c.Input(t.Context(), holdapi.Input{Name: "data", Asset: "a", Digest: digest}, dir))
	must(t, h.deliver(key, "a"))
	_, err := h.c.Decrypt(t.Context())
	must(t, err)
	return h
}

func TestRegionsAreHandedOut(t *testing.T) {
	files := map[string][]byte{"sub/big": pattern(5<<20 + 3), "small": []byte("hello\n"), "empty": nil}
	h := opened(t, files)
	early, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: h.regions(), Net: "unixpacket"})
	must(t, err)
	defer early.Close()
	_, err = early.Write([]byte(`{"version":"coffer.run/regions/v1","open":"data/small"}`))
	must(t, err)
	must(t, early.SetReadDeadline(time.Now().Add(200*time.Millisecond)))
	b, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	if n, oobn, _, _, err := early.ReadMsgUnix(b, oob); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("answered before the start: %q with %d bytes beside: %v", b[:n], oobn, err)
	}
	h.trace().start()
	h.waitStarted()
	must(t, early.SetReadDeadline(time.Now().Add(time.Minute)))
	if _, oobn, _, _, err := early.ReadMsgUnix(b, oob); err != nil || oobn == 0 {
		t.Errorf("who asked before the start was given nothing after it: %v", err)
	}

	var last *os.File
	for name, want := range files {
		f, size, err := holdapi.OpenRegion(h.regions(), "data/"+name)
		must(t, err)
		defer f.Close()
		got, err := io.ReadAll(f)
		if err != nil || size != int64(len(want)) || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, other than sealed: %v", name, size, err)
		}
		if name == "sub/big" {
			last = f
		}
	}
	fd := int(last.Fd())
	t.Run("for reading only", func(t *testing.T) {
		if _, err := unix.Pwrite(fd, []byte("x"), 0); err == nil {
			t.Error("written through the descriptor")
		}
		if m, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
			_ = unix.Munmap(m)
			t.Error("mapped for writing")
		}
		if f, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), os.O_RDWR, 0); err == nil {
			must(t, f.Close())
			if _, err := unix.Pwrite(int(f.Fd()), []byte("x"), 0); err == nil {
				t.Error("written through another descriptor")
			}
		}
		if err := unix.Ftruncate(fd, 0); err == nil {
			t.Error("cut")
		}
	})
	m, err := unix.Mmap(fd, 0, len(files["sub/big"]), unix.PROT_READ, unix.MAP_SHARED)
	must(t, err)
	defer unix.Munmap(m)
	if !bytes.Equal(m, files["sub/big"]) {
		t.Error("the map differs")
	}

	t.Run("nothing else", func(t *testing.T) {
		for _, name := range []string{"", "data", "data/", "data/none", "small", "/data/small", "data//small", "data/../data/small", "data/sub/../small", "../data/small", "other/small", "data/sub", "data/small\x00"} {
			if f, _, err := holdapi.OpenRegion(h.regions(), name); err == nil {
				_ = f.Close()
				t.Errorf("%q was opened", name)
			}
		}
	})
	t.Run("to who asks as described", func(t *testing.T) {
		for name, q := range map[string]string{
			"another version":      `{"version":"coffer.run/regions/v0","open":"data/small"}`,
			"no version":           `{"open":"data/small"}`,
			"a field that is none": `{"version":"coffer.run/regions/v1","open":"data/small","write":true}`,
			"two requests":         `{"version":"coffer.run/regions/v1","open":"data/small"}{}`,
			"no JSON":              "data/small",
			"too long":             `{"version":"coffer.run/regions/v1","open":"` + strings.Repeat("a", holdapi.MaxRegionRequest) + `"}`,
		} {
			c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: h.regions(), Net: "unixpacket"})
			must(t, err)
			_, err = c.Write([]byte(q))
			must(t, err)
			b, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
			n, oobn, _, _, err := c.ReadMsgUnix(b, oob)
			if oobn > 0 || err == nil && n > 0 && !bytes.Contains(b[:n], []byte(`"error"`)) {
				t.Errorf("%s: %q with %d bytes beside: %v", name, b[:n], oobn, err)
			}
			must(t, c.Close())
		}
	})
	t.Run("to many at a time, and not to all", func(t *testing.T) {
		var open []*net.UnixConn
		refused := 0
		for range 200 {
			c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: h.regions(), Net: "unixpacket"})
			must(t, err)
			open = append(open, c)
		}
		for _, c := range open {
			_, _ = c.Write([]byte(`{"version":"coffer.run/regions/v1","open":"data/none"}`))
			if n, err := c.Read(make([]byte, 4096)); n == 0 || err != nil {
				refused++
			}
			must(t, c.Close())
		}
		if refused == 0 || refused == len(open) {
			t.Errorf("%d of %d were refused", refused, len(open))
		}
		h.until("a place is free", func() bool {
			f, _, err := holdapi.OpenRegion(h.regions(), "data/small")
			if err != nil {
				return false
			}
			return f.Close() == nil
		})
	})

	h.finish()
	if !bytes.Equal(m, make([]byte, len(m))) {
		t.Error("the job's plaintext is still in the map after its end")
	}
	if _, _, err := holdapi.OpenRegion(h.regions(), "data/small"); err == nil {
		t.Error("opened after the job's end")
	}
}

// A process that reached the socket from another job's control group is refused.
func TestRegionsAreForTheJobAlone(t *testing.T) {
	h := opened(t, map[string][]byte{"small": []byte("hello\n")})
	h.trace().start()
	h.waitStarted()
	group := ""
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/memory"} {
		if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err == nil {
			group = filepath.Join(root, fmt.Sprintf("coffer-test-%d", os.Getpid()))
		}
	}
	if group == "" || os.Mkdir(group, 0o755) != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("no control group can be made")
		}
		t.Skip("no control group can be made")
	}
	t.Cleanup(func() {
		h.until("the group is gone", func() bool { err := os.Remove(group); return err == nil || errors.Is(err, os.ErrNotExist) })
	})
	run := func(join string) ([]byte, error) {
		c := exec.Command("sh", "-euc", `echo $$ > "$1"; exec "$0" -test.run '^TestRegionHelper$'`, os.Args[0], join)
		c.Env = append(os.Environ(), regionSocket+"="+h.regions(), regionName+"=data/small")
		return c.CombinedOutput()
	}
	if b, err := run("/dev/null"); err != nil || !bytes.HasPrefix(b, []byte("hello\n")) {
		t.Errorf("a process of the job: %v: %s", err, b)
	}
	if b, err := run(filepath.Join(group, "cgroup.procs")); err == nil || bytes.Contains(b, []byte("hello")) {
		t.Errorf("a process of another group was given it: %s", b)
	}
	// The agent moves a holder to its job's group only after it has begun.
	move := func(group string) {
		must(t, os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte(strconv.Itoa(h.cmd.Process.Pid)), 0o600))
	}
	move(group)
	defer move(filepath.Dir(group))
	if b, err := run(filepath.Join(group, "cgroup.procs")); err != nil || !bytes.HasPrefix(b, []byte("hello\n")) {
		t.Errorf("a process of the group that the holder moved to: %v: %s", err, b)
	}
	if b, err := run("/dev/null"); err == nil || bytes.Contains(b, []byte("hello")) {
		t.Errorf("a process of the group that the holder was in was given it: %s", b)
	}
}

// The example's client in Go, outside a sandbox.
func TestGoClient(t *testing.T) {
	big := pattern(3<<20 + 8)
	h := opened(t, map[string][]byte{"sub/big": big, "empty": nil})
	h.trace().start()
	h.waitStarted()
	program := filepath.Join(t.TempDir(), "client")
	if b, err := exec.Command("go", "build", "-o", program, "../../examples/regions/go").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, b)
	}
	for name, want := range map[string]string{
		"data/sub/big":    fmt.Sprintf("%x  data/sub/big, %d bytes\n", sha256.Sum256(big), len(big)),
		"data/empty":      fmt.Sprintf("%x  data/empty, 0 bytes\n", sha256.Sum256(nil)),
		"data/none":       "open region data/none: no file of this name",
		"data/../sub/big": "open region data/../sub/big: no file of this name",
	} {
		c := exec.Command(program, name)
		c.Env = append(os.Environ(), "COFFER_REGIONS="+h.regions())
		b, err := c.CombinedOutput()
		if (err != nil) != strings.HasPrefix(want, "open region") || !strings.HasPrefix(string(b), want) {
			t.Errorf("%s: %v: %s", name, err, b)
		}
	}
}

// The example's client, outside a sandbox: the memory is the holder's own.
func TestPythonClient(t *testing.T) {
	if err := exec.Command("python3", "-c", "import socket; socket.recv_fds").Run(); err != nil {
		t.Skip("python3 of version 3.9 or later is not installed")
	}
	big := pattern(3<<20 + 8)
	h := opened(t, map[string][]byte{"sub/big": big, "empty": nil})
	h.trace().start()
	h.waitStarted()
	want := filepath.Join(t.TempDir(), "want")
	must(t, os.WriteFile(want, big, 0o600))
	c := exec.Command("python3", "-B", "-c", `
import importlib.util, sys
import regions
view = regions.open("data", "sub/big")
assert view == open(sys.argv[1], "rb").read() and view.readonly
assert len(regions.open("data", "empty")) == 0
for name in ("none", "../data/sub/big"):
    try:
        regions.open("data", name)
    except OSError as e:
        assert "no file of this name" in str(e), e
    else:
        raise SystemExit(name + " was opened")
if importlib.util.find_spec("numpy"):
    a = regions.array("data", "sub/big", "<u4", (-1, 2))
    assert a.shape[1] == 2 and not a.flags.writeable and not a.flags.owndata
if importlib.util.find_spec("torch"):
    assert regions.tensor("data", "sub/big", "<i4").numel() * 4 == len(view)
print("DONE")`, want)
	c.Env = append(os.Environ(), "PYTHONPATH=../../examples/regions", "COFFER_REGIONS="+h.regions())
	if b, err := c.CombinedOutput(); err != nil || string(b) != "DONE\n" {
		t.Errorf("%v: %s", err, b)
	}
}
