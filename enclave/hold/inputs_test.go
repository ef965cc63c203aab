package hold_test

import (
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/enclave/keys"
)

// A process that has an input open starts a program while the holder is paused: what the
// program's start closes must not wait for the holder.
func TestProgramsStartBesideAPausedHolder(t *testing.T) {
	h := start(t)
	ctx := t.Context()
	key := keys.GenerateDataKey()
	dir, digest := sealed(t, key, "a", map[string][]byte{"f": pattern(mib)})
	must(t, h.c.Input(ctx, holdapi.Input{Name: "in", Asset: "a", Digest: digest}, dir))
	must(t, h.deliver(key, "a"))
	_, err := h.c.Decrypt(ctx)
	must(t, err)
	h.trace().start()
	h.waitStarted()
	f, err := os.Open(h.path("inputs/in/f"))
	must(t, err)
	must(t, h.cmd.Process.Signal(unix.SIGSTOP))
	resume := time.AfterFunc(30*time.Second, func() { _ = h.cmd.Process.Signal(unix.SIGCONT) })
	must(t, exec.Command("true").Run())
	must(t, f.Close())
	if !resume.Stop() {
		t.Error("the program's start waited for the holder")
	}
	must(t, h.cmd.Process.Signal(unix.SIGCONT))
}
