package bench

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/dma"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/enclave/seal"
	"github.com/coffer-run/coffer/runner/holder"
	"github.com/coffer-run/coffer/runner/sandbox"
)

// What a job sees is measured by a program in a job's own sandbox: gVisor as the
// agent sets it up, over a real holder. Attestation and release are left out: the
// test wraps the key itself.

//go:embed inside.py
var insideProgram string

const (
	insideGroup = "/coffer-bench"
	insideImage = "coffer.local/numpy:latest"
	// pieceSize is how much one round reads in each way; stepSize are the weights
	// of the first step.
	pieceSize    = 512 << 20
	stepSize     = 2 << 30
	insideRounds = 7
)

// zeros has n bytes, all zero, at no cost in memory.
type zeros int64

func (z zeros) ReadAt(p []byte, off int64) (int, error) {
	n := max(0, min(int64(len(p)), int64(z)-off))
	clear(p[:n])
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

func (zeros) Close() error { return nil }

// inside measures what stands between a job and its inputs.
func inside(t *testing.T) []row {
	tools, images, bin := os.Getenv("COFFER_TOOLS"), os.Getenv("COFFER_IMAGES"), os.Getenv("COFFER_BIN")
	if os.Geteuid() != 0 || tools == "" || images == "" || bin == "" {
		return []row{info("inside gVisor: not measured, root and make's tools are needed", 0, "")}
	}
	n := openNode(t, tools, images)
	n.holder = filepath.Join(bin, "coffer-holder")
	key := keys.GenerateDataKey()
	small := sealZeros(t, key, pieceSize)
	out := n.reads(t, key, small)
	out = append(out, n.beyondMemory(t, key, small)...)
	out = append(out, n.firstStep(t, key)...)
	return append(out, n.anonymous(t, key)...)
}

// reads compares regions, by descriptor and by path, with a plain tmpfs file in
// the same container.
func (n *insideNode) reads(t *testing.T, key *keys.DataKey, s sealedInput) []row {
	plain := tmpfsFile(t, pieceSize)
	j := n.job(t, "reads", 4<<30, 0, []sandbox.Bind{{Source: plain, Target: "/plain"}})
	j.input(t, s)
	r := j.run(t, "reads", func() { j.release(t, key) })
	return []row{
		atLeast("inside gVisor: mmap of a region / mmap of a plain tmpfs file", median(r, "plainMap", "regionMap"), "x", 0.95),
		atLeast("inside gVisor: 1 MiB reads by path / the same of a plain tmpfs file", median(r, "plainRead", "pathRead"), "x", 0.85),
		info("  region, mapped", gbps(r, "regionMap"), "GB/s"),
		info("  region by path, read", gbps(r, "pathRead"), "GB/s"),
		info("  plain tmpfs file, mapped", gbps(r, "plainMap"), "GB/s"),
		info("  plain tmpfs file, read", gbps(r, "plainRead"), "GB/s"),
	}
}

// beyondMemory reads a file that is larger than the memory given for it, beside
// one of which a file server says nothing but zeros.
func (n *insideNode) beyondMemory(t *testing.T, key *keys.DataKey, s sealedInput) []row {
	dir := t.TempDir()
	root := &fs.Inode{}
	server, err := fs.Mount(dir, root, &fs.Options{
		MountOptions: fuse.MountOptions{AllowOther: true, DirectMount: true, DirectMountStrict: true, DisableXAttrs: true, FsName: "zeros", Name: "zeros", MaxWrite: 1 << 20, MaxReadAhead: 1 << 20, DisableSplice: true},
		OnAdd: func(ctx context.Context) {
			root.AddChild("f", root.NewPersistentInode(ctx, &zeroFile{}, fs.StableAttr{Mode: syscall.S_IFREG}), false)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Unmount() })
	j := n.job(t, "beyond", 4<<30, 128<<20, []sandbox.Bind{{Source: dir, Target: "/plain"}})
	j.input(t, s)
	r := j.run(t, "beyond", func() { j.release(t, key) })
	cipher := gcm(t)
	sealed := cipher.Seal(nil, make([]byte, 12), make([]byte, chunk), nil)
	opened := make([][]byte, 64)
	for i := range opened {
		opened[i] = make([]byte, 0, chunk)
	}
	alone := timed(3, func() {
		each(pieceSize/chunk, func(i int) {
			if _, err := cipher.Open(opened[i%64], make([]byte, 12), sealed, nil); err != nil {
				t.Error(err)
			}
		})
	})
	zero := pieceSize / 1e9 / gbps(r, "plainRead")
	return []row{
		atLeast("inside gVisor: file larger than its memory / a file server that returns zeros", median(r, "plainRead", "pathRead"), "x", 0.70),
		info("  the same / 1/(1/zeros + 1/cipher)", (zero+alone.Seconds())*gbps(r, "pathRead")*1e9/pieceSize, "x"),
		info("  file larger than its memory", gbps(r, "pathRead"), "GB/s"),
		info("  a file server that returns zeros", gbps(r, "plainRead"), "GB/s"),
	}
}

// firstStep is from the making of the sandbox to the first step over weights.
func (n *insideNode) firstStep(t *testing.T, key *keys.DataKey) []row {
	s := sealZeros(t, key, stepSize)
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.Mkdir(plain, 0o755); err != nil {
		t.Fatal(err)
	}
	writeZeros(t, filepath.Join(plain, "f"), stepSize)
	once := func(input, release func(j *insideJob), binds []sandbox.Bind, name string, warm func() *holder.Warm) func() time.Duration {
		return func() time.Duration {
			w := warm()
			began := time.Now()
			j := n.jobOf(t, name, 6<<30, 0, binds, w)
			input(j)
			r := j.run(t, "step", func() { release(j) })
			return time.Unix(0, int64(r["ended"][0]*1e9)).Sub(began)
		}
	}
	nothing := func(*insideJob) {}
	cold := func() *holder.Warm { return nil }
	release := func(j *insideJob) { j.release(t, key) }
	// The holder waited for the job with its memory ready, as an agent has it with
	// warmRegions on a node that was idle.
	warm := once(func(j *insideJob) { j.input(t, s); j.settle(t) }, release, nil, "step-warm", func() *holder.Warm { return n.warm(t, stepSize) })
	sealed := once(func(j *insideJob) { j.input(t, s) }, release, nil, "step-sealed", cold)
	open := once(nothing, nothing, []sandbox.Bind{{Source: plain, Target: "/inputs"}}, "step-plain", cold)
	// What the machine takes for as much new memory, and for nothing else: a virtual
	// machine may have given its host what the last job freed.
	memory := func() time.Duration {
		began := time.Now()
		r := must[*dma.Region](t)(dma.New("bench", stepSize))
		err := r.Prefault(t.Context(), 0)
		took := time.Since(began)
		if err := errors.Join(err, r.Close()); err != nil {
			t.Fatal(err)
		}
		return took
	}
	m, ratio := rounds(t, 3, func(s sample) float64 { return float64(s[0]) / float64(s[2]) }, warm, sealed, open, memory)
	return []row{
		atMost("inside gVisor: sandbox to first step, 2 GiB of weights, memory ready / the same job on plain files", ratio, "x", 1.3),
		info("  sealed, memory ready before, without attestation", m[0].Seconds(), "s"),
		info("  sealed, holder started with the job", m[1].Seconds(), "s"),
		info("  plain files on disk, in the page cache", m[2].Seconds(), "s"),
		info("  new memory for 2 GiB, faulted in and locked, all cores", m[3].Seconds(), "s"),
	}
}

// anonymous is the holder's memory besides regions, above that of one with
// nothing to do, while it decrypts.
func (n *insideNode) anonymous(t *testing.T, key *keys.DataKey) []row {
	peak := func(size int64) float64 {
		s := sealZeros(t, key, size)
		j := n.job(t, fmt.Sprintf("memory-%d", size>>30), size+(2<<30), 0, nil)
		idle := rssAnon(j.pid)
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan int64, 1)
		go func() {
			var most int64
			for ctx.Err() == nil {
				most = max(most, rssAnon(j.pid))
				time.Sleep(5 * time.Millisecond)
			}
			done <- most
		}()
		j.input(t, s)
		j.release(t, key)
		stop()
		over := float64(<-done-idle) / (1 << 20)
		j.run(t, "nothing", func() {})
		if err := os.RemoveAll(s.dir); err != nil {
			t.Fatal(err)
		}
		return over
	}
	small := peak(1 << 30)
	out := []row{atMost("holder's anonymous memory above idle, beyond regions, 1 GiB", small, "MiB", 64)}
	// Once in the page cache, once in the region, and what else there is.
	const large = 8 << 30
	if available() > 2*large+(3<<30) {
		return append(out, atMost("the same, 8 GiB", peak(large), "MiB", 64))
	}
	return append(out, info("the same, 8 GiB: not measured, too little memory is free", 0, ""))
}

// insideNode is containerd with the numpy image, as an agent's node has it.
type insideNode struct {
	*sandbox.Node
	image  sandbox.Image
	holder string
}

func openNode(t *testing.T, tools, images string) *insideNode {
	t.Helper()
	dir := must[string](t)(os.MkdirTemp("/run", "coffer-bench-"))
	// The runtime is nobody on this machine and looks up a job's root below.
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(dir, "c.sock")
	config := fmt.Sprintf("version = 3\nroot = %q\nstate = %q\noom_score = 0\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.cri.v1.images\", \"io.containerd.cri.v1.runtime\", \"io.containerd.internal.v1.opt\", \"io.containerd.nri.v1.nri\"]\n[grpc]\naddress = %q\n[ttrpc]\naddress = %q\n",
		filepath.Join(dir, "root"), filepath.Join(dir, "state"), sock, sock+".ttrpc")
	if err := os.WriteFile(filepath.Join(dir, "config.toml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(tools, "containerd"), "--config", filepath.Join(dir, "config.toml"))
	cmd.Env = []string{"PATH=" + tools + ":/usr/sbin:/usr/bin:/sbin:/bin"}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if err := errors.Join(sandbox.OpenCgroup(insideGroup).Remove(), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	c, err := containerd.New(sock, containerd.WithTimeout(20*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	f := must[*os.File](t)(os.Open(filepath.Join(images, "numpy.tar")))
	defer f.Close()
	ctx := namespaces.WithNamespace(t.Context(), sandbox.Namespace)
	imgs, err := c.Import(ctx, f, containerd.WithAllPlatforms(false))
	if err != nil {
		t.Fatal(err)
	}
	if err := containerd.NewImage(c, imgs[0]).Unpack(ctx, "overlayfs"); err != nil {
		t.Fatal(err)
	}
	node := must[*sandbox.Node](t)(sandbox.Open(t.Context(), sandbox.Config{
		Containerd: sock, Runsc: filepath.Join(tools, "runsc"), ShimPath: filepath.Join(tools, "containerd-shim-runc-v2"), Cgroup: insideGroup, ImageStore: "disk",
	}))
	t.Cleanup(func() { node.Close() })
	return &insideNode{Node: node, image: must[sandbox.Image](t)(node.Image(t.Context(), insideImage))}
}

// insideJob is a job's control group and holder.
type insideJob struct {
	n      *insideNode
	h      *holder.Holder
	id     string
	pid    int
	dir    string
	group  *sandbox.Cgroup
	binds  []sandbox.Bind
	memory int64
}

const warmGroup = insideGroup + "/warm"

// warm starts a holder before its job and waits for its memory.
func (n *insideNode) warm(t *testing.T, size int64) *holder.Warm {
	t.Helper()
	group := must[*sandbox.Cgroup](t)(sandbox.CreateReserveCgroup(warmGroup, size+(128<<20)))
	w := must[*holder.Warm](t)(holder.StartWarm(holder.WarmConfig{Path: n.holder, Log: filepath.Join(t.TempDir(), "log"), Regions: []int64{size}, Join: group.Add}))
	t.Cleanup(w.End)
	select {
	case <-w.Ready():
	case <-w.Lost():
		t.Fatal("the holder that waits has ended")
	}
	return w
}

// settle is what the agent does when a holder that waited has all inputs.
func (j *insideJob) settle(t *testing.T) {
	t.Helper()
	before := sandbox.OpenCgroup(warmGroup)
	if err := j.h.Settle(t.Context()); err != nil {
		t.Fatal(err)
	}
	kept := must[int64](t)(before.MemoryUsage())
	if err := errors.Join(j.group.LowerMemory(j.memory-kept), before.Remove()); err != nil {
		t.Fatalf("%d bytes were ready: %v", kept, err)
	}
}

func (n *insideNode) job(t *testing.T, name string, memory, regionBytes int64, binds []sandbox.Bind) *insideJob {
	t.Helper()
	return n.jobOf(t, name, memory, regionBytes, binds, nil)
}

// jobOf is job with a holder that waited.
func (n *insideNode) jobOf(t *testing.T, name string, memory, regionBytes int64, binds []sandbox.Bind, warm *holder.Warm) *insideJob {
	t.Helper()
	id := fmt.Sprintf("bench-%s-%d", name, time.Now().UnixNano())
	dir := must[string](t)(os.MkdirTemp("/run", "coffer-bench-job-"))
	group := must[*sandbox.Cgroup](t)(sandbox.CreateCgroup(sandbox.JobCgroup(insideGroup, id), resources(memory)))
	j := &insideJob{n: n, id: id, dir: dir, group: group, binds: binds, memory: memory}
	var err error
	j.h, err = holder.Start(t.Context(), holder.Config{
		Path: n.holder, RunDir: dir, JobID: id, UID: sandbox.UID, GID: sandbox.GID, LogBytes: 1 << 20, RegionBytes: regionBytes,
		Join: func(pid int) error { j.pid = pid; return group.Add(pid) }, Procs: group.Procs, Warm: warm,
	})
	if err != nil {
		t.Fatal(errors.Join(err, group.Remove()))
	}
	t.Cleanup(func() {
		if err := errors.Join(group.Remove(), holdapi.Cleanup(dir), os.RemoveAll(dir)); err != nil {
			t.Log("left behind:", err)
		}
	})
	return j
}

func resources(memory int64) plan.Resources {
	return plan.Resources{CPUMillis: 64_000, MemoryBytes: memory, Pids: 64, MaxSeconds: 600}
}

// input hands over an input, for which the holder makes room at once.
func (j *insideJob) input(t *testing.T, s sealedInput) {
	t.Helper()
	if err := j.h.Input(t.Context(), holdapi.Input{Name: "w", Asset: "a", Digest: s.digest}, s.dir); err != nil {
		t.Fatal(err)
	}
	j.binds = append(j.binds, sandbox.Bind{Source: filepath.Join(j.dir, holdapi.InputsName, "w"), Target: "/inputs"},
		sandbox.Bind{Source: filepath.Join(j.dir, holdapi.RegionsDir), Target: sandbox.RegionsMount})
}

// release has the input decrypted, as the agent and a broker would.
func (j *insideJob) release(t *testing.T, key *keys.DataKey) {
	t.Helper()
	ctx := t.Context()
	signer := must[*receipt.Signer](t)(receipt.NewSigner("broker.bench", must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))))
	request := must[[]byte](t)(receipt.ReleaseRequest{Version: receipt.RequestVersion, Broker: "broker.bench", Grant: "grant", Attempt: 1, ResultID: "result", Asset: "a"}.Canonical())
	if _, err := j.h.SignRelease(ctx, request); err != nil {
		t.Fatal(err)
	}
	wrap := must[[]byte](t)(receipt.WrapInfo("grant", plan.Sum([]byte("plan")), "a", "result", signer.LeaseTerms(int64(receipt.MaxLease.Seconds()))))
	enc, ct, err := key.Wrap(j.h.Hello.RecipientKey, wrap, []byte("a"))
	if err != nil {
		t.Fatal(err)
	}
	if err := j.h.Deliver(ctx, holdapi.Deliver{Asset: "a", Info: wrap, Enc: enc, Ciphertext: ct, LeaseKeys: must[[]byte](t)(signer.JWKS())}); err != nil {
		t.Fatal(err)
	}
	if _, err := j.h.Decrypt(ctx); err != nil {
		t.Fatal(err)
	}
}

// run runs one part of inside.py as the job and returns what it measured, a list
// of seconds under each name. between runs after the sandbox was made and before
// it starts, as attestation and release do. Then the job is over, its holder gone.
func (j *insideJob) run(t *testing.T, part string, between func()) map[string][]float64 {
	t.Helper()
	profile := j.n.Profile()
	p := plan.Plan{
		Version: plan.Version, Name: "bench", Image: j.n.image.Digest, Command: []string{"/usr/bin/python3", "-c", insideProgram, part, strconv.Itoa(insideRounds)},
		Inputs: []plan.Input{}, Env: []plan.Env{}, Output: plan.Output{LogBytes: 1 << 20}, Resources: resources(j.memory),
		Policy: plan.Policy{Name: "p", Digest: plan.Sum([]byte("p"))}, SandboxProfile: must[plan.Digest](t)(profile.Digest()),
	}
	box, err := j.n.Create(t.Context(), sandbox.Request{
		JobID: j.id, Plan: p, Image: j.n.image, Binds: j.binds, RunDir: j.dir, TraceSocket: filepath.Join(j.dir, holdapi.TraceName),
		Stdout: filepath.Join(j.dir, holdapi.StdoutName), Stderr: filepath.Join(j.dir, holdapi.StderrName),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := box.Remove(context.WithoutCancel(t.Context())); err != nil {
			t.Log("left behind:", err)
		}
	}()
	between()
	if err := box.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-box.Exited()
	if _, err := j.h.Finish(t.Context()); err != nil {
		t.Error(err)
	}
	logs := ""
	for _, stream := range []string{"stdout", "stderr"} {
		b, err := j.h.Logs(t.Context(), holdapi.Logs{Stream: stream})
		if err == nil {
			logs += string(b.Data)
		}
	}
	_ = j.h.Exit(t.Context())
	_, said, found := strings.Cut(logs, "MEASURED ")
	out := map[string][]float64{}
	if !found || json.NewDecoder(strings.NewReader(said)).Decode(&out) != nil {
		t.Fatalf("the job said:\n%s", logs)
	}
	return out
}

// median is of the ratios of two timings of one round each.
func median(r map[string][]float64, over, under string) float64 {
	var l []float64
	for i := range r[under] {
		l = append(l, r[over][i]/r[under][i])
	}
	return middle(l)
}

func gbps(r map[string][]float64, name string) float64 { return pieceSize / middle(r[name]) / 1e9 }

type sealedInput struct {
	dir    string
	digest plan.Digest
}

func sealZeros(t *testing.T, key *keys.DataKey, size int64) sealedInput {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "sealed")
	src := []seal.Source{{Name: "f", Size: size, Open: func() (seal.Reader, error) { return zeros(size), nil }}}
	s := must[seal.Sealed](t)(seal.Seal(t.Context(), key, "a", src, dir, seal.Options{}))
	return sealedInput{dir, s.Digest}
}

func writeZeros(t *testing.T, path string, size int64) {
	t.Helper()
	f := must[*os.File](t)(os.Create(path))
	defer f.Close()
	if _, err := io.Copy(f, io.NewSectionReader(zeros(size), 0, size)); err != nil {
		t.Fatal(err)
	}
}

// tmpfsFile makes a folder in memory with a file f of size bytes in it.
func tmpfsFile(t *testing.T, size int64) string {
	t.Helper()
	dir := must[string](t)(os.MkdirTemp("/dev/shm", "coffer-bench-"))
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	writeZeros(t, filepath.Join(dir, "f"), size)
	return dir
}

// zeroFile is a file of pieceSize bytes, without a page in memory.
type zeroFile struct{ fs.Inode }

func (*zeroFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size = 0o444, pieceSize
	return 0
}

func (*zeroFile) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

func (*zeroFile) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	return fuse.ReadResultData(dest[:max(0, min(int64(len(dest)), pieceSize-off))]), 0
}

// rssAnon is a process's anonymous memory, in bytes (proc_pid_status(5)), and 0
// if there is no such process.
func rssAnon(pid int) int64 { return field(fmt.Sprintf("/proc/%d/status", pid), "RssAnon:") }

func available() int64 { return field("/proc/meminfo", "MemAvailable:") }

func field(file, name string) int64 {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	_, after, _ := bytes.Cut(b, []byte(name))
	var kib int64
	if _, err := fmt.Sscanf(string(after), "%d kB", &kib); err != nil {
		return 0
	}
	return kib << 10
}
