package hold_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	pb "gvisor.dev/gvisor/pkg/sentry/seccheck/points/points_go_proto"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/enclave/seal"
)

const (
	jobUID = 65532
	jobID  = "job-1"
)

var planDigest = plan.Sum([]byte("the plan"))

var build struct {
	once sync.Once
	path string
	err  error
}

// holderBinary builds the holder once for all tests.
func holderBinary(t *testing.T) string {
	t.Helper()
	build.once.Do(func() {
		dir, err := os.MkdirTemp("", "coffer-holder-test")
		if err != nil {
			build.err = err
			return
		}
		build.path = filepath.Join(dir, "coffer-holder")
		args := []string{"build", "-o", build.path}
		if bi, ok := debug.ReadBuildInfo(); ok && slices.Contains(bi.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
			args = append(args, "-race")
		}
		c := exec.Command("go", append(args, "github.com/coffer-run/coffer/cmd/coffer-holder")...)
		if out, err := c.CombinedOutput(); err != nil {
			build.err = fmt.Errorf("%w: %s", err, out)
		}
	})
	if build.err != nil {
		t.Fatal(build.err)
	}
	return build.path
}

func TestMain(m *testing.M) {
	code := m.Run()
	if build.path != "" {
		_ = os.RemoveAll(filepath.Dir(build.path))
	}
	os.Exit(code)
}

func needRoot(t *testing.T) {
	t.Helper()
	why := ""
	if os.Geteuid() != 0 {
		why = "mounting a FUSE file system needs root"
	} else if _, err := os.Stat("/dev/fuse"); err != nil {
		why = "there is no /dev/fuse"
	}
	if why == "" {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal(why)
	}
	t.Skip(why)
}

type holder struct {
	t   *testing.T
	run string
	cmd *exec.Cmd
	log *bytes.Buffer
	c   *holdapi.Client
	hi  holdapi.Hello
	// procs lists the processes of the job's control group.
	procs *os.File
}

func start(t *testing.T, args ...string) *holder {
	t.Helper()
	h := launch(t, nil, func(h *holder) []string { return append(append(h.args(), "--procs", "3"), args...) })
	h.attach()
	return h
}

// args are those of a job, but for the list of its processes.
func (h *holder) args() []string {
	return []string{"--run", h.run, "--job", jobID, "--uid", "65532", "--gid", "65532", "--log-bytes", "1000", "--cores", "2"}
}

// launch starts the program with one descriptor, which is the list of the job's
// processes if fd is nil.
func launch(t *testing.T, fd *os.File, args func(h *holder) []string) *holder {
	t.Helper()
	needRoot(t)
	run, err := os.MkdirTemp("/tmp", "coffer-run-")
	must(t, err)
	h := &holder{t: t, run: run, log: new(bytes.Buffer)}
	// Nobody is in the job's control group but who a test puts there.
	h.procs, err = os.CreateTemp(t.TempDir(), "procs")
	must(t, err)
	t.Cleanup(func() { _ = h.procs.Close() })
	if fd == nil {
		fd = h.procs
	}
	h.cmd = exec.Command(holderBinary(t), args(h)...)
	h.cmd.ExtraFiles = []*os.File{fd}
	h.cmd.Stderr = h.log
	h.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: syscall.CLONE_NEWNET}
	must(t, unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC))
	must(t, h.cmd.Start())
	t.Cleanup(func() {
		_ = h.cmd.Process.Kill()
		_ = h.cmd.Wait()
		for l := range strings.Lines(h.log.String()) {
			if !strings.HasPrefix(l, `{"time":`) {
				t.Errorf("the holder said: %s", l)
			}
		}
		if err := holdapi.Cleanup(run); err != nil {
			t.Error(err)
		}
		if err := os.RemoveAll(run); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Log(h.log)
		}
	})
	return h
}

// attach connects to a holder that has its job.
func (h *holder) attach() {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), time.Minute)
	defer cancel()
	var err error
	h.c, err = holdapi.DialWait(ctx, h.run)
	must(h.t, err)
	h.t.Cleanup(func() { _ = h.c.Close() })
	h.hi, err = h.c.Hello(ctx)
	must(h.t, err)
}

func (h *holder) path(p ...string) string { return filepath.Join(append([]string{h.run}, p...)...) }

// leaser signs leases as the broker does.
var leaser = newLeaser("broker.test")

type leaseSigner struct {
	*receipt.Signer
	jwks []byte
}

func newLeaser(name string) leaseSigner {
	key, err := ecdsa.GenerateKey(elliptic.P384(), crand.Reader)
	if err != nil {
		panic(err)
	}
	s, err := receipt.NewSigner(name, key)
	if err != nil {
		panic(err)
	}
	jwks, err := s.JWKS()
	if err != nil {
		panic(err)
	}
	return leaseSigner{s, jwks}
}

// deliver wraps key as a broker does, for as long as no test waits.
func (h *holder) deliver(key *keys.DataKey, asset string) error {
	return h.deliverFor(key, asset, leaser.LeaseTerms(int64(receipt.MaxLease.Seconds())))
}

// deliverFor asks for a key and wraps it under the given lease.
func (h *holder) deliverFor(key *keys.DataKey, asset string, terms receipt.LeaseTerms) error {
	h.askRelease(asset)
	return h.wrapped(key, "grant", asset, asset, terms)
}

func (h *holder) askRelease(asset string) {
	h.t.Helper()
	req, err := receipt.ReleaseRequest{Version: receipt.RequestVersion, Broker: "broker.test", Grant: "grant", Attempt: 1, ResultID: "result", Asset: asset}.Canonical()
	must(h.t, err)
	_, err = h.c.SignRelease(h.t.Context(), req)
	must(h.t, err)
}

// wrapped delivers key, wrapped for one asset with the info of another.
func (h *holder) wrapped(key *keys.DataKey, grant, asset, infoAsset string, terms receipt.LeaseTerms) error {
	info, err := receipt.WrapInfo(grant, planDigest, infoAsset, "result", terms)
	must(h.t, err)
	enc, ct, err := key.Wrap(h.hi.RecipientKey, info, []byte(asset))
	must(h.t, err)
	return h.c.Deliver(h.t.Context(), holdapi.Deliver{Asset: asset, Info: info, Enc: enc, Ciphertext: ct, LeaseKeys: leaser.jwks})
}

type memReader struct{ *bytes.Reader }

func (memReader) Close() error { return nil }

func sealed(t *testing.T, key *keys.DataKey, asset string, files map[string][]byte) (string, plan.Digest) {
	t.Helper()
	var src []seal.Source
	for n, b := range files {
		src = append(src, seal.Source{Name: n, Size: int64(len(b)), Open: func() (seal.Reader, error) { return memReader{bytes.NewReader(b)}, nil }})
	}
	dst := filepath.Join(t.TempDir(), "sealed")
	s, err := seal.Seal(t.Context(), key, asset, src, dst, seal.Options{ChunkSize: seal.MinChunkSize})
	must(t, err)
	return dst, s.Digest
}

// traceConn speaks as the sandbox does.
type traceConn struct {
	t *testing.T
	c *net.UnixConn
}

func (h *holder) trace() *traceConn {
	h.t.Helper()
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: h.path(holdapi.TraceName), Net: "unixpacket"})
	must(h.t, err)
	h.t.Cleanup(func() { _ = c.Close() })
	b, err := proto.Marshal(&pb.Handshake{Version: 1})
	must(h.t, err)
	_, err = c.Write(b)
	must(h.t, err)
	buf := make([]byte, 1024)
	n, err := c.Read(buf)
	must(h.t, err)
	var hs pb.Handshake
	must(h.t, proto.Unmarshal(buf[:n], &hs))
	if hs.Version != 1 {
		h.t.Fatalf("handshake version %d", hs.Version)
	}
	return &traceConn{h.t, c}
}

func (c *traceConn) send(kind pb.MessageType, m proto.Message) {
	c.t.Helper()
	body, err := proto.Marshal(m)
	must(c.t, err)
	b := binary.LittleEndian.AppendUint16(nil, 8)
	b = binary.LittleEndian.AppendUint16(b, uint16(kind))
	b = binary.LittleEndian.AppendUint32(b, 0)
	_, err = c.c.Write(append(b, body...))
	must(c.t, err)
}

func (c *traceConn) start() {
	c.send(pb.MessageType_MESSAGE_CONTAINER_START, &pb.Start{Id: "container"})
}

func (h *holder) waitStarted() {
	h.t.Helper()
	h.until("the start to be seen", func() bool {
		s, err := h.c.Status(h.t.Context())
		must(h.t, err)
		return s.Started
	})
}

func (h *holder) until(what string, f func() bool) {
	h.t.Helper()
	for end := time.Now().Add(time.Minute); !f(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			h.t.Fatalf("waited in vain for %s", what)
		}
	}
}

func pattern(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(n)}).Read(b)
	return b
}

func TestEndToEnd(t *testing.T) {
	h := start(t)
	ctx := t.Context()
	data, ckpt := keys.GenerateDataKey(), keys.GenerateDataKey()
	files := map[string][]byte{"train/x.bin": pattern(3*seal.MinChunkSize + 5), "train/empty": nil, "labels": pattern(seal.MinChunkSize)}
	dir, digest := sealed(t, data, "mnist", files)

	must(t, h.c.Input(ctx, holdapi.Input{Name: "data", Asset: "mnist", Digest: digest}, dir))
	if _, err := h.c.Decrypt(ctx); code(err) != holdapi.CodeState {
		t.Errorf("decrypt without a key: %v", err)
	}
	must(t, h.deliver(data, "mnist"))
	must(t, h.deliver(ckpt, "ckpt"))
	sink := t.TempDir()
	must(t, h.c.Sink(ctx, holdapi.Sink{Asset: "ckpt", Plan: planDigest, MaxBytes: 64 << 20}, sink))
	d, err := h.c.Decrypt(ctx)
	must(t, err)
	if d.Files != 3 || d.Bytes != int64(4*seal.MinChunkSize+5) {
		t.Errorf("decrypted %+v", d)
	}
	if st, err := h.c.Status(ctx); err != nil || st.Opened == nil || *st.Opened != (holdapi.Opened{Bytes: d.Bytes, Total: d.Bytes}) {
		t.Errorf("the status has %+v of %d bytes: %v", st.Opened, d.Bytes, err)
	}

	// Before the start nothing is opened, found or listed; the read waits.
	type result struct {
		b   []byte
		err error
		at  time.Time
	}
	read := make(chan result, 1)
	go func() {
		b, err := os.ReadFile(h.path("inputs/data/labels"))
		read <- result{b, err, time.Now()}
	}()
	time.Sleep(200 * time.Millisecond)
	select {
	case r := <-read:
		t.Fatalf("read before the start: %d bytes, %v", len(r.b), r.err)
	default:
	}
	tr := h.trace()
	tr.send(pb.MessageType_MESSAGE_SENTRY_EXEC, &pb.ExecveInfo{BinaryPath: "/usr/bin/python3", BinarySha256: []byte{1, 2}})
	time.Sleep(50 * time.Millisecond)
	select {
	case r := <-read:
		t.Fatalf("an exec counted as the start: %v", r.err)
	default:
	}
	began := time.Now()
	tr.start()
	if r := <-read; r.err != nil || !bytes.Equal(r.b, files["labels"]) || r.at.Before(began) {
		t.Fatalf("read after the start: %d bytes, %v", len(r.b), r.err)
	}
	for n, want := range files {
		got, err := os.ReadFile(h.path("inputs/data", n))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", n, len(got), err)
		}
		if err := os.WriteFile(h.path("inputs/data", n), []byte("x"), 0o600); err == nil {
			t.Errorf("%s: was written to", n)
		}
	}
	if err := os.Remove(h.path("inputs/data/labels")); err == nil {
		t.Error("an input was removed")
	}

	// A checkpoint of a folder, as a unit.
	must(t, os.MkdirAll(h.path("checkpoints/epoch-1.tmp/shards"), 0o700))
	weights := pattern(2<<20 + 77)
	must(t, os.WriteFile(h.path("checkpoints/epoch-1.tmp/shards/w0"), weights, 0o600))
	must(t, os.WriteFile(h.path("checkpoints/epoch-1.tmp/meta.json"), []byte("{}"), 0o600))
	must(t, os.Rename(h.path("checkpoints/epoch-1.tmp"), h.path("checkpoints/epoch-1")))
	if es, err := os.ReadDir(h.path("checkpoints")); err != nil || len(es) != 0 {
		t.Errorf("after the commit there is %v, %v", es, err)
	}
	// And of a file.
	must(t, os.WriteFile(h.path("checkpoints/best.npz.tmp"), weights[:100], 0o600))
	must(t, os.Rename(h.path("checkpoints/best.npz.tmp"), h.path("checkpoints/best.npz")))

	evs, err := h.c.Events(ctx, holdapi.Events{WaitMillis: 100})
	must(t, err)
	var kinds []string
	var commits []holdapi.Checkpoint
	for _, e := range evs {
		kinds = append(kinds, e.Kind)
		if e.Checkpoint != nil {
			commits = append(commits, *e.Checkpoint)
		}
	}
	if got := strings.Join(kinds, " "); got != "exec container-start checkpoint checkpoint" {
		t.Errorf("events: %s", got)
	}
	if len(commits) != 2 {
		t.Fatalf("%d commits", len(commits))
	}
	want := []map[string][]byte{{"shards/w0": weights, "meta.json": []byte("{}")}, {"best.npz": weights[:100]}}
	for i, c := range commits {
		must(t, keys.VerifyLabelled(h.hi.SessionKey, receipt.CheckpointLabel, c.Record, c.Signature))
		r, err := receipt.DecodeCheckpointRecord(c.Record)
		must(t, err)
		if r.Sequence != uint64(i+1) || r.Digest != c.Digest || r.Plan != planDigest || r.JobID != jobID || i == 1 && r.Parent != commits[0].Digest {
			t.Errorf("record %+v", r)
		}
		openSealed(t, ckpt, "ckpt", filepath.Join(sink, c.Folder()), c.Digest, want[i])
	}

	st, err := h.c.Finish(ctx)
	must(t, err)
	if !st.Scrubbed || !st.Started || st.TraceLost || st.RegionBytes != 0 || len(st.Checkpoints) != 2 || st.Execs != 1 || st.Dropped != 0 {
		t.Errorf("final status %+v", st)
	}
	if _, err := os.Stat(h.path("inputs")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("inputs after finish: %v", err)
	}
	if err := h.wrapped(data, "grant", "other", "other", leaser.LeaseTerms(60)); err == nil {
		t.Error("a key was taken after finish")
	}
	if _, err := h.c.SignRelease(ctx, []byte("{}")); code(err) != holdapi.CodeState {
		t.Errorf("release request after finish: %v", err)
	}
	if _, err := h.c.Sign(ctx, statementOf(t, "another-job")); code(err) != holdapi.CodeRefused {
		t.Errorf("a statement of another job: %v", err)
	}
	statement := statementOf(t, h.hi.JobID)
	sig, err := h.c.Sign(ctx, statement)
	must(t, err)
	must(t, keys.VerifyLabelled(h.hi.SessionKey, keys.LabelStatement, statement, sig))
	must(t, h.c.Exit(ctx))
	must(t, h.cmd.Wait())
	if es, err := os.ReadDir(h.run); err != nil || len(es) != 0 {
		t.Errorf("left behind: %v", es)
	}
}

// statementOf is a bundle statement of a job.
func statementOf(t *testing.T, job string) []byte {
	t.Helper()
	b, err := bundle.NewBuilder().Statement(job, plan.Sum(nil), bundle.Outcome{State: bundle.Succeeded, Stage: bundle.StageRun},
		[]bundle.Step{{Stage: bundle.StageRun, StartUnixNano: 1, Nanos: 1, Outcome: bundle.StepDone}})
	must(t, err)
	return b
}

func openSealed(t *testing.T, key *keys.DataKey, asset, dir string, digest plan.Digest, want map[string][]byte) {
	t.Helper()
	root, err := os.OpenRoot(dir)
	must(t, err)
	defer root.Close()
	must(t, seal.Check(t.Context(), root, asset, digest))
	f, err := seal.ReadFolder(root, asset, digest)
	must(t, err)
	es, err := f.Entries(key)
	must(t, err)
	if len(es) != len(want) {
		t.Errorf("%d files, want %d", len(es), len(want))
	}
	for _, e := range es {
		o, err := f.Open(key, e)
		must(t, err)
		got, err := io.ReadAll(io.NewSectionReader(o, 0, o.Size()))
		if err != nil || !bytes.Equal(got, want[e.Name]) {
			t.Errorf("%s: %d bytes, %v", e.Name, len(got), err)
		}
		must(t, o.Close())
	}
}

func TestKilledHolderIsCleanedUp(t *testing.T) {
	h := start(t)
	must(t, h.cmd.Process.Kill())
	_ = h.cmd.Wait()
	if _, err := os.ReadDir(h.path("inputs")); !errors.Is(err, unix.ENOTCONN) {
		t.Errorf("the mount of a dead holder: %v", err)
	}
	if _, err := h.c.Status(t.Context()); !errors.Is(err, holdapi.ErrLost) {
		t.Errorf("a dead holder answers: %v", err)
	}
	must(t, holdapi.Cleanup(h.run))
	must(t, holdapi.Cleanup(h.run))
	if es, err := os.ReadDir(h.run); err != nil || len(es) != 0 {
		t.Errorf("left behind: %v %v", es, err)
	}
}

func TestRefusals(t *testing.T) {
	h := start(t)
	ctx := t.Context()
	key, other := keys.GenerateDataKey(), keys.GenerateDataKey()
	dir, digest := sealed(t, key, "a", map[string][]byte{"f": pattern(100)})
	in := holdapi.Input{Name: "in", Asset: "a", Digest: digest}
	for name, c := range map[string]struct {
		f    func() error
		code string
	}{
		"exit before finish":          {func() error { return h.c.Exit(ctx) }, holdapi.CodeState},
		"another digest":              {func() error { return h.c.Input(ctx, holdapi.Input{Name: "in", Asset: "a", Digest: plan.Sum(nil)}, dir) }, holdapi.CodeRefused},
		"no digest":                   {func() error { return h.c.Input(ctx, holdapi.Input{Name: "in", Asset: "a"}, dir) }, holdapi.CodeRefused},
		"another asset":               {func() error { return h.c.Input(ctx, holdapi.Input{Name: "in", Asset: "b", Digest: digest}, dir) }, holdapi.CodeRefused},
		"an input that leaves":        {func() error { return h.c.Input(ctx, holdapi.Input{Name: "../in", Asset: "a", Digest: digest}, dir) }, holdapi.CodeInvalid},
		"a folder that is not one":    {func() error { return h.c.Input(ctx, in, filepath.Join(dir, seal.ManifestName)) }, ""},
		"a release request that is":   {func() error { _, err := h.c.SignRelease(ctx, []byte(`{"a":1}`)); return err }, holdapi.CodeRefused},
		"a statement before finish":   {func() error { _, err := h.c.Sign(ctx, statementOf(t, h.hi.JobID)); return err }, holdapi.CodeState},
		"a statement that is none":    {func() error { _, err := h.c.Sign(ctx, []byte(`x`)); return err }, holdapi.CodeRefused},
		"a stream that is none":       {func() error { _, err := h.c.Logs(ctx, holdapi.Logs{Stream: "x"}); return err }, holdapi.CodeInvalid},
		"a sink without a bound":      {func() error { return h.c.Sink(ctx, holdapi.Sink{Asset: "a", Plan: planDigest}, dir) }, holdapi.CodeInvalid},
		"a key with other info":       {func() error { return h.wrapped(key, "grant", "a", "b", leaser.LeaseTerms(60)) }, holdapi.CodeRefused},
		"a key that nobody asked for": {func() error { return h.wrapped(key, "grant", "a", "a", leaser.LeaseTerms(60)) }, holdapi.CodeRefused},
		"a key for another asset's data": {func() error {
			info, err := receipt.WrapInfo("grant", planDigest, "a", "result", leaser.LeaseTerms(60))
			must(t, err)
			enc, ct, err := key.Wrap(h.hi.RecipientKey, info, []byte("b"))
			must(t, err)
			return h.c.Deliver(ctx, holdapi.Deliver{Asset: "a", Info: info, Enc: enc, Ciphertext: ct, LeaseKeys: leaser.jwks})
		}, holdapi.CodeRefused},
		"info of no release": {func() error {
			enc, ct, err := key.Wrap(h.hi.RecipientKey, []byte("{}"), []byte("a"))
			must(t, err)
			return h.c.Deliver(ctx, holdapi.Deliver{Asset: "a", Info: []byte("{}"), Enc: enc, Ciphertext: ct})
		}, holdapi.CodeInvalid},
	} {
		if err := c.f(); err == nil || c.code != "" && code(err) != c.code {
			t.Errorf("%s: %v, want code %q", name, err, c.code)
		}
	}
	must(t, h.c.Input(ctx, in, dir))
	must(t, h.c.Input(ctx, in, dir)) // a restarted agent
	if err := h.c.Input(ctx, holdapi.Input{Name: "in", Asset: "a", Digest: digest}, t.TempDir()); err == nil {
		t.Error("another folder for the same input was taken")
	}
	must(t, h.deliver(key, "a"))
	must(t, h.deliver(key, "a"))
	if err := h.deliver(other, "a"); code(err) != holdapi.CodeRefused {
		t.Errorf("a second key for an asset: %v", err)
	}
	if err := os.WriteFile(h.path("checkpoints/x"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("write without a sink: %v", err)
	}
	_, err := h.c.Decrypt(ctx)
	must(t, err)
	_, err = h.c.Decrypt(ctx)
	must(t, err)
	if err := h.c.Input(ctx, holdapi.Input{Name: "late", Asset: "a", Digest: digest}, dir); code(err) != holdapi.CodeState {
		t.Errorf("an input after decryption: %v", err)
	}
}

func TestDamagedInputGivesNothing(t *testing.T) {
	h := start(t)
	ctx := t.Context()
	key := keys.GenerateDataKey()
	dir, digest := sealed(t, key, "a", map[string][]byte{"f": pattern(100), "g": pattern(4 * seal.MinChunkSize)})
	p := filepath.Join(dir, "000001.sealed")
	b, err := os.ReadFile(p)
	must(t, err)
	b[len(b)-1] ^= 1
	must(t, os.WriteFile(p, b, 0o600))
	must(t, h.c.Input(ctx, holdapi.Input{Name: "in", Asset: "a", Digest: digest}, dir))
	must(t, h.deliver(key, "a"))
	_, err = h.c.Decrypt(ctx)
	if code(err) != holdapi.CodeIO || !strings.Contains(err.Error(), "000001") {
		t.Fatalf("decrypt: %v", err)
	}
	if _, again := h.c.Decrypt(ctx); again == nil || again.Error() != err.Error() {
		t.Errorf("a second try: %v", again)
	}
	h.trace().start()
	h.waitStarted()
	if es, err := os.ReadDir(h.path("inputs/in")); err != nil || len(es) != 0 {
		t.Errorf("files of a damaged input: %v %v", es, err)
	}
	st, err := h.c.Finish(ctx)
	if err != nil || !st.Scrubbed {
		t.Errorf("finish: %+v %v", st, err)
	}
}

func TestTrace(t *testing.T) {
	t.Run("lost while the job runs", func(t *testing.T) {
		h := start(t)
		key := keys.GenerateDataKey()
		dir, digest := sealed(t, key, "a", map[string][]byte{"f": pattern(100)})
		must(t, h.c.Input(t.Context(), holdapi.Input{Name: "in", Asset: "a", Digest: digest}, dir))
		must(t, h.deliver(key, "a"))
		_, err := h.c.Decrypt(t.Context())
		must(t, err)
		tr := h.trace()
		tr.start()
		h.waitStarted()
		if _, err := os.ReadFile(h.path("inputs/in/f")); err != nil {
			t.Fatal(err)
		}
		must(t, tr.c.Close())
		h.until("the loss to be seen", func() bool {
			_, err := os.ReadFile(h.path("inputs/in/f"))
			return errors.Is(err, unix.EIO)
		})
		c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: h.path(holdapi.TraceName), Net: "unixpacket"})
		must(t, err)
		defer c.Close()
		if n, err := c.Read(make([]byte, 10)); err == nil && n > 0 {
			t.Error("a second trace was welcomed")
		}
	})
	t.Run("an operator's exec, a connect, garbage", func(t *testing.T) {
		h := start(t)
		tr := h.trace()
		tr.start()
		tr.send(pb.MessageType_MESSAGE_SENTRY_EXEC, &pb.ExecveInfo{BinaryPath: "/bin/sh", ContextData: &pb.ContextData{IsExecSession: true, ProcessName: "sh", ThreadGroupId: 1}})
		tr.send(pb.MessageType_MESSAGE_SYSCALL_CONNECT, &pb.Connect{Address: []byte{2, 0, 0, 80, 10, 1, 2, 3}})
		for _, b := range [][]byte{{1}, {0, 0, 1, 0, 0, 0, 0, 0}, {0xff, 0xff, 1, 0, 0, 0, 0, 0}, {8, 0, 3, 0, 0, 0, 0, 0, 0xff}} {
			_, err := tr.c.Write(b)
			must(t, err)
		}
		tr.send(pb.MessageType_MESSAGE_SYSCALL_PTRACE, &pb.Ptrace{Request: 16})
		var evs []holdapi.Event
		h.until("events", func() bool {
			var err error
			evs, err = h.c.Events(t.Context(), holdapi.Events{})
			must(t, err)
			return len(evs) == 5
		})
		if evs[1].Kind != "operator-exec" || evs[1].Process != "" || evs[2].Kind != "connect" || evs[2].Detail != "10.1.2.3:80" || evs[3].Kind != "trace-lost" || evs[4].Kind != "ptrace" {
			t.Errorf("%+v", evs)
		}
		if st, err := h.c.Status(t.Context()); err != nil || !st.TraceLost || st.Dropped != 4 {
			t.Errorf("%+v, %v", st, err)
		}
	})
}

func TestLogs(t *testing.T) {
	h := start(t)
	ctx := t.Context()
	for _, s := range []string{"stdout", "stderr"} {
		f, err := os.OpenFile(h.path(s), os.O_WRONLY, 0)
		must(t, err)
		_, err = f.Write(bytes.Repeat([]byte(s[3:4]), 700))
		must(t, err)
		must(t, f.Close())
		h.until("the log", func() bool {
			st, err := h.c.Status(ctx)
			must(t, err)
			return st.LogBytes+st.LogCut == map[string]int64{"stdout": 700, "stderr": 1400}[s]
		})
	}
	wait, err := holdapi.Dial(ctx, h.run)
	must(t, err)
	defer wait.Close()
	got := make(chan holdapi.LogChunk)
	go func() {
		c, _ := wait.Logs(ctx, holdapi.Logs{Stream: "stdout", Offset: 700, WaitMillis: 30_000})
		got <- c
	}()
	a, err := h.c.Logs(ctx, holdapi.Logs{Stream: "stdout"})
	if err != nil || len(a.Data) != 700 || a.EOF {
		t.Errorf("%d bytes, %v, %v", len(a.Data), a.EOF, err)
	}
	st, err := h.c.Finish(ctx)
	if err != nil || st.LogBytes != 1000 || st.LogCut != 400 {
		t.Errorf("%+v %v", st, err)
	}
	if c := <-got; !c.EOF || len(c.Data) != 0 {
		t.Errorf("the waiting reader got %+v", c)
	}
	b, err := h.c.Logs(ctx, holdapi.Logs{Stream: "stderr"})
	if err != nil || len(b.Data) != 300 || !b.EOF {
		t.Errorf("%d bytes, %v, %v", len(b.Data), b.EOF, err)
	}
}

func TestCheckpointFiles(t *testing.T) {
	h := start(t)
	h.trace().start()
	ctx := t.Context()
	key := keys.GenerateDataKey()
	sink := t.TempDir()
	must(t, h.deliver(key, "ckpt"))
	must(t, h.c.Sink(ctx, holdapi.Sink{Asset: "ckpt", Plan: planDigest, MaxBytes: 8 << 20}, sink))
	root := h.path("checkpoints")
	p := filepath.Join(root, "f")

	// A mirror on disk says what must come out of random writes, cuts and holes.
	mirror := filepath.Join(t.TempDir(), "f")
	open := func(p string) *os.File {
		f, err := os.OpenFile(p, os.O_RDWR|os.O_CREATE, 0o600)
		must(t, err)
		return f
	}
	a, b := open(p), open(mirror)
	r := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		off, n := r.Int64N(3<<20), r.IntN(200_000)
		switch r.IntN(6) {
		case 0:
			must(t, errors.Join(a.Truncate(off), b.Truncate(off)))
		default:
			w := pattern(n)
			_, err := a.WriteAt(w, off)
			_, err2 := b.WriteAt(w, off)
			must(t, errors.Join(err, err2))
		}
	}
	must(t, errors.Join(a.Sync(), a.Close(), b.Close()))
	want, err := os.ReadFile(mirror)
	must(t, err)
	got, err := os.ReadFile(p)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes differ from %d: %v", len(got), len(want), err)
	}

	if st, err := os.Stat(p); err != nil || st.Sys().(*syscall.Stat_t).Uid != jobUID {
		t.Errorf("%+v %v", st, err)
	}
	must(t, os.Chown(p, 1, 2))
	if err := os.Truncate(p, 9<<20); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("beyond the bound: %v", err)
	}
	if err := os.WriteFile(filepath.Join(root, "big"), make([]byte, 8<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("beyond the bound: %v", err)
	}
	must(t, os.Remove(filepath.Join(root, "big")))
	must(t, os.Remove(p))

	// Names.
	must(t, os.MkdirAll(filepath.Join(root, "d/e"), 0o700))
	must(t, os.WriteFile(filepath.Join(root, "d/e/1"), []byte("1"), 0o600))
	must(t, os.WriteFile(filepath.Join(root, "d/2"), []byte("2"), 0o600))
	must(t, os.Rename(filepath.Join(root, "d/2"), filepath.Join(root, "d/e/1")))
	if b, err := os.ReadFile(filepath.Join(root, "d/e/1")); err != nil || string(b) != "2" {
		t.Errorf("%q %v", b, err)
	}
	if err := os.Remove(filepath.Join(root, "d")); !errors.Is(err, unix.ENOTEMPTY) {
		t.Errorf("%v", err)
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(root, "link")); err == nil {
		t.Error("a symbolic link was made")
	}
	if err := unix.Mkfifo(filepath.Join(root, "fifo"), 0o600); err == nil {
		t.Error("a fifo was made")
	}
	must(t, os.Rename(filepath.Join(root, "d"), filepath.Join(root, "z.tmp")))

	// Commits that fail leave things as they were.
	if err := os.Rename(filepath.Join(root, "z.tmp"), filepath.Join(root, "z")); err != nil {
		t.Fatal(err)
	}
	must(t, os.Mkdir(filepath.Join(root, "none.tmp"), 0o700))
	if err := os.Rename(filepath.Join(root, "none.tmp"), filepath.Join(root, "none")); err == nil {
		t.Error("an empty folder was committed")
	}
	must(t, os.WriteFile(filepath.Join(root, "none.tmp/f"), []byte("x"), 0o600))
	// An open file keeps nothing after the commit.
	f, err := os.OpenFile(filepath.Join(root, "none.tmp/f"), os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	must(t, os.Rename(filepath.Join(root, "none.tmp"), filepath.Join(root, "none")))
	if _, err := f.ReadAt(make([]byte, 1), 0); err == nil {
		t.Error("committed plaintext is still read")
	}
	if _, err := f.Write([]byte("y")); err == nil {
		t.Error("a committed file is still written")
	}
	// The same name again is another commit.
	must(t, os.WriteFile(filepath.Join(root, "z.tmp"), []byte("again"), 0o600))
	must(t, os.Rename(filepath.Join(root, "z.tmp"), filepath.Join(root, "z")))
	es, err := os.ReadDir(sink)
	must(t, err)
	var names []string
	for _, e := range es {
		names = append(names, e.Name())
	}
	if got := strings.Join(names, " "); got != "000001-z 000002-none 000003-z" {
		t.Errorf("sink holds %s", got)
	}
	st, err := h.c.Status(ctx)
	must(t, err)
	if st.RegionBytes != 0 {
		t.Errorf("%d bytes are held after everything was committed", st.RegionBytes)
	}
}

func TestFullSink(t *testing.T) {
	h := start(t)
	h.trace().start()
	ctx := t.Context()
	key := keys.GenerateDataKey()
	sink := t.TempDir()
	must(t, unix.Mount("tmpfs", sink, "tmpfs", 0, "size=2m"))
	t.Cleanup(func() { _ = unix.Unmount(sink, unix.MNT_DETACH) })
	must(t, h.deliver(key, "ckpt"))
	must(t, h.c.Sink(ctx, holdapi.Sink{Asset: "ckpt", Plan: planDigest, MaxBytes: 8 << 20}, sink))
	root := h.path("checkpoints")
	commit := func(name string, n int) error {
		must(t, os.WriteFile(filepath.Join(root, name+".tmp"), pattern(n), 0o600))
		return os.Rename(filepath.Join(root, name+".tmp"), filepath.Join(root, name))
	}
	must(t, commit("first", 500_000))
	if err := commit("second", 3<<20); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("commit to a full disk: %v", err)
	}
	es, err := os.ReadDir(sink)
	if err != nil || len(es) != 1 {
		t.Errorf("sink holds %v, %v", es, err)
	}
	// What was not sealed is still there, and can be made smaller and tried again.
	b, err := os.ReadFile(filepath.Join(root, "second.tmp"))
	if err != nil || !bytes.Equal(b, pattern(3<<20)) {
		t.Errorf("uncommitted file: %d bytes, %v", len(b), err)
	}
	must(t, commit("second", 400_000))
	st, err := h.c.Status(ctx)
	must(t, err)
	if len(st.Checkpoints) != 2 || st.Checkpoints[1].Sequence != 2 || st.Checkpoints[1].Parent != st.Checkpoints[0].Digest {
		t.Fatalf("%+v", st.Checkpoints)
	}
	openSealed(t, key, "ckpt", filepath.Join(sink, st.Checkpoints[0].Folder()), st.Checkpoints[0].Digest, map[string][]byte{"first": pattern(500_000)})
	openSealed(t, key, "ckpt", filepath.Join(sink, st.Checkpoints[1].Folder()), st.Checkpoints[1].Digest, map[string][]byte{"second": pattern(400_000)})
	evs, err := h.c.Events(ctx, holdapi.Events{})
	must(t, err)
	if len(evs) != 4 || evs[2].Kind != "checkpoint-error" || !strings.Contains(evs[2].Detail, "no space") {
		t.Errorf("%+v", evs)
	}
}

// A job with more commits than a status shows.
func TestManyCheckpoints(t *testing.T) {
	h := start(t)
	h.trace().start()
	ctx := t.Context()
	must(t, h.deliver(keys.GenerateDataKey(), "ckpt"))
	must(t, h.c.Sink(ctx, holdapi.Sink{Asset: "ckpt", Plan: planDigest, MaxBytes: 1 << 20}, t.TempDir()))
	const n = 130
	name := h.path("checkpoints", strings.Repeat("n", 128))
	for range n {
		must(t, os.WriteFile(name+".tmp", []byte("x"), 0o600))
		must(t, os.Rename(name+".tmp", name))
	}
	st, err := h.c.Finish(ctx)
	must(t, err)
	all, err := h.c.Checkpoints(ctx)
	must(t, err)
	if len(st.Checkpoints) != 100 || st.Checkpoints[99].Sequence != n || len(all) != n {
		t.Fatalf("status has %d, all are %d", len(st.Checkpoints), len(all))
	}
	parent := plan.Digest("")
	for i, c := range all {
		if c.Sequence != uint64(i+1) || c.Parent != parent {
			t.Fatalf("commit %d: %+v", i, c)
		}
		parent = c.Digest
	}
}

// What is written before the container is seen to start is not the job's.
func TestCheckpointBeforeTheStart(t *testing.T) {
	h := start(t)
	must(t, h.deliver(keys.GenerateDataKey(), "ckpt"))
	must(t, h.c.Sink(t.Context(), holdapi.Sink{Asset: "ckpt", Plan: planDigest, MaxBytes: 1 << 20}, t.TempDir()))
	must(t, os.WriteFile(h.path("checkpoints/x.tmp"), []byte("x"), 0o600))
	renamed := make(chan error)
	go func() { renamed <- os.Rename(h.path("checkpoints/x.tmp"), h.path("checkpoints/x")) }()
	time.Sleep(200 * time.Millisecond)
	st, err := h.c.Finish(t.Context())
	if err != nil || len(st.Checkpoints) != 0 {
		t.Errorf("%+v %v", st.Checkpoints, err)
	}
	if err := <-renamed; err == nil {
		t.Error("committed before the start")
	}
}

// A key released for one plan seals no checkpoint of another.
func TestCheckpointOfAnotherPlan(t *testing.T) {
	h := start(t)
	h.trace().start()
	must(t, h.deliver(keys.GenerateDataKey(), "ckpt"))
	must(t, h.c.Sink(t.Context(), holdapi.Sink{Asset: "ckpt", Plan: plan.Sum([]byte("other")), MaxBytes: 8 << 20}, t.TempDir()))
	must(t, os.WriteFile(h.path("checkpoints/x.tmp"), []byte("x"), 0o600))
	if err := os.Rename(h.path("checkpoints/x.tmp"), h.path("checkpoints/x")); !errors.Is(err, unix.EIO) {
		t.Errorf("%v", err)
	}
}

// A job that still has an input open when it is over keeps zeros.
func TestFinishUnderAReader(t *testing.T) {
	h := start(t)
	ctx := t.Context()
	key := keys.GenerateDataKey()
	want := pattern(3 << 20)
	dir, digest := sealed(t, key, "a", map[string][]byte{"f": want})
	must(t, h.c.Input(ctx, holdapi.Input{Name: "in", Asset: "a", Digest: digest}, dir))
	must(t, h.deliver(key, "a"))
	_, err := h.c.Decrypt(ctx)
	must(t, err)
	h.trace().start()
	h.waitStarted()
	f, err := os.Open(h.path("inputs/in/f"))
	must(t, err)
	defer f.Close()
	m, err := unix.Mmap(int(f.Fd()), 0, len(want), unix.PROT_READ, unix.MAP_SHARED)
	must(t, err)
	defer func() { _ = unix.Munmap(m) }()
	if !bytes.Equal(m, want) {
		t.Error("the map differs")
	}
	st, err := h.c.Finish(ctx)
	if err != nil || !st.Scrubbed {
		t.Errorf("%+v %v", st, err)
	}
	if !bytes.Equal(m, make([]byte, len(want))) {
		t.Error("the map still shows plaintext")
	}
	b := make([]byte, 100)
	if n, err := f.ReadAt(b, 0); err == nil && !bytes.Equal(b[:n], make([]byte, n)) {
		t.Error("the descriptor still reads plaintext")
	}
	if _, err := os.ReadDir(h.path("inputs")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("inputs after finish: %v", err)
	}
}

func TestTerminated(t *testing.T) {
	h := start(t)
	second := exec.Command(holderBinary(t), "--run", h.run, "--job", "job-2", "--uid", "1", "--gid", "1", "--log-bytes", "1", "--cores", "1")
	if out, err := second.CombinedOutput(); err == nil {
		t.Errorf("a second holder started in the same folder: %s", out)
	}
	if hi, err := h.c.Hello(t.Context()); err != nil || hi.JobID != jobID {
		t.Errorf("the first holder suffered: %+v %v", hi, err)
	}
	must(t, h.cmd.Process.Signal(syscall.SIGTERM))
	must(t, h.cmd.Wait())
	if es, err := os.ReadDir(h.run); err != nil || len(es) != 0 {
		t.Errorf("left behind: %v %v", es, err)
	}
}

func TestFlags(t *testing.T) {
	dir := t.TempDir()
	good := []string{"--run", dir, "--job", "j", "--uid", "1", "--gid", "1", "--log-bytes", "1", "--cores", "1"}
	for name, args := range map[string][]string{
		"none":               nil,
		"root as the job":    append(slices.Clone(good), "--uid", "0"),
		"an argument":        append(slices.Clone(good), "x"),
		"no log":             append(slices.Clone(good), "--log-bytes", "0"),
		"no cores":           append(slices.Clone(good), "--cores", "0"),
		"negative memory":    append(slices.Clone(good), "--region-bytes", "-1"),
		"an unknown flag":    append(slices.Clone(good), "--x"),
		"a folder for all":   good,
		"a folder not there": append(slices.Clone(good), "--run", dir+"/x"),
	} {
		c := exec.Command(holderBinary(t), args...)
		var out, log bytes.Buffer
		c.Stdout, c.Stderr = &out, &log
		if err := c.Run(); err == nil {
			t.Errorf("%s: started", name)
		}
		if out.Len() > 0 || !strings.Contains(log.String(), `"holder ended"`) {
			t.Errorf("%s: said %q and %q", name, out.String(), log.String())
		}
	}
}

func code(err error) string {
	var e *holdapi.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
