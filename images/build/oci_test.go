package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
)

func writeProgram(t *testing.T, content string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "train.py")
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
	return path
}

func writeTestImage(t *testing.T, dir, program string) v1.Hash {
	t.Helper()
	l, err := addedLayer([]addition{{source: program, target: "/app/sub/train.py"}})
	if err != nil {
		t.Fatal(err)
	}
	digest, err := writeImage(dir, "small", []*layer{l})
	if err != nil {
		t.Fatal(err)
	}
	return digest
}

func TestImage(t *testing.T) {
	dir := t.TempDir()
	digest := writeTestImage(t, dir, writeProgram(t, "print()", 0o600))

	p, err := layout.FromPath(filepath.Join(dir, "small"))
	if err != nil {
		t.Fatal(err)
	}
	img, err := p.Image(digest)
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if config.Config.User != "65532:65532" {
		t.Errorf("user is %q", config.Config.User)
	}
	if !slices.Contains(config.Config.Env, "OPENBLAS_NUM_THREADS=1") {
		t.Errorf("environment is %q", config.Config.Env)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	content, err := layers[0].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer content.Close()
	var names []string
	diffID := sha256.New()
	r := tar.NewReader(io.TeeReader(content, diffID))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
		if h.Name == "app/sub/train.py" && h.Mode != 0o644 {
			t.Errorf("the job cannot read its program: mode %o", h.Mode)
		}
	}
	if _, err := io.Copy(diffID, content); err != nil {
		t.Fatal(err)
	}
	if got := hex.EncodeToString(diffID.Sum(nil)); got != config.RootFS.DiffIDs[0].Hex {
		t.Errorf("the layer's content is %s, the configuration says %s", got, config.RootFS.DiffIDs[0])
	}
	if want := []string{"app/", "app/sub/", "app/sub/train.py"}; !slices.Equal(names, want) {
		t.Errorf("layer has %q, want %q", names, want)
	}
	written, err := os.ReadFile(filepath.Join(dir, "small.digest"))
	if err != nil {
		t.Fatal(err)
	}
	if string(written) != digest.String()+"\n" {
		t.Errorf("small.digest says %q, the image is %s", written, digest)
	}
}

func TestImageIsItsContent(t *testing.T) {
	one, two, three := t.TempDir(), t.TempDir(), t.TempDir()
	first := writeTestImage(t, one, writeProgram(t, "print()", 0o600))
	if second := writeTestImage(t, two, writeProgram(t, "print()", 0o644)); first != second {
		t.Errorf("the same files gave %s and %s", first, second)
	}
	a, err := os.ReadFile(filepath.Join(one, "small.tar"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(two, "small.tar"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a, b) {
		t.Error("the same files gave two archives")
	}
	if changed := writeTestImage(t, three, writeProgram(t, "print(1)", 0o644)); first == changed {
		t.Error("a changed file kept the digest")
	}
}

func TestAddedFileMustBeAFile(t *testing.T) {
	if _, err := addedLayer([]addition{{source: t.TempDir(), target: "/app"}}); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("got %v", err)
	}
}
