// Package sink finds and keeps the places where a job's sealed checkpoints go. It
// sees ciphertext and signed records only.
//
// Not trusted: what lies in a sink. Checked: nothing that a key would be needed
// for; the holder checks what a job resumes from. A job's checkpoints lie in
// JOB/SEQUENCE-NAME below the URI of the job file.
package sink

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/runner/source"
)

// ErrNotFound means that a sink has no such checkpoint.
var ErrNotFound = errors.New("no such checkpoint in the sink")

// folderForm is what holdapi.CheckpointFolder makes.
var folderForm = regexp.MustCompile(`^([0-9]{6,})-[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

// maxListed bounds the folders of one listing.
const maxListed = 100_000

// Create makes the folder of a job's checkpoints below the folder at a file URI.
// One that is there and empty is the job's own, from before it began anew.
func Create(uri, job string) (string, error) {
	dir, err := Dir(uri, job)
	if err != nil {
		return "", err
	}
	l, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return source.Sink(uri, job)
	case err != nil:
		return "", fmt.Errorf("make sink: %w", err)
	case len(l) > 0:
		return "", fmt.Errorf("make sink: %s is there already", dir)
	}
	return dir, nil
}

// Dir is the folder of a job's checkpoints.
func Dir(uri, job string) (string, error) {
	parent, err := source.Folder(uri)
	if err != nil {
		return "", err
	}
	if !filepath.IsLocal(job) || filepath.Base(job) != job {
		return "", fmt.Errorf("find sink: %q is not a plain name", job)
	}
	return filepath.Join(parent, job), nil
}

// Sequence is the number of the checkpoint in a folder of a sink. What ends in .tmp
// is a commit that was cut off, and none.
func Sequence(folder string) (uint64, bool) {
	m := folderForm.FindStringSubmatch(folder)
	if m == nil || strings.HasSuffix(folder, ".tmp") {
		return 0, false
	}
	n, err := strconv.ParseUint(m[1], 10, 64)
	return n, err == nil
}

// TryNumber calls try with each folder that is called as a job's checkpoint with the
// given number, until try takes one. There is one, unless somebody else can write to
// the place: try MUST look at all of a folder.
func TryNumber(uri, job string, sequence uint64, try func(dir string) error) error {
	dir, err := Dir(uri, job)
	if err != nil {
		return err
	}
	l, err := list(dir)
	if err != nil {
		return err
	}
	var refused error
	for _, name := range l {
		if n, ok := Sequence(name); !ok || n != sequence {
			continue
		}
		err := try(filepath.Join(dir, name))
		if err == nil {
			return nil
		}
		refused = errors.Join(refused, fmt.Errorf("%s: %w", name, err))
	}
	return cmp.Or(refused, fmt.Errorf("checkpoint %d of job %s in %s: %w", sequence, job, uri, ErrNotFound))
}

// TryDigest calls try with each folder that says that it is the checkpoint with the
// given digest, whichever job made it, until try takes one. Whoever can write to the
// place can put folders there that say so, and try MUST look at all of one.
func TryDigest(uri string, digest plan.Digest, try func(dir string) error) error {
	parent, err := source.Folder(uri)
	if err != nil {
		return err
	}
	jobs, err := list(parent)
	if err != nil {
		return err
	}
	var refused error
	for _, job := range jobs {
		l, err := list(filepath.Join(parent, job))
		if err != nil {
			continue // no folder, or not to be read: not the one that is looked for
		}
		for _, name := range l {
			dir := filepath.Join(parent, job, name)
			if _, ok := Sequence(name); !ok || !isDigest(dir, digest) {
				continue
			}
			if err := try(dir); err != nil {
				refused = errors.Join(refused, fmt.Errorf("%s of job %s: %w", name, job, err))
				continue
			}
			return nil
		}
	}
	return cmp.Or(refused, fmt.Errorf("checkpoint %s in %s: %w", digest, uri, ErrNotFound))
}

func isDigest(dir string, digest plan.Digest) bool {
	_, r, err := ReadRecord(dir)
	return err == nil && r.Digest == digest
}

// The files of a checkpoint's folder beside the sealed ones (docs/formats/sealed.md).
const (
	recordName = "record.json"
	anchorName = "anchor.jwt"
	tmpSuffix  = ".tmp"

	manifestName = "manifest.json"
)

// ReadRecord reads a checkpoint's record and checks its signature by the key
// beside it.
func ReadRecord(dir string) (receipt.SignedCheckpoint, receipt.CheckpointRecord, error) {
	b, err := read(dir, recordName)
	if err != nil {
		return receipt.SignedCheckpoint{}, receipt.CheckpointRecord{}, fmt.Errorf("read checkpoint record: %w", err)
	}
	return receipt.ParseSignedCheckpoint(b)
}

// ReadAnchor reads the broker's countersignature (receipt.CheckpointHead) in a
// checkpoint's folder; empty if there is none.
func ReadAnchor(dir string) (string, error) {
	b, err := read(dir, anchorName)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read countersignature: %w", err)
	}
	return string(b), nil
}

// read reads a small file. Links are refused: whoever can write to a sink must
// not have the agent read elsewhere.
func read(dir, name string) ([]byte, error) {
	fd, err := unix.Openat2(unix.AT_FDCWD, filepath.Join(dir, name), &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_NONBLOCK | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: filepath.Join(dir, name), Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, receipt.MaxSignedCheckpoint+1))
	if err == nil && len(b) > receipt.MaxSignedCheckpoint {
		err = fmt.Errorf("%s has more than %d bytes", name, receipt.MaxSignedCheckpoint)
	}
	return b, err
}

// WriteAnchor puts the broker's countersignature into a checkpoint's folder,
// durably. One that is there is replaced by the same.
func WriteAnchor(dir, token string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("write countersignature: %w", err)
	}
	defer root.Close()
	if err := writeWhole(root, anchorName, []byte(token)); err != nil {
		return fmt.Errorf("write countersignature: %w", err)
	}
	return nil
}

// writeWhole puts a small file into a folder, durably. There is a whole one or none,
// whenever it is interrupted.
func writeWhole(root *os.Root, name string, body []byte) error {
	tmp := name + tmpSuffix
	if err := root.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// Another name until it is durable: half a file would pass for damage.
	f, err := root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(body)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := root.Rename(tmp, name); err != nil {
		return err
	}
	d, err := root.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func list(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("list sink: %w", err)
	}
	defer d.Close()
	l, err := d.Readdirnames(maxListed + 1)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("list sink: %w", err)
	}
	if len(l) > maxListed {
		return nil, fmt.Errorf("list sink: %s has more than %d entries", dir, maxListed)
	}
	return l, nil
}

// Trim removes a checkpoint's sealed files and leaves its record, which shows that
// the line of checkpoints has no gap. The manifest goes first, so that no half of
// a checkpoint passes for a whole one.
func Trim(dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("remove checkpoint: %w", err)
	}
	defer root.Close()
	if err := root.Remove(manifestName); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove checkpoint: %w", err)
	}
	l, err := list(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range l {
		if name != recordName && name != anchorName {
			errs = append(errs, root.Remove(name))
		}
	}
	return errors.Join(errs...)
}
