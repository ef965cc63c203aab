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

// documented is the configuration in docs/sources.md.
func documented(t *testing.T) Config {
	t.Helper()
	b, err := os.ReadFile("../../docs/sources.md")
	if err != nil {
		t.Fatal(err)
	}
	m := fence.FindSubmatch(b)
	if m == nil {
		t.Fatal("docs/sources.md has no configuration")
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
	c := documented(t)
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
		c.Sources = documented(t).Sources
		if err := c.validate(); err != nil {
			t.Fatal(err)
		}
		row.change(c.Sources)
		if err := c.validate(); err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	c := documented(t)
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
