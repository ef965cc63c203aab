package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/internal/daemon"
)

var fence = regexp.MustCompile("(?ms)^```json\n(.*?)^```$")

// documented is the first configuration on a page of docs/.
func documented(t *testing.T, page string) Config {
	t.Helper()
	b, err := os.ReadFile("../../docs/" + page + ".md")
	if err != nil {
		t.Fatal(err)
	}
	m := fence.FindSubmatch(b)
	if m == nil {
		t.Fatalf("docs/%s.md has no configuration", page)
	}
	path := filepath.Join(t.TempDir(), "cofferd.json")
	if err := os.WriteFile(path, m[1], 0o600); err != nil {
		t.Fatal(err)
	}
	var c Config
	if err := daemon.ReadConfig(path, &c); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestDocumentedSources(t *testing.T) {
	c := documented(t, "sources")
	c.Sources.CacheDir = t.TempDir()
	k, err := c.cache(slog.New(slog.DiscardHandler))
	if err != nil || k == nil {
		t.Fatal(err)
	}
	if err := k.Close(); err != nil {
		t.Error(err)
	}
	if k, err := (Config{}).cache(slog.New(slog.DiscardHandler)); k != nil || err != nil {
		t.Errorf("without sources: %v, %v", k, err)
	}
}

func TestRefusedSources(t *testing.T) {
	for name, row := range map[string]struct {
		change func(s *Sources)
		want   string
	}{
		"no folder":         {func(s *Sources) { s.CacheDir = "" }, "cacheDir"},
		"a relative folder": {func(s *Sources) { s.CacheDir = "cache" }, "cacheDir"},
		"no bound":          {func(s *Sources) { s.CacheBytes = 0 }, "cacheBytes"},
		"no buckets":        {func(s *Sources) { s.Buckets = nil }, "buckets"},
	} {
		c := valid()
		c.Sources = documented(t, "sources").Sources
		if err := c.validate(); err != nil {
			t.Fatal(err)
		}
		row.change(c.Sources)
		if err := c.validate(); err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	c := documented(t, "sources")
	c.Sources.Buckets[0].Endpoint = "http://minio.example.com"
	if _, err := c.cache(slog.New(slog.DiscardHandler)); err == nil {
		t.Error("an endpoint without TLS is taken")
	}
}

func valid() Config {
	c := Config{
		Listen: "x", Node: "x", StateDir: "x", RunDir: "x", Cgroup: "x", Containerd: "x", Runsc: "x", Shim: "x", Holder: "x", TSM: "configfs", TPM: "x",
		Verifier: Service{"x", "x", "x"}, Broker: Service{"x", "x", "x"}, ImageStore: "disk",
	}
	c.GPUPlugin.Path, c.GPUPlugin.SHA256 = "x", "x"
	return c
}

func TestDocumentedQueues(t *testing.T) {
	b, err := os.ReadFile("../../docs/scheduler.md")
	if err != nil {
		t.Fatal(err)
	}
	m := fence.FindSubmatch(b)
	if m == nil {
		t.Fatal("docs/scheduler.md has no configuration")
	}
	read := func(text string) (Config, error) {
		path := filepath.Join(t.TempDir(), "cofferd.json")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c := valid()
		if err := daemon.ReadConfig(path, &c); err != nil {
			return c, err
		}
		return c, c.validate()
	}
	c, err := read(string(m[1]))
	if err != nil || len(c.Queues) != 2 {
		t.Fatalf("%+v, %v", c.Queues, err)
	}
	if q := c.Queues[1]; q.Limit.Jobs != 6 || q.Limit.GPUs != 1 || q.Limit.CPUMillis != 16000 || q.Limit.MemoryBytes != 64<<30 || q.Weight != 2 || !q.Admits("scheduler/cluster-1") {
		t.Errorf("%+v", q)
	}
	for name, change := range map[string][2]string{
		"nobody's":             {`"users": ["scheduler/cluster-1"], `, ""},
		"a limit that is none": {`"jobs": 6`, `"job": 6`},
		"twice":                {"nightly", "default"},
	} {
		if _, err := read(strings.Replace(string(m[1]), change[0], change[1], 1)); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}
