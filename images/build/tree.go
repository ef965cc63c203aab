package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
)

const (
	archivesDir = "var/cache/apt/archives/"
	// maxLinks is the kernel's own limit on symbolic links in one look-up.
	maxLinks = 40
)

// node is one name in a file tree. Its content is read at its place in the packages' tar.
type node struct {
	header  tar.Header
	content *io.SectionReader
}

func (n *node) isLink() bool { return n.header.Typeflag == tar.TypeSymlink }
func (n *node) isFile() bool { return n.header.Typeflag == tar.TypeReg }

// tree is the content of a tar by clean path without a leading slash.
type tree struct {
	nodes    map[string]*node
	children map[string][]string
	// packages has a line for each Debian package: file name and SHA-256.
	packages []byte
}

func readTree(f *os.File) (*tree, error) {
	t := &tree{nodes: map[string]*node{}, children: map[string][]string{}}
	hardLinks := map[string]string{}
	var packages []string
	r := tar.NewReader(f)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("reading the packages' files: %w", err)
		}
		name := path.Clean(h.Name)
		if archive, ok := strings.CutPrefix(name, archivesDir); ok && strings.HasSuffix(archive, ".deb") {
			sum := sha256.New()
			if _, err := io.Copy(sum, r); err != nil {
				return nil, fmt.Errorf("hashing %s: %w", archive, err)
			}
			packages = append(packages, fmt.Sprintf("%s sha256:%x\n", archive, sum.Sum(nil)))
			continue
		}
		n := &node{header: *h}
		switch h.Typeflag {
		case tar.TypeReg:
			// tar.Reader leaves a seekable file at the entry's first byte.
			offset, err := f.Seek(0, io.SeekCurrent)
			if err != nil {
				return nil, fmt.Errorf("reading the packages' files: %w", err)
			}
			n.content = io.NewSectionReader(f, offset, h.Size)
		case tar.TypeLink:
			hardLinks[name] = path.Clean(h.Linkname)
			continue
		}
		t.add(name, n)
	}
	for name, target := range hardLinks {
		original := t.nodes[target]
		if original == nil || !original.isFile() {
			return nil, fmt.Errorf("reading the packages' files: %s is a hard link to %s, which is no file", name, target)
		}
		t.add(name, original)
	}
	for _, names := range t.children {
		slices.Sort(names)
	}
	slices.Sort(packages)
	t.packages = []byte(strings.Join(packages, ""))
	return t, nil
}

func (t *tree) add(name string, n *node) {
	if t.nodes[name] == nil && name != "." {
		t.children[path.Dir(name)] = append(t.children[path.Dir(name)], name)
	}
	t.nodes[name] = n
}

// resolve follows symbolic links as the kernel would and returns the path it ends at, and every name it passed through on the way, that path included.
func (t *tree) resolve(name string) (end string, passed []string, err error) {
	rest := strings.Split(path.Clean(name), "/")
	at := "."
	for links := 0; len(rest) > 0; {
		next := path.Join(at, rest[0])
		rest = rest[1:]
		if next == ".." || strings.HasPrefix(next, "../") {
			next = "."
		}
		n := t.nodes[next]
		if next == "." {
			at = next
			continue
		}
		if n == nil {
			return "", nil, fmt.Errorf("%s: %s: %w", name, next, os.ErrNotExist)
		}
		passed = append(passed, next)
		if !n.isLink() {
			at = next
			continue
		}
		if links++; links > maxLinks {
			return "", nil, fmt.Errorf("%s: too many symbolic links", name)
		}
		target := n.header.Linkname
		if path.IsAbs(target) {
			at = "."
			target = strings.TrimPrefix(path.Clean(target), "/")
		}
		rest = append(strings.Split(target, "/"), rest...)
	}
	return at, passed, nil
}

// writeTar writes nodes by name with everything that a build could change (owners, times, set-id bits) fixed.
func writeTar(w io.Writer, nodes map[string]*node) error {
	out := tar.NewWriter(w)
	names := make([]string, 0, len(nodes))
	for name := range nodes {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		n := nodes[name]
		h := &tar.Header{
			Typeflag: n.header.Typeflag,
			Name:     name,
			Linkname: n.header.Linkname,
			Mode:     n.header.Mode & 0o1777,
			ModTime:  epochTime,
		}
		if h.Typeflag == tar.TypeDir {
			h.Name += "/"
		}
		if n.isFile() {
			h.Size = n.content.Size()
		}
		if err := out.WriteHeader(h); err != nil {
			return fmt.Errorf("writing %s: %w", name, err)
		}
		if n.isFile() {
			if _, err := io.Copy(out, io.NewSectionReader(n.content, 0, n.content.Size())); err != nil {
				return fmt.Errorf("writing %s: %w", name, err)
			}
		}
	}
	if err := out.Close(); err != nil {
		return fmt.Errorf("ending a layer: %w", err)
	}
	return nil
}

func newFile(content []byte, mode int64) *node {
	return &node{
		header:  tar.Header{Typeflag: tar.TypeReg, Mode: mode},
		content: io.NewSectionReader(bytes.NewReader(content), 0, int64(len(content))),
	}
}

func newDir(mode int64) *node {
	return &node{header: tar.Header{Typeflag: tar.TypeDir, Mode: mode}}
}

func newLink(target string) *node {
	return &node{header: tar.Header{Typeflag: tar.TypeSymlink, Linkname: target, Mode: 0o755}}
}
