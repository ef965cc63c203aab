package e2e

import (
	"bytes"
	"encoding/pem"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"

	"github.com/coffer-run/coffer/runner/source/sink"
)

// ckptStore is an S3 store, served by the tests' process.
type ckptStore struct {
	gofakes3.Backend
	t *testing.T
}

// names are the objects below a prefix.
func (s ckptStore) names(prefix string) []string {
	s.t.Helper()
	p := gofakes3.NewFolderPrefix(prefix)
	p.HasDelimiter, p.Delimiter = false, ""
	l, err := s.ListBucket("ckpt", &p, gofakes3.ListBucketPage{})
	if err != nil {
		s.t.Fatal(err)
	}
	var out []string
	for _, o := range l.Contents {
		out = append(out, o.Key)
	}
	return out
}

// newest is the highest number of a job's checkpoints that have a file.
func (s ckptStore) newest(job, file string) (newest uint64) {
	s.t.Helper()
	for _, name := range s.names("run/" + job + "/") {
		if at, ok := sink.Sequence(filepath.Base(filepath.Dir(name))); ok && filepath.Base(name) == file {
			newest = max(newest, at)
		}
	}
	return newest
}

// fetch copies a job's folder.
func (s ckptStore) fetch(job, dir string) {
	s.t.Helper()
	for _, name := range s.names("run/" + job + "/") {
		o, err := s.GetObject("ckpt", name, nil)
		if err != nil {
			s.t.Fatal(err)
		}
		b, err := io.ReadAll(o.Contents)
		if err != nil {
			s.t.Fatal(err)
		}
		to := filepath.Join(dir, strings.TrimPrefix(name, "run/"+job))
		if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
			s.t.Fatal(err)
		}
		if err := os.WriteFile(to, b, 0o600); err != nil {
			s.t.Fatal(err)
		}
	}
}

// TestCheckpointsInS3 has checkpoints go to a bucket, kills the agent half-way through
// an upload and later the container, and goes on from the bucket: to the weights of a
// run that nobody killed.
func TestCheckpointsInS3(t *testing.T) {
	n := need(t)
	store := ckptStore{s3mem.New(), t}
	if err := store.CreateBucket("ckpt"); err != nil {
		t.Fatal(err)
	}
	var victim atomic.Int64 // the agent that the next upload of a second checkpoint kills
	s3 := gofakes3.New(store).Server()
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/000002-") && strings.HasSuffix(r.URL.Path, ".sealed") && r.Method != http.MethodGet {
			if pid := victim.Swap(0); pid != 0 {
				_, _ = io.CopyN(io.Discard, r.Body, r.ContentLength/2)
				_ = syscall.Kill(int(pid), syscall.SIGKILL)
				panic(http.ErrAbortHandler)
			}
		}
		s3.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	dir := t.TempDir()
	secret, ca := filepath.Join(dir, "credentials"), filepath.Join(dir, "ca.pem")
	for path, b := range map[string][]byte{
		secret: []byte("[default]\naws_access_key_id = AKID\naws_secret_access_key = none\n"),
		ca:     pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}),
	} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cache := filepath.Join(n.dir, "cache-of-checkpoints")
	if err := os.Mkdir(cache, 0o700); err != nil {
		t.Fatal(err)
	}
	n.configureAgent(t, map[string]any{
		"cacheDir": cache, "cacheBytes": 1 << 30,
		"buckets": []any{map[string]any{"uri": "s3://ckpt", "endpoint": server.URL, "pathStyle": true, "caFile": ca, "credentialsFile": secret, "checkpoints": true}},
	})

	whole := n.submit(t, n.resumeJob(t, "bucket-never-killed", nil))
	job := n.resumeJob(t, "bucket-killed", func(s string) string {
		return strings.NewReplacer("file://"+n.sink+"\n", "s3://ckpt/run\n", `EVERY: "10"`, "EVERY: \"10\"\n  PAUSE: \"0.2\"").Replace(s)
	})
	if s := n.wait(t, whole, "ended", ended); s.State != "succeeded" {
		t.Fatalf("%+v\n%s", s, n.output(t, whole))
	}
	want := weightsLine.FindStringSubmatch(n.output(t, whole))

	agent := n.pid(t, "cofferd")
	victim.Store(int64(agent))
	first := n.submit(t, job)
	for deadline := time.Now().Add(time.Minute); victim.Load() != 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no second checkpoint: %q", store.names("run/"))
		}
	}
	if at := store.newest(first, "manifest.json"); at != 1 {
		t.Errorf("half-way through the second upload the newest whole checkpoint is %d", at)
	}
	n.must(t, "restart")
	for deadline := time.Now().Add(time.Minute); store.newest(first, "anchor.jwt") < 3; time.Sleep(10 * time.Millisecond) {
		if s := n.status(t, first); ended(s) || time.Now().After(deadline) {
			t.Fatalf("no third checkpoint in the bucket: %+v\n%q", s, store.names("run/"))
		}
	}
	for _, pid := range sandboxPids(t, first) {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	if s := n.wait(t, first, "ended", ended); s.State == "succeeded" {
		t.Fatalf("killed too late: %+v", s)
	}
	last := store.newest(first, "anchor.jwt")

	second := n.submit(t, job)
	if s := n.wait(t, second, "ended", ended); s.State != "succeeded" {
		t.Fatalf("%+v\n%s", s, n.output(t, second))
	}
	if at := n.resumedFrom(t, second); at != int(last)*10 {
		t.Errorf("it began after step %d, want %d", at, last*10)
	}
	if got := weightsLine.FindStringSubmatch(n.output(t, second)); want == nil || got == nil || got[1] != want[1] {
		t.Errorf("it ended with %v, want %v", got, want)
	}
	n.resumedBundle(t, second)
	line := filepath.Join(t.TempDir(), "line")
	store.fetch(first, line)
	if out := n.must(t, "checkpoints", "verify", line); !strings.Contains(out, "whole") || strings.Contains(out, "  no  ") {
		t.Errorf("%s", out)
	}
	if ls := n.must(t, "checkpoints", "ls", second); !strings.Contains(ls, "yes") || strings.Contains(ls, " no ") {
		t.Errorf("%s", ls)
	}
	// Three and the best are kept, with the record of every one, and nothing on the node.
	manifests, records := 0, 0
	for _, name := range store.names("run/" + first + "/") {
		if strings.HasSuffix(name, "/manifest.json") {
			manifests++
		}
		if strings.HasSuffix(name, "/record.json") {
			records++
		}
	}
	if manifests == 0 || manifests > 4 || records < int(last) {
		t.Errorf("%d manifests and %d records of %d checkpoints", manifests, records, last)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		left, err := filepath.Glob(filepath.Join(cache, "checkpoints", "*"))
		if err == nil && len(left) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("on the node there is still %q", left)
		}
	}
	// A store that changes a bit of what it has gets no job going.
	for _, name := range store.names("run/" + second + "/") {
		if filepath.Base(name) != "000000.sealed" {
			continue
		}
		o, err := store.GetObject("ckpt", name, nil)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(o.Contents)
		if err != nil {
			t.Fatal(err)
		}
		b[len(b)/2] ^= 1
		if _, err := store.PutObject("ckpt", name, map[string]string{}, bytes.NewReader(b), int64(len(b)), nil); err != nil {
			t.Fatal(err)
		}
	}
	if s := n.wait(t, n.submit(t, job), "ended", ended); s.State != "failed" || s.Stage != "decrypt" || !strings.Contains(s.Message, "the source is damaged or lies") {
		t.Errorf("from a bucket that changed a bit: %+v", s)
	}
}
