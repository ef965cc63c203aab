package sandbox

import (
	"archive/tar"
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

// tarOf packs files; a name that ends in / is a folder, a body "-> x" a link, "=> x" a
// hard link.
func tarOf(t *testing.T, files ...[2]string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Name: f[0], Mode: 0o644, Typeflag: tar.TypeReg, Size: int64(len(f[1]))}
		if to, ok := strings.CutPrefix(f[1], "-> "); ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeSymlink, to, 0
		} else if to, ok := strings.CutPrefix(f[1], "=> "); ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, to, 0
		} else if strings.HasSuffix(f[0], "/") {
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			if _, err := w.Write([]byte(f[1])); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// Each change is made to an unpacked layer, by whoever can write to the disk.
func TestUnpackedLayer(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("root is needed: files have owners")
	}
	packed := tarOf(t, [2]string{"usr/"}, [2]string{"usr/bin/"}, [2]string{"usr/bin/python3", "program"}, [2]string{"usr/bin/python", "-> python3"},
		[2]string{"usr/bin/also", "=> usr/bin/python3"}, [2]string{"usr/lib/deep/module.py", "text"}, [2]string{"lib", "-> usr/lib"}, [2]string{"lib/deep/other.py", "text"}, [2]string{"etc/", ""}, [2]string{"etc/.wh.passwd", ""}, [2]string{"var/.wh..wh..opq", ""})
	l, err := parseLayer(bytes.NewReader(packed), nil)
	if err != nil {
		t.Fatal(err)
	}
	in := func(name string) func(string) string {
		return func(dir string) string { return filepath.Join(dir, name) }
	}
	python := in("usr/bin/python3")
	for name, row := range map[string]struct {
		change func(dir string) error
		want   string
	}{
		"untouched":            {func(string) error { return nil }, ""},
		"a byte flipped":       {func(d string) error { return os.WriteFile(python(d), []byte("prograM"), 0o644) }, "sha256:"},
		"a byte more":          {func(d string) error { return os.WriteFile(python(d), []byte("program2"), 0o644) }, "bytes"},
		"a file removed":       {func(d string) error { return os.Remove(in("usr/lib/deep/module.py")(d)) }, "not there"},
		"a file added":         {func(d string) error { return os.WriteFile(in("usr/bin/sh")(d), nil, 0o755) }, "not in the image"},
		"a file behind a link": {func(d string) error { return os.WriteFile(in("usr/lib/deep/other.py")(d), []byte("tExt"), 0o644) }, "sha256:"},
		"a folder added":       {func(d string) error { return os.Mkdir(in("opt")(d), 0o755) }, "not in the image"},
		"a link to elsewhere": {func(d string) error {
			return errors.Join(os.Remove(in("usr/bin/python")(d)), os.Symlink("sh", in("usr/bin/python")(d)))
		}, "a link to"},
		"a link in a file's place": {func(d string) error { return errors.Join(os.Remove(python(d)), os.Symlink("also", python(d))) }, "another type"},
		"a link in a folder's": {func(d string) error {
			return errors.Join(os.RemoveAll(in("usr/lib")(d)), os.Symlink("bin", in("usr/lib")(d)))
		}, "not a folder"},
		"a mode":                   {func(d string) error { return os.Chmod(python(d), 0o755) }, "mode"},
		"run as its owner":         {func(d string) error { return unix.Chmod(python(d), 0o4644) }, "mode 4644"},
		"an owner":                 {func(d string) error { return os.Lchown(python(d), 7, 0) }, "owner 7:0"},
		"what was hidden is shown": {func(d string) error { return os.Remove(in("etc/passwd")(d)) }, "not there"},
		"a file in its place": {func(d string) error {
			return errors.Join(os.Remove(in("etc/passwd")(d)), os.WriteFile(in("etc/passwd")(d), nil, 0o644))
		}, "another type"},
		"a folder that shows again": {func(d string) error { return unix.Removexattr(in("var")(d), "trusted.overlay.opaque") }, "another mark"},
		"a folder that hides":       {func(d string) error { return unix.Setxattr(in("usr")(d), "trusted.overlay.opaque", []byte("y"), 0) }, "another mark"},
		"a folder from elsewhere":   {func(d string) error { return unix.Setxattr(in("usr")(d), "trusted.overlay.redirect", []byte("/x"), 0) }, "the mark"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.Chmod(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			if _, err := archive.Apply(t.Context(), dir, bytes.NewReader(packed), archive.WithConvertWhiteout(archive.OverlayConvertWhiteout)); err != nil {
				t.Fatal(err)
			}
			if err := row.change(dir); err != nil {
				t.Fatal(err)
			}
			got, err := l.compare(dir)
			if err != nil || (got == "") != (row.want == "") || !strings.Contains(got, row.want) {
				t.Errorf("%q, %v; want %q", got, err, row.want)
			}
		})
	}
}

func TestLayerWithoutItsTarget(t *testing.T) {
	if _, err := parseLayer(bytes.NewReader(tarOf(t, [2]string{"a", "=> b"})), nil); err == nil {
		t.Error("a link to nothing is taken")
	}
	base, err := parseLayer(bytes.NewReader(tarOf(t, [2]string{"b", "text"})), nil)
	if err != nil {
		t.Fatal(err)
	}
	l, err := parseLayer(bytes.NewReader(tarOf(t, [2]string{"../../a", "=> /b"})), []layer{base})
	if err != nil || l["a"].sum != base["b"].sum {
		t.Errorf("%v, %v", l, err)
	}
}

func wantRefused(t *testing.T, err error, id string) {
	t.Helper()
	var refused *check.Refusal
	if !errors.As(err, &refused) || len(refused.Checks.Failed()) == 0 {
		t.Fatalf("got %v, want a refusal by %s", err, id)
	}
	for _, c := range refused.Checks.Failed() {
		if c.ID != id {
			t.Errorf("failed %s, want %s", c.ID, id)
		}
	}
}

// A byte of the unpacked image is flipped after the sandbox was created and described:
// nothing else notices.
func TestFlippedByteOfAnUnpackedImage(t *testing.T) {
	n := startContainerd(t)
	j := n.testJob(t, "flip", "/usr/bin/python3", "-c", "print(1)")
	img, err := n.Image(t.Context(), "coffer.local/numpy:latest")
	if err != nil {
		t.Fatal(err)
	}
	for _, times := range []string{"first", "again"} {
		began := time.Now()
		if err := j.RecheckContent(t.Context(), img); err != nil {
			t.Fatalf("an untouched image: %v", err)
		}
		t.Logf("%s: %v", times, time.Since(began))
	}
	root, err := j.rootfs()
	if err != nil {
		t.Fatal(err)
	}
	at := filepath.Join(root.lower[len(root.lower)-1], "usr/lib/python3.13/os.py")
	b, err := os.ReadFile(at)
	if err != nil {
		found, _ := filepath.Glob(filepath.Join(root.lower[len(root.lower)-1], "usr/lib/python3*/os.py"))
		if len(found) == 0 {
			t.Fatal(err)
		}
		at = found[0]
		if b, err = os.ReadFile(at); err != nil {
			t.Fatal(err)
		}
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(at, b, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := j.Recheck(t.Context(), j.plan); err != nil {
		t.Fatalf("another check stands before this one: %v", err)
	}
	wantRefused(t, j.RecheckContent(t.Context(), img), "sandbox.image-content")
	b[len(b)/2] ^= 1
	if err := os.WriteFile(at, b, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := j.RecheckContent(t.Context(), img); err != nil {
		t.Fatalf("the image as it was: %v", err)
	}
	// The writable layer hides what is below it.
	if err := os.WriteFile(filepath.Join(root.upper, "etc"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	wantRefused(t, j.RecheckContent(t.Context(), img), "sandbox.image-content")
	if err := os.Remove(filepath.Join(root.upper, "etc")); err != nil {
		t.Fatal(err)
	}

	// A node that says tmpfs, and has its images on this disk.
	var st unix.Statfs_t
	if err := unix.Statfs(root.upper, &st); err != nil {
		t.Fatal(err)
	}
	if st.Type == unix.TMPFS_MAGIC {
		t.Log("/run is in memory here: a false word about the store is not tried")
		return
	}
	n.cfg.ImageStore = plan.ImageStoreTmpfs
	_, err = n.tryJob(t, "false-word", func(*Request) {}, "/usr/bin/python3")
	wantRefused(t, err, "sandbox.image-store")
}

func TestImagesInMemory(t *testing.T) {
	n := startContainerdIn(t, "/dev/shm", plan.ImageStoreTmpfs)
	j := n.testJob(t, "memory", "/usr/bin/python3", "-c", "print(6 * 7)")
	d, err := plan.ParseSandbox(j.Description())
	if err != nil || d.Profile.ImageStore != plan.ImageStoreTmpfs {
		t.Errorf("the evidence says %q: %v", d.Profile.ImageStore, err)
	}
	if err := j.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if out := <-j.stdout; !strings.Contains(out, "42") {
		t.Errorf("printed %q", out)
	}
}
