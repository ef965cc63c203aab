package stack

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
)

// tinyArchive is an OCI archive of an image for each name, all different.
func tinyArchive(t *testing.T, names ...string) string {
	t.Helper()
	at, err := layout.Write(t.TempDir(), empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		img, err := random.Image(64, 1)
		if err != nil {
			t.Fatal(err)
		}
		conf, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		conf = conf.DeepCopy()
		conf.OS, conf.Architecture = "linux", runtime.GOARCH
		if img, err = mutate.ConfigFile(img, conf); err != nil {
			t.Fatal(err)
		}
		if err := at.AppendImage(img, layout.WithAnnotations(map[string]string{"io.containerd.image.name": name}), layout.WithPlatform(v1.Platform{OS: "linux", Architecture: runtime.GOARCH})); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(t.TempDir(), "images.tar")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := tar.NewWriter(f)
	if err := w.AddFS(os.DirFS(string(at))); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// storedImages asks the stack's containerd for its images, by name, with their digests.
func storedImages(t *testing.T, l Layout) map[string]string {
	t.Helper()
	store, err := imageStore()
	if err != nil {
		t.Fatal(err)
	}
	root, err := l.containerdRoot()
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil || (st.Type == unix.TMPFS_MAGIC) != (store == plan.ImageStoreTmpfs) {
		t.Errorf("the image store %s is on a file system of type %#x, %v", store, st.Type, err)
	}
	c, err := l.openContainerd()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	list, err := c.ListImages(namespaces.WithNamespace(t.Context(), Namespace))
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, i := range list {
		out[i.Name()] = i.Target().Digest.String()
	}
	return out
}

func TestKeptArchives(t *testing.T) {
	l, err := NewLayout(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	archive := func(content string) string {
		path := filepath.Join(t.TempDir(), "a.tar")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	want := func(contents ...string) []string {
		t.Helper()
		kept, err := l.keptArchives()
		if err != nil || len(kept) != len(contents) {
			t.Fatalf("kept %v, %v; want %d", kept, err, len(contents))
		}
		left := map[string]bool{}
		for _, c := range contents {
			left[c] = true
		}
		for _, k := range kept {
			b, err := os.ReadFile(k)
			if err != nil || !left[string(b)] {
				t.Errorf("%s has %q, %v; want one of %q", k, b, err, contents)
			}
		}
		return kept
	}
	keep := func(path string, names ...string) {
		t.Helper()
		if err := l.keepArchive(path, names); err != nil {
			t.Fatal(err)
		}
	}
	want()
	keep(archive("first"), "a", "b")
	keep(archive("other"), "c")
	keep(archive("second"), "b", "a")
	kept := want("second", "other")
	// What is kept already is given again.
	for _, k := range kept {
		b, _ := os.ReadFile(k)
		names := []string{"a", "b"}
		if string(b) == "other" {
			names = []string{"c"}
		}
		keep(k, names...)
	}
	want("second", "other")
	if err := l.keepArchive(filepath.Join(t.TempDir(), "none"), []string{"a", "b"}); err == nil {
		t.Error("an archive that is not there is kept")
	}
	want("second", "other")
}

func TestSignSBOM(t *testing.T) {
	l, err := NewLayout(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := l.imageSigner(); err != nil {
		t.Fatal(err)
	}
	digest := "sha256:" + strings.Repeat("ab", 32)
	archive := filepath.Join(t.TempDir(), "numpy.tar")
	if list, err := readSBOM(archive); err != nil || list != nil {
		t.Fatalf("%q where there is none: %v", list, err)
	}
	list := []byte(`{"bomFormat":"CycloneDX","metadata":{"component":{"version":"` + digest + `"}}}`)
	if err := os.WriteFile(strings.TrimSuffix(archive, ".tar")+".cdx.json", list, 0o600); err != nil {
		t.Fatal(err)
	}
	read, err := readSBOM(archive)
	if err != nil || !bytes.Equal(read, list) {
		t.Fatalf("%q: %v", read, err)
	}
	signed := filepath.Join(l.signatures(), strings.Repeat("ab", 32), "stack.sbom.json")
	if err := l.signSBOM(digest, read); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(signed)
	if err != nil {
		t.Fatal(err)
	}
	if signed, err := l.signaturesOf(digest); err != nil || signed {
		t.Errorf("a list alone is a signature of the image: %v", err)
	}
	if err := l.signImage(digest); err != nil {
		t.Fatal(err)
	}
	if signed, err := l.signaturesOf(digest); err != nil || !signed {
		t.Errorf("the signature beside the list is none: %v", err)
	}
	// Another image's list is refused, and none leaves what is there.
	if err := l.signSBOM("sha256:"+strings.Repeat("cd", 32), read); err == nil {
		t.Error("a list of another image is signed")
	}
	if err := l.signSBOM(digest, nil); err != nil {
		t.Fatal(err)
	}
	if after, err := os.ReadFile(signed); err != nil || !bytes.Equal(before, after) {
		t.Errorf("what was signed is gone: %v", err)
	}
}
