package stack

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/coffer-run/coffer/attest/plan"
)

// Image is an image that a stack's node has.
type Image struct {
	Name string
	// Digest is that of the manifest, as plans have it.
	Digest string
	// Bytes is the size of what was imported or fetched, as it lies compressed.
	Bytes int64
	Added time.Time
	// Signed says that there is a file of a signature. Each job checks it anew.
	Signed bool
}

// ErrImageUsed means that a job uses the image.
var ErrImageUsed = errors.New("a job uses it")

// withContainerd calls f with the stack's containerd, which is reached by root alone.
func (e Endpoint) withContainerd(ctx context.Context, f func(context.Context, *containerd.Client) error) error {
	if _, err := os.Stat(e.layout.containerdSocket()); err != nil {
		return fmt.Errorf("reach containerd: %w", err)
	}
	c, err := e.layout.openContainerd()
	if err != nil {
		return fmt.Errorf("reach containerd: %w", err)
	}
	return errors.Join(f(namespaces.WithNamespace(ctx, Namespace), c), c.Close())
}

// Images lists the images of the stack's node, by name.
func (e Endpoint) Images(ctx context.Context) ([]Image, error) {
	var out []Image
	err := e.withContainerd(ctx, func(ctx context.Context, c *containerd.Client) error {
		list, err := c.ListImages(ctx)
		if err != nil {
			return fmt.Errorf("list images: %w", err)
		}
		for _, i := range list {
			size, err := i.Size(ctx)
			if err != nil {
				return fmt.Errorf("size of image %s: %w", i.Name(), err)
			}
			signatures, err := e.layout.signaturesOf(i.Target().Digest.String())
			if err != nil {
				return err
			}
			out = append(out, Image{Name: i.Name(), Digest: i.Target().Digest.String(), Bytes: size, Added: i.Metadata().CreatedAt, Signed: signatures})
		}
		return nil
	})
	slices.SortFunc(out, func(a, b Image) int { return strings.Compare(a.Name, b.Name) })
	return out, err
}

func (l Layout) signaturesOf(digest string) (bool, error) {
	files, err := os.ReadDir(path.Join(l.signatures(), strings.TrimPrefix(digest, "sha256:")))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	// What an image is made from lies beside its signatures.
	return slices.ContainsFunc(files, func(f fs.DirEntry) bool {
		return !strings.HasSuffix(f.Name(), sbomFile) && !strings.HasSuffix(f.Name(), ".cdx.json")
	}), err
}

// ImportImages brings an OCI archive into a stack that is up, as Up does, and signs what
// it has with the stack's key. It returns the images' names.
func (e Endpoint) ImportImages(ctx context.Context, archive string) (names []string, err error) {
	err = e.withContainerd(ctx, func(ctx context.Context, c *containerd.Client) error {
		if names, err = e.layout.importArchive(ctx, c, archive); err != nil {
			return fmt.Errorf("import %s: %w", archive, err)
		}
		store, err := imageStore()
		if err != nil || store != plan.ImageStoreTmpfs {
			return err
		}
		if err := e.layout.keepArchive(archive, names); err != nil {
			return fmt.Errorf("keep %s: %w", archive, err)
		}
		return nil
	})
	return names, err
}

// RemoveImages removes images from a stack that is up, and what it kept of their
// archives. None is removed if one is missing or used by a job, or if an archive has
// others beside them that would be lost at the next start.
func (e Endpoint) RemoveImages(ctx context.Context, names ...string) error {
	return e.withContainerd(ctx, func(ctx context.Context, c *containerd.Client) error {
		for _, name := range names {
			if _, err := c.GetImage(ctx, name); err != nil {
				if errdefs.IsNotFound(err) {
					return fmt.Errorf("remove image %s: %w", name, fs.ErrNotExist)
				}
				return fmt.Errorf("remove image %s: %w", name, err)
			}
		}
		containers, err := c.Containers(ctx)
		if err != nil {
			return fmt.Errorf("list containers: %w", err)
		}
		for _, job := range containers {
			info, err := job.Info(ctx)
			if err != nil && !errdefs.IsNotFound(err) {
				return fmt.Errorf("look at container %s: %w", job.ID(), err)
			}
			if slices.Contains(names, info.Image) {
				return fmt.Errorf("remove image %s: %w: %s", info.Image, ErrImageUsed, job.ID())
			}
		}
		kept, err := e.layout.keptArchives()
		if err != nil {
			return err
		}
		var gone []string
		for _, archive := range kept {
			has, err := imagesOf(archive)
			if err != nil {
				return fmt.Errorf("read %s: %w", archive, err)
			}
			others := slices.DeleteFunc(slices.Clone(has), func(n string) bool { return slices.Contains(names, n) })
			switch {
			case len(others) == 0:
				gone = append(gone, archive)
			case len(others) < len(has):
				return fmt.Errorf("its archive has %s too: remove all of them, or none", strings.Join(others, ", "))
			}
		}
		for _, archive := range gone {
			if err := os.Remove(archive); err != nil {
				return err
			}
		}
		for _, name := range names {
			if err := c.ImageService().Delete(ctx, name, images.SynchronousDelete()); err != nil {
				return fmt.Errorf("remove image %s: %w", name, err)
			}
		}
		return nil
	})
}

// maxIndex bounds the lists of images in an archive, in bytes.
const maxIndex = 4 << 20

// imagesOf reads the names of the images in an archive: those of an OCI layout's index,
// or of a list as `docker save` writes it.
func imagesOf(archive string) ([]string, error) {
	f, err := os.Open(archive)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	var names []string
	for t := tar.NewReader(f); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return names, nil
		}
		if err != nil {
			return nil, err
		}
		switch path.Clean(h.Name) {
		case "index.json":
			var index struct {
				Manifests []struct {
					Annotations map[string]string `json:"annotations"`
				} `json:"manifests"`
			}
			if err := json.NewDecoder(io.LimitReader(t, maxIndex)).Decode(&index); err != nil {
				return nil, err
			}
			for _, m := range index.Manifests {
				if n := m.Annotations[images.AnnotationImageName]; n != "" {
					names = append(names, n)
				} else if n := m.Annotations["org.opencontainers.image.ref.name"]; n != "" {
					names = append(names, n)
				}
			}
		case "manifest.json":
			var list []struct{ RepoTags []string }
			if err := json.NewDecoder(io.LimitReader(t, maxIndex)).Decode(&list); err != nil {
				return nil, err
			}
			for _, m := range list {
				names = append(names, m.RepoTags...)
			}
		}
	}
}
