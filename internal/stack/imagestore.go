package stack

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/sandbox"
)

// imageMemory bounds what the images of a stack may take of the machine's memory.
const imageMemory = "50%"

// imageStore says where a stack keeps images: in memory, where nobody outside of the
// machine can change them after they were checked, unless memory is swapped to a disk.
func imageStore() (string, error) {
	swap, err := sandbox.SwapOn()
	if err != nil || swap {
		return plan.ImageStoreDisk, err
	}
	return plan.ImageStoreTmpfs, nil
}

// containerdRoot is where containerd keeps images, their records and snapshots.
func (l Layout) containerdRoot() (string, error) {
	store, err := imageStore()
	if err != nil || store == plan.ImageStoreDisk {
		return l.path("containerd", "root"), err
	}
	return l.imageMemory(), nil
}

func (l Layout) imageMemory() string { return l.run("images") }

// mountImages gives containerd its memory. Taking the stack down unmounts it.
func (s *starter) mountImages(context.Context) (string, error) {
	store, err := imageStore()
	if err != nil {
		return "", err
	}
	if store == plan.ImageStoreDisk {
		return "on disk, because swap is on: every start of a job hashes its image", nil
	}
	if err := os.MkdirAll(s.imageMemory(), 0o700); err != nil {
		return "", err
	}
	if err := unix.Mount("coffer-images", s.imageMemory(), "tmpfs", unix.MS_NODEV, "mode=0700,size="+imageMemory); err != nil {
		return "", fmt.Errorf("mount memory for images at %s: %w", s.imageMemory(), err)
	}
	return "in memory, at most " + imageMemory + " of it", nil
}

// archives has a copy of every archive whose images were imported into memory, so that
// the next `up` has them. An archive follows the one that had the same images.
func (l Layout) archives() string { return l.path("images", "archives") }

// keptArchives lists them, the oldest first: of two that have an image of one name, the
// later counts.
func (l Layout) keptArchives() ([]string, error) {
	found, err := filepath.Glob(filepath.Join(l.archives(), "*.tar"))
	if err != nil {
		return nil, err
	}
	age := map[string]time.Time{}
	for _, f := range found {
		fi, err := os.Stat(f)
		if err != nil {
			return nil, err
		}
		age[f] = fi.ModTime()
	}
	slices.SortFunc(found, func(a, b string) int { return age[a].Compare(age[b]) })
	return found, nil
}

// keepArchive copies an archive, whole or not at all.
func (l Layout) keepArchive(archive string, names []string) (err error) {
	if err := os.MkdirAll(l.archives(), 0o700); err != nil {
		return err
	}
	sum := sha256.Sum256([]byte(strings.Join(slices.Sorted(slices.Values(names)), "\n")))
	to := filepath.Join(l.archives(), hex.EncodeToString(sum[:16])+".tar")
	in, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	if same, err := sameFile(in, to); err != nil || same {
		return err
	}
	out, err := os.CreateTemp(l.archives(), ".new-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(out.Name()))
		}
	}()
	_, err = io.Copy(out, in)
	if err = errors.Join(err, out.Sync(), out.Close()); err != nil {
		return err
	}
	return os.Rename(out.Name(), to)
}

func sameFile(open *os.File, path string) (bool, error) {
	a, err := open.Stat()
	if err != nil {
		return false, err
	}
	b, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && os.SameFile(a, b), err
}

// importImages brings OCI archives into the stack's namespace and unpacks them: those
// of earlier starts, and then those of this one.
func (s *starter) importImages(ctx context.Context) (string, error) {
	store, err := imageStore()
	if err != nil {
		return "", err
	}
	kept, err := s.keptArchives()
	if err != nil {
		return "", err
	}
	c, err := s.openContainerd()
	if err != nil {
		return "", err
	}
	defer func() { _ = c.Close() }()
	var names []string
	for i, archive := range slices.Concat(kept, s.o.Images) {
		n, err := s.importArchive(ctx, c, archive)
		if err != nil {
			return "", fmt.Errorf("import %s: %w", archive, err)
		}
		if store == plan.ImageStoreTmpfs && i >= len(kept) {
			if err := s.keepArchive(archive, n); err != nil {
				return "", fmt.Errorf("keep %s: %w", archive, err)
			}
		}
		names = append(names, n...)
	}
	slices.Sort(names)
	return strings.Join(slices.Compact(names), ", "), nil
}

func (l Layout) importArchive(ctx context.Context, c *containerd.Client, archive string) ([]string, error) {
	f, err := os.Open(archive)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	images, err := sandbox.Import(ctx, c, f, 0)
	if err != nil {
		return nil, err
	}
	if len(images) == 0 {
		return nil, errors.New("the archive names no image (annotation org.opencontainers.image.ref.name)")
	}
	sbom, err := readSBOM(archive)
	if err != nil {
		return nil, err
	}
	names := make([]string, 0, len(images))
	for _, i := range images {
		if err := l.signImage(i.Target.Digest.String()); err != nil {
			return nil, fmt.Errorf("sign %s: %w", i.Name, err)
		}
		if err := l.signSBOM(i.Target.Digest.String(), sbom); err != nil {
			return nil, fmt.Errorf("sign the bill of materials of %s: %w", i.Name, err)
		}
		names = append(names, i.Name)
	}
	return names, nil
}
