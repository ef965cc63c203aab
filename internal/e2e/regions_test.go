package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"strconv"
	"strings"
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
out = {"digest": hashlib.sha256(view).hexdigest(), "torch": "none", "wrote": []}
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
try:
    import torch
    t = regions.tensor("model", "model.safetensors", "u1", offset=8)
    out["torch"] = t.data_ptr() - at
except ImportError:
    pass
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
	job := n.jobFile(t, "regions", func(s string) string { return strings.Replace(s, trains, string(command), 1) })
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
		Torch                json.RawMessage
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
	if torch := string(got.Torch); torch != `"none"` && torch != strconv.Itoa(8) {
		t.Errorf("the tensor lies %s bytes from the region", torch)
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
