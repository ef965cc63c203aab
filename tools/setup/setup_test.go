package main

import (
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/internal/executable"
)

func TestNotInstalled(t *testing.T) {
	const dpkg = "ii  gcc\nii  fuse3:amd64\nrc  swtpm\nun  nftables\n"
	got := notInstalled([]string{"fuse3", "gcc", "mmdebstrap", "nftables", "swtpm"}, dpkg)
	if want := []string{"mmdebstrap", "nftables", "swtpm"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q: removed, unknown and never installed packages are missing", got, want)
	}
}

func newTool(t *testing.T) tool {
	t.Helper()
	dir := t.TempDir()
	for name, content := range map[string]string{
		"go.mod": "module x\n\nrequire (\n\texample.com/other v9.9.9\n\texample.com/tool v1.2.3 // indirect\n)\n",
		"go.sum": "sum\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return tool{Dir: dir, Module: "example.com/tool", Packages: []string{"example.com/tool/cmd/x"}}
}

func TestVersionIsThePin(t *testing.T) {
	tl := newTool(t)
	if got, err := tl.version(); err != nil || got != "v1.2.3" {
		t.Errorf("got %q, %v", got, err)
	}
	tl.Module = "example.com/absent"
	if got, err := tl.version(); err == nil {
		t.Errorf("a module that go.mod does not require has version %q", got)
	}
}

func TestEveryToolIsPinned(t *testing.T) {
	t.Chdir("../..")
	for name, tl := range tools {
		if _, err := tl.version(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := tl.key(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestKeyNamesWhatDeterminesATool(t *testing.T) {
	tl := newTool(t)
	key := func() string {
		k, err := tl.key()
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	first := key()
	if key() != first {
		t.Error("the same recipe has two keys")
	}
	tl.Tags = "no_btrfs"
	tagged := key()
	if tagged == first {
		t.Error("build tags do not change the key")
	}
	if err := os.WriteFile(filepath.Join(tl.Dir, "go.sum"), []byte("another sum\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	summed := key()
	if summed == tagged {
		t.Error("go.sum does not change the key")
	}
	own := filepath.Join(tl.Dir, "own")
	if err := os.Mkdir(own, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, file := range []struct {
		name, content string
		changes       bool
	}{{"x.go", "package own", true}, {"x.go", "package own // changed", true}, {"y.go", "package own // changed", true}, {"x_test.go", "package own", false}} {
		before := key()
		if err := os.WriteFile(filepath.Join(own, file.name), []byte(file.content), 0o600); err != nil {
			t.Fatal(err)
		}
		if (key() != before) != file.changes {
			t.Errorf("%+v: the key is %s, before it was %s", file, key(), before)
		}
	}
}

func TestCheckRefusesAnotherVersion(t *testing.T) {
	dir := t.TempDir()
	if err := executable.Write(filepath.Join(dir, "x"), []byte("#!/bin/sh\necho x version 1.2.3\n")); err != nil {
		t.Fatal(err)
	}
	tl := tool{Check: []string{"x", "--version"}}
	if err := tl.check(t.Context(), io.Discard, "v1.2.3", dir); err != nil {
		t.Errorf("its own version: %v", err)
	}
	if err := tl.check(t.Context(), io.Discard, "v1.2.4", dir); err == nil {
		t.Error("another version passed")
	}
}

func TestLinksFollowTheNewestBuild(t *testing.T) {
	link := t.TempDir()
	for _, content := range []string{"old", "new"} {
		from := t.TempDir()
		if err := executable.Write(filepath.Join(from, "runsc"), []byte(content)); err != nil {
			t.Fatal(err)
		}
		if size, err := linkPrograms(from, link); err != nil || size != 3 {
			t.Fatalf("got %d, %v", size, err)
		}
		got, err := os.ReadFile(filepath.Join(link, "runsc"))
		if err != nil || string(got) != content {
			t.Errorf("got %q, %v, want %q", got, err, content)
		}
	}
}

func TestCommandLine(t *testing.T) {
	for _, tc := range []struct {
		name    string
		args    []string
		wantErr string
	}{
		{"nothing", nil, "a cache folder, a link folder and at least one item"},
		{"an unknown item", []string{"-cache", "x", "-link", "y", "docker"}, `unknown item "docker": items are packages, containerd, golangci-lint, runsc`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := run(t.Context(), tc.args, io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), tc.wantErr) {
				t.Errorf("got %v, want an error with %q", err, tc.wantErr)
			}
		})
	}
}
