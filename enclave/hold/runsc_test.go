package hold_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/enclave/keys"
)

// needRunsc finds the sandbox runtime among the tools that were built.
func needRunsc(t *testing.T) string {
	t.Helper()
	p := filepath.Join(os.Getenv("COFFER_TOOLS"), "runsc")
	if _, err := os.Stat(p); err == nil && filepath.IsAbs(p) {
		return p
	}
	const why = "COFFER_TOOLS names no folder with runsc in it"
	if os.Getenv("CI") == "true" {
		t.Fatal(why)
	}
	t.Skip(why)
	return ""
}

// runsc runs a shell script in a sandbox over this machine's own /usr, with the
// holder's folders as /inputs and /checkpoints.
func (h *holder) runsc(runsc, script string) (string, error) {
	h.t.Helper()
	needRoot(h.t)
	dir := h.t.TempDir()
	rootfs := filepath.Join(dir, "rootfs")
	for _, d := range []string{"usr", "inputs", "checkpoints", "regions", "tmp", "proc"} {
		must(h.t, os.MkdirAll(filepath.Join(rootfs, d), 0o755))
	}
	for _, l := range []string{"bin", "lib", "lib64"} {
		must(h.t, os.Symlink("usr/"+l, filepath.Join(rootfs, l)))
	}
	must(h.t, os.Chmod(dir, 0o755))
	mount := func(dst, src, opt string) map[string]any {
		return map[string]any{"destination": dst, "type": "bind", "source": src, "options": []string{"rbind", opt}}
	}
	spec := map[string]any{
		"ociVersion": "1.0.2",
		"process": map[string]any{
			"user": map[string]any{"uid": jobUID, "gid": jobUID}, "args": []string{"/bin/sh", "-euc", script}, "cwd": "/",
			"env": []string{"PATH=/usr/bin:/bin", "LANG=C.UTF-8"}, "noNewPrivileges": true,
		},
		"root":   map[string]any{"path": rootfs, "readonly": true},
		"mounts": []any{mount("/usr", "/usr", "ro"), mount("/inputs", h.path("inputs/data"), "ro"), mount("/checkpoints", h.path("checkpoints"), "rw"), mount("/regions", h.path(holdapi.RegionsDir), "ro"), map[string]any{"destination": "/proc", "type": "proc", "source": "proc"}, map[string]any{"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}},
		"linux":  map[string]any{"namespaces": []map[string]string{{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}}},
	}
	trace := map[string]any{"trace_session": map[string]any{
		"name": "Default",
		"points": []any{
			map[string]any{"name": "container/start", "context_fields": []string{"time", "container_id"}},
			map[string]any{"name": "sentry/execve", "optional_fields": []string{"binary_sha256"}, "context_fields": []string{"time", "process_name", "is_exec_session"}},
			map[string]any{"name": "sentry/clone", "context_fields": []string{"time"}},
			map[string]any{"name": "sentry/task_exit", "context_fields": []string{"time"}},
		},
		"sinks": []any{map[string]any{"name": "coffer", "config": map[string]any{"endpoint": h.path(holdapi.TraceName)}}},
	}}
	for name, v := range map[string]any{"config.json": spec, "trace.json": trace} {
		b, err := json.Marshal(v)
		must(h.t, err)
		must(h.t, os.WriteFile(filepath.Join(dir, name), b, 0o600))
	}
	id := fmt.Sprintf("coffer-hold-test-%d", os.Getpid())
	c := exec.Command(runsc, "--root", filepath.Join(dir, "root"), "--platform=systrap", "--network=none", "--ignore-cgroups", "--host-uds=open",
		"--pod-init-config", filepath.Join(dir, "trace.json"), "run", "--bundle", dir, id)
	// The runtime keeps an empty network namespace there.
	defer func() { _ = unix.Unmount(filepath.Join(dir, "root", "null-netns"), unix.MNT_DETACH) }()
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	err := c.Run()
	return out.String(), err
}

// TestInSandbox runs the job's side for real: gVisor over the holder's mounts.
func TestInSandbox(t *testing.T) {
	runsc := needRunsc(t)
	h := start(t)
	ctx := t.Context()
	key := keys.GenerateDataKey()
	big := pattern(9<<20 + 3)
	dir, digest := sealed(t, key, "a", map[string][]byte{"sub/big": big, "small": []byte("hello\n"), "empty": nil})
	must(t, h.c.Input(ctx, holdapi.Input{Name: "data", Asset: "a", Digest: digest}, dir))
	must(t, h.deliver(key, "a"))
	must(t, h.deliver(key, "ckpt"))
	sink := t.TempDir()
	must(t, h.c.Sink(ctx, holdapi.Sink{Asset: "ckpt", Plan: planDigest, MaxBytes: 64 << 20}, sink))
	_, err := h.c.Decrypt(ctx)
	must(t, err)

	out, err := h.runsc(runsc, `
cat /inputs/small
ls -R /inputs
test ! -s /inputs/empty
if echo x > /inputs/small; then echo WROTE; fi
umask 077
mkdir -p /checkpoints/e1.tmp/d
cat /inputs/sub/big > /checkpoints/e1.tmp/d/copy
cmp /inputs/sub/big /checkpoints/e1.tmp/d/copy
stat -c '%u %a %s' /checkpoints/e1.tmp/d/copy
mv /checkpoints/e1.tmp /checkpoints/e1
ls -A /checkpoints | wc -l
dd if=/dev/zero of=/checkpoints/e2.tmp bs=1000 count=5000 status=none
printf patch | dd of=/checkpoints/e2.tmp bs=1 seek=100 conv=notrunc status=none
printf tail >> /checkpoints/e2.tmp
truncate -s 6000000 /checkpoints/e2.tmp
rm -f /checkpoints/none
sync /checkpoints/e2.tmp
mv /checkpoints/e2.tmp /checkpoints/e2
if command -v python3 >/dev/null; then python3 - <<'END'
import mmap, os, zipfile
m = mmap.mmap(os.open('/inputs/sub/big', os.O_RDONLY), 0, prot=mmap.PROT_READ)
assert len(m) == 9*2**20+3 and m[:] == open('/inputs/sub/big', 'rb').read()
import json, socket
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.connect('/regions/regions.sock')
s.sendall(json.dumps({'version': 'coffer.run/regions/v1', 'open': 'data/sub/big'}).encode())
_, fds, _, _ = socket.recv_fds(s, 4096, 1)
given = mmap.mmap(fds[0], 9*2**20+3, prot=mmap.PROT_READ)
assert given[:] == m[:]
for attempt in (lambda: os.pwrite(fds[0], b'x', 0), lambda: mmap.mmap(fds[0], 4096)):
    try:
        attempt()
    except OSError:
        continue
    raise SystemExit('the region was open for writing')
with zipfile.ZipFile('/checkpoints/e3.tmp', 'w', allowZip64=True) as z:
    for n in ('a', 'b'):
        with z.open(n, 'w', force_zip64=True) as f: f.write(n.encode() * 3000000)
fd = os.open('/checkpoints/map', os.O_RDWR | os.O_CREAT); os.ftruncate(fd, 8192)
w = mmap.mmap(fd, 8192); w[5000:5003] = b'abc'; w.flush(); w.close(); os.close(fd)
os.replace('/checkpoints/map', '/checkpoints/e4.tmp')
assert zipfile.ZipFile('/checkpoints/e3.tmp').testzip() is None
os.rename('/checkpoints/e3.tmp', '/checkpoints/e3'); os.rename('/checkpoints/e4.tmp', '/checkpoints/e4')
END
fi
echo DONE`)
	if err != nil || !strings.HasSuffix(out, "DONE\n") || strings.Contains(out, "WROTE") {
		t.Fatalf("%v\n%s", err, out)
	}
	if !strings.HasPrefix(out, "hello\n") || !strings.Contains(out, "65532 600 9437187\n0\n") {
		t.Errorf("output:\n%s", out)
	}
	st, err := h.c.Finish(ctx)
	must(t, err)
	if !st.Started || st.TraceLost || st.Execs < 5 || !st.Scrubbed {
		t.Errorf("status %+v", st)
	}
	e2 := make([]byte, 6_000_000)
	copy(e2[100:], "patch")
	copy(e2[5_000_000:], "tail")
	e4 := make([]byte, 8192)
	copy(e4[5000:], "abc")
	want := map[string]map[string][]byte{"e1": {"d/copy": big}, "e2": {"e2": e2}, "e4": {"e4": e4}}
	for _, c := range st.Checkpoints {
		r, err := receipt.DecodeCheckpointRecord(c.Record)
		must(t, err)
		if w := want[c.Name]; w != nil {
			openSealed(t, key, "ckpt", filepath.Join(sink, c.Folder()), r.Digest, w)
			delete(want, c.Name)
		}
	}
	delete(want, "e4") // where there is no python3
	if len(want) > 0 {
		t.Errorf("not committed: %v", want)
	}
}
