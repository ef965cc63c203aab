package sandbox

import (
	"archive/tar"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/runner/image"
)

// baseImage is the numpy image, unpacked into a folder as an OCI layout.
func baseImage(t *testing.T) v1.Image {
	t.Helper()
	_, images := need(t)
	f, err := os.Open(filepath.Join(images, "numpy.tar"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	dir := t.TempDir()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		p := filepath.Join(dir, filepath.FromSlash(h.Name)) //nolint:gosec // our own archive
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, b, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	m, err := index.IndexManifest()
	if err != nil || len(m.Manifests) != 1 {
		t.Fatal(m, err)
	}
	img, err := index.Image(m.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// importWith imports the base with one layer more, as an image that a registry has.
func (n *Node) importWith(t *testing.T, base v1.Image, name string, entries ...*tar.Header) error {
	t.Helper()
	img, err := mutate.AppendLayers(base, static.NewLayer(archiveOf(t, entries...), types.OCIUncompressedLayer))
	if err != nil {
		t.Fatal(err)
	}
	return n.importImage(t, img, name)
}

// importImage imports an image as the agent does one that a registry has.
func (n *Node) importImage(t *testing.T, img v1.Image, name string) error {
	t.Helper()
	r, digest := streamOf(t, img, name)
	err := n.Import(t.Context(), name, digest, r)
	_ = r.CloseWithError(io.ErrClosedPipe)
	return err
}

// streamOf is an image as the agent hands it to containerd, and its digest.
func streamOf(t *testing.T, img v1.Image, name string) (*io.PipeReader, string) {
	t.Helper()
	path, err := layout.Write(t.TempDir(), mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: img}))
	if err != nil {
		t.Fatal(err)
	}
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	got, err := image.Registries{}.FromLayout(string(path), name, digest.String())
	if err != nil {
		t.Fatal(err)
	}
	r, w := io.Pipe()
	go func() {
		_, err := got.WriteTo(w)
		_ = w.CloseWithError(err)
	}()
	return r, digest.String()
}

func TestHostileImages(t *testing.T) {
	n := startContainerd(t)
	base := baseImage(t)
	t.Run("unpacked", func(t *testing.T) { unpacksInside(t, n, base) })
	t.Run("run", func(t *testing.T) { runsHarmlessly(t, n, base) })
	t.Run("too much", func(t *testing.T) { refusesTooMuch(t, n) })
	t.Run("cut off", func(t *testing.T) { unpacksWhatWasCutOff(t, n) })
}

// unpacksInside unpacks what a layer may not do: either it is refused, or nothing of it is
// outside of the image.
func unpacksInside(t *testing.T, n *Node, base v1.Image) {
	outside := t.TempDir()
	secret := filepath.Join(outside, "secret")
	if err := os.WriteFile(secret, []byte("the machine's own"), 0o600); err != nil {
		t.Fatal(err)
	}
	up := strings.Repeat("../", 20)
	for _, tt := range []struct {
		name    string
		entries []*tar.Header
	}{
		{"a path that leads up", []*tar.Header{{Name: up + outside + "/made", Mode: 0o644, Typeflag: tar.TypeReg, Uname: "x"}}},
		{"an absolute path", []*tar.Header{{Name: outside + "/made", Mode: 0o644, Typeflag: tar.TypeReg, Uname: "x"}}},
		{"a file through a link", []*tar.Header{{Name: "out", Typeflag: tar.TypeSymlink, Linkname: outside}, {Name: "out/made", Mode: 0o644, Typeflag: tar.TypeReg, Uname: "x"}}},
		{"a file over a link", []*tar.Header{{Name: "out", Typeflag: tar.TypeSymlink, Linkname: secret}, {Name: "out", Mode: 0o644, Typeflag: tar.TypeReg, Uname: "x"}}},
		{"a hard link to a file of the machine's", []*tar.Header{{Name: "mine", Typeflag: tar.TypeLink, Linkname: secret}}},
		{"a hard link that leads up", []*tar.Header{{Name: "mine", Typeflag: tar.TypeLink, Linkname: up + secret}}},
		{"a hard link through a link", []*tar.Header{{Name: "out", Typeflag: tar.TypeSymlink, Linkname: outside}, {Name: "mine", Typeflag: tar.TypeLink, Linkname: "out/secret"}}},
		{"a whiteout of a file of the machine's", []*tar.Header{{Name: up + outside + "/.wh.secret", Typeflag: tar.TypeReg, Mode: 0o644}}},
		{"a whiteout through a link", []*tar.Header{{Name: "out", Typeflag: tar.TypeSymlink, Linkname: outside}, {Name: "out/.wh.secret", Typeflag: tar.TypeReg, Mode: 0o644}}},
		{"an opaque folder through a link", []*tar.Header{{Name: "out", Typeflag: tar.TypeSymlink, Linkname: outside}, {Name: "out/.wh..wh..opq", Typeflag: tar.TypeReg, Mode: 0o644}}},
		{"a mode through a link", []*tar.Header{{Name: "out", Typeflag: tar.TypeSymlink, Linkname: outside}, {Name: "out/", Typeflag: tar.TypeDir, Mode: 0o777}, {Name: "out/secret", Typeflag: tar.TypeSymlink, Linkname: "x", Mode: 0o777}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := n.importWith(t, base, "registry.example/hostile:"+strings.ReplaceAll(strings.ReplaceAll(tt.name, " ", "-"), "'", ""), tt.entries...)
			t.Log(err)
			entries, rerr := os.ReadDir(outside)
			b, serr := os.ReadFile(secret)
			fi, ferr := os.Stat(secret)
			if err := errors.Join(rerr, serr, ferr); err != nil || len(entries) != 1 || string(b) != "the machine's own" {
				t.Fatalf("outside there is %v, the file has %q, %v", entries, b, err)
			}
			if fi.Mode() != 0o600 || linksOf(t, secret) != 1 {
				t.Errorf("the file has mode %v and %d links", fi.Mode(), linksOf(t, secret))
			}
		})
	}
}

// runsHarmlessly: an image's device nodes open nothing, and its set-user-ID programs gain
// nothing.
func runsHarmlessly(t *testing.T, n *Node, base v1.Image) {
	python := ""
	for r := tar.NewReader(mutate.Extract(base)); python == ""; {
		h, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg && strings.HasPrefix(h.Name, "usr/bin/python3") {
			b, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			python = string(b)
		}
	}
	const name = "registry.example/hostile:runs"
	if err := n.importWith(t, base, name,
		&tar.Header{Name: "evil/", Typeflag: tar.TypeDir, Mode: 0o777},
		&tar.Header{Name: "evil/mem", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 1, Mode: 0o666},
		&tar.Header{Name: "evil/kmsg", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 11, Mode: 0o666},
		&tar.Header{Name: "evil/fuse", Typeflag: tar.TypeChar, Devmajor: 10, Devminor: 229, Mode: 0o666},
		&tar.Header{Name: "evil/disk", Typeflag: tar.TypeBlock, Devmajor: 254, Devminor: 0, Mode: 0o666},
		&tar.Header{Name: "evil/pipe", Typeflag: tar.TypeFifo, Mode: 0o666},
		&tar.Header{Name: "evil/shadow", Typeflag: tar.TypeSymlink, Linkname: "../../../../../../../../etc/hostname"},
		&tar.Header{Name: "evil/python3", Typeflag: tar.TypeReg, Mode: 0o6755, Uname: python},
	); err != nil {
		t.Fatal(err)
	}
	img, err := n.Image(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	j := n.testJobOf(t, "hostile", func(r *Request) { r.Image, r.Plan.Image = img, img.Digest }, "/usr/bin/python3", "-c", `
import os, subprocess
def opens(p):
    try:
        os.read(os.open(p, os.O_RDWR | os.O_NONBLOCK), 1)
        return "read"
    except OSError as e:
        return "refused"
print([opens("/evil/" + f) for f in ("mem", "kmsg", "fuse", "disk", "pipe")])
print(os.path.exists("/evil/shadow"))
print(subprocess.run(["/evil/python3", "-c", "import os; print(os.getresuid(), os.getresgid())"], capture_output=True, text=True).stdout.strip())
`)
	if err := j.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if code, err := ExitCode(<-j.Exited()); err != nil || code != 0 {
		t.Fatalf("exit code %d, %v", code, err)
	}
	select {
	case out := <-j.stdout:
		if want := "['refused', 'refused', 'refused', 'refused', 'refused']\nFalse\n(65532, 65532, 65532) (65532, 65532, 65532)\n"; out != want {
			t.Errorf("the job says\n%swant\n%s", out, want)
		}
	case <-time.After(time.Minute):
		t.Fatal("no output")
	}
}

func linksOf(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Nlink
}
