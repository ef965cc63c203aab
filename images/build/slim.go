package main

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// loaderDirs are the folders that Debian's dynamic loader searches without a cache file.
var loaderDirs = []string{"lib/x86_64-linux-gnu", libDir, "lib", "usr/lib"}

// slimmer collects what an image keeps. Every kept ELF file's interpreter and libraries are kept with it.
type slimmer struct {
	tree *tree
	kept map[string]*node
	// seen are the files that are or were in todo.
	seen map[file]bool
	todo []file
}

// file is a kept file and the name by which it is opened: the loader takes $ORIGIN from the latter, before following links.
type file struct{ name, openedAs string }

// slim returns the nodes that the recipe's image needs: Python, the standard library, the modules, and all libraries they link.
func slim(t *tree, r recipe) (map[string]*node, error) {
	for library, provider := range r.Links {
		t.add(path.Join(libDir, library), newLink("/"+provider))
	}
	s := &slimmer{tree: t, kept: map[string]*node{}, seen: map[file]bool{}}
	for _, name := range r.Files {
		if err := s.keep(name); err != nil {
			return nil, err
		}
	}
	roots := []string{pythonDir}
	for _, m := range r.Modules {
		roots = append(roots, path.Join(distDir, m))
	}
	for _, root := range roots {
		if err := s.keepTree(root, r.Skip); err != nil {
			return nil, err
		}
	}
	for len(s.todo) > 0 {
		next := s.todo[0]
		s.todo = s.todo[1:]
		if err := s.keepLibraries(next); err != nil {
			return nil, err
		}
	}
	for _, name := range folders {
		mode := int64(0o755)
		if name == "tmp" {
			mode = 0o1777
		}
		s.kept[name] = newDir(mode)
	}
	for name, content := range written {
		s.kept[path.Dir(name)] = newDir(0o755)
		s.kept[name] = newFile([]byte(content), 0o644)
	}
	return s.kept, nil
}

// keep adds a name, the folders above it and whatever symbolic links lead to.
func (s *slimmer) keep(name string) error {
	end, passed, err := s.tree.resolve(name)
	if err != nil {
		return fmt.Errorf("keeping a file: %w", err)
	}
	if len(passed) == 0 {
		return fmt.Errorf("keeping a file: %q names none", name)
	}
	for _, p := range passed {
		s.kept[p] = s.tree.nodes[p]
	}
	if f := (file{end, path.Clean(name)}); s.tree.nodes[end].isFile() && !s.seen[f] {
		s.seen[f] = true
		s.todo = append(s.todo, f)
	}
	return nil
}

func (s *slimmer) keepTree(root string, skip []string) error {
	if err := s.keep(root); err != nil {
		return err
	}
	for _, child := range s.tree.children[root] {
		n := s.tree.nodes[child]
		switch {
		case slices.Contains(skip, path.Base(child)):
		case slices.Contains([]string{".a", ".h", ".pyi", ".pyx", ".cmake"}, path.Ext(child)):
		case n.isFile():
			if err := s.keep(child); err != nil {
				return err
			}
		case n.isLink():
			// A link in a module may point into a -dev package that is not installed; Python never follows it.
			if err := s.keep(child); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		default:
			if err := s.keepTree(child, skip); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *slimmer) keepLibraries(opened file) error {
	name := opened.name
	n := s.tree.nodes[name]
	magic := make([]byte, len(elf.ELFMAG))
	if _, err := n.content.ReadAt(magic, 0); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("reading %s: %w", name, err)
	}
	if string(magic) != elf.ELFMAG {
		return nil
	}
	f, err := elf.NewFile(n.content)
	if err != nil {
		return fmt.Errorf("parsing %s: %w", name, err)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			interpreter, err := io.ReadAll(p.Open())
			if err != nil {
				return fmt.Errorf("reading the interpreter of %s: %w", name, err)
			}
			if err := s.keep(strings.Trim(string(interpreter), "/\x00")); err != nil {
				return err
			}
		}
	}
	needed, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("reading the libraries of %s: %w", name, err)
	}
	var dirs []string
	for _, tag := range []elf.DynTag{elf.DT_RPATH, elf.DT_RUNPATH} {
		paths, err := f.DynString(tag)
		if err != nil {
			return fmt.Errorf("reading the library paths of %s: %w", name, err)
		}
		for _, list := range paths {
			for _, dir := range strings.Split(list, ":") {
				dir = strings.ReplaceAll(dir, "${ORIGIN}", "$ORIGIN")
				dirs = append(dirs, strings.TrimPrefix(path.Clean(strings.ReplaceAll(dir, "$ORIGIN", "/"+path.Dir(opened.openedAs))), "/"))
			}
		}
	}
	for _, library := range needed {
		if err := s.keepLibrary(library, append(dirs, loaderDirs...)); err != nil {
			return fmt.Errorf("%s needs %s: %w", name, library, err)
		}
	}
	return nil
}

func (s *slimmer) keepLibrary(library string, dirs []string) error {
	for _, dir := range dirs {
		if name := path.Join(dir, library); s.tree.nodes[name] != nil {
			return s.keep(name)
		}
	}
	return fmt.Errorf("no package of the recipe holds it in %s", strings.Join(dirs, ", "))
}
