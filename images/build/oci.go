package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
)

var epochTime = time.Unix(epoch, 0).UTC()

// maxAdded bounds the second layer: it is for a job's programs, not for its data.
const maxAdded = 64 << 20

// layer is a compressed layer whose digests are known. It implements v1.Layer.
type layer struct {
	open           func() (io.ReadCloser, error)
	digest, diffID v1.Hash
	size           int64
}

func (l *layer) Digest() (v1.Hash, error)            { return l.digest, nil }
func (l *layer) DiffID() (v1.Hash, error)            { return l.diffID, nil }
func (l *layer) Compressed() (io.ReadCloser, error)  { return l.open() }
func (l *layer) Size() (int64, error)                { return l.size, nil }
func (l *layer) MediaType() (types.MediaType, error) { return types.OCILayerZStd, nil }
func (l *layer) Uncompressed() (io.ReadCloser, error) {
	compressed, err := l.open()
	if err != nil {
		return nil, err
	}
	r, err := zstd.NewReader(compressed)
	if err != nil {
		compressed.Close()
		return nil, err
	}
	return r.IOReadCloser(), nil
}

// compress writes what fill writes to w as zstd and returns its description. One encoder goroutine: the output must not depend on the machine.
func compress(w io.Writer, fill func(io.Writer) error) (description, error) {
	digest, diffID := sha256.New(), sha256.New()
	var size counter
	z, err := zstd.NewWriter(io.MultiWriter(w, digest, &size), zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return description{}, fmt.Errorf("starting a compressor: %w", err)
	}
	if err := fill(io.MultiWriter(z, diffID)); err != nil {
		return description{}, err
	}
	if err := z.Close(); err != nil {
		return description{}, fmt.Errorf("compressing a layer: %w", err)
	}
	return description{
		Digest: "sha256:" + hex.EncodeToString(digest.Sum(nil)),
		DiffID: "sha256:" + hex.EncodeToString(diffID.Sum(nil)),
		Size:   int64(size),
	}, nil
}

type counter int64

func (c *counter) Write(b []byte) (int, error) {
	*c += counter(len(b))
	return len(b), nil
}

type addition struct{ source, target string }

// addedLayer holds files of this machine, owned by root and readable by the job.
func addedLayer(adds []addition) (*layer, error) {
	nodes := map[string]*node{}
	for _, a := range adds {
		info, err := os.Stat(a.source)
		if err != nil {
			return nil, fmt.Errorf("adding a file: %w", err)
		}
		if !info.Mode().IsRegular() || info.Size() > maxAdded {
			return nil, fmt.Errorf("adding %s: not a regular file of at most %d bytes", a.source, maxAdded)
		}
		content, err := os.ReadFile(a.source)
		if err != nil {
			return nil, fmt.Errorf("adding a file: %w", err)
		}
		name := strings.TrimPrefix(a.target, "/")
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			nodes[dir] = newDir(0o755)
		}
		// Only the executable bit is taken over: the rest is the umask of whoever checked the file out.
		mode := int64(0o644)
		if info.Mode()&0o100 != 0 {
			mode = 0o755
		}
		nodes[name] = newFile(content, mode)
	}
	var blob bytes.Buffer
	d, err := compress(&blob, func(w io.Writer) error { return writeTar(w, nodes) })
	if err != nil {
		return nil, err
	}
	return newLayer(d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(blob.Bytes())), nil })
}

func newLayer(d description, open func() (io.ReadCloser, error)) (*layer, error) {
	digest, err := v1.NewHash(d.Digest)
	if err != nil {
		return nil, fmt.Errorf("reading a layer's digest: %w", err)
	}
	diffID, err := v1.NewHash(d.DiffID)
	if err != nil {
		return nil, fmt.Errorf("reading a layer's digest: %w", err)
	}
	return &layer{open: open, digest: digest, diffID: diffID, size: d.Size}, nil
}

// writeImage writes dir/name (an OCI layout), dir/name.tar (the same as an archive) and dir/name.digest, each replaced in one step.
func writeImage(dir, name string, layers []*layer) (v1.Hash, error) {
	img, err := assemble(layers)
	if err != nil {
		return v1.Hash{}, fmt.Errorf("assembling the image: %w", err)
	}
	digest, err := img.Digest()
	if err != nil {
		return v1.Hash{}, fmt.Errorf("assembling the image: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return v1.Hash{}, fmt.Errorf("creating the output folder: %w", err)
	}
	final := filepath.Join(dir, name)
	fresh := final + ".new"
	if err := os.RemoveAll(fresh); err != nil {
		return v1.Hash{}, fmt.Errorf("clearing an interrupted image: %w", err)
	}
	p, err := layout.Write(fresh, empty.Index)
	if err != nil {
		return v1.Hash{}, fmt.Errorf("writing an OCI layout: %w", err)
	}
	// containerd names an imported image by the second of these.
	ref := "coffer.local/" + name + ":latest"
	names := map[string]string{"org.opencontainers.image.ref.name": ref, "io.containerd.image.name": ref}
	if err := p.AppendImage(img, layout.WithAnnotations(names)); err != nil {
		return v1.Hash{}, fmt.Errorf("writing an OCI layout: %w", err)
	}
	if err := archive(fresh, final+".tar"); err != nil {
		return v1.Hash{}, err
	}
	if err := os.RemoveAll(final); err != nil {
		return v1.Hash{}, fmt.Errorf("replacing an OCI layout: %w", err)
	}
	if err := os.Rename(fresh, final); err != nil {
		return v1.Hash{}, fmt.Errorf("replacing an OCI layout: %w", err)
	}
	return digest, writeFile(final+".digest", []byte(digest.String()+"\n"))
}

func assemble(layers []*layer) (v1.Image, error) {
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	for _, l := range layers {
		var err error
		img, err = mutate.Append(img, mutate.Addendum{Layer: l, History: v1.History{Created: v1.Time{Time: epochTime}, CreatedBy: "coffer images"}})
		if err != nil {
			return nil, err
		}
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", "amd64"
	config.Created = v1.Time{Time: epochTime}
	config.Config = v1.Config{Env: environment, User: user, WorkingDir: "/", Cmd: []string{"/usr/bin/python3"}}
	return mutate.ConfigFile(img, config)
}

// archive writes a folder's files as a tar in which only their names and bytes vary.
func archive(dir, target string) error {
	f, err := os.Create(target + ".new")
	if err != nil {
		return fmt.Errorf("writing an archive: %w", err)
	}
	defer f.Close()
	w := tar.NewWriter(f)
	// WalkDir's order is by name.
	err = filepath.WalkDir(dir, func(name string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		if err != nil {
			return err
		}
		in, err := os.Open(name)
		if err != nil {
			return err
		}
		defer in.Close()
		info, err := in.Stat()
		if err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: filepath.ToSlash(rel), Mode: 0o644, Size: info.Size(), ModTime: epochTime}); err != nil {
			return err
		}
		_, err = io.Copy(w, in)
		return err
	})
	if err != nil {
		return fmt.Errorf("writing an archive: %w", err)
	}
	if err := w.Close(); err != nil {
		return fmt.Errorf("writing an archive: %w", err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("writing an archive: %w", err)
	}
	if err := os.Rename(target+".new", target); err != nil {
		return fmt.Errorf("writing an archive: %w", err)
	}
	return nil
}
