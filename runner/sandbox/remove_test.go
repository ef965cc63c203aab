package sandbox

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
)

// TestStartsThatWereCutOff leaves on the machine what an agent and a containerd that are
// killed while they create a sandbox leave there, starts the job again beside it, and
// removes all of it, and nothing of another job.
func TestStartsThatWereCutOff(t *testing.T) {
	n := startContainerd(t)
	ctx := namespaces.WithNamespace(t.Context(), Namespace)
	other := n.testJob(t, "cutter", "/usr/bin/python3", "-c", "pass")

	// A folder of a task, and a shim that started in it. The containerd that told it to
	// start was killed before it could note where the shim listens.
	id := newContainerID("cut")
	bundle := filepath.Join(filepath.Dir(n.cfg.Containerd), "state", "io.containerd.runtime.v2.task", Namespace, id)
	if err := os.MkdirAll(filepath.Join(bundle, "rootfs"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(bundle, "log")
	if err := syscall.Mkfifo(log, 0o600); err != nil {
		t.Fatal(err)
	}
	reader, err := os.OpenFile(log, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	shim := exec.Command(n.cfg.ShimPath, "-namespace", Namespace, "-address", n.cfg.Containerd, "-publish-binary", "/bin/true", "-id", id, "start")
	sockets := filepath.Dir(n.cfg.Containerd)
	params, err := proto.Marshal(&bootapi.BootstrapParams{
		InstanceID: id, Namespace: Namespace, ContainerdGrpcAddress: n.cfg.Containerd, ContainerdTtrpcAddress: n.cfg.Containerd + ".ttrpc", ContainerdBinary: "/bin/true", SocketDir: &sockets,
	})
	if err != nil {
		t.Fatal(err)
	}
	shim.Dir, shim.Stdin = bundle, bytes.NewReader(params)
	if out, err := shim.CombinedOutput(); err != nil {
		t.Fatalf("start a shim: %v %s", err, out)
	}
	// A container with its snapshot and without a process, and a snapshot alone.
	image, err := n.client.GetImage(ctx, "coffer.local/numpy:latest")
	if err != nil {
		t.Fatal(err)
	}
	second, third := newContainerID("cut"), newContainerID("cut")
	for _, name := range []string{second, third} {
		c, err := n.client.NewContainer(ctx, name, containerd.WithImage(image), containerd.WithSnapshotter(snapshotter), containerd.WithNewSnapshot(name, image), containerd.WithSpec(&specs.Spec{}))
		if err != nil {
			t.Fatal(err)
		}
		if name == third {
			if err := c.Delete(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got, err := n.shims("cut", false); err != nil || got != 1 {
		t.Fatalf("%d shims, %v; want the one that was left", got, err)
	}

	j := n.testJob(t, "cut", "/usr/bin/python3", "-c", "print('runs')")
	if _, err := n.Adopt(ctx, "cut", j.runDir, j.Description()); err == nil || !strings.Contains(err.Error(), "2 containers") {
		t.Errorf("of two containers one is adopted: %v", err)
	}
	if err := j.Start(ctx); err != nil {
		t.Fatal(err)
	}
	select {
	case <-j.Exited():
	case <-time.After(time.Minute):
		t.Fatal("it does not end")
	}
	if err := j.Remove(ctx); err != nil {
		t.Fatal(err)
	}
	if out := <-j.stdout; out != "runs\n" {
		t.Errorf("it printed %q", out)
	}
	if _, err := n.Adopt(ctx, "cut", j.runDir, j.Description()); !errdefs.IsNotFound(err) {
		t.Errorf("what was removed is adopted: %v", err)
	}
	if got, err := n.shims("cut", false); err != nil || got != 0 {
		t.Errorf("%d shims are left, %v", got, err)
	}
	if left, err := n.containersOf(ctx, "cut"); err != nil || len(left) != 0 {
		t.Errorf("%d containers are left, %v", len(left), err)
	}
	var names []string
	if err := n.client.SnapshotService(snapshotter).Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		if i.Kind != snapshots.KindCommitted {
			names = append(names, i.Name)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(names, []string{other.id}) {
		t.Errorf("snapshots %v, want that of the other job %s", names, other.id)
	}
	if got, err := n.shims("cutter", false); err != nil || got < 2 {
		t.Errorf("the other job has %d processes, %v; want its shim and its sandbox", got, err)
	}
	if err := other.Recheck(ctx, other.plan); err != nil {
		t.Errorf("the other job is not what it was: %v", err)
	}
	if err := other.Remove(ctx); err != nil {
		t.Fatal(err)
	}
	if got, err := n.shims("cutter", false); err != nil || got != 0 {
		t.Errorf("the other job has %d processes when it is removed, %v", got, err)
	}
}
