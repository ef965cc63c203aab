package main

import (
	"archive/tar"
	"bytes"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// entry is one entry of a packages' tar: a folder unless it has content, a link or a hard link.
type entry struct {
	name, link, hard string
	content          []byte
	mode             int64
}

func newTree(t *testing.T, entries ...entry) *tree {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "debian.tar"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	w := tar.NewWriter(f)
	for _, e := range entries {
		h := &tar.Header{Name: "./" + e.name, Typeflag: tar.TypeDir, Mode: 0o755, Uid: 7, Uname: "someone"}
		switch {
		case e.link != "":
			h.Typeflag, h.Linkname = tar.TypeSymlink, e.link
		case e.hard != "":
			h.Typeflag, h.Linkname = tar.TypeLink, "./"+e.hard
		case e.content != nil:
			h.Typeflag, h.Size = tar.TypeReg, int64(len(e.content))
		}
		if e.mode != 0 {
			h.Mode = e.mode
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(e.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Seek(0, 0); err != nil {
		t.Fatal(err)
	}
	tree, err := readTree(f)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

func text(s string) []byte { return []byte(s) }

func TestResolve(t *testing.T) {
	tree := newTree(t,
		entry{name: "usr"}, entry{name: "usr/lib"}, entry{name: "usr/lib/file", content: text("x")},
		entry{name: "lib", link: "usr/lib"},
		entry{name: "absolute", link: "/usr/lib/file"},
		entry{name: "usr/up", link: "../../../usr/lib"},
		entry{name: "loop", link: "loop"},
		entry{name: "dangling", link: "nowhere"},
	)
	for _, tc := range []struct {
		name, ask, want, wantErr string
		passed                   []string
	}{
		{name: "plain", ask: "usr/lib/file", want: "usr/lib/file", passed: []string{"usr", "usr/lib", "usr/lib/file"}},
		{name: "linked folder", ask: "lib/file", want: "usr/lib/file", passed: []string{"lib", "usr", "usr/lib", "usr/lib/file"}},
		{name: "absolute link", ask: "absolute", want: "usr/lib/file", passed: []string{"absolute", "usr", "usr/lib", "usr/lib/file"}},
		{name: "above the root is the root", ask: "usr/up/file", want: "usr/lib/file", passed: []string{"usr", "usr/up", "usr", "usr/lib", "usr/lib/file"}},
		{name: "a loop", ask: "loop", wantErr: "too many symbolic links"},
		{name: "a dangling link", ask: "dangling", wantErr: "nowhere"},
		{name: "a missing file", ask: "usr/bin/true", wantErr: "usr/bin"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			end, passed, err := tree.resolve(tc.ask)
			if tc.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), tc.wantErr) {
					t.Fatalf("got %v, want an error with %q", err, tc.wantErr)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if end != tc.want || !slices.Equal(passed, tc.passed) {
				t.Errorf("got %s by %v, want %s by %v", end, passed, tc.want, tc.passed)
			}
		})
	}
}

func TestSlim(t *testing.T) {
	base := func(extra ...entry) []entry {
		return append([]entry{
			{name: "lib64"}, {name: "lib64/loader", content: text("loader")},
			{name: "usr"}, {name: "usr/bin"},
			{name: "usr/bin/python3", link: "python3.11"},
			{name: "usr/bin/python3.11", content: newELF(t, "/lib64/loader", "", "libc.so"), mode: 0o4755},
			{name: "usr/bin/editor", content: text("not asked for")},
			{name: "lib"}, {name: "lib/x86_64-linux-gnu"},
			{name: "lib/x86_64-linux-gnu/libc.so", link: "libc-2.so"},
			{name: "lib/x86_64-linux-gnu/libc-2.so", content: text("c")},
			{name: "usr/lib"}, {name: pythonDir}, {name: pythonDir + "/os.py", content: text("os")},
			{name: pythonDir + "/test"}, {name: pythonDir + "/test/test_os.py", content: text("test")},
			{name: "usr/lib/python3"}, {name: distDir}, {name: distDir + "/module"}, {name: distDir + "/module/__init__.py", content: text("m")},
			{name: distDir + "/other"}, {name: distDir + "/other/__init__.py", content: text("o")},
		}, extra...)
	}
	r := recipe{Modules: []string{"module"}, Skip: []string{"test"}, Files: []string{"usr/bin/python3"}}
	for _, tc := range []struct {
		name    string
		extra   []entry
		links   map[string]string
		want    []string
		without []string
		wantErr string
	}{
		{
			name:    "a program, what it loads, and the modules",
			want:    []string{"usr/bin/python3", "usr/bin/python3.11", "lib64/loader", "lib/x86_64-linux-gnu/libc.so", "lib/x86_64-linux-gnu/libc-2.so", pythonDir + "/os.py", distDir + "/module/__init__.py", "tmp", "inputs", "checkpoints", "etc/passwd"},
			without: []string{"usr/bin/editor", pythonDir + "/test", distDir + "/other"},
		},
		{
			name: "a library of a library in its own folder",
			extra: []entry{
				{name: distDir + "/module/fast.so", content: newELF(t, "", "$ORIGIN/private", "libfast.so")},
				{name: distDir + "/module/private"}, {name: distDir + "/module/private/libfast.so", content: newELF(t, "", "", "libdeep.so")},
				{name: libDir}, {name: libDir + "/libdeep.so", content: text("deep")},
			},
			want: []string{distDir + "/module/private/libfast.so", libDir + "/libdeep.so"},
		},
		{
			name: "a library that update-alternatives would link, and its own folder's library by the link's folder",
			extra: []entry{
				{name: distDir + "/module/linear.so", content: newELF(t, "", "", "libblas.so")},
				{name: libDir}, {name: libDir + "/quick"},
				{name: libDir + "/quick/libblas.so", content: newELF(t, "", "$ORIGIN", "libquick.so")},
				{name: libDir + "/quick/libquick.so", content: text("quick")},
			},
			links: map[string]string{"libblas.so": libDir + "/quick/libblas.so", "libquick.so": libDir + "/quick/libquick.so"},
			want:  []string{libDir + "/libblas.so", libDir + "/quick/libblas.so", libDir + "/libquick.so", libDir + "/quick/libquick.so"},
		},
		{
			name:  "a hard link",
			extra: []entry{{name: distDir + "/module/twin.py", hard: distDir + "/other/__init__.py"}},
			want:  []string{distDir + "/module/twin.py"},
		},
		{
			name:    "a library that no package holds",
			extra:   []entry{{name: distDir + "/module/fast.so", content: newELF(t, "", "", "libnone.so")}},
			wantErr: "module/fast.so needs libnone.so",
		},
		{
			name:    "a damaged program",
			extra:   []entry{{name: distDir + "/module/fast.so", content: text("\x7fELF and nothing")}},
			wantErr: "parsing " + distDir + "/module/fast.so",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := r
			r.Links = tc.links
			kept, err := slim(newTree(t, base(tc.extra...)...), r)
			if tc.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), tc.wantErr) {
					t.Fatalf("got %v, want an error with %q", err, tc.wantErr)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range tc.want {
				if kept[name] == nil {
					t.Errorf("%s is not in the image: %v", name, slices.Sorted(maps.Keys(kept)))
				}
			}
			for _, name := range tc.without {
				if kept[name] != nil {
					t.Errorf("%s is in the image", name)
				}
			}
		})
	}
}

func TestPackagesAreListedAndLeftOut(t *testing.T) {
	tree := newTree(t, entry{name: "var/cache/apt/archives/b_2_all.deb", content: text("b")}, entry{name: "var/cache/apt/archives/a_1_all.deb", content: text("a")})
	const want = "a_1_all.deb sha256:ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb\n" +
		"b_2_all.deb sha256:3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d\n"
	if string(tree.packages) != want {
		t.Errorf("got %q, want %q", tree.packages, want)
	}
	if len(tree.nodes) != 0 {
		t.Errorf("packages are in the tree: %v", slices.Collect(maps.Keys(tree.nodes)))
	}
}

func TestHardLinkToNothing(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "debian.tar"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := tar.NewWriter(f)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeLink, Name: "a", Linkname: "b"}); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if _, err := f.Seek(0, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := readTree(f); err == nil || !strings.Contains(err.Error(), "a is a hard link to b") {
		t.Errorf("got %v", err)
	}
}

func TestTarHasNothingOfItsBuild(t *testing.T) {
	write := func(entries ...entry) []byte {
		var b bytes.Buffer
		nodes := newTree(t, entries...).nodes
		if err := writeTar(&b, nodes); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	a := entry{name: "a", content: text("a"), mode: 0o6755}
	b := entry{name: "b", link: "a"}
	one, two := write(a, b), write(b, a)
	if !bytes.Equal(one, two) {
		t.Error("the order of a tar's entries changes the layer")
	}
	r := tar.NewReader(bytes.NewReader(one))
	h, err := r.Next()
	if err != nil {
		t.Fatal(err)
	}
	if h.Name != "a" || h.Mode != 0o755 || h.Uid != 0 || h.Uname != "" || !h.ModTime.Equal(epochTime) {
		t.Errorf("got %+v, want root's file of the epoch without set-id bits", h)
	}
}
