// Package sandbox runs jobs in containers under gVisor through containerd. It
// describes each sandbox before it starts, so that evidence can speak of it.
//
// Trusted: containerd, the shim and runsc as measured at the agent's start.
// Checked: their digests and the specification, at creation and again before
// the start. Not trusted: the job, its image, and anything it writes.
package sandbox

import (
	"context"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/internal/executable"
)

const (
	// Namespace is the containerd namespace of coffer's jobs and images.
	Namespace = "coffer"
	// Shim is the containerd runtime that starts runsc. The runc shim serves
	// single containers; see docs/design.
	Shim = "io.containerd.runc.v2"

	snapshotter = "overlayfs"
	wrapperName = "runsc"
	traceName   = "trace.json"

	// killTimeout is how long a killed sandbox may take to be gone.
	killTimeout = 10 * time.Second
)

// runtimeFlags are what every runsc of a job runs with. Changing one changes the
// profile's digest and with it every plan.
var runtimeFlags = []string{
	"--platform=systrap",
	"--network=none",
	"--overlay2=none",
	"--file-access-mounts=shared",
	// For the one socket that is in a job's mounts, at RegionsMount.
	"--host-uds=open",
	"--host-fifo=none",
}

// Config says where a node's parts are.
type Config struct {
	// Containerd is the socket.
	Containerd string
	// Runsc and ShimPath are the binaries.
	Runsc    string
	ShimPath string
	// Cgroup is the group under which every job has its own.
	Cgroup string
	// ImageStore says where image content lies: "disk" or "tmpfs".
	ImageStore string
	// ImageBytes bounds what one image may take unpacked; 0 is DefaultImageBytes.
	ImageBytes int64
	// GPUs is how they come into sandboxes; nil if they do not.
	GPUs *GPUs
	// ImageSigners is who must have signed images; nil if nobody must.
	ImageSigners *plan.ImageSigners
	// Egress is what stands between sandboxes and the network; nil if the node
	// offers none.
	Egress *plan.EgressProfile
	// Rules are what traces are held against, and Opens says that one of them looks
	// at files that are opened.
	Rules plan.Digest
	Opens bool
}

// Node is a connection to containerd, and the profile of the sandboxes it makes.
type Node struct {
	cfg     Config
	client  *containerd.Client
	profile plan.Profile
	version string

	// runsc and shim as the profile has them.
	runsc, shim binary

	programs programs
	content  contents
	drivers  []string // of GPUs, that the runtime knows
}

// Open connects to containerd, digests the runtime's binaries and fixes the profile.
func Open(ctx context.Context, cfg Config) (*Node, error) {
	if cfg.ImageStore != plan.ImageStoreDisk && cfg.ImageStore != plan.ImageStoreTmpfs {
		return nil, fmt.Errorf("open sandbox node: image store %q: want disk or tmpfs", cfg.ImageStore)
	}
	runtime, err := runscVersion(ctx, cfg.Runsc)
	if err != nil {
		return nil, err
	}
	if err := CheckTrace(ctx, cfg.Runsc); err != nil {
		return nil, fmt.Errorf("open sandbox node: %w", err)
	}
	t, err := trace("", cfg.Opens)
	if err != nil {
		return nil, err
	}
	n := &Node{cfg: cfg, programs: programs{known: map[string]Programs{}}, content: contents{known: map[string][]layer{}}, profile: plan.Profile{
		Version: plan.SandboxVersion, Shim: Shim, Runtime: runtime, RuntimeFlags: runtimeFlags, Trace: plan.Sum(t), Rules: Rules, ImageStore: cfg.ImageStore, Egress: cfg.Egress, RuleSet: cfg.Rules, ImageSigners: cfg.ImageSigners,
	}}
	if err := n.openGPUs(ctx); err != nil {
		return nil, err
	}
	if n.runsc, err = readBinary(cfg.Runsc); err != nil {
		return nil, err
	}
	if n.shim, err = readBinary(cfg.ShimPath); err != nil {
		return nil, err
	}
	n.profile.RuntimeDigest, n.profile.ShimDigest = n.runsc.digest, n.shim.digest
	n.client, err = containerd.New(cfg.Containerd, containerd.WithDefaultNamespace(Namespace), containerd.WithTimeout(redialEvery))
	if err != nil {
		return nil, fmt.Errorf("connect to containerd at %s: %w", cfg.Containerd, err)
	}
	v, err := n.client.Version(ctx)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("ask containerd at %s for its version: %w", cfg.Containerd, err), n.client.Close())
	}
	n.version = v.Version
	return n, nil
}

// Close closes the connection. Sandboxes go on running.
func (n *Node) Close() error { return n.client.Close() }

// Profile returns the rules of this node's sandboxes.
func (n *Node) Profile() plan.Profile { return n.profile }

// ContainerdVersion returns what containerd says of itself.
func (n *Node) ContainerdVersion() string { return n.version }

// runscVersion returns the first line of `runsc --version`.
func runscVersion(ctx context.Context, path string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "--version").Output() //nolint:gosec // the configured runtime
	if err != nil {
		return "", fmt.Errorf("ask %s for its version: %w", path, err)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return strings.TrimSpace(line), nil
}

// FileDigest returns the SHA-384 of a file.
func FileDigest(path string) (plan.Digest, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("digest: %w", err)
	}
	defer f.Close()
	h := sha512.New384()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("digest %s: %w", path, err)
	}
	return plan.Digest("sha384:" + hex.EncodeToString(h.Sum(nil))), nil
}

// Request is what a sandbox is made from.
type Request struct {
	JobID string
	Plan  plan.Plan
	Image Image
	// ImageSignature is the digest of the signature by which the image was admitted,
	// where the node has signers.
	ImageSignature plan.Digest
	// ImageSBOM is the digest of the image's bill of materials; empty for none.
	ImageSBOM plan.Digest
	// Env are the values, in the order of Plan.Env.
	Env   []string
	Binds []Bind
	// RunDir is the job's run directory, with the holder's sockets and pipes.
	RunDir string
	// TraceSocket, Stdout and Stderr are the holder's.
	TraceSocket    string
	Stdout, Stderr string
	// GPUs are the job's, by UUID.
	GPUs []string
	// Network is there if and only if the plan allows egress.
	Network *Network
}

// Sandbox is a created container. Its description is fixed; Recheck says
// whether the machine still agrees with it.
type Sandbox struct {
	node        *Node
	job         string
	id          string // the container's
	runDir      string
	description []byte
	container   containerd.Container
	task        containerd.Task
	exit        <-chan containerd.ExitStatus
	unwatch     context.CancelFunc
	read        <-chan binaries // what ReadBinaries began
	// frozen is that the processes are stopped by Freeze.
	frozen atomic.Bool
}

// Freeze stops the container's processes where they are, or lets them go on.
func (s *Sandbox) Freeze(ctx context.Context, on bool) error {
	what, f := "freeze", s.task.Pause
	if !on {
		what, f = "thaw", s.task.Resume
	}
	if err := patient(ctx, awayForCaller, func() error { return f(ctx) }); err != nil {
		return fmt.Errorf("%s container: %w", what, err)
	}
	s.frozen.Store(on)
	return nil
}

// killed lets a frozen container's processes go on that were sent SIGKILL: they run
// no instruction more, and do not end before.
func (s *Sandbox) killed(ctx context.Context) {
	if s.frozen.Swap(false) {
		_ = s.task.Resume(ctx) // it may have ended
	}
}

// Create makes the container and its runtime process, not yet started. The
// job's cgroup must exist. On an error nothing is left behind.
func (n *Node) Create(ctx context.Context, r Request) (_ *Sandbox, err error) {
	defer func() { err = typed(err) }()
	var image containerd.Image
	if err = patient(ctx, awayFor, func() (err error) {
		image, err = n.client.GetImage(ctx, r.Image.Name)
		return err
	}); err != nil {
		return nil, fmt.Errorf("create sandbox: image %s: %w", r.Image.Name, err)
	}
	if got := image.Target().Digest.String(); got != r.Plan.Image {
		var l check.List
		l.Fail("sandbox.image", r.Plan.Image, got, "the image changed after the plan was made")
		return nil, check.Refuse("sandbox", l)
	}
	if (n.profile.ImageSigners != nil) != (r.ImageSignature != "") {
		return nil, errors.New("create sandbox: an image has a signature if and only if the node has signers")
	}
	if len(r.Env) != len(r.Plan.Env) {
		return nil, errors.New("create sandbox: environment does not match the plan")
	}
	env := make([]string, 0, len(r.Env))
	for i, v := range r.Env {
		if plan.Sum([]byte(v)) != r.Plan.Env[i].ValueDigest {
			return nil, fmt.Errorf("create sandbox: the value of %s does not match the plan", r.Plan.Env[i].Name)
		}
		env = append(env, r.Plan.Env[i].Name+"="+v)
	}
	spec, err := buildSpec(r.Plan, env, r.Binds, r.Network, JobCgroup(n.cfg.Cgroup, r.JobID))
	if err != nil {
		return nil, err
	}
	if err := n.enterGPUs(spec, r); err != nil {
		return nil, err
	}
	traceFile := filepath.Join(r.RunDir, traceName)
	tc, err := trace(r.TraceSocket, n.cfg.Opens)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(traceFile, tc, 0o600); err != nil {
		return nil, fmt.Errorf("create sandbox: %w", err)
	}
	flags, err := n.flags(r.Plan)
	if err != nil {
		return nil, err
	}
	argv := append([]string{n.cfg.Runsc}, flags...)
	argv = append(argv, "--pod-init-config="+traceFile)
	wrapper := filepath.Join(r.RunDir, wrapperName)
	if err := executable.Write(wrapper, wrapperScript(argv, configOf(r.RunDir))); err != nil {
		return nil, fmt.Errorf("create sandbox: %w", err)
	}

	shown := redactEnv(spec, r.Plan)
	redacted, err := json.Marshal(shown)
	if err != nil {
		return nil, fmt.Errorf("encode sandbox specification: %w", err)
	}
	d := plan.Sandbox{Version: plan.SandboxVersion, JobID: r.JobID, Image: r.Plan.Image, ImageSignature: r.ImageSignature, ImageSBOM: r.ImageSBOM, Profile: n.profile, Wrapper: argv, Trace: tc, Spec: redacted}
	description, err := d.Canonical()
	if err != nil {
		return nil, err
	}
	s := &Sandbox{node: n, job: r.JobID, id: newContainerID(r.JobID), runDir: r.RunDir, description: description}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Remove(context.WithoutCancel(ctx)))
		}
	}()
	if err = keepSpec(r.RunDir, spec); err != nil {
		return nil, err
	}
	parts := []containerd.NewContainerOpts{
		containerd.WithImage(image), containerd.WithSnapshotter(snapshotter),
		// A writable layer, because the runtime makes the mount points in it
		// before the root becomes read-only to the job.
		containerd.WithNewSnapshot(s.id, image),
		containerd.WithRuntime(Shim, &options.Options{BinaryName: wrapper, Root: runtimeRoot(r.RunDir)}),
		containerd.WithSpec(shown),
	}
	s.container, err = n.client.NewContainer(ctx, s.id, parts...)
	if errdefs.IsNotFound(err) {
		// Whoever imported the image was killed before it was unpacked.
		if err = Unpack(ctx, n.client, image.Metadata(), n.cfg.ImageBytes); err == nil {
			s.container, err = n.client.NewContainer(ctx, s.id, parts...)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("create container: %w", err)
	}
	if err = n.makeMountPoints(ctx, s.id, spec); err != nil {
		return nil, err
	}
	s.task, err = s.container.NewTask(ctx, pipes(r.Stdout, r.Stderr))
	if err != nil {
		return nil, fmt.Errorf("create sandbox process: %w", err)
	}
	if err := s.checkStore(ctx); err != nil {
		return nil, err
	}
	if err := s.watch(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

// Adopt finds the sandbox of a job that an earlier agent created. description
// is the journal's; Recheck says whether it still holds. The error is errdefs.ErrNotFound
// where the job has none.
func (n *Node) Adopt(ctx context.Context, jobID, runDir string, description []byte) (*Sandbox, error) {
	all, err := n.containersOf(ctx, jobID)
	if err != nil {
		return nil, fmt.Errorf("adopt sandbox of job %s: %w", jobID, err)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("adopt sandbox of job %s: containerd has no container of it: %w", jobID, errdefs.ErrNotFound)
	}
	if len(all) != 1 {
		return nil, fmt.Errorf("adopt sandbox of job %s: containerd has %d containers of it, want 1", jobID, len(all))
	}
	c := all[0]
	t, err := c.Task(ctx, nil)
	if err != nil {
		return nil, fmt.Errorf("adopt sandbox of job %s: %w", jobID, err)
	}
	s := &Sandbox{node: n, job: jobID, id: c.ID(), runDir: runDir, description: description, container: c, task: t}
	if err := s.watch(ctx); err != nil {
		return nil, fmt.Errorf("adopt sandbox of job %s: %w", jobID, err)
	}
	if st, err := t.Status(ctx); err == nil {
		s.frozen.Store(st.Status == containerd.Paused)
	}
	return s, nil
}

// watch begins to wait for the container's end, until Remove.
func (s *Sandbox) watch(ctx context.Context) error {
	ctx, s.unwatch = context.WithCancel(context.WithoutCancel(ctx))
	first, err := s.task.Wait(ctx)
	if err != nil {
		s.unwatch()
		return fmt.Errorf("watch sandbox process: %w", err)
	}
	s.exit = s.node.ended(ctx, s.id, first)
	return nil
}

// pipes hands the holder's pipes to the shim. The agent reads neither: the
// holder keeps the logs, and keeps them when the agent is gone.
func pipes(stdout, stderr string) cio.Creator {
	return func(string) (cio.IO, error) {
		return holderIO{cio.Config{Stdout: stdout, Stderr: stderr}}, nil
	}
}

type holderIO struct{ config cio.Config }

func (h holderIO) Config() cio.Config { return h.config }
func (h holderIO) Cancel()            {}
func (h holderIO) Wait()              {}
func (h holderIO) Close() error       { return nil }

// Description returns the canonical description whose digest evidence binds.
func (s *Sandbox) Description() []byte { return s.description }

// Digest returns the digest of the description.
func (s *Sandbox) Digest() plan.Digest { return plan.Sum(s.description) }

// Recheck compares the description with what the machine would run now: the
// specification that containerd holds and the one in the runtime's bundle, the
// runtime's flags, the trace configuration and the binaries. Every difference is
// in the *check.Refusal.
func (s *Sandbox) Recheck(ctx context.Context, p plan.Plan) error {
	d, err := plan.ParseSandbox(s.description)
	if err != nil {
		return err
	}
	var l check.List
	equal := func(id string, want, got plan.Digest) {
		l.Equal(id, string(want), string(got), "somebody changed the sandbox after it was attested")
	}
	wrapper, err := os.ReadFile(filepath.Join(s.runDir, wrapperName))
	if err != nil {
		return fmt.Errorf("recheck sandbox: %w", err)
	}
	equal("sandbox.flags", plan.Sum(wrapperScript(d.Wrapper, configOf(s.runDir))), plan.Sum(wrapper))
	tc, err := os.ReadFile(filepath.Join(s.runDir, traceName))
	if err != nil {
		return fmt.Errorf("recheck sandbox: %w", err)
	}
	// The description is canonical; so must the file be to compare.
	canonical, err := plan.Canonical(json.RawMessage(tc))
	if err != nil {
		return fmt.Errorf("recheck sandbox: trace configuration: %w", err)
	}
	want, err := plan.Canonical(d.Trace)
	if err != nil {
		return err
	}
	equal("sandbox.trace", plan.Sum(want), plan.Sum(canonical))
	b := s.binariesRead(ctx)
	if b.err != nil {
		return b.err
	}
	equal("sandbox.runtime", d.Profile.RuntimeDigest, b.runsc)
	equal("sandbox.shim", d.Profile.ShimDigest, b.shim)

	wantSpec, err := plan.Canonical(d.Spec)
	if err != nil {
		return err
	}
	var held *specs.Spec
	if err := patient(ctx, awayFor, func() (err error) {
		held, err = s.container.Spec(ctx)
		return err
	}); err != nil {
		return fmt.Errorf("recheck sandbox: %w", err)
	}
	bundle, err := s.bundleSpec()
	if err != nil {
		return err
	}
	gotHeld, err := canonicalSpec(held)
	if err != nil {
		return err
	}
	equal("sandbox.spec", plan.Sum(wantSpec), plan.Sum(gotHeld))
	gotBundle, err := describeSpec(bundle, p)
	if err != nil {
		return err
	}
	equal("sandbox.bundle", plan.Sum(wantSpec), gotBundle)
	if len(l.Failed()) > 0 {
		return check.Refuse("start", l)
	}
	return nil
}

// Pid returns the process of the sandbox.
func (s *Sandbox) Pid() int { return int(s.task.Pid()) }

// Start lets the container's first process run. Where containerd went away meanwhile,
// an error does not mean that it does not: neither shim nor runtime need know, but the
// trace does.
func (s *Sandbox) Start(ctx context.Context) error {
	if err := patient(ctx, awayFor, func() error { return s.task.Start(ctx) }); err != nil {
		return fmt.Errorf("start container: %w", typed(err))
	}
	return nil
}

// Exited is closed or sends when the container has ended.
func (s *Sandbox) Exited() <-chan containerd.ExitStatus { return s.exit }

// Stop asks the container to end and kills it after grace.
func (s *Sandbox) Stop(ctx context.Context, grace time.Duration) error {
	if grace > 0 && !s.frozen.Load() {
		if err := patient(ctx, awayFor, func() error { return s.task.Kill(ctx, syscall.SIGTERM) }); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("stop container: %w", err)
		}
		t := time.NewTimer(grace)
		defer t.Stop()
		select {
		case <-s.exit:
			return nil
		case <-t.C:
		case <-ctx.Done():
		}
	}
	ctx = context.WithoutCancel(ctx)
	if err := patient(ctx, awayFor, func() error { return s.task.Kill(ctx, syscall.SIGKILL, containerd.WithKillAll) }); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("kill container: %w", err)
	}
	s.killed(ctx)
	return nil
}

// ExitCode turns an exit status into the code people know.
func ExitCode(st containerd.ExitStatus) (int, error) {
	code, _, err := st.Result()
	if err != nil {
		return 0, fmt.Errorf("exit status of the container: %w", err)
	}
	return int(code), nil
}
