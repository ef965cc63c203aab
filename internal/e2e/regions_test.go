package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/coffer-run/coffer/attest/bundle"
)

// noCopy uses the example's client and says, for what it got, where it lies and
// whether it can be written to.
const noCopy = `
import ctypes, hashlib, json, mmap, os, sys, types
import numpy
regions = types.ModuleType("regions")
exec(sys.argv[1], regions.__dict__)
view = regions.open("model", "model.safetensors")
regions.open = lambda given, name: view
at = numpy.frombuffer(view, "u1").ctypes.data
out = {"digest": hashlib.sha256(view).hexdigest(), "wrote": []}
a = regions.array("model", "model.safetensors", "u1", offset=8)
out["array"] = a.ctypes.data - at
out["shares"] = bool(numpy.shares_memory(a, numpy.frombuffer(view, "u1")))
out["owns"], out["writeable"] = bool(a.flags.owndata), bool(a.flags.writeable)
def change(): a[0] = 1
def allow(): a.flags.writeable = True
def map_again():
    fd, size = regions.descriptor("model", "model.safetensors")
    mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
for f in change, allow, map_again:
    try:
        f()
        out["wrote"].append(f.__name__)
    except (ValueError, OSError):
        pass
try:
    regions.descriptor("model", "../data/train-images-idx3-ubyte")
    out["wrote"].append("another file")
except OSError as e:
    out["refused"] = str(e)
t = regions.tensor("model", "model.safetensors", "u1", offset=8)
out["tensor"], out["same"] = t.data_ptr() - at, bool((t.numpy() == a).all())
child = os.fork()
if child == 0:
    t[:1].add_(1)
    os._exit(0)
out["inPlace"] = os.waitpid(child, 0)[1]
line = [l for l in open("/proc/self/maps") if int(l.split("-")[0], 16) <= at < int(l.split("-")[1].split()[0], 16)][0]
out["map"] = line.split()[1]
print("GOT " + json.dumps(out))
`

// The Python client gives a job its input where the holder decrypted it, and the
// bundle says what became of the GPU.
func TestRegionsFromPython(t *testing.T) {
	n := need(t)
	client, err := os.ReadFile("../../examples/regions/regions.py")
	if err != nil {
		t.Fatal(err)
	}
	command, err := json.Marshal([]string{"/usr/bin/python3", "-c", noCopy, string(client)})
	if err != nil {
		t.Fatal(err)
	}
	// The other jobs' image has no torch.
	n.must(t, "image", "import", filepath.Join(os.Getenv("COFFER_IMAGES"), "torch.tar"))
	t.Cleanup(func() { n.must(t, "image", "rm", "coffer.local/torch:latest") })
	job := n.jobFile(t, "regions", func(s string) string {
		return strings.NewReplacer(trains, string(command), "coffer.local/numpy:latest", "coffer.local/torch:latest").Replace(s)
	})
	n.grant(t, n.planDigest(t, job), 1)
	id := n.submit(t, job)
	if s := n.wait(t, id, "its end", ended); s.State != "succeeded" {
		t.Fatalf("%+v\n%s", s, n.must(t, "logs", id))
	}
	var got struct {
		Digest, Map, Refused string
		Array                int
		Shares, Owns         bool
		Writeable            bool
		Wrote                []string
		Tensor               int
		Same                 bool
		InPlace              int
	}
	_, said, _ := strings.Cut(n.must(t, "logs", id), "GOT ")
	if err := json.NewDecoder(strings.NewReader(said)).Decode(&got); err != nil {
		t.Fatalf("%v in %q", err, said)
	}
	if sum := sha256.Sum256(n.weights); got.Digest != hex.EncodeToString(sum[:]) {
		t.Error("the region holds something else than the model")
	}
	if got.Array != 8 || !got.Shares || got.Owns || got.Writeable || len(got.Wrote) > 0 || got.Map != "r--s" || got.Refused == "" {
		t.Errorf("%+v", got)
	}
	if got.Tensor != 8 || !got.Same {
		t.Errorf("the tensor lies %d bytes from the region, want 8; same bytes: %v", got.Tensor, got.Same)
	}
	if s := syscall.WaitStatus(got.InPlace); !s.Signaled() || s.Signal() != syscall.SIGSEGV { //nolint:gosec // of wait(2)
		t.Errorf("an operation in place ended with status %#x, want SIGSEGV", got.InPlace)
	}
	body, err := os.ReadFile(n.evidence(t, id))
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := bundle.Parse(body)
	if err != nil {
		t.Fatal(err)
	}
	var agent bundle.Agent
	if err := json.Unmarshal(parsed.Parts[bundle.AgentPart], &agent); err != nil {
		t.Fatal(err)
	}
	d := agent.Devices
	if d == nil || !d.Cleared || d.Launch == nil || d.End == nil || len(d.Launch.GPUs) != 1 || len(d.End.GPUs) != 1 {
		t.Fatalf("devices %+v", d)
	}
	if !d.Launch.Ready || d.Launch.CCMode != "on" || d.Launch.AttackerAdvantage == 0 || d.Launch.GPUs[0].UnprotectedBytes == 0 || d.Launch.GPUs[0].UsedBytes == 0 {
		t.Errorf("at launch %+v", d.Launch)
	}
	if d.End.GPUs[0].UsedBytes != 0 || d.End.GPUs[0].Processes != 0 {
		t.Errorf("at the end %+v", d.End)
	}
}
