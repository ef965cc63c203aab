// Package source finds the places where sealed data lies. It sees ciphertext
// only and reads none of it; the holder gets the folder as a descriptor.
//
// Not trusted: the URI, which an engineer writes and no plan names. Checked: that
// it leads to a plain folder without a symbolic link on the way, and not into the
// kernel's trees or those of running jobs.
package source

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNotThere means that there is no folder for sealed data where a URI leads.
var ErrNotThere = errors.New("no folder for sealed data is there")

// closed are the trees where no sealed data lies: the kernel's, and /run, where
// other jobs' opened inputs and checkpoints are.
var closed = []string{"/proc", "/sys", "/dev", "/run"}

// Folder returns the sealed folder at a file URI. It must exist: what leads to none is
// ErrNotThere.
func Folder(uri string) (string, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return "", fmt.Errorf("find source: %w", err)
	}
	if u.Scheme != "file" || u.Host != "" || !filepath.IsAbs(u.Path) || filepath.Clean(u.Path) != u.Path {
		return "", fmt.Errorf("find source %.200q: want file:///absolute/path", uri)
	}
	for _, c := range closed {
		if u.Path == c || strings.HasPrefix(u.Path, c+"/") {
			return "", fmt.Errorf("find source %s: %w: nothing below %s is a place for it", u.Path, ErrNotThere, c)
		}
	}
	fd, err := unix.Openat2(unix.AT_FDCWD, u.Path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS})
	if err != nil {
		return "", fmt.Errorf("find source: %w: %w", ErrNotThere, &os.PathError{Op: "open folder", Path: u.Path, Err: err})
	}
	return u.Path, unix.Close(fd)
}

// Sink makes the folder NAME below the folder at a file URI, readable to nobody
// else. One that exists is somebody else's, and an error.
func Sink(uri, name string) (string, error) {
	parent, err := Folder(uri)
	if err != nil {
		return "", err
	}
	if !filepath.IsLocal(name) || filepath.Base(name) != name {
		return "", fmt.Errorf("make sink: %q is not a plain name", name)
	}
	path := filepath.Join(parent, name)
	err = os.Mkdir(path, 0o700)
	if errors.Is(err, os.ErrExist) {
		return "", fmt.Errorf("make sink: %s is there already", path)
	}
	if err != nil {
		return "", fmt.Errorf("make sink: %w", err)
	}
	return path, nil
}
