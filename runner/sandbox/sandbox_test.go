package sandbox

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

// testCgroup is of this process alone, so that tests of two clones do not end each other's.
var testCgroup = fmt.Sprintf("/coffer-test-%d", os.Getpid())

// need skips a test where the real parts are missing; for root in CI that is a
// failure.
func need(t *testing.T) (tools, images string) {
	t.Helper()
	tools, images = os.Getenv("COFFER_TOOLS"), os.Getenv("COFFER_IMAGES")
	missing := ""
	switch {
	case testing.Short():
		missing = "integration tests are off (-short)"
	case os.Geteuid() != 0:
		missing = "root is needed"
	case tools == "" || images == "":
		missing = "COFFER_TOOLS and COFFER_IMAGES are not set; run make test"
	}
	if missing != "" {
		if os.Getenv("CI") == "true" && os.Geteuid() == 0 && !testing.Short() {
			t.Fatal(missing)
		}
		t.Skip(missing)
	}
	return tools, images
}

// startContainerd runs a containerd of the test's own with the numpy image in it.
func startContainerd(t *testing.T) *Node {
	t.Helper()
	return startContainerdIn(t, "/run", plan.ImageStoreDisk)
}

// startContainerdIn keeps everything of containerd's below a folder.
func startContainerdIn(t *testing.T, base, store string) *Node {
	t.Helper()
	tools, images := need(t)
	dir, err := os.MkdirTemp(base, "sbx")
	if err != nil {
		t.Fatal(err)
	}
	// As containerd's folders are on a machine.
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(dir, "c.sock")
	config := fmt.Sprintf("version = 3\nroot = %q\nstate = %q\noom_score = 0\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.cri.v1.images\", \"io.containerd.cri.v1.runtime\", \"io.containerd.internal.v1.opt\", \"io.containerd.nri.v1.nri\"]\n[grpc]\naddress = %q\n[ttrpc]\naddress = %q\n",
		filepath.Join(dir, "root"), filepath.Join(dir, "state"), sock, sock+".ttrpc")
	if err := os.WriteFile(filepath.Join(dir, "config.toml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(tools, "containerd"), "--config", filepath.Join(dir, "config.toml"))
	cmd.Env = []string{"PATH=" + tools + ":/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			b, _ := os.ReadFile(log.Name())
			t.Logf("containerd's log:\n%s", b[max(0, len(b)-4000):])
		}
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if err := errors.Join(OpenCgroup(testCgroup).Remove(), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	var node *Node
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		if _, err := os.Stat(sock); err == nil {
			node, err = Open(t.Context(), Config{
				Containerd: sock, Runsc: filepath.Join(tools, "runsc"), ShimPath: filepath.Join(tools, "containerd-shim-runc-v2"), Cgroup: testCgroup, ImageStore: store,
			})
			if err == nil {
				break
			}
		}
		if time.Now().After(deadline) {
			t.Fatal("containerd does not answer")
		}
	}
	t.Cleanup(func() { node.Close() })
	f, err := os.Open(filepath.Join(images, "numpy.tar"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ctx := namespaces.WithNamespace(t.Context(), Namespace)
	imgs, err := node.client.Import(ctx, f, containerd.WithAllPlatforms(false))
	if err != nil {
		t.Fatal(err)
	}
	if err := containerd.NewImage(node.client, imgs[0]).Unpack(ctx, snapshotter); err != nil {
		t.Fatal(err)
	}
	return node
}

// job is a sandbox with a trace receiver and pipes of the test's own.
type job struct {
	*Sandbox
	plan   plan.Plan
	stdout chan string
	traced chan struct{}
	runDir string
}

func (n *Node) testJob(t *testing.T, id string, command ...string) *job {
	t.Helper()
	return n.testJobWith(t, id, nil, command...)
}

func (n *Node) testJobWith(t *testing.T, id string, binds []Bind, command ...string) *job {
	t.Helper()
	return n.testJobOf(t, id, func(r *Request) { r.Binds = binds }, command...)
}

// testJobOf makes a job whose request is changed before it is created.
func (n *Node) testJobOf(t *testing.T, id string, change func(*Request), command ...string) *job {
	t.Helper()
	j, err := n.tryJob(t, id, change, command...)
	if err != nil {
		t.Fatal(err)
	}
	return j
}

func (n *Node) tryJob(t *testing.T, id string, change func(*Request), command ...string) (*job, error) {
	t.Helper()
	img, err := n.Image(t.Context(), "coffer.local/numpy:latest")
	if err != nil {
		t.Fatal(err)
	}
	profile, err := n.profile.Digest()
	if err != nil {
		t.Fatal(err)
	}
	secret := "value-of-the-variable"
	p := plan.Plan{
		Version: plan.Version, Name: "t", Image: img.Digest, Command: command, Inputs: []plan.Input{}, Output: plan.Output{LogBytes: 1 << 20},
		Env:       []plan.Env{{Name: "SECRET", ValueDigest: plan.Sum([]byte(secret))}},
		Resources: plan.Resources{CPUMillis: 1000, MemoryBytes: 512 << 20, Pids: 64, MaxSeconds: 60},
		Policy:    plan.Policy{Name: "p", Digest: plan.Sum([]byte("p"))}, SandboxProfile: profile,
	}
	j := &job{plan: p, stdout: make(chan string, 1), traced: make(chan struct{}), runDir: t.TempDir()}
	sock := filepath.Join(j.runDir, "trace.sock")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: sock, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		c, err := l.AcceptUnix()
		if err != nil {
			return
		}
		buf := make([]byte, 1<<20)
		n, _ := c.Read(buf)
		_, _ = c.Write(buf[:n])
		if n, _ := c.Read(buf); n > 0 {
			close(j.traced)
		}
		_, _ = io.Copy(io.Discard, c)
	}()
	for _, name := range []string{"out", "err"} {
		if err := syscall.Mkfifo(filepath.Join(j.runDir, name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	read := func(name string, to chan<- string) {
		f, err := os.Open(filepath.Join(j.runDir, name))
		if err != nil {
			return
		}
		b, _ := io.ReadAll(f)
		to <- string(b)
	}
	errs := make(chan string, 1)
	go read("out", j.stdout)
	go read("err", errs)
	cg, err := CreateCgroup(JobCgroup(testCgroup, id), p.Resources)
	if err != nil {
		t.Fatal(err)
	}
	req := Request{
		JobID: id, Plan: p, Image: img, Env: []string{secret}, RunDir: j.runDir, TraceSocket: sock,
		Stdout: filepath.Join(j.runDir, "out"), Stderr: filepath.Join(j.runDir, "err"),
	}
	change(&req)
	j.plan = req.Plan
	j.Sandbox, err = n.Create(t.Context(), req)
	if err != nil {
		_ = cg.Remove()
		return nil, err
	}
	t.Cleanup(func() {
		if err := errors.Join(j.Remove(context.Background()), cg.Remove()); err != nil {
			t.Error(err)
		}
	})
	return j, nil
}

// probe prints what a job can see and do.
const probe = `
import os, json, socket, errno
def can(f):
    try:
        f(); return "yes"
    except Exception as e:
        return type(e).__name__
def look(p):
    try:
        return "folder of %d" % len(os.listdir(p)) if os.path.isdir(p) else "file of %d bytes" % len(open(p, "rb").read(100))
    except OSError as e:
        return errno.errorcode[e.errno]
def change(p):
    for at in [p] if not os.path.isdir(p) else [os.path.join(d, f) for d, _, fs in os.walk(p) for f in fs] + [p + "/new"]:
        try:
            os.close(os.open(at, os.O_WRONLY | os.O_CREAT, 0o600))
            return at + " can be written"
        except OSError as e:
            if errno.errorcode[e.errno] not in ("EROFS", "EACCES", "ENOENT", "EPERM"):
                return at + " " + errno.errorcode[e.errno]
    return "ok"
st = dict(l.split(":\t") for l in open("/proc/self/status").read().splitlines() if ":\t" in l)
print(json.dumps({
  "uid": os.getuid(), "gid": os.getgid(), "groups": os.getgroups(),
  "caps": [st[k].strip() for k in ("CapInh", "CapPrm", "CapEff", "CapBnd")],
  "nnp": st.get("NoNewPrivs", "?").strip(),
  "root": can(lambda: open("/x", "w")), "etc": can(lambda: open("/etc/passwd", "a")), "tmp": can(lambda: open("/tmp/x", "w")),
  "ifs": [n for _, n in socket.if_nameindex()],
  "out": can(lambda: socket.create_connection(("192.0.2.1", 80), 1)),
  "raw": can(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)),
  "mount": can(lambda: os.mkdir("/tmp/m") or __import__("ctypes").CDLL(None).mount(b"none", b"/tmp/m", b"tmpfs", 0, None) == 0 or 1/0),
  "shm": os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize, "over": can(lambda: open("/dev/shm/x", "wb").write(bytes(3 << 20))),
  "secret": os.environ.get("SECRET"),
  "kernel": open("/proc/version").read()[:20],
  "masked": {p: look(p) for p in MASKED},
  "written": {p: change(p) for p in READONLY},
}))
`

func TestJobSeesOnlyWhatItWasGiven(t *testing.T) {
	n := startContainerd(t)
	j := n.testJobOf(t, "probe", func(r *Request) {
		r.Plan.Resources.ShmBytes, r.Plan.Resources.IO = 2<<20, plan.IO{ReadBytesPerSecond: 1 << 30, WritesPerSecond: 1000}
	}, "/usr/bin/python3", "-c", strings.NewReplacer("MASKED", pathsOf(t, maskedPaths), "READONLY", pathsOf(t, readonlyPaths)).Replace(probe))
	if strings.Contains(string(j.Description()), "value-of-the-variable") {
		t.Error("the description shows the value of an environment variable")
	}
	if err := j.Recheck(t.Context(), j.plan); err != nil {
		t.Fatalf("an untouched sandbox does not pass: %v", err)
	}
	valueOnlyInMemory(t, n, j)
	select {
	case <-j.traced:
		t.Error("the trace shows a start before the start")
	default:
	}
	if err := j.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-j.traced:
	case <-time.After(time.Minute):
		t.Fatal("no container/start in the trace")
	}
	if code, err := ExitCode(<-j.Exited()); err != nil || code != 0 {
		t.Fatalf("exit code %d, %v", code, err)
	}
	if err := j.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	var got struct {
		UID, GID                             int
		Groups                               []int
		Caps                                 []string
		NNP, Root, Etc, Tmp, Out, Raw, Mount string
		Ifs                                  []string
		Secret, Kernel, Over                 string
		Shm                                  int64
		Masked, Written                      map[string]string
	}
	out := <-j.stdout
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatalf("%v in %q", err, out)
	}
	if got.UID != UID || got.GID != GID {
		t.Errorf("runs as %d:%d", got.UID, got.GID)
	}
	for _, c := range got.Caps {
		if strings.Trim(c, "0") != "" {
			t.Errorf("has capabilities %v", got.Caps)
		}
	}
	if got.NNP != "1" {
		t.Errorf("no_new_privs is %q", got.NNP)
	}
	for name, v := range map[string]string{"write /": got.Root, "write /etc": got.Etc, "connect": got.Out, "packet socket": got.Raw, "mount": got.Mount} {
		if v == "yes" {
			t.Errorf("the job can %s", name)
		}
	}
	for _, p := range maskedPaths {
		if v := got.Masked[p]; v != "ENOENT" && v != "folder of 0" && v != "file of 0 bytes" {
			t.Errorf("the job finds %q at %s", v, p)
		}
	}
	for _, p := range readonlyPaths {
		if v := got.Written[p]; v != "ok" {
			t.Errorf("%s: %s", p, v)
		}
	}
	if got.Tmp != "yes" {
		t.Errorf("the job cannot write /tmp: %s", got.Tmp)
	}
	for _, i := range got.Ifs {
		if i != "lo" {
			t.Errorf("network device %s", i)
		}
	}
	if got.Shm != 2<<20 || got.Over == "yes" {
		t.Errorf("/dev/shm has %d bytes, and 3 MiB into it: %s", got.Shm, got.Over)
	}
	if got.Secret != "value-of-the-variable" {
		t.Errorf("the job's variable is %q", got.Secret)
	}
	t.Logf("inside: %s", out)
}

// valueOnlyInMemory looks for the variable's value in all that containerd and the job
// have on a disk, and finds it where the runtime has it.
func valueOnlyInMemory(t *testing.T, n *Node, j *job) {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(memoryOf(j.runDir), &st); err != nil || st.Type != unix.RAMFS_MAGIC {
		t.Errorf("the runtime's folder is on a file system of type %#x, %v", st.Type, err)
	}
	files, inside := 0, 0
	for _, dir := range []string{filepath.Dir(n.cfg.Containerd), j.runDir} {
		if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			switch {
			case err != nil:
				return err
			case d.IsDir() && (d.Name() == "io.containerd.snapshotter.v1.overlayfs" || d.Name() == "io.containerd.content.v1.content" || d.Name() == "rootfs"):
				return fs.SkipDir // the image
			case !d.Type().IsRegular() || d.Name() == "null-netns":
				return nil
			}
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			files++
			if !bytes.Contains(b, []byte("value-of-the-variable")) {
				return nil
			}
			if !strings.HasPrefix(path, memoryOf(j.runDir)+"/") {
				t.Errorf("the variable's value lies in %s", path)
			}
			inside++
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	if inside == 0 || files < 10 {
		t.Errorf("of %d files %d have the value: the search proves nothing", files, inside)
	}
}

func TestRecheckNamesWhatChanged(t *testing.T) {
	n := startContainerd(t)
	j := n.testJob(t, "recheck", "/usr/bin/python3", "-c", "pass")
	swap := func(path, old, new string) func(*testing.T) {
		return func(t *testing.T) {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			changed := strings.Replace(string(b), old, new, 1)
			if changed == string(b) {
				t.Fatalf("%q is not in %s", old, path)
			}
			st, _ := os.Stat(path)
			if err := os.WriteFile(path, []byte(changed), st.Mode()); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = os.WriteFile(path, b, st.Mode()) })
		}
	}
	bundle, err := j.bundleDir()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, id string
		change   func(*testing.T)
	}{
		{"network switched on", "sandbox.flags", swap(filepath.Join(j.runDir, wrapperName), "--network=none", "--network=host")},
		{"a trace point taken out", "sandbox.trace", swap(filepath.Join(j.runDir, traceName), "sentry/execve", "sentry/other")},
		{"another user in the runtime's bundle", "sandbox.bundle", swap(filepath.Join(bundle, configName), "65532", "0")},
		{"another value in the runtime's bundle", "sandbox.bundle", swap(filepath.Join(bundle, configName), "value-of-the-variable", "value-of-my-own")},
		{"another runtime", "sandbox.runtime", func(t *testing.T) {
			old := n.cfg.Runsc
			n.cfg.Runsc = "/bin/true"
			t.Cleanup(func() { n.cfg.Runsc = old })
		}},
		{"another runtime, which was read before", "sandbox.runtime", func(t *testing.T) {
			old := n.cfg.Runsc
			n.cfg.Runsc = "/bin/true"
			j.ReadBinaries()
			t.Cleanup(func() { n.cfg.Runsc = old })
		}},
		{"another shim", "sandbox.shim", func(t *testing.T) {
			old := n.cfg.ShimPath
			n.cfg.ShimPath = "/bin/true"
			t.Cleanup(func() { n.cfg.ShimPath = old })
		}},
		{"another variable in containerd's specification", "sandbox.spec", func(t *testing.T) {
			other := n.testJob(t, "other", "/usr/bin/python3", "-c", "print(1)")
			mine := j.container
			j.container = other.container
			t.Cleanup(func() { j.container = mine })
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.change(t)
			err := j.Recheck(t.Context(), j.plan)
			var r *check.Refusal
			if !errors.As(err, &r) {
				t.Fatalf("got %v, want a refusal", err)
			}
			if len(r.Checks) != 1 || r.Checks[0].ID != tt.id {
				t.Errorf("failed checks %v, want only %s", r.Checks, tt.id)
			}
		})
	}
	if err := j.Recheck(t.Context(), j.plan); err != nil {
		t.Errorf("put back, it still does not pass: %v", err)
	}
}

func TestImageMustBeThePinnedOne(t *testing.T) {
	n := startContainerd(t)
	img, err := n.Image(t.Context(), "coffer.local/numpy:latest")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.Image(t.Context(), "coffer.local/numpy:latest@"+img.Digest); err != nil {
		t.Errorf("the right digest is refused: %v", err)
	}
	var r *check.Refusal
	if _, err := n.Image(t.Context(), "coffer.local/numpy:latest@sha256:"+strings.Repeat("0", 64)); !errors.As(err, &r) {
		t.Errorf("another digest: got %v, want a refusal", err)
	}
	if _, err := n.Image(t.Context(), "coffer.local/none:latest"); err == nil {
		t.Error("found an image that is not there")
	}
}
