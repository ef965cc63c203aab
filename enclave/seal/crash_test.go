package seal

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/keys"
)

const (
	crashDir  = "COFFER_TEST_CRASH_DIR"
	crashStep = "COFFER_TEST_CRASH_STEP"
)

func commitFor(t *testing.T, dir string, seq uint64, parent plan.Digest, o Options) (Checkpoint, error) {
	t.Helper()
	session, err := keys.GenerateSession()
	must(t, err)
	c := Commit{JobID: "job", Plan: plan.Sum([]byte("p")), Asset: "ckpt", Sequence: seq, Parent: parent, Name: "c", Folder: "00000" + strconv.FormatUint(seq, 10) + "-c"}
	o.ChunkSize = testChunk
	src := []Source{memSource("a", pattern(2*testChunk)), memSource("b", pattern(10))}
	return SealCheckpoint(t.Context(), testKey(t, 1), session, src, openRoot(t, dir), c, time.Now, o)
}

// TestCrashHelper is the process that TestKilledAtEachStep kills.
func TestCrashHelper(t *testing.T) {
	dir := os.Getenv(crashDir)
	if dir == "" {
		return // there is nothing to do but as the child of TestKilledAtEachStep
	}
	left, err := strconv.Atoi(os.Getenv(crashStep))
	must(t, err)
	_, err = commitFor(t, dir, 2, plan.Sum([]byte("first")), Options{step: func() {
		if left--; left == 0 {
			must(t, syscall.Kill(os.Getpid(), syscall.SIGKILL))
			select {}
		}
	}})
	must(t, err)
}

// TestKilledAtEachStep kills a process between any two changes that a commit
// makes on disk. The commit before it stays good, and the one under way is there
// whole or not at all.
func TestKilledAtEachStep(t *testing.T) {
	whole := 0
	for step := 1; ; step++ {
		dir := t.TempDir()
		first, err := commitFor(t, dir, 1, "", Options{})
		must(t, err)
		c := exec.Command(os.Args[0], "-test.run=^TestCrashHelper$")
		c.Env = append(os.Environ(), crashDir+"="+dir, crashStep+"="+strconv.Itoa(step))
		out, err := c.CombinedOutput()
		must(t, Check(t.Context(), openRoot(t, filepath.Join(dir, "000001-c")), "ckpt", first.Record.Digest))
		second := filepath.Join(dir, "000002-c")
		_, serr := os.Stat(second)
		if serr == nil {
			whole++
			b, err := os.ReadFile(filepath.Join(second, RecordName))
			must(t, err)
			var sr receipt.SignedCheckpoint
			must(t, plan.Decode(b, 1<<20, &sr))
			must(t, keys.VerifyLabelled(sr.SessionKey, receipt.CheckpointLabel, sr.Record, sr.Signature))
			r, err := receipt.DecodeCheckpointRecord(sr.Record)
			must(t, err)
			must(t, Check(t.Context(), openRoot(t, second), "ckpt", r.Digest))
			got, err := openAll(t, testKey(t, 1), "ckpt", second, r.Digest)
			if err != nil || !bytes.Equal(got["a"], pattern(2*testChunk)) {
				t.Errorf("step %d: %v", step, err)
			}
		}
		if err == nil {
			t.Logf("killed at %d steps; the commit was there after %d of them", step-1, whole-1)
			if step < 10 || whole < 2 {
				t.Error("steps are missing")
			}
			return
		}
		var ee *exec.ExitError
		if !errors.As(err, &ee) || ee.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Fatalf("step %d: %v: %s", step, err, strings.TrimSpace(string(out)))
		}
	}
}

// TestFullDisk commits onto a disk that fills up in the middle, at several fills.
// The commit fails as a whole, leaves nothing, and the one before it stays good.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("mounting a small disk needs root")
		}
		t.Skip("mounting a small disk needs root")
	}
	failed := 0
	for _, left := range []int64{4 << 10, 12 << 10, 60 << 10, 100 << 10, 140 << 10, 160 << 10, 1 << 20} {
		dir := t.TempDir()
		must(t, unix.Mount("coffer-test", dir, "tmpfs", 0, "size=1m,mode=0700"))
		t.Cleanup(func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) })
		first, err := commitFor(t, dir, 1, "", Options{})
		must(t, err)
		var st unix.Statfs_t
		must(t, unix.Statfs(dir, &st))
		if fill := int64(st.Bavail)*st.Bsize - left; fill > 0 {
			must(t, os.WriteFile(filepath.Join(dir, "fill"), make([]byte, fill), 0o600))
		}
		_, err = commitFor(t, dir, 2, first.Record.Digest, Options{})
		must(t, Check(t.Context(), openRoot(t, filepath.Join(dir, "000001-c")), "ckpt", first.Record.Digest))
		if err == nil {
			continue
		}
		failed++
		if !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("%d bytes left: %v", left, err)
		}
		l, rerr := filepath.Glob(filepath.Join(dir, "000002*"))
		if rerr != nil || len(l) != 0 {
			t.Errorf("%d bytes left: %v lies about", left, l)
		}
		// With room again the same commit succeeds.
		must(t, os.Remove(filepath.Join(dir, "fill")))
		second, err := commitFor(t, dir, 2, first.Record.Digest, Options{})
		must(t, err)
		must(t, Check(t.Context(), openRoot(t, filepath.Join(dir, "000002-c")), "ckpt", second.Record.Digest))
	}
	t.Logf("the disk was full in %d commits", failed)
	if failed < 4 {
		t.Error("the disk was hardly ever full")
	}
}
