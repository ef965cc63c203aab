// Package source finds the places where sealed data lies. It sees ciphertext
// only and reads none of it; the holder gets the folder as a descriptor.
package source

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
)

// Folder returns the sealed folder at a file URI. It must exist.
func Folder(uri string) (string, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return "", fmt.Errorf("find source: %w", err)
	}
	if u.Scheme != "file" || u.Host != "" || !filepath.IsAbs(u.Path) {
		return "", fmt.Errorf("find source %.200q: want file:///absolute/path", uri)
	}
	st, err := os.Lstat(u.Path)
	if err != nil {
		return "", fmt.Errorf("find source: %w", err)
	}
	if !st.IsDir() {
		return "", fmt.Errorf("find source: %s is not a folder", u.Path)
	}
	return u.Path, nil
}

// Sink returns the folder NAME below the folder at a file URI, and makes it if
// it is not there, readable to nobody else.
func Sink(uri, name string) (string, error) {
	parent, err := Folder(uri)
	if err != nil {
		return "", err
	}
	if !filepath.IsLocal(name) || filepath.Base(name) != name {
		return "", fmt.Errorf("make sink: %q is not a plain name", name)
	}
	path := filepath.Join(parent, name)
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", fmt.Errorf("make sink: %w", err)
	}
	return path, nil
}
