package main

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestCachedLayerIsCheckedBeforeUse(t *testing.T) {
	dir := t.TempDir()
	var blob bytes.Buffer
	d, err := compress(&blob, func(w io.Writer) error {
		return writeTar(w, map[string]*node{"a": newFile(text("a"), 0o644)})
	})
	if err != nil {
		t.Fatal(err)
	}
	described, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{"layer.json": described, "layer.tar.zst": blob.Bytes(), "packages": nil} {
		if err := writeFile(filepath.Join(dir, name), content); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := loadSystem(dir); err != nil {
		t.Fatalf("a sound layer: %v", err)
	}
	damaged := slices.Clone(blob.Bytes())
	damaged[len(damaged)/2] ^= 1
	if err := os.WriteFile(filepath.Join(dir, "layer.tar.zst"), damaged, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := loadSystem(dir); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("a flipped bit: got %v", err)
	}
}

func TestOnlyTheSuitesMainArchives(t *testing.T) {
	got := suiteLines(`bookworm deb http://mirror.example/debian bookworm main
bookworm-updates deb http://mirror.example/debian bookworm-updates main
bookworm deb http://mirror.example/debian bookworm non-free
trixie deb http://mirror.example/debian trixie main
`)
	want := "deb http://mirror.example/debian bookworm main\ndeb http://mirror.example/debian bookworm-updates main\n"
	if got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestAptsWayToItsArchives(t *testing.T) {
	got := reachOptions(`Acquire "";
Acquire::http "";
Acquire::http::Proxy "http://proxy.example:3128";
Acquire::http::User-Agent "";
Acquire::Check-Valid-Until "false";
Acquire::Languages "none";
DPkg::Post-Invoke:: "rm -rf /";
`)
	want := []string{`Acquire::http::Proxy "http://proxy.example:3128"`, `Acquire::Check-Valid-Until "false"`}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestCommandLine(t *testing.T) {
	folders := []string{"-cache", t.TempDir(), "-out", t.TempDir()}
	for _, tc := range []struct {
		name    string
		args    []string
		wantErr string
	}{
		{"nothing", nil, "a cache folder"},
		{"no image", folders, "at least one image"},
		{"an unknown image", append(folders, "jax"), `unknown image "jax": images are numpy, torch`},
		{"a relative target", append(folders, "-add", "a:b", "numpy"), "want SOURCE:/ABSOLUTE/TARGET"},
		{"a target that climbs", append(folders, "-add", "a:/app/../etc/passwd", "numpy"), "want SOURCE:/ABSOLUTE/TARGET"},
		{"a target twice", append(folders, "-add", "a:/app", "-add", "b:/app", "numpy"), "/app is added twice"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := run(t.Context(), tc.args, io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), tc.wantErr) {
				t.Errorf("got %v, want an error with %q", err, tc.wantErr)
			}
		})
	}
}
