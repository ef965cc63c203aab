package hold_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/enclave/seal"
)

// shortest is the shortest lease that there is.
const shortest = receipt.MinLease

// member puts a process into the job's control group and returns a channel that
// is closed when it is dead.
func (h *holder) member() <-chan struct{} {
	h.t.Helper()
	c := exec.Command("sleep", "120")
	must(h.t, c.Start())
	// The kernel lists every process of the group, the holder among them.
	_, err := h.procs.WriteAt(fmt.Appendf(nil, "%d\n%d\n", h.cmd.Process.Pid, c.Process.Pid), 0)
	must(h.t, err)
	dead := make(chan struct{})
	go func() {
		_ = c.Wait()
		_ = h.procs.Truncate(0)
		close(dead)
	}()
	h.t.Cleanup(func() {
		_ = c.Process.Kill()
		<-dead
	})
	return dead
}

// over waits until the holder has taken everything back, as an agent finds it
// that comes later, and returns its status.
func (h *holder) over() holdapi.Status {
	h.t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		st, err := h.c.Status(h.t.Context())
		must(h.t, err)
		if st.Scrubbed {
			return st
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("not scrubbed: %+v", st)
		}
	}
}

func (h *holder) kinds() []string {
	h.t.Helper()
	es, err := h.c.Events(h.t.Context(), holdapi.Events{})
	must(h.t, err)
	var out []string
	for _, e := range es {
		out = append(out, e.Kind)
	}
	return out
}

// Nobody renews, nobody tells the holder anything: it kills the job and takes
// everything back by itself.
func TestLapseWithoutAnAgent(t *testing.T) {
	t.Parallel()
	h := start(t)
	ctx := t.Context()
	key := keys.GenerateDataKey()
	plain := pattern(3 * mib)
	dir, digest := sealed(t, key, "a", map[string][]byte{"f": plain})
	must(t, h.c.Input(ctx, holdapi.Input{Name: "in", Asset: "a", Digest: digest}, dir))
	// It is there before the lease is, however long the rest takes on a busy machine.
	dead := h.member()
	began := time.Now()
	must(t, h.deliverFor(key, "a", leaser.LeaseTerms(int64(shortest.Seconds()))))
	_, err := h.c.Decrypt(ctx)
	must(t, err)
	h.trace().start()
	h.waitStarted()
	f, err := os.Open(h.path("inputs/in/f"))
	must(t, err)
	defer f.Close()
	got := make([]byte, len(plain))
	_, err = f.ReadAt(got, 0)
	must(t, err)
	if !bytes.Equal(got, plain) {
		t.Error("the job reads something else")
	}
	select {
	case <-dead:
	case <-time.After(time.Minute):
		t.Fatal("the job lives on")
	}
	took := time.Since(began)
	t.Logf("a lease of %s: the job's process was gone %s after the release was asked for", shortest, took.Round(time.Millisecond))
	if took < shortest {
		t.Errorf("gone after %s", took)
	}
	st := h.over()
	if st.Lease.State != holdapi.LeaseOver || st.Lease.Code != holdapi.LeaseLapsed || st.RegionBytes != 0 {
		t.Errorf("%+v", st)
	}
	if k := h.kinds(); !slices.Equal(k, []string{"container-start", "lease-over", "job-killed", "scrubbed"}) {
		t.Errorf("events %v", k)
	}
	if n, err := f.ReadAt(got, 0); err == nil && !bytes.Equal(got[:n], make([]byte, n)) {
		t.Error("what was open can still be read")
	}
	if _, err := os.Open(h.path("inputs/in/f")); err == nil {
		t.Error("the input opens")
	}
	if err := h.wrapped(key, "grant", "a", "a", leaser.LeaseTerms(60)); err == nil {
		t.Error("another key was taken")
	}
	// What is left of the holder signs the evidence of it.
	if _, err := h.c.Sign(ctx, statementOf(t, jobID)); err != nil {
		t.Error(err)
	}
	must(t, h.c.Exit(ctx))
	must(t, h.cmd.Wait())
}

// A holder that is paused for longer than the lease refuses the very next use of
// a key: a read that waited for it, and an open.
func TestPausedHolder(t *testing.T) {
	t.Parallel()
	h := start(t, "--region-bytes", fmt.Sprint(4*mib))
	ctx := t.Context()
	key := keys.GenerateDataKey()
	plain := pattern(9 * mib)
	dir, digest := sealed(t, key, "a", map[string][]byte{"big": plain, "f": pattern(mib)})
	must(t, h.c.Input(ctx, holdapi.Input{Name: "in", Asset: "a", Digest: digest}, dir))
	began := time.Now()
	must(t, h.deliverFor(key, "a", leaser.LeaseTerms(int64(shortest.Seconds()))))
	_, err := h.c.Decrypt(ctx)
	must(t, err)
	h.trace().start()
	h.waitStarted()
	f, err := os.Open(h.path("inputs/in/big"))
	must(t, err)
	defer f.Close()
	got := make([]byte, seal.MinChunkSize)
	_, err = f.ReadAt(got, 0)
	must(t, err)

	must(t, h.cmd.Process.Signal(unix.SIGSTOP))
	// On a busy machine some of its threads run on for a while.
	h.until("all threads to stop", func() bool {
		states, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", h.cmd.Process.Pid))
		must(t, err)
		return len(states) > 0 && !slices.ContainsFunc(states, func(p string) bool {
			b, err := os.ReadFile(p)
			_, state, _ := strings.Cut(string(b), ") ")
			return err != nil || !strings.HasPrefix(state, "T")
		})
	})
	resume := func() error { return h.cmd.Process.Signal(unix.SIGCONT) }
	defer func() { _ = resume() }()
	type result struct {
		what string
		err  error
	}
	results := make(chan result, 2)
	go func() {
		_, err := f.ReadAt(got, 8*mib)
		results <- result{"read", err}
	}()
	go func() {
		g, err := os.Open(h.path("inputs/in/f"))
		if err == nil {
			_ = g.Close()
		}
		results <- result{"open", err}
	}()
	time.Sleep(time.Until(began.Add(shortest + 200*time.Millisecond)))
	select {
	case r := <-results:
		t.Fatalf("a holder that is stopped answers: %+v", r)
	default:
	}
	must(t, resume())
	for range 2 {
		if r := <-results; r.err == nil {
			t.Errorf("the first %s after the pause succeeds", r.what)
		}
	}
	if bytes.Equal(got, plain[8*mib:8*mib+len(got)]) {
		t.Error("plaintext came out")
	}
	if st := h.over(); st.Lease.Code != holdapi.LeaseLapsed {
		t.Errorf("%+v", st)
	}
}

// The broker's word to stop leaves time for a last checkpoint, and no more.
func TestStopLeavesTimeForACheckpoint(t *testing.T) {
	h := start(t)
	ctx := t.Context()
	key := keys.GenerateDataKey()
	must(t, h.deliver(key, "ckpt"))
	must(t, h.c.Sink(ctx, holdapi.Sink{Asset: "ckpt", Plan: planDigest, MaxBytes: 64 << 20}, t.TempDir()))
	_, err := h.c.Decrypt(ctx)
	must(t, err)
	h.trace().start()
	h.waitStarted()
	dead := h.member()

	renew := func(edit func(*receipt.Lease)) (holdapi.Lease, error) {
		s, err := h.c.Lease(ctx)
		must(t, err)
		word := receipt.Lease{JobID: jobID, Plan: planDigest, Session: plan.Sum(h.hi.SessionKey), Challenge: s.Challenge, State: receipt.LeaseRunning, Seconds: 60}
		edit(&word)
		token, err := receipt.SignLease(leaser.Signer, word)
		must(t, err)
		return h.c.RenewLease(ctx, token)
	}
	s, err := renew(func(*receipt.Lease) {})
	if err != nil || s.State != holdapi.LeaseRunning || s.RemainingMillis > 60_000 || s.RemainingMillis < 50_000 {
		t.Errorf("%+v %v", s, err)
	}
	if _, err := renew(func(l *receipt.Lease) { l.JobID = "another" }); code(err) != holdapi.CodeRefused {
		t.Errorf("the lease of another job: %v", err)
	}
	began := time.Now()
	s, err = renew(func(l *receipt.Lease) {
		l.State, l.Seconds, l.GraceSeconds, l.Reason = receipt.LeaseStop, 0, 2, "grant: taken back"
	})
	if err != nil || s.State != holdapi.LeaseStopping || s.Code != holdapi.LeaseRevoked {
		t.Errorf("%+v %v", s, err)
	}
	must(t, os.WriteFile(h.path("checkpoints/last.tmp"), pattern(100), 0o600))
	must(t, os.Rename(h.path("checkpoints/last.tmp"), h.path("checkpoints/last")))
	must(t, os.WriteFile(h.path("checkpoints/late.tmp"), pattern(100), 0o600))
	<-dead
	if took := time.Since(began); took < 1900*time.Millisecond || took > 30*time.Second {
		t.Errorf("a grace of 2 s lasted %s", took)
	}
	if err := os.Rename(h.path("checkpoints/late.tmp"), h.path("checkpoints/late")); err == nil {
		t.Error("a checkpoint was sealed after the grace")
	}
	st := h.over()
	if st.Lease.State != holdapi.LeaseOver || st.Lease.Code != holdapi.LeaseRevoked || st.Lease.Reason != "grant: taken back" || len(st.Checkpoints) != 1 {
		t.Errorf("%+v", st)
	}
	late := func(kind string) bool { return kind == "checkpoint-error" }
	if k := slices.DeleteFunc(h.kinds(), late); !slices.Equal(k, []string{"container-start", "lease-stop", "checkpoint", "lease-over", "job-killed", "scrubbed"}) {
		t.Errorf("events %v", k)
	}
}
