package object

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/enclave/seal"
	"github.com/coffer-run/coffer/runner/source"
	"github.com/coffer-run/coffer/runner/source/cache"
	"github.com/coffer-run/coffer/runner/source/sink"
)

const sinkURI = "s3://ckpt/team/run"

// s3World is a store that takes checkpoints, and a node that has them to send.
type s3World struct {
	t       *testing.T
	config  Config
	dir     string // the node's folder for the cache and for what is to be sent
	session *keys.Session
	key     *keys.DataKey
	backend gofakes3.Backend

	mu      sync.Mutex
	objects []string // those that were put, in order
}

func newS3World(t *testing.T, wrap func(http.Handler) http.Handler) *s3World {
	t.Helper()
	for _, v := range []string{"AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"} {
		t.Setenv(v, "")
	}
	w := &s3World{t: t, dir: t.TempDir(), backend: s3mem.New()}
	must(t, w.backend.CreateBucket("ckpt"))
	var err error
	w.session, err = keys.GenerateSession()
	must(t, err)
	w.key, err = keys.NewDataKey(bytes.Repeat([]byte{7}, keys.DataKeySize))
	must(t, err)
	must(t, os.Mkdir(filepath.Join(w.dir, "checkpoints"), 0o700))
	var h http.Handler = gofakes3.New(w.backend).Server()
	if wrap != nil {
		h = wrap(h)
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		h.ServeHTTP(rw, r)
		if r.Method == http.MethodPut || r.Method == http.MethodPost && r.URL.Query().Has("uploadId") {
			w.mu.Lock()
			w.objects = append(w.objects, strings.TrimPrefix(r.URL.Path, "/ckpt/team/run/"))
			w.mu.Unlock()
		}
	}))
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError) // connections are cut here
	s.StartTLS()
	t.Cleanup(s.Close)
	ca := write(t, "ca.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})), 0o644)
	w.config = Config{URI: "s3://ckpt", Endpoint: s.URL, CAFile: ca, PathStyle: true, CredentialsFile: write(t, "credentials", s3Secret, 0o600), Checkpoints: true}
	return w
}

// sinks are those of an agent that begins.
func (w *s3World) sinks() *sink.Buckets {
	w.t.Helper()
	b, err := New([]Config{w.config})
	must(w.t, err)
	b.pause = time.Millisecond
	k, err := cache.Open(cache.Config{Dir: w.dir, MaxBytes: 1 << 30, Open: b.Open, Log: slog.New(slog.DiscardHandler)})
	must(w.t, err)
	w.t.Cleanup(func() { _ = k.Close() })
	s, err := sink.OpenBuckets(sink.BucketConfig{Dir: filepath.Join(w.dir, "checkpoints"), Open: b.OpenSink, Fetch: k.Hold, Log: slog.New(slog.DiscardHandler)})
	must(w.t, err)
	w.t.Cleanup(func() { must(w.t, s.Close()) })
	return s
}

// commit seals a checkpoint as a job's holder does.
func (w *s3World) commit(dir, job string, sequence uint64, parent plan.Digest, sizes ...int) (folder string, digest plan.Digest) {
	w.t.Helper()
	root, err := os.OpenRoot(dir)
	must(w.t, err)
	defer root.Close()
	var files []seal.Source
	for i, n := range sizes {
		b := make([]byte, n)
		_, _ = rand.Read(b)
		files = append(files, seal.Source{Name: fmt.Sprint(i), Size: int64(n), Open: func() (seal.Reader, error) { return plainFile{bytes.NewReader(b)}, nil }})
	}
	folder = fmt.Sprintf("%06d-step", sequence)
	c, err := seal.SealCheckpoint(w.t.Context(), w.key, w.session, files, root, seal.Commit{
		JobID: job, Plan: plan.Sum([]byte("plan")), Asset: "llama", Sequence: sequence, Parent: parent, Name: "step", Folder: folder,
	}, time.Now, seal.Options{ChunkSize: 64 << 10})
	must(w.t, err)
	return folder, c.Record.Digest
}

// names are the objects of a checkpoint in the bucket.
func (w *s3World) names(job, folder string) []string {
	w.t.Helper()
	prefix := gofakes3.NewFolderPrefix("team/run/" + job + "/" + folder + "/")
	l, err := w.backend.ListBucket("ckpt", &prefix, gofakes3.ListBucketPage{})
	must(w.t, err)
	var out []string
	for _, o := range l.Contents {
		out = append(out, filepath.Base(o.Key))
	}
	slices.Sort(out)
	return out
}

// checker says whether the bucket has a checkpoint, and fails if it has half of one.
func (w *s3World) checker(job, folder string, digest plan.Digest) bool {
	w.t.Helper()
	if !slices.Contains(w.names(job, folder), "manifest.json") {
		return false
	}
	dir := w.t.TempDir()
	for _, n := range w.names(job, folder) {
		o, err := w.backend.GetObject("ckpt", "team/run/"+job+"/"+folder+"/"+n, nil)
		must(w.t, err)
		b, err := io.ReadAll(o.Contents)
		must(w.t, err)
		must(w.t, os.WriteFile(filepath.Join(dir, n), b, 0o600))
	}
	w.whole(dir, digest)
	return true
}

func (w *s3World) whole(dir string, digest plan.Digest) {
	w.t.Helper()
	good(w.t, dir, digest)
	if _, r, err := sink.ReadRecord(dir); err != nil || r.Digest != digest {
		w.t.Errorf("record: %v, %s", err, r.Digest)
	}
}

func TestSinkInS3(t *testing.T) {
	w := newS3World(t, nil)
	s := w.sinks()
	dir, err := s.Create(t.Context(), sinkURI, "job-a")
	must(t, err)
	if again, err := s.Create(t.Context(), sinkURI, "job-a"); err != nil || again != dir {
		t.Errorf("a job that begins anew: %s, %v", again, err)
	}
	// The second has a file of several parts.
	one, first := w.commit(dir, "job-a", 1, "", 0, 10, 700_000)
	two, second := w.commit(dir, "job-a", 2, first, 9<<20, 3)
	for _, f := range []string{one, two} {
		if s.Staged("job-a") == 0 {
			t.Error("nothing is to be sent")
		}
		must(t, s.Upload(t.Context(), "job-a", f))
		must(t, s.Upload(t.Context(), "job-a", f))
		must(t, s.SendAnchor(t.Context(), "job-a", f))
		must(t, sink.WriteAnchor(filepath.Join(dir, f), "token-"+f))
		must(t, s.SendAnchor(t.Context(), "job-a", f))
	}
	if n := s.Staged("job-a"); n != 0 {
		t.Errorf("%d bytes are still to be sent", n)
	}
	if !w.checker("job-a", one, first) || !w.checker("job-a", two, second) {
		t.Error("a checkpoint is not in the bucket")
	}
	w.mu.Lock()
	sent := slices.Compact(slices.Clone(w.objects))
	w.mu.Unlock()
	if i, k := slices.Index(sent, "job-a/"+one+"/manifest.json"), slices.Index(sent, "job-a/"+one+"/record.json"); i != 4 || k != 3 {
		t.Errorf("the manifest is not the last: %q", sent)
	}

	if _, err := s.Create(t.Context(), sinkURI, "job-b"); err != nil {
		t.Fatal(err)
	}
	// In the job's own folder others have the number: one has the manifest and damaged
	// chunks, one another manifest, one nothing.
	manifest, err := w.backend.GetObject("ckpt", "team/run/job-a/"+two+"/manifest.json", nil)
	must(t, err)
	right, err := io.ReadAll(manifest.Contents)
	must(t, err)
	put := func(name string, b []byte) {
		_, err := w.backend.PutObject("ckpt", "team/run/job-a/"+name, nil, bytes.NewReader(b), int64(len(b)), nil)
		must(t, err)
	}
	put("000002-a/manifest.json", right)
	for _, f := range []string{"000000.sealed", "000001.sealed"} {
		o, err := w.backend.GetObject("ckpt", "team/run/job-a/"+two+"/"+f, nil)
		must(t, err)
		b, err := io.ReadAll(o.Contents)
		must(t, err)
		b[len(b)-1] ^= 1
		put("000002-a/"+f, b)
	}
	put("000002-b/manifest.json", []byte("{}"))
	put("000002-z/record.json", []byte("{}"))
	taken := 0
	must(t, s.TryNumber(t.Context(), sinkURI, "job-b", "job-a", 2, second, func(from string) error {
		taken++
		w.whole(from, second)
		token, err := sink.ReadAnchor(from)
		if err != nil || token != "token-"+two {
			t.Errorf("countersignature %q, %v", token, err)
		}
		return nil
	}))
	if taken != 1 {
		t.Errorf("%d folders were taken", taken)
	}
	errRefused := errors.New("refused")
	if err := s.TryNumber(t.Context(), sinkURI, "job-b", "job-a", 2, second, func(string) error { return errRefused }); !errors.Is(err, errRefused) || errors.Is(err, sink.ErrNotFound) {
		t.Errorf("what the holder refuses: %v", err)
	}
	// Another one says that it is the first, and has nothing of it.
	record, err := os.ReadFile(filepath.Join(dir, one, "record.json"))
	must(t, err)
	for _, decoy := range []string{"job-0", "job-z"} {
		_, err := w.backend.PutObject("ckpt", "team/run/"+decoy+"/000001-step/record.json", nil, bytes.NewReader(record), int64(len(record)), nil)
		must(t, err)
	}
	tried := 0
	must(t, s.TryDigest(t.Context(), sinkURI, "job-b", first, func(dir string) error {
		tried++
		w.whole(dir, first)
		return nil
	}))
	if tried != 1 {
		t.Errorf("%d folders were tried", tried)
	}

	must(t, s.Trim(t.Context(), "job-a", one))
	if got := w.names("job-a", one); !slices.Equal(got, []string{"anchor.jwt", "record.json"}) {
		t.Errorf("trimmed: %q", got)
	}
	if !w.checker("job-a", two, second) {
		t.Error("the newest was trimmed")
	}

	// Whoever has the bucket can take things away and put others in their place.
	for name, row := range map[string]struct {
		sequence uint64
		digest   plan.Digest
		want     error
	}{
		"no such number": {3, second, sink.ErrNotFound},
		"trimmed":        {1, plan.Sum([]byte("not in the cache")), cache.ErrPermanent},
		"another checkpoint in the newest's place": {2, plan.Sum([]byte("newest")), nil},
	} {
		err := s.TryNumber(t.Context(), sinkURI, "job-b", "job-a", row.sequence, row.digest, func(dir string) error {
			t.Errorf("%s: %s", name, dir)
			return nil
		})
		if err == nil || row.want != nil && !errors.Is(err, row.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := s.TryDigest(t.Context(), sinkURI, "job-b", plan.Sum([]byte("x")), func(string) error { return nil }); !errors.Is(err, sink.ErrNotFound) {
		t.Errorf("a digest that nobody made: %v", err)
	}
	if _, err := s.Create(t.Context(), sinkURI, "job-a"); err == nil {
		t.Error("a sink with checkpoints is taken")
	}
	if err := s.TryNumber(t.Context(), sinkURI, "job-b", "../job-a", 2, second, func(string) error { return nil }); err == nil {
		t.Error("a job's name leads elsewhere")
	}
}

func TestSinksThatTheNodeHasNot(t *testing.T) {
	w := newS3World(t, nil)
	w.config.Checkpoints = false
	if _, err := w.sinks().Create(t.Context(), sinkURI, "job"); err == nil || !strings.Contains(err.Error(), "no checkpoints in s3://ckpt") {
		t.Errorf("a bucket for inputs alone: %v", err)
	}
	w = newS3World(t, func(http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) })
	})
	s := w.sinks()
	if _, err := s.Create(t.Context(), "s3://other/run", "job"); err == nil || !strings.Contains(err.Error(), "lists no source s3://other") {
		t.Errorf("a bucket that is not configured: %v", err)
	}
	if _, err := s.Create(t.Context(), sinkURI, "job"); !errors.Is(err, cache.ErrPermanent) {
		t.Errorf("a refusal: %v", err)
	}
	if _, err := s.Create(t.Context(), "s3://ckpt/"+strings.Repeat("x", source.MaxSinkPrefix+1), "job"); err == nil {
		t.Error("a prefix that leaves no room is taken")
	}
	for _, job := range []string{"", "..", "a/b"} {
		if dir, err := s.Create(t.Context(), sinkURI, job); err == nil {
			t.Errorf("job %q leads to %s", job, dir)
		}
	}
}

// proxy passes on as many bytes to a store as allowance has, and cuts every
// connection when they are used up.
type proxy struct {
	to        string
	allowance atomic.Int64
	cuts      atomic.Int64
}

// start makes the world reach its store through p.
func (p *proxy) start(t *testing.T, w *s3World) {
	t.Helper()
	u, err := url.Parse(w.config.Endpoint)
	must(t, err)
	p.to = u.Host
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go p.pass(t.Context(), c)
		}
	}()
	w.config.Endpoint = "https://" + l.Addr().String()
}

func (p *proxy) pass(ctx context.Context, c net.Conn) {
	defer c.Close()
	s, err := (&net.Dialer{}).DialContext(ctx, "tcp", p.to)
	if err != nil {
		return
	}
	defer s.Close()
	go func() { _, _ = io.Copy(c, s); _ = c.Close() }()
	buf := make([]byte, 16<<10)
	for {
		n, err := c.Read(buf)
		if p.allowance.Add(-int64(n)) < 0 {
			p.cuts.Add(1)
			return
		}
		if _, werr := s.Write(buf[:n]); err != nil || werr != nil {
			return
		}
	}
}

// TestUploadCutOff: the network goes after so many bytes, for good, until an
// attempt has failed. At every point the checkpoint before is whole, this one is
// whole or is none, and the upload goes on where whole files are.
func TestUploadCutOff(t *testing.T) {
	w := newS3World(t, nil)
	p := &proxy{}
	p.allowance.Store(1 << 40)
	p.start(t, w)
	s := w.sinks()
	dir, err := s.Create(t.Context(), sinkURI, "job")
	must(t, err)
	one, first := w.commit(dir, "job", 1, "", 1000)
	must(t, s.Upload(t.Context(), "job", one))
	two, second := w.commit(dir, "job", 2, first, 9<<20, 300_000, 100_000)
	failed := 0
	for n := int64(20_000); ; n *= 3 {
		p.allowance.Store(n)
		err := s.Upload(t.Context(), "job", two)
		p.allowance.Store(1 << 40)
		if !w.checker("job", one, first) {
			t.Fatalf("after %d bytes the previous checkpoint is gone", n)
		}
		if there := w.checker("job", two, second); there && err != nil || !there && err == nil {
			t.Fatalf("after %d bytes: %v, and the checkpoint is there: %t", n, err, there)
		}
		if err == nil {
			break
		}
		failed++
	}
	if failed < 3 || p.cuts.Load() == 0 {
		t.Errorf("%d attempts failed, %d connections were cut", failed, p.cuts.Load())
	}
}

// TestPartsAreSentAgain: connections are cut, and the next one works. The attempt is
// one, and no part that came is sent anew.
func TestPartsAreSentAgain(t *testing.T) {
	var puts, cut atomic.Int64
	w := newS3World(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPut && r.URL.Query().Has("partNumber") {
				if puts.Add(1)%2 == 1 && cut.Add(1) < 3 {
					_, _ = io.CopyN(io.Discard, r.Body, 1<<20)
					panic(http.ErrAbortHandler)
				}
			}
			h.ServeHTTP(rw, r)
		})
	})
	s := w.sinks()
	dir, err := s.Create(t.Context(), sinkURI, "job")
	must(t, err)
	one, first := w.commit(dir, "job", 1, "", 17<<20)
	must(t, s.Upload(t.Context(), "job", one))
	if !w.checker("job", one, first) {
		t.Error("it is not there")
	}
	// Three parts, two of which were cut off.
	if puts.Load() != 5 {
		t.Errorf("%d parts were sent, want 5", puts.Load())
	}
}

// killedDir is in the environment of the process that TestUploadKilled kills.
const killedDir = "COFFER_TEST_KILLED_DIR"

// TestUploadKilled ends an agent with SIGKILL at each of its requests, half-way
// through the body where there is one. The next agent, which has never heard of the job,
// finishes what is left.
func TestUploadKilled(t *testing.T) {
	if os.Getenv(killedDir) != "" {
		uploadAndDie(t)
		return
	}
	exe, err := os.Executable()
	must(t, err)
	killed := 0
	for at := int64(1); ; at++ {
		var requests atomic.Int64
		var child atomic.Pointer[os.Process]
		w := newS3World(t, func(h http.Handler) http.Handler {
			return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
				if p := child.Load(); p != nil && requests.Add(1) == at {
					_, _ = io.CopyN(io.Discard, r.Body, max(1, r.ContentLength/2))
					_ = p.Kill()
					panic(http.ErrAbortHandler)
				}
				h.ServeHTTP(rw, r)
			})
		})
		s := w.sinks()
		dir, err := s.Create(t.Context(), sinkURI, "job")
		must(t, err)
		one, first := w.commit(dir, "job", 1, "", 1000)
		must(t, s.Upload(t.Context(), "job", one))
		two, second := w.commit(dir, "job", 2, first, 700_000, 5)
		must(t, sink.WriteAnchor(filepath.Join(dir, two), "token"))

		c := exec.CommandContext(t.Context(), exe, "-test.run=^TestUploadKilled$")
		c.Env = append(os.Environ(), killedDir+"="+w.dir, "ENDPOINT="+w.config.Endpoint, "CA="+w.config.CAFile, "CREDENTIALS="+w.config.CredentialsFile)
		gate, err := c.StdinPipe()
		must(t, err)
		must(t, c.Start())
		child.Store(c.Process)
		must(t, gate.Close())
		died := c.Wait() != nil
		child.Store(nil)
		if died {
			killed++
		}
		if !w.checker("job", one, first) {
			t.Fatalf("killed at request %d: the previous checkpoint is gone", at)
		}
		if there := w.checker("job", two, second); !there && !died {
			t.Fatalf("the process was not killed and sent nothing: %d requests", requests.Load())
		}
		must(t, s.Keep(map[string]bool{}))
		for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
			if l, err := os.ReadDir(filepath.Join(w.dir, "checkpoints")); err == nil && len(l) == 0 {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("killed at request %d: the next agent leaves it", at)
			}
		}
		if !w.checker("job", one, first) || !w.checker("job", two, second) || !slices.Contains(w.names("job", two), "anchor.jwt") {
			t.Errorf("killed at request %d: not all of it is in the bucket: %q", at, w.names("job", two))
		}
		if !died {
			break
		}
	}
	// A listing, two sealed files, record, manifest, countersignature.
	if killed != 6 {
		t.Errorf("killed at %d requests, want 6", killed)
	}
}

// uploadAndDie is the process that is killed.
func uploadAndDie(t *testing.T) {
	_, _ = io.Copy(io.Discard, os.Stdin) // until it may be killed
	b, err := New([]Config{{URI: "s3://ckpt", Endpoint: os.Getenv("ENDPOINT"), CAFile: os.Getenv("CA"), PathStyle: true, CredentialsFile: os.Getenv("CREDENTIALS"), Checkpoints: true}})
	must(t, err)
	s, err := sink.OpenBuckets(sink.BucketConfig{
		Dir: filepath.Join(os.Getenv(killedDir), "checkpoints"), Open: b.OpenSink, Log: slog.New(slog.DiscardHandler),
		Fetch: func(context.Context, string, source.Location, plan.Digest) (string, error) {
			return "", errors.ErrUnsupported
		},
	})
	must(t, err)
	must(t, s.Upload(t.Context(), "job", "000002-step"))
	must(t, s.SendAnchor(t.Context(), "job", "000002-step"))
}
