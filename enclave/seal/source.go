package seal

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// Tree is a file or folder on disk, to be sealed.
type Tree struct {
	Sources []Source
	root    *os.Root
}

// OpenTree lists the regular files under path, or path itself if it is one.
// Anything else under it, symbolic links among them, is an error: what is sealed
// is what is there. Empty folders and file modes are not kept.
func OpenTree(path string) (_ *Tree, err error) {
	st, err := os.Lstat(path)
	if err != nil {
		return nil, fmt.Errorf("open source: %w", err)
	}
	dir, single := path, ""
	if st.Mode().IsRegular() {
		dir, single = filepath.Dir(path), filepath.Base(path)
	} else if !st.IsDir() {
		return nil, fmt.Errorf("open source: %s is neither a file nor a folder", path)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("open source: %w", err)
	}
	t := &Tree{root: root}
	defer func() {
		if err != nil {
			_ = root.Close()
		}
	}()
	if single != "" {
		t.add(single, st.Size())
		return t, nil
	}
	err = fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if !d.Type().IsRegular() {
			return fmt.Errorf("%s is not a regular file", name)
		}
		if len(t.Sources) == MaxFiles {
			return fmt.Errorf("more than %d files", MaxFiles)
		}
		i, err := d.Info()
		if err != nil {
			return err
		}
		t.add(name, i.Size())
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("open source: %w", err)
	}
	if len(t.Sources) == 0 {
		return nil, fmt.Errorf("open source: no files under %s", path)
	}
	return t, nil
}

// Close closes the folder.
func (t *Tree) Close() error { return t.root.Close() }

func (t *Tree) add(name string, size int64) {
	t.Sources = append(t.Sources, Source{Name: name, Size: size, Open: func() (Reader, error) {
		f, got, err := openRegular(t.root, name)
		if err != nil {
			return nil, err
		}
		st, err := f.Stat()
		if err != nil || got != size {
			_ = f.Close()
			return nil, errors.Join(err, fmt.Errorf("%s changed its size", name))
		}
		return &diskFile{File: f, size: size, mtime: st.ModTime()}, nil
	}})
}

type diskFile struct {
	*os.File
	size  int64
	mtime time.Time
}

func (d *diskFile) Close() error {
	st, err := d.Stat()
	if err == nil && (st.Size() != d.size || !st.ModTime().Equal(d.mtime)) {
		err = errors.New("the file changed while it was being sealed")
	}
	return errors.Join(err, d.File.Close())
}
