package e2e

import (
	"bytes"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
)

// TestInputsFromS3 trains from sealed folders that lie in an S3 store alone. The
// agent fetches them once; a store that changes a bit gets no job going.
func TestInputsFromS3(t *testing.T) {
	n := need(t)
	backend := s3mem.New()
	if err := backend.CreateBucket("sealed"); err != nil {
		t.Fatal(err)
	}
	put := func(object string, b []byte) {
		t.Helper()
		if _, err := backend.PutObject("sealed", object, nil, bytes.NewReader(b), int64(len(b)), nil); err != nil {
			t.Fatal(err)
		}
	}
	for prefix, dir := range map[string]string{"v1/data": n.data, "v1/model": n.model, "bad/model": n.model} {
		files, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			b, err := os.ReadFile(filepath.Join(dir, f.Name()))
			if err != nil {
				t.Fatal(err)
			}
			if prefix == "bad/model" && f.Name() == "000000.sealed" {
				b[len(b)/2] ^= 1
			}
			put(prefix+"/"+f.Name(), b)
		}
	}
	var requests atomic.Int64
	s3 := gofakes3.New(backend).Server()
	store := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		s3.ServeHTTP(w, r)
	}))
	t.Cleanup(store.Close)
	dir := t.TempDir()
	write := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	cache := filepath.Join(n.dir, "cache")
	if err := os.Mkdir(cache, 0o700); err != nil {
		t.Fatal(err)
	}
	n.configureAgent(t, map[string]any{
		"cacheDir": cache, "cacheBytes": 1 << 30,
		"buckets": []any{map[string]any{
			"uri": "s3://sealed", "endpoint": store.URL, "pathStyle": true,
			"caFile":          write("ca.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: store.Certificate().Raw}))),
			"credentialsFile": write("credentials", "[default]\naws_access_key_id = AKID\naws_secret_access_key = none\n"),
		}},
	})

	job := func(name, model string) string {
		file := n.jobFile(t, name, func(s string) string {
			return strings.NewReplacer("file://"+n.data+"\n", "s3://sealed/v1/data\n", "file://"+n.model+"\n", model+"\n", "maxDuration: 30m", "maxDuration: 10m").Replace(s)
		})
		n.grant(t, n.planDigest(t, file), 1)
		return file
	}
	run := func(name, model string) status { return n.wait(t, n.submit(t, job(name, model)), "ended", ended) }

	s := run("s3-bad", "s3://sealed/bad/model")
	if s.State != "failed" || s.Stage != "sandbox" || !strings.Contains(s.Message, "the source is damaged or lies") {
		t.Errorf("from a store that changed a bit: %+v", s)
	}
	if s := run("s3-other", "s3://elsewhere/v1/model"); s.State != "failed" || !strings.Contains(s.Message, "lists no source s3://elsewhere") {
		t.Errorf("from a bucket that is not configured: %+v", s)
	}
	if s := run("s3", "s3://sealed/v1/model"); s.State != "succeeded" {
		t.Fatalf("from S3: %+v", s)
	}
	before := requests.Load()
	if s := run("s3-again", "s3://sealed/v1/model"); s.State != "succeeded" {
		t.Fatalf("from the cache: %+v", s)
	}
	if after := requests.Load(); before == 0 || after != before {
		t.Errorf("%d requests for the first jobs, and %d for one whose inputs are there", before, after-before)
	}
	if left, err := os.ReadDir(filepath.Join(cache, "jobs")); err != nil || len(left) != 0 {
		t.Errorf("jobs that ended still hold folders: %v, %v", left, err)
	}
}

// configureAgent gives the agent sources until the test ends.
func (n *node) configureAgent(t *testing.T, sources map[string]any) {
	t.Helper()
	n.withConfig(t, "cofferd", func(config map[string]any) { config["sources"] = sources })
}
